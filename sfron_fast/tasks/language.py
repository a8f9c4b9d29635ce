"""Language: batches of token sequences as Hugging Face's collators give them."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import move_tensors
from ..errors import require
from ..heads import LinearLoss, linear_adaptive_cross_entropy
from ..heads.fused import is_fused, through
from ..losses import adaptive_cross_entropy_parts, adaptive_weights
from ..weights import with_ceiling
from .collated import Each, assistant_labels, packed, rows_of, sums, token_losses, units_of
from .labels import IGNORED
from .outputs import inner, logits_of
from .task import Task, Units

Reduction = Literal["mean", "sum"]

OURS = ("labels", "assistant_masks", "sample_index", "id")  # what the model is not given
IN_PLACE_LABELS = ("ForMaskedLM", "ForTokenClassification")  # position i is asked for its own label


class Tokens(NamedTuple):
    """What the model says of each position, what is right there, and whose position it is."""

    logits: Tensor  # [rows, positions, classes]
    labels: Tensor  # int64 [rows, positions], -100 where nothing is asked
    sample: Tensor | None  # int64 [rows, positions]; None = each row is a sample


class Language(Task):
    """Token sequences: the cross-entropy of a sequence's labelled tokens, in nats.

    A batch is a mapping of tensors [samples, tokens] with ``input_ids``, ``labels`` (-100 on the
    prompt and on padding) and what else the model takes; ``id`` [samples], if there, numbers the
    samples and is not given to the model. Labels are those of the inputs themselves: they are
    shifted here, once, for a causal model, and not for a masked or an encoder-decoder one. Labels
    where ``attention_mask`` is 0 do not count, and position ids of a causal model begin after the
    left padding.

    Of a chat template's ``assistant_masks`` labels are made if there are none. Packed rows, whose
    ``position_ids`` begin again at 0 without an ``attention_mask``, hold a sample for each
    beginning; an int64 ``sample_index`` [rows, tokens], from 0, says the same. A Fisher of samples
    wants one sample a row.

    The model returns logits [rows, tokens, classes], as a tensor or as ``.logits``. Of one that
    ``integrations.transformers.fuse_head`` has seen, only a teacher's logits are made.

    Args:
        reduction: a sample's loss is the "mean" over its labelled tokens, or their "sum" (NPO,
            DPO); 0 without any.
        shift: whether position i predicts token i + 1; None = as the model is (its ``loss_type``
            and ``config.is_encoder_decoder``), True of a plain module.

    Raises:
        ValueError: a setting out of range, by name.
    """

    in_nats = True

    def __init__(self, reduction: Reduction = "mean", shift: bool | None = None) -> None:
        choices = get_args(Reduction)
        known = " or ".join(map(repr, choices))
        require(reduction in choices, "reduction", known, repr(reduction))
        require(shift in (None, True, False), "shift", "True, False or None", repr(shift))
        self.reduction, self.shift = reduction, shift

    def prepare(self, batch: Any, device: torch.device, name: str = "loader") -> dict[str, Any]:
        """The batch with labels, on ``device``; packed rows get a ``sample_index``.

        Raises:
            ValueError: no mapping, no labels, or labels that are not int64 [samples, tokens].
        """
        collator = "use a collator of transformers, for example DataCollatorForSeq2Seq"
        mapping, found = isinstance(batch, Mapping), type(batch).__name__
        require(mapping, name, "mappings with input_ids and labels", found, collator)
        batch = dict(batch)
        if batch.get("labels") is None:
            batch["labels"] = assistant_labels(batch, name)
        labels = batch["labels"]
        right = isinstance(labels, Tensor) and labels.dtype == torch.int64
        found = f"{labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        require(right, name, "labels that are an int64 tensor", found, collator)
        one_each = "one label a sample is Classification(), which takes such batches too"
        require(labels.dim() == 2, name, "labels [samples, tokens]", tuple(labels.shape), one_each)
        if "sample_index" not in batch and packed(batch):
            begins = batch["position_ids"] == 0
            batch["sample_index"] = begins.flatten().cumsum(0).view_as(labels) - 1
        return move_tensors(batch, device)

    def samples(self, batch: Any) -> int:
        """Sequences, of which a packed row has several."""
        index = batch.get("sample_index")
        if index is None:
            return len(batch["labels"])
        return int(index.max()) + 1 if index.numel() else 0

    def outputs(self, model: nn.Module, batch: Any) -> Tokens:
        """The logits, and the labels that stand beside them."""
        inputs, labels, sample = self.model_inputs(model, batch)
        logits = logits_of(model(**inputs), self.argument)
        found = tuple(logits.shape)
        wanted = f"logits [{', '.join(map(str, labels.shape))}, classes]"
        require(logits.shape[:-1] == labels.shape, self.argument, wanted, found)
        return Tokens(logits, labels, sample)

    def model_inputs(
        self, model: nn.Module, batch: Any
    ) -> tuple[dict[str, Any], Tensor, Tensor | None]:
        """What the model is given, by keyword; each of its positions' label and sample."""
        bare = inner(model)
        config, takes = getattr(bare, "config", None), inspect.signature(bare.forward).parameters
        inputs = {key: value for key, value in batch.items() if key not in OURS}
        labels, mask = batch["labels"], batch.get("attention_mask")
        sample = batch.get("sample_index")
        if getattr(config, "is_encoder_decoder", False):
            if inputs.get("decoder_input_ids") is None:
                inputs["decoder_input_ids"] = bare.prepare_decoder_input_ids_from_labels(labels)
            return inputs, labels, sample
        if mask is not None and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORED)
        if getattr(config, "use_cache", None) and "use_cache" in takes:
            inputs["use_cache"] = False
        shift = self.shift
        if shift is None:
            shift = getattr(bare, "loss_type", None) not in IN_PLACE_LABELS
        if not shift:
            return inputs, labels, sample
        if mask is not None and inputs.get("position_ids") is None and "position_ids" in takes:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if sample is not None:  # what follows the last token of a sample is another's first
            following = torch.cat([sample[:, 1:], sample[:, -1:]], 1)
            labels = labels.masked_fill(following != sample, IGNORED)
        return inputs, labels, sample

    def losses_of(self, outputs: Tokens, batch: Any) -> Tensor:
        """Each sequence's loss [samples]."""
        return self._reduced(self._each(outputs), batch)[0]

    def check(self, model: nn.Module, batch: Any) -> None:
        """A look at the labels, by the outputs of the batch."""
        with torch.no_grad():
            self._losses(model, batch)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The same from the batch; a fused head makes no logits."""
        return self._reduced(self._losses(model, batch), batch)[0]

    def mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean of the sequences' losses []: of those that have a labelled token."""
        if self._fuses(model):
            return self._by_head(model, batch, temperature=0.0).loss
        tokens = self.outputs(model, batch)
        if self._served(tokens):
            return adaptive_cross_entropy_parts(tokens.logits, tokens.labels, 0.0)[0]
        values, lengths = self._reduced(self._each(tokens), batch)
        return values.sum() / (lengths > 0).sum().clamp_min(1)

    def adaptive_loss(
        self, model: nn.Module, batch: Any, temperature: float, floor: float
    ) -> tuple[Tensor, Tensor]:
        """The adaptive loss [] and the losses [samples], by one kernel where rows are samples; one
        without a labelled token weighs nothing.
        """
        if self._fuses(model):
            return self._by_head(model, batch, temperature=temperature, floor=floor)[:2]
        tokens = self.outputs(model, batch)
        if self._served(tokens):
            return adaptive_cross_entropy_parts(*tokens[:2], temperature, floor=floor)[:2]
        values, weights = self._weighted(self._each(tokens), batch, temperature, floor)
        return (weights * values).sum(), values

    def ceiling_loss(
        self,
        model: nn.Module,
        batch: Any,
        temperature: float,
        floor: float,
        ceiling: float,
        reference: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As ``adaptive_loss``, with a ceiling."""
        if self._fuses(model):

            def weigh(losses: Tensor, _: slice) -> tuple[Tensor, Tensor]:
                raw = losses.double().clamp_min(floor).pow(-temperature)
                return with_ceiling(raw, losses, ceiling, reference), raw

            return self._by_head(model, batch, weigh=weigh)[:2]
        values, weights = self._weighted(self._losses(model, batch), batch, temperature, floor)
        return (with_ceiling(weights, values, ceiling, reference) * values).sum(), values

    def token_ceiling_loss(
        self,
        model: nn.Module,
        batch: Any,
        temperature: float,
        floor: float,
        ceiling: float,
        reference: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``ceiling_loss``, of each token: one that has reached it counts for no more, and the
        others of its sequence go on. Also whether any is left. Not for sums (ValueError).
        """
        means, wanted = self.reduction == "mean", "Language('mean'), with a ceiling of tokens"
        require(means, self.argument, wanted, f"Language({self.reduction!r})")
        each, limit = self._losses(model, batch), ceiling * reference
        values, weights = self._weighted(each, batch, temperature, floor)
        reached = each.losses >= limit  # not of NaN
        capped = each._replace(losses=each.losses.masked_fill(reached, limit))
        left = (each.counted & ~reached).any()
        return (weights * self._reduced(capped, batch)[0]).sum(), values, left

    def counted(self, model: nn.Module, batch: Any) -> Tensor:
        """The sequences that have a labelled token."""
        _, labels, sample = self.model_inputs(model, batch)
        asked = labels != IGNORED
        if sample is None:
            return asked.any(1)
        found = asked.new_zeros(self.samples(batch), dtype=torch.int64)
        return found.index_add(0, sample.flatten(), asked.flatten().long()) > 0

    def units(self, outputs: Tokens, batch: Any) -> Units:
        """The labelled tokens, sample after sample."""
        return units_of(self._each(outputs), self.samples(batch))

    def units_by(self, model: nn.Module, batch: Any) -> Units:
        """The same from the batch; a fused head makes no logits."""
        return units_of(self._losses(model, batch), self.samples(batch))

    def logits(self, outputs: Tokens, batch: Any) -> Tensor:
        """The logits of the labelled tokens [units, classes], row after row."""
        return outputs.logits[outputs.labels != IGNORED]

    def unit_labels(self, outputs: Tokens, batch: Any) -> Tensor:
        """The labels that count [units], row after row."""
        return outputs.labels[outputs.labels != IGNORED]

    def targets(self, batch: Any) -> Tensor:
        """The labels [rows, tokens], not shifted."""
        return batch["labels"]

    def correct(self, outputs: Tokens, batch: Any, name: str) -> Tensor:
        """Whether the likeliest token is the labelled one, bool [units]."""
        labelled = outputs.labels != IGNORED
        return outputs.logits.argmax(-1)[labelled] == outputs.labels[labelled]

    def tells_right(self, model: nn.Module) -> bool:
        """Of logits that are there; a fused head would have to make them."""
        return not is_fused(model)

    def _each(self, outputs: Tokens) -> Each:
        losses = token_losses(outputs.logits, outputs.labels)
        return Each(losses, outputs.labels != IGNORED, outputs.sample)

    def _losses(self, model: nn.Module, batch: Any) -> Each:
        """``_each`` of the batch; a fused head makes no logits."""
        if not is_fused(model):
            return self._each(self.outputs(model, batch))
        inputs, labels, sample = self.model_inputs(model, batch)
        logp, _ = through(model, inputs, labels)
        return Each(-logp.view(labels.shape), labels != IGNORED, sample)

    def _fuses(self, model: nn.Module) -> bool:
        """Whether head and loss are one call."""
        return self.reduction == "mean" and is_fused(model)

    def _by_head(self, model: nn.Module, batch: Any, **settings: Any) -> LinearLoss:
        """``linear_adaptive_cross_entropy`` within the model's forward pass."""
        inputs, labels, sample = self.model_inputs(model, batch)
        index = rows_of(Each(labels, labels, sample)).flatten()
        loss = linear_adaptive_cross_entropy
        return through(model, inputs, labels, loss=loss, sample_index=index, **settings)

    def _reduced(self, each: Each, batch: Any) -> tuple[Tensor, Tensor]:
        """Each sequence's loss, and how many tokens it is of: [samples]."""
        total, lengths = sums(each, self.samples(batch))
        return total if self.reduction == "sum" else total / lengths.clamp_min(1), lengths

    def _weighted(
        self, each: Each, batch: Any, temperature: float, floor: float
    ) -> tuple[Tensor, Tensor]:
        """Losses and adaptive weights [samples]; 0 of a sequence without a labelled token."""
        values, lengths = self._reduced(each, batch)
        some = lengths > 0
        weights = torch.zeros_like(values)
        if bool(some.any()):
            weights[some] = adaptive_weights(values[some], temperature, floor)
        return values, weights

    def _served(self, outputs: Tokens) -> bool:
        """Whether the kernel's samples are ours: rows, and means over their tokens."""
        return self.reduction == "mean" and outputs.sample is None
