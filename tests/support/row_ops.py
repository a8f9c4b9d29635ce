"""Entries of the losses over rows."""

import math

import tolerances
import torch
from cases import Case, values
from op_entries import RowOp
from spoiling import bad_numbers, put

from sfron_fast import losses
from sfron_fast.ops import adaptive_cross_entropy as cross_entropy_file
from sfron_fast.ops import adaptive_mse as mse_file
from sfron_fast.ops import reference
from sfron_fast.ops import soft_target_kl as kl_file

CLASSES = (1, 2, 31, 32, 33, 63, 64, 65, 2047, 2048, 2049, 4100)
ELEMENTS = (1, 2, 63, 64, 65, 511, 512, 513, 16383, 16384, 16385)


# --- adaptive_cross_entropy -----------------------------------------------------------------------


def cross_entropy_case(
    shape=(4, 3, 10),
    dtype=torch.float32,
    device="cpu",
    *,
    scale=1.0,
    ignored=0.3,
    temperature=0.5,
    floor=1e-6,
    ignore_index=-100,
) -> Case:
    labels = torch.randint(0, shape[2], shape[:2], device=device)
    labels[torch.rand(shape[:2], device=device) < ignored] = ignore_index
    return Case(
        {"logits": values(shape, dtype, device, scale=scale), "labels": labels},
        {"temperature": temperature, "floor": floor, "ignore_index": ignore_index},
    )


def _cross_entropy_loss(logits, labels, temperature, floor, ignore_index):
    return losses.adaptive_cross_entropy(
        logits, labels, temperature, floor=floor, ignore_index=ignore_index
    )


def label(value):
    def change(labels):
        labels = labels.clone()
        labels[1, 2] = value
        return labels

    return put("labels", change)


ADAPTIVE_CROSS_ENTROPY = RowOp(
    name="adaptive_cross_entropy",
    make=cross_entropy_case,
    outputs=("loss", "losses", "weights", "log_normaliser", "log_sums"),
    loss=_cross_entropy_loss,
    differentiable=cross_entropy_file.differentiable,
    bounds=tolerances.cross_entropy,
    read_again=("logits",),
    saved=("weights", "log_sums"),
    saved_numbers=("ignore_index",),
    settings={
        "plain": {"ignored": 0.0},
        "tokens": {"shape": (5, 17, 33)},
        "one class": {"shape": (3, 2, 1)},
        "one sample": {"shape": (1, 1, 7), "ignored": 0.0},
        "image classes": {"shape": (64, 1, 1000), "ignored": 0.0},
        "vocabulary": {"shape": (2, 3, 32003)},
        "confident": {"scale": 30.0},
        "very confident": {"scale": 1000.0},
        "mean": {"temperature": 0.0},
        "steep": {"temperature": 2.0, "shape": (16, 4, 10)},
        "high floor": {"floor": 3.0, "shape": (16, 4, 10)},
        "other ignored label": {"ignore_index": 3},
        "nothing labelled": {"ignored": 2.0},
        "some labelled": {},
    },
    thorough=("some labelled", "plain"),
    sizes={
        "odd": [(3, 2, classes) for classes in CLASSES],
        "many": [(1, 70_001, 3), (70_001, 1, 3)],
        "empty": [(0, 1, 3), (3, 0, 5)],
    },
    opcheck_shapes=((4, 3, 10), (0, 1, 10), (3, 0, 10)),
    compile_shape=(8, 1, 10),
    shape_for_threads=(33, 7, 501),
    wrong=[
        ("logits-2d", put("logits", lambda t: t[:, 0]), "logits"),
        ("logits-no-classes", put("logits", lambda t: t[..., :0]), "logits"),
        ("logits-integers", put("logits", lambda t: t.to(torch.int32)), "logits"),
        ("labels-shape", put("labels", lambda t: t[:, :-1]), "labels"),
        ("labels-dtype", put("labels", lambda t: t.to(torch.int32)), "labels"),
        ("labels-meta", put("labels", lambda t: t.to("meta")), "labels"),
        ("label-too-large", label(10), "labels"),
        ("label-negative", label(-1), "labels"),
        ("label-far-out", label(2**40), "labels"),
        ("label-wraps-to-int32", label(2**32), "labels"),
        *bad_numbers(temperature=(-0.1,), floor=(0.0, -1.0)),
    ],
)


# --- adaptive_mse ---------------------------------------------------------------------------------


