"""The optimizers' state as flat lists: one handle for the entries of thousands of parameters."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..ops import native
from ..ops.layout import Orders
from ..ops.lists import flat_size, views, zeroed
from .state_kind import StateKind


def same(a: list[Any], b: list[Any]) -> bool:
    """As ``_native``'s, which torch.compile cannot see through."""
    return (
        native.same(a, b)
        if not torch.compiler.is_compiling()
        else len(a) == len(b) and all(map(is_, a, b))
    )


def _same_values(dicts: list[dict[str, Any]], values: list[Any]) -> bool:
    plain = torch.compiler.is_compiling()
    return (
        same(list(native.all_values(dicts)), values) if plain else native.same_values(dicts, values)
    )


class FlatStates:
    """The states of one list of parameters, every key a flat list, of which the entries are views.

    An entry that somebody has replaced is taken over at the next step: ``serves`` compares all of
    them.
    """

    def __init__(self, params: list[Tensor], state: Mapping[Tensor, Any], orders: Orders) -> None:
        self.params = list(params)
        self.state = state
        self.device = params[0].device
        self.orders = orders
        # looked up when the first is needed: no need, no entry
        self.states: list[dict[str, Any]] = []
        self.flats: dict[str, Tensor] = {}
        self._entries: dict[str, list[Tensor]] = {}
        self._seen: list[Any] = []  # every entry of every state, in order
        self._all: list[dict[str, Any]] = []  # every state of the optimizer, in order
        self._kinds = [(p.dtype, p.shape) for p in params]

    def serves(self, params: list[Tensor], state: Mapping[Tensor, Any], orders: Orders) -> bool:
        """Whether parameters and states are those it was made for; forgets flat lists whose entries
        were replaced.
        """
        if (
            state is not self.state
            or not params
            or params[0].device != self.device
            or orders != self.orders
        ):
            return False
        if not same(params, self.params) or (self.states and not self._same_states(state)):
            return False
        if not _same_values(self.states, self._seen):
            for key, entries in self._entries.items():
                if not all(
                    state.get(key) is entry
                    for state, entry in zip(self.states, entries, strict=True)
                ):
                    del self.flats[key]
            self._entries = {key: self._entries[key] for key in self.flats}
            self._remember()
        return True

    def _same_states(self, state: Mapping[Tensor, Any]) -> bool:
        """Whether no parameter was given another dict; without a look-up per parameter, which
        hashes it.
        """
        states = list(state.values())
        if same(states, self._all):
            return True
        self._all = states
        return all(map(is_, map(state.get, self.params), self.states))

    def made(
        self, used: Mapping[str, StateKind], kinds: list[tuple[torch.dtype, torch.Size]]
    ) -> bool:
        """Whether the states ``used`` are all flat, moments of one dtype, and the parameters those
        they were made for.

        Parameters are then of the same ``kinds``: nothing about these states needs to be looked at
        again.
        """
        if kinds != self._kinds or not all(key in self.flats for key in used):
            return False
        moments = [key for key, kind in used.items() if kind.role == "moment"]
        return len({self.flats[key].dtype for key in moments}) <= 1

    def get(self, key: str, kind: StateKind, fill: Sequence[Tensor] | None = None) -> Tensor | None:
        """The flat list under ``key``; entries that are missing start as ``fill``, or as zero.

        None if it cannot be flat: an entry of another type, dtype, shape or device than expected;
        moments of which some are codes.
        """
        if key in self.flats:
            return self.flats[key]
        self.states = self.states or [self.state[p] for p in self.params]
        scalar, dtypes = kind.role == "count", {kind.dtype_of(p) for p in self.params}
        if len(dtypes) > 1:
            return None
        (dtype,) = dtypes
        found = [state.get(key) for state in self.states]
        for entry, param in zip(found, self.params, strict=True):
            shape = torch.Size() if scalar else param.shape
            if entry is None:
                continue
            if type(entry) is not Tensor or (entry.dtype, entry.shape, entry.device) != (
                dtype,
                shape,
                self.device,
            ):
                return None
        size = len(self.params) if scalar else flat_size(self.params)
        flat = zeroed(torch.empty(size, dtype=dtype, device=self.device))
        entries = list(flat.unbind() if scalar else views(flat, self.params, self.orders))
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
        self._seen, self._all = list(native.all_values(self.states)), list(self.state.values())
