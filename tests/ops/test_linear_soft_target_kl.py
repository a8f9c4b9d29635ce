"""``linear_soft_target_kl`` against torch's kl_div of all logits in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from head_cases import error, small_tiles

import sfron_fast as sf
from sfron_fast.ops import linear_kl_tiles as tiles
from sfron_fast.ops import linear_soft_target_kl as file
from sfron_fast.ops import registry

ROWS, FEATURES, TEACHERS, CLASSES = 23, 16, 12, 203
SETTINGS = {
    "plain": {},
    "no bias": {"bias": None, "teacher_bias": None},
    "undial": {"label_shift": 10.0},
    "cap": {"softcap": 3.0, "logit_scale": 0.5, "label_shift": -2.0},
    "mean": {"row_weights": None},
}
TENSORS = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    small_tiles(monkeypatch)


def arguments(dtype=torch.float32, **settings):
    """By name; weights of both signs over five decades, and rows without a part that hold NaN."""
    torch.manual_seed(0)
    shapes = ((ROWS, FEATURES), (CLASSES, FEATURES), CLASSES, (ROWS, TEACHERS))
    shapes = (*shapes, (CLASSES, TEACHERS), CLASSES)
    given = {name: torch.randn(shape) for name, shape in zip(TENSORS, shapes, strict=True)}
    given["labels"] = torch.randint(CLASSES, (ROWS,))
    given["labels"][::4] = -100
    given["row_weights"] = torch.randn(ROWS) * 10.0 ** (torch.rand(ROWS) * 5 - 2.5)
    given["row_weights"][1] = 0.0
    given["hidden"][[0, 4]], given["teacher_hidden"][4] = torch.nan, torch.inf
    if settings.get("row_weights", 0) is not None:
        given["hidden"][1] = torch.nan
    given |= settings
    return {k: v.to(dtype) if k in TENSORS and v is not None else v for k, v in given.items()}


def run(given, function=sf.linear_soft_target_kl):
    """Loss, and the gradients of the student."""
    leaves = {k: given[k].clone().requires_grad_() for k in TENSORS[:3] if given[k] is not None}
    loss = function(**{**given, **leaves})
    (loss * -0.7).backward()
    return {"loss": loss.detach(), **{f"d {k}": t.grad for k, t in leaves.items()}}


def all_logits(
    hidden,
    weight,
    teacher_hidden,
    teacher_weight,
    labels,
    bias=None,
    teacher_bias=None,
    row_weights=None,
    label_shift=0.0,
    softcap=None,
    logit_scale=1.0,
):
    """By torch alone."""
    kept = labels != -100
    kept = kept if row_weights is None else kept & (row_weights != 0)

    def logits(rows, head, shift):
        found = F.linear(rows[kept], head, shift) * logit_scale
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    teacher = logits(teacher_hidden, teacher_weight, teacher_bias)
    teacher = teacher - label_shift * F.one_hot(labels[kept], CLASSES)
    pair = (x.log_softmax(1) for x in (logits(hidden, weight, bias), teacher))
    rows = F.kl_div(*pair, log_target=True, reduction="none").sum(1)
    return rows.mean() if row_weights is None else (row_weights[kept] * rows).sum()


def assert_as_good_as_torch(given, tolerance=None):
    double = {k: v.double() if k in TENSORS and v is not None else v for k, v in given.items()}
    truth, found = run(double, all_logits), run(given)
    torchs = run(given, all_logits) if tolerance is None else None
    for key, wanted in truth.items():
        bound = tolerance or 3 * max(error(torchs[key], wanted), 1e-7)
        assert error(found[key], wanted) <= bound, key


@pytest.mark.parametrize("name", SETTINGS)
def test_fp64(name, monkeypatch):
    """All logits at once, and the tiles."""
    given = arguments(torch.float64, **SETTINGS[name])
    assert_as_good_as_torch(given, 1e-12)
    monkeypatch.setattr(file, "kernel", lambda name, *rest: registry.op(name))
    assert_as_good_as_torch(given, 1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_fp32(name):
    assert_as_good_as_torch(arguments(**SETTINGS[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow(dtype):
    assert_as_good_as_torch(arguments(dtype, label_shift=2.0), torch.finfo(dtype).eps)


def test_hand_example():
    """Teacher (0, 0), logits (0, ln 3): KL = ln(4/3) / 2, and q - p = (-1/4, 1/4).

    With a shift of ln 3 at label 0 the teacher is (1/4, 3/4): the student, of loss 0.
    """
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    teacher = torch.ones(1, 1), torch.zeros(2, 1)
    loss = sf.linear_soft_target_kl(torch.ones(1, 1), weight, *teacher)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)
    assert weight.grad.flatten().tolist() == pytest.approx([-0.25, 0.25], rel=1e-6)
    label = torch.tensor([0])
    shifted = sf.linear_soft_target_kl(
        torch.ones(1, 1), weight, *teacher, labels=label, label_shift=math.log(3)
    )
    assert shifted.item() == pytest.approx(0.0, abs=1e-7)


def test_the_teacher_itself():
    """The same head: loss and gradient 0 to rounding."""
    given = arguments(bias=None, teacher_bias=None)
    given["teacher_hidden"], given["teacher_weight"] = given["hidden"], given["weight"]
    found = run(given)
    assert not any(t.any() for t in found.values())


def test_forbidden_classes():
    """A bias of -inf on both sides adds nothing; on the student's alone the loss is inf."""
    given = arguments()
    for name in ("bias", "teacher_bias"):
        given[name][50:90] = -torch.inf
    found = run(given)
    assert all(t.isfinite().all() for t in found.values())
    short = {**given, "labels": None}
    kept = [i for i in range(CLASSES) if not 50 <= i < 90]
    for name in ("weight", "bias", "teacher_weight", "teacher_bias"):
        short[name] = given[name][kept]
    given["row_weights"][::4] = 0.0
    wanted = sf.linear_soft_target_kl(**{**short, "row_weights": given["row_weights"]})
    torch.testing.assert_close(found["loss"], wanted)
    given["teacher_bias"], given["row_weights"] = torch.zeros(CLASSES), torch.ones(ROWS)
    given["hidden"][1] = 0.0
    assert run(given)["loss"].isinf()


