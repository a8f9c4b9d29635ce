"""The two-phase optimizer under SFRonSGD and SFRonAdamW: phases, masks, clipping, slow weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import functional
from .amp import ForgetStep, amp_scalar
from .checks import FLOATS, require
from .flat import FlatStates
from .groups import Batch
from .hyper import as_hyper, is_zero, moves_slowly
from .layout import Orders, ordered, orders_of
from .masking import GroupMask, check_saliency
from .norms import global_norms
from .records import gather
from .saliency import SaliencyMask
from .settings import COUNTS, check_names, check_settings, check_state_dtype, check_whole, own_group, plain_numbers
from .shards import anywhere, local, placed_gradient, plain
from .skips import Skips
from .state import Resumable, zero_state
from .step_checks import check_batch, check_step


class SFRonOptimizer(Resumable):
    """Phases, masks and clipping; a subclass adds its update rule."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], saliency: SaliencyMask | None) -> None:
        check_saliency(saliency)
        self._saliency, self._skips = saliency, Skips()
        self._masks, self._flat, self._tables = {}, {}, {}
        self._noted, self._in_backward, self._checked = {}, set(), []
        self.forget = ForgetStep(self)
        defaults = plain_numbers(defaults)
        self._check_group(defaults, given=True)
        super().__init__(params, {**defaults, "masked": saliency is not None, **COUNTS})
        if defaults["fused"]:
            self._step_supports_amp_scaling = True  # as torch's: GradScaler leaves scale and overflow to the step

    # --- groups and masks ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a masked optimizer wants named parameters its mask covers, or ``masked=False``."""
        super().add_param_group(own_group(param_group))
        group = self.param_groups[-1]
        try:
            self._check_group(group, given=True)
            check_whole(group)
            check_state_dtype(group, group["params"])
            once = len(set(map(id, group["params"]))) == len(group["params"])
            require(once, "params", "each parameter once", "one of them twice")
            for name in ("retain_steps", "max_norm", "clip_retain"):
                ours = self.param_groups[0][name]
                require(group[name] == ours, name, f"the same in every group ({ours!r})", repr(group[name]))
            if group["masked"]:
                mask = GroupMask.of(group, self.saliency, orders_of(group["params"]))
                self._masks[len(self.param_groups) - 1] = mask
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        group["retain_pending"] = self.param_groups[0]["retain_pending"]

    def _check_group(self, group: dict[str, Any], *, given: bool = False) -> None:
        """Raise ValueError or RuntimeError unless the settings are good; a subclass adds its own.

        ``given``: by the user, as torch's constructor looks at them; a schedule may then move them on.
        """
        check_settings(group)

    def _group_masks(self, index: int, group: dict[str, Any], orders: Orders) -> tuple[list[Tensor], Tensor | None]:
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
            params, grads, described = gather(group["params"], self._tables, index)
            orders = () if described else orders_of(params)
            masks, flat_mask = self._group_masks(index, group, orders) if masked else ([], None)
            whole = described or type(None) not in set(map(type, grads))
            if not (described or plain(params)):
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
        """The group's states as flat lists, if it is of several plain parameters of one dtype and device."""
        known = self._flat.get(index)
        if known is not None and known.serves(params, self.state, orders):
            return known
        self._flat.pop(index, None)
        kinds = {(type(p) in (Tensor, torch.nn.Parameter) and p.dtype in FLOATS, p.dtype, p.device) for p in params}
        if len(params) < 2 or len(kinds) != 1 or not next(iter(kinds))[0]:
            return None
        self._flat[index] = FlatStates(params, self.state, orders)
        return self._flat[index]

    # --- phases ------------------------------------------------------------------------------------------------

    @property
    def mid_cycle(self) -> bool:
        """True between a forget step and the retain step that closes its cycle."""
        return any(group["retain_pending"] for group in self.param_groups)

    @Optimizer.profile_hook_step
    @torch.no_grad()
    def forget_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Fast-weight step on the gradients of the (negated, weighted) forget loss; opens a cycle.

        The gradient is masked, clipped to ``max_norm`` and applied with ``forget_lr`` (default ``lr``). A
        non-finite gradient skips the update on the device and is counted in ``skipped_steps``.

        Raises:
            RuntimeError: the previous cycle still has retain steps to do.
        Warns:
            RuntimeWarning: there is no gradient at all, here or in a retain step of the cycle.
        """
        if self._in_backward:
            raise RuntimeError("forget_step: expected step() after step_in_backward, found none; call it to close the "
                               "retain step")  # fmt: skip
        if self.mid_cycle:
            pending = self.param_groups[0]["retain_pending"]
            raise RuntimeError(f"forget_step: expected a finished cycle, found {pending} retain step(s) pending; "
                               "call step() that often first")  # fmt: skip
        self._noted["called"] = True  # a schedule after it is not too early (torch notices its own ``step`` only)
        loss = self._run(closure)
        batches = self._batches(masked=True)
        idle = self._idle_slow(batches)
        check_step(self, batches, idle, forget=True)
        norms = self._norms(batches)
        for batch in batches:
            group = batch.group
            slow = self._slow(batch) if moves_slowly(group) else None
            rule = {"lr": group["lr"] if group["forget_lr"] is None else group["forget_lr"], "slow_out": slow}
            self._apply(batch, norms, rule, forget=True, counts=batch is batches[0])
        for batch in idle:  # their cycle starts here too: they may still move in its retain steps
            for param, start in zip(batch.params, self._slow(batch), strict=True):
                start.copy_(param)
        for group in self.param_groups:
            group["retain_pending"], group["has_forgotten"] = group["retain_steps"], True
        return loss

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Retain step: the stock update; the last one of a cycle also moves the slow weights."""
        loss = self._run(closure)
        if self._idle():
            self.init_state()
            return loss
        if any(p.grad is not None for p in self._in_backward):
            raise RuntimeError("step: expected no gradients after step_in_backward, found some; one backward is a step")
        batches = self._batches(masked=False)
        last = self.param_groups[0]["retain_pending"] == 1
        idle = self._idle_slow(batches) if last else []
        check_step(self, batches, idle, forget=False)
        norms = self._norms(batches) if self.param_groups[0]["clip_retain"] else {}
        for batch in batches:
            self._retain(batch, norms, counts=batch is batches[0])
        for batch in idle:  # without a gradient in the last retain step, but maybe moved by an earlier one
            alpha = as_hyper({"slow_lr": batch.group["slow_lr"]}, batch.params[0].device)
            functional.interpolate_(self._slow(batch), batch.params, **alpha)
        self._in_backward.clear()
        for group in self.param_groups:
            group["retain_pending"] = max(0, group["retain_pending"] - 1)
        return loss

    def _retain(self, batch: Batch, norms: dict[torch.device, Tensor], *, counts: bool) -> None:
        """Update one batch in a retain step; what moves for the first time in its cycle starts from there."""
        pending = batch.group["retain_pending"]
        slow = self._slow(batch) if pending and moves_slowly(batch.group) else None
        rule = {"lr": batch.group["lr"], "slow_in": slow if pending == 1 else None}
        self._apply(batch, norms, rule, forget=False, counts=counts)

    def _idle(self) -> bool:
        """lr 0 and zero gradients: how torch.distributed.checkpoint asks for the state. No step of a cycle."""
        if torch.compiler.is_compiling() or not all(is_zero(group["lr"]) for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in params if p.grad is not None]
        moves = not all(g.layout == torch.strided and not g.any() for g in grads)
        return anywhere(bool(grads), params) and not anywhere(moves, params)  # alike on all ranks

    @staticmethod
    def _run(closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _norms(self, batches: list[Batch]) -> dict[torch.device, Tensor]:
        """The global norm of the (masked) gradients, beside the parameters of every device; counts overflows."""
        everything = [p for group in self.param_groups for p in group["params"]]
        norms = global_norms(batches, everything, lambda device: amp_scalar(self, "grad_scale", device))
        self._noted["grad_norm"] = next(iter(norms.values()), None)
        return norms

    def _apply(
        self, batch: Batch, norms: dict[torch.device, Tensor], rule: dict[str, Any], *, forget: bool, counts: bool
    ) -> None:
        """Update one batch; a step that is skipped is counted by one of its batches."""
        norm = norms.get(batch.params[0].device)
        if norm is not None:
            limit = batch.group["max_norm"]
            rule |= {"norm": norm, "max_norm": float("inf") if limit is None else limit}
        device = batch.params[0].device
        rule |= {key: amp_scalar(self, key, device) for key in ("grad_scale", "found_inf")}
        rule |= {"slow_lr": batch.group["slow_lr"], "maximize": batch.group["maximize"]}
        rule["skipped"] = self._skips.counter(device) if counts else None
        may_skip = norm is not None or rule["found_inf"] is not None
        if forget:
            rule |= {"masks": batch.mask_argument(), "freeze_masked": batch.group["mask_semantics"] == "update"}
        moments = batch.group["moments"]
        plain = forget and moments == "none"
        rule = as_hyper({**rule, "weight_decay": 0.0 if plain else batch.group["weight_decay"]}, device)
        try:
            if plain:
                functional.sgd_step_(*batch.arguments(), **rule)  # theta - beta g, no decay: equation 7
            else:
                self._update(batch, rule, "forget_" if forget and moments == "separate" else "")
        except (ValueError, RuntimeError):
            check_batch(self, batch, forget=forget)  # which knows the remedy, if it is the state
            raise
        if counts and may_skip:
            self._skips.watch(device)

    def _update(self, batch: Batch, rule: dict[str, Any], prefix: str) -> None:
        """Apply the optimizer's own rule with the state under ``prefix``."""
        raise NotImplementedError

    # --- state ---------------------------------------------------------------------------------------------------

    def _state(
        self, batch: Batch, key: str, dtype: torch.dtype | None, fill: list[Tensor] | None = None
    ) -> list[Tensor]:
        """An entry of each parameter's state, as a flat list where possible; new ones start as ``fill``, or zero.

        ``dtype`` None = the parameter's.
        """
        if batch.flat is not None and key in batch.flat.flats:
            return [batch.flat.flats[key]]
        if any(self.state.get(p, {}).get(key) is None for p in batch.params):
            batch.check()  # a refusal leaves no state behind
        if batch.flat is not None:
            flat = batch.flat.get(key, dtype or batch.params[0].dtype, fill)
            if flat is not None:
                return [flat]
        tensors: list[Tensor] = []
        for i, param in enumerate(batch.params):
            state = self.state[param]
            if state.get(key) is None:  # torch.optim.SGD saves None where there is no momentum yet
                state[key] = zero_state(param, key, dtype)
                if fill is not None:
                    state[key].copy_(fill[i])
            tensors.append(state[key])
        return tensors if key.endswith("step") else ordered(tensors, batch.orders)

    def _slow(self, batch: Batch) -> list[Tensor]:
        return self._state(batch, "slow", None, fill=batch.params)

    def _idle_slow(self, batches: list[Batch]) -> list[Batch]:
        """Of every group with a slow step, the parameters outside ``batches`` that have slow weights."""
        whole = [batch.group for batch in batches if batch.flat is not None]
        found: list[Batch] = []
        for group in self.param_groups:
            if moves_slowly(group) and not any(group is g for g in whole):
                none = [p for p in group["params"] if p.grad is None and "slow" in self.state.get(p, ())]
                none = [p for p in none if p not in self._in_backward]
                found += Batch(group, none, [], []).split() if none else []
        return found
