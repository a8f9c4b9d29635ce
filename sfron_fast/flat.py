"""Flat lists: one tensor that stands for many, one after another, each from a multiple of 64 elements.

The optimizers keep their state so. A call then passes one handle in place of thousands, which is what small
tensors cost; and a mask's bits start at a whole word.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import _native
from .layout import Orders, unordered

UNIT = 64


def flat_size(like: Sequence[Tensor]) -> int:
    """Elements of a flat list shaped like ``like``."""
    return sum(-(-t.numel() // UNIT) * UNIT for t in like)


def is_flat(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> bool:
    """Whether the one tensor given stands for all of ``like``."""
    return len(tensors) == 1 and len(like) > 1


def spread(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors of a flat list, as views shaped like ``like``; any other list as it is."""
    return list(_views(tensors[0], like)) if is_flat(tensors, like) else tensors


def spread_masks(masks: Sequence[Tensor], like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The packed masks of a flat list; any other list as it is."""
    if not is_flat(masks, like):
        return masks
    starts = _starts(like)
    return [masks[0][s // 8 : s // 8 + (t.numel() + 7) // 8] for s, t in zip(starts, like, strict=True)]


def spread_scalars(scalars: Sequence[Tensor], like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The scalars [] of a flat [tensors]; any other list as it is."""
    return scalars[0].unbind() if is_flat(scalars, like) else scalars


def flatten_masks(masks: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Packed masks as one flat list, uint8 [flat_size / 8]; a single one as it is."""
    if len(like) == 1:
        return masks[0]
    flat = masks[0].new_zeros(flat_size(like) // 8)
    for mask, target in zip(masks, spread_masks([flat], like), strict=True):
        target.copy_(mask)
    return flat


def _starts(like: Sequence[Tensor]) -> Iterator[int]:
    start = 0
    for t in like:
        yield start
        start += -(-t.numel() // UNIT) * UNIT


def _views(flat: Tensor, like: Sequence[Tensor], orders: Orders = ()) -> Iterator[Tensor]:
    for start, t, order in zip(_starts(like), like, orders or [None] * len(like), strict=True):
        yield unordered(flat[start : start + t.numel()], t.shape, order)


def zeroed(tensor: Tensor) -> Tensor:
    """``tensor``, just allocated, filled with zero; on Linux a large one on the CPU is given huge pages, if there are.

    Steps stream through it, and with pages of 4 KB the look-up of addresses holds them up. Torch's own allocations ask
    for huge pages only under ``THP_MEM_ALLOC_ENABLE=1``.
    """
    if not torch.compiler.is_compiling():
        _native.ask_huge_pages(tensor)
    return tensor.zero_()


def same(a: list[Any], b: list[Any]) -> bool:
    """As ``_native``'s, which torch.compile cannot see through."""
    return _native.same(a, b) if not torch.compiler.is_compiling() else len(a) == len(b) and all(map(is_, a, b))


def _same_values(dicts: list[dict[str, Any]], values: list[Any]) -> bool:
    plain = torch.compiler.is_compiling()
    return same(list(_native.all_values(dicts)), values) if plain else _native.same_values(dicts, values)


class FlatStates:
    """The states of one list of parameters, every key a flat list; the entries of the states are its views.

    An entry that somebody has replaced is taken over at the next step: ``serves`` compares all of them.
    """

    def __init__(self, params: list[Tensor], state: Mapping[Tensor, Any], orders: Orders) -> None:
        self.params, self.state, self.device, self.orders = list(params), state, params[0].device, orders
        self.states: list[dict[str, Any]] = []  # looked up when the first is needed: no need, no entry
        self.flats: dict[str, Tensor] = {}
        self._entries: dict[str, list[Tensor]] = {}
        self._seen: list[Any] = []  # every entry of every state, in order
        self._all: list[dict[str, Any]] = []  # every state of the optimizer, in order
        self._kinds = [(p.dtype, p.shape) for p in params]

    def serves(self, params: list[Tensor], state: Mapping[Tensor, Any], orders: Orders) -> bool:
        """Whether parameters and states are those it was made for; forgets flat lists whose entries were replaced."""
        if state is not self.state or not params or params[0].device != self.device or orders != self.orders:
            return False
        if not same(params, self.params) or (self.states and not self._same_states(state)):
            return False
        if not _same_values(self.states, self._seen):
            for key, entries in self._entries.items():
                if not all(state.get(key) is entry for state, entry in zip(self.states, entries, strict=True)):
                    del self.flats[key]
            self._entries = {key: self._entries[key] for key in self.flats}
            self._remember()
        return True

    def _same_states(self, state: Mapping[Tensor, Any]) -> bool:
        """Whether no parameter was given another dict; without a look-up per parameter, which hashes it."""
        states = list(state.values())
        if same(states, self._all):
            return True
        self._all = states
        return all(map(is_, map(state.get, self.params), self.states))

    def made(self, used: Iterable[str], kinds: list[tuple[torch.dtype, torch.Size]]) -> bool:
        """Whether the states ``used`` are all flat, moments of one dtype, and the parameters those they were made for.

        Parameters are then of the same ``kinds``: nothing about these states needs to be looked at again.
        """
        if kinds != self._kinds or not all(key in self.flats for key in used):
            return False
        return len({self.flats[key].dtype for key in used if "exp_avg" in key}) <= 1

    def get(self, key: str, dtype: torch.dtype, fill: Sequence[Tensor] | None = None) -> Tensor | None:
        """The flat list under ``key``; entries that are missing start as ``fill``, or as zero.

        None if it cannot be flat: an entry of another kind, dtype, shape or device than expected.
        """
        if key in self.flats:
            return self.flats[key]
        self.states = self.states or [self.state[p] for p in self.params]
        scalar = key.endswith("step")
        found = [state.get(key) for state in self.states]
        for entry, param in zip(found, self.params, strict=True):
            shape = torch.Size() if scalar else param.shape
            if entry is None:
                continue
            if type(entry) is not Tensor or (entry.dtype, entry.shape, entry.device) != (dtype, shape, self.device):
                return None
        size = len(self.params) if scalar else flat_size(self.params)
        flat = zeroed(torch.empty(size, dtype=dtype, device=self.device))
        entries = list(flat.unbind() if scalar else _views(flat, self.params, self.orders))
        for i, (state, entry, old) in enumerate(zip(self.states, entries, found, strict=True)):
            if old is not None:
                entry.copy_(old)
            elif fill is not None:
                entry.copy_(fill[i])
            state[key] = entry
        self.flats[key], self._entries[key] = flat, entries
        self._remember()
        return flat

    def _remember(self) -> None:
        self._seen, self._all = list(_native.all_values(self.states)), list(self.state.values())
