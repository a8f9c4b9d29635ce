"""Sums of squares by a table kept for a run: taken where it can be, the same bits where not."""

import pytest
import torch
from judging import assert_same_bits
from models import build, loader, same
from torch.utils._python_dispatch import TorchDispatchMode

from sfron_fast import estimate_fisher, functional
from sfron_fast.ops import native
from sfron_fast.saliency.gradients import SquareSums

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the native kernels")
SHAPES = {"weight": (3, 5), "bias": (70,), "kernel": (4, 3, 2, 2)}


class Seen(TorchDispatchMode):
    """Names of the ops called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def public(monkeypatch):
    """Number of tensors in each call of the op's public function."""
    made, call = [], functional.fisher_accumulate_

    def counted(fisher, grads, weight):
        made.append(len(grads))
        call(fisher, grads, weight)

    monkeypatch.setattr(functional, "fisher_accumulate_", counted)
    return made


def tensors(dtype=torch.float32, seed=0, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    made["kernel"] = made["kernel"].contiguous(memory_format=layout)
    return made


def check(values, draws, public):
    """How many tensors the public calls had, of sums that are right."""
    weights, wanted = [0.5 + i for i in range(len(draws))], []
    for i, value in enumerate(values.values()):  # by one call of the op for each tensor
        total = value.clone(memory_format=torch.contiguous_format)
        for grads, weight in zip(draws, weights, strict=True):
            if grads[i] is not None:
                functional.fisher_accumulate_([total], [grads[i].contiguous()], weight)
        wanted.append(total)
    sums = SquareSums(values)
    public.clear()
    for grads, weight in zip(draws, weights, strict=True):
        sums.add(grads, weight)
    for value, total in zip(values.values(), wanted, strict=True):
        assert_same_bits(value.contiguous(), total)
    return list(public)


def drawn(dtype=torch.float32, seed=1, **layout):
    return list(tensors(dtype, seed, **layout).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_table_is_kept_where_it_can_be(dtype, public):
    assert check(tensors(), [drawn(dtype, seed) for seed in (1, 2, 3)], public) == []


def missing(grads):
    grads[1] = None


def strided(grads):
    grads[0] = grads[0].t().contiguous().t()


def negated(grads):
    grads[1] = torch._neg_view(grads[1])


def subclass(grads):
    grads[1] = grads[1].as_subclass(Subclass)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("spoil", [missing, strided, negated, subclass])
def test_what_the_table_refuses_goes_by_the_public_call(spoil, public):
    """One batch of another kind, between two that are plain."""
    draws = [drawn(seed=seed) for seed in (1, 2, 3)]
    spoil(draws[1])
    assert check(tensors(), draws, public) == [sum(g is not None for g in draws[1])]


def test_sums_without_a_table(public):
    """fp64, and a layout of which gradients may or may not be."""
    draws = [drawn(torch.float64, seed) for seed in (1, 2)]
    assert check(tensors(torch.float64), draws, public) == [3, 3]
    draws = [drawn(), drawn(seed=2, layout=torch.channels_last), drawn(seed=3)]
    missing(draws[2])
    assert check(tensors(layout=torch.channels_last), draws, public) == [3, 3, 2]


@pytest.mark.parametrize(
    "wrong", [torch.ones(71), torch.ones(70, dtype=torch.float64)], ids=["shape", "dtype"]
)
def test_what_does_not_fit_is_refused_before_anything_is_written(wrong):
    values, grads = tensors(), drawn()
    sums, before = SquareSums(values), {n: v.clone() for n, v in values.items()}
    grads[1] = wrong
    with pytest.raises(ValueError, match=r"fisher\[1\]"):
        sums.add(grads, 1.0)
    for name, value in values.items():
        assert_same_bits(value, before[name])


@pytest.mark.parametrize("estimator", ["batch", "batch_equal"])
def test_a_run_keeps_one(estimator, public):
    """And a mode around the run sees every tensor, by the op itself."""
    found = estimate_fisher(build(), loader(11, 4), estimator=estimator)
    assert public == []
    with Seen() as seen:
        again = estimate_fisher(build(), loader(11, 4), estimator=estimator)
    assert public == [len(found)] * 3
    assert seen.names.count("sfron_fast.fisher_accumulate_.default") == 3
    assert same(found, again)


def test_the_compiler_may_trace_one_batch(public):
    """Of sums that were made before."""
    draws, values, plain = [drawn(seed=1), drawn(seed=2)], tensors(), tensors()
    traced, eager = SquareSums(values), SquareSums(plain)
    add = torch.compile(traced.add, backend="eager")
    for grads in draws:
        add(grads, 0.5)
        eager.add(grads, 0.5)
    for name, value in values.items():
        assert_same_bits(value, plain[name])
