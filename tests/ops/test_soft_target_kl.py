import math

import pytest
import tolerances
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    NATIVE_DTYPES,
    Case,
    assert_all_entries_reject,
    assert_deterministic,
    assert_opcheck,
    assert_within,
    bad_numbers,
    compiled_equals_eager,
    lazy_zeros,
    reject_params,
    shifted,
    strided,
    transposed,
    values,
)

from sfron_fast import losses
from sfron_fast.ops import reference, rows
from sfron_fast.ops import registry as ops
from sfron_fast.ops import soft_target_kl as op_file

OUTPUTS = ("loss", "losses", "log_sums")


def make(
    shape=(6, 70),
    dtype=torch.float32,
    device="cpu",
    *,
    scale=1.0,
    temperature=1.0,
    weighted=True,
    near=None,
    offset=0.0,
    common=0.0,
) -> Case:
    """Weights of both signs, the second 0; with ``near`` the teacher is the logits and so much
    noise.
    """
    logits, teacher = (values(shape, dtype, device, scale=scale) + common for _ in range(2))
    if near is not None:
        teacher = (logits.double() + near * teacher.double()).to(dtype)
    weights = None
    if weighted:
        weights = values(shape[:1], reference.accumulate_dtype(dtype), device)
        weights[1:2] = 0.0
    teacher = (teacher.double() + offset).to(dtype)
    return Case(
        {"logits": logits, "teacher_logits": teacher, "weights": weights},
        {"temperature": temperature},
    )


def run(case: Case, grad: float = 1.0) -> dict[str, torch.Tensor]:
    logits, teacher, weights = case.tensors.values()
    logits = logits.detach().requires_grad_()
    kernel = rows.kernel("soft_target_kl", op_file.differentiable, logits)
    outputs = dict(
        zip(OUTPUTS, kernel(logits, teacher, weights, case.scalars["temperature"]), strict=True)
    )
    (gradient,) = torch.autograd.grad(outputs["loss"] * grad, logits)
    return {name: t.detach() for name, t in outputs.items()} | {"gradient": gradient}


def assert_close_to_truth(case: Case, grad: float = 1.0) -> None:
    bounds = tolerances.soft_target_kl(*case.tensors.values(), case.scalars["temperature"], grad)
    assert_within(run(case, grad), bounds)
    with torch.no_grad():  # the reference is held to the same bounds
        outputs = dict(zip(OUTPUTS, case.run(reference.soft_target_kl), strict=True))
        upstream = torch.tensor(grad, device=outputs["loss"].device)
        outputs["gradient"] = reference.soft_target_kl_backward(
            upstream, *case.tensors.values(), outputs["log_sums"], case.scalars["temperature"]
        )
        assert_within(outputs, bounds)


