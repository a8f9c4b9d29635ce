"""The row ops as the dispatcher serves them on CUDA: what the interpreter cannot show.

Collected only with a GPU.
"""

import math

import pytest
import row_cases as rc
import torch
from cases import Case
from judging import assert_opcheck, assert_same_bits, compiled_equals_eager

import sfron_fast as sf
from sfron_fast.ops import registry as ops
from sfron_fast.ops.triton import MODULES

each_dtype = pytest.mark.parametrize("dtype", rc.DTYPES)
LONG = [
    (64, 1, 32000),
    (9, 1, 128256),
    (5, 1, 152064),
    (3, 70, 32000),
    (2, 3, 50257),
    (9000, 1, 10),
    (4097, 1, 1000),
]
LONG += [(3, 1, 9001)]
SUMS = [(256, 10), (5000, 10), (300, 1000), (300, 8192), (40, 32000), (40, 50257), (40, 128256)]
TARGETS = [
    (8192, 10),
    (4097, 1000),
    (64, 32000),
    (5, 50257),
    (5, 152064),
    (9, 70),
    (9, 9001),
    (4, 170),
]
LARGE = [(1, 5_000_001), (4, 3 * 512 * 512), (256, 3072), (100_000, 10), (2500, 4097)]


def run_cross_entropy(case):
    logits, labels = case.tensors
    outputs = ops.op("adaptive_cross_entropy")(logits, labels, *case.numbers)
    backward = torch.ops.sfron_fast.adaptive_cross_entropy_backward
    return outputs, backward(
        case.upstream(), logits, labels, outputs[2], outputs[4], case.numbers[2]
    )


def run_mse(case):
    outputs = ops.op("adaptive_mse")(*case.tensors, *case.numbers)
    backward = torch.ops.sfron_fast.adaptive_mse_backward
    return outputs, backward(case.upstream(), *case.tensors[:2], outputs[2], case.numbers[2])


def run_kl(case):
    outputs = ops.op("soft_target_kl")(*case.tensors, *case.numbers)
    backward = torch.ops.sfron_fast.soft_target_kl_backward
    return outputs, backward(case.upstream(), *case.tensors, outputs[2], *case.numbers)


CALLS = [
    (run_cross_entropy, rc.cross_entropy, (256, 1, 10)),
    (run_cross_entropy, rc.cross_entropy, (300, 1, 1000)),
    (run_cross_entropy, rc.cross_entropy, (8, 64, 5000)),
    (run_mse, rc.squared_error, (256, 3072)),
    (run_mse, rc.squared_error, (3, 70001)),
    (run_kl, rc.soft_targets, (8192, 10)),
    (run_kl, rc.soft_targets, (300, 1000)),
    (run_kl, rc.soft_targets, (40, 32000)),
]
NAMES = [f"{make.__name__}-{shape}" for _, make, shape in CALLS]
each_call = pytest.mark.parametrize(("run", "make", "shape"), CALLS, ids=NAMES)


@pytest.mark.parametrize("name", MODULES)
def test_triton_serves(name):
    assert ops.kernel_for(name, "cuda") == "triton"


