"""What is special to ``sample_square_accumulate_``: strides, pieces of a batch, instruction sets,
what per-sample gradients are.
"""

import os
import subprocess
import sys

import pytest
import tolerances
import torch
from cases import DTYPES, NATIVE_DTYPES, Case, shifted, strided, transposed
from judging import (
    assert_matches_reference,
    assert_neighbours_untouched,
    assert_same_bits,
    compiled_equals_eager,
)
from judging import assert_within as within
from paths import ROOT
from sample_ops import NAME, SHAPES
from sample_ops import sample_case as make

from sfron_fast import functional
from sfron_fast.ops import registry as ops

call = functional.sample_square_accumulate_
IN_PIECES = [
    ("small", 1),
    ("beyond a depth", 2),
    ("beyond a block", 1),
    ("samples beyond a depth", 7),
    ("one of one position", 3),
]


def outcome(case: Case) -> torch.Tensor:
    """The accumulator after the public call; the case stays."""
    accumulator = case.tensors["accumulator"].clone()
    factors = {name: case.tensors[name] for name in ("deltas", "inputs")}
    assert call(accumulator, **factors, **case.scalars) is accumulator
    return accumulator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """Sample 1: 1 * 2 + 2 * 3 = 8, sample 2: 3 * 1 - 1 * 4 = -1. Squares 64 + 1, sizes 8 + 1; the
    square of the batch's gradient would be 49.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    deltas = torch.tensor([[[1.0], [2.0]], [[3.0], [-1.0]]], dtype=dtype, device=device)
    inputs = torch.tensor([[[2.0], [3.0]], [[1.0], [4.0]]], dtype=dtype, device=device)
    for power, weight, expected in ((2, 1.0, 66.0), (2, -0.5, -31.5), (1, 2.0, 19.0)):
        accumulator = torch.ones(1, 1, dtype=wide, device=device)
        call(accumulator, deltas, inputs, weight, power=power)
        assert accumulator.tolist() == [[expected]]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["one position", "samples beyond a depth", "no positions"])
def test_single_positions_have_the_bits_of_the_formula(device, name, dtype, power):
    """A product is rounded once, whoever computes it."""
    if ops.kernel_for(NAME, device) == "reference":
        pytest.skip("the formula itself")
    assert_matches_reference_without_result(make(SHAPES[name], dtype, device, power=power))


def assert_matches_reference_without_result(case: Case) -> None:
    def kernel(**arguments):
        call(**arguments)

    assert_matches_reference(NAME, case, kernel)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize(("name", "size"), IN_PIECES)
def test_a_batch_in_pieces_leaves_the_same_bits(device, name, size, dtype):
    case = make(SHAPES[name], dtype, device)
    wanted, (accumulator, deltas, inputs) = outcome(case), case.tensors.values()
    for d, x in zip(deltas.split(size), inputs.split(size), strict=True):
        call(accumulator, d, x, **case.scalars)
    assert_same_bits(accumulator, wanted)


# --- strides --------------------------------------------------------------------------------------


def slowest_last(tensor):
    """Positions lie together, as in a convolution's gradient."""
    return tensor.movedim(-1, 1).contiguous().movedim(1, -1)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("lay", [strided, transposed, slowest_last, shifted, torch._neg_view])
def test_any_strides_give_the_same_bits(device, lay, dtype):
    for name in ("image", "beyond a block", "one position", "one output"):
        case = make(SHAPES[name], dtype, device)
        wanted = outcome(case)
        for factor in ("deltas", "inputs"):
            laid = case.clone()
            tensor = laid.tensors[factor]
            laid.tensors[factor] = lay(-tensor if lay is torch._neg_view else tensor)
            before = laid.clone()
            assert_same_bits(outcome(laid), wanted, factor)
            assert_same_bits(laid.tensors[factor], before.tensors[factor])


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_expanded_ones_sum_the_inputs(device, dtype):
    """What biases and norm weights ask for."""
    inputs = make((3, (5,), 1, (300,)), dtype, device).tensors["inputs"]
    ones = inputs.new_ones(()).expand(3, 5, 1)
    case = Case({"accumulator": torch.zeros(1, 300, device=device), "deltas": ones}, {})
    case.tensors["inputs"] = inputs
    case.scalars = {"weight": 1.0, "power": 2}
    within({"a": outcome(case)}, {"a": tolerances.sample_squares(**case.tensors, **case.scalars)})


def patches(images, kernel: int, stride: int, dilation: int):
    """[samples, height, width, channels, kernel, kernel] of padded images, without a copy."""
    samples, channels, height, width = images.shape
    reach = dilation * (kernel - 1)
    size = [(side - reach - 1) // stride + 1 for side in (height, width)]
    s, c, h, w = images.stride()
    return images.as_strided(
        (samples, *size, channels, kernel, kernel),
        (s, h * stride, w * stride, c, h * dilation, w * dilation),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (2, 1, 3)])
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
def test_a_convolution_reads_patches_in_place(device, last, kernel, stride, dilation, dtype):
    """The bits of an im2col copy; and what autograd makes of every sample."""
    images = torch.randn(3, 5, 9, 10, device=device).to(dtype)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    seen = patches(images, kernel, stride, dilation)
    weight = torch.randn(4, 5, kernel, kernel, device=device).double().requires_grad_()
    result = torch.nn.functional.conv2d(images.double(), weight, None, stride, 0, dilation)
    deltas = torch.randn_like(result).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = Case(
        {
            "accumulator": torch.zeros(4, 5, kernel, kernel, dtype=wide, device=device),
            "deltas": deltas.permute(0, 2, 3, 1),
            "inputs": seen,
        },
        {"weight": 1.0, "power": 2},
    )
    got = outcome(case)
    assert_same_bits(got, outcome(case.clone()))
    truth, bound = tolerances.sample_squares(**case.tensors, **case.scalars)
    within({"a": got}, {"a": (truth, bound)})
    squares = sum(
        torch.autograd.grad(r, weight, d.double(), retain_graph=True)[0].square()
        for r, d in zip(result, deltas, strict=True)
    )
    assert torch.allclose(truth, squares, rtol=1e-12)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_neighbours_in_memory_stay(device, dtype):
    for name in ("beyond a block", "one of one position", "one output"):
        case = make(SHAPES[name], dtype, device).map(shifted)
        call(**case.tensors, **case.scalars)
        assert_neighbours_untouched(case)


