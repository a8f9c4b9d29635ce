"""What is compared: ways to make a model forget a class, all in as many steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sfron_fast as sf
from sfron_fast import methods
from sfron_fast.methods.weighted import forget_and_retain

from .fixture import CLASSES, Data, shuffled

TASK = sf.Classification()
STEPS: dict[str, Any] = {"epochs": 20, "lr": 0.01}
# chosen on seed 7 for both sets of images, classes being compared by the means of what the last
# layer reads; and by its rows, for MNIST alone: on digits no tilt by them helped
MEANS: dict[str, Any] = {"beta": 2.0, "components": 3, "sharpness": 0.3}
ROWS: dict[str, Any] = {"beta": 3.0, "components": 5, "sharpness": 0.3}

Unlearn = Callable[[nn.Module], Any]  # in place


@dataclass(frozen=True, eq=False)
class Forgetting:
    """A class that goes; each step is on a batch of it and one of the others."""

    data: Data
    label: int
    means: Tensor  # [classes, features], what TRW compares classes by
    rows: Tensor  # the same as published
    seed: int

    def ways(self) -> dict[str, Unlearn]:
        """TRW, and what it is compared with, by name."""
        return {
            "TRW": self._tilted(self.means, **MEANS),
            "TRW by rows": self._tilted(self.rows, **ROWS),
            "rescaling": self._tilted(self.means, beta=0.0),
            "relabelling": self._relabel,
            "uniform target": self._flatten,
        }

    def _loaders(self) -> dict[str, Any]:
        forget, retain = (self.data.of(self.label, same).tensors for same in (True, False))
        return {"forget": shuffled(*forget), "retain": shuffled(*retain), **STEPS}

    def _tilted(self, rows: Tensor, **tilt: Any) -> Unlearn:
        settings = {"forgotten": self.label, "rows": rows, **tilt}
        return lambda model: methods.trw(model, **settings, **self._loaders())

    def _relabel(self, model: nn.Module) -> None:
        """Each forget sample learns one wrong label."""
        images, labels = self.data.of(self.label).tensors
        draw = torch.Generator().manual_seed(self.seed)
        wrong = shuffled(images, methods.wrong_labels(labels, CLASSES, draw))
        self._descend(model, lambda batch: TASK.mean_loss(model, batch), forget=wrong)

    def _flatten(self, model: nn.Module) -> None:
        """Forget samples learn to be of any other class, all alike."""
        others = torch.zeros(CLASSES)
        others[self.label] = -torch.inf

        def loss(batch: Any) -> Tensor:
            logits = TASK.outputs(model, batch)
            return sf.soft_target_kl(logits, torch.zeros_like(logits), class_bias=others)

        self._descend(model, loss)

    def _descend(self, model: nn.Module, loss: Callable[[Any], Tensor], **changes: Any) -> None:
        """As TRW does, but for the loss of a forget batch."""
        settings = {"optimizer": "sgd", "cosine": True, "weight_decay": 5e-4, **self._loaders()}
        forget_and_retain(
            model, lambda batch, _: loss(batch), task=TASK, retain_weight=1.0, **settings | changes
        )
