"""The two-phase optimizer under SFRonSGD and SFRonAdamW: phases, masks, clipping, slow weights."""

from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import functional
from .checks import number, require
from .saliency import SaliencyMask
from .state import Resumable


class Batch(NamedTuple):
    """The parameters of one group, on one device, that have a gradient; lists run in parallel."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    masks: list[Tensor]

    def on(self, device: torch.device) -> "Batch":
        """The part of it on one device."""
        chosen = [i for i, p in enumerate(self.params) if p.device == device]
        params, grads, masks = ([t[i] for i in chosen] if t else [] for t in self[1:])
        return Batch(self.group, params, grads, masks)


class SFRonOptimizer(Resumable):
    """Phases, masks and clipping; a subclass adds its update rule."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], saliency: SaliencyMask | None) -> None:
        if saliency is not None and not isinstance(saliency, SaliencyMask):
            raise ValueError(f"saliency: expected a SaliencyMask or None, found {type(saliency).__name__}; "
                             "build one with SaliencyMask.from_fisher or SaliencyMask.load")  # fmt: skip
        self.saliency = saliency
        self._skipped, self._masks, self._known_states = {}, {}, {}
        self.grad_norm = self.grad_scale = self.found_inf = None
        super().__init__(params, {**defaults, "masked": saliency is not None, "retain_pending": 0, "skipped": 0})

    # --- groups and masks ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a masked optimizer wants named parameters its mask covers, or ``masked=False``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if group["masked"]:
                self._resolve(group)
        except ValueError:
            self.param_groups.pop()
            raise
        group["retain_pending"] = self.param_groups[0]["retain_pending"]

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            number(name, group[name], 0.0)
        if group["forget_lr"] is not None:
            number("forget_lr", group["forget_lr"], 0.0)
        if group["max_norm"] is not None:
            number("max_norm", group["max_norm"], 0.0, open_low=True)
        number("slow_lr", group["slow_lr"], 0.0, 1.0, open_low=True)
        steps = group["retain_steps"]
        require(isinstance(steps, int) and steps >= 1, "retain_steps", "an integer >= 1", repr(steps))
        for name, choices in (("moments", ("shared", "separate", "none")), ("mask_semantics", ("gradient", "update"))):
            require(group[name] in choices, name, " or ".join(map(repr, choices)), repr(group[name]))
        dtype = group["state_dtype"]
        require(dtype in (None, torch.float32), "state_dtype", "None (the parameter's) or torch.float32", dtype)
        first = self.param_groups[0]
        for name in ("retain_steps", "max_norm", "clip_retain"):
            require(group[name] == first[name], name, f"the same in every group ({first[name]!r})", repr(group[name]))

    def _resolve(self, group: dict[str, Any]) -> list[Tensor]:
        """The group's packed masks, by name; raises if one of its parameters has none."""
        if self.saliency is None:
            raise ValueError("masked: expected masked=False in an optimizer without saliency, found masked=True")
        names = group.get("param_names")
        if names is None:
            raise ValueError("params: expected named parameters (a mask is keyed by name), found unnamed ones; pass "
                             "model.named_parameters(), or masked=False in the group")  # fmt: skip
        return self.saliency.resolve(list(zip(names, group["params"], strict=True)))

    def _group_masks(self, index: int, group: dict[str, Any]) -> list[Tensor]:
        if not group["masked"]:
            return []
        masks = self._masks.get(index)
        if masks is None or (masks and masks[0].device != group["params"][0].device):  # the model has moved
            masks = self._masks[index] = self._resolve(group)
        return masks

    def _batches(self, *, masked: bool) -> list[Batch]:
        batches: list[Batch] = []
        for index, group in enumerate(self.param_groups):
            params, masks = group["params"], self._group_masks(index, group) if masked else []
            grads = [p.grad for p in params]
            if any(g is None for g in grads):
                have = [i for i, g in enumerate(grads) if g is not None]
                params, grads = [params[i] for i in have], [grads[i] for i in have]
                masks = [masks[i] for i in have] if masks else []
            self._check_kind(index, params, grads)
            whole = Batch(group, params, grads, masks)
            devices = {p.device for p in params}
            batches += [whole.on(d) for d in devices] if len(devices) > 1 else [whole] if params else []
        return batches

    @staticmethod
    def _check_kind(index: int, params: list[Tensor], grads: list[Tensor]) -> None:
        if {g.layout for g in grads} | {p.is_complex() for p in params} <= {torch.strided, False}:
            return
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            kind = "a complex parameter" if param.is_complex() else "a sparse gradient"
            if param.is_complex() or grad.layout != torch.strided:
                raise RuntimeError(f"params: expected real tensors with dense gradients, found {kind} in group "
                                   f"{index}, parameter {i}; use a dense gradient or leave it out")  # fmt: skip

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
        if self.mid_cycle:
            pending = self.param_groups[0]["retain_pending"]
            raise RuntimeError(f"forget_step: expected a finished cycle, found {pending} retain step(s) pending; "
                               "call step() that often first")  # fmt: skip
        loss = self._run(closure)
        batches = self._batches(masked=True)
        norms = self._norms(batches)
        self._count_skip(norms, batches)
        self._store_slow_without_grad()
        for batch in batches:
            group = batch.group
            slow = self._slow(batch.params) if group["slow_lr"] < 1.0 else None
            rule = {"lr": group["lr"] if group["forget_lr"] is None else group["forget_lr"], "slow_out": slow}
            self._apply(batch, norms, rule, forget=True)
        for group in self.param_groups:
            group["retain_pending"] = group["retain_steps"]
        return loss

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Retain step: the stock update; the last one of a cycle also moves the slow weights."""
        loss = self._run(closure)
        batches = self._batches(masked=False)
        norms = self._norms(batches) if self.param_groups[0]["clip_retain"] else {}
        self._count_skip(norms, batches)
        last = self.param_groups[0]["retain_pending"] == 1
        for batch in batches:
            closes = last and batch.group["slow_lr"] < 1.0
            slow = self._slow(batch.params) if closes else None
            self._apply(batch, norms, {"lr": batch.group["lr"], "slow_in": slow}, forget=False)
        if last:
            self._interpolate_without_grad()
        for group in self.param_groups:
            group["retain_pending"] = max(0, group["retain_pending"] - 1)
        return loss

    @staticmethod
    def _run(closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _norms(self, batches: list[Batch]) -> dict[torch.device, Tensor]:
        """The global norm of the (masked) gradients, beside the parameters of every device; counts overflows."""
        devices: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for batch in batches:
            grads, masks = devices.setdefault(batch.params[0].device, ([], []))
            none = torch.empty(0, dtype=torch.uint8, device=batch.params[0].device)
            grads.extend(batch.grads)
            masks.extend(batch.masks or [none] * len(batch.grads))
        norms = {
            device: functional.masked_grad_norm(grads, masks, grad_scale=_to(self.grad_scale, device))
            for device, (grads, masks) in devices.items()
        }
        if len(norms) > 1:
            everywhere = list(norms.values())
            norms = {d: torch.linalg.vector_norm(torch.stack([n.to(d) for n in everywhere])) for d in norms}
        self.grad_norm = next(iter(norms.values()), None)
        return norms

    def _count_skip(self, norms: dict[torch.device, Tensor], batches: list[Batch]) -> None:
        """One more skipped step if the norm or found_inf says so; without waiting for the device."""
        if not batches or (not norms and self.found_inf is None):
            return
        device = batches[0].params[0].device
        skip = torch.zeros((), dtype=torch.bool, device=device)
        if norms:
            skip |= ~torch.isfinite(norms[device])
        if self.found_inf is not None:
            skip |= self.found_inf.to(device).reshape(()) != 0
        self._skipped.setdefault(device, torch.zeros((), dtype=torch.int64, device=device)).add_(skip)

    def _apply(
        self, batch: Batch, norms: dict[torch.device, Tensor], rule: dict[str, Any], *, forget: bool
    ) -> None:
        norm = norms.get(batch.params[0].device)
        if norm is not None:
            limit = batch.group["max_norm"]
            rule |= {"norm": norm, "max_norm": float("inf") if limit is None else limit}
        device = batch.params[0].device
        rule |= {"grad_scale": _to(self.grad_scale, device), "found_inf": _to(self.found_inf, device)}
        rule |= {"slow_lr": batch.group["slow_lr"], "maximize": batch.group["maximize"]}
        if forget:
            rule |= {"masks": batch.masks, "freeze_masked": batch.group["mask_semantics"] == "update"}
        moments = batch.group["moments"]
        if forget and moments == "none":
            functional.sgd_step_(batch.params, batch.grads, **rule)  # theta - beta g, no decay: spec 1.8, line 7
        else:
            self._update(batch, rule, "forget_" if forget and moments == "separate" else "")

    def _update(self, batch: Batch, rule: dict[str, Any], prefix: str) -> None:
        """Apply the optimizer's own rule with the state under ``prefix``."""
        raise NotImplementedError

    # --- state ---------------------------------------------------------------------------------------------------

    def _state(self, params: list[Tensor], key: str, make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        tensors: list[Any] = [state.get(key) for state in self._states(params)]
        # torch.optim.SGD saves None where there is no momentum yet
        for i in [i for i, tensor in enumerate(tensors) if tensor is None]:
            tensors[i] = self.state[params[i]][key] = make(params[i])
        return tensors

    def _states(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Each parameter's state; for a whole group remembered, because hashing thousands of tensors is slow."""
        known = self._known_states.get(id(params))
        if known is not None:
            owner, size, listed, states = known
            same = owner is self.state and size == len(self.state) and len(listed) == len(params)
            if same and all(map(is_, listed, params)) and self.state[params[0]] is states[0]:
                return states
        states = [self.state[p] for p in params]
        if any(params is group["params"] for group in self.param_groups):
            self._known_states[id(params)] = (self.state, len(self.state), list(params), states)
        return states

    def _zeros(self, group: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        return lambda p: torch.zeros_like(p, dtype=group["state_dtype"] or p.dtype, memory_format=torch.preserve_format)

    def _slow(self, params: list[Tensor]) -> list[Tensor]:
        return self._state(params, "slow", lambda p: p.detach().clone(memory_format=torch.preserve_format))

    def _without_grad(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        for group in self.param_groups:
            if group["slow_lr"] < 1.0:
                yield group, [p for p in group["params"] if p.grad is None and p.requires_grad]

    def _store_slow_without_grad(self) -> None:
        """A weight without forget gradient may still move in the retain steps of this cycle."""
        for _, params in self._without_grad():
            for param, slow in zip(params, self._slow(params), strict=True):
                slow.copy_(param)

    def _interpolate_without_grad(self) -> None:
        """A weight without a gradient in the last retain step may have moved in an earlier one."""
        for group, params in self._without_grad():
            moved = [p for p in params if "slow" in self.state.get(p, ())]
            functional.interpolate_(self._slow(moved), moved, group["slow_lr"])


def _to(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return None if scalar is None else scalar.to(device)
