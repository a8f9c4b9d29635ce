"""What a causal language model says of every labelled token: the one thing metrics are made of."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batches import model_device
from ...errors import require
from ...models.modes import evaluating
from ...ops.dtypes import wide
from ...ops.linear_logp_stats import LogpStats, of_logits
from ...tasks.labels import IGNORED
from ...tasks.language import Language, Tokens

AT_ONCE = 1 << 24  # logits that are looked at together, in fp32


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
        model: a causal language model, with logits for the batches of ``sf.Language``.
        loader: batches as ``sf.Language`` takes them: {input_ids, attention_mask, labels}, int64
            [samples, tokens] each, labels those of the tokens themselves and -100 on the question
            and on padding. Metrics that compare two passes want the same samples in the same order.
        name: what errors call the loader.

    The statistics are computed from the logits of labelled positions alone, in fp32 or, of an fp64
    model, in fp64.

    Raises:
        ValueError: batches of another form, labels outside the vocabulary, NaN among the logits, a
            sample without label, no sample at all.
    """
    task = Language()
    found: list[LogpStats] = []
    lengths: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for batch in task.prepared(loader, model_device(model), name):
            tokens = task.outputs(model, batch)
            sample = sample_of_each(tokens)
            here = torch.bincount(sample, minlength=task.samples(batch)).cpu()
            empty = int((here == 0).sum())
            expected = "a label after the first token in each sample"
            remedy = "leave them out; truncation may have cut the answer off"
            require(empty == 0, name, expected, f"{empty} samples with none", remedy)
            found += _rows(tokens, sample.argsort(stable=True), name)
            lengths.append(here)
    require(bool(lengths), name, "at least one sample", "none", "pass a DataLoader, no generator")
    parts = [torch.cat([t.cpu() for t in field]) for field in zip(*found, strict=True)]
    logp, correct, entropy, variance = parts
    return TokenStats(
        logp.double(), correct, entropy.double(), variance.double(), torch.cat(lengths)
    )


def sample_of_each(tokens: Tokens) -> Tensor:
    """The sample of each labelled token, int64 [tokens]."""
    row, place = (tokens.labels != IGNORED).nonzero(as_tuple=True)
    return row if tokens.sample is None else tokens.sample[row, place]


def _rows(tokens: Tokens, order: Tensor, name: str) -> list[LogpStats]:
    """Statistics of the labelled tokens in ``order``, a bounded number of logits at a time."""
    row, place = (t[order] for t in (tokens.labels != IGNORED).nonzero(as_tuple=True))
    labels, last = tokens.labels[row, place], tokens.logits.shape[-1] - 1
    low, high = int(labels.min()), int(labels.max())
    require(low >= 0 and high <= last, name, f"labels 0 to {last}, or -100", f"{low} to {high}")
    found = []
    for part in torch.arange(len(row), device=row.device).split(max(1, AT_ONCE // (last + 1))):
        logits = wide(tokens.logits[row[part], place[part]])
        stats = of_logits(logits, labels[part])
        remedy = "the model diverged: lower the forget weight or lr"
        require(not bool(stats.logp.isnan().any()), "model", "finite logits", "NaN or inf", remedy)
        found.append(stats)
    return found
