"""Every op once: schema, fake kernel, default kernel (= ``reference.py``), autograd.

Importing this module also loads the native kernels, which register themselves for their device in
front of the defaults; the dispatcher, not this package, chooses. Lists: an empty list means
"absent"; a flat one (``flat.py``) stands for many tensors; a mask of zero bytes means "every weight
of this tensor is selected". Ops that end in ``_`` write their (x!) arguments in place and return
none of them. Bad input raises before any write.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from . import arguments, differentiable, native, reference, row_checks, triton

native.load()  # first: if it raises, nothing is registered yet and the import can be tried again


def _learn_keys() -> None:
    plain = torch.empty(1, device="cpu")
    negated = torch._neg_view(plain)
    keys = [torch._C._dispatch_keys(t).raw_repr() for t in (plain, negated)]
    native.learn_keys(plain, keys[0], negated, keys[1])


_learn_keys()
_library = torch.library.Library("sfron_fast", "DEF")

SCHEMAS = {
    "masked_grad_norm": "(Tensor[] grads, Tensor[] masks, Tensor? grad_scale) -> Tensor",
    "sgd_step_": (
        """(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] slow_save,
        Tensor[] slow_from, Tensor[] masks, Tensor? norm, Tensor? grad_scale, Tensor? found_inf, *, float lr,
        float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first,
        bool freeze_masked, float max_norm, float slow_lr, Tensor? numbers=None, Tensor(d!)? skipped=None) -> ()"""
    ),
    "adamw_step_": (
        """(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
        Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor(f!)[] slow_save, Tensor[] slow_from,
        Tensor[] masks, Tensor? norm, Tensor? grad_scale, Tensor? found_inf, *, float lr, float beta1,
        float beta2, float eps, float weight_decay, bool decoupled, bool maximize, bool freeze_masked,
        float max_norm, float slow_lr, Tensor? numbers=None, Tensor(g!)? skipped=None) -> ()"""
    ),
    "interpolate_": (
        "(Tensor(a!)[] slow, Tensor(b!)[] fast, float slow_lr, Tensor? numbers=None) -> ()"
    ),
    "fisher_accumulate_": (
        "(Tensor(a!)[] fisher, Tensor[] grads, float weight, Tensor? numbers=None) -> ()"
    ),
    "saliency_mask": (
        "(Tensor[] forget, Tensor[] retain, float threshold, float eps) -> (Tensor[], Tensor)"
    ),
    "adaptive_cross_entropy": (
        """(Tensor logits, Tensor labels, float temperature, float floor, int ignore_index)
        -> (Tensor loss, Tensor losses, Tensor weights, Tensor log_normaliser, Tensor log_sums)"""
    ),
    "adaptive_cross_entropy_backward": (
        """(Tensor grad, Tensor logits, Tensor labels, Tensor weights,
        Tensor log_sums, int ignore_index) -> Tensor"""
    ),
    "adaptive_cross_entropy_backward_": (
        """(Tensor grad, Tensor(a!) logits, Tensor labels, Tensor weights,
        Tensor log_sums, int ignore_index) -> ()"""
    ),
    "adaptive_cross_entropy_sum_": (
        """(Tensor(a!) logits, Tensor labels, float temperature, float floor,
        int ignore_index, float scale) -> (Tensor total, Tensor losses, Tensor weights, Tensor normaliser)"""
    ),
    "adaptive_cross_entropy_scale_": "(Tensor(a!) gradient, Tensor factor) -> ()",
    "adaptive_mse": (
        """(Tensor prediction, Tensor target, float temperature, float floor, bool mean)
        -> (Tensor loss, Tensor losses, Tensor weights, Tensor log_normaliser)"""
    ),
    "adaptive_mse_backward": (
        "(Tensor grad, Tensor prediction, Tensor target, Tensor weights, bool mean) -> Tensor"
    ),
    "soft_target_kl": (
        """(Tensor logits, Tensor teacher_logits, Tensor? weights, float temperature)
        -> (Tensor loss, Tensor losses, Tensor log_sums)"""
    ),
    "soft_target_kl_backward": (
        """(Tensor grad, Tensor logits, Tensor teacher_logits, Tensor? weights,
        Tensor log_sums, float temperature) -> Tensor"""
    ),
}


def check_of(name: str) -> Callable[..., None]:
    """What is demanded of an op's arguments."""
    return getattr(row_checks, name, None) or getattr(arguments, name)


