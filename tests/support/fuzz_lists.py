"""Random arguments of the list ops: shapes, dtypes, strides, values, masks, flat lists, numbers;
ways to spoil them.

Hypothesis draws the structure, so that it can shrink it; the numbers come from torch, from a drawn
seed.
"""

import math

import torch
from cases import LAYOUTS, OTHER_STATES, Case, shifted, values
from hypothesis import strategies as st
from step_ops import with_codes
from torch import Tensor

from sfron_fast.ops.lists import flat_size, flatten_masks

DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ["normal", "normal", "special", "zero", "huge", "tiny", "one bad"]
SIDES = st.sampled_from([0, 1, 2, 3, 7, 8, 9])
SHAPES = st.one_of(
    st.lists(SIDES, max_size=4).map(tuple),
    st.sampled_from([(63,), (64,), (65,), (130,), (16, 5), (513,), (2049,), (2, 3, 5, 7)]),
    st.sampled_from([(3, 32), (2, 3, 96)]),  # whose moments may be codes
)
LAYOUT_NAMES = ["plain", "plain", "plain", "shifted", *LAYOUTS]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides or another alignment."""
    return {"plain": lambda t: t, "shifted": shifted, **LAYOUTS}[layout](tensor)


def numbers(shape, dtype, kind: str) -> Tensor:
    if kind == "zero":
        return torch.zeros(shape, dtype=dtype)
    if kind == "special":
        return values(shape, dtype, "cpu", special=1 + int(torch.randint(7, ())))
    drawn = values(shape, dtype, "cpu", scale={"huge": 1e18, "tiny": 1e-30}.get(kind, 1.0))
    if kind == "one bad" and drawn.numel():
        bad = [math.inf, -math.inf, math.nan][int(torch.randint(3, ()))]
        drawn.view(-1)[int(torch.randint(drawn.numel(), ()))] = bad
    return drawn


def random_bits(shape) -> Tensor:
    """A packed mask: none (no bytes), all ones, all zeros or mixed; the spare bits of the last byte
    are anything.
    """
    size = (math.prod(shape) + 7) // 8
    way = int(torch.randint(5, ()))
    if way == 0:
        return torch.empty(0, dtype=torch.uint8)
    if way < 3:
        return torch.full((size,), 255 * (way - 1), dtype=torch.uint8)
    return torch.randint(256, (size,), dtype=torch.uint8)


def scalar(value: float | None) -> Tensor | None:
    return None if value is None else torch.tensor(value)


@st.composite
def lists(draw, flat: bool = True):
    """Draws a function that makes lists of tensors of common shapes; and masks for them."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
    dtype, layout, mixed = (
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(LAYOUT_NAMES)),
        draw(st.booleans()),
    )
    kind = draw(st.sampled_from(KINDS))
    flat_lists = flat and len(shapes) > 1 and draw(st.booleans())

    def make(dtype=dtype, kind=kind, *, may_be_flat=False, positive=False):
        if may_be_flat and flat_lists:
            whole = numbers((flat_size([torch.empty(s) for s in shapes]),), dtype, kind)
            return [whole.abs() if positive else whole]
        made = [numbers(s, dtype, kind) for s in shapes]
        chosen = [layout if not mixed or torch.rand(()) < 0.5 else "plain" for _ in made]
        return [laid_out(t.abs() if positive else t, w) for t, w in zip(made, chosen, strict=True)]

    def masks():
        bits = [random_bits(s) for s in shapes]
        dense = all(b.numel() == (math.prod(s) + 7) // 8 for b, s in zip(bits, shapes, strict=True))
        return (
            [flatten_masks(bits, [torch.empty(s) for s in shapes])]
            if flat_lists and dense
            else bits
        )

    return make, masks, dtype, len(shapes), flat_lists


RATES = st.sampled_from([0.0, 1e-6, 0.01, 0.5, 3.0])
RESTS = st.sampled_from([0.0, 0.3, 0.9, 0.999])


@st.composite
def step_arguments(draw, make, masks, dtype):
    """What the two optimizer steps share, apart from state."""
    kind = draw(st.sampled_from([None, torch.int8, torch.int16]))

    def corrections(wanted):
        if kind is None or dtype != torch.bfloat16 or not wanted:
            return []
        return [t * (40 if kind == torch.int8 else 9000) for t in make(kind, "normal")]

    norm = draw(st.sampled_from([None, None, 0.0, 0.5, 20.0, 3e38, math.inf, math.nan]))
    saves, blends = draw(st.booleans()), draw(st.booleans())
    tensors = {
        "corrections": corrections(True),
        "slow_save": make(kind="normal", may_be_flat=True) if saves else [],
        "slow_save_corrections": corrections(saves),
        "slow_from": make(kind="normal", may_be_flat=True) if blends else [],
        "slow_from_corrections": corrections(blends),
        "masks": masks() if draw(st.booleans()) else [],
        "norm": scalar(norm),
        "grad_scale": scalar(draw(st.sampled_from([None, None, 1.0, 3.0, 65536.0]))),
        "found_inf": scalar(draw(st.sampled_from([None, None, 0.0, 1.0]))),
        "skipped": torch.tensor(draw(st.integers(0, 3))) if draw(st.booleans()) else None,
    }
    given = {
        "lr": draw(RATES),
        "weight_decay": draw(RATES),
        "slow_lr": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
    }
    numbers = (
        torch.tensor(list(given.values()), dtype=torch.float64)
        if draw(st.integers(0, 4)) == 0
        else None
    )
    given = {"lr": 9.0, "weight_decay": 9.0, "slow_lr": 0.9} if numbers is not None else given
    flags = {
        "maximize": draw(st.booleans()),
        "freeze_masked": draw(st.booleans()),
        "max_norm": draw(
            st.sampled_from([math.inf] if norm is None else [math.inf, 1e-3, 1.0, 50.0])
        ),
    }
    return tensors, {**given, **flags}, numbers


def may_be_codes(dtype, flat):
    return st.booleans() if dtype != torch.float64 and not flat else st.just(False)


def counts(draw, count, flat):
    taken = torch.randint(0, 2000, (count,)).float() * draw(st.sampled_from([0.0, 1.0]))
    return [taken] if flat else [t.clone() for t in taken]


@st.composite
def sgd_case(draw):
    make, masks, dtype, count, flat = draw(lists())
    shared, scalars, numbers = draw(step_arguments(make, masks, dtype))
    momentum = draw(RESTS)
    state = draw(st.sampled_from([dtype, dict(OTHER_STATES).get(dtype, dtype)]))
    buffers = make(state, "normal", may_be_flat=True) if momentum or draw(st.booleans()) else []
    own = {"momentum_buffers": buffers}
    scales = with_codes(
        {"momentum_buffers": torch.int8}, own, draw(may_be_codes(dtype, flat)) and buffers
    )
    counted = scales or shared["corrections"] or draw(st.booleans())
    tensors = {
        "params": make(),
        "grads": make(),
        **own,
        "scales": scales,
        "steps": counts(draw, count, flat) if counted else [],
        **shared,
        "numbers": numbers,
    }
    own = {
        "momentum": momentum,
        "dampening": draw(RESTS),
        "nesterov": draw(st.booleans()),
        "first": draw(st.booleans()),
    }
    return Case(tensors, {**scalars, **own})


@st.composite
def adamw_case(draw):
    make, masks, dtype, count, flat = draw(lists())
    shared, scalars, numbers = draw(step_arguments(make, masks, dtype))
    state = draw(st.sampled_from([dtype, dict(OTHER_STATES).get(dtype, dtype)]))
    moments = {
        "exp_avgs": make(state, "normal", may_be_flat=True),
        "exp_avg_sqs": make(state, "normal", may_be_flat=True, positive=True),
    }
    kinds = {"exp_avgs": torch.int8, "exp_avg_sqs": torch.uint8}
    scales = with_codes(kinds, moments, draw(may_be_codes(dtype, flat)))
    amsgrad = not scales and draw(st.booleans())
    tensors = {
        "params": make(),
        "grads": make(),
        **moments,
        "max_exp_avg_sqs": (
            make(state, "normal", may_be_flat=True, positive=True) if amsgrad else []
        ),
        "scales": scales,
        "steps": counts(draw, count, flat),
        **shared,
        "numbers": numbers,
    }
    own = {
        "beta1": draw(RESTS),
        "beta2": draw(RESTS),
        "eps": draw(st.sampled_from([0.0, 1e-8, 0.1])),
        "decoupled": draw(st.booleans()),
    }
    return Case(tensors, {**scalars, **own})


@st.composite
def norm_case(draw):
    make, masks, _, _, _ = draw(lists())
    scale = scalar(draw(st.sampled_from([None, 1.0, 3.0, 65536.0])))
    return Case(
        {"grads": make(), "masks": masks() if draw(st.booleans()) else [], "grad_scale": scale}, {}
    )


def one_number(value: float, name: str, in_tensor: bool) -> tuple[dict, dict]:
    """A number as such, or in the tensor that overrules it."""
    numbers = torch.tensor([value], dtype=torch.float64) if in_tensor else None
    return {"numbers": numbers}, {name: 0.9 if in_tensor else value}


@st.composite
def interpolate_case(draw):
    make, *_ = draw(lists())
    numbers, scalars = one_number(draw(st.floats(0.0, 1.0)), "slow_lr", draw(st.booleans()))
    return Case({"slow": make(), "fast": make(may_be_flat=True), **numbers}, scalars)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def fisher_case(draw):
    make, _, dtype, _, _ = draw(lists())
    numbers, scalars = one_number(draw(st.floats(0.0, 1e6)), "weight", draw(st.booleans()))
    fisher = make(wide(dtype), "normal", positive=True, may_be_flat=True)
    return Case({"fisher": fisher, "grads": make(), **numbers}, scalars)


@st.composite
def mask_case(draw):
    make, _, dtype, _, _ = draw(lists())
    tensors = {"forget": make(wide(dtype), positive=True)}
    tensors["retain"] = make(wide(dtype), positive=True, may_be_flat=True)
    return Case(
        tensors,
        {"threshold": draw(st.floats(1e-3, 1e3)), "eps": draw(st.sampled_from([0.0, 1e-15]))},
    )


OPS = {
    "masked_grad_norm": norm_case(),
    "sgd_step_": sgd_case(),
    "adamw_step_": adamw_case(),
    "interpolate_": interpolate_case(),
    "fisher_accumulate_": fisher_case(),
    "saliency_mask": mask_case(),
}


# --- ways to spoil a case -------------------------------------------------------------------------


def _expanded(t: Tensor) -> Tensor:
    return torch.ones((), dtype=t.dtype).expand(t.shape)


def _lazily_negated(t: Tensor) -> Tensor:
    """The same values, stored with the other sign under torch's negative bit."""
    return (
        torch.complex(torch.zeros_like(t.float()), -t.float()).conj().imag
        if t.dtype == torch.float32
        else t
    )


TENSOR_SPOILERS = {
    "short": lambda t: t.reshape(-1)[:-1],
    "long": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]),
    "other shape": lambda t: t.unsqueeze(0),
    "int": lambda t: t.to(torch.int32),
    "bool": lambda t: t.to(torch.bool),
    "complex": lambda t: t.to(torch.complex64),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "bytes": lambda t: t.to(torch.uint8),
    "sparse": lambda t: t.to_sparse() if t.dim() else t.to(torch.int32),
    "meta": lambda t: t.to("meta"),
    "expanded": _expanded,
    "negated": _lazily_negated,
    "none": lambda t: None,
    "number": lambda t: 1.0,
    "leaf": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t.to(torch.int32),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}
