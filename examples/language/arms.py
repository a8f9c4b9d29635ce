"""What is compared: SFR-on, what is left of it without a part, and the methods of the field.

Each arm changes a copy of Full in place: 50 steps, each of 16 samples to forget and 16 to retain.
Every method of ``CHOICES`` is tried at two learning rates on pair 0; that with the smaller gap is
the method's on the other pairs, where all are reported. The ceiling was not tuned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import sfron_fast as sf
from examples.systems.masks import at_random
from sfron_fast import methods as field
from sfron_fast.distributed.ranks import Ranks
from sfron_fast.methods.weighted import ascent, forget_and_retain, references, sums
from sfron_fast.runs.budget import holdout_scale

from .authors import Benchmark
from .comes_back import hidden
from .tokens import examples, loader

BATCH, EPOCHS = 16, 10  # five batches of 80 samples: 50 steps
CEILING = 0.8
BUDGETS = (0.02, 0.05, 0.2)
IDK = "I do not know."
STEERED, MOVED = "model.layers.2", r"model\.layers\.[012]\.mlp\.down_proj\.weight"  # of RMU

Facts = dict[str, float]  # what an arm says of itself


@dataclass
class Setting:
    """What the arms of a pair share; masks and reference losses are of Full."""

    data: Benchmark
    tokenizer: PreTrainedTokenizerFast
    full: LlamaForCausalLM
    retrain: LlamaForCausalLM
    seed: int  # of the order of batches, and of the random mask
    steps: int = EPOCHS * 5
    known: sf.SaliencyMask | None = None

    def batches(self, split: str, shuffled: bool = True) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed) if shuffled else None
        rows = examples(self.tokenizer, getattr(self.data, split))
        return loader(self.tokenizer, rows, BATCH, order)

    @property
    def epochs(self) -> int:
        """Passes over the forget set that make ``steps``, rounded up."""
        return -(-self.steps // len(self.batches("forget")))

    def mask(self) -> sf.SaliencyMask:
        """SFR-on's, estimated once."""
        if self.known is None:
            self.known = sf.estimate_mask(
                self.full,
                forget=self.batches("forget", False),
                retain=self.batches("retain", False),
                task=sf.Language(),
            )
        return self.known

    def holdout_loss(self) -> float:
        """Full's mean loss on authors it has never seen."""
        held = self.batches("holdout", False)
        return holdout_scale(Ranks(self.full, None), held, sf.Language())


# of each method the two settings that pair 0 chooses from
CHOICES = {
    "SFR-on": ("SFR-on", "SFR-on, lr 1e-3"),
    "GradDiff": ("GradDiff 3e-4", "GradDiff 1e-3"),
    "NPO": ("NPO 3e-4", "NPO 1e-3"),
    "SimNPO": ("SimNPO 3e-4", "SimNPO 1e-3"),
    "WGA": ("WGA 3e-4", "WGA 1e-3"),
    "UNDIAL": ("UNDIAL 3e-4", "UNDIAL 1e-3"),
}

Arm = Callable[[LlamaForCausalLM, Setting], Facts]


def random_mask(setting: Setting) -> sf.SaliencyMask:
    """As many weights of each parameter as SFR-on selects, drawn at random."""
    return at_random(setting.mask(), setting.seed)


def sfron(
    model: LlamaForCausalLM,
    setting: Setting,
    *,
    mask: Callable[[Setting], sf.SaliencyMask] | None = Setting.mask,
    budget: float | None = None,
    without: Any = None,
    **overrides: Any,
) -> Facts:
    """``unlearn`` with ``Recipe.language``; mask None = without one."""
    recipe = sf.Recipe.language(cycles=setting.steps, **overrides)
    recipe = recipe if without is None else recipe.without(without)
    result = sf.unlearn(
        model,
        forget=setting.batches("forget"),
        retain=setting.batches("retain"),
        holdout=setting.batches("holdout", False),
        recipe=recipe if mask is not None else recipe.without("saliency"),
        mask=None if mask is None else mask(setting),
        task=sf.Language(),
        retain_budget=budget,
    )
    found = {"steps at the ceiling": float(result.forgotten_steps)}
    if budget is not None:
        assert result.budget_spent is not None
        found |= {"budget": budget, "spent": result.budget_spent}
    return found


def method(model: LlamaForCausalLM, setting: Setting, *, run: Any, **settings: Any) -> Facts:
    """One of ``sfron_fast.methods`` that descends on forget and retain batches."""
    run(
        model,
        forget=setting.batches("forget"),
        retain=setting.batches("retain"),
        task=sf.Language(),
        epochs=setting.epochs,
        **settings,
    )
    return {}


def ids(batch: Any) -> Tensor:
    """The samples' numbers."""
    return batch["id"]


def idk(model: LlamaForCausalLM, setting: Setting, *, lr: float) -> Facts:
    """IdkDPO; its pairs come in one order."""
    idks = [replace(qa, answer=IDK) for qa in setting.data.forget]
    preferred = loader(setting.tokenizer, examples(setting.tokenizer, idks), BATCH)
    pairs = list(zip(preferred, setting.batches("forget", False), strict=True))
    retain = setting.batches("retain")
    field.idk_dpo(
        model, pairs=pairs, retain=retain, task=sf.Language(), epochs=setting.epochs, lr=lr
    )
    return {}


