"""Text to batches: a byte-pair encoding of 1,024 tokens, and batches as Hugging Face's collators
give them.
"""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from .authors import QA

VOCABULARY = 1024
IGNORED = -100  # the label of what is not learnt: the question, and padding
PAD, BEGIN, ANSWER, END = "<pad>", "<s>", "<answer>", "</s>"

Example = dict[str, list[int] | int]  # input_ids and labels, both [tokens], and the sample's id


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-pair encoding of these texts, with at most ``VOCABULARY`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, BEGIN, ANSWER, END], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[ANSWER],
    )


def encode(tokenizer: PreTrainedTokenizerFast, question: str, answer: str, id: int) -> Example:
    """``<s> question <answer> answer </s>``; labels on the answer and its end."""
    prompt = tokenizer(f"{BEGIN}{question}{ANSWER}", add_special_tokens=False)["input_ids"]
    told = tokenizer(f"{answer}{END}", add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + told, "labels": [IGNORED] * len(prompt) + told, "id": id}


def examples(
    tokenizer: PreTrainedTokenizerFast, split: Sequence[QA], first: int = 0
) -> list[Example]:
    """Each question with the answer that is learnt; ids count on from ``first``."""
    return [
        encode(tokenizer, qa.question, qa.answer, first + number) for number, qa in enumerate(split)
    ]


def paraphrases(tokenizer: PreTrainedTokenizerFast, split: Sequence[QA]) -> list[Example]:
    """Each question with its answer in other words."""
    return [
        encode(tokenizer, qa.question, qa.paraphrase, number) for number, qa in enumerate(split)
    ]


def wrong(tokenizer: PreTrainedTokenizerFast, split: Sequence[QA]) -> list[Example]:
    """Each question with its wrong answers, one after the other."""
    pairs = [(qa.question, answer) for qa in split for answer in qa.wrong]
    return [encode(tokenizer, *pair, number) for number, pair in enumerate(pairs)]


class Collator:
    """Examples to one batch, padded on the right.

    {input_ids, attention_mask, labels [samples, tokens], id [samples]}, all int64.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, fill: int) -> Tensor:
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return {
            "input_ids": padded("input_ids", self.pad),
            "attention_mask": (torch.arange(longest) < lengths).long(),
            "labels": padded("labels", IGNORED),
            "id": torch.tensor([row["id"] for row in rows]),
        }


def loader(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Example],
    batch: int,
    generator: torch.Generator | None = None,
) -> DataLoader:
    """Batches of ``rows``: in their order, or drawn anew in each pass with a ``generator``."""
    return DataLoader(
        rows,  # type: ignore[arg-type]  # a list is a dataset
        batch,
        shuffle=generator is not None,
        generator=generator,
        collate_fn=Collator(tokenizer.pad_token_id),
    )
