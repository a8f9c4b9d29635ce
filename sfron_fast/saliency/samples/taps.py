"""A model run so that the gradient of every known function's output passes by, beside its inputs.

Parameters are detached, so autograd makes no gradient of theirs; what is saved is what autograd
would have saved for it, and through its own means, so that gradient checkpointing drops it too.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import open_attention
from .known import KNOWN
from .layouts import SPREAD
from .uses import Use

# a parameter in another dtype or shape, or with a number added, has the parameter's gradient
_SAME = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as, torch.Tensor.contiguous}
_SHAPED = {torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.unsqueeze}
_SUMS = {torch.add, torch.Tensor.add}
_TRANSPOSED = {torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
_CHOOSING = {torch.nonzero, torch.Tensor.nonzero, torch.masked_select, torch.Tensor.masked_select}

Entry = tuple[Tensor, str, bool]  # a tensor, the parameter it is, whether transposed


class Sink(Protocol):
    """Where calls, and later their gradients, are told."""

    layouts: dict[str, str]

    def call(self, name: str, use: Use, samples: int) -> None:
        """A known call, in the forward pass."""

    def left(self, name: str, function: Any) -> None:
        """A call of an unknown function, which will run without the parameter's gradient."""

    def take(
        self, name: str, use: Use, delta: Tensor, saved: tuple[Tensor, ...], samples: int
    ) -> None:
        """The gradient of a call's output, in the backward pass, and what the use has saved."""


class _Tap(torch.autograd.Function):
    """The output itself; its gradient is shown to the sink on its way back."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, anchor: Tensor, tell: Callable[..., None], *saved: Tensor
    ) -> Tensor:
        ctx.tell = tell
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(out)  # not a view: the model may go on in place
        return out

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # with the mode on, for what a checkpoint runs again
        # our own arithmetic is nothing for a mode to see, and none for autocast to round
        with torch._C.DisableTorchFunction(), torch._C._DisableAutocast():
            ctx.tell(delta, saved)
        return (
            delta if ctx.needs_input_grad[0] else None,
            *(None for _ in ctx.needs_input_grad[1:]),
        )


class Taps(TorchFunctionMode):
    """Inside, a function that gets a trainable parameter runs without its gradient, tapped."""

    def __init__(self, model: nn.Module, names: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        # by identity; kept alive, so that no other tensor gets the number
        self.by_id: dict[int, Entry] = {id(p): (p, n, False) for n, p in names.items()}
        self.derived: dict[int, Entry] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        self.sink: Any = None
        self.samples = 0
        self.chosen = False  # whether rows were, by their values

    @contextmanager
    def telling(self, sink: Sink, samples: int) -> Iterator[None]:
        """One forward and backward over a batch of ``samples``, told to ``sink``."""
        self.sink, self.samples, self.chosen = sink, samples, False
        before = {name: p.grad for name, p in self.names.items()}
        for p in self.names.values():
            p.grad = None
        try:
            with _eagerly(), self:
                yield
            for name, p in self.names.items():
                if p.grad is not None:  # no call of a torch function had it, and detached it
                    sink.left(name, "a function that torch shows to no mode")
        finally:
            self.sink = None
            self.derived.clear()
            for name, p in self.names.items():
                p.grad = before[name]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of ``func``."""
        kwargs = kwargs or {}
        found = self._found([*args, *kwargs.values()])
        if not found:
            self.chosen = self.chosen or _chooses(func, args)
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:  # its projections are linear layers
                return open_attention()(*args, **kwargs)
        bare = {key: tensor.detach() for key, (tensor, _, _) in found.items()}
        told = self._told(func, args, kwargs, found)
        unknown = found.keys() - {id(use.parameter) for _, use in told}
        if unknown and len(found) == 1 and _same(func, args, kwargs, *found.values()):
            out = func(*args, **kwargs)  # with its gradient, should a mode not see what uses it
            ((_, name, transposed),) = found.values()
            self.derived[id(out)] = (out, name, transposed != (func in _TRANSPOSED))
            return out
        if unknown:
            if not _in_place(func, kwargs) or id(next(iter(args), None)) in found:
                out = func(*args, **kwargs)
                if not any(t.requires_grad for t in _tensors([out])):
                    return out  # a dtype, a shape
            for key in unknown if torch.is_grad_enabled() else ():
                self.sink.left(found[key][1], func)
        out = func(*_put(args, bare), **{k: _put((v,), bare)[0] for k, v in kwargs.items()})
        if not told:
            return out
        if isinstance(out, tuple):  # rows of several numbers
            return self._tapped(torch.stack(out, 1), told).unbind(1)
        return self._tapped(out, told)

    def _told(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, found: dict[int, Entry]
    ) -> list[tuple[str, Use]]:
        """What a known function does with the parameters that are not left to others."""
        told = []
        for use in _uses(func, args, kwargs) if func in KNOWN else []:
            tensor, name, transposed = found.get(id(use.parameter), (None, "", False))
            if tensor is None or name not in self.sink.layouts:
                continue
            shape = tuple(self.names[name].shape)
            fits = not transposed
            if use.kind != "vector":  # its rows are those of the parameter itself
                fits = tuple(tensor.shape) == (shape[::-1] if transposed else shape)
            if not fits or (transposed and use.kind == "rows"):
                continue
            told.append((name, replace(use, read=_swapped(use.read)) if transposed else use))
        return told

    def _tapped(self, out: Tensor, told: list[tuple[str, Use]]) -> Tensor:
        samples, sink = self.samples, self.sink
        for name, use in told:
            sink.call(name, use, samples)
            if self._by_chance(out, sink.layouts[name]):
                sink.left(name, "rows that their values choose")
            if sink.layouts[name] == SPREAD:
                out = _for_each(out, use.saved[0].dim(), samples)
        if not torch.is_grad_enabled():
            return out
        saved = [t for _, use in told for t in use.saved]

        def tell(delta: Tensor, kept: tuple[Tensor, ...]) -> None:
            left = iter(kept)
            for name, use in told:
                sink.take(name, use, delta, tuple(islice(left, len(use.saved))), samples)

        out = out.clone() if out._is_view() else out
        return _Tap.apply(out, self.anchor, tell, *(t.detach() for t in saved))

    def _by_chance(self, out: Tensor, layout: str) -> bool:
        """Whether a sample has as many rows as another only where their values agree."""
        forward = torch._C._current_graph_task_id() < 0  # a checkpoint's second run says no more
        return self.chosen and forward and layout != SPREAD and out.shape[:1] != (self.samples,)

    def _found(self, values: list[Any]) -> dict[int, Entry]:
        """The trainable parameters, and what derives from them, among a call's arguments."""
        found, recorded = {}, torch.is_grad_enabled()
        for tensor in _tensors(values):
            entry = self.by_id.get(id(tensor))
            if entry is None and id(tensor) in self.derived:
                connected = tensor.grad_fn is not None or not recorded
                entry = self.derived[id(tensor)] if connected else None
            if entry is None and type(tensor) is nn.Parameter and tensor.requires_grad:
                entry = self._gathered(tensor)
            if entry is not None:
                found[id(tensor)] = entry
        return found

    def _gathered(self, tensor: Tensor) -> Entry | None:
        """``fully_shard`` puts whole parameters in the place of its shards while a layer runs."""
        for name, parameter in self.model.named_parameters():
            if parameter is tensor and name in self.names:
                self.by_id[id(tensor)] = (tensor, name, False)
                return self.by_id[id(tensor)]
        return None


