"""What the reference kernels of the row ops demand of their arguments: ``checks.py``, for the
losses.
"""

import torch
from torch import Tensor

from ..errors import number, require
from .arguments import FLOAT32_MAX, _aligned, _floats


def adaptive_cross_entropy(
    logits: Tensor, labels: Tensor, temperature: float, floor: float, ignore_index: int
) -> None:
    require(
        logits.dim() == 3 and logits.shape[2] > 0,
        "logits",
        "[samples, tokens, classes]",
        tuple(logits.shape),
    )
    _floats("logits", [logits])
    require(
        labels.shape == logits.shape[:2],
        "labels",
        f"shape {tuple(logits.shape[:2])}",
        tuple(labels.shape),
    )
    require(labels.dtype == torch.int64, "labels", "int64", labels.dtype)
    require(labels.device == logits.device, "labels", f"device {logits.device}", labels.device)
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    if _readable(labels):
        outside = labels[(labels != ignore_index) & ((labels < 0) | (labels >= logits.shape[2]))]
        if outside.numel():
            require(
                False,
                "labels",
                f"classes 0 to {logits.shape[2] - 1} or {ignore_index}",
                int(outside[0]),
            )


def transformed() -> bool:
    """True inside a transform of ``torch.func``, eager or compiled."""
    functorch = torch._C._functorch
    return isinstance(
        functorch.peek_interpreter_stack(), functorch.CInterpreter
    )  # to Dynamo None is not None


def _readable(labels: Tensor) -> bool:
    """On other devices reading would wait for the device; compiled or transformed, there is nothing
    to read.
    """
    return labels.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def _in_place(name: str, tensor: Tensor) -> None:
    """Kernels write where they read; a copy would be written and lost."""
    require(tensor.is_contiguous(), name, "a contiguous tensor", f"strides {tensor.stride()}")


def adaptive_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> None:
    require(grad.numel() == 1, "grad", "one element", tuple(grad.shape))
    samples, tokens = logits.shape[:2]
    shapes = (
        ("labels", labels, (samples, tokens)),
        ("weights", weights, (samples,)),
        ("log_sums", log_sums, (2, samples, tokens)),
    )
    for name, tensor, shape in shapes:
        require(tensor.shape == shape, name, f"shape {shape}", tuple(tensor.shape))


def adaptive_cross_entropy_backward_(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> None:
    adaptive_cross_entropy_backward(grad, logits, labels, weights, log_sums, ignore_index)
    _in_place("logits", logits)


def adaptive_cross_entropy_sum_(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    floor: float,
    ignore_index: int,
    scale: float,
) -> None:
    adaptive_cross_entropy(logits, labels, temperature, floor, ignore_index)
    _in_place("logits", logits)
    one = "one token per sample, [samples, 1, classes]"
    require(logits.shape[1] == 1, "logits", one, tuple(logits.shape))
    number("scale", scale, -FLOAT32_MAX, FLOAT32_MAX)


def adaptive_cross_entropy_scale_(gradient: Tensor, factor: Tensor) -> None:
    _floats("gradient", [gradient])
    require(factor.numel() == 1, "factor", "one element", tuple(factor.shape))
    _in_place("gradient", gradient)


def adaptive_mse(
    prediction: Tensor, target: Tensor, temperature: float, floor: float, mean: bool
) -> None:
    require(prediction.dim() == 2, "prediction", "[samples, elements]", tuple(prediction.shape))
    _floats("prediction", [prediction])
    _aligned("target", [target], [prediction])
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)


def adaptive_mse_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, weights: Tensor, mean: bool
) -> None:
    require(grad.numel() == 1, "grad", "one element", tuple(grad.shape))


def soft_target_kl(
    logits: Tensor, teacher_logits: Tensor, weights: Tensor | None, temperature: float
) -> None:
    require(
        logits.dim() == 2 and logits.shape[1] > 0,
        "logits",
        "[samples, classes]",
        tuple(logits.shape),
    )
    _floats("logits", [logits])
    _aligned("teacher_logits", [teacher_logits], [logits])
    if weights is not None:
        wanted = torch.float64 if logits.dtype == torch.float64 else torch.float32
        require(
            weights.shape == logits.shape[:1],
            "weights",
            f"shape {tuple(logits.shape[:1])}",
            tuple(weights.shape),
        )
        require(weights.dtype == wanted, "weights", f"dtype {wanted}", weights.dtype)
        require(
            weights.device == logits.device, "weights", f"device {logits.device}", weights.device
        )
    number("temperature", temperature, 0.0, open_low=True)


def soft_target_kl_backward(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    log_sums: Tensor,
    temperature: float,
) -> None:
    require(grad.numel() == 1, "grad", "one element", tuple(grad.shape))
    shape = (4, logits.shape[0])
    require(log_sums.shape == shape, "log_sums", f"shape {shape}", tuple(log_sums.shape))
