"""Flat lists: the same results as ordinary lists, and an optimizer that notices what others do to
its state.
"""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD, functional
from sfron_fast.ops import native, reference
from sfron_fast.ops.lists import flat_size, flatten_masks, spread, spread_masks, spread_scalars

SHAPES = [(3, 5), (), (0,), (64,), (65,), (1,), (2, 3, 7)]
STEP = {"lr": 0.1, "weight_decay": 0.01}


def tensors(seed, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def flatten(lists):
    whole = lists[0].new_zeros(flat_size(lists))
    for view, tensor in zip(spread([whole], lists), lists, strict=True):
        view.copy_(tensor)
    return whole


def test_layout_by_hand():
    """15, 1, 0 and 64 elements begin at 0, 64, 128 and 128; then 65 at 192; 320 in all."""
    like = tensors(0, SHAPES[:5])
    assert flat_size(like) == 320
    whole = torch.arange(320.0)
    views = spread([whole], like)
    assert [float(v.reshape(-1)[0]) if v.numel() else None for v in views] == [
        0,
        64,
        None,
        128,
        192,
    ]
    assert [v.shape for v in views] == [t.shape for t in like]
    packed = spread_masks([torch.arange(40, dtype=torch.uint8)], like)
    assert [p.tolist() for p in packed] == [
        [0, 1],
        [8],
        [],
        list(range(16, 24)),
        list(range(24, 33)),
    ]


def test_ordinary_lists_pass_through():
    like = tensors(0)
    assert spread(like, like) is like
    assert spread([], like) == []
    one = [torch.ones(3)]
    assert spread(one, one) is one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ops_take_flat_lists(dtype):
    def run(form):
        params, grads, m, v, slow = (tensors(i, dtype=dtype) for i in range(5))
        v = [x.abs() for x in v]
        masks = [reference.pack_bits(x > 0) for x in tensors(9)]
        steps = [torch.tensor(float(i)) for i in range(len(params))]
        if form == "flat":
            counts, masks = torch.stack(steps), flatten_masks(masks, params)
            lists = [flatten(m)], [flatten(v)], [counts], [flatten(slow)], [masks]
        else:
            lists = m, v, steps, slow, masks
        m, v, steps, slow, masks = lists
        norm = functional.masked_grad_norm(grads, masks)
        functional.adamw_step_(
            params, grads, m, v, steps, masks=masks, norm=norm, max_norm=0.5, slow_save=slow, **STEP
        )
        functional.sgd_step_(params, grads, m, momentum=0.9, slow_from=slow, slow_lr=0.5, **STEP)
        steps = list(spread_scalars(steps, params))
        return [
            norm,
            *params,
            *spread(m, params),
            *spread(v, params),
            *spread(slow, params),
            *steps,
        ]

    for a, b in zip(run("lists"), run("flat"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avgs": [torch.zeros(7)]}, "exp_avgs: expected 7 tensors, or a flat one of shape"),
        ({"steps": [torch.zeros(6)]}, "steps: expected 7 tensors, or a flat one of shape"),
        (
            {"masks": [torch.zeros(7, dtype=torch.uint8)]},
            "masks: expected 7 tensors, or a flat one of shape",
        ),
        ({"exp_avgs": [torch.zeros(448, dtype=torch.float64)]}, "exp_avgs"),
        ({"masks": [torch.zeros(56)]}, "masks"),
    ],
)
def test_wrong_flat_lists_are_refused_and_nothing_is_written(change, message):
    params, grads, m, v = (tensors(i) for i in range(4))
    before = [p.clone() for p in params]
    steps = [torch.zeros(()) for _ in params]
    assert flat_size(params) == 448
    settings = {"exp_avgs": m, "exp_avg_sqs": v, "steps": steps, **change}
    with pytest.raises((ValueError, RuntimeError), match=message):
        functional.adamw_step_(params, grads, **settings, **STEP)
    assert all(map(torch.equal, params, before))


def optimizer(kind, shapes=SHAPES, mask=True):
    params = {f"p{i}": nn.Parameter(t) for i, t in enumerate(tensors(1, shapes))}
    saliency = SaliencyMask.from_bool(
        {n: t > 0 for n, t in zip(params, tensors(2, shapes), strict=True)}
    )
    knobs = {"momentum": 0.9} if kind is SFRonSGD else {}
    opt = kind(
        params.items(),
        **STEP,
        **knobs,
        saliency=saliency if mask else None,
        slow_lr=0.5,
        max_norm=1.0,
    )
    return opt, list(params.values())


def cycle(opt, params, seed, without=()):
    for method in (opt.forget_step, opt.step):
        seed += 1
        for i, (p, g) in enumerate(
            zip(params, tensors(seed, [p.shape for p in params]), strict=True)
        ):
            p.grad = None if i in without else g
        method()


@pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
def test_state_is_flat_and_its_entries_are_shaped_like_the_parameters(kind):
    opt, params = optimizer(kind)
    assert not opt.state
    cycle(opt, params, 10)
    key = "momentum_buffer" if kind is SFRonSGD else "exp_avg"
    entries = [opt.state[p][key] for p in params]
    assert [e.shape for e in entries] == [p.shape for p in params]
    assert len({e.untyped_storage().data_ptr() for e in entries if e.numel()}) == 1


def test_nothing_is_kept_where_nothing_is_needed():
    params = [nn.Parameter(t) for t in tensors(1)]
    opt = SFRonSGD(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.forget_step()
    opt.step()
    assert not opt.state


DISTURB = {
    "replaced": (
        lambda opt, p, key: opt.state[p].update({key: torch.full_like(opt.state[p][key], 0.25)})
    ),
    "deleted": lambda opt, p, key: opt.state[p].pop(key),
    "cleared": lambda opt, p, key: opt.state.clear(),
    "dict replaced": lambda opt, p, key: opt.state.__setitem__(
        p, {k: v.clone() for k, v in opt.state[p].items()}
    ),
    "reloaded": lambda opt, p, key: opt.load_state_dict(opt.state_dict()),
}


@pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
@pytest.mark.parametrize("what", DISTURB)
@pytest.mark.parametrize("which", [0, 4, -1])
def test_disturbed_state_gives_what_separate_tensors_give(kind, what, which, monkeypatch):
    key = "momentum_buffer" if kind is SFRonSGD else "exp_avg"

    def run():
        opt, params = optimizer(kind)
        cycle(opt, params, 10)
        DISTURB[what](opt, params[which], key)
        cycle(opt, params, 20)
        cycle(opt, params, 30, without=(3,))
        cycle(opt, params, 40)
        return [p.detach() for p in params], opt.state_dict()["state"]

    flat_params, flat_state = run()
    monkeypatch.setattr("sfron_fast.optim.base.SFRonOptimizer._flat_states", lambda *_: None)
    params, state = run()
    assert all(map(torch.equal, flat_params, params))
    assert flat_state.keys() == state.keys()
    for index in state:
        assert flat_state[index].keys() == state[index].keys()
        assert all(torch.equal(flat_state[index][k], state[index][k]) for k in state[index])


def test_a_replaced_parameter_is_noticed():
    """Frameworks swap parameters inside a group; the old ones must not be updated any more."""
    opt, params = optimizer(SFRonAdamW, mask=False)
    cycle(opt, params, 10)
    old, new = params[3], nn.Parameter(params[3].detach().clone())
    group = opt.param_groups[0]["params"]
    group[3] = new
    before = old.detach().clone()
    cycle(opt, [*params[:3], new, *params[4:]], 20)
    assert torch.equal(old, before)
    assert not torch.equal(new, before)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not native.available(), reason="madvise of the kernels"
)
@pytest.mark.parametrize("count", [1, 2])
def test_large_state_asks_for_huge_pages(count):
    """The mapping's flags tell, whether or not Linux has any to give; 64 MB are always a new
    mapping.
    """
    params = [nn.Parameter(torch.zeros((1 << 24) // count)) for _ in range(count)]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = SFRonAdamW(params, lr=0.1, slow_lr=0.5)
    optimizer.forget_step()
    assert all(
        "hg" in flags_of(optimizer.state[params[-1]][key])
        for key in ("exp_avg", "exp_avg_sq", "slow")
    )


def flags_of(tensor):
    """Of the mapping that the middle of a tensor lies in."""
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("not mapped")