def test_a_bias_of_classes_is_the_teachers():
    """What ``soft_target_kl`` takes as class_bias, part of its head."""
    given = arguments(labels=None)
    given["row_weights"][[0, 4]] = 0.0
    student, teacher = (
        F.linear(*(given[prefix + name] for name in ("hidden", "weight", "bias")))
        for prefix in ("", "teacher_")
    )
    bias = torch.randn(CLASSES)
    bias[50:90] = -torch.inf
    given["teacher_bias"] += bias
    wanted = sf.soft_target_kl(student, teacher, given["row_weights"], class_bias=bias)
    torch.testing.assert_close(run(given)["loss"], wanted)


def test_gradients_again():
    given = arguments(torch.float64, softcap=2.0, label_shift=1.0)
    given = {k: v[:5].nan_to_num() if k.endswith("hidden") else v for k, v in given.items()}
    given["labels"], given["row_weights"] = given["labels"][:5], torch.randn(5)
    given["teacher_hidden"] = given["teacher_hidden"].clamp(-9, 9)
    leaves = [given.pop(name).requires_grad_() for name in TENSORS[:3]]

    def loss(*tensors):
        return sf.linear_soft_target_kl(**dict(zip(TENSORS[:3], tensors, strict=True)), **given)

    torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


def test_opcheck_and_compile():
    given = arguments()
    order = [*TENSORS, "labels"]
    for leaf in (False, True):
        tensors = [torch.nan_to_num(given[name], posinf=1.0) for name in order]
        for t in tensors[:3]:
            t.requires_grad_(leaf)
        op = torch.ops.sfron_fast.linear_soft_target_kl.default
        torch.library.opcheck(op, (*tensors, 2.0, 3.0, 0.5, -100))
    compiled = torch.compile(sf.linear_soft_target_kl, fullgraph=True, backend="aot_eager")
    wanted, found = run(given), run(given, compiled)
    for key, result in found.items():
        torch.testing.assert_close(result, wanted[key], rtol=1e-6, atol=0.0)


def _unmoved(tile_pairs):
    def pairs(hidden, head, teacher_hidden, teacher, labels, label_shift):
        return tile_pairs(hidden, head, teacher_hidden, teacher, labels, 0.0)

    return pairs


def test_the_judge_catches_a_label_that_is_not_lowered(monkeypatch):
    monkeypatch.setattr(tiles, "pairs", _unmoved(tiles.pairs))
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(arguments(label_shift=3.0))


GOOD = arguments(row_weights=None)
WRONG = {
    "teacher_hidden": {"teacher_hidden": GOOD["teacher_hidden"][1:]},
    "teacher_weight": {"teacher_weight": GOOD["teacher_weight"][1:], "teacher_bias": None},
    "teacher_weight ": {"teacher_weight": GOOD["teacher_weight"][:, 1:]},
    "teacher_bias": {"teacher_bias": GOOD["teacher_bias"][1:]},
    "teacher_hidden and teacher_weight": {
        "teacher_hidden": GOOD["teacher_hidden"].clone().requires_grad_()
    },
    "labels": {"labels": None, "label_shift": 1.0},
    "label_shift": {"label_shift": math.nan},
    "row_weights": {"row_weights": torch.ones(3)},
    "weight": {"weight": GOOD["weight"].bfloat16()},
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals(name):
    with pytest.raises(ValueError, match=f"^{name.strip()}: expected"):
        sf.linear_soft_target_kl(**{**GOOD, **WRONG[name]})
