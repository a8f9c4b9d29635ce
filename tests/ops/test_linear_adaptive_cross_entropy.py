"""``linear_adaptive_cross_entropy`` against ``adaptive_cross_entropy`` of all logits in fp64."""

import math
from itertools import accumulate

import pytest
import torch
from head_cases import error, small_tiles

import sfron_fast as sf
from sfron_fast.ops import linear_adaptive_cross_entropy as file
from sfron_fast.ops import linear_one_pass, linear_tiles

SAMPLES, TOKENS, FEATURES, CLASSES = 6, 7, 16, 203
ROWS = SAMPLES * TOKENS
ROW = 4 * CLASSES  # bytes of a row of logits
SUMS = 4 * CLASSES * FEATURES
# the longest sample has five labels: four passes, a chunk of a sample or two, all at once
WORKSPACES = {"none": 0, "too small": 4 * ROW, "chunks": SUMS + 11 * ROW, "one chunk": None}


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    small_tiles(monkeypatch)


class Batch:
    """Hidden states, head, labels (some ignored, sample 1 without any) and samples."""

    def __init__(self, dtype=torch.float32, shuffled=False):
        torch.manual_seed(0)
        self.hidden = torch.randn(ROWS, FEATURES).to(dtype)
        self.weight = torch.randn(CLASSES, FEATURES).to(dtype)
        self.bias = torch.randn(CLASSES).to(dtype)
        self.labels = torch.randint(CLASSES, (ROWS,))
        self.labels[::3] = -100
        self.labels[TOKENS : 2 * TOKENS] = -100
        self.index = torch.arange(SAMPLES).repeat_interleave(TOKENS)
        self.order = torch.randperm(ROWS) if shuffled else torch.arange(ROWS)

    def leaves(self, dtype=None):
        tensors = (self.hidden, self.weight, self.bias)
        return [t.to(dtype or t.dtype).clone().requires_grad_() for t in tensors]

    def found(self, upstream=-1.75, **settings):
        """Loss, losses, weights, normaliser and gradients."""
        hidden, weight, bias = leaves = self.leaves()
        result = sf.linear_adaptive_cross_entropy(
            hidden[self.order],
            weight,
            self.labels[self.order],
            sample_index=self.index[self.order],
            bias=bias,
            **settings,
        )
        (result.loss * upstream).backward()
        return [*(t.detach() for t in result), *(t.grad for t in leaves)]

    def truth(self, rule, upstream=-1.75, normalise=True, shares=None):
        """By torch alone; ``rule``: losses [samples] -> raw weights; ``shares``: the same for the
        normaliser.
        """
        hidden, weight, bias = leaves = self.leaves(torch.float64)
        logp = (hidden @ weight.t() + bias).log_softmax(1)
        counted = self.labels != -100
        picked = logp.gather(1, self.labels.clamp_min(0)[:, None])[:, 0]
        by_sample = torch.where(counted, -picked, 0.0).view(SAMPLES, TOKENS)
        tokens = counted.view(SAMPLES, TOKENS).sum(1)
        losses = by_sample.sum(1) / tokens.clamp_min(1)
        raw = torch.where(tokens > 0, rule(losses.detach()), 0.0)
        counted = torch.where(tokens > 0, (shares or rule)(losses.detach()), 0.0)
        normaliser = counted.sum()
        weights = raw / normaliser if normalise else raw
        loss = (weights * losses).sum()
        (loss * upstream).backward()
        return [loss.detach(), losses.detach(), weights, normaliser, *(t.grad for t in leaves)]


def adaptive(losses):
    return losses.clamp_min(1e-6) ** -0.5


def assert_close(found, wanted, tolerance):
    names = ("loss", "losses", "weights", "normaliser", "d hidden", "d weight", "d bias")
    for name, got, true in zip(names, found, wanted, strict=True):
        bound = max(tolerance, 4e-7) if name[0] == "d" else max(min(tolerance, 1e-6), 1e-12)
        assert error(got, true) < bound, name


@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("normalise", [True, False], ids=["divided", "not divided"])
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_right(dtype, workspace, normalise, shuffled):
    batch = Batch(dtype, shuffled)
    found = batch.found(normalise=normalise, workspace=WORKSPACES[workspace])
    # bf16: products of rounded hidden states, and one rounding of a gradient
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    reference = Batch(dtype)
    assert_close(found, reference.truth(adaptive, normalise=normalise), tolerance)


