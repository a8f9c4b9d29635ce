"""Inputs that every op is tested with, and the judgements that every op shares."""

import math
import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops

LOW = [torch.bfloat16, torch.float16]
NATIVE_DTYPES = [torch.float32, *LOW]
DTYPES = [*NATIVE_DTYPES, torch.float64]
OTHER_STATES = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]

ODD = [(1,), (63,), (), (64,), (0,), (65,), (7, 9), (3, 0, 2)]
TILES = [(511,), (512,), (513,), (65535,), (65536,), (65537,)]
MIXED = [*ODD, (513,), (40001,)]  # the last gives two threads work
MANY = [((7 * i) % 131,) for i in range(3000)]
SIZES = {"empty tensor": [(0,)], "0-dim": [()], "odd": ODD, "tiles": TILES, "many": MANY}
each_size = pytest.mark.parametrize(
    ("size", "dtype"),
    [
        pytest.param(size, dtype, id=f"{size}-{dtype}")
        for size in SIZES
        for dtype in DTYPES
        if size != "many" or dtype == torch.float32
    ],
)
LAYOUT_SHAPES = [(5,), (33, 17), (2, 3, 5, 7), ()]

SPECIAL = [
    math.inf,
    -math.inf,
    math.nan,
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    6e-8,
    1.2e-38,
    3.4e38,
    -65504.0,
    1e-20,
    1.0,
]


def only_long(value):
    """A parameter that only `make test-long` takes."""
    return pytest.param(value, marks=pytest.mark.long)


def mostly_long(every, *quick):
    """All of ``every`` as parameters; those that are not ``quick`` are for `make test-long`."""
    return [value if value in quick else only_long(value) for value in every]


def values(shape, dtype, device, *, scale=1.0, special=0) -> Tensor:
    """Normal numbers; with ``special`` = 1, 2, ...

    every second one is from SPECIAL, in an order of that number.
    """
    x = torch.randn(shape, dtype=torch.float64) * scale
    if special:
        flat = x.view(-1)
        picks = torch.tensor(SPECIAL, dtype=torch.float64)
        count = flat[::2].numel()
        flat[::2] = picks[
            (torch.arange(count) * special + torch.arange(count) // len(SPECIAL)) % len(SPECIAL)
        ]
    return x.to(dtype).to(device)


def value_list(shapes, dtype, device, *, scale=1.0, special=0) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    whole = values(sum(sizes), dtype, device, scale=scale, special=special)
    return [
        part.clone().view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)
    ]


def mask_bits(shape, device, density=0.5) -> Tensor:
    return (torch.rand(shape) < density).to(device)


@dataclass
class Case:
    """Arguments of one op by name: tensors, lists of tensors or None, and numbers."""

    tensors: dict[str, Any]
    scalars: dict[str, Any]

    def map(self, f: Callable[[Tensor], Tensor]) -> "Case":
        def each(value):
            if isinstance(value, list):
                return [f(t) for t in value]
            return None if value is None else f(value)

        return Case({k: each(v) for k, v in self.tensors.items()}, dict(self.scalars))

    def clone(self) -> "Case":
        return self.map(lambda t: t.detach().clone(memory_format=torch.contiguous_format))

    def run(self, kernel):
        return kernel(**self.tensors, **self.scalars)

    def flat(self) -> list[tuple[str, Tensor]]:
        named = []
        for name, value in self.tensors.items():
            if isinstance(value, list):
                named += [(f"{name}[{i}]", t) for i, t in enumerate(value)]
            elif value is not None:
                named.append((name, value))
        return named


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal bits, signs of zero included; any NaN equals any other."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (what, actual.dtype, expected.dtype)
    a, e = (t.detach().cpu().contiguous().resolve_neg().view(-1) for t in (actual, expected))
    if not a.dtype.is_floating_point:
        assert torch.equal(a, e), what
        return
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    wrong = (a.view(integer) != e.view(integer)) & ~(a.isnan() & e.isnan())
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {a.numel()} differ, first [{i}]: {a[i]!r}, not {e[i]!r}"
        )


