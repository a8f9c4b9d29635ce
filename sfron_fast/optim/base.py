"""The two-phase optimizer under SFRonSGD and SFRonAdamW: phases, clipping, slow weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ..distributed.shards import anywhere, placed_gradient
from ..ops.layout import local, orders_of
from ..saliency.mask import SaliencyMask
from . import replay
from .amp import amp_scalar
from .batch import Batch
from .elsewhere import brought, is_away, keep
from .idle import blend_idle, start_idle
from .masks import check_saliency
from .norms import global_norms
from .saved import Resumable
from .scalars import NAMES, is_zero, moves_slowly, on_device
from .state_kind import FORGET
from .step import Step, sgd_step
from .step_checks import check_batch, check_step
from .validation import COUNTS, plain_numbers


class SFRonOptimizer(Resumable):
    """The phases of a cycle; a subclass adds its update rule."""

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], saliency: SaliencyMask | None
    ) -> None:
        check_saliency(saliency)
        self._saliency = saliency
        self._remember_nothing()
        defaults = plain_numbers(defaults)
        self.check_group(defaults, given=True)
        super().__init__(params, {**defaults, "masked": saliency is not None, **COUNTS})
        if defaults["fused"]:
            # as torch's: GradScaler leaves scale and overflow to the step
            self._step_supports_amp_scaling = True

    @Optimizer.profile_hook_step
    @torch.no_grad()
    def forget_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Fast-weight step on the gradients of the (negated, weighted) forget loss; opens a cycle.

        The gradient is masked, clipped to ``max_norm`` and applied with ``forget_lr`` (default
        ``lr``). A non-finite gradient skips the update on the device and is counted in
        ``skipped_steps``.

        Raises:
            RuntimeError: the previous cycle still has retain steps to do.

        Warns:
            RuntimeWarning: there is no gradient at all, here or in a retain step of the cycle.
        """
        if self.mid_step:
            raise RuntimeError(
                "forget_step: expected step() after step_in_backward, found none; call it to close"
                " the retain step"
            )
        if self.mid_cycle:
            pending = self.param_groups[0]["retain_pending"]
            raise RuntimeError(
                f"forget_step: expected a finished cycle, found {pending} retain step(s) pending; "
                "call step() that often first"
            )
        # a schedule after it is not too early (torch notices its own ``step`` only)
        self._noted["called"] = True
        loss = self._run(closure)
        replay.step(self, self._forget_step, forget=True, clipped=True)
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
            raise RuntimeError(
                "step: expected no gradients after step_in_backward, found some; one backward is a"
                " step"
            )
        clipped = bool(self.param_groups[0]["clip_retain"])
        replay.step(self, self._retain_step, forget=False, clipped=clipped)
        self._in_backward.clear()
        for group in self.param_groups:
            group["retain_pending"] = max(0, group["retain_pending"] - 1)
        return loss

    def _forget_step(self) -> list[Batch]:
        batches = self._batches(masked=True)
        idle = self._idle_slow(batches)
        check_step(self, batches, idle, forget=True)
        norms = self._norms(batches)
        for batch in batches:
            self._forget(batch, norms, counts=batch is batches[0])
        for batch in idle:  # their cycle starts here too: they may still move in its retain steps
            start_idle(self, batch)
        return batches

    def _retain_step(self) -> list[Batch]:
        batches = self._batches(masked=False)
        last = self.param_groups[0]["retain_pending"] == 1
        idle = self._idle_slow(batches) if last else []
        check_step(self, batches, idle, forget=False)
        norms = self._norms(batches) if self.param_groups[0]["clip_retain"] else {}
        for batch in batches:
            self._retain(batch, norms, counts=batch is batches[0])
        for batch in idle:  # no gradient in the last retain step, but maybe one in an earlier one
            blend_idle(self, batch)
        return batches

    @torch.no_grad()
    def retain_one(self, group: dict[str, Any], param: Tensor) -> None:
        """What ``step()`` does for all parameters, for the one whose gradient has just been
        accumulated; frees the gradient, and leaves the cycle to ``step()``.

        Raises:
            RuntimeError: it has been called for this parameter since the last ``step()``.
        """
        if param in self._in_backward:
            raise RuntimeError(
                "step_in_backward: expected one gradient for each weight, found a second; sum the"
                " losses of several backwards, and checkpoint with use_reentrant=False"
            )
        grad = placed_gradient(param)
        assert grad is not None
        batch = Batch(group, [param], [grad], [], orders=orders_of([param]))
        check_step(self, [batch], [], forget=False)
        batch.check()
        self._retain(batch, {}, counts=not self._in_backward)
        self._in_backward.add(param)
        param.grad = None

    def _forget(self, batch: Batch, norms: dict[torch.device, Tensor], *, counts: bool) -> None:
        """Update one batch in a forget step; its slow weights are where the cycle starts."""
        group = batch.group
        here = moves_slowly(group)
        if is_away(batch):
            keep(self, batch)
            here = False
        self._apply(
            batch,
            norms,
            counts,
            forget=True,
            lr=group["lr"] if group["forget_lr"] is None else group["forget_lr"],
            slow_save=self._slow(batch) if here else None,
            slow_save_corrections=self._slow_corrections(batch) if here else [],
        )

    def _retain(self, batch: Batch, norms: dict[torch.device, Tensor], *, counts: bool) -> None:
        """Update one batch in a retain step; what moves for the first time in its cycle starts from
        there.
        """
        lr, pending = batch.group["lr"], batch.group["retain_pending"]
        slowly = pending and moves_slowly(batch.group)
        if slowly and pending == 1:
            for part, slow, corrections in brought(self, batch):
                self._apply(
                    part,
                    norms,
                    counts,
                    forget=False,
                    lr=lr,
                    slow_from=slow,
                    slow_from_corrections=corrections,
                )
                counts = False  # one step, counted once
            return
        if slowly:
            self._slow(batch)
            self._slow_corrections(batch)
        self._apply(batch, norms, counts, forget=False, lr=lr)

    def _idle(self) -> bool:
        """lr 0 and zero gradients: how torch.distributed.checkpoint asks for the state.

        No step of a cycle.
        """
        if torch.compiler.is_compiling() or not all(
            is_zero(group["lr"]) for group in self.param_groups
        ):
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
        """The global norm of the (masked) gradients, beside the parameters of every device; counts
        overflows.
        """
        everything = [p for group in self.param_groups for p in group["params"]]
        norms = global_norms(
            batches, everything, lambda device: amp_scalar(self, "grad_scale", device)
        )
        self._noted["grad_norm"] = next(iter(norms.values()), None)
        return norms

    def _apply(
        self,
        batch: Batch,
        norms: dict[torch.device, Tensor],
        counts: bool,
        *,
        forget: bool,
        lr: float | Tensor,
        slow_save: list[Tensor] | None = None,
        slow_from: list[Tensor] | None = None,
        slow_save_corrections: list[Tensor] | tuple[()] = (),
        slow_from_corrections: list[Tensor] | tuple[()] = (),
    ) -> None:
        """Update one batch; of a step that is skipped, one batch ``counts`` it."""
        group, device = batch.group, batch.params[0].device
        plain = forget and group["moments"] == "none"  # theta - beta g, no decay: equation 7
        numbers = {
            "lr": lr,
            "weight_decay": 0.0 if plain else group["weight_decay"],
            "slow_lr": group["slow_lr"],
        }
        on = on_device(numbers, device)
        norm, limit = norms.get(device), group["max_norm"]
        step = Step(
            forget=forget,
            **(numbers if on is None else NAMES),
            numbers=on,
            maximize=group["maximize"],
            masks=batch.mask_argument() if forget else [],
            freeze_masked=forget and group["mask_semantics"] == "update",
            norm=norm,
            max_norm=float("inf") if norm is None or limit is None else limit,
            grad_scale=amp_scalar(self, "grad_scale", device),
            found_inf=amp_scalar(self, "found_inf", device),
            slow_save=slow_save,
            slow_from=slow_from,
            corrections=self._corrections(batch),
            slow_save_corrections=list(slow_save_corrections),
            slow_from_corrections=list(slow_from_corrections),
            skipped=self._skips.counter(device) if counts else None,
        )
        try:
            if plain:
                sgd_step(batch, step, steps=self._counts(batch, FORGET))
            else:
                self.update(batch, step)
        except (ValueError, RuntimeError):
            check_batch(self, batch, forget=forget)  # which knows the remedy, if it is the state
            raise
        if counts and (norm is not None or step.found_inf is not None):
            self._skips.watch(device)

    def update(self, batch: Batch, step: Step) -> None:
        """The optimizer's own rule, on the state whose keys begin with ``prefix`` of the phase."""
        raise NotImplementedError
