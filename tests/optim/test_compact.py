"""``weight_bits`` and ``state_dtype=torch.int8``: whole runs, state dicts, refusals."""

import copy
import io
import pickle

import pytest
import torch
from judging import assert_same_bits
from torch import nn

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD, step_in_backward
from sfron_fast.ops.bits import unpack_bits
from sfron_fast.ops.split_weights import join

BF16 = torch.bfloat16
KINDS = {SFRonSGD: {"momentum": 0.9}, SFRonAdamW: {}}
BOTH = pytest.mark.parametrize("kind", KINDS)
WAYS = {
    "24": {"weight_bits": 24},
    "32": {"weight_bits": 32},
    "codes": {"state_dtype": torch.int8},
    "24, codes": {"weight_bits": 24, "state_dtype": torch.int8},
}
EACH_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
X, Y = torch.randn(48, 64, generator=torch.Generator().manual_seed(5)), torch.arange(48) % 10


class Net(nn.Module):
    """Rows of 64 and 96 elements and biases; a layer that only every other batch reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.sometimes, self.last = nn.Linear(64, 96), nn.Linear(96, 96), None
        self.last = nn.Linear(96, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.first(x).tanh()
        x = self.sometimes(x).tanh() if self.calls % 2 else x
        return self.last(x)


def net(dtype=BF16):
    return Net().to(dtype)


def mask_of(model):
    generator = torch.Generator().manual_seed(9)
    bits = {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()}
    return SaliencyMask.from_bool(bits)


def make(kind, model, **settings):
    settings = {"lr": 1e-3, "retain_steps": 2, "slow_lr": 0.5, "max_norm": 1.0, **settings}
    named = model.named_parameters()
    return kind(named, saliency=mask_of(model), weight_decay=0.1, **KINDS[kind], **settings)


def train(model, optimizer, start, stop, inside=False):
    for i in range(start, stop):
        optimizer.zero_grad()
        x, y = X[i % 3 :: 3].to(next(model.parameters()).dtype), Y[i % 3 :: 3]
        loss = nn.functional.cross_entropy(model(x).float(), y)
        if i % 3 == 0:
            (-loss).backward()
            optimizer.forget_step()
        elif inside:
            with step_in_backward(optimizer):
                loss.backward()
            optimizer.step()
        else:
            loss.backward()
            optimizer.step()


def assert_same_run(a, b):
    for (name, p), (_, q) in zip(a[0].named_parameters(), b[0].named_parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), name)
        mine, theirs = a[1].state[p], b[1].state[q]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert_same_bits(value, theirs[key], f"{key} of {name}")


def weights(model, optimizer):
    state = [optimizer.state[p] for p in model.parameters()]
    return [
        join(p.detach(), s["correction"]) for p, s in zip(model.parameters(), state, strict=True)
    ]


@BOTH
@pytest.mark.parametrize("moments", ["shared", "separate", "none"])
@pytest.mark.parametrize("semantics", ["gradient", "update"])
def test_32_bits_are_the_run_of_fp32_weights(kind, moments, semantics):
    """Cycles with masks, clip, decay and slow weights; some weights without gradients at times."""
    settings = {"moments": moments, "mask_semantics": semantics}
    split, whole = net(), net().float()
    ours = make(kind, split, weight_bits=32, **settings)
    theirs = make(kind, whole, **settings)
    generator = torch.Generator().manual_seed(3)
    for i in range(12):
        for index, (p, q) in enumerate(zip(split.parameters(), whole.parameters(), strict=True)):
            grad = torch.randn(p.shape, generator=generator).to(BF16)
            absent = index == i % 6 and i % 4 > 0
            p.grad, q.grad = (None, None) if absent else (grad, grad.float())
        for optimizer in (ours, theirs):
            (optimizer.forget_step if i % 3 == 0 else optimizer.step)()
        for found, wanted in zip(weights(split, ours), whole.parameters(), strict=True):
            assert_same_bits(found, wanted.detach())
    for p, q in zip(split.parameters(), whole.parameters(), strict=True):
        slow = join(ours.state[p]["slow"], ours.state[p]["slow_correction"])
        assert_same_bits(slow, theirs.state[q]["slow"])


@BOTH
@EACH_WAY
@pytest.mark.parametrize("moments", ["shared", "separate", "none"])
@pytest.mark.parametrize("how", ["portable", "compact", "pickle", "copy"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(kind, way, moments, how):
    settings = {**way, "moments": moments, "mask_semantics": "update"}
    model = net()
    optimizer = make(kind, model, **settings)
    train(model, optimizer, 0, 5)  # inside a cycle
    assert optimizer.mid_cycle
    if how in ("pickle", "copy"):
        pair = (model, optimizer)
        again = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    else:
        state = optimizer.state_dict() if how == "portable" else optimizer.compact_state_dict()
        file = io.BytesIO()
        torch.save([model.state_dict(), state], file)
        file.seek(0)
        saved, state = torch.load(file, weights_only=True)
        again = net(), None
        again[0].load_state_dict(saved)
        again[0].calls = model.calls
        again = again[0], make(kind, again[0], **settings)
        again[1].load_state_dict(state)
    assert_same_run(again, (model, optimizer))
    for pair in (again, (model, optimizer)):
        train(*pair, 5, 13)
    assert_same_run(again, (model, optimizer))


@BOTH
@EACH_WAY
def test_steps_inside_backward_have_the_same_bits(kind, way):
    pairs = []
    for inside in (False, True):
        model = net()
        pairs.append((model, make(kind, model, **way)))
        train(*pairs[-1], 0, 12, inside)
    assert_same_run(*pairs)


@BOTH
@EACH_WAY
def test_update_semantics_keep_masked_weights(kind, way):
    model = net()
    optimizer = make(kind, model, mask_semantics="update", slow_lr=1.0, **way)
    train(model, optimizer, 0, 3)
    before = [p.detach().clone() for p in model.parameters()]
    kept = {p: dict(s) for p, s in optimizer.state.items()}
    kept = {p: {k: v.clone() for k, v in s.items()} for p, s in kept.items()}
    train(model, optimizer, 3, 4)
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        frozen = ~unpack_bits(optimizer.saliency[name], p.shape)
        assert torch.equal(p.detach()[frozen], old[frozen])
        if "correction" in kept[p]:
            now = optimizer.state[p]["correction"]
            assert torch.equal(now[frozen], kept[p]["correction"][frozen])
            assert p.grad is None or not torch.equal(now, kept[p]["correction"])


@BOTH
@EACH_WAY
def test_a_skipped_step_changes_nothing(kind, way):
    model = net()
    optimizer = make(kind, model, clip_retain=True, **way)
    train(model, optimizer, 0, 3)
    before = copy.deepcopy((model, optimizer))
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    optimizer.forget_step()
    assert optimizer.skipped_steps == 1
    for p in model.parameters():  # what a cycle starts from is kept all the same
        assert_same_bits(optimizer.state[p]["slow"], p.detach())
    for each in (optimizer, before[1]):
        for state in each.state.values():
            del state["slow"]
            state.pop("slow_correction", None)
    assert_same_run((model, optimizer), before)


@BOTH
@EACH_WAY
def test_flat_lists_and_single_parameters_have_the_same_bits(kind, way):
    """A group of one dtype goes as flat lists where it can; one parameter a group cannot."""
    whole, single = net(), net()
    ours = make(kind, whole, **way)
    groups = [{"params": [pair]} for pair in single.named_parameters()]
    settings = {"lr": 1e-3, "retain_steps": 2, "slow_lr": 0.5, "max_norm": 1.0}
    theirs = kind(
        groups, saliency=mask_of(single), weight_decay=0.1, **KINDS[kind], **settings, **way
    )
    for model, optimizer in ((whole, ours), (single, theirs)):
        train(model, optimizer, 0, 9)
    assert_same_run((whole, ours), (single, theirs))


@BOTH
@EACH_WAY
def test_channels_last(kind, way):
    """Groups follow memory, within an index of the first dimension; a state dict does not."""
    torch.manual_seed(0)
    weight = torch.randn(8, 32, 3, 3).to(BF16)
    rows = [
        nn.Parameter(weight.clone()),
        nn.Parameter(weight.to(memory_format=torch.channels_last)),
    ]
    optimizers = [kind([p], lr=1e-2, **KINDS[kind], **way) for p in rows]
    for _ in range(4):
        grad = torch.randn(8, 32, 3, 3).to(BF16)
        for p, optimizer in zip(rows, optimizers, strict=True):
            p.grad = grad.clone()
            optimizer.step()
    for p, optimizer in zip(rows, optimizers, strict=True):
        again = kind([p], lr=1e-2, **KINDS[kind], **way)
        again.load_state_dict(optimizer.state_dict())
        for key, value in optimizer.state[p].items():
            assert_same_bits(again.state[p][key], value, key)
    assert rows[1].is_contiguous(memory_format=torch.channels_last)
    assert (rows[0] - rows[1]).abs().max() < 0.1


@EACH_WAY
def test_torch_goes_on_from_the_stock_state(way):
    """In fp32, without what only we keep; and its state loads here."""
    model = net()
    optimizer = make(SFRonAdamW, model, **way)
    train(model, optimizer, 0, 6)
    stock = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = optimizer.stock_state_dict()
    for one in state["state"].values():
        assert set(one) == {"exp_avg", "exp_avg_sq", "step"}
        assert {v.dtype for v in one.values()} == {torch.float32}
    stock.load_state_dict(state)
    other = SFRonAdamW(model.parameters(), **way)
    other.load_state_dict(stock.state_dict())
    for p in model.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert other.state[p][key].dtype == optimizer.state[p][key].dtype


def test_bytes_of_state():
    """Of a weight with rows of 256: 1 for the correction, 2 for the moments, 8 / 256 for scales."""
    weight = nn.Parameter(torch.ones(64, 256, dtype=BF16))
    optimizer = SFRonAdamW([weight], weight_bits=24, state_dtype=torch.int8)
    optimizer.init_state()
    held = sum(t.nbytes for k, t in optimizer.state[weight].items() if k != "step")
    assert held == 64 * 256 * 3 + 64 * 8
    assert optimizer.compact_state_dict()["state"][0]["exp_avg"].dtype == torch.int8
    assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == torch.float32
    assert "scales" not in optimizer.state_dict()["state"][0]


@pytest.mark.parametrize(
    ("argument", "dtype", "settings"),
    [
        ("weight_bits", torch.float32, {"weight_bits": 24}),
        ("weight_bits", torch.float16, {"weight_bits": 32}),
        ("weight_bits", BF16, {"weight_bits": 16}),
        ("state_dtype", torch.float64, {"state_dtype": torch.int8}),
        ("state_dtype", BF16, {"state_dtype": torch.uint8}),
        ("amsgrad", BF16, {"state_dtype": torch.int8, "amsgrad": True}),
    ],
)
def test_refused_by_name(argument, dtype, settings):
    with pytest.raises(ValueError, match=f"{argument}: expected"):
        SFRonAdamW([nn.Parameter(torch.ones(4, 32, dtype=dtype))], **settings)


@pytest.mark.parametrize(
    ("setting", "value", "argument"),
    [
        ("state_dtype", torch.float32, "exp_avg"),
        ("state_dtype", None, "exp_avg"),
        ("weight_bits", None, "weight_bits"),
        ("weight_bits", 32, "correction"),
    ],
)
def test_a_change_in_mid_run_is_refused_before_anything_moves(setting, value, argument):
    model = net()
    optimizer = make(SFRonAdamW, model, weight_bits=24, state_dtype=torch.int8)
    train(model, optimizer, 0, 3)
    before = copy.deepcopy((model, optimizer))
    optimizer.param_groups[0][setting] = value
    with pytest.raises(ValueError, match=argument):
        optimizer.forget_step()
    assert_same_run((model, optimizer), before)


@BOTH
def test_a_state_that_no_longer_fits_is_refused(kind):
    model = net()
    optimizer = make(kind, model, weight_bits=24, state_dtype=torch.int8)
    train(model, optimizer, 0, 3)
    weight = model.first.weight
    for key, wrong in {"correction": torch.int16, "scales": torch.float64}.items():
        kept = optimizer.state[weight][key]
        optimizer.state[weight][key] = kept.to(wrong)
        before = copy.deepcopy((model, optimizer))
        with pytest.raises((ValueError, RuntimeError), match=key):
            optimizer.forget_step()
        assert_same_run((model, optimizer), before)
        optimizer.state[weight][key] = kept
    model.float()
    with pytest.raises(ValueError, match="weight_bits"):
        optimizer.forget_step()


def test_a_run_with_other_bits_is_refused():
    model = net()
    optimizer = make(SFRonAdamW, model, weight_bits=24)
    train(model, optimizer, 0, 3)
    with pytest.raises(ValueError, match="weight_bits 24"):
        make(SFRonAdamW, net()).load_state_dict(optimizer.state_dict())