def mse_case(
    shape=(4, 70),
    dtype=torch.float32,
    device="cpu",
    *,
    scale=1.0,
    temperature=0.5,
    floor=1e-6,
    mean=True,
    relative=False,
    cap=math.inf,
) -> Case:
    """``relative``: to references that differ a thousandfold."""
    tensors = {name: values(shape, dtype, device, scale=scale) for name in ("prediction", "target")}
    tensors["reference"] = None
    if relative:
        usual = torch.logspace(-1.5, 1.5, shape[0], dtype=torch.float64)
        tensors["reference"] = usual.to(device, reference.accumulate_dtype(dtype))
    numbers = {"temperature": temperature, "floor": floor, "mean": mean, "cap": cap}
    return Case(tensors, numbers)


def _mse_loss(prediction, target, reference, temperature, floor, mean, cap):
    return losses.adaptive_mse(
        prediction,
        target,
        temperature,
        floor=floor,
        reduction="mean" if mean else "sum",
        reference=reference,
        cap=None if cap == math.inf else cap,
    )


ADAPTIVE_MSE = RowOp(
    name="adaptive_mse",
    make=mse_case,
    outputs=("loss", "losses", "weights", "log_normaliser"),
    loss=_mse_loss,
    differentiable=mse_file.differentiable,
    bounds=tolerances.mean_squared_error,
    read_again=("prediction", "target"),
    only_forward=("reference",),
    saved=("weights",),
    saved_numbers=("mean",),
    settings={
        "mean": {},
        "sum": {"mean": False},
        "one element": {"shape": (5, 1)},
        "one sample": {"shape": (1, 33)},
        "images": {"shape": (16, 3 * 32 * 32)},
        "large": {"scale": 100.0},
        "small": {"scale": 1e-3},
        "below the floor": {"scale": 1e-2, "floor": 1.0},
        "around the floor": {"shape": (32, 5), "floor": 2.0},
        "plain average": {"temperature": 0.0},
        "steep": {"temperature": 2.0, "shape": (16, 20)},
        "relative": {"relative": True, "shape": (16, 20)},
        "relative sum": {"relative": True, "mean": False},
        "relative average": {"relative": True, "temperature": 0.0, "shape": (33, 5)},
        "relative, below the floor": {"relative": True, "floor": 1.0, "shape": (16, 20)},
        "capped": {"relative": True, "cap": 3.0, "shape": (40, 70)},
        "capped sum": {"relative": True, "cap": 3.0, "mean": False},
        "all capped": {"relative": True, "cap": 1e-5, "shape": (6, 70)},
    },
    thorough=("sum", "mean", "capped sum"),
    sizes={
        "odd": [(3, elements) for elements in ELEMENTS],
        "many": [(1, 200_001), (70_001, 3)],
        "empty": [(0, 3), (3, 0)],
    },
    opcheck_shapes=((4, 70), (0, 5), (3, 0)),
    compile_shape=(8, 12),
    shape_for_threads=(33, 40_001),
    wrong=[
        ("prediction-1d", put("prediction", lambda t: t[0]), "prediction"),
        ("prediction-3d", put("prediction", lambda t: t.unsqueeze(2)), "prediction"),
        ("prediction-integers", put("prediction", lambda t: t.to(torch.int32)), "prediction"),
        ("target-shape", put("target", lambda t: t[:, :-1]), "target"),
        ("target-dtype", put("target", lambda t: t.bfloat16()), "target"),
        ("target-meta", put("target", lambda t: t.to("meta")), "target"),
        ("reference-shape", put("reference", lambda t: t[:-1]), "reference"),
        ("reference-2d", put("reference", lambda t: t.unsqueeze(1)), "reference"),
        ("reference-dtype", put("reference", lambda t: t.double()), "reference"),
        ("reference-meta", put("reference", lambda t: t.to("meta")), "reference"),
        ("reference-zero", put("reference", lambda t: t * (t != t[1])), "reference"),
        ("reference-negative", put("reference", lambda t: -t), "reference"),
        ("reference-inf", put("reference", lambda t: t / 0.0), "reference"),
        ("reference-nan", put("reference", lambda t: t * math.nan), "reference"),
        ("cap-without-reference", put("reference", lambda t: None), "reference"),
        *bad_numbers(temperature=(-0.1,), floor=(0.0, -1.0), cap=(0.0, 1e-6, -1.0)),
    ],
)


# --- soft_target_kl -------------------------------------------------------------------------------


