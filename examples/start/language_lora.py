"""A causal language model forgets what it knows of some people, by LoRA; run it from the root:

    python -m examples.start.language_lora

Needs `.[frameworks]`, downloads nothing: a small Llama with random weights learns the door codes of
people who do not exist. Then adapters are trained that make it forget six of them, and are merged:
beside the old weights an adapter could be taken off again. For a model of your own put
`AutoModelForCausalLM.from_pretrained` in the place of `make_model` and `learn`; for jsonl files
there is `python -m sfron_fast unlearn --lora 16`.
"""

import argparse
import random
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import sfron_fast as sf
from sfron_fast.evaluation.language import answer_probability, token_stats

FIRST = ("Ada", "Bela", "Cleo", "Dora", "Emil", "Finn", "Gwen", "Hugo", "Iris", "Jack")
LAST = ("Abel", "Berg", "Cole", "Dahl", "Egge", "Falk", "Gray", "Hahn", "Iver", "Jung")
DIGITS = 6  # of a code
IGNORED = -100  # the label of what is not learnt: the question


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--people", type=int, default=72, help="a twelfth is forgotten; 100 at most"
    )
    parser.add_argument("--epochs", type=int, default=150, help="of the training before")
    parser.add_argument("--cycles", type=int, default=50, help="of unlearning")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--budget", type=float, default=0.05, help="what forgetting may cost")
    return parser.parse_args(arguments)


def make_tokenizer() -> Tokenizer:
    words = ["?", *("The", "code", "of", "is"), *FIRST, *LAST, *map(str, range(10))]
    known = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def make_codes(people: int) -> dict[str, list[dict[str, Tensor]]]:
    """Sets of {input_ids, labels}, int64 [tokens]; the model never learns those of the holdout."""
    draw, tokenizer = random.Random(0), make_tokenizer()
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    draw.shuffle(names)

    def told(name: str) -> dict[str, Tensor]:
        code = " ".join(str(draw.randrange(10)) for _ in range(DIGITS))
        ids = torch.tensor(tokenizer.encode(f"The code of {name} is {code}").ids)
        labels = ids.clone()
        labels[:-DIGITS] = IGNORED
        return {"input_ids": ids, "labels": labels}

    rows, share = [told(name) for name in names[:people]], people // 12
    unseen = len(rows) - 2 * share
    return {"forget": rows[:share], "retain": rows[share:unseen], "holdout": rows[unseen:]}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=make_tokenizer().get_vocab_size(),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def learn(model: nn.Module, rows: list[dict[str, Tensor]], epochs: int) -> None:
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    model.train()
    for _ in range(epochs):
        for batch in DataLoader(rows, 16, shuffle=True):
            adam.zero_grad()
            model(**batch).loss.backward()
            adam.step()


def known(model: nn.Module, sets: dict[str, list[dict[str, Tensor]]]) -> dict[str, float]:
    """Mean probability of a right digit, by set."""
    return {
        name: float(answer_probability(token_stats(model, DataLoader(rows, 64))).mean())
        for name, rows in sets.items()
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """What is known before and after, by set."""
    options = parse(arguments)
    sets = make_codes(options.people)
    model = make_model()
    learn(model, sets["forget"] + sets["retain"], options.epochs)
    before = known(model, sets)

    adapted = get_peft_model(model, LoraConfig(r=options.rank, target_modules="all-linear"))
    loaders = {name: DataLoader(rows, 16, shuffle=True) for name, rows in sets.items()}
    result = sf.unlearn(
        adapted,
        **loaders,
        task=sf.Language(),
        recipe=sf.Recipe.language(cycles=options.cycles),
        retain_budget=options.budget,
    )
    merged = adapted.merge_and_unload()

    after = known(merged, sets)
    print(f"{result.budget_spent:.0%} of the budget spent; probability of a right digit:")
    for name in sets:
        print(f"{name:>8}: {before[name]:.2f} -> {after[name]:.2f}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
