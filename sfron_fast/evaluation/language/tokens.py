"""What a causal language model says of every labelled token: the one thing metrics are made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batches import model_device, move_tensors
from ...errors import require
from ...models.modes import evaluating
from ...ops.linear_logp_stats import LogpStats, of_logits

IGNORED = -100  # the label of a token that is not learnt
KEYS = ("input_ids", "attention_mask", "labels")
AT_ONCE = 1 << 24  # logits that are looked at together, in fp32
_FORM = "a mapping with int64 input_ids, attention_mask and labels, each [samples, tokens]"


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Of each labelled token, sample after sample, on the CPU: fp64 [tokens], correct bool.

    The labels that count are those after the first token, which nothing predicts.
    """

    logp: Tensor  # log p(label)
    correct: Tensor  # the label is the likeliest token
    entropy: Tensor  # -sum p log p
    variance: Tensor  # of log p under p
    lengths: Tensor  # int64 [samples]

    def samples(self, of: Tensor) -> tuple[Tensor, ...]:
        """``of``, one of the statistics, cut into samples."""
        return of.split(self.lengths.tolist())

    def mean(self, of: Tensor) -> Tensor:
        """Of each sample the mean of a statistic, fp64 [samples]."""
        sample = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        sums = torch.zeros(len(self.lengths), dtype=torch.float64)
        return sums.index_add_(0, sample, of.double()) / self.lengths

    def without_last(self) -> "TokenStats":
        """Without the last labelled token of each sample, its end-of-sequence token.

        Raises:
            ValueError: a sample has no other.
        """
        alone = (self.lengths < 2).nonzero().flatten().tolist()
        expected = "two labelled tokens or more in each sample, of which the last does not count"
        require(not alone, "stats", expected, f"one in samples {alone[:3]}", "leave them out")
        kept = torch.ones(len(self.logp), dtype=torch.bool)
        kept[self.lengths.cumsum(0) - 1] = False
        return TokenStats(
            self.logp[kept],
            self.correct[kept],
            self.entropy[kept],
            self.variance[kept],
            self.lengths - 1,
        )


def token_stats(model: nn.Module, loader: Iterable[Any], *, name: str = "loader") -> TokenStats:
    """One pass over ``loader``, in eval mode, without gradients.

    Args:
        model: ``model(input_ids=..., attention_mask=...)`` returns logits [samples, tokens,
            vocabulary] or an output with such ``logits``, as Hugging Face's causal models do.
        loader: batches as collators give them: {input_ids, attention_mask, labels}, int64 [samples,
            tokens] each; a label is -100 on the question and on padding. Labels are those of the
            tokens themselves: they are shifted here. Metrics that compare two passes want the same
            samples in the same order.
        name: what errors call the loader.

    The statistics are computed from the logits of labelled positions alone, in fp32 or, of an fp64
    model, in fp64.

    Raises:
        ValueError: batches of another form, labels outside the vocabulary, logits of another shape
            or with NaN, a sample without label, no sample at all.
    """
    device = model_device(model)
    found: list[LogpStats] = []
    lengths: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for batch in loader:
            check_batch(batch, name)
            moved = move_tensors({key: batch[key] for key in batch if key in KEYS}, device)
            labels = moved.pop("labels")[:, 1:]
            if not len(labels):
                continue
            counted = labels != IGNORED
            here = counted.sum(1).cpu()
            empty = int((here == 0).sum())
            expected = "a label after the first token in each sample"
            remedy = "leave them out; truncation may have cut the answer off"
            require(empty == 0, name, expected, f"{empty} samples with none", remedy)
            logits = logits_of(model(**with_position_ids(moved)), moved["input_ids"], name)
            found += _rows(logits[:, :-1], labels, counted, name)
            lengths.append(here)
    require(bool(lengths), name, "at least one sample", "none", "pass a DataLoader, no generator")
    parts = [torch.cat([t.cpu() for t in field]) for field in zip(*found, strict=True)]
    logp, correct, entropy, variance = parts
    return TokenStats(
        logp.double(), correct, entropy.double(), variance.double(), torch.cat(lengths)
    )


def check_batch(batch: Any, name: str) -> None:
    """Refuse what is no batch of a collator.

    Raises:
        ValueError: a missing key, another dtype or shape.
    """
    good = isinstance(batch, Mapping)
    require(good, name, f"batches that are {_FORM}", type(batch).__name__, "use a collator")
    missing = [key for key in KEYS if key not in batch]
    require(not missing, name, f"batches that are {_FORM}", f"none of {', '.join(missing)}")
    shapes = {key: (batch[key].dtype, tuple(batch[key].shape)) for key in KEYS}
    ids = batch["input_ids"]
    same = all(batch[key].shape == ids.shape for key in KEYS) and ids.dim() == 2
    integers = batch["labels"].dtype == ids.dtype == torch.int64
    require(same and integers, name, f"batches that are {_FORM}", shapes)


def with_position_ids(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under padding on the left also the places of the tokens, which GPT-2 would count from the
    padding on.
    """
    mask = inputs["attention_mask"]
    if bool((mask[:, 0] != 0).all()):
        return inputs
    places = (mask.long().cumsum(1) - 1).clamp_min(0)
    return {**inputs, "position_ids": places}


def logits_of(output: Any, ids: Tensor, name: str) -> Tensor:
    """The logits [samples, tokens, vocabulary] of a model's output.

    Raises:
        ValueError: there are none, or they are of another shape.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    found: object = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
    good = isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape
    expected = f"a model that gives {name}'s batches logits [{ids.shape[0]}, {ids.shape[1]}, ...]"
    require(good, "model", expected, found, "pass a causal language model")
    assert isinstance(logits, Tensor)
    return logits


def _rows(logits: Tensor, labels: Tensor, counted: Tensor, name: str) -> list[LogpStats]:
    """Statistics of the labelled rows, a bounded number of logits at a time."""
    picked = labels[counted]
    last = logits.shape[-1] - 1
    low, high = int(picked.min()), int(picked.max())
    require(low >= 0 and high <= last, name, f"labels 0 to {last}, or -100", f"{low} to {high}")
    sample, place = counted.nonzero(as_tuple=True)
    found = []
    for part in torch.arange(len(sample), device=logits.device).split(
        max(1, AT_ONCE // (last + 1))
    ):
        rows = logits[sample[part], place[part]]
        if rows.dtype != torch.float64:
            rows = rows.float()
        stats = of_logits(rows, picked[part])
        remedy = "the model diverged: lower the forget weight or lr"
        require(not bool(stats.logp.isnan().any()), "model", "finite logits", "NaN or inf", remedy)
        found.append(stats)
    return found