def test_the_package_agrees():
    """The op over logits, which has tests of its own."""
    batch = Batch()
    loss, *_, to_hidden, _, _ = batch.found(upstream=1.0, temperature=2.0, floor=1e-2)
    hidden = batch.hidden.double().requires_grad_()
    logits = hidden @ batch.weight.double().t() + batch.bias.double()
    wanted = sf.adaptive_cross_entropy(
        logits.view(SAMPLES, TOKENS, CLASSES), batch.labels.view(SAMPLES, TOKENS), 2.0, floor=1e-2
    )
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert error(to_hidden, hidden.grad) < 1e-6


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_any_rule_of_a_samples_own_loss(workspace):
    """NPO's: 2 sigmoid(beta (reference - sum l)), with references by sample; and one with signs."""
    batch, reference = Batch(), torch.linspace(2.0, 9.0, SAMPLES)
    signs = torch.tensor([1.0, 1.0, -2.0, 0.0, 3.0, -1.0])

    def npo(losses, samples):
        return 2 * torch.sigmoid(0.1 * (reference[samples] - losses))

    def signed(losses, samples):
        return signs[samples] * losses.sqrt()

    for rule in (npo, signed):
        found = batch.found(weigh=rule, workspace=WORKSPACES[workspace])
        assert_close(found, batch.truth(lambda x, rule=rule: rule(x, slice(None))), 2e-6)


@pytest.mark.parametrize("normalise", [True, False], ids=["divided", "not divided"])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_ceiling_leaves_the_normaliser_alone(workspace, normalise):
    """Of one number, and of one for each sample; where all have reached it there is no gradient."""
    batch = Batch()
    losses = batch.truth(adaptive)[1]
    references = torch.linspace(0.5, 2.0, SAMPLES) * float(losses[losses > 0].median())

    def capped(losses, samples):
        raw = adaptive(losses)
        return sf.with_ceiling(raw, losses, 1.0, references[samples].to(losses)), raw

    found = batch.found(weigh=capped, workspace=WORKSPACES[workspace], normalise=normalise)
    wanted = batch.truth(lambda x: capped(x, slice(None))[0], shares=adaptive, normalise=normalise)
    assert_close(found, wanted, 2e-6)
    assert 0 < int((found[2] == 0).sum() - 1) < SAMPLES - 1  # sample 1 has no label
    references *= 0.01
    _, _, weights, normaliser, *gradients = batch.found(
        weigh=capped, workspace=WORKSPACES[workspace], normalise=normalise
    )
    assert normaliser > 0
    assert not any(t.any() for t in (weights, *gradients))


def test_rows_are_samples_without_an_index():
    batch = Batch()
    hidden, weight, _ = leaves = batch.leaves()
    sf.linear_adaptive_cross_entropy(hidden, weight, batch.labels).loss.backward()
    logits = (t.detach().double().requires_grad_() for t in leaves[:2])
    hidden, weight = logits
    sf.adaptive_cross_entropy(hidden @ weight.t(), batch.labels).backward()
    assert error(leaves[0].grad, hidden.grad) < 1e-6
    assert error(leaves[1].grad, weight.grad) < 1e-6


@pytest.mark.parametrize(("workspace", "products"), [("none", 4), ("chunks", 3), ("one chunk", 3)])
def test_products_of_matrices(workspace, products, monkeypatch):
    """Of the rows that have a label; one less with a frozen head."""
    batch, counted = Batch(), []

    def counting(left, right, *rest, **more):
        counted.append(left.shape[0] * left.shape[1] * right.shape[1])
        product(left, right, *rest, **more)

    product = linear_tiles.product
    monkeypatch.setattr(linear_tiles, "product", counting)
    once = int((batch.labels != -100).sum()) * FEATURES * CLASSES
    for frozen in (False, True):
        hidden, weight, _ = batch.leaves()
        weight.requires_grad_(not frozen)
        counted.clear()
        room = WORKSPACES[workspace]
        with torch.device("cpu"):  # a default device is a mode that changes nothing
            sf.linear_adaptive_cross_entropy(
                hidden, weight, batch.labels, sample_index=batch.index, workspace=room
            ).loss.backward()
        assert sum(counted) == (products - frozen) * once
        assert (weight.grad is None) == frozen


