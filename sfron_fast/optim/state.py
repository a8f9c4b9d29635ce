"""What the optimizers hold: a state for each parameter, made when it is first needed; a mask;
counts; and what they remember from step to step to be fast.

An optimizer is put together in four floors: this one, its parameter groups (``groups``), what is
saved and loaded (``saved``), the phases of a cycle (``base``); ``sgd`` and ``adamw`` add a rule.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..errors import require
from ..ops.layout import ordered
from ..saliency.mask import SaliencyMask
from .amp import ForgetView
from .batch import Batch
from .flat_state import FlatStates
from .masks import GroupMask, check_saliency
from .scalars import moves_slowly
from .skips import Skips
from .state_kind import (
    COUNT,
    FORGET,
    StateKind,
    correction_kind,
    has_counts,
    is_coded,
    prefix,
    slow_kinds,
    zero_state,
)
from .validation import check_dtypes


class StatefulOptimizer(Optimizer):
    """State, mask and counts; a subclass declares its kinds of state."""

    grad_scale: Tensor | None  # torch.amp's, if set: gradients are divided by it
    found_inf: Tensor | None  # torch.amp's, if set: not 0 = skip the update, on the device
    forget: ForgetView
    stock: Any  # torch's optimizer class of the same rule
    checked_settings: list[list[Any]]  # every group's, when ``check_step`` last found them good
    _saliency: SaliencyMask | None
    _skips: Skips
    _masks: dict[int, GroupMask]
    _flat: dict[int, FlatStates]
    _replays: dict[
        tuple[bool, int], Any
    ]  # of a forget step, and of retain steps by what is pending
    _tables: dict[int, Tensor]  # where each group's tensors were in the last step
    # What a step leaves behind lies in containers: compiled by torch 2.11, it cannot set the
    # optimizer's attributes.
    _in_backward: set[Tensor]  # whose next step ``step_in_backward`` has done
    _noted: dict[str, Any]
    _lanes: dict[torch.device, Any]  # to slow weights that are away (``elsewhere``)

    def _remember_nothing(self) -> None:
        """As after the constructor: whatever is not saved starts anew."""
        self._skips = Skips()
        self._masks, self._flat, self._tables, self._replays = {}, {}, {}, {}
        self._noted, self._in_backward, self.checked_settings = {}, set(), []
        self._lanes = {}
        self.forget = ForgetView(self)

    @property
    def mid_cycle(self) -> bool:
        """True between a forget step and the retain step that closes its cycle."""
        return any(group["retain_pending"] for group in self.param_groups)

    @property
    def mid_step(self) -> bool:
        """True between ``step_in_backward`` and the ``step()`` that closes it."""
        return bool(self._in_backward)

    @property
    def grad_norm(self) -> Tensor | None:
        """[], of the last step that measured it; on the device."""
        return self._noted.get("grad_norm")

    @property
    def _opt_called(self) -> bool:
        """Torch's: whether there was a step, which a schedule asks."""
        return self._noted.get("called", False)

    @_opt_called.setter
    def _opt_called(self, called: bool) -> None:
        self._noted["called"] = called

    @property
    def saliency(self) -> SaliencyMask | None:
        """Which weights a forget step changes; another mask, and an edit of this one, count from
        the next one on.
        """
        return self._saliency

    @saliency.setter
    def saliency(self, mask: SaliencyMask | None) -> None:
        check_saliency(mask)
        heeded = (
            mask is None
            or self._saliency is not None
            or any(group["masked"] for group in self.param_groups)
        )
        require(
            heeded,
            "saliency",
            "None: no group of this optimizer is masked",
            "a SaliencyMask",
            "make an optimizer with saliency=mask, or set masked=True in the groups it is for",
        )
        self._saliency = mask

    @property
    def skipped_steps(self) -> int:
        """Updates skipped so far: a measured norm was not finite, or ``found_inf`` said so.

        Reads the device.
        """
        self.param_groups[0]["skipped"] += self._skips.take()
        return self.param_groups[0]["skipped"]

    def check_groups(self) -> None:
        """Raise ValueError or RuntimeError unless the settings are good, as they are now."""
        raise NotImplementedError

    # --- state ------------------------------------------------------------------------------------

    def state_kinds(self, group: dict[str, Any]) -> dict[str, StateKind]:
        """The states the rule keeps for a parameter."""
        raise NotImplementedError

    def known_kinds(self, group: dict[str, Any]) -> dict[str, StateKind]:
        """Those, the same for forget steps alone, and slow weights: all that may be there."""
        kinds = self.state_kinds(group)
        kinds = {
            **kinds,
            **{FORGET + key: kind for key, kind in kinds.items()},
        }
        kinds |= slow_kinds(group)
        if has_counts(group):
            kinds[FORGET + "step"] = COUNT
        if group["weight_bits"] is not None:
            kinds["correction"] = correction_kind(group)
        return kinds

    def used_state(self, group: dict[str, Any], *, forget: bool) -> dict[str, StateKind]:
        """The states that a forget or a retain step reads or writes."""
        used: dict[str, StateKind] = {}
        if not forget or group["moments"] != "none":
            begin = prefix(group, forget=forget)
            used = {begin + key: kind for key, kind in self.state_kinds(group).items()}
        elif has_counts(group):
            used[FORGET + "step"] = COUNT
        if moves_slowly(group) and (forget or group["retain_pending"]):
            used |= slow_kinds(group)
        if group["weight_bits"] is not None:
            used["correction"] = correction_kind(group)
        return used

    def cycle_state(self, group: dict[str, Any]) -> dict[str, StateKind]:
        """The states that a forget step and the retain steps after it use."""
        retain = self.used_state({**group, "retain_pending": 1}, forget=False)
        return retain | self.used_state(group, forget=True)

    @torch.no_grad()
    def init_state(self) -> None:
        """Make all state now, for every parameter that requires grad; what exists stays.

        Otherwise a step makes what its gradients need, and the constructor nothing. For a CUDA
        graph, and where all ranks must hold the same keys. SGD's momentum then starts from 0, with
        ``dampening`` from its first update on.
        """
        self.check_groups()
        for group in self.param_groups:
            check_dtypes(group, group["params"])
        for group in self.param_groups:
            kinds = self.cycle_state(group)
            for param in (p for p in group["params"] if p.requires_grad):
                known = self.state.get(param, {})
                new = {
                    k: zero_state(param, kind)
                    for k, kind in kinds.items()
                    if known.get(k) is None and (kind.role != "scale" or is_coded(param))
                }
                if "slow" in new:
                    new["slow"].copy_(param)
                if "slow_correction" in new:
                    new["slow_correction"].copy_({**known, **new}["correction"])
                if new:
                    self.state[param].update(new)

    def _state(
        self, batch: Batch, key: str, kind: StateKind, fill: list[Tensor] | None = None
    ) -> list[Tensor]:
        """An entry of each parameter's state, as a flat list where possible.

        New ones start as ``fill``, or zero.
        """
        if batch.flat is not None and key in batch.flat.flats:
            return [batch.flat.flats[key]]
        if kind.role == "scale":
            return self._scales(batch, key, kind)
        if batch.flat is not None and not kind.is_away(batch.params[0]):
            flat = batch.flat.get(key, kind, fill)
            if flat is not None:
                return [flat]
        tensors: list[Tensor] = []
        for i, param in enumerate(batch.params):
            state = self.state[param]
            if state.get(key) is None:  # torch.optim.SGD saves None where there is no momentum yet
                state[key] = zero_state(param, kind)
                if fill is not None:
                    state[key].copy_(fill[i])
            tensors.append(state[key])
        return tensors if kind.role == "count" else ordered(tensors, batch.orders)

    def _scales(self, batch: Batch, key: str, kind: StateKind) -> list[Tensor]:
        """Of each parameter, without elements where its moments are no codes; none if none are."""
        coded = [is_coded(param) for param in batch.params]
        if not any(coded):
            return []
        nothing = torch.empty(0, device=batch.params[0].device)
        scales: list[Tensor] = []
        for param, has_scales in zip(batch.params, coded, strict=True):
            if has_scales and self.state[param].get(key) is None:
                self.state[param][key] = zero_state(param, kind)
            scales.append(self.state[param][key] if has_scales else nothing)
        return scales

    def _slow(self, batch: Batch) -> list[Tensor]:
        return self._state(batch, "slow", slow_kinds(batch.group)["slow"], fill=batch.params)

    def _corrections(self, batch: Batch) -> list[Tensor]:
        """Of the weights; none where they are in one piece."""
        if batch.group["weight_bits"] is None:
            return []
        return self._state(batch, "correction", correction_kind(batch.group))

    def _slow_corrections(self, batch: Batch) -> list[Tensor]:
        """Of the slow weights, which start as the weights' own."""
        if not self._corrections(batch):
            return []
        own = [self.state[param]["correction"] for param in batch.params]
        kind = slow_kinds(batch.group)["slow_correction"]
        return self._state(batch, "slow_correction", kind, fill=own)

    def _counts(self, batch: Batch, begin: str) -> list[Tensor]:
        """Updates so far of what begins so; none where nothing is dithered."""
        return self._state(batch, f"{begin}step", COUNT) if has_counts(batch.group) else []
