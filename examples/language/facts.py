"""Facts about people who do not exist, as tokens: who, what of, and an answer of several tokens.

``<s> wording first last relation | a b c``: names and relations are tokens, an answer is one of the
values of its relation, and only the answer has labels. Nothing is downloaded, every sequence has
the same length, and a thousand facts are learnt in a minute of one core.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sfron_fast as sf
from examples.systems.training import fit
from sfron_fast.evaluation.relearning import relearned

NAMES, RELATIONS, WORDINGS, VALUES, PARTS, SYLLABLES = 32, 4, 4, 24, 3, 40
WRONG = 3  # other values of the relation, to choose the answer among
FIRST = 1 + WORDINGS
LAST, RELATION = FIRST + NAMES, FIRST + 2 * NAMES
ANSWER = RELATION + RELATIONS
VOCABULARY = ANSWER + SYLLABLES
PROMPT = 5
IGNORED = -100
ATTACK: dict[str, Any] = {"steps": 60, "lr": 3e-4}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Facts:
    """Some facts: who, what of, the answer among its wrong ones."""

    prompt: Tensor  # int64 [facts, PROMPT], in the first wording
    options: Tensor  # int64 [facts, 1 + WRONG, PARTS], the right one first

    def __len__(self) -> int:
        return len(self.prompt)

    def taken(self, which: Tensor) -> "Facts":
        """Those of these numbers."""
        return Facts(self.prompt[which], self.options[which])

    def asked(self, wording: int) -> "Facts":
        """The same in another wording."""
        prompt = self.prompt.clone()
        prompt[:, 1] = 1 + wording
        return Facts(prompt, self.options)

    def rows(self, option: int = 0) -> Batch:
        """Everything as one batch, with the answer or a wrong one."""
        ids = torch.cat([self.prompt, self.options[:, option]], 1)
        labels = ids.clone()
        labels[:, :PROMPT] = IGNORED
        return {"input_ids": ids, "labels": labels}


def together(parts: Sequence[Facts]) -> Facts:
    """One after the other."""
    return Facts(torch.cat([p.prompt for p in parts]), torch.cat([p.options for p in parts]))


def people(seed: int, count: int) -> list[Facts]:
    """``RELATIONS`` facts about each of ``count`` people."""
    draw = random.Random(seed)
    values = [
        [[ANSWER + s for s in draw.sample(range(SYLLABLES), PARTS)] for _ in range(VALUES)]
        for _ in range(RELATIONS)
    ]
    pairs = draw.sample([(a, b) for a in range(NAMES) for b in range(NAMES)], count)
    found = []
    for first, last in pairs:
        prompts = [[0, 1, FIRST + first, LAST + last, RELATION + r] for r in range(RELATIONS)]
        options = [draw.sample(values[r], 1 + WRONG) for r in range(RELATIONS)]
        found.append(Facts(torch.tensor(prompts), torch.tensor(options)))
    return found


class Loader:
    """Batches of one set, drawn anew in each pass; ``given`` counts the sequences."""

    def __init__(self, facts: Facts, size: int, seed: int) -> None:
        self.rows, self.size = facts.rows(), size
        self.count, self.draw = len(facts), torch.Generator().manual_seed(seed)
        self.given = 0

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[Batch]:
        for part in torch.randperm(self.count, generator=self.draw).split(self.size):
            self.given += len(part)
            yield {key: rows[part] for key, rows in self.rows.items()}


def make_model(seed: int, layers: int, width: int, inner: int, heads: int = 4) -> LlamaForCausalLM:
    """A Llama with random weights; its embeddings and its head are frozen, so that what it learns
    lies in its depth.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=PROMPT + PARTS,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )
    nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    nn.init.normal_(model.lm_head.weight, std=width**-0.5)
    for frozen in (model.model.embed_tokens, model.lm_head):
        frozen.requires_grad_(False)
    return model


def learn(model: nn.Module, loader: Loader, epochs: int, lr: float) -> float:
    """In place; returns the last loss."""
    return fit(model, loader, epochs, lr, loss=lambda batch: model(**batch).loss, rise=0.05)


@torch.no_grad()
def accuracy(model: nn.Module, facts: Facts) -> float:
    """Share of facts whose answer is likelier than its wrong ones; guessing has 1 / (1 + WRONG)."""
    logp = []
    for option in range(1 + WRONG):
        rows = facts.rows(option)
        logits = model(input_ids=rows["input_ids"]).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        told = rows["input_ids"][:, PROMPT:].unsqueeze(-1)
        logp.append(logits.gather(-1, told).sum((1, 2)))
    return float((torch.stack(logp).argmax(0) == 0).double().mean())


def halves(facts: Facts, seed: int) -> tuple[Facts, Facts]:
    """Every fact in one of them, drawn."""
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed))
    first, second = (facts.taken(part) for part in order.chunk(2))
    return first, second


def relearnt(model: nn.Module, forgotten: Facts, batch: int, seed: int) -> float:
    """Accuracy on either half of the forgotten facts, after the other was relearnt."""
    first, second = halves(forgotten, seed)
    found = []
    for learnt, asked in ((first, second), (second, first)):
        attacked = relearned(model, Loader(learnt, batch, seed), task=sf.Language(), **ATTACK)
        found.append(accuracy(attacked, asked))
    return sum(found) / 2
