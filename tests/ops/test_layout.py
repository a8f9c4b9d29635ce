"""Channels-last and transposed weights: the results of row-major ones, without a copy."""

import pytest
import torch
from torch import nn

from sfron_fast import (
    SaliencyMask,
    SFRonAdamW,
    SFRonSGD,
    estimate_fisher,
    step_in_backward,
)
from sfron_fast.ops import calls, layout, native

SHAPES = [(4, 3, 3, 3), (6, 4, 1, 1), (7,), (5, 9), (2, 3, 2, 3, 4), (3, 70, 2, 2), ()]
KINDS = {
    "sgd": lambda named, **k: SFRonSGD(named, lr=0.1, weight_decay=0.01, **k),
    "sgd momentum": lambda named, **k: SFRonSGD(named, lr=0.1, momentum=0.9, nesterov=True, **k),
    "adamw": lambda named, **k: SFRonAdamW(named, lr=0.1, **k),
    "amsgrad, update": lambda named, **k: SFRonAdamW(
        named, lr=0.1, amsgrad=True, mask_semantics="update", **k
    ),
    "separate": lambda named, **k: SFRonAdamW(named, lr=0.1, moments="separate", **k),
    "none": lambda named, **k: SFRonAdamW(named, lr=0.1, moments="none", **k),
}


def laid(tensor):
    """As other code would lay it out: channels last, a matrix transposed."""
    if tensor.dim() in (4, 5):
        last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=last)
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


