"""Steps like the one before: the same ops on the same settings, state and masks, with what may be
new looked at again.

A step prepares its ops anew: it reads the settings, finds masks and state, checks all. On small
models that takes longer than the ops. So what the ops were called with is kept, beside the very
objects it was made of; while a look finds them again, it is good. Only learning rates, gradients
and the parameters' memory may have changed. Whatever else differs, the step is prepared anew, which
also refuses what is to be refused.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import calls, native, tables
from .batch import Batch
from .elsewhere import is_away
from .scalars import capturing
from .state import StatefulOptimizer

FIXED = {float, int, bool, str, type(None), torch.dtype}  # what cannot be changed where it is
RATES = ("lr", "forget_lr")


class Part(NamedTuple):
    """One op, and its arguments but for what is new in every step."""

    op: Any
    lists: tuple[Any, ...]  # of the tables of parameters and gradients, and of other tensors
    table: Tensor
    rest: list[Any]  # arguments that are no lists, behind the norm
    scalars: dict[str, Any]
    batch: int | None  # whose weights it steps; of the norm none


class Memory:
    """The objects that a step was made of."""

    def __init__(self, optimizer: StatefulOptimizer) -> None:
        self.settings = [list(group.values()) for group in optimizer.param_groups]
        states = list(optimizer.state.values())
        # torch lets anything lie there; of what is no dict nothing is remembered, nor found again
        self.known = {dict}.issuperset(map(type, states))
        self.entries = list(native.all_values(states)) if self.known else []

    def holds(self, optimizer: StatefulOptimizer) -> bool:
        """Whether they are all there, and no more; learning rates may be other good numbers."""
        groups = optimizer.param_groups
        if len(groups) != len(self.settings) or not self.known:
            return False
        for group, seen in zip(groups, self.settings, strict=True):
            for place, name in enumerate(group):
                if name in RATES:
                    rate = group[name]
                    if type(rate) is float and 0.0 <= rate < float("inf"):
                        seen[place] = rate
            if not native.same_values([group], seen):
                return False
        return native.same_values(list(optimizer.state.values()), self.entries)


class Replay:
    """The ops of a step that found all it needed, and what it found."""

    def __init__(
        self, memory: Memory, batches: list[Batch], masks: list[Any], parts: list[Part]
    ) -> None:
        self.memory, self.masks, self.parts = memory, masks, parts
        self.params = [list(batch.params) for batch in batches]
        self.kinds = [batch.params.table.clone() for batch in batches]  # type: ignore[attr-defined]
        self.devices = [batch.params[0].device for batch in batches]
        self.measured = parts[0].batch is None
        self.tables = [part.lists[:2] for part in parts if part.batch is not None]

    def run(self, optimizer: StatefulOptimizer, *, forget: bool) -> bool:
        """Do the step, if it is still good."""
        if not self.memory.holds(optimizer) or tables.watched():
            return False
        for index, group in enumerate(optimizer.param_groups):
            mask = self.masks[index]
            if mask is not None and not mask.current(optimizer.saliency):
                return False
            names, before = group.get("param_names"), (self.params[index], self.kinds[index])
            if names is not None and len(names) != len(group["params"]):
                return False
            if native.gather(group["params"], self.tables[index], *before) is None:
                return False
        for part in self.parts:
            if native.describe(part.table, part.lists) != native.BY_TABLE:
                return False
        return self._call(optimizer, forget=forget)

    def _call(self, optimizer: StatefulOptimizer, *, forget: bool) -> bool:
        norm = None
        for part in self.parts:
            rest, scalars = part.rest, part.scalars
            if part.batch is not None:
                group = optimizer.param_groups[part.batch]
                own = forget and group["forget_lr"] is not None
                scalars = {**scalars, "lr": group["forget_lr" if own else "lr"]}
                rest = [norm, *rest]
            try:
                result = part.op(part.table, *rest, **scalars)
            except (ValueError, RuntimeError):
                if part.batch:  # others have been stepped
                    raise
                return False  # prepared anew, it is refused with the remedy
            if part.batch is None:
                norm = result
            else:
                torch.autograd.graph.increment_version(self.params[part.batch])
        if self.measured:
            optimizer._noted["grad_norm"] = norm
            optimizer._skips.watch(self.devices[0])
        return True


def step(
    optimizer: StatefulOptimizer, body: Callable[[], list[Batch]], *, forget: bool, clipped: bool
) -> None:
    """A step: the one before again, or else ``body``, which prepares it."""
    if torch.compiler.is_compiling():
        body()
        return
    pending = optimizer.param_groups[0]["retain_pending"]
    known, key = optimizer._replays, (forget, pending)
    last = known.get(key)
    if last is not None and not _disturbed(optimizer, last) and last.run(optimizer, forget=forget):
        return
    known.pop(key, None)
    before = Memory(optimizer)
    made: list[calls.Call] = []
    with calls.recorded(made):
        batches = body()
    if before.holds(optimizer) and not _disturbed(optimizer, None):
        replay = _replay(optimizer, before, batches, made, forget=forget, clipped=clipped)
        if replay is not None:
            known[key] = replay


def _disturbed(optimizer: StatefulOptimizer, replay: Replay | None) -> bool:
    """Whether something else has a part in the step."""
    scaled = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    captured = replay is not None and any(map(capturing, replay.devices))
    return scaled or captured or bool(optimizer._in_backward)


def _replay(
    optimizer: StatefulOptimizer,
    memory: Memory,
    batches: list[Batch],
    made: list[calls.Call],
    *,
    forget: bool,
    clipped: bool,
) -> Replay | None:
    """None unless nothing in the step was made for it alone."""
    groups = optimizer.param_groups
    own = type(optimizer).__module__.partition(".")[0] == __name__.partition(".")[0]
    whole = len(batches) == len(groups) and all(
        b.group is g and type(b.params) is native.Tabled
        for b, g in zip(batches, groups, strict=False)
    )
    if not own or not whole or len(made) != len(batches) + clipped:
        return None
    if any(map(is_away, batches)):
        return None  # slow weights are copied by no op
    if len(batches) > 1 and any(b.flat is None for b in batches):
        return None  # what the second op refuses must be found before the first
    for group in groups:
        for name, value in group.items():
            several = value if type(value) is tuple else (value,)
            if name not in ("params", "param_names") and not FIXED.issuperset(map(type, several)):
                return None
    masks = [optimizer._masks.get(i) if forget else None for i in range(len(groups))]
    kept = {id(t) for t in memory.entries}
    for batch in batches:
        kept |= {id(t) for t in (batch.flat.flats.values() if batch.flat is not None else ())}
    for mask in masks:
        kept |= {id(t) for t in ([*mask.masks, mask.flat] if mask is not None else ())}
    counter = optimizer._skips.counter(batches[0].params[0].device)
    norm = made[0].result if clipped else None
    for number, call in enumerate(made, -int(clipped)):
        for name, tensors in call.lists.items():
            found = name in ("params", "grads")
            if not found and not all(id(t) in kept or t.numel() == 0 for t in tensors):
                return None
        steps = number >= 0
        skipped = call.scalars.get("skipped")
        loose = [t for t in (*call.rest[steps:], call.scalars.get("numbers")) if t is not None]
        loose += [t for t in call.rest[:steps] if t is not norm]
        if loose or not (skipped is None or skipped is counter):
            return None
    parts = [_part(call, index) for index, call in enumerate(made[clipped:])]
    if clipped:
        parts.insert(0, _part(made[0], None, tuple(part.lists[1] for part in parts)))
    return Replay(memory, batches, masks, parts)


def _part(call: calls.Call, batch: int | None, grads: tuple[Tensor, ...] = ()) -> Part:
    """Of a step, in whose table parameters and gradients come first; or of the norm, with the
    tables of all ``grads``.
    """
    lists: list[Any] = [list(tensors) for tensors in call.lists.values()]
    words = native.ROW_WORDS * len(lists[0])
    table = torch.zeros(native.table_words(tuple(lists)), dtype=torch.int64, device="cpu")
    if batch is None:
        lists[0] = grads
    else:
        lists[:2] = table[len(lists) : len(lists) + 2 * words].view(2, words).unbind()
    rest = list(call.rest[batch is not None :])
    return Part(call.op, tuple(lists), table, rest, call.scalars, batch)
