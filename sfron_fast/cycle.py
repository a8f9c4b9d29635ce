"""The two-phase optimizer under SFRonSGD and SFRonAdamW: phases, masks, clipping, slow weights."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import functional
from .amp import ForgetStep, amp_scalar
from .checks import FLOATS, require
from .flat import FlatStates, flatten_masks, same
from .groups import Batch, repacked
from .hyper import as_hyper, is_zero, moves_slowly
from .layout import Orders, ordered, orders_of
from .norms import global_norms
from .records import gather
from .saliency import SaliencyMask
from .settings import check_names, check_settings, check_state_dtype, check_step, check_whole
from .shards import anywhere, local, placed_gradient, plain
from .state import Resumable, zero_state


class SFRonOptimizer(Resumable):
    """Phases, masks and clipping; a subclass adds its update rule."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], saliency: SaliencyMask | None) -> None:
        if saliency is not None and not isinstance(saliency, SaliencyMask):
            raise ValueError(f"saliency: expected a SaliencyMask or None, found {type(saliency).__name__}; "
                             "build one with SaliencyMask.from_fisher or SaliencyMask.load")  # fmt: skip
        self.saliency = saliency
        self._skipped, self._masks, self._flat, self._tables = {}, {}, {}, {}
        self._noted, self._in_backward, self._checked = {}, set(), []
        self.forget = ForgetStep(self)
        self._check_group(defaults)
        mine = {"masked": saliency is not None, "mask_digest": None, "retain_pending": 0, "skipped": 0}
        super().__init__(params, {**defaults, **mine})
        if defaults["fused"]:
            self._step_supports_amp_scaling = True  # as torch's: GradScaler leaves scale and overflow to the step

    # --- groups and masks ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a masked optimizer wants named parameters its mask covers, or ``masked=False``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            check_whole(group)
            check_state_dtype(group, group["params"])
            once = len(set(map(id, group["params"]))) == len(group["params"])
            require(once, "params", "each parameter once", "one of them twice")
            for name in ("retain_steps", "max_norm", "clip_retain"):
                ours = self.param_groups[0][name]
                require(group[name] == ours, name, f"the same in every group ({ours!r})", repr(group[name]))
            if group["masked"]:
                self._resolve(group)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        group["retain_pending"] = self.param_groups[0]["retain_pending"]
        if group["retain_pending"] and moves_slowly(group):  # its part of the cycle starts from here
            with torch.no_grad():
                self._slow(Batch(group, [p for p in group["params"] if p.requires_grad], [], []))

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or RuntimeError unless the settings are good; a subclass adds its own."""
        check_settings(group)

    def _resolve(self, group: dict[str, Any]) -> list[Tensor]:
        """The group's packed masks, by name; raises if one of its parameters has none."""
        if self.saliency is None:
            raise ValueError("masked: expected masked=False in an optimizer without saliency, found masked=True")
        names = group.get("param_names")
        if names is None:
            raise ValueError("params: expected named parameters (a mask is keyed by name), found unnamed ones; pass "
                             "model.named_parameters(), or masked=False in the group; with a Hugging Face Trainer use "
                             "optimizer_factory of sfron_fast.integrations.transformers")  # fmt: skip
        return self.saliency.resolve(list(zip(names, group["params"], strict=True)))

    def _group_masks(self, index: int, group: dict[str, Any], orders: Orders) -> tuple[list[Tensor], Tensor | None]:
        """Per-parameter masks, and the same as one flat list."""
        if not group["masked"] or not group["params"]:
            return [], None
        params = group["params"]
        known = self._masks.get(index)
        # or moved, laid out anew, sharded
        if known is None or known[1][0].device != params[0].device or known[3] != orders or not same(known[0], params):
            masks = repacked(self._resolve(group), params, orders)
            flat = flatten_masks(masks, params) if plain(params) else None
            known = self._masks[index] = (list(params), masks, flat, orders)
        return known[1:3]

    def _batches(self, *, masked: bool) -> list[Batch]:
        batches: list[Batch] = []
        for index, group in enumerate(self.param_groups):
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
        check_step(self, batches)
        norms = self._norms(batches)
        for batch in batches:
            group = batch.group
            slow = self._slow(batch) if moves_slowly(group) else None
            rule = {"lr": group["lr"] if group["forget_lr"] is None else group["forget_lr"], "slow_out": slow}
            self._apply(batch, norms, rule, forget=True, counts=batch is batches[0])
        self._store_slow_without_grad(batches)
        for group in self.param_groups:
            group["retain_pending"] = group["retain_steps"]
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
        check_step(self, batches)
        norms = self._norms(batches) if self.param_groups[0]["clip_retain"] else {}
        last = self.param_groups[0]["retain_pending"] == 1
        for batch in batches:
            closes = last and moves_slowly(batch.group)
            slow = self._slow(batch) if closes else None
            rule = {"lr": batch.group["lr"], "slow_in": slow}
            self._apply(batch, norms, rule, forget=False, counts=batch is batches[0])
        if last:
            self._interpolate_without_grad(batches)
        self._in_backward.clear()
        for group in self.param_groups:
            group["retain_pending"] = max(0, group["retain_pending"] - 1)
        return loss

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

    def _skip_counter(self, device: torch.device) -> Tensor:
        """int64 [] beside the parameters: the kernels count there, nothing waits for them."""
        counter = self._skipped.get(device)
        if counter is None:
            counter = self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return counter

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
        rule["skipped"] = self._skip_counter(device) if counts else None
        if forget:
            rule |= {"masks": batch.mask_argument(), "freeze_masked": batch.group["mask_semantics"] == "update"}
        moments = batch.group["moments"]
        plain = forget and moments == "none"
        rule = as_hyper({**rule, "weight_decay": 0.0 if plain else batch.group["weight_decay"]}, device)
        if plain:
            functional.sgd_step_(*batch.arguments(), **rule)  # theta - beta g, no decay: equation 7
        else:
            self._update(batch, rule, "forget_" if forget and moments == "separate" else "")

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

    def _without_grad(self, batches: list[Batch]) -> Iterator[Batch]:
        """Of every group with a slow step, the parameters outside ``batches``."""
        whole = [batch.group for batch in batches if batch.flat is not None]
        for group in self.param_groups:
            if moves_slowly(group) and not any(group is g for g in whole):
                none = [p for p in group["params"] if p.grad is None and p.requires_grad]
                yield Batch(group, [p for p in none if p not in self._in_backward], [], [])

    def _store_slow_without_grad(self, batches: list[Batch]) -> None:
        """A weight without forget gradient may still move in the retain steps of this cycle."""
        for batch in self._without_grad(batches):
            for param, slow in zip(batch.params, self._slow(batch), strict=True):
                slow.copy_(param)

    def _interpolate_without_grad(self, batches: list[Batch]) -> None:
        """A weight without a gradient in the last retain step may have moved in an earlier one."""
        for batch in self._without_grad(batches):
            moved = batch.part([i for i, p in enumerate(batch.params) if "slow" in self.state.get(p, ())])
            for there in moved.split():
                alpha = as_hyper({"slow_lr": batch.group["slow_lr"]}, there.params[0].device)
                functional.interpolate_(self._slow(there), there.params, **alpha)
