"""SFRonSGD: torch.optim.SGD with a forget step and a slow step."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..errors import number, require
from ..ops.layout import ordered
from ..ops.lists import spread
from ..saliency.mask import SaliencyMask
from .base import SFRonOptimizer
from .batch import Batch
from .state_kind import COUNT, StateKind, has_counts, moment_kinds, prefix
from .step import Step, sgd_step
from .step_checks import check_batch
from .validation import MaskSemantics, Moments, SlowDevice, WeightBits


class SFRonSGD(SFRonOptimizer):
    """torch.optim.SGD with a forget step: the authors' optimizer for ResNet-18.

    Args:
        params: ``model.named_parameters()`` (needed with ``saliency``), parameters, or groups.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD. lr,
            forget_lr, weight_decay and slow_lr may be tensors of one element: the device reads
            them, no step waits for them.
        foreach, fused: as torch.optim.SGD; each step is one fused pass whatever they say. With
            ``fused=True`` GradScaler leaves scale and overflow to the step, as torch's does.
        differentiable: False; the fused step cannot be differentiated.
        capturable: True for a CUDA graph. A number stays in the graph as it was at the capture;
            what changes between replays must be a tensor on the device. Make the state
            (``init_state``) before.
        saliency: which weights a forget step changes; None = all.
        forget_lr: learning rate beta of the forget step; None = ``lr``.
        max_norm: clip of the masked gradient norm in forget steps, in retain steps only with
            ``clip_retain``.
        retain_steps: T_in, calls of ``step()`` that close a cycle.
        slow_lr: alpha in (0, 1]; 1 keeps the fast weights, costs nothing and allocates nothing.
            Change it between cycles; inside one only if it is below 1 before and after.
        moments: momentum of a forget step: "shared" with the retain steps (the authors), "separate"
            (DualOptim), "none" (the paper: plain step, no decay).
        mask_semantics: "gradient" masks the gradient only (the authors: decay and momentum still
            move masked weights); "update" leaves masked weights and their state bit-identical in
            forget steps.
        state_dtype: of the moments. None = the parameter's, fp32 with ``weight_bits``;
            torch.float32 for fp32 beside low-precision parameters; torch.bfloat16 for half the
            memory beside fp32 ones: AdamW's averages are then rounded so that nothing is lost over
            the steps (``reference.dithered``), SGD's momentum to nearest, so not above 0.99.
            torch.int8 for codes of 8 bits with a scale for every 256 weights, where an index of the
            first dimension has a multiple of 32 elements, and fp32 elsewhere
            (``ops/moment_codes.py``); the codes are dithered.
        weight_bits: 24 or 32 for bf16 parameters: ``state[p]["correction"]``, int8 or int16, is
            what rounding to bf16 leaves off, so updates below a unit of bf16 are not lost
            (``ops/split_weights.py``). A parameter that is written from outside keeps it, half a
            unit of bf16 at most.
        slow_device: "cpu" keeps slow weights in the host's memory, pinned, where parameters are on
            another device: copied there by the forget step and back, part by part, by the step that
            closes the cycle; the bits are the same (``optim/elsewhere.py``). Read
            ``state[p]["slow"]`` after ``torch.cuda.synchronize()``, or from ``state_dict()``.
            Parameters on the CPU have theirs there in any case. Not in a CUDA graph.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
        RuntimeError: ``differentiable``, or ``foreach`` and ``fused`` together (torch's type of
            error).
    """

    stock = torch.optim.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        saliency: SaliencyMask | None = None,
        forget_lr: float | Tensor | None = None,
        max_norm: float | None = None,
        clip_retain: bool = False,
        retain_steps: int = 1,
        slow_lr: float | Tensor = 1.0,
        moments: Moments = "shared",
        mask_semantics: MaskSemantics = "gradient",
        state_dtype: torch.dtype | None = None,
        weight_bits: WeightBits = None,
        slow_device: SlowDevice = None,
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
        }
        knobs = {
            "forget_lr": forget_lr,
            "max_norm": max_norm,
            "clip_retain": clip_retain,
            "retain_steps": retain_steps,
            "slow_lr": slow_lr,
            "moments": moments,
            "mask_semantics": mask_semantics,
            "state_dtype": state_dtype,
            "weight_bits": weight_bits,
            "slow_device": slow_device,
        }
        super().__init__(params, {**own, **knobs}, saliency)

    def check_group(self, group: dict[str, Any], *, given: bool = False) -> None:
        """As the base class; also the settings of the rule."""
        super().check_group(group, given=given)
        number("momentum", group["momentum"], 0.0)
        number("dampening", group["dampening"], 0.0)
        if group["nesterov"] and given:  # a schedule may take momentum through 0
            ok = group["momentum"] > 0 and group["dampening"] == 0
            found = f"momentum {group['momentum']}, dampening {group['dampening']}"
            require(ok, "nesterov", "momentum > 0 and dampening 0", found)

    def state_kinds(self, group: dict[str, Any]) -> dict[str, StateKind]:
        """The momentum, if there is any; a count of the updates where something is dithered."""
        kinds = moment_kinds(group, "momentum_buffer") if group["momentum"] != 0.0 else {}
        return {**kinds, "step": COUNT} if has_counts(group) else kinds

    def update(self, batch: Batch, step: Step) -> None:
        """One fused pass over the batch."""
        group = batch.group
        momentum, dampening = group["momentum"], group["dampening"]
        begin, kinds = prefix(group, forget=step.forget), self.state_kinds(group)
        if momentum == 0.0:
            sgd_step(batch, step, dampening=dampening, steps=self._counts(batch, begin))
            return

        def update(batch: Batch, step: Step, *, first: bool) -> None:
            states = {k: self._state(batch, begin + k, kind) for k, kind in kinds.items()}
            sgd_step(
                batch,
                step,
                states["momentum_buffer"],
                momentum=momentum,
                dampening=dampening,
                nesterov=group["nesterov"],
                first=first,
                scales=states.get("scales"),
                steps=states.get("step"),
            )

        key = f"{begin}momentum_buffer"
        # torch starts the buffer at the first gradient itself
        if batch.flat is not None and key in batch.flat.flats:
            fresh = [False]
        else:
            fresh = [self.state.get(p, {}).get(key) is None for p in batch.params]
        if all(fresh) or not any(fresh):
            update(batch, step, first=all(fresh))
            return
        check_batch(self, batch, forget=step.forget)  # before the first of two calls
        params = ordered(batch.params, batch.orders)
        lists: dict[str, Any] = {
            name: spread(tensors, params)
            for name, tensors in step._asdict().items()
            if (name.startswith("slow_") or name == "corrections") and name != "slow_lr" and tensors
        }
        for first in (True, False):
            chosen = [i for i, is_first in enumerate(fresh) if is_first == first]
            part = batch.part(chosen)
            changes: dict[str, Any] = {n: [t[i] for i in chosen] for n, t in lists.items()}
            # one step, counted once
            skipped = step.skipped if first else None
            own = step._replace(masks=part.masks, skipped=skipped, **changes)
            update(part, own, first=first)