def assert_same_case(actual: Case, expected: Case) -> None:
    assert_same_lists(actual.flat(), expected.flat())


def assert_same_lists(actual: list[tuple[str, Tensor]], expected: list[tuple[str, Tensor]]) -> None:
    """``assert_same_bits`` of named tensors; in one go for thousands of small ones."""
    by_type: dict[Any, list[tuple[str, Tensor, Tensor]]] = {}
    for (name, a), (_, e) in zip(actual, expected, strict=True):
        assert a.shape == e.shape, (name, a.shape, e.shape)
        by_type.setdefault((a.dtype, e.dtype, a.device, e.device), []).append((name, a, e))
    for triples in by_type.values():
        whole = [
            torch.cat([triple[side].detach().reshape(-1) for triple in triples]) for side in (1, 2)
        ]
        try:
            assert_same_bits(*whole)
        except AssertionError:
            for name, a, e in triples:
                assert_same_bits(a, e, name)
            raise


def named(tensors) -> list[tuple[str, Tensor]]:
    return [(f"output {i}", t) for i, t in enumerate(tensors)]


def flat_outputs(result) -> list[Tensor]:
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat_outputs(part)]


def assert_matches_reference(name: str, case: Case, kernel) -> None:
    """``kernel`` leaves every argument and returns every output with the bits of
    ``reference.<name>``.
    """
    expected = case.clone()
    wanted = expected.run(getattr(reference, name))
    got = case.run(kernel)
    assert_same_case(case, expected)
    assert_same_lists(named(flat_outputs(got)), named(flat_outputs(wanted)))