def test_the_workspace_is_kept():
    """Beside the gradients: the workspace, and a tile for the exponentials."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 4).requires_grad_(), torch.randn(512, 4).requires_grad_()
    labels, workspace = torch.randint(512, (600,)), 100 * 4 * 512
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        sf.linear_adaptive_cross_entropy(hidden, weight, labels, workspace=workspace)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    peak = max(accumulate(e.nbytes() for e in events))
    assert workspace < peak < workspace + 3 * 4 * 100 * 64 + 60_000


def test_no_labels_at_all():
    batch = Batch()
    batch.labels[:] = -100
    for workspace in WORKSPACES.values():
        assert not any(t.any() for t in batch.found(workspace=workspace))


def test_temperatures_whose_weights_leave_fp32():
    """Four passes serve them, in relation to each other."""
    batch = Batch()
    found, wanted = batch.found(temperature=20.0), batch.truth(lambda x: x**-20.0)
    assert error(found[2], wanted[2]) < 1e-5
    assert error(found[4], wanted[4]) < 1e-5


def test_a_second_backward_raises():
    batch = Batch()
    hidden, weight, _ = batch.leaves()
    loss = sf.linear_adaptive_cross_entropy(hidden, weight, batch.labels).loss
    with pytest.raises(RuntimeError, match="workspace=0"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled():
    batch = Batch()

    def step(hidden, weight):
        return sf.linear_adaptive_cross_entropy(hidden, weight, batch.labels).loss * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (one, first, _), (other, second, _) = batch.leaves(), batch.leaves()
    step(one, first).backward()
    compiled(other, second).backward()
    torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(first.grad, second.grad)


def test_compiled_with_an_index():
    """Samples are counted, which breaks the graph and nothing else."""
    batch = Batch()
    compiled = torch.compile(sf.linear_adaptive_cross_entropy, backend="aot_eager")
    hidden, weight, _ = batch.leaves()
    compiled(hidden, weight, batch.labels, sample_index=batch.index).loss.backward()
    eager = batch.leaves()
    sf.linear_adaptive_cross_entropy(
        *eager[:2], batch.labels, sample_index=batch.index
    ).loss.backward()
    assert error(hidden.grad, eager[0].grad.double()) < 1e-6
    assert error(weight.grad, eager[1].grad.double()) < 1e-6


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_hidden_states_that_are_constants(workspace):
    """The head alone is trained."""
    batch = Batch()
    _, _, _, _, _, wanted, _ = batch.found(workspace=WORKSPACES[workspace])
    _, weight, _ = batch.leaves()
    loss = sf.linear_adaptive_cross_entropy(
        batch.hidden,
        weight,
        batch.labels,
        sample_index=batch.index,
        bias=batch.bias,
        workspace=WORKSPACES[workspace],
    ).loss
    (loss * -1.75).backward()
    assert torch.equal(weight.grad, wanted)


MUTANTS = {
    "weights of the first sample": lambda losses, samples: adaptive(losses[:1].expand_as(losses)),
    "other power": lambda losses, samples: losses**-0.6,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_judge_catches(name):
    with pytest.raises(AssertionError):
        assert_close(Batch().found(weigh=MUTANTS[name]), Batch().truth(adaptive), 1e-6)


def test_the_judge_catches_tokens_that_are_not_counted(monkeypatch):
    def summed(self, values, first, last, begin, end):
        return mean(self, values, first, last, begin, end) * self.tokens[first:last]

    mean = linear_one_pass.Samples.mean
    monkeypatch.setattr(linear_one_pass.Samples, "mean", summed)
    with pytest.raises(AssertionError):
        assert_close(Batch().found(), Batch().truth(adaptive), 1e-6)


WRONG = {
    "temperature": {"temperature": -1.0},
    "floor": {"floor": 0.0},
    "workspace": {"workspace": -1},
    "sample_index": {"sample_index": torch.zeros(3, dtype=torch.int64)},
    "sample_index ": {"sample_index": torch.full((ROWS,), -1)},
    "weigh": {"weigh": lambda losses, samples: losses.sum()},
    "weigh ": {"weigh": lambda losses, samples: (losses, losses.sum())},
    "weigh  ": {"weigh": lambda losses, samples: (losses, losses, losses)},
    "labels": {"labels": torch.full((ROWS,), CLASSES)},
    "logit_scale": {"logit_scale": math.nan},
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals(name):
    batch = Batch()
    hidden, weight, _ = batch.leaves()
    given = {"hidden": hidden, "weight": weight, "labels": batch.labels, **WRONG[name]}
    with pytest.raises(ValueError, match=f"^{name.strip()}: expected"):
        sf.linear_adaptive_cross_entropy(**given)


def test_the_stated_workspaces():
    assert file.WORKSPACE["cpu"] == 1 << 28
    assert file.WORKSPACE["cuda"] >= 4 * 2048 * 131_072