def draw(seed, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


class Run:
    """An optimizer over weights of some layout; the gradients have one of their own."""

    def __init__(self, kind, of_params, of_grads, shapes=SHAPES, dtype=torch.float32, **knobs):
        self.of_grads, self.shapes, self.dtype, self.seed = of_grads, shapes, dtype, 10
        self.params = [nn.Parameter(of_params(t).clone()) for t in draw(1, shapes, dtype)]
        masks = {f"p{i}": t > 0 for i, t in enumerate(draw(2, shapes))}
        named = [(f"p{i}", p) for i, p in enumerate(self.params)]
        self.optimizer = KINDS[kind](
            named, saliency=SaliencyMask.from_bool(masks), slow_lr=0.3, **knobs
        )

    def cycle(self, without=()):
        for method in (self.optimizer.forget_step, self.optimizer.step):
            self.seed += 1
            for i, (p, g) in enumerate(
                zip(self.params, draw(self.seed, self.shapes, self.dtype), strict=True)
            ):
                p.grad = None if i in without else self.of_grads(g)
            method()
        return self

    def result(self):
        states = [
            v
            for p in self.params
            for _, v in sorted(self.optimizer.state[p].items())
            if v is not None
        ]
        return [p.detach() for p in self.params] + states


def plain(tensor):
    return tensor


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape, i
        assert torch.equal(a, b), i


@pytest.fixture
def no_copies(monkeypatch):
    """Fails where the ops have tensors copied. The reference kernels take any layout anyway."""

    def refuse(*_, **__):
        raise AssertionError("copied")

    if native.available():
        monkeypatch.setattr(calls, "_over_copies", refuse)


def test_orders_by_hand():
    image = torch.empty(2, 3, 4, 5)
    assert layout.orders_of([image]) == ()
    last = laid(image)
    assert layout.orders_of([last, image, image[0]]) == ((0, 2, 3, 1), None, None)
    assert layout.orders_of([torch.empty(3, 5).t()]) == ((1, 0),)
    # one pixel: both layouts at once
    assert layout.orders_of([laid(torch.empty(2, 3, 1, 1))]) == ()
    gaps = torch.empty(4, 6)[:, ::2]
    twice = torch.empty(3, 1).expand(3, 4)
    assert layout.orders_of([gaps, twice, torch.empty(0, 3).t()]) == ()


@pytest.mark.parametrize(
    "of_grads", [laid, plain], ids=["its gradients too", "gradients row-major"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_row_major(kind, of_grads, no_copies):
    found, wanted = (
        Run(kind, *of).cycle().cycle().cycle() for of in ((laid, of_grads), (plain, plain))
    )
    assert_same(found.result(), wanted.result())
    assert [p.stride() for p in found.params] == [laid(p.detach()).stride() for p in wanted.params]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_same_bits_in_every_dtype(dtype):
    found, wanted = (Run("adamw", of, of, dtype=dtype).cycle().cycle() for of in (laid, plain))
    assert_same(found.result(), wanted.result())


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1]], ids=["a list", "one"])
def test_a_clipped_step(shapes, no_copies):
    """The norm's sum goes in the order of memory, so the last bit of the clip may differ."""
    found, wanted = (
        Run("adamw", of, of, shapes, max_norm=0.5).cycle().cycle() for of in (laid, plain)
    )
    for a, b in zip(found.result(), wanted.result(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_gradients(kind):
    found, wanted = (
        Run(kind, of, of).cycle().cycle(without=(0, 4)).cycle() for of in (laid, plain)
    )
    assert_same(found.result(), wanted.result())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_that_changes(kind, no_copies):
    """As by ``model.to(memory_format=...)`` between two cycles, and back; the state follows."""
    found, wanted = Run(kind, plain, plain).cycle(), Run(kind, plain, plain).cycle()
    for new in (laid, lambda t: t.contiguous()):
        for p in found.params:
            p.data = new(p.data)
        found.of_grads = new
        assert_same(found.cycle().result(), wanted.cycle().result())


@pytest.mark.parametrize("kind", ["sgd momentum", "adamw"])
def test_state_dicts_go_between_layouts(kind):
    saved = Run(kind, laid, laid).cycle()
    for to in (laid, plain):
        found = Run(kind, to, to)
        with torch.no_grad():
            for p, old in zip(found.params, saved.params, strict=True):
                p.copy_(old)
        found.optimizer.load_state_dict(saved.optimizer.state_dict())
        found.seed = saved.seed
        wanted = Run(kind, plain, plain).cycle().cycle()
        assert_same(found.cycle().result(), wanted.result())


def test_a_bad_gradient_is_named_and_nothing_moves():
    run = Run("adamw", laid, laid).cycle()
    before = [t.clone() for t in run.result()]
    for p, g in zip(run.params, draw(5), strict=True):
        p.grad = laid(g)
    run.params[3].grad.resize_(9)
    with pytest.raises(ValueError, match=r"grads\[3\]: expected shape \(5, 9\), found \(9,\)"):
        run.optimizer.forget_step()
    assert_same(run.result(), before)


def without_strides():
    """Parameters that cannot be asked for their strides."""
    weights = [torch.eye(3).to_sparse_coo(), torch.eye(3).to_sparse_csr()]
    return [nn.UninitializedParameter(), *(nn.Parameter(w, requires_grad=False) for w in weights)]


@pytest.mark.parametrize("index", range(3), ids=["lazy", "coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_has_no_strides_and_no_gradient_is_passed_over(index):
    """As torch.optim does: a lazy weight before its first forward, a frozen sparse one."""
    weight = nn.Parameter(laid(draw(1)[0]))
    optimizer = SFRonAdamW([weight, without_strides()[index]], lr=0.1)
    for method in (optimizer.forget_step, optimizer.step):
        before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
        method()
        assert not torch.equal(weight, before)


def test_versions_count():
    run = Run("adamw", laid, laid)
    versions = [p._version for p in run.params]
    run.cycle()
    assert all(p._version > v for p, v in zip(run.params, versions, strict=True))


class Weighted(nn.Module):
    """Its gradients do not depend on how the weight is laid out."""

    def __init__(self, of):
        super().__init__()
        self.weight = nn.Parameter(of(draw(3)[0]).clone())

    def forward(self, x):
        return (x.flatten(1) @ self.weight.flatten()).unsqueeze(1) * torch.tensor([1.0, -1.0])


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_fisher(estimator, no_copies):
    data = [
        (torch.stack(draw(20 + i, SHAPES[:1] * 4)), torch.tensor([0, 1, 0, 1])) for i in range(3)
    ]
    found, wanted = (
        estimate_fisher(Weighted(of), data, estimator=estimator) for of in (laid, plain)
    )
    assert torch.equal(found["weight"], wanted["weight"])
    assert found["weight"].stride() == laid(wanted["weight"]).stride()


def test_step_in_backward(no_copies):
    def moved(of):
        run = Run("adamw", of, of)
        run.cycle()
        run.optimizer.zero_grad()
        with step_in_backward(run.optimizer):
            sum((p * g).sum() for p, g in zip(run.params, draw(7), strict=True)).backward()
        run.optimizer.step()
        return run.result()

    run_laid, run_plain = moved(laid), moved(plain)
    assert_same(run_laid, run_plain)