CASES = {
    "plain": {},
    "equal weights": {"weighted": False},
    "one class": {"shape": (3, 1)},
    "one sample": {"shape": (1, 7), "weighted": False},
    "ten classes": {"shape": (33, 10), "temperature": 4.0},
    "image classes": {"shape": (64, 1000), "temperature": 4.0},
    "vocabulary": {"shape": (3, 32003), "temperature": 0.7},
    "three in the temperature": {"temperature": 3.0, "scale": 5.0},
    "confident": {"scale": 30.0},
    "very confident": {"scale": 1000.0, "shape": (7, 3000)},
    "teacher shifted": {"offset": 60.0},
    "almost the teacher": {"near": 1e-3, "shape": (5, 300)},
    "almost the teacher, far out": {"near": 1e-2, "common": 1e4},
    "nearly uniform": {"temperature": 100.0},
    "small temperature": {"temperature": 0.01, "common": 100.0},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, name):
    assert_close_to_truth(make(**CASES[name], dtype=dtype, device=device), grad=-0.7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matches_torch(device, temperature):
    """F.kl_div over log-softmaxes, which knows nothing of ours; in fp64."""
    case = make((9, 40), torch.float64, device, temperature=temperature)
    logits, teacher, weights = case.tensors.values()
    logits.requires_grad_()
    pair = ((x / temperature).log_softmax(1) for x in (logits, teacher))
    rows = F.kl_div(*pair, log_target=True, reduction="none").sum(1) * temperature**2
    for ours, theirs in (
        (losses.soft_target_kl(logits, teacher, weights, temperature), (weights * rows).sum()),
        (losses.soft_target_kl(logits, teacher, temperature=temperature), rows.mean()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
        gradients = [
            torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_the_teacher_itself_has_loss_and_gradient_zero(device, dtype):
    for shape in ((4, 10), (3, 5000)):
        case = make(shape, dtype, device, near=0.0, temperature=3.0)
        got = run(case)
        assert not got["losses"].any()
        assert not got["gradient"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_with_infinite_logits(device, dtype):
    """A class that the teacher forbids adds nothing; forbidden by the logits alone it is inf; inf
    and NaN show.
    """
    case = make((4, 5000), dtype, device)
    case.tensors["weights"] += 2.0
    case.tensors["teacher_logits"][:, 10:4000] = -math.inf
    assert_close_to_truth(case)
    case.tensors["logits"][:, 20:3000] = -math.inf
    assert_close_to_truth(case)
    forbidden = case.clone()
    forbidden.tensors["logits"][2, 5] = -math.inf
    assert run(forbidden)["losses"].isinf().tolist() == [False, False, True, False]
    for name in ("logits", "teacher_logits"):
        for poison in (math.inf, math.nan):
            for at in (0, 2100, 4999):
                poisoned = case.clone()
                poisoned.tensors[name][1, at] = poison
                got = run(poisoned)
                assert not math.isfinite(got["loss"])
                assert torch.isfinite(got["losses"]).tolist() == [True, False, True, True]
                assert not torch.isfinite(got["gradient"][1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """T = 2, teacher (0, 0): p = (1/2, 1/2); logits (0, 2 ln 3): q = (1/4, 3/4).

    KL = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3), times T^2 = 4; gradient T (q - p) = (-1/2, 1/2).
    Weight -3 for all of it.
    """
    logits = torch.tensor([[0.0, 2 * math.log(3)]], dtype=dtype, device=device, requires_grad=True)
    loss = losses.soft_target_kl(
        logits, torch.zeros_like(logits), torch.tensor([-3.0], device=device), 2.0
    )
    loss.backward()
    close = {"rel": 4 * tolerances.EPS[dtype]}  # ln 3 is rounded to the dtype
    assert loss.item() == pytest.approx(-6 * math.log(4 / 3), **close)
    assert logits.grad.flatten().tolist() == pytest.approx([1.5, -1.5], **close)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype, poison):
    """A row of weight 0 has no part in anything, whatever its logits, and its gradient is 0, not 0
    times inf.
    """
    case = make((6, 33), dtype, device)
    clean = run(case)
    for name in ("logits", "teacher_logits"):
        case.tensors[name][1] = poison
        before, got = case.clone(), run(case)
        for (_, now), (_, then) in zip(case.flat(), before.flat(), strict=True):
            assert torch.equal(now.nan_to_num(nan=7.0), then.nan_to_num(nan=7.0))
        for output in ("loss", "losses", "gradient"):
            assert torch.equal(got[output], clean[output]), output
        assert got["losses"][1] == 0
        assert not got["gradient"][1].any()
        assert (got["gradient"][[0, 2, 3, 4, 5]] != 0).any(dim=1).all()


@pytest.mark.parametrize("grad", [1.0, -2.5])
def test_gradcheck(device, grad):
    """Of fp64 by finite differences, and the analytic backward against it."""
    case = make((4, 5), torch.float64, device, temperature=3.0)
    logits, teacher, weights = case.tensors.values()
    leaf = logits.clone().requires_grad_()
    torch.autograd.gradcheck(lambda x: losses.soft_target_kl(x, teacher, weights, 3.0) * grad, leaf)
    upstream = torch.tensor(grad, dtype=torch.float64, device=device)
    log_sums = case.run(reference.soft_target_kl)[2]
    analytic = reference.soft_target_kl_backward(upstream, logits, teacher, weights, log_sums, 3.0)
    # both in fp64: the fp32 bound, scaled from 2^-24 to 2^-53, is generous by a constant only
    truth, bound = tolerances.soft_target_kl(*case.tensors.values(), 3.0, grad)["gradient"]
    assert ((run(case, grad)["gradient"] - analytic).abs() <= bound * 2.0**-28).all()
    assert ((truth - analytic).abs() <= bound * 2.0**-28).all()


@pytest.mark.checklist("E2")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_opcheck(device, dtype):
    for shape, weighted in (((4, 70), True), ((4, 7), False), ((0, 5), True)):
        case = make(shape, dtype, device, weighted=weighted)
        assert_opcheck("soft_target_kl", case)
        log_sums = ops.soft_target_kl(*case.tensors.values(), 1.0)[2]
        tensors = {"grad": torch.ones((), device=device), **case.tensors, "log_sums": log_sums}
        assert_opcheck("soft_target_kl_backward", Case(tensors, {"temperature": 1.0}))
        case.tensors["logits"].requires_grad_()
        assert_opcheck("soft_target_kl", case)


def test_compile(device):
    cases = [make((8, 12), device=device) for _ in range(3)]
    assert compiled_equals_eager(ops.soft_target_kl, cases) == 1
    compiled = torch.compile(losses.soft_target_kl, fullgraph=True, backend="aot_eager")
    eager, other = (cases[0].tensors["logits"].clone().requires_grad_() for _ in range(2))
    rest = cases[0].tensors["teacher_logits"], cases[0].tensors["weights"], 2.0
    (losses.soft_target_kl(eager, *rest) * -2.0).backward()
    (compiled(other, *rest) * -2.0).backward()
    assert torch.equal(eager.grad, other.grad)


@pytest.mark.checklist("B7")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(device, dtype, set_threads):
    case = make((133, 4001), dtype, device)

    def outputs_and_gradient(temperature, **tensors):
        return list(run(Case(tensors, case.scalars)).values())

    native = dtype != torch.float64 and ops.kernel_for("soft_target_kl", device) == "native"
    assert_deterministic(case, outputs_and_gradient, set_threads if native else None)


CLASSES = (1, 2, 31, 32, 33, 63, 64, 65, 2047, 2048, 2049, 4100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [None, shifted, strided, transposed])
def test_empty_odd_and_large(device, dtype, layout):
    for classes in CLASSES:
        case = make((3, classes), dtype, device)
        if layout is None:
            assert_close_to_truth(case)
            continue
        logits, teacher, weights = (layout(t.detach()) for t in case.tensors.values())
        leaf = logits.requires_grad_()
        loss = losses.soft_target_kl(leaf, teacher, weights)
        loss.backward()
        expected = run(case)
        assert torch.equal(loss, expected["loss"])
        assert torch.equal(leaf.grad, expected["gradient"])
    for shape in ((70_001, 3), (0, 3)):
        assert_close_to_truth(make(shape, dtype, device))
    assert run(make((0, 3), dtype, device, weighted=False))["loss"] == 0
    with pytest.raises(ValueError, match="at least one sample"):
        losses.soft_target_kl(torch.zeros(0, 3, device=device), torch.zeros(0, 3, device=device))


def put(name, change):
    def edit(case):
        case.tensors[name] = change(case.tensors[name])

    return edit


BAD = [
    ("logits-1d", put("logits", lambda t: t[0]), "logits"),
    ("logits-3d", put("logits", lambda t: t.unsqueeze(1)), "logits"),
    ("logits-no-classes", put("logits", lambda t: t[:, :0]), "logits"),
    ("logits-integers", put("logits", lambda t: t.to(torch.int32)), "logits"),
    ("teacher-shape", put("teacher_logits", lambda t: t[:, :-1].contiguous()), "teacher_logits"),
    ("teacher-dtype", put("teacher_logits", lambda t: t.bfloat16()), "teacher_logits"),
    ("teacher-meta", put("teacher_logits", lambda t: t.to("meta")), "teacher_logits"),
    ("weights-shape", put("weights", lambda t: t[:-1]), "weights"),
    ("weights-2d", put("weights", lambda t: t.unsqueeze(1)), "weights"),
    ("weights-dtype", put("weights", lambda t: t.double()), "weights"),
    ("weights-meta", put("weights", lambda t: t.to("meta")), "weights"),
    *bad_numbers(temperature=(0.0, -1.0, math.inf)),
]


@reject_params(BAD)
def test_rejects(edit, argument):
    assert_all_entries_reject("soft_target_kl", make, edit, argument)


def test_version_counter():
    """Nothing is written; logits or a teacher changed between forward and backward are noticed."""
    for change in (0, 1):
        leaf, teacher = (make().tensors["logits"] for _ in range(2))
        work = leaf.requires_grad_() * 1.0
        loss = losses.soft_target_kl(work, teacher)
        assert work._version == teacher._version == 0
        with torch.no_grad():
            (work, teacher)[change].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_weights_are_constants():
    """No gradient flows into weights that have one; any floating dtype of theirs serves."""
    logits, teacher = make().tensors["logits"].requires_grad_(), make().tensors["logits"]
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    loss = losses.soft_target_kl(logits, teacher, weights)
    assert torch.equal(loss, losses.soft_target_kl(logits, teacher, weights.detach().float()))
    loss.backward()
    assert weights.grad is None


def test_refuses_a_teacher_that_requires_grad():
    with pytest.raises(ValueError, match=r"teacher_logits: .*torch.no_grad\(\)"):
        losses.soft_target_kl(torch.zeros(2, 2), torch.zeros(2, 2, requires_grad=True))


@pytest.mark.long
def test_index_arithmetic_above_2_31():
    if ops.kernel_for("soft_target_kl", "cpu") != "native":
        pytest.skip("the reference would widen 2^31 elements to fp32")
    classes = 2**16
    rows = 2**15 + 2
    logits, teacher = (
        lazy_zeros(rows * classes, torch.bfloat16).view(rows, classes) for _ in range(2)
    )
    logits[-1, -1] = 20.0
    _, per_sample, log_sums = ops.soft_target_kl(logits, teacher, None, 1.0)
    student = math.log1p((classes - 1) * math.exp(-20.0))
    assert log_sums[:, -1].tolist() == pytest.approx(
        [20.0, student, 0.0, math.log(classes)], rel=1e-6
    )
    assert per_sample[-1].item() == pytest.approx(
        20.0 + student - 20.0 / classes - math.log(classes), rel=1e-6
    )
    assert not per_sample[:-1].any()
