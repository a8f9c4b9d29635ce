"""Unlearning with a Hugging Face Trainer: named parameter groups, and a callback that does the
forget steps.

    settings = {"optimizer": sf.SFRonAdamW, "lr": 1e-5, "weight_decay": 0.01, "saliency": mask}
    factory = (optimizer_factory, {**settings, "max_norm": 1.0})
    trainer = Trainer(model, args, train_dataset=retain, optimizer_cls_and_kwargs=factory)
    trainer.add_callback(ForgetCallback(trainer, forget_dataset))
    trainer.train()
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from ..errors import number, require
from ..heads.fused import (
    FusedHead,
    fuse_head,
    is_fused,
    label_adaptive_cross_entropy,
    label_logp,
)
from ..losses import adaptive_cross_entropy_parts
from ..ops.layout import local
from ..optim.base import SFRonOptimizer
from ..runs.gradients import gradients_reach
from . import forget_metrics, forget_step, unwrap
from .trainer_budget import RetainBudget, check_sized
from .trainer_mask import trainer_mask
from .trainer_optimizer import make_optimizer, optimizer_factory

__all__ = [
    "ForgetCallback",
    "FusedHead",
    "RetainBudget",
    "fuse_head",
    "label_adaptive_cross_entropy",
    "label_logp",
    "make_optimizer",
    "optimizer_factory",
    "trainer_mask",
]


class ForgetCallback(TrainerCallback):
    """One forget step before every ``retain_steps`` steps of the Trainer, whose training data are
    the retain set.

    It runs before the first retain batch of a step: the Trainer clips (``max_grad_norm``) and logs
    retain gradients only; the forget gradient is masked, then clipped to the optimizer's
    ``max_norm``. Both phases accumulate over ``gradient_accumulation_steps`` batches; the weights
    of a forget step are those of all its batches together. Forget batches come in an order that
    depends on the seed and the step alone, so a resumed run continues it.

    At the Trainer's logging steps ``forget_loss``, ``forget_grad_norm``, ``forget_clip_factor``,
    ``skipped_steps``, ``mask_density`` and ``budget_spent`` go to its log, and so to TensorBoard or
    W&B; between them nothing waits for the device. One process, DDP, or FSDP2 (accelerate's
    ``fsdp_version: 2``).

    Args:
        trainer: the Trainer it is added to.
        forget_dataset: what to forget, in the form of ``train_dataset``; with a length.
        forget_weight: factor on the forget loss, or a function of the cycle
            (``recipe.forget_weight_at``).
        temperature: see ``adaptive_cross_entropy``.
        retain_budget: what forgetting may cost; None = the learning rates stay the Trainer's.

    Raises:
        ValueError: a wrong argument, by name.
        RuntimeError: in a step of the Trainer, if a forget batch cannot be loaded; its cause is the
            data set's error.

    Warns:
        RuntimeWarning: trainable weights that got no gradient in the first forget step, by name.
    """

    def __init__(
        self,
        trainer: Trainer,
        forget_dataset: Any,
        *,
        forget_weight: float | Callable[[int], float] = 1.0,
        temperature: float = 0.5,
        retain_budget: RetainBudget | None = None,
    ) -> None:
        check_sized("forget_dataset", forget_dataset)
        if not callable(forget_weight):
            number("forget_weight", forget_weight, 0.0)
        number("temperature", temperature, 0.0)
        right, found = isinstance(retain_budget, RetainBudget | None), type(retain_budget).__name__
        require(right, "retain_budget", "a RetainBudget or None", found)
        self.retain_budget = retain_budget
        self.trainer, self.forget_dataset = trainer, forget_dataset
        self.forget_weight, self.temperature = forget_weight, temperature
        self.forget_loss: Tensor | None = None  # [], adaptive, of the last forget step
        self.forget_metrics: dict[str, Tensor] = {}  # forget_metrics of the last forget step
        self._batches: Iterator[Any] = iter(())
        self._looked = False  # whether gradients reached the weights
        self._counted: tuple[Any, int, float] = (None, 0, 0.0)  # a mask, its version, its density

    def loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(adaptive cross-entropy, normaliser) of one forget batch; override it for models with
        another loss.

        The default wants ``labels`` in the inputs and ``logits`` in the outputs, of a causal
        language model or a classifier. Of a model with a fused head there are no logits.
        """
        require("labels" in inputs, "forget_dataset", "'labels' in its batches", sorted(inputs))
        labels = inputs.pop("labels")
        if is_fused(model):
            found = label_adaptive_cross_entropy(model, inputs, labels, self.temperature)
            return found.loss, found.normaliser
        logits = model(**inputs)["logits"]
        plain = self.trainer.accelerator.unwrap_model(model)
        causal = getattr(plain, "loss_function", None) is ForCausalLMLoss and logits.dim() == 3
        if causal and not getattr(plain.config, "is_encoder_decoder", False):
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # position i predicts token i + 1
        loss, _, _, normaliser = adaptive_cross_entropy_parts(logits, labels, self.temperature)
        return loss, normaliser

    # --- events of the Trainer --------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check what the run needs; find the place in the forget set."""
        accelerator = self.trainer.accelerator
        kind = accelerator.distributed_type
        require(
            kind in ("NO", "MULTI_CPU", "MULTI_GPU") or getattr(accelerator, "is_fsdp2", False),
            "trainer",
            "one process, DDP or FSDP2",
            str(kind),
            "for a sharded model: fsdp_config={'fsdp_version': 2}, in accelerate's yaml"
            " distributed_type: FSDP and fsdp_config: {fsdp_version: 2}",
        )
        done = -(-state.global_step // self._retain_steps())
        self._batches = self._endless(done * args.gradient_accumulation_steps)
        if self.retain_budget is not None:
            self.retain_budget.begin(self.trainer, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The forget step of a cycle, if the last one is finished."""
        trainer, optimizer = self.trainer, unwrap(self.trainer.optimizer)
        if optimizer.mid_cycle:
            return
        accelerator, model = trainer.accelerator, trainer.model_wrapped
        weight = self.forget_weight
        if callable(weight):
            weight = weight(state.global_step // self._retain_steps())
        model.train()
        total = loss_sum = torch.zeros((), device=args.device)
        for last in [*[False] * (args.gradient_accumulation_steps - 1), True]:
            inputs = trainer._prepare_inputs(self._next())
            with (
                nullcontext() if last else accelerator.no_sync(model),
                trainer.compute_loss_context_manager(),
            ):
                loss, normaliser = self.loss(model, inputs)
                accelerator.backward(
                    -weight * accelerator.gradient_accumulation_steps * normaliser * loss
                )
            total, loss_sum = total + normaliser, loss_sum + normaliser * loss.detach()
        # as DDP the gradients
        total, loss_sum = (accelerator.reduce(t, reduction="mean") for t in (total, loss_sum))
        if not self._looked:
            self._looked = True
            gradients_reach(model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                local(parameter.grad).div_(total)
        forget_step(optimizer, accelerator.scaler)
        self.forget_loss, self.forget_metrics = loss_sum / total, forget_metrics(optimizer)
        model.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a cycle follow what it cost; log, where the Trainer does."""
        optimizer, steps = unwrap(self.trainer.optimizer), self._retain_steps()
        if self.retain_budget is not None and not optimizer.mid_cycle:
            self.retain_budget.follow(
                self.trainer, state.global_step // steps, max(1, state.max_steps // steps)
            )
        self.on_epoch_end(args, state, control)
        if not control.should_log or self.forget_loss is None:
            return
        found = {"forget_loss": self.forget_loss, **self.forget_metrics}
        logs: dict[str, float] = {name: value.item() for name, value in found.items()}
        logs["skipped_steps"] = optimizer.skipped_steps
        if optimizer.saliency is not None:
            logs["mask_density"] = self._density(optimizer)
        if self.retain_budget is not None:
            logs.update(self.retain_budget.logs())
        self.trainer.log(logs)
        control.should_log = True  # what the Trainer itself logs of this step comes after

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before a checkpoint is written."""
        if control.should_save and self.retain_budget is not None:
            self.retain_budget.keep(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say so if the last cycle is not finished, or cost too much."""
        if self.retain_budget is not None:
            self.retain_budget.settle()
        if unwrap(self.trainer.optimizer).mid_cycle:
            warnings.warn(
                f"the training ended inside a cycle: {state.global_step} steps are no multiple of"
                f" retain_steps ({self._retain_steps()}); choose max_steps so, or the slow step of"
                " the last cycle is missing",
                stacklevel=2,
            )

    def _density(self, optimizer: SFRonOptimizer) -> float:
        """Share of the selected weights, counted once for each mask."""
        mask: Any = optimizer.saliency
        if self._counted[:2] != (mask, mask.version):
            counts = mask.counts()
            share = sum(counts.values()) / max(1, sum(map(mask.size, counts)))
            self._counted = (mask, mask.version, share)
        return self._counted[2]

    # --- forget batches ---------------------------------------------------------------------------

    def _retain_steps(self) -> int:
        return unwrap(self.trainer.optimizer).param_groups[0]["retain_steps"]

    def _next(self) -> Any:
        # drawing a batch leaves the Trainer's generator alone
        with torch.random.fork_rng(devices=[]):
            return next(self._batches)

    def _endless(self, position: int) -> Iterator[Any]:
        """Batches for ever from ``position`` on, loaded, shuffled, sharded as the Trainer's own."""
        trainer, kept = self.trainer, self.trainer.train_dataset
        trainer.train_dataset = self.forget_dataset
        try:
            loader = trainer.get_train_dataloader()
        finally:
            trainer.train_dataset = kept
        require(
            len(loader) > 0,
            "forget_dataset",
            "at least one batch",
            "none",
            "check dataloader_drop_last",
        )
        epoch, drawn = divmod(position, len(loader))
        while True:
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            try:
                yield from islice(loader, drawn, None)
            except Exception as error:
                raise RuntimeError(
                    f"forget_dataset: loading a forget batch failed: {error!r}"
                ) from error
            epoch, drawn = epoch + 1, 0
