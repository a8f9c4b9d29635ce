"""The Triton kernels, run by Triton's interpreter on the CPU.

`TRITON_INTERPRET=1 pytest tests/ops/interpreted_triton.py`

Not collected by itself: the variable has to be set before Triton is imported and must not reach
other tests, so test_triton_kernels.py runs this file in processes of its own.
"""

import math
from functools import cache

import numpy
import pytest
import row_cases as rc
import sample_ops
import torch
import triton
import triton.language as tl
from cases import mostly_long, only_long, shifted, transposed
from judging import assert_same_bits, assert_within
from triton.runtime import interpreter

from sfron_fast.ops import reference
from sfron_fast.ops.triton import adaptive_cross_entropy as ce
from sfron_fast.ops.triton import adaptive_mse as mse
from sfron_fast.ops.triton import common, many_samples, samples
from sfron_fast.ops.triton import sample_square_accumulate as squares
from sfron_fast.ops.triton import soft_target_kl as kl
from sfron_fast.ops.triton import soft_target_kl_kernels as kl_kernels

_convert = interpreter._convert_float


def _round_bfloat16(data, source, target, rounding):
    """A GPU rounds fp32 to the nearest bf16; the interpreter cuts the bits off."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(data, source, target, rounding)
    rounded = torch.from_numpy(numpy.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(numpy.uint16).reshape(data.shape)


def _approximate_exp2(data):
    """ex2.approx.ftz: 2 ulp off, either way, and 0 below 2^-126; exact at whole numbers."""
    exact = numpy.exp2(data)
    if exact.dtype != numpy.float32:
        return exact
    bits = numpy.ascontiguousarray(exact).view(numpy.int32)
    off = numpy.where(numpy.ascontiguousarray(data).view(numpy.int32) & 1, 2, -2).astype(
        numpy.int32
    )
    regular = (exact >= 2.0**-125) & (exact < 2.0**126) & (data != numpy.floor(data))
    moved = numpy.where(regular, bits + off, bits).view(numpy.float32)
    return numpy.where(exact < 2.0**-126, numpy.float32(0.0), moved)


_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_bfloat16(self, a, b, *rest):
    """The interpreter would multiply the bits as integers."""
    wide = [self.create_fp_ext(t, tl.float32) if t.dtype == tl.bfloat16 else t for t in (a, b)]
    return _dot(self, *wide, *rest)


# this process runs nothing else
interpreter._convert_float = _round_bfloat16
interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16
interpreter.InterpreterBuilder.create_exp2 = lambda self, x: self.unary_op(x, _approximate_exp2)

# numpy: log(0) in rows that do not count
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
each_dtype = pytest.mark.parametrize("dtype", mostly_long(rc.DTYPES, torch.float32, torch.bfloat16))
# where dtype and path are independent
narrow = pytest.mark.parametrize("dtype", mostly_long(rc.DTYPES, torch.bfloat16))


def run_cross_entropy(case):
    logits, labels = case.tensors
    outputs = ce.adaptive_cross_entropy(logits, labels, *case.numbers)
    gradient = ce.adaptive_cross_entropy_backward(
        case.upstream(), logits, labels, outputs[2], outputs[4], case.numbers[2]
    )
    return outputs, gradient


LARGE = only_long((3, 20, 70))  # in small tiles hundreds of programs


def run_mse(case):
    outputs = mse.adaptive_mse(*case.tensors, *case.numbers)
    return outputs, mse.adaptive_mse_backward(
        case.upstream(), *case.tensors[:2], outputs[2], case.numbers[2]
    )


def run_kl(case):
    outputs = kl.soft_target_kl(*case.tensors, *case.numbers)
    return outputs, kl.soft_target_kl_backward(
        case.upstream(), *case.tensors, outputs[2], *case.numbers
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """The paths of large tensors with few elements: long rows, many programs, several parts of a
    sample.
    """
    monkeypatch.setattr(ce, "TILE", 64)
    monkeypatch.setattr(ce, "MAX_TILE_CLASSES", 32)
    monkeypatch.setattr(ce, "SHARE", 8)
    monkeypatch.setattr(ce, "BACKWARD_SHARE", 8)
    monkeypatch.setattr(ce, "pieces", lambda dtype, warps: (4, 16))
    monkeypatch.setattr(ce, "BACKWARD_BLOCK", 64)
    monkeypatch.setattr(ce, "TOKEN_BLOCK", 16)
    monkeypatch.setattr(samples, "BLOCK", tl.constexpr(4))
    monkeypatch.setattr(many_samples, "BLOCK", tl.constexpr(4))
    monkeypatch.setattr(mse, "BLOCK", 64)
    monkeypatch.setattr(mse, "PROGRAMS", 40)
    monkeypatch.setattr(kl, "TILE", 64)
    monkeypatch.setattr(kl, "MAX_TILE_CLASSES", 32)
    monkeypatch.setattr(kl, "SHARE", 8)
    monkeypatch.setattr(kl, "lanes_of", lambda dtype: 16)
    monkeypatch.setattr(kl, "BACKWARD_BLOCK", 64)
    monkeypatch.setattr(kl, "BACKWARD_SHARE", 8)
    monkeypatch.setattr(mse, "SHARE", 8)
    monkeypatch.setattr(samples, "ONE_PROGRAM_SAMPLES", 10)
    monkeypatch.setattr(many_samples, "GROUP", 6)
    monkeypatch.setattr(kl_kernels, "BLOCK", tl.constexpr(4))


@each_dtype
@pytest.mark.parametrize("shape", rc.ROWS, ids=str)
def test_cross_entropy_matches_truth(shape, dtype):
    case = rc.cross_entropy(shape, dtype)
    rc.judge_cross_entropy(case, *run_cross_entropy(case), pieces=1 + shape[2] // 4096)


@pytest.mark.parametrize(("temperature", "floor"), rc.NUMBERS)
@pytest.mark.parametrize("shape", [(40, 1, 10), (4, 3, 65)], ids=str)
def test_cross_entropy_numbers(shape, temperature, floor):
    case = rc.cross_entropy(shape, torch.float32, temperature=temperature, floor=floor)
    rc.judge_cross_entropy(case, *run_cross_entropy(case))


@narrow
@pytest.mark.parametrize(
    "shape", [(13, 1, 10), (3, 1, 33), (5, 1, 257), (2, 3, 70), LARGE], ids=str
)
def test_cross_entropy_beyond_one_tile(small_tiles, shape, dtype):
    case = rc.cross_entropy(shape, dtype)
    rc.judge_cross_entropy(case, *run_cross_entropy(case), pieces=1 + shape[2] // 32)


@each_dtype
@pytest.mark.parametrize("kind", rc.SPECIAL)
def test_cross_entropy_special_logits(kind, dtype):
    case = rc.special_case(kind, dtype)
    rc.judge_cross_entropy(case, *run_cross_entropy(case))


@narrow
@pytest.mark.parametrize("kind", rc.SPECIAL)
def test_cross_entropy_special_logits_in_pieces(small_tiles, kind, dtype):
    case = rc.special_case(kind, dtype)
    rc.judge_cross_entropy(case, *run_cross_entropy(case), pieces=3)


def test_cross_entropy_largest_logits():
    """Ten logits of 1e30: the loss is log 10, though lse itself cannot tell it from 0."""
    case = rc.Rows(
        (torch.full((2, 1, 10), 1e30), torch.zeros(2, 1, dtype=torch.int64)), (0.5, 1e-6, rc.IGNORE)
    )
    outputs, gradient = run_cross_entropy(case)
    torch.testing.assert_close(outputs[1], torch.full((2,), math.log(10)))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("fill", [math.inf, -math.inf, math.nan])
def test_cross_entropy_not_finite(request, fill, long):
    """A row of -inf, a +inf, a NaN: lse, losses and gradient are not finite where the reference's
    are not.
    """
    if long:
        request.getfixturevalue("small_tiles")
    case = rc.cross_entropy((4, 1, 70), torch.float32)
    case.tensors[0][2, 0, 5 if fill == math.inf else slice(None)] = fill
    outputs, gradient = run_cross_entropy(case)
    wanted = reference.adaptive_cross_entropy(*case.tensors, *case.numbers)
    for got, want in ((outputs[4], wanted[4]), (outputs[1], wanted[1]), (outputs[0], wanted[0])):
        finite = torch.isfinite(want)
        assert torch.equal(torch.isfinite(got), finite)
        assert torch.equal(got[~finite].nan_to_num(nan=7.0), want[~finite].nan_to_num(nan=7.0))
    assert not torch.isfinite(gradient[2]).all()


@narrow
@pytest.mark.parametrize(
    "shape", [(7, 1, 1), (13, 1, 10), (2, 3, 70), LARGE, (2, 3, 5000)], ids=str
)
def test_cross_entropy_backward_over_the_logits(request, shape, dtype):
    """The bits of the other memory."""
    if shape[2] < 100:
        request.getfixturevalue("small_tiles")
    case = rc.cross_entropy(shape, dtype)
    outputs, wanted = run_cross_entropy(case)
    logits, labels = case.tensors
    ce.adaptive_cross_entropy_backward_(
        case.upstream(), logits, labels, outputs[2], outputs[4], case.numbers[2]
    )
    assert_same_bits(logits, wanted)


@narrow
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 1, 10), (4, 1, 300)], ids=str)
def test_cross_entropy_sum(request, shape, long, dtype):
    """The forward pass's losses to the bit; weights, normaliser, the total, and where the logits
    were its gradient.
    """
    if long:
        request.getfixturevalue("small_tiles")
    case = rc.cross_entropy(shape, dtype)
    for temperature, floor in rc.NUMBERS:
        if floor ** (1.0 - temperature) > torch.finfo(dtype).max:
            continue  # adaptive_cross_entropy_sum_ refuses it
        case.numbers = (temperature, floor, rc.IGNORE)
        overwritten = case.tensors[0].clone()
        wanted = ce.adaptive_cross_entropy(*case.tensors, *case.numbers)
        outputs = ce.adaptive_cross_entropy_sum_(
            overwritten, case.tensors[1], *case.numbers, case.grad
        )
        assert_same_bits(outputs[1], wanted[1])
        rc.judge_cross_entropy(case, outputs, overwritten, pieces=1 + shape[2] // 32, summed=True)


@pytest.mark.parametrize("long", [False, True])
def test_cross_entropy_sum_label_that_is_no_class(request, long):
    if long:
        request.getfixturevalue("small_tiles")
    logits, labels = rc.cross_entropy((4, 1, 70), torch.float32, temperature=0.0).tensors
    labels[3] = 70
    outputs = ce.adaptive_cross_entropy_sum_(logits, labels, 0.0, 1e-6, rc.IGNORE, 1.0)
    assert outputs[0].isnan()
    assert logits[3].isnan().all()
    assert torch.isfinite(logits[0]).all()
    assert not logits[1].any()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("fill", [math.inf, -math.inf, math.nan])
def test_cross_entropy_sum_row_without_a_label(request, fill, long):
    """Zeros, whatever its logits."""
    if long:
        request.getfixturevalue("small_tiles")
    logits, labels = rc.cross_entropy((4, 1, 70), torch.float32).tensors
    logits[1] = fill
    outputs = ce.adaptive_cross_entropy_sum_(logits, labels, 0.5, 1e-6, rc.IGNORE, 1.0)
    assert torch.isfinite(outputs[0])
    assert outputs[1][1] == outputs[2][1] == 0
    assert not logits[1].any()
    assert torch.isfinite(logits).all()


@narrow
@pytest.mark.parametrize("elements", [0, 1, 63, 64, 65, 1000])
def test_scale(monkeypatch, elements, dtype):
    """A factor of 1 touches nothing, also with programs that take several blocks, of which the last
    ones are empty.
    """
    monkeypatch.setattr(ce, "SCALE_BLOCK", 64)
    monkeypatch.setattr(ce, "SCALE_PROGRAMS", 5)
    gradient = shifted(torch.randn(elements).to(dtype))
    for factor in (1.0, -2.5, 0.0, math.inf):
        got, wanted = gradient.clone(), gradient.clone()
        ce.adaptive_cross_entropy_scale_(got, torch.tensor(factor))
        if factor != 1.0:
            reference.adaptive_cross_entropy_scale_(wanted, torch.tensor(factor))
        assert_same_bits(got, wanted)


def test_scale_by_1_touches_nothing():
    """A signalling NaN, which even a product with 1 would change."""
    bits = torch.full((70,), 0x7F800001, dtype=torch.int32)
    ce.adaptive_cross_entropy_scale_(bits.view(torch.float32), torch.tensor(1.0))
    assert (bits == 0x7F800001).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_cross_entropy_nothing_labelled(tokens):
    case = rc.cross_entropy((3, tokens, 10), torch.float32)
    case.tensors[1].fill_(rc.IGNORE)
    outputs, gradient = run_cross_entropy(case)
    for output in (*outputs[:3], gradient):
        assert not output.any()
    assert outputs[3] == -math.inf


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("wrong", [70, -1, -99, 2**40, -(2**40)])
def test_cross_entropy_label_that_is_no_class(request, wrong, temperature, long):
    """Never read through, never garbage: the loss is NaN, and so is the gradient of that row."""
    if long:
        request.getfixturevalue("small_tiles")
    case = rc.cross_entropy((4, 1, 70), torch.float32, temperature=temperature)
    case.tensors[1][3] = wrong
    outputs, gradient = run_cross_entropy(case)
    assert outputs[0].isnan()
    assert outputs[1].isnan().tolist() == [False, False, False, True]
    assert torch.isfinite(outputs[4]).all()
    assert gradient[3].isnan().all()
    assert not gradient[1].any()


def test_other_ignore_index():
    case = rc.cross_entropy((20, 2, 10), torch.float32, ignore=3)
    rc.judge_cross_entropy(case, *run_cross_entropy(case))


@pytest.mark.parametrize("layout", [shifted, transposed])
def test_layout_does_not_matter(layout):
    for case, run in (
        (rc.cross_entropy((3, 2, 65), torch.bfloat16), run_cross_entropy),
        (rc.squared_error((3, 65), torch.bfloat16), run_mse),
        (rc.soft_targets((3, 65), torch.bfloat16, biased=True, masked=True), run_kl),
    ):
        outputs, gradient = run(case)
        laid = rc.Rows(tuple(None if t is None else layout(t) for t in case.tensors), case.numbers)
        others, other_gradient = run(laid)
        for a, b in zip((*outputs, gradient), (*others, other_gradient), strict=True):
            assert_same_bits(a, b)


@pytest.fixture
def order(monkeypatch):
    """``order(seed)``: programs run in a random order from here on, so that any of them may be the
    last to arrive.
    """
    set_index = interpreter.InterpreterBuilder.set_grid_idx

    def use(seed):
        @cache
        def shuffled(programs):
            return numpy.random.default_rng(seed).permutation(programs).tolist()

        def set_shuffled(self, x, y, z):
            set_index(self, shuffled(self.grid_dim[0])[x], y, z)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_shuffled)

    return use


IN_ANY_ORDER = [
    (rc.cross_entropy, run_cross_entropy, (40, 1, 10)),
    (rc.squared_error, run_mse, (3, 1000)),
    (rc.soft_targets, run_kl, (40, 10)),
]


@pytest.mark.parametrize(
    ("make", "run", "shape"),
    [
        (rc.cross_entropy, run_cross_entropy, (9, 1, 35)),
        (rc.cross_entropy, run_cross_entropy, (3, 8, 33)),
        (rc.squared_error, run_mse, (40, 10)),
        (rc.soft_targets, run_kl, (7, 100)),
        *(pytest.param(*case, marks=pytest.mark.long) for case in IN_ANY_ORDER),
    ],
)
def test_repeatable_in_any_order(small_tiles, order, make, run, shape):
    """The same bits whichever program is the last, and the counter back at 0, or the next call
    would never finish.
    """
    case = make(shape, torch.float32)
    first = run(case)
    for seed in range(3):
        order(seed)
        again = run(case)
        for a, b in zip((*first[0], first[1]), (*again[0], again[1]), strict=True):
            assert_same_bits(a, b)


def test_cross_entropy_sum_in_any_order(small_tiles, order):
    case, results = rc.cross_entropy((13, 1, 35), torch.float32), []
    for seed in range(3):
        order(seed)
        logits = case.tensors[0].clone()
        results.append(
            (*ce.adaptive_cross_entropy_sum_(logits, case.tensors[1], *case.numbers, 1.5), logits)
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("losses", "temperatures"),
    [([1e-7, 1.0, 2.0], (7.0, 60.0)), ([30.0, 40.0, 50.0], (40.0, 400.0))],
)
def test_weights_at_temperatures_whose_powers_overflow(monkeypatch, losses, temperatures, many):
    if many:
        monkeypatch.setattr(samples, "ONE_PROGRAM_SAMPLES", 2)
        monkeypatch.setattr(many_samples, "GROUP", 2)
    prediction = torch.tensor(losses).sqrt().unsqueeze(1)
    exact = prediction.double().square().clamp_min(1e-6).log().squeeze(1)
    for temperature in temperatures:
        loss, _, weights, log_normaliser = mse.adaptive_mse(
            prediction, torch.zeros(3, 1), None, temperature, 1e-6, True, math.inf
        )
        relative = temperature * 4 * rc.tol.U + 1e-6
        torch.testing.assert_close(
            weights.double(), torch.softmax(-temperature * exact, 0), rtol=relative, atol=1e-30
        )
        torch.testing.assert_close(
            log_normaliser, torch.logsumexp(-temperature * exact, 0), rtol=1e-6, atol=relative
        )
        assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("tokens", "squares"),
    [
        ((2, 3, 70), [(3, 500), (50, 3)]),
        pytest.param((3, 5, 70), [(3, 1000), (300, 3)], marks=pytest.mark.long),
    ],
)
def test_counter_is_left_at_zero(small_tiles, monkeypatch, tokens, squares):
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(common, "arrival_counter", lambda like: counter)
    for shape in ((40, 1, 10), (3, 1, 70), tokens):
        case = rc.cross_entropy(shape, torch.float32)
        run_cross_entropy(case)
        assert counter.item() == 0
        if shape[1] == 1:
            ce.adaptive_cross_entropy_sum_(*case.tensors, *case.numbers, 1.0)
            assert counter.item() == 0
    for shape in squares:
        run_mse(rc.squared_error(shape, torch.float32))
        run_kl(rc.soft_targets(shape, torch.float32))
        assert counter.item() == 0


def test_half_results_do_not_depend_on_upstream_type():
    """grad_output 1, 0 and other values; a zero must give zeros, not garbage times zero."""
    case = rc.cross_entropy((5, 1, 10), torch.float32)
    case.grad = 0.0
    assert not run_cross_entropy(case)[1].any()
    case.grad = 1.0
    rc.judge_cross_entropy(case, *run_cross_entropy(case))


@each_dtype
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("shape", rc.SQUARES, ids=str)
def test_mse_matches_truth(shape, mean, dtype):
    case = rc.squared_error(shape, dtype, mean=mean)
    rc.judge_squared_error(case, *run_mse(case))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("temperature", "floor"), rc.NUMBERS)
def test_mse_numbers(temperature, floor, relative):
    case = rc.squared_error(
        (9, 65), torch.float32, temperature=temperature, floor=floor, relative=relative
    )
    rc.judge_squared_error(case, *run_mse(case))


def test_mse_with_a_reference_that_is_none():
    """Not positive, not finite, not a number: the loss is NaN, as of a NaN prediction."""
    for bad in (0.0, -1.0, math.inf, math.nan):
        case = rc.squared_error((5, 65), torch.float32, relative=True)
        case.tensors[2][3] = bad
        outputs, _ = run_mse(case)
        assert outputs[0].isnan()
        assert outputs[2][3].isnan()


@narrow
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("shape", [(1, 3000), (3, 700), (42, 65), (100, 7)], ids=str)
def test_mse_in_parts(small_tiles, shape, relative, dtype):
    case = rc.squared_error(shape, dtype, relative=relative)
    rc.judge_squared_error(case, *run_mse(case))


def test_mse_zero_loss_and_huge_loss():
    case = rc.squared_error((4, 10), torch.float32, scale=1e10)
    case.tensors[0][1] = case.tensors[1][1]
    rc.judge_squared_error(case, *run_mse(case))


@each_dtype
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", rc.CLASSES, ids=str)
def test_soft_targets_match_truth(shape, weighted, dtype):
    case = rc.soft_targets(shape, dtype, weighted=weighted)
    rc.judge_soft_targets(
        case, *run_kl(case), pieces=2 + shape[1] // 2048 if shape[1] > 4096 else 0
    )


@pytest.mark.parametrize("temperature", mostly_long([0.3, 1.0, 7.0], 0.3))
@pytest.mark.parametrize(
    ("scale", "offset"), [(0.1, 0.0), (50.0, 0.0), (3.0, 100.0), (3.0, -1000.0)]
)
@pytest.mark.parametrize("long", [False, True])
def test_soft_targets_numbers(request, scale, offset, temperature, long):
    """Sharp and flat rows, a teacher that is elsewhere altogether."""
    if long:
        request.getfixturevalue("small_tiles")
    case = rc.soft_targets(
        (9, 65), torch.float32, temperature=temperature, scale=scale, offset=offset
    )
    rc.judge_soft_targets(case, *run_kl(case), pieces=6 if long else 0)


of_classes = pytest.mark.parametrize("given", ["biased", "masked", "both"])


@narrow
@of_classes
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (300, 10), (5, 64), (2, 65), (3, 5000)], ids=str)
def test_soft_targets_of_classes(shape, weighted, given, dtype):
    case = rc.soft_targets(shape, dtype, weighted=weighted, **rc.OF_CLASSES[given])
    rc.judge_soft_targets(
        case, *run_kl(case), pieces=2 + shape[1] // 2048 if shape[1] > 4096 else 0
    )


@pytest.mark.parametrize("long", [False, True])
def test_soft_targets_without_mass(request, long):
    """Loss and gradient exactly 0, also where the student has an infinite logit."""
    if long:
        request.getfixturevalue("small_tiles")
    case = rc.soft_targets((4, 170), torch.float32, masked=True)
    logits, teacher, _, _, k = case.tensors
    teacher[:, 7] = -math.inf
    logits[0, 3] = -math.inf
    k.zero_()
    k[7] = 2.0
    outputs, gradient = run_kl(case)
    assert not outputs[1].any()
    assert not outputs[2][4].any()
    assert not gradient.any()


@narrow
@pytest.mark.parametrize("given", rc.OF_CLASSES)
@pytest.mark.parametrize("shape", [(13, 10), (3, 33), (5, 257), only_long((40, 70))], ids=str)
def test_soft_targets_beyond_one_tile(small_tiles, shape, given, dtype):
    case = rc.soft_targets(shape, dtype, **rc.OF_CLASSES[given])
    rc.judge_soft_targets(case, *run_kl(case), pieces=2 + shape[1] // 16)


@pytest.mark.parametrize("long", [False, True])
def test_soft_targets_that_forbid_classes(request, long):
    """-inf of the teacher counts for nothing, of both or not, whole pieces of it; a row of weight 0
    may be anything.
    """
    if long:
        request.getfixturevalue("small_tiles")
    case = rc.soft_targets((4, 170), torch.float32)
    logits, teacher, *_ = case.tensors
    teacher[:, 3:100] = -math.inf
    logits[2:, 40:90] = -math.inf
    rc.judge_soft_targets(case, *run_kl(case), pieces=14 if long else 0)
    logits[1], teacher[1] = math.nan, math.inf
    outputs, gradient = run_kl(case)
    assert torch.isfinite(outputs[0])
    assert outputs[1][1] == 0
    assert not gradient[1].any()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("fill", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("side", [0, 1])
def test_soft_targets_not_finite(request, side, fill, long):
    """A row of -inf, an inf, a NaN show, and in that row alone."""
    if long:
        request.getfixturevalue("small_tiles")
    case = rc.soft_targets((4, 70), torch.float32)
    case.tensors[side][2, slice(None) if fill == -math.inf else 5] = fill
    outputs, gradient = run_kl(case)
    assert not torch.isfinite(outputs[0])
    assert torch.isfinite(outputs[1]).tolist() == [True, True, False, True]
    assert torch.isfinite(gradient).all(dim=1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("long", [False, True])
def test_soft_targets_of_the_teacher_itself(request, long):
    if long:
        request.getfixturevalue("small_tiles")
    case = rc.soft_targets((4, 70), torch.float32, temperature=3.0)
    outputs, gradient = run_kl(
        rc.Rows((case.tensors[0], case.tensors[0].clone(), None, None, None), case.numbers)
    )
    assert not outputs[1].any()
    assert not gradient.any()


def test_empty():
    loss, losses, weights, log_normaliser, log_sums = ce.adaptive_cross_entropy(
        torch.empty(0, 1, 5), torch.empty(0, 1, dtype=torch.int64), 0.5, 1e-6, -100
    )
    assert loss == 0
    assert log_normaliser == -math.inf
    assert losses.shape == weights.shape == (0,)
    assert log_sums.shape == (2, 0, 1)
    outputs, gradient = run_cross_entropy(
        rc.Rows((torch.empty(3, 0, 5), torch.empty(3, 0, dtype=torch.int64)), (0.5, 1e-6, -100))
    )
    assert not any(output.any() for output in (*outputs[:3], outputs[4]))
    assert gradient.shape == (3, 0, 5)
    none = torch.empty(0, 5)
    assert mse.adaptive_mse(none, none, None, 0.5, 1e-6, True, math.inf)[0] == 0
    outputs, gradient = run_kl(rc.soft_targets((0, 5), torch.float32))
    assert outputs[0] == 0
    assert gradient.shape == (0, 5)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 0.5, 1.0, 2.0, 10.0])
def test_raw_weight_over_the_whole_range(temperature):
    """Bases from subnormal to the largest: within the bound that judges weights, or beyond the
    range of fp32.
    """
    base = torch.cat(
        [torch.logspace(-44, 38, 4000), torch.tensor([0.7071067, 1.0, 1.4142136, 2.0])]
    )
    raw = torch.empty_like(base)
    _raw_weight_kernel[(1,)](base, raw, base.numel(), *common.split(temperature), BLOCK=4096)
    truth = base.double().pow(-temperature)
    inside = (truth < 1e38) & (truth > 2.0**-125)
    bound = truth * (4 + 3 * temperature + 2) * 2.0**-24
    assert ((raw.double() - truth).abs() <= bound)[inside].all()
    assert (raw[truth > 3.5e38] == math.inf).all()
    assert (raw[truth < 2.0**-127] == 0).all()


@triton.jit
def _raw_weight_kernel(base_ptr, raw_ptr, n, high, low, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    base = tl.load(base_ptr + at, mask=at < n, other=1.0)
    tl.store(raw_ptr + at, samples.raw_weight(base, high, low), mask=at < n)


@pytest.mark.parametrize(
    ("base", "temperature", "wanted"),
    [
        (math.inf, 0.5, 0.0),
        (math.inf, 0.0, 1.0),
        (math.nan, 0.5, math.nan),
        (math.nan, 0.0, 1.0),
        (2.0, math.inf, 0.0),
        (0.5, math.inf, math.inf),
        (1.0, math.inf, 1.0),
        (0.25, 0.5, 2.0),
    ],
)
def test_raw_weight_at_the_edges(base, temperature, wanted):
    base, raw = torch.tensor([base]), torch.empty(1)
    _raw_weight_kernel[(1,)](base, raw, 1, *common.split(temperature), BLOCK=1)
    assert torch.equal(raw.nan_to_num(nan=7.0), torch.tensor([wanted]).nan_to_num(nan=7.0))


# --- sample_square_accumulate_ --------------------------------------------------------------------


def run_squares(case):
    accumulator, deltas, inputs = case.tensors.values()
    squares.sample_square_accumulate_(accumulator, deltas, inputs, **case.scalars)
    return accumulator


def judge_squares(case):
    bounds = rc.tol.sample_squares(**case.tensors, **case.scalars)
    assert_within({"accumulator": run_squares(case)}, {"accumulator": bounds})


@each_dtype
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", sample_ops.SHAPES)
def test_sample_squares(monkeypatch, name, power, dtype):
    monkeypatch.setattr(squares, "PROCESSORS", 1)
    judge_squares(sample_ops.sample_case(sample_ops.SHAPES[name], dtype, power=power))


@pytest.mark.parametrize("weight", [-1.5, 0.0, 1.0])
@pytest.mark.parametrize("processors", [4, 12])
def test_sample_squares_in_tiles(monkeypatch, processors, weight):
    """Of every side, with rests in both directions."""
    monkeypatch.setattr(squares, "PROCESSORS", processors)
    for shape in ((3, (35,), 70, (130,)), (3, (1,), 70, (130,)), (2, (16,), 33, (48,))):
        judge_squares(sample_ops.sample_case(shape, torch.float32, weight=weight))


@pytest.mark.parametrize("lay", [transposed, shifted, lambda t: t[:, :1].expand_as(t)])
@pytest.mark.parametrize("workspace", [1, 1000, 1 << 20])
def test_sample_squares_of_other_strides(monkeypatch, workspace, lay):
    """Copied in pieces of samples, whose bits are those of one."""
    monkeypatch.setattr(squares, "WORKSPACE", workspace)
    for factor in ("deltas", "inputs"):
        case = sample_ops.sample_case((7, (5,), 6, (3, 8)), torch.float32)
        case.tensors[factor] = lay(case.tensors[factor])
        wanted = run_squares(case.clone())
        assert_same_bits(run_squares(case), wanted)


def test_sample_squares_of_single_positions_have_the_bits_of_the_formula():
    case = sample_ops.sample_case((9, (), 20, (70,)), torch.bfloat16)
    wanted = case.clone()
    wanted.run(reference.sample_square_accumulate_)
    assert_same_bits(run_squares(case), wanted.tensors["accumulator"])