@each_dtype
@pytest.mark.parametrize("shape", [*rc.ROWS, *LONG], ids=str)
def test_cross_entropy_matches_truth(shape, dtype):
    case = rc.cross_entropy(shape, dtype, "cuda")
    rc.judge_cross_entropy(case, *run_cross_entropy(case), pieces=1 + shape[2] // 4096)


@pytest.mark.parametrize(("temperature", "floor"), rc.NUMBERS)
def test_numbers(temperature, floor):
    case = rc.cross_entropy(
        (40, 1, 100), torch.float32, "cuda", temperature=temperature, floor=floor
    )
    rc.judge_cross_entropy(case, *run_cross_entropy(case))
    for relative in (False, True):
        settings = {"temperature": temperature, "floor": floor, "relative": relative}
        case = rc.squared_error((40, 100), torch.float32, "cuda", **settings)
        rc.judge_squared_error(case, *run_mse(case))


@each_dtype
@pytest.mark.parametrize("kind", rc.SPECIAL)
def test_special_logits(kind, dtype):
    case = rc.special_case(kind, dtype, "cuda")
    rc.judge_cross_entropy(case, *run_cross_entropy(case))


@pytest.mark.parametrize("classes", [70, 32000])
@pytest.mark.parametrize("wrong", [-1, -99, 2**40, -(2**40)])
def test_label_that_is_no_class(wrong, classes):
    """NaN, no fault and no wait: the device can be used afterwards."""
    case = rc.cross_entropy((4, 1, classes), torch.float32, "cuda")
    case.tensors[1][3] = wrong
    outputs, gradient = run_cross_entropy(case)
    torch.cuda.synchronize()
    assert outputs[0].isnan()
    assert outputs[1].isnan().tolist() == [False, False, False, True]
    assert gradient[3].isnan().all()


@each_dtype
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("shape", [*rc.SQUARES, *LARGE], ids=str)
def test_mse_matches_truth(shape, mean, dtype):
    case = rc.squared_error(shape, dtype, "cuda", mean=mean)
    rc.judge_squared_error(case, *run_mse(case))


@each_dtype
@pytest.mark.parametrize("given", rc.OF_CLASSES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [*rc.CLASSES, *TARGETS], ids=str)
def test_soft_targets_match_truth(shape, weighted, given, dtype):
    case = rc.soft_targets(shape, dtype, "cuda", weighted=weighted, **rc.OF_CLASSES[given])
    rc.judge_soft_targets(
        case, *run_kl(case), pieces=2 + shape[1] // 2048 if shape[1] > 4096 else 0
    )


@pytest.mark.parametrize("classes", [70, 9001])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
@pytest.mark.parametrize(("scale", "offset"), [(0.1, 0.0), (50.0, 0.0), (3.0, -1000.0)])
def test_soft_targets_numbers(scale, offset, temperature, classes):
    case = rc.soft_targets(
        (9, classes), torch.float32, "cuda", temperature=temperature, scale=scale, offset=offset
    )
    rc.judge_soft_targets(case, *run_kl(case), pieces=7 if classes > 4096 else 0)


@pytest.mark.parametrize("classes", [170, 9001])
def test_soft_targets_that_forbid_classes(classes):
    case = rc.soft_targets((4, classes), torch.float32, "cuda")
    logits, teacher, *_ = case.tensors
    teacher[:, 3 : classes - 70] = -math.inf
    logits[2:, 40 : classes - 80] = -math.inf
    rc.judge_soft_targets(case, *run_kl(case), pieces=7 if classes > 4096 else 0)
    logits[1], teacher[1] = math.nan, math.inf
    outputs, gradient = run_kl(case)
    assert torch.isfinite(outputs[0])
    assert outputs[1][1] == 0
    assert not gradient[1].any()
    assert torch.isfinite(gradient).all()


@each_call
def test_repeatable(run, make, shape):
    """Bitwise, twenty times: the last program to arrive is another one each time, the order of its
    sums is not.
    """
    case = make(shape, torch.float32, "cuda")
    first = run(case)
    for _ in range(20):
        again = run(case)
        for a, b in zip((*first[0], first[1]), (*again[0], again[1]), strict=True):
            assert_same_bits(a, b)


@each_call
def test_waits_for_nothing(run, make, shape):
    case = make(shape, torch.bfloat16, "cuda")
    case.upstream()
    run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_call
def test_streams_do_not_share_their_counter(run, make, shape):
    case = make(shape, torch.float32, "cuda")
    wanted = run(case)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run(case))
    torch.cuda.synchronize()
    for outputs, gradient in results:
        for a, b in zip((*outputs, gradient), (*wanted[0], wanted[1]), strict=True):
            assert_same_bits(a, b)


@each_call
def test_graph_replay_equals_eager(run, make, shape):
    case, other = make(shape, torch.float32, "cuda"), make(shape, torch.float32, "cuda")
    wanted = run(other)
    run(case)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    grad = case.upstream()
    case.upstream = lambda: grad
    with torch.cuda.graph(graph):
        outputs, gradient = run(case)
    for mine, theirs in zip(case.tensors, other.tensors, strict=True):
        mine.copy_(theirs)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip((*outputs, gradient), (*wanted[0], wanted[1]), strict=True):
        assert_same_bits(a, b)


def test_opcheck():
    case = rc.cross_entropy((4, 2, 10), torch.float32, "cuda")
    names = dict(zip(("temperature", "floor", "ignore_index"), case.numbers, strict=True))
    tensors = {"logits": case.tensors[0].requires_grad_(), "labels": case.tensors[1]}
    assert_opcheck("adaptive_cross_entropy", Case(tensors, names))
    tensors = {name: t[:, :1].detach().contiguous() for name, t in tensors.items()}
    assert_opcheck("adaptive_cross_entropy_sum_", Case(tensors, {**names, "scale": -2.0}))
    case = rc.squared_error((4, 10), torch.float32, "cuda")
    names = dict(zip(("temperature", "floor", "mean", "cap"), case.numbers, strict=True))
    tensors = dict(zip(("prediction", "target", "reference"), case.tensors, strict=True))
    tensors["prediction"].requires_grad_()
    assert_opcheck("adaptive_mse", Case(tensors, names))
    case = rc.soft_targets((4, 10), torch.float32, "cuda", biased=True, masked=True)
    names = ("logits", "teacher_logits", "weights", "class_bias", "class_weights")
    tensors = dict(zip(names, case.tensors, strict=True))
    assert_opcheck("soft_target_kl", Case(tensors, {"temperature": 2.0}))


def test_compile():
    case = rc.cross_entropy((64, 1, 1000), torch.float32, "cuda")
    made = Case(dict(zip(("logits", "labels"), case.tensors, strict=True)), {"temperature": 0.5})
    made.tensors["logits"], made.tensors["labels"] = (t.squeeze(1) for t in made.tensors.values())
    assert compiled_equals_eager(sf.adaptive_cross_entropy, [made, made]) == 1


