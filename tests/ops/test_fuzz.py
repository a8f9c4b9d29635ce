"""Random cases by the thousand: list ops and optimizers have the bits of the reference; bad input
changes nothing.

`make test` runs the same cases every time; `make test-long` draws new ones, 120 times as many.
"""

import re

import lanes
import pytest
import tolerances
import torch
from cases import Case
from fuzz_lists import OPS, spoiled_case
from fuzz_optimizers import (
    BETWEEN,
    RATES,
    SPOILERS,
    actions,
    assert_unchanged,
    prepare,
    snapshot,
    subjects,
)
from fuzz_rows import mse_rows
from fuzz_samples import square_case
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from judging import assert_same_bits, assert_same_lists, assert_within, flat_outputs, named
from row_ops import ADAPTIVE_MSE
from torch import Tensor

from sfron_fast import functional
from sfron_fast.ops import reference

CLEAR = re.compile(
    r"[\w.]+(\[[^]]+\])*: expected .+, found |.*Expected a value of type|.*with negation inputs",
    re.S,
)
LONG = 120
# drawn on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.*step found no gradients:RuntimeWarning")


def cases(count: int, shards: int = 1):
    """Runs the decorated test with ``examples`` = ``count``, under ``long`` LONG times that; in
    ``shards`` of them.
    """
    part = count // shards
    short = [pytest.param((part, i), id=f"{part}-{i}") for i in range(shards)]
    long = [
        pytest.param((LONG * part, None), id=f"{LONG * part}-{i}", marks=pytest.mark.long)
        for i in range(shards)
    ]
    return pytest.mark.parametrize("examples", [*short, *long])


def hunt(examples: tuple[int, int | None], strategy, check) -> None:
    """``check`` what ``strategy`` draws: so many examples, from a seed or (None) from a new one."""
    count, start = examples
    rules = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    test = rules(given(strategy)(lambda drawn: check(drawn)))
    (test if start is None else seed(start)(test))()


# --- list ops -------------------------------------------------------------------------------------


def assert_as_expected(op: str, case: Case, got, twin: Case) -> None:
    """``case`` and what came of it have the bits that the reference makes of ``twin``."""
    wanted = twin.run(getattr(reference, op))
    for (name, a), (_, b) in zip(tensors(case), tensors(twin), strict=True):
        assert_same_bits(a.resolve_neg(), b.resolve_neg(), name)
    assert_same_lists(named(flat_outputs(got)), named(flat_outputs(wanted)))


@pytest.mark.checklist("B8")
@cases(50)
@pytest.mark.parametrize("op", OPS)
def test_list_ops_have_the_bits_of_the_reference(op, examples):
    def check(case):
        twin = case.clone()
        assert_as_expected(op, case, case.run(getattr(functional, op)), twin)

    hunt(examples, OPS[op], check)


def contents(tensor: Tensor) -> Tensor | str | None:
    """The bytes behind a tensor, those between its elements included."""
    if tensor.device.type == "meta":
        return None
    if tensor.layout != torch.strided:
        return str(tensor)
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).clone()


def tensors(case: Case) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in case.flat() if isinstance(t, Tensor)]


def copied(case: Case) -> Case:
    """Tensors that were one stay one."""
    known: dict[int, Tensor] = {}

    def copy(t):
        return known.setdefault(id(t), t.detach().clone()) if isinstance(t, Tensor) else t

    lists = {
        k: [copy(t) for t in v] if isinstance(v, list) else copy(v) for k, v in case.tensors.items()
    }
    return Case(lists, dict(case.scalars))


def attempt(call):
    """What it returns, and what it raises instead."""
    try:
        return call(), None
    except (ValueError, RuntimeError, TypeError) as error:
        return None, error


def assert_refused_or_right(op: str, case: Case, expected=assert_as_expected) -> None:
    before, twin = [contents(t) for _, t in tensors(case)], copied(case)
    got, refusal = attempt(lambda: case.run(getattr(functional, op)))
    if refusal is not None:
        assert isinstance(refusal, TypeError) or CLEAR.match(str(refusal)), refusal
        for (name, t), old in zip(tensors(case), before, strict=True):
            now = contents(t)
            assert torch.equal(now, old) if isinstance(old, Tensor) else now == old, (
                f"{name} changed: {refusal}"
            )
        return
    if any(t.device.type == "meta" for _, t in tensors(case)):
        return  # all are, or it would have been refused
    expected(op, case, got, twin)


