"""The parameter groups of the optimizers: what is given, checked, masked, and cut into batches."""

from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import check_whole, placed_gradient, plain
from ..errors import require
from ..ops.arguments import FLOATS
from ..ops.layout import Orders, orders_of
from ..ops.tables import gather
from .batch import Batch
from .flat_state import FlatStates
from .masks import GroupMask
from .scalars import moves_slowly
from .state import StatefulOptimizer
from .validation import check_dtypes, check_names, check_settings, check_tensor_settings, own_group


class GroupedOptimizer(StatefulOptimizer):
    """Groups and their batches; a subclass adds checks of its own settings."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a masked optimizer wants named parameters its mask covers, or
        ``masked=False``.
        """
        super().add_param_group(own_group(param_group))
        group = self.param_groups[-1]
        try:
            self.check_group(group, given=True)
            check_whole(group["params"])
            check_names(group)
            check_dtypes(group, group["params"])
            once = len(set(map(id, group["params"]))) == len(group["params"])
            require(once, "params", "each parameter once", "one of them twice")
            for name in ("retain_steps", "max_norm", "clip_retain"):
                ours = self.param_groups[0][name]
                require(
                    group[name] == ours,
                    name,
                    f"the same in every group ({ours!r})",
                    repr(group[name]),
                )
            if group["masked"]:
                mask = GroupMask.of(group, self.saliency, orders_of(group["params"]))
                self._masks[len(self.param_groups) - 1] = mask
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        group["retain_pending"] = self.param_groups[0]["retain_pending"]

    def check_group(self, group: dict[str, Any], *, given: bool = False) -> None:
        """Raise ValueError or RuntimeError unless the settings are good; a subclass adds its own.

        ``given``: by the user, as torch's constructor looks at them; a schedule may then move them
        on.
        """
        check_settings(group)

    def check_groups(self) -> None:
        """``check_group`` of all, as they are now; of tensors no value is read."""
        for group in self.param_groups:
            check_tensor_settings(group)
            self.check_group({k: 1.0 if isinstance(v, Tensor) else v for k, v in group.items()})

    def _group_masks(
        self, index: int, group: dict[str, Any], orders: Orders
    ) -> tuple[list[Tensor], Tensor | None]:
        """Per-parameter masks, and the same as one flat list."""
        if not group["masked"] or not group["params"]:
            return [], None
        known = self._masks.get(index)
        if known is None or not known.serves(self.saliency, group["params"], orders):
            known = self._masks[index] = GroupMask.of(group, self.saliency, orders)
        return known.masks, known.flat

    def _batches(self, *, masked: bool) -> list[Batch]:
        batches: list[Batch] = []
        for index, group in enumerate(self.param_groups):
            if not isinstance(group["params"], list):
                group["params"] = list(group["params"])
            check_names(group)
            params, grads, tabled = gather(group["params"], self._tables, index)
            orders = () if tabled else orders_of(params)
            masks, flat_mask = self._group_masks(index, group, orders) if masked else ([], None)
            whole = tabled or type(None) not in set(map(type, grads))
            if not (tabled or plain(params)):
                grads = list(map(placed_gradient, params))
            flat = self._flat_states(index, params, orders) if whole else None
            batch = Batch(group, params, grads, masks, flat, flat_mask if whole else None, orders)
            if not whole:
                batch = batch.part([i for i, g in enumerate(grads) if g is not None])
            if orders:
                batch.check()  # reordered, a wrong shape would be hard to tell
            if flat is not None:
                batches.append(batch)
            else:
                batches += batch.split()
        return batches

    def _flat_states(self, index: int, params: list[Tensor], orders: Orders) -> FlatStates | None:
        """The group's states as flat lists, if it is of several plain parameters of one dtype and
        device.
        """
        known = self._flat.get(index)
        if known is not None and known.serves(params, self.state, orders):
            return known
        self._flat.pop(index, None)
        kinds = {
            (type(p) in (Tensor, torch.nn.Parameter) and p.dtype in FLOATS, p.dtype, p.device)
            for p in params
        }
        if len(params) < 2 or len(kinds) != 1 or not next(iter(kinds))[0]:
            return None
        self._flat[index] = FlatStates(params, self.state, orders)
        return self._flat[index]

    def _idle_slow(self, batches: list[Batch]) -> list[Batch]:
        """Of every group with a slow step, the parameters outside ``batches`` that have slow
        weights.
        """
        whole = [batch.group for batch in batches if batch.flat is not None]
        found: list[Batch] = []
        for group in self.param_groups:
            if moves_slowly(group) and not any(group is g for g in whole):
                none = [
                    p for p in group["params"] if p.grad is None and "slow" in self.state.get(p, ())
                ]
                none = [p for p in none if p not in self._in_backward]
                found += Batch(group, none, [], []).split() if none else []
        return found
