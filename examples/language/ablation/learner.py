"""A small Llama that learns statements, and what it answers."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sfron_fast as sf
from examples.systems.training import fit

from ..tokens import Collator
from .arithmetic import END, WORDS, P, Statement

WIDTH, LAYERS, HEADS, INNER, LONGEST = 128, 3, 4, 384, 48
LONG = 12  # tokens: longer statements have batches of their own, of a quarter as many
TOKENS = ("pad", *map(str, range(P)), *WORDS, END)
NUMBER = {token: number for number, token in enumerate(TOKENS)}
TASK = sf.Language()


def make_model(seed: int) -> LlamaForCausalLM:
    """Random weights from ``seed``."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            intermediate_size=INNER,
            max_position_embeddings=LONGEST,
            pad_token_id=NUMBER["pad"],
            bos_token_id=NUMBER["pad"],
            eos_token_id=NUMBER[END],
        )
    )


class Batches:
    """Batches of statements in an order drawn anew each pass: ``input_ids``, ``attention_mask``,
    ``labels`` (on the answers) and ``id`` as the language task reads them.
    """

    def __init__(self, statements: Sequence[Statement], size: int, seed: int) -> None:
        rows = []
        for number, said in enumerate(statements):
            prompt, answer = ([NUMBER[t] for t in part] for part in (said.prompt, said.answer))
            labels = [-100] * len(prompt) + answer
            rows.append({"input_ids": prompt + answer, "labels": labels, "id": number})
        self.short = [row for row in rows if len(row["labels"]) <= LONG]
        self.long = [row for row in rows if len(row["labels"]) > LONG]
        self.size, self.draw, self.collate = size, random.Random(seed), Collator(NUMBER["pad"])

    def __len__(self) -> int:
        """Batches a pass."""
        return -(-len(self.short) // self.size) - (-len(self.long) // (self.size // 4))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        groups = []
        for rows, size in ((self.short, self.size), (self.long, self.size // 4)):
            order = self.draw.sample(rows, len(rows))
            groups += [order[at : at + size] for at in range(0, len(order), size)]
        for group in self.draw.sample(groups, len(groups)):
            yield self.collate(group)


def learn(model: LlamaForCausalLM, batches: Batches, epochs: int, lr: float) -> LlamaForCausalLM:
    """In place."""
    cpu = torch.device("cpu")
    fit(model, batches, epochs, lr, loss=lambda b: TASK.mean_loss(model, TASK.prepare(b, cpu)))
    return model


@torch.no_grad()
def ask(model: LlamaForCausalLM, statements: Sequence[Statement], new: int = 1) -> list[list[str]]:
    """The likeliest tokens after each prompt, at most ``new``; to "end", which is among them."""
    found: list[list[str]] = [[] for _ in statements]
    lengths = {len(said.prompt) for said in statements}
    for length in lengths:
        places = [n for n, said in enumerate(statements) if len(said.prompt) == length]
        ids = torch.tensor([[NUMBER[t] for t in statements[n].prompt] for n in places])
        told = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new
        )
        for place, row in zip(places, told[:, length:].tolist(), strict=True):
            words = [TOKENS[token] for token in row]
            found[place] = words[: words.index(END) + 1] if END in words else words
    return found


def known(model: LlamaForCausalLM, statements: Sequence[Statement]) -> float:
    """The share of statements whose answer, one token, is right."""
    told = ask(model, statements)
    return sum(t == list(s.answer) for t, s in zip(told, statements, strict=True)) / len(told)
