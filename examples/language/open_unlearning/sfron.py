"""SFR-on as a trainer of open-unlearning: src/trainer/unlearn/sfron.py there.

Its data set of pairs gives the two sets: the Trainer trains on the retain set, and a callback does
one forget step before each of its steps. An epoch is one over the forget set, as with its other
trainers.
"""

import math
from functools import partial

from torch.utils.data import DataLoader
from trainer.base import FinetuneTrainer

import sfron_fast as sf
from sfron_fast.integrations.transformers import ForgetCallback, make_optimizer

KEPT = ("input_ids", "attention_mask", "labels")


def only_tokens(collator, rows):
    """Their batches may hold an ``index`` too, which no model takes."""
    return {key: value for key, value in collator(rows).items() if key in KEPT}


class SFRon(FinetuneTrainer):
    """Mask from both Fishers, adaptive forget steps, retain steps by the Trainer.

    Args:
        threshold: of the saliency mask; None = every weight is salient.
        temperature: of the adaptive forget loss.
        forget_lr: None = half of ``args.learning_rate``.
        forget_weight: nearly inert beside ``forget_lr``, as Adam scales gradients.
        max_norm: clip of the masked forget gradient.
        args, kwargs: of FinetuneTrainer; ``train_dataset`` a ForgetRetainDataset.
    """

    def __init__(
        self,
        *args,
        threshold=1.0,
        temperature=0.5,
        forget_lr=None,
        forget_weight=1.0,
        max_norm=1.0,
        **kwargs,
    ):
        pairs, settings = kwargs["train_dataset"], kwargs["args"]
        self.forget_dataset = pairs.forget
        self.threshold, self.forget_lr, self.max_norm = threshold, forget_lr, max_norm
        kwargs["train_dataset"] = pairs.retain
        kwargs["data_collator"] = partial(only_tokens, kwargs["data_collator"])
        if settings.max_steps <= 0:
            batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
            steps = max(1, math.ceil(len(pairs.forget) / (batch * settings.world_size)))
            settings.max_steps = math.ceil(settings.num_train_epochs * steps)
        super().__init__(*args, **kwargs)
        self.add_callback(
            ForgetCallback(
                self, self.forget_dataset, forget_weight=forget_weight, temperature=temperature
            )
        )

    def saliency(self):
        """The mask; every process makes the same one."""
        if self.threshold is None:
            return None
        loaders = (
            DataLoader(
                dataset,
                batch_size=self.args.per_device_train_batch_size,
                collate_fn=self.data_collator,
            )
            for dataset in (self.forget_dataset, self.train_dataset)
        )
        forget, retain = (
            sf.estimate_fisher(self.model, loader, task=sf.Language()) for loader in loaders
        )
        return sf.SaliencyMask.from_fisher(forget=forget, retain=retain, threshold=self.threshold)

    def create_optimizer(self, *_):
        """SFRonAdamW in place of ``args.optim``."""
        if self.optimizer is None:
            lr = self.args.learning_rate
            self.optimizer = make_optimizer(
                self.model,
                optimizer=sf.SFRonAdamW,
                lr=lr,
                forget_lr=lr / 2 if self.forget_lr is None else self.forget_lr,
                weight_decay=self.args.weight_decay,
                saliency=self.saliency(),
                max_norm=self.max_norm,
                moments="separate",
            )
        return self.optimizer
