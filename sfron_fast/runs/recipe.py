"""Recipe: every setting of an SFR-on run.

The paper and the authors' code are different algorithms; both are here.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from ..errors import require
from ..losses import LOSS_FLOOR
from ..optim.adamw import SFRonAdamW
from ..optim.base import SFRonOptimizer
from ..optim.sgd import SFRonSGD
from ..optim.validation import MaskSemantics, Moments, SlowDevice, WeightBits
from ..saliency.fisher import Estimator
from ..saliency.mask import SaliencyMask
from ..tasks import Task
from .diffusion_settings import ASCENT, OFFICIAL_DDPM, OFFICIAL_SD, REPLACE
from .recipe_checks import DECAYS, CeilingOf, Decay, Objective, check_recipe

Part = Literal["saliency", "adaptive", "fast_slow"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of ``unlearn``; start from ``Recipe.paper()`` or ``Recipe.official()`` and override
    by keyword.

    Attributes:
        cycles: T_out, outer steps.
        retain_steps: T_in, retain batches per cycle.
        lr: eta of the retain steps.
        forget_lr: beta of the forget step (None = lr, and its schedule).
        forget_weight: the factor on the forget loss at the start.
        forget_decay: its course over the cycles.
        lr_decay: course of ``lr`` over the retain steps ("cosine" or "constant").
        slow_lr: alpha.
        temperature: lambda.
        loss_floor: smallest loss used in a weight.
        ceiling: a forget sample whose loss has reached ``ceiling`` times ``reference_loss`` has
            forgotten enough and weighs 0; a forget step whose samples all have is skipped. None =
            no end.
        ceiling_of: "sample", or "token" of a language model (``Language``): a token that has
            reached the ceiling counts for no more, and the others of its sequence go on. Without
            it ascent drives on the tokens that are lost already, whose gradients are largest.
        reference_loss: mean loss of samples the model has never seen (a holdout set), by the model
            before the run; with a ceiling. None = ``unlearn`` measures it on its ``holdout``.
        threshold: gamma; None = every weight is salient, and no Fisher is estimated.
        zero_over_zero: whether weights whose Fishers are both exactly 0 are selected too
            (``SaliencyMask.from_fisher``).
        estimator: how the Fisher is estimated (``estimate_fisher``).
        draws: how often "sample" squares each sample, of a task that draws at random.
        objective: "ascent" of the forget loss, weighted; or "replace": descent of what the task
            wants in its place (``Denoising(instead=...)``), its plain mean.
        forget_updates_buffers: whether forget batches enter BatchNorm's running statistics. Buffers
            are never masked and never interpolated.
        optimizer: "sgd" or "adamw"; its settings (momentum, betas, weight_decay, max_norm,
            clip_retain, moments, mask_semantics, state_dtype, weight_bits, slow_device) are those
            of SFRonSGD and SFRonAdamW.

    Raises:
        ValueError: a value out of range, by name.
    """

    name: str
    cycles: int = 300
    retain_steps: int = 5
    lr: float = 0.01
    forget_lr: float | None = None
    forget_weight: float = 1.0
    forget_decay: Decay = "linear"
    lr_decay: Decay = "constant"
    slow_lr: float = 1.0
    temperature: float = 0.5
    loss_floor: float = LOSS_FLOOR
    ceiling: float | None = None
    ceiling_of: CeilingOf = "sample"
    reference_loss: float | None = None
    threshold: float | None = 1.0
    zero_over_zero: bool = False
    estimator: Estimator = "sample"
    draws: int = 1
    objective: Objective = "ascent"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_norm: float | None = None
    clip_retain: bool = False
    moments: Moments = "none"
    mask_semantics: MaskSemantics = "gradient"
    state_dtype: torch.dtype | None = None
    weight_bits: WeightBits = None
    slow_device: SlowDevice = None
    forget_updates_buffers: bool = False

    @classmethod
    def paper(cls, **overrides: Any) -> "Recipe":
        """The paper's algorithm (docs/equations.md): plain forget step, linear decay, sample
        Fisher, slow step.
        """
        return cls._with({"name": "SFR-on (paper)", "forget_lr": 0.01, "slow_lr": 0.5}, overrides)

    @classmethod
    def official(cls, **overrides: Any) -> "Recipe":
        """What the authors' classification code does for CIFAR-10, ResNet-18.

        One SGD with momentum for both phases, cosine decay of lr and forget weight, squared
        batch-mean gradients, 0 / 0 salient, mask then clip to 7, no slow step. Departure: the
        loss floor (theirs is 1e-15, behind the power).
        """
        settings = {
            "name": "SFR-on (official)",
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "forget_weight": 25.0,
            "forget_decay": "cosine",
            "lr_decay": "cosine",
            "zero_over_zero": True,
            "estimator": "batch_equal",
            "max_norm": 7.0,
            "moments": "shared",
            "forget_updates_buffers": True,
        }
        return cls._with(settings, overrides)

    @classmethod
    def budgeted(cls, **overrides: Any) -> "Recipe":
        """For ``unlearn(retain_budget=...)``: AdamW with moments of its own for each phase, one
        retain step a cycle, both gradients clipped to 1, no decay. What it forgets with is
        ``forget_lr``, which the budget drives; the forget weight is nearly inert under Adam.
        """
        settings = {
            "name": "SFR-on (budgeted)",
            "cycles": 100,
            "retain_steps": 1,
            "lr": 1e-3,
            "forget_lr": 1e-4,
            "forget_decay": "constant",
            "optimizer": "adamw",
            "moments": "separate",
            "max_norm": 1.0,
        }
        return cls._with(settings, overrides)

    @classmethod
    def language(cls, **overrides: Any) -> "Recipe":
        """For sequences a language model has learnt by heart: as ``budgeted``, and a sequence ends
        to be forgotten at .8 of the holdout loss (momentum overshoots 1).

        Chosen on the fictitious authors (examples/language) for a model of 2M weights; a model of
        billions wants ``lr`` and ``forget_lr`` a hundred times smaller.
        """
        settings = {
            "name": "SFR-on (language)",
            "cycles": 50,
            "lr": 3e-4,
            "forget_lr": 5e-4,
            "ceiling": 0.8,
        }
        return cls.budgeted(**{**settings, **overrides})

    @classmethod
    def diffusion(cls, **overrides: Any) -> "Recipe":
        """For a class or concept of a diffusion model, which is made to say something else:
        ``Denoising(instead=Relabel(...))``. Adam with shared moments, a Fisher of 8 draws.

        Chosen on classes 1, 2, 4, 6 and 7 of scikit-learn's digits (examples/diffusion).
        """
        return cls._with(REPLACE, overrides)

    @classmethod
    def diffusion_ascent(cls, **overrides: Any) -> "Recipe":
        """As ``diffusion``, by ascent: for ``Denoising(reference=loss_profile(...))``, so that each
        timestep counts alike, up to three times its usual loss; three retain steps and a slow one.
        """
        return cls._with(ASCENT, overrides)

    @classmethod
    def official_ddpm(cls, **overrides: Any) -> "Recipe":
        """What the authors' code does for a class of a CIFAR-10 DDPM: one Adam for both phases,
        cosine decay of the forget weight, squared batch-mean gradients, mask, then clip of both
        gradients to 1, no slow step. For ``Denoising(reduction="sum", drop=.1, drop_forget=.1)``.

        Departures: the loss floor is in the loss, theirs (1e-8) behind the power; their Fisher is
        of the guided prediction, its gradients clipped to 1 before they are squared.
        """
        return cls._with(OFFICIAL_DDPM, overrides)

    @classmethod
    def official_sd(cls, **overrides: Any) -> "Recipe":
        """What the authors' code does for a concept of Stable Diffusion, where it is made to say
        what another prompt says: ``Denoising(instead=Relabel(prompt))``. Plain Adam.

        Departures: the mask is applied (in their code a test of names in a list of tensors never
        holds); both prompts see the same noisy latents; the Fisher is of the plain prediction.
        """
        return cls._with(OFFICIAL_SD, overrides)

    @classmethod
    def _with(cls, settings: dict[str, Any], overrides: dict[str, Any]) -> "Recipe":
        unknown = overrides.keys() - {f.name for f in fields(cls)}
        known = ", ".join(f.name for f in fields(cls))
        require(
            not unknown, "overrides", f"settings of Recipe ({known})", ", ".join(sorted(unknown))
        )
        return cls(**{**settings, **overrides})

    def __post_init__(self) -> None:
        check_recipe(self)

    def replace(self, **overrides: Any) -> "Recipe":
        """A copy with some settings changed."""
        return replace(self, **overrides)

    def without(self, part: Part) -> "Recipe":
        """This recipe less one part of SFR-on, to see what it is worth.

        "saliency": every weight may be forgotten with. "adaptive": all samples weigh the same, at
        every time.
        "fast_slow": forgetting and remaining part in turn, step by step, without slow weights (the
        paper's Euclidean form). T_in times as many cycles then share the forget weight and the
        clip, and the slow rate is moved into the learning rates, so that both forms go as far where
        the gradients are constant.
        """
        require(part in get_args(Part), "part", " or ".join(map(repr, get_args(Part))), repr(part))
        name = f"{self.name} without {part.replace('_', '-')}"
        if part == "saliency":
            return self.replace(name=name, threshold=None)
        if part == "adaptive":
            return self.replace(name=name, temperature=0.0, forget_decay="constant")
        inner, slow = self.retain_steps, self.slow_lr
        return self.replace(
            name=name,
            cycles=self.cycles * inner,
            retain_steps=1,
            slow_lr=1.0,
            lr=self.lr * slow,
            forget_lr=None if self.forget_lr is None else self.forget_lr * slow,
            forget_weight=self.forget_weight / inner,
            max_norm=None if self.max_norm is None else self.max_norm / inner,
        )

    def wants_reference(self, task: Task) -> bool:
        """Whether there is a ceiling, and neither recipe nor task says of what."""
        own = self.reference_loss is not None or task.relative
        return self.ceiling is not None and not own

    def forget_weight_at(self, cycle: int) -> float:
        """Factor on the forget loss in cycle 0 .. cycles - 1."""
        return self.forget_weight * DECAYS[self.forget_decay](cycle / self.cycles)

    def make_optimizer(self, model: torch.nn.Module, mask: SaliencyMask | None) -> SFRonOptimizer:
        """The optimizer of this recipe over the model's trainable parameters."""
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        common: dict[str, Any] = dict(
            lr=self.lr,
            weight_decay=self.weight_decay,
            saliency=mask,
            forget_lr=self.forget_lr,
            max_norm=self.max_norm,
            clip_retain=self.clip_retain,
            retain_steps=self.retain_steps,
            slow_lr=self.slow_lr,
            moments=self.moments,
            mask_semantics=self.mask_semantics,
            state_dtype=self.state_dtype,
            weight_bits=self.weight_bits,
            slow_device=self.slow_device,
        )
        if self.optimizer == "sgd":
            return SFRonSGD(named, momentum=self.momentum, **common)
        return SFRonAdamW(named, betas=self.betas, **common)

    def make_scheduler(self, optimizer: SFRonOptimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Schedule of ``lr``, stepped once after every retain step."""
        steps = self.cycles * self.retain_steps
        if self.lr_decay == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
