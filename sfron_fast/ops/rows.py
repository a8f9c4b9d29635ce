"""What the losses over rows share: outputs for torch.compile, and derivatives by torch itself.

First derivatives come from the kernels. In fp64, which has no kernels, for second derivatives of
any dtype (``create_graph=True``), and inside ``torch.func`` and forward mode, which look into every
operation, the loss is made of operations that torch differentiates. The weights are constants in
all of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import registry
from .dtypes import accumulate_dtype, only_reference


def transformed() -> bool:
    """True inside a transform of ``torch.func``, eager or compiled."""
    functorch = torch._C._functorch
    # to Dynamo None is not None
    return isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter)


def torch_looks_inside() -> bool:
    """True where torch differentiates by rules of its own: inside ``torch.func``, and where dual
    numbers may occur.
    """
    return transformed() or forward_ad._current_level >= 0


def has_node(source: Tensor) -> bool:
    """Whether an op differentiates by a node of its own: in eager mode, where a kernel serves and
    nothing looks inside.
    """
    plain = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return plain and not (only_reference(source.dtype) or torch_looks_inside())


def kernel(name: str, differentiable: Any, source: Tensor) -> Any:
    """The op of that name; ``differentiable`` where no kernel serves, or torch looks inside."""
    if has_node(source):
        return registry.node(name)
    own = only_reference(source.dtype) or torch_looks_inside()
    return differentiable if own else registry.op(name)


def gradient_kernel(name: str, differentiable: Any) -> Any:
    """The op of a first derivative; ``differentiable`` where it will be derived again."""
    return differentiable if torch.is_grad_enabled() else registry.op(name)


def in_place_kernel(name: str, dtype: torch.dtype) -> Any:
    """The op; its checked reference where no kernel serves."""
    return registry.default_kernel(name) if only_reference(dtype) else registry.op(name)


def row_shift(x: Tensor) -> Tensor:
    """The maximum over the last dimension, which log-sum-exps subtract; 0 where it is infinite, as
    inf - inf is NaN.
    """
    maximum = x.detach().amax(dim=-1)
    return torch.where(maximum.isinf(), 0.0, maximum)


def sample_outputs(source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, losses, weights, log_normaliser"""
    dtype = accumulate_dtype(source.dtype)
    per_sample = source.new_empty(source.shape[0], dtype=dtype)
    log_normaliser = source.new_empty((), dtype=torch.float64)
    return (
        source.new_empty((), dtype=dtype),
        per_sample,
        torch.empty_like(per_sample),
        log_normaliser,
    )


def like_second(grad: Tensor, source: Tensor, *rest: Any) -> Tensor:
    """The fake of a gradient, for torch.compile."""
    return torch.empty_like(source, memory_format=torch.contiguous_format)


def constant_weights(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of a weighted loss, of which only the loss has a gradient."""
    _, losses, *others = outputs
    weights, *others = (t.detach() for t in others)
    return (weights * losses).sum(), losses.detach(), weights, *others


def gradient_of(loss: Tensor, source: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``grad * loss``, which can be differentiated again."""
    return torch.autograd.grad(loss, source, grad.reshape(()), create_graph=True)[0]