def with_our_ceiling(
    model: LlamaForCausalLM, setting: Setting, *, lr: float, preference: float | None = None
) -> Facts:
    """GradDiff, or NPO with its beta as ``preference``; a sequence at SFR-on's ceiling weighs 0."""
    task, limit = sf.Language(), setting.holdout_loss()
    known = None
    if preference is not None:
        known = references(model, setting.batches("forget", False), task, ids, None)

    def forget_loss(batch: Any, samples: Tensor) -> Tensor:
        units = task.units_by(model, batch)
        losses = sums(units)
        means = losses / units.lengths
        if known is None or preference is None:
            return ascent(sf.with_ceiling(torch.ones_like(means), means, CEILING, limit), means)
        weights = sf.npo_weights(losses, known[samples].to(losses), preference)
        return ascent(sf.with_ceiling(weights, means, CEILING, limit), losses)

    forget_and_retain(
        model,
        forget_loss,
        forget=setting.batches("forget"),
        retain=setting.batches("retain"),
        task=task,
        retain_weight=1.0,
        ids=ids,
        epochs=setting.epochs,
        lr=lr,
    )
    return {}


def tuned(model: LlamaForCausalLM, setting: Setting, *, lr: float) -> Facts:
    """Fine-tuning on the retain set, with the others' optimizer, for as many steps."""
    batches: list[Any] = []
    source = setting.batches("retain")
    while len(batches) < setting.steps:
        batches += list(source)
    field.finetune(
        model, batches[: setting.steps], task=sf.Language(), epochs=1, lr=lr,
        optimizer="adamw", cosine=False, weight_decay=0.01,
    )  # fmt: skip
    return {}


def becomes(model: LlamaForCausalLM, other: LlamaForCausalLM) -> Facts:
    """The model takes the other's weights."""
    model.load_state_dict(other.state_dict())
    return {}


def retrain(model: LlamaForCausalLM, setting: Setting) -> Facts:
    """What all are compared with."""
    return becomes(model, setting.retrain)


def full(model: LlamaForCausalLM, setting: Setting) -> Facts:
    """Nothing is done."""
    return {}


def quantisation_control(model: LlamaForCausalLM, setting: Setting) -> Facts:
    """Looks as if it had forgotten, and has not: four bits bring it back."""
    return becomes(model, hidden(setting.full, setting.tokenizer, setting.data))


ARMS: dict[str, Arm] = {
    "Retrain": retrain,
    "Full": full,
    "SFR-on": sfron,
    "GradDiff 3e-4": partial(method, run=field.grad_diff, lr=3e-4),
    "NPO 3e-4": partial(method, run=field.npo, ids=ids, lr=3e-4),
    "SimNPO 1e-3": partial(method, run=field.simnpo, lr=1e-3),
    "SimNPO 3e-4": partial(method, run=field.simnpo, lr=3e-4),
    "WGA 3e-4": partial(method, run=field.wga, lr=3e-4),
    "WGA 1e-3": partial(method, run=field.wga, lr=1e-3),
    "SFR-on, lr 1e-3": partial(sfron, lr=1e-3),
    "SFR-on, random mask": partial(sfron, mask=random_mask),
    "SFR-on, no mask": partial(sfron, mask=None),
    "SFR-on, no ceiling": partial(sfron, ceiling=None),
    "SFR-on, no adaptive weight": partial(sfron, without="adaptive"),
    "SFR-on, slow rate .5": partial(sfron, slow_lr=0.5),
    "SFR-on, shared moments": partial(sfron, moments="shared", ceiling=None),
    "GradDiff 1e-3": partial(method, run=field.grad_diff, lr=1e-3),
    "NPO 1e-3": partial(method, run=field.npo, ids=ids, lr=1e-3),
    "GradDiff 1e-3, our ceiling": partial(with_our_ceiling, lr=1e-3),
    "NPO 1e-3, our ceiling": partial(with_our_ceiling, lr=1e-3, preference=0.1),
    "IdkDPO 3e-4": partial(idk, lr=3e-4),
    "RMU 1e-3": partial(
        method, run=field.rmu, layer=STEERED, trained=MOVED, retain_weight=1.0, lr=1e-3
    ),  # its weight of 1200 is for models a thousand times as large, and holds all here
    "fine-tuning 1e-3": partial(tuned, lr=1e-3),
    "UNDIAL 1e-3": partial(method, run=field.undial, retain_weight=1.0, lr=1e-3),
    "UNDIAL 3e-4": partial(method, run=field.undial, retain_weight=1.0, lr=3e-4),
    "SatImp 3e-4": partial(method, run=field.satimp, lr=3e-4),
    "CE-U 3e-4": partial(method, run=field.ceu, retain_weight=1.0, lr=3e-4),
    **{f"SFR-on, budget {share}": partial(sfron, budget=share) for share in BUDGETS},
    "fine-tuning 3e-4": partial(tuned, lr=3e-4),
    "hidden in four bits": quantisation_control,
}