def kl_case(
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
    biased=False,
    masked=False,
) -> Case:
    """Weights of both signs, the second 0; with ``near`` the teacher is the logits and so much
    noise. ``biased``: every fifth class but the first is forbidden; ``masked``: class weights from
    0 to 3, every third 0.
    """
    logits, teacher = (values(shape, dtype, device, scale=scale) + common for _ in range(2))
    if near is not None:
        teacher = (logits.double() + near * teacher.double()).to(dtype)
    weights = None
    if weighted:
        weights = values(shape[:1], reference.accumulate_dtype(dtype), device)
        weights[1:2] = 0.0
    teacher = (teacher.double() + offset).to(dtype)
    class_bias = class_weights = None
    if biased:
        class_bias = values(shape[1:], reference.accumulate_dtype(dtype), device)
        class_bias[4::5] = -math.inf
    if masked:
        class_weights = (
            values(shape[1:], reference.accumulate_dtype(dtype), device).abs().clamp(max=3.0)
        )
        class_weights[1::3] = 0.0
    return Case(
        {
            "logits": logits,
            "teacher_logits": teacher,
            "weights": weights,
            "class_bias": class_bias,
            "class_weights": class_weights,
        },
        {"temperature": temperature},
    )


def last_is(value):
    def change(numbers):
        numbers = numbers.clone()
        numbers[-1] = value
        return numbers

    return change


def _kl_loss(logits, teacher_logits, weights, class_bias, class_weights, temperature):
    return losses.soft_target_kl(
        logits,
        teacher_logits,
        weights,
        temperature,
        class_bias=class_bias,
        class_weights=class_weights,
    )


SOFT_TARGET_KL = RowOp(
    name="soft_target_kl",
    make=kl_case,
    outputs=("loss", "losses", "log_sums"),
    loss=_kl_loss,
    differentiable=kl_file.differentiable,
    bounds=tolerances.soft_target_kl,
    read_again=("logits", "teacher_logits"),
    saved=("log_sums",),
    saved_numbers=("temperature",),
    settings={
        "plain": {},
        "warm": {"temperature": 2.0},
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
        "tilted": {"biased": True, "temperature": 2.0},
        "tilted, ten classes": {"biased": True, "shape": (70, 10)},
        "tilted vocabulary": {"biased": True, "shape": (3, 32003), "temperature": 0.7},
        "masked": {"masked": True, "temperature": 2.0},
        "masked, ten classes": {"masked": True, "shape": (70, 10)},
        "masked vocabulary": {"masked": True, "shape": (3, 32003), "temperature": 0.7},
        "both": {"biased": True, "masked": True, "temperature": 2.0},
        "both, image classes": {
            "biased": True,
            "masked": True,
            "shape": (64, 1000),
            "temperature": 4.0,
        },
        "both, very confident": {
            "biased": True,
            "masked": True,
            "scale": 1000.0,
            "shape": (7, 3000),
        },
        "both, teacher shifted": {"biased": True, "masked": True, "offset": 60.0},
    },
    thorough=("equal weights", "warm", "both"),
    sizes={
        "odd": [(3, classes) for classes in CLASSES],
        "many": [(70_001, 3)],
        "empty": [(0, 3)],
    },
    opcheck_shapes=((4, 7), (4, 70), (5, 9), (0, 7), (0, 5)),
    compile_shape=(8, 12),
    shape_for_threads=(133, 4001),
    wrong=[
        ("logits-1d", put("logits", lambda t: t[0]), "logits"),
        ("logits-3d", put("logits", lambda t: t.unsqueeze(1)), "logits"),
        ("logits-no-classes", put("logits", lambda t: t[:, :0]), "logits"),
        ("logits-integers", put("logits", lambda t: t.to(torch.int32)), "logits"),
        (
            "teacher-shape",
            put("teacher_logits", lambda t: t[:, :-1].contiguous()),
            "teacher_logits",
        ),
        ("teacher-dtype", put("teacher_logits", lambda t: t.bfloat16()), "teacher_logits"),
        ("teacher-meta", put("teacher_logits", lambda t: t.to("meta")), "teacher_logits"),
        ("weights-shape", put("weights", lambda t: t[:-1]), "weights"),
        ("weights-2d", put("weights", lambda t: t.unsqueeze(1)), "weights"),
        ("weights-dtype", put("weights", lambda t: t.double()), "weights"),
        ("weights-meta", put("weights", lambda t: t.to("meta")), "weights"),
        *(
            (f"{name}-{how}", put(name, change), name)
            for name, values_refused in (
                ("class_bias", (math.inf, math.nan)),
                ("class_weights", (-1e-3, math.inf, math.nan)),
            )
            for how, change in (
                ("shape", lambda t: t[:-1]),
                ("2d", lambda t: t.unsqueeze(1)),
                ("dtype", lambda t: t.double()),
                ("meta", lambda t: t.to("meta")),
                *((str(value), last_is(value)) for value in values_refused),
            )
        ),
        ("class_bias-all", put("class_bias", lambda t: t - math.inf), "class_bias"),
        *bad_numbers(temperature=(0.0, -1.0, math.inf)),
    ],
)