@each_dtype
def test_gradient_through_the_public_functions(dtype):
    logits = torch.randn(8, 12, 5000, device="cuda", dtype=dtype).requires_grad_()
    labels = torch.randint(5000, (8, 12), device="cuda")
    labels[0, 3:] = -100
    (-2.5 * sf.adaptive_cross_entropy(logits, labels)).backward()
    exact = logits.detach().cpu().double().requires_grad_()
    (-2.5 * sf.adaptive_cross_entropy(exact, labels.cpu())).backward()
    relative = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    torch.testing.assert_close(logits.grad.cpu().double(), exact.grad, rtol=relative, atol=1e-7)


def test_more_than_2_to_31_logits():
    """The last rows of 17 000 x 128256 bf16: offsets beyond 32 bits."""
    samples, classes = 17_000, 128_256
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * samples * classes * 2:
        pytest.skip("not enough memory on this GPU")
    logits = torch.zeros((samples, 1, classes), dtype=torch.bfloat16, device="cuda")
    labels = torch.full((samples, 1), classes - 1, device="cuda")
    logits[-1, 0, -1] = 3.0
    outputs, gradient = run_cross_entropy(
        rc.Rows((logits, labels), (0.0, 1e-6, -100), grad=float(samples))
    )
    exact = math.log(classes - 1 + math.exp(3.0))
    assert outputs[4][:, -1].sum().item() == pytest.approx(exact, abs=1e-5)
    assert abs(outputs[1][-1].item() - (exact - 3.0)) < 1e-5
    assert abs(gradient[-1, 0, -1].item() - (math.exp(3.0 - exact) - 1.0)) < 2.0**-8
    assert abs(outputs[1][-2].item() - math.log(classes)) < 1e-5


@each_dtype
@pytest.mark.parametrize(("samples", "classes"), SUMS)
def test_cross_entropy_sum(samples, classes, dtype):
    """Total and gradient before the division by the normaliser, the latter over the logits;
    repeatable.
    """
    case = rc.cross_entropy((samples, 1, classes), dtype, "cuda")
    first, second = case.tensors[0].clone(), case.tensors[0].clone()
    outputs = ops.op("adaptive_cross_entropy_sum_")(
        first, case.tensors[1], *case.numbers, case.grad
    )
    ops.op("adaptive_cross_entropy_sum_")(second, case.tensors[1], *case.numbers, case.grad)
    assert_same_bits(first, second)
    rc.judge_cross_entropy(case, outputs, first, pieces=1 + classes // 4096, summed=True)


@each_dtype
@pytest.mark.parametrize(
    "shape", [(256, 1, 10), (300, 1, 1000), (8, 64, 5000), (3, 70, 32000)], ids=str
)
def test_cross_entropy_backward_over_the_logits(shape, dtype):
    case = rc.cross_entropy(shape, dtype, "cuda")
    outputs, wanted = run_cross_entropy(case)
    logits, labels = case.tensors
    backward = torch.ops.sfron_fast.adaptive_cross_entropy_backward_
    backward(case.upstream(), logits, labels, outputs[2], outputs[4], case.numbers[2])
    assert_same_bits(logits, wanted)


@each_dtype
@pytest.mark.parametrize("shape", [(1,), (4097,), (300, 1, 1000), (64, 1, 128_256)], ids=str)
def test_scale(shape, dtype):
    """By 1 nothing changes, and no factor is waited for."""
    gradient = torch.randn(shape, device="cuda", dtype=dtype)
    for factor in (1.0, -2.5, 0.0):
        got, wanted, number = (
            gradient.clone(),
            gradient.clone(),
            torch.tensor(factor, device="cuda"),
        )
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.op("adaptive_cross_entropy_scale_")(got, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if factor != 1.0:
            rc.reference.adaptive_cross_entropy_scale_(wanted, number)
        assert_same_bits(got, wanted)


@each_dtype
def test_gradient_in_place_through_the_public_functions(dtype):
    """In place, and in place without the normaliser: through a last layer, as a model has it."""
    features, weight = (torch.randn(n, 6, device="cuda", dtype=dtype) for n in (40, 5000))
    weight.requires_grad_()
    labels = torch.randint(5000, (40,), device="cuda")
    labels[3] = -100
    (wanted,) = torch.autograd.grad(
        -2.5 * sf.adaptive_cross_entropy(features @ weight.t(), labels), weight
    )
    (got,) = torch.autograd.grad(
        -2.5 * sf.adaptive_cross_entropy(features @ weight.t(), labels, inplace=True), weight
    )
    assert_same_bits(got, wanted)
    for scale, factor in ((-2.5, 1.0), (1.0, -2.5)):
        total, normaliser = sf.adaptive_cross_entropy_sum_(
            features @ weight.t(), labels, scale=scale
        )
        (got,) = torch.autograd.grad(total * factor, weight)
        size = wanted.abs().max().item()
        error = ((got.double() / normaliser.double()) - wanted.double()).abs().max().item()
        assert error <= 4 * rc.tol.EPS[dtype] * size + 1e-5 * size