@cases(50)
@pytest.mark.parametrize("op", OPS)
def test_spoiled_lists_are_refused_whole_or_give_what_the_reference_gives(op, examples):
    hunt(examples, spoiled_case(OPS[op]), lambda drawn: assert_refused_or_right(op, drawn[0]))


# --- samples --------------------------------------------------------------------------------------


def assert_close(op: str, case: Case, got, twin: Case) -> None:
    """``case`` is within the bounds of the exact sums of ``twin``; its factors are as they were."""
    assert got is case.tensors["accumulator"]
    bounds = tolerances.sample_squares(**twin.tensors, **twin.scalars)
    assert_within({"accumulator": got}, {"accumulator": bounds})
    for name in ("deltas", "inputs"):
        assert_same_bits(case.tensors[name].resolve_neg(), twin.tensors[name].resolve_neg(), name)


@pytest.mark.checklist("B8")
@cases(150)
def test_sample_squares_are_close(examples):
    def check(case):
        twin = case.clone()
        got = case.run(functional.sample_square_accumulate_)
        assert_close("sample_square_accumulate_", case, got, twin)

    hunt(examples, square_case(), check)


@cases(150)
def test_spoiled_samples_are_refused_whole_or_close(examples):
    def check(drawn):
        assert_refused_or_right("sample_square_accumulate_", drawn[0], assert_close)

    hunt(examples, spoiled_case(square_case()), check)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.checklist("B8")
@cases(150)
def test_squared_errors_are_close(examples):
    hunt(examples, mse_rows(), ADAPTIVE_MSE.assert_right)


# --- optimizers -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _slow_weights_away(monkeypatch):
    """Of groups that draw ``slow_device``."""
    lanes.pretend(monkeypatch.setattr)


@st.composite
def runs(draw):
    """A few steps of some optimizer; checked on the way, because what is drawn depends on the
    phase.
    """
    subject = draw(subjects())
    for _ in range(draw(st.integers(1, 6))):
        prepare(subject, draw(st.sampled_from(BETWEEN)), draw(RATES))
        grads, scale, found, forget = draw(actions(subject))
        compare_step(subject, forget and not subject.model.pending, grads, scale, found)
    return subject


def compare_step(subject, forget, grads, scale, found):
    kept = {n: None if g is None else g.clone() for n, g in grads.items()}
    subject.optimizer.grad_scale, subject.optimizer.found_inf = scale, found
    subject.step(forget, grads)
    model_step(subject, forget, kept, scale, found)
    for name, grad in grads.items():
        if grad is not None:
            assert_same_bits(grad, kept[name], f"gradient of {name}")


def model_step(subject, forget, grads, scale, found):
    (subject.model.forget if forget else subject.model.retain)(grads, scale, found)
    subject.check()
    if subject.model.norm is not None and (forget or subject.groups[0]["clip_retain"]):
        assert_same_bits(subject.optimizer.grad_norm, subject.model.norm, "norm")


@pytest.mark.checklist("B1")
@cases(200, shards=4)
def test_optimizers_have_the_bits_of_the_obvious_loop(examples):
    hunt(examples, runs(), lambda subject: None)


@st.composite
def spoiled_runs(draw):
    """A run, then a step that something is wrong with."""
    subject = draw(runs())
    grads, scale, found, forget = draw(actions(subject, complete=True))
    way = draw(st.sampled_from(list(SPOILERS)))
    forget = forget and not subject.model.pending
    subject.optimizer.grad_scale, subject.optimizer.found_inf = scale, found
    SPOILERS[way](subject, grads)
    before = snapshot(subject)
    _, refusal = attempt(lambda: subject.step(forget, grads))
    if refusal is None and way.startswith("state"):
        pass  # of the other phase, or good by accident: an expanded tensor of one element
    elif refusal is None:
        model_step(subject, forget, grads, scale, found)
    else:
        assert CLEAR.match(str(refusal)), refusal
        assert_unchanged(subject, before)
    return way


@cases(200, shards=4)
def test_a_spoiled_step_is_refused_whole_or_gives_what_the_obvious_loop_gives(examples):
    hunt(examples, spoiled_runs(), lambda way: None)


@st.composite
def steps_out_of_turn(draw):
    subject = draw(runs())
    grads = draw(actions(subject))[0]
    if subject.model.pending:
        before = snapshot(subject)
        with pytest.raises(RuntimeError, match="forget_step: expected a finished cycle"):
            subject.step(True, grads)
        assert_unchanged(subject, before)


@cases(50)
def test_a_forget_step_inside_a_cycle_changes_nothing(examples):
    hunt(examples, steps_out_of_turn(), lambda nothing: None)