def assert_within(
    results: dict[str, Tensor], truths_and_bounds: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Each result within its bound of its truth, both fp64; where the truth is not finite it must
    be the same.
    """
    for name, result in results.items():
        truth, bound = truths_and_bounds[name]
        error = (result.detach().double() - truth).abs()
        wrong = ~((error <= bound) | (result == truth))
        if wrong.any():
            ratio = float((error / bound)[wrong].max())
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, error up to {ratio} bounds"
            )


def shifted(tensor: Tensor) -> Tensor:
    """The same values one element after the start of a buffer: contiguous, but not aligned."""
    buffer = torch.full((tensor.numel() + 2,), 7, dtype=tensor.dtype, device=tensor.device)
    view = buffer[1:-1].view(tensor.shape)
    view.copy_(tensor)
    return view


def assert_neighbours_untouched(case: Case) -> None:
    """Of tensors made by ``shifted``: the elements before and after them still hold 7."""
    for name, t in case.flat():
        buffer = torch.tensor([], dtype=t.dtype, device=t.device).set_(t.untyped_storage())
        assert buffer[[0, -1]].tolist() == [7, 7], name


def strided(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    wide = torch.full(
        (*tensor.shape[:-1], tensor.shape[-1] * 2), 7, dtype=tensor.dtype, device=tensor.device
    )
    wide[..., ::2] = tensor
    return wide[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def negated(tensor: Tensor) -> Tensor:
    """Contiguous, with the other sign in memory: torch tells by a bit of the tensor alone."""
    return torch._neg_view(-tensor)


LAYOUTS = {
    "strided": strided,
    "transposed": transposed,
    "channels-last": channels_last,
    "negated": negated,
}


def assert_layout_does_not_matter(
    name: str, case: Case, layout: Callable[[Tensor], Tensor], kernel
) -> None:
    """The same bits from tensors that lie otherwise in memory; masks are flat bytes and stay as
    they are.
    """
    expected = case.clone()
    wanted = flat_outputs(expected.run(kernel))
    laid = case.map(lambda t: t if t.dtype == torch.uint8 else layout(t))
    got = flat_outputs(laid.run(kernel))
    assert_same_case(laid, expected)
    assert_same_lists(named(got), named(wanted))


def assert_noncontiguous_is_right_or_refused(name: str, case: Case) -> None:
    """The op itself, called past ``functional``: it may refuse strides but not misread them."""
    expected = case.clone()
    wanted = flat_outputs(expected.run(getattr(reference, name)))
    laid = case.map(lambda t: t if t.dtype == torch.uint8 else transposed(t))
    before, refusal, got = laid.clone(), None, []
    try:
        got = flat_outputs(laid.run(getattr(ops, name)))
    except (RuntimeError, ValueError) as error:
        refusal = str(error)
    if refusal is not None:
        assert "contiguous" in refusal
        assert_same_case(laid, before)
        return
    assert_same_case(laid, expected)
    assert_same_lists(named(got), named(wanted))


def assert_deterministic(case: Case, kernel, set_threads=None) -> None:
    """Bitwise repeatable; with ``set_threads`` also on one and two threads."""
    results = []
    for threads in (2, 2, 1) if set_threads else (None, None):
        if threads:
            set_threads(threads)
        mine = case.clone()
        outputs = flat_outputs(mine.run(kernel))
        results.append([t for _, t in mine.flat()] + outputs)
    for other in results[1:]:
        assert_same_lists(named(other), named(results[0]))


def assert_opcheck(name: str, case: Case) -> None:
    op = getattr(torch.ops.sfron_fast, name).default
    torch.library.opcheck(op, (), {**case.tensors, **case.scalars})


def compiled_equals_eager(kernel, cases: list[Case], backend: str = "aot_eager") -> int:
    """Runs the cases through one compiled function, compares bits with eager, returns the number of
    compilations.
    """
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda tensors, scalars: kernel(**tensors, **scalars), fullgraph=True, backend=counter
    )
    for case in cases:
        eager, mine = case.clone(), case.clone()
        wanted, got = (
            flat_outputs(eager.run(kernel)),
            flat_outputs(compiled(mine.tensors, mine.scalars)),
        )
        assert_same_case(mine, eager)
        assert_same_lists(named(got), named(wanted))
    torch._dynamo.reset()
    return counter.frame_count


def entries(name: str):
    """The op as the dispatcher serves it, and the checked reference behind it."""
    return [("op", getattr(ops, name)), ("reference", ops.default_kernel(name))]


def assert_rejected(kernel, case: Case, argument: str) -> None:
    """Raises, naming the argument, and writes nothing."""
    before = case.map(lambda t: t.detach().clone())
    with pytest.raises(
        (ValueError, RuntimeError),
        match=rf"(^|\W){re.escape(argument)}(\[\d+\])?: expected .*, found",
    ):
        case.run(kernel)
    for (name, a), (_, e) in zip(case.flat(), before.flat(), strict=True):
        if a.device.type != "meta":
            assert_same_bits(a, e, name)


def bad_lists(*names: str):
    """(id, edit, argument) of the mistakes that every list of tensors can have."""

    def edits(name):
        def shorter(case):
            case.tensors[name].pop()

        def reshaped(case):
            case.tensors[name][1] = case.tensors[name][1].new_zeros(
                case.tensors[name][1].numel() + 1
            )

        def integers(case):
            case.tensors[name][1] = case.tensors[name][1].to(torch.int32)

        def elsewhere(case):
            case.tensors[name][1] = case.tensors[name][1].to("meta")

        return {"short": shorter, "shape": reshaped, "dtype": integers, "meta": elsewhere}

    return [(f"{name}-{kind}", edit, name) for name in names for kind, edit in edits(name).items()]


def blame(edits, ids, argument: str):
    """The same edits, those of ``ids`` noticed at another argument: lists are measured by one
    another.
    """
    return [(i, edit, argument if i in ids else named) for i, edit, named in edits]


def bad_masks():
    def shorter(case):
        case.tensors["masks"].pop()

    def few_bytes(case):
        case.tensors["masks"][1] = case.tensors["masks"][1][:-1]

    def many_bytes(case):
        case.tensors["masks"][1] = torch.cat([case.tensors["masks"][1]] * 2)

    def booleans(case):
        case.tensors["masks"][1] = case.tensors["masks"][1].to(torch.bool)

    def column(case):
        case.tensors["masks"][1] = case.tensors["masks"][1].unsqueeze(1)

    def elsewhere(case):
        case.tensors["masks"][1] = case.tensors["masks"][1].to("meta")

    edits = {
        "short": shorter,
        "few": few_bytes,
        "many": many_bytes,
        "bool": booleans,
        "2d": column,
        "meta": elsewhere,
    }
    return [(f"masks-{kind}", edit, "masks") for kind, edit in edits.items()]


def bad_scalar_tensors(*names: str):
    def two(name):
        return lambda case: case.tensors.update({name: torch.ones(2)})

    def double(name):
        return lambda case: case.tensors.update({name: torch.ones((), dtype=torch.float64)})

    return [
        (f"{n}-{k}", edit(n), n) for n in names for k, edit in (("two", two), ("double", double))
    ]


def bad_tensor_numbers(good: list[float], names=("lr", "weight_decay", "slow_lr")):
    """Numbers as one tensor: its own shape and dtype, and the ranges of its elements."""

    def put(values, dtype=torch.float64):
        return lambda case: case.tensors.update(numbers=torch.tensor(values, dtype=dtype))

    edits = [
        ("numbers-short", put(good[:-1]), "numbers"),
        ("numbers-float32", put(good, torch.float32), "numbers"),
    ]
    for i, name in enumerate(names):
        edits += [
            (f"numbers-{name}={bad}", put([*good[:i], bad, *good[i + 1 :]]), name)
            for bad in (-0.1, math.nan)
        ]
    return edits


def bad_skipped():
    def put(counter):
        return lambda case: case.tensors.update(skipped=counter)

    wrong = {"int32": torch.zeros((), dtype=torch.int32), "two": torch.zeros(2, dtype=torch.int64)}
    return [(f"skipped-{name}", put(counter), "skipped") for name, counter in wrong.items()]


def bad_numbers(**numbers):
    def put(name, value):
        return lambda case: case.scalars.update({name: value})

    return [
        (f"{name}={v}", put(name, v), name)
        for name, bad in numbers.items()
        for v in (*bad, math.nan)
    ]


def reject_params(edits):
    """A meta tensor reaches only the reference entry: see test_interpolate.test_meta_beside_cpu."""
    return pytest.mark.parametrize(
        ("edit", "argument"), [pytest.param(e, a, id=i) for i, e, a in edits]
    )


def assert_all_entries_reject(name: str, make: Callable[[], Case], edit, argument: str) -> None:
    for label, kernel in entries(name):
        case = make()
        edit(case)
        if label == "op" and any(t.device.type == "meta" for _, t in case.flat()):
            continue
        assert_rejected(kernel, case, argument)


def assert_refuses_leaf(step: Callable[[Tensor], None]) -> Tensor:
    """``step`` updates its argument in place: with gradients enabled eager torch refuses a leaf,
    and so does it.
    """
    leaf = torch.randn(5, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="no_grad"):
        step(leaf)
    assert torch.equal(leaf.detach(), before)
    return leaf


def assert_refuses_leaf_and_bumps_version(step: Callable[[Tensor], None]) -> None:
    """And without gradients autograd must see the update: weights and results can be in a graph,
    state is in none.
    """
    leaf = assert_refuses_leaf(step)
    before = leaf.detach().clone()
    loss = (leaf * leaf).sum()
    with torch.no_grad():
        step(leaf)
    assert not torch.equal(leaf.detach(), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def lazy_zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written (reads share the kernel's zero page)."""
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype)
