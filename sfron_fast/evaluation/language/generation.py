"""What a language model answers by itself: greedy decoding of the questions of batches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batches import model_device
from ...errors import integer, require
from ...models.modes import evaluating
from ...tasks.labels import IGNORED
from ...tasks.language import Language
from .rouge import Rouge, rouge_l


def answers(
    model: nn.Module,
    tokenizer: Any,
    loader: Iterable[Any],
    *,
    max_new_tokens: int = 200,
    name: str = "loader",
) -> tuple[list[str], list[str]]:
    """(what the model answers, what the labels say), a text each a sample, without special tokens.

    A question is what comes before the first label of a sample. The questions of a batch are padded
    on the left and answered together, the likeliest token each time, to the end-of-sequence token
    or to ``max_new_tokens`` (open-unlearning: 200).

    Args:
        model: with Hugging Face's ``generate``.
        tokenizer: with ``batch_decode`` and an end-of-sequence or padding token.
        loader: batches as for ``token_stats``.

    Raises:
        ValueError: a model that cannot generate, a tokenizer without either token, batches of
            another form, a sample without question or label.
    """
    good = callable(getattr(model, "generate", None))
    require(good, "model", "one with generate()", type(model).__name__, "pass Hugging Face's model")
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), None)
    require(pad is not None, "tokenizer", "a padding or end-of-sequence token", "neither")
    assert pad is not None
    limit = integer("max_new_tokens", max_new_tokens, 1)
    device = model_device(model)
    told: list[str] = []
    wanted: list[str] = []
    with evaluating(model), torch.no_grad():
        for batch in Language().prepared(loader, torch.device("cpu"), name):
            prompts = questions(batch, name)
            ids, mask = left_padded(prompts, pad)
            found = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=limit,
                pad_token_id=pad,
            )
            told += tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
            labels = [row[row != IGNORED] for row in batch["labels"]]
            wanted += tokenizer.batch_decode(labels, skip_special_tokens=True)
    require(bool(told), name, "at least one sample", "none", "pass a DataLoader, no generator")
    return told, wanted


def rouge_scores(
    model: nn.Module,
    tokenizer: Any,
    loader: Iterable[Any],
    *,
    max_new_tokens: int = 200,
    name: str = "loader",
) -> list[Rouge]:
    """ROUGE-L of each sample's greedy answer against its labels; TOFU reports the mean recall.

    Arguments and errors as ``answers`` has them.
    """
    pairs = answers(model, tokenizer, loader, max_new_tokens=max_new_tokens, name=name)
    return [rouge_l(told, wanted) for told, wanted in zip(*pairs, strict=True)]


def questions(batch: Any, name: str) -> list[Tensor]:
    """Of each sample the tokens before its first label, without padding.

    Raises:
        ValueError: a sample without label, or whose first token is labelled already.
    """
    found = []
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    for row, there, wanted in zip(ids, mask, labels, strict=True):
        counted = (wanted != IGNORED).nonzero().flatten()
        require(len(counted) > 0, name, "a label in each sample", "a sample with none")
        first = int(counted[0])
        question = row[:first][there[:first] != 0]
        remedy = "mask the question's labels with -100"
        require(len(question) > 0, name, "a question before each answer", "none", remedy)
        found.append(question)
    return found


def left_padded(rows: list[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), int64 [rows, longest], each row at the right end."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return ids, mask