def backward(loss: Tensor, again: bool = False) -> None:
    """``loss.backward(retain_graph=again)``, but that the mode stays on, for what a checkpoint runs
    a second time: torch hands the call itself to the mode, and takes it off meanwhile.
    """
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), again, False, (), True, True)


def _eagerly() -> Any:
    """What torch.compile has made of a model's parts is passed by: it holds no functions to see."""
    loaded = "torch._dynamo" in sys.modules  # else nothing is compiled
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _in_place(func: Any, kwargs: Any) -> bool:
    """Whether the function writes to an argument: to try it out would be to do it twice."""
    name = getattr(func, "__name__", "")
    trailing = name.endswith("_") and not name.endswith("__")
    return trailing or name == "__setitem__" or name.startswith("__i") or "out" in kwargs


def _chooses(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether values say how many rows there are: as many of one sample as of another by chance."""
    if func is torch.Tensor.__getitem__:
        return any(t.dtype is torch.bool for t in _tensors([args[1]]))
    return func in _CHOOSING or (func is torch.where and len(args) == 1)


def _swapped(read: Callable[..., Any]) -> Callable[..., Any]:
    """The product for the transposed parameter."""

    def swapped(*arguments: Any) -> tuple[Tensor, Tensor]:
        deltas, inputs = read(*arguments)
        return inputs, deltas

    return swapped


def _same(func: Any, args: tuple[Any, ...], kwargs: Any, entry: Entry) -> bool:
    """Whether what the function makes of the parameter has the parameter's gradient."""
    tensor, _, transposed = entry
    if func in _SUMS:
        return len(args) == 2 and not kwargs and any(isinstance(a, (int, float)) for a in args)
    if not args or args[0] is not tensor:  # an input that is given the parameter's dtype
        return False
    if func in _TRANSPOSED:
        return tensor.dim() == 2
    return func in _SAME or (func in _SHAPED and not transposed)


def _uses(func: Any, args: tuple[Any, ...], kwargs: Any) -> list[Use]:
    try:
        return KNOWN[func](*args, **kwargs)
    except (TypeError, AttributeError):  # arguments of another form than is known here
        return []


def _for_each(out: Tensor, dims: int, samples: int) -> Tensor:
    """The rows of ids [n] or [1, n], which all samples share, one copy for each."""
    shared = out if dims > 1 else out.unsqueeze(0)
    return shared.expand(samples, *shared.shape[1:]).clone()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _put(values: Any, bare: dict[int, Tensor]) -> Any:
    """The same nest with detached parameters."""
    kind = list if isinstance(values, list) else tuple
    return kind(
        bare.get(id(v), v)
        if isinstance(v, Tensor)
        else _put(v, bare)
        if type(v) in (tuple, list)
        else v
        for v in values
    )