# --- what cannot be right -------------------------------------------------------------------------


def batch_square(accumulator, deltas, inputs, weight, power):
    gradient = torch.einsum("s...o,s...i->oi", deltas, inputs)
    accumulator += weight * gradient.abs() ** power


def without_the_last_sample(accumulator, deltas, inputs, weight, power):
    call(accumulator, deltas[:-1], inputs[:-1], weight, power=power)


def without_the_last_position(accumulator, deltas, inputs, weight, power):
    call(accumulator, deltas[:, :-1], inputs[:, :-1], weight, power=power)


def other_power(accumulator, deltas, inputs, weight, power):
    call(accumulator, deltas, inputs, weight, power=3 - power)


def signed(accumulator, deltas, inputs, weight, power):
    accumulator += weight * torch.einsum("s...o,s...i->oi", deltas, inputs)


def weight_inside(accumulator, deltas, inputs, weight, power):
    call(accumulator, deltas * weight, inputs, 1.0, power=power)


def nothing(accumulator, deltas, inputs, weight, power):
    pass


def in_bfloat16(accumulator, deltas, inputs, weight, power):
    call(accumulator, deltas.bfloat16(), inputs.bfloat16(), weight, power=power)


WRONG = [
    batch_square,
    without_the_last_sample,
    without_the_last_position,
    other_power,
    signed,
    weight_inside,
    nothing,
    in_bfloat16,
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("power", [1, 2])
def test_the_bound_refuses_what_is_wrong(wrong, power):
    if wrong is weight_inside and power == 1:
        pytest.skip("the same thing")
    case = make((3, (35,), 7, (70,)), power=power)
    truth, bound = tolerances.sample_squares(**case.tensors, **case.scalars)
    case.run(wrong)
    with pytest.raises(AssertionError, match="wrong, error up to"):
        within({"a": case.tensors["accumulator"]}, {"a": (truth, bound)})


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["small", "beyond a block", "one position"])
def test_what_is_not_finite_shows_where_it_is(device, name, bad):
    for factor, axis in (("deltas", 0), ("inputs", 1)):
        case = make(SHAPES[name], device=device)
        case.tensors[factor].select(-1, 2)[1] = bad
        finite = torch.isfinite(outcome(case))
        expected = torch.ones_like(finite)
        expected.select(axis, 2).fill_(False)
        assert torch.equal(finite, expected)


def test_the_graph_is_told(device):
    """A leaf is refused; whoever saved the accumulator learns that it has changed."""
    case = make(device=device)
    leaf = case.tensors["accumulator"].requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="accumulator: expected a tensor that does not require"):
        case.run(call)
    assert torch.equal(leaf.detach(), before)
    accumulator = before.clone()
    factor = torch.ones_like(accumulator).requires_grad_()
    loss = (factor * accumulator).sum()
    call(accumulator, case.tensors["deltas"], case.tensors["inputs"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_public_call_compiles(device):
    cases = [make(device=device) for _ in range(3)]
    assert compiled_equals_eager(call, cases) == 1


# --- instruction sets -----------------------------------------------------------------------------

# judges every shape; prints a digest of the bits of single positions, and one of the sums
DIGESTS = """
import sys, hashlib, torch
sys.path[:0] = ["tests/support", "tests/ops"]
torch.set_num_threads(1)
import cases, sample_ops
digests = {False: hashlib.sha256(), True: hashlib.sha256()}
for dtype in cases.NATIVE_DTYPES:
    torch.manual_seed(0)
    for shape in sample_ops.SHAPES.values():
        for power in (1, 2):
            case = sample_ops.sample_case(shape, dtype, power=power)
            sample_ops.sums_are_close(case)
            case.run(sample_ops.functional.sample_square_accumulate_)
            digests[shape[1] in ((), (1,))].update(case.tensors["accumulator"].numpy().tobytes())
print(*(d.hexdigest() for d in digests.values()))
"""


@pytest.mark.skipif(ops.kernel_for(NAME, "cpu") != "native", reason="no compiled kernels here")
def test_instruction_sets():
    """All within the bounds, and single positions of equal bits. Sums are fused where there is such
    an instruction: AVX2 and AVX-512 give the same bits.
    """
    found = {}
    for isa in ("baseline", "avx2", "avx512"):
        environment = {"SFRON_FAST_NATIVE": "require", "SFRON_FAST_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
        )
        if "expected a level of this processor" not in done.stderr:
            assert done.returncode == 0, done.stderr[-3000:]
            found[isa] = done.stdout.split()
    assert "baseline" in found
    assert len({single for _, single in found.values()}) == 1
    assert len({sums for isa, (sums, _) in found.items() if isa != "baseline"}) <= 1