def default_kernel(name: str) -> Callable[..., Any]:
    """Checked reference kernel: what runs where no native kernel serves the device or the dtype."""
    formula, check = getattr(reference, name), check_of(name)
    names = list(inspect.signature(formula).parameters)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        _dense({**dict(zip(names, args, strict=False)), **kwargs})
        check(*args, **kwargs)
        native.warn_once()
        with torch.no_grad():  # like a native kernel; what autograd needs is registered below
            return formula(*args, **kwargs)

    return kernel


def _dense(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        for i, tensor in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(tensor, Tensor):
                where = f"{name}[{i}]" if tensor is not value else name
                require(tensor.layout == torch.strided, where, "a dense tensor", tensor.layout)


# --- fakes: shapes and dtypes for torch.compile ---------------------------------------------------


def _writes_in_place(*args: Any, **kwargs: Any) -> None:
    return None


def fake_kernel(name: str) -> Callable[..., Any]:
    """Shapes only; but a meta tensor beside real ones would come here and do nothing, in silence."""
    shapes = FAKES.get(name, _writes_in_place)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        arguments.one_device(*args, *kwargs.values())
        return shapes(*args, **kwargs)

    return kernel


def _norm_fake(
    grads: Sequence[Tensor], masks: Sequence[Tensor], grad_scale: Tensor | None
) -> Tensor:
    device = grads[0].device if grads else torch.device("cpu")
    return torch.empty((), dtype=torch.float32, device=device)


def _mask_fake(
    forget: Sequence[Tensor], retain: Sequence[Tensor], threshold: float, eps: float
) -> tuple[list[Tensor], Tensor]:
    device = forget[0].device if forget else torch.device("cpu")
    packed = [f.new_empty((f.numel() + 7) // 8, dtype=torch.uint8) for f in forget]
    return packed, torch.empty(len(forget), dtype=torch.int64, device=device)


def _sample_outputs(source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, losses, weights, log_normaliser"""
    dtype = reference.accumulate_dtype(source.dtype)
    per_sample = source.new_empty(source.shape[0], dtype=dtype)
    log_normaliser = source.new_empty((), dtype=torch.float64)
    return (
        source.new_empty((), dtype=dtype),
        per_sample,
        torch.empty_like(per_sample),
        log_normaliser,
    )


def _cross_entropy_fake(
    logits: Tensor, labels: Tensor, temperature: float, floor: float, ignore_index: int
) -> tuple[Tensor, ...]:
    log_sums = logits.new_empty(
        (2, *logits.shape[:2]), dtype=reference.accumulate_dtype(logits.dtype)
    )
    return *_sample_outputs(logits), log_sums


def _cross_entropy_sum_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    total, losses, weights, _ = _sample_outputs(logits)
    return total, losses, weights, torch.empty_like(total)


def _mse_fake(
    prediction: Tensor, target: Tensor, temperature: float, floor: float, mean: bool
) -> tuple[Tensor, ...]:
    return _sample_outputs(prediction)


def _kl_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    loss, losses, *_ = _sample_outputs(logits)
    return loss, losses, losses.new_empty((4, logits.shape[0]))


def _like_second(grad: Tensor, source: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(source, memory_format=torch.contiguous_format)


FAKES: dict[str, Callable[..., Any]] = {
    "masked_grad_norm": _norm_fake,
    "saliency_mask": _mask_fake,
    "adaptive_cross_entropy": _cross_entropy_fake,
    "adaptive_cross_entropy_backward": _like_second,
    "adaptive_cross_entropy_sum_": _cross_entropy_sum_fake,
    "adaptive_mse": _mse_fake,
    "adaptive_mse_backward": _like_second,
    "soft_target_kl": _kl_fake,
    "soft_target_kl_backward": _like_second,
}


# --- autograd: only the first output, the loss, has a gradient; the weights are detached (equations 4 and 5) ---


def _backward(name: str) -> Callable[..., Tensor]:
    """The op's gradient; with ``create_graph`` as operations that can be differentiated again."""
    return getattr(
        differentiable if torch.is_grad_enabled() else torch.ops.sfron_fast, f"{name}_backward"
    )


def _cross_entropy_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, _, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, labels, output[2], output[4])


def _cross_entropy_backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    gradient = _backward("adaptive_cross_entropy")(grad, *ctx.saved_tensors, ctx.ignore_index)
    return gradient, None, None, None, None


def _mse_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prediction, target, _, _, ctx.mean = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(prediction, target, output[2])


def _mse_backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    gradient = _backward("adaptive_mse")(grad, *ctx.saved_tensors, ctx.mean)
    return gradient, None, None, None, None


def _kl_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, teacher_logits, weights, ctx.temperature = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, teacher_logits, weights, output[2])


def _kl_backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    gradient = _backward("soft_target_kl")(grad, *ctx.saved_tensors, ctx.temperature)
    return gradient, None, None, None


TABLED: dict[str, Callable[..., Any]] = {}  # the overloads that take a table

for _name, _schema in SCHEMAS.items():
    _schema = " ".join(_schema.split())
    _library.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, default_kernel(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sfron_fast::{_name}", fake_kernel(_name), lib=_library)
    # the same with a table in place of its lists, native only: functional.py writes it,
    # csrc/common/records.h says why
    _table = re.sub(r"^\((Tensor(\(\w!\))?\[\] \w+,? ?)+", "(Tensor table, ", _schema)
    if _table != _schema:
        _library.define(f"{_name}.table{_table}")
        TABLED[_name] = getattr(torch.ops.sfron_fast, _name).table
torch.library.register_autograd(
    "sfron_fast::adaptive_cross_entropy",
    _cross_entropy_backward,
    setup_context=_cross_entropy_context,
    lib=_library,
)
torch.library.register_autograd(
    "sfron_fast::adaptive_mse", _mse_backward, setup_context=_mse_context, lib=_library
)
torch.library.register_autograd(
    "sfron_fast::soft_target_kl", _kl_backward, setup_context=_kl_context, lib=_library
)
for (
    _name
) in triton.MODULES:  # row ops: Triton itself is imported when the first CUDA tensor arrives
    _library.impl(_name, triton.op_kernel(_name, check_of(_name), default_kernel(_name)), "CUDA")

masked_grad_norm = torch.ops.sfron_fast.masked_grad_norm.default
sgd_step_ = torch.ops.sfron_fast.sgd_step_.default
adamw_step_ = torch.ops.sfron_fast.adamw_step_.default
interpolate_ = torch.ops.sfron_fast.interpolate_.default
fisher_accumulate_ = torch.ops.sfron_fast.fisher_accumulate_.default
saliency_mask = torch.ops.sfron_fast.saliency_mask.default
adaptive_cross_entropy = torch.ops.sfron_fast.adaptive_cross_entropy.default
adaptive_cross_entropy_backward_ = torch.ops.sfron_fast.adaptive_cross_entropy_backward_.default
adaptive_cross_entropy_sum_ = torch.ops.sfron_fast.adaptive_cross_entropy_sum_.default
adaptive_cross_entropy_scale_ = torch.ops.sfron_fast.adaptive_cross_entropy_scale_.default
adaptive_mse = torch.ops.sfron_fast.adaptive_mse.default
soft_target_kl = torch.ops.sfron_fast.soft_target_kl.default


def kernel_for(name: str, device: str) -> str:
    """Which kernel serves an op on a device type: "native", "triton", "reference"; "none" where
    torch
    lacks the device.

    A wheel holds its CUDA kernels also for a torch that is built without CUDA, and then none of
    them can ever run.
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if device == "cuda" and not torch.backends.cuda.is_built():
        return "none"
    if device == "cuda" and name in triton.MODULES:
        return "reference" if triton.reason(name) else "triton"
    native = torch._C._dispatch_has_kernel_for_dispatch_key(f"sfron_fast::{name}", key)
    return "native" if native else "reference"
