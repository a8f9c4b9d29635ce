"""Registers an op: schema, default kernel, fake, autograd, and the overload that takes a table.

Every op has a file of its own here, named as its folder in ``csrc``, which calls ``define``.
Importing this module also loads the native kernels, which register themselves for their device in
front of the defaults; the dispatcher, not this package, chooses. Lists: an empty list means
"absent"; a flat one (``lists.py``) stands for many tensors; a mask of zero bytes means "every
weight of this tensor is selected". Ops that end in ``_`` write their (x!) arguments in place and
return none of them. Bad input raises before any write.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import require
from . import native, triton
from .arguments import one_device

native.load()  # first: if it raises, nothing is registered yet and the import can be tried again


def _learn_keys() -> None:
    plain = torch.empty(1, device="cpu")
    negated = torch._neg_view(plain)
    keys = [torch._C._dispatch_keys(t).raw_repr() for t in (plain, negated)]
    native.learn_keys(plain, keys[0], negated, keys[1])


_learn_keys()
_library = torch.library.Library("sfron_fast", "DEF")
_LISTS = re.compile(r"^\((Tensor(\(\w!\))?\[\] \w+,? ?)+")
_WRITTEN_LIST = re.compile(r"Tensor\(\w!\)\[\] (\w+)")


class Op(NamedTuple):
    """What one file tells of its op."""

    formula: Callable[..., Any]
    check: Callable[..., None]
    written: tuple[str, ...]  # names of the lists it writes to
    table: Any  # the overload that takes a table in place of the lists; None without lists


SCHEMAS: dict[str, str] = {}
_ops: dict[str, Op] = {}
_nodes: dict[str, type[torch.autograd.Function]] = {}


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The fake of an op that writes in place."""


def define(
    name: str,
    schema: str,
    formula: Callable[..., Any],
    check: Callable[..., None],
    *,
    fake: Callable[..., Any] = _nothing,
    backward: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> None:
    """Register ``sfron_fast::name``.

    Args:
        formula: plain PyTorch on the op's arguments: the truth, and the kernel of last resort.
        check: on the same arguments; raises before anything is written.
        fake: on the same arguments; empty outputs, for torch.compile.
        backward: (setup_context, backward) of ``torch.library.register_autograd``.
    """
    SCHEMAS[name] = schema
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    table = None
    if _LISTS.match(schema):
        # native only: tables.py writes it, csrc/host/table.h says why
        _library.define(f"{name}.table{_LISTS.sub('(Tensor table, ', schema)}")
        table = getattr(torch.ops.sfron_fast, name).table
    _ops[name] = Op(formula, check, tuple(_WRITTEN_LIST.findall(schema)), table)
    _serve(name, default_kernel(name), fake, backward)
    if name in triton.MODULES:  # Triton itself is imported when the first CUDA tensor arrives
        on_cuda = triton.op_kernel(name, check, default_kernel(name))
        _library.impl(name, on_cuda, "CUDA")


def compose(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    check: Callable[..., None],
    *,
    fake: Callable[..., Any],
    backward: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> None:
    """Register an op that is made of torch's matrix products and of other ops, on every device.

    It has no kernel of its own, so none can be missing; its truth is a function in plain PyTorch
    that torch differentiates. Arguments as of ``define``.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def checked(*args: Any) -> Any:
        check(*args)
        with torch.no_grad():
            return kernel(*args)

    _serve(name, checked, fake, backward)


def _serve(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: tuple[Callable[..., None], Callable[..., Any]] | None,
) -> None:
    """What an op defined does on every device, for torch.compile, and in a backward pass."""
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sfron_fast::{name}", _fake_kernel(fake), lib=_library)
    if backward is not None:
        setup_context, gradient = backward
        torch.library.register_autograd(
            f"sfron_fast::{name}", gradient, setup_context=setup_context, lib=_library
        )
        _nodes[name] = _node(op(name), setup_context, gradient)


def _node(
    kernel: Any, setup_context: Callable[..., None], gradient: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """What the dispatcher's own way to a derivative does, in half of its time: it wraps, unwraps
    and completes the arguments at every call.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    return type(f"{kernel.name()}_node", (torch.autograd.Function,), members)


def op(name: str) -> Any:
    """The op as the dispatcher serves it."""
    return getattr(torch.ops.sfron_fast, name).default


def node(name: str) -> Any:
    """The op with the node that differentiates it, for eager mode."""
    return _nodes[name].apply


def described(name: str) -> Op:
    """What its file tells of an op."""
    return _ops[name]


def check_of(name: str) -> Callable[..., None]:
    """What is demanded of an op's arguments."""
    return _ops[name].check


def default_kernel(name: str) -> Callable[..., Any]:
    """Checked reference kernel: what runs where no native kernel serves the device or the dtype."""
    formula, check = _ops[name].formula, _ops[name].check
    names = list(inspect.signature(formula).parameters)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        _dense({**dict(zip(names, args, strict=False)), **kwargs})
        check(*args, **kwargs)
        native.warn_once()
        with torch.no_grad():  # like a native kernel; what autograd needs is registered above
            return formula(*args, **kwargs)

    return kernel


def _dense(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        for i, tensor in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(tensor, Tensor):
                where = f"{name}[{i}]" if tensor is not value else name
                require(tensor.layout == torch.strided, where, "a dense tensor", tensor.layout)


def _fake_kernel(shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Shapes only; a meta tensor beside real ones would come here and do nothing, in silence."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        one_device(*args, *kwargs.values())
        return shapes(*args, **kwargs)

    return kernel


def kernel_for(name: str, device: str) -> str:
    """Which kernel serves an op on a device type: "native", "triton", "reference"; "none" where
    torch lacks the device.

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