LIST_SPOILERS = {
    "shorter": lambda ts: ts[:-1],
    "longer": lambda ts: [*ts, torch.ones(3)],
    "empty": lambda ts: [],
    "reversed": lambda ts: ts[::-1],
    "same twice": lambda ts: [ts[0]] * len(ts),
    "flat": lambda ts: [torch.cat([t.reshape(-1) for t in ts])],
}
READ = ("grads", "masks", "slow_from", "slow_from_corrections")  # the same twice is no mistake
BAD_NUMBERS = [-1.0, math.nan, math.inf, -math.inf, 1.5, 1e39, 1e-46, -0.0, None, "much", 10**400]


def spoiled(value, way):
    """The value, spoiled; as it is where torch cannot do that (a sparse meta tensor, say)."""
    try:
        return way(value)
    except (AttributeError, RuntimeError, TypeError):
        return value


@st.composite
def spoiled_case(draw, good):
    """A case with one or two mistakes, and what was done to it."""
    case, done = draw(good), []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([*case.tensors, *case.scalars]))
        value = case.tensors.get(name, case.scalars.get(name))
        if name in case.scalars:
            way = draw(st.sampled_from(BAD_NUMBERS))
            case.scalars[name] = way
        elif isinstance(value, list) and value and draw(st.booleans()):
            ways = [w for w in LIST_SPOILERS if w != "same twice" or name in READ]
            way = draw(st.sampled_from(ways))
            case.tensors[name] = spoiled(value, LIST_SPOILERS[way])
        elif isinstance(value, list) and value:
            way, i = (
                draw(st.sampled_from(list(TENSOR_SPOILERS))),
                draw(st.integers(0, len(value) - 1)),
            )
            value[i] = spoiled(value[i], TENSOR_SPOILERS[way])
        elif isinstance(value, Tensor):
            way = draw(st.sampled_from(list(TENSOR_SPOILERS)))
            case.tensors[name] = spoiled(value, TENSOR_SPOILERS[way])
        elif value is None or value == []:
            way = "present"
            case.tensors[name] = torch.ones(3) if value is None else [torch.ones(3)]
        else:
            continue
        done.append((name, way))
    return case, done
