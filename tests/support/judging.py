"""The judgements that every op shares."""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case, transposed
from torch import Tensor

from sfron_fast.ops import registry as ops


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


def formula_of(name: str) -> Callable[..., Any]:
    """The op in plain PyTorch."""
    return ops.described(name).formula


def assert_matches_reference(name: str, case: Case, kernel) -> None:
    """``kernel`` leaves every argument and returns every output with the bits of
    its formula.
    """
    expected = case.clone()
    wanted = expected.run(formula_of(name))
    got = case.run(kernel)
    assert_same_case(case, expected)
    assert_same_lists(named(flat_outputs(got)), named(flat_outputs(wanted)))


def assert_within(
    results: dict[str, Tensor], truths_and_bounds: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Each result within its bound of its truth, both fp64; where the truth is not finite, in the
    result's dtype either, it must be the same.
    """
    for name, result in results.items():
        truth, bound = truths_and_bounds[name]
        error = (result.detach().double() - truth).abs()
        largest = torch.finfo(result.dtype).max
        past = result.isinf() & (result.sign() == truth.sign()) & (truth.abs() + bound > largest)
        wrong = ~((error <= bound) | (result == truth) | past)
        if wrong.any():
            ratio = float((error / bound)[wrong].max())
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, error up to {ratio} bounds"
            )


def assert_neighbours_untouched(case: Case) -> None:
    """Of tensors made by ``shifted``: the elements before and after them still hold 7."""
    for name, t in case.flat():
        buffer = torch.tensor([], dtype=t.dtype, device=t.device).set_(t.untyped_storage())
        assert buffer[[0, -1]].tolist() == [7, 7], name


def assert_noncontiguous_is_right_or_refused(name: str, case: Case) -> None:
    """The op itself, called past ``functional``: it may refuse strides but not misread them."""
    expected = case.clone()
    wanted = flat_outputs(expected.run(ops.op(name)))
    laid = case.map(lambda t: t if t.dtype == torch.uint8 else transposed(t))
    before, refusal, got = laid.clone(), None, []
    try:
        got = flat_outputs(laid.run(ops.op(name)))
    except (RuntimeError, ValueError) as error:
        refusal = str(error)
    if refusal is not None:
        assert "contiguous" in refusal
        assert_same_case(laid, before)
        return
    assert_same_case(laid, expected)
    assert_same_lists(named(got), named(wanted))


def assert_deterministic(case: Case, outcome, set_threads=None) -> None:
    """``outcome`` and what it leaves in the arguments are bitwise repeatable; with ``set_threads``
    also on one and two threads.
    """
    results = []
    for threads in (2, 2, 1) if set_threads else (None, None):
        if threads:
            set_threads(threads)
        mine = case.clone()
        outputs = outcome(mine)
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
    return [("op", ops.op(name)), ("reference", ops.default_kernel(name))]
