"""R2F: a gradient decoded from low-rank factors, by a decoder that a proxy model has taught.

    python -m examples.language.r2f [--seed N] [--out DIR]

The proxy is a small Llama that has learnt facts about 200 people. Its sibling is tuned from it on
640 facts about 160 others, in three wordings; a model from other random weights learns everything.
The decoder sees the proxy's gradients alone. It is judged by its cosine with true gradients of the
other two, on facts and in a wording that the decoder has not seen, and by one step of the sibling.
"""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sfron_fast as sf
from examples.systems.claims import Claim, at_least, at_most, parser, record, write
from sfron_fast import methods
from sfron_fast.methods.r2f import Decoder, factor_gradients
from sfron_fast.models.linear import matrix

from ..facts import WORDINGS, Facts, Loader, accuracy, learn, make_model, people, relearnt, together
from .figure import draw
from .held import held

OUT = Path("benchmarks/results/systems/r2f")
TITLE = "R2F: one step along a gradient decoded from low-rank factors"
TASK = sf.Language()
DEPTH, WIDTH, INNER = 4, 64, 160
LAYERS = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
KNOWN, TUNED, FORGOTTEN = 200, 160, 10  # people: the proxy's, the sibling's, of those forgotten
EPOCHS, LR, TUNED_EPOCHS, TUNED_LR, BATCH = 20, 3e-3, 20, 2e-3, 128
RANK, FIT_BATCH, HELD_OUT = 8, 16, 20  # batches to judge by
# lengths of a step; the verdict is at the one chosen on seed 7
NORMS, NORM = (0.5, 1.0, 2.0, 4.0), 1.0
COSINE, FORGOT = 0.1, 0.1

Gradients = dict[str, Tensor]


def worded(facts: Facts) -> Facts:
    """In all wordings but the last, which nobody learns."""
    return together([facts.asked(wording) for wording in range(WORDINGS - 1)])


def true_gradients(model: nn.Module, loader: Iterable[Any], names: Iterable[str]) -> Gradients:
    """What R2F does without: [out, in] of each layer, of the mean over all samples."""
    weights = {name: model.get_submodule(name).weight for name in names}
    sums = {name: torch.zeros_like(w) for name, w in weights.items()}
    samples = 0
    for batch in loader:
        count = len(batch["labels"])
        grads = torch.autograd.grad(TASK.mean_loss(model, batch), list(weights.values()))
        torch._foreach_add_(list(sums.values()), list(grads), alpha=count)
        samples += count
    return {name: s / samples for name, s in sums.items()}


def flat(gradients: Gradients) -> Tensor:
    """All of them as one vector."""
    return torch.cat([g.flatten() for g in gradients.values()])


def cosine(model: nn.Module, decoder: Decoder, batches: Sequence[Any]) -> float:
    """Mean over batches of the cosine between decoded and true gradient, all layers together."""
    found = []
    for batch in batches:
        x = factor_gradients(model, [batch], decoder, task=TASK)
        decoded = {name: x[name] @ decoder.up[name] for name in x}
        true = flat(true_gradients(model, [batch], x))
        found.append(float(torch.cosine_similarity(flat(decoded), true, 0)))
    return sum(found) / len(found)


def stepped(model: nn.Module, gradients: Gradients, norm: float) -> nn.Module:
    """A copy after a step of this length up the given gradients."""
    after, size = copy.deepcopy(model), flat(gradients).norm()
    with torch.no_grad():
        for name, g in gradients.items():
            matrix(after.get_submodule(name)).add_(g, alpha=norm / float(size))
    return after


@torch.no_grad()
def loss(model: nn.Module, facts: Facts) -> float:
    """Mean loss of an answer's tokens."""
    return float(TASK.mean_loss(model, facts.rows()))


def run(seed: int) -> dict[str, Any]:
    """One seed: its people and weights, the decoder's A, the order of batches."""
    start = time.perf_counter()
    everyone = people(seed, KNOWN + TUNED)
    known, tuned = together(everyone[:KNOWN]), together(everyone[KNOWN:])
    forget, retain = (
        together(part) for part in (everyone[KNOWN:][:FORGOTTEN], everyone[KNOWN:][FORGOTTEN:])
    )
    proxy = make_model(seed, DEPTH, WIDTH, INNER)
    learn(proxy, Loader(worded(known), BATCH, seed), EPOCHS, LR)
    sibling = copy.deepcopy(proxy)
    learn(sibling, Loader(worded(tuned), BATCH, seed), TUNED_EPOCHS, TUNED_LR)
    retrained = copy.deepcopy(proxy)
    learn(retrained, Loader(worded(retain), BATCH, seed), TUNED_EPOCHS, TUNED_LR)
    unrelated = make_model(seed + 1000, DEPTH, WIDTH, INNER)
    learn(unrelated, Loader(worded(together(everyone)), BATCH, seed), EPOCHS, LR)

    # the decoder, from the proxy's own facts, and its cosines
    loader = Loader(worded(known), FIT_BATCH, seed)
    decoder = methods.fit_decoder(
        proxy, loader=loader, layers=LAYERS, rank=RANK, seed=seed, task=TASK
    )
    plain = decoder.without_proxy()
    unseen = {
        "proxy": (proxy, known),
        "sibling": (sibling, retain),
        "unrelated": (unrelated, retain),
    }
    cosines = {}
    for name, (model, facts) in unseen.items():
        batches = list(Loader(facts.asked(WORDINGS - 1), FIT_BATCH, seed))[:HELD_OUT]
        cosines[name] = {
            "decoder": cosine(model, decoder, batches),
            "pseudo-inverse": cosine(model, plain, batches),
        }
        print(name, cosines[name], flush=True)

    # steps of the sibling
    asked = Loader(worded(forget), FIT_BATCH, seed)
    true = true_gradients(sibling, asked, decoder.down)
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(g.shape, generator=generator) for name, g in true.items()}

    def decoded(by: Decoder) -> Callable[[float], nn.Module]:
        def step(norm: float) -> nn.Module:
            after = copy.deepcopy(sibling)
            return methods.r2f(after, forget=asked, decoder=by, norm=norm, task=TASK)

        return step

    steps: dict[str, Callable[[float], nn.Module]] = {
        "decoded": decoded(decoder),
        "pseudo-inverse": decoded(plain),
        "true gradient": lambda norm: stepped(sibling, true, norm),
        "random": lambda norm: stepped(sibling, noise, norm),
    }

    rows: dict[str, Any] = {
        name: measured(model, forget, retain)
        | {"relearnt": relearnt(model, forget, FIT_BATCH, seed)}
        for name, model in (("before", sibling), ("retrained", retrained))
    }
    for name, step in steps.items():
        rows[name] = {}
        for norm in NORMS:
            model = step(norm)
            rows[name][str(norm)] = measured(model, forget, retain)
            if norm == NORM:
                rows[name][str(norm)]["relearnt"] = relearnt(model, forget, FIT_BATCH, seed)
        print(name, {k: round(v, 3) for k, v in rows[name][str(NORM)].items()}, flush=True)
    facts = {"cosines": cosines, "rows": rows, "bytes": held(LAYERS, RANK, seed)}
    claims, controls = judged(facts)
    return record(seed, claims, controls, facts, time.perf_counter() - start)


def measured(model: nn.Module, forget: Facts, retain: Facts) -> dict[str, float]:
    """Accuracies among four answers, and losses."""
    return {
        "forget": accuracy(model, forget),
        "forget, unseen wording": accuracy(model, forget.asked(WORDINGS - 1)),
        "retain": accuracy(model, retain),
        "forget loss": loss(model, forget),
        "retain loss": loss(model, retain),
    }


def judged(facts: dict[str, Any]) -> tuple[list[Claim], list[Claim]]:
    """Claims and controls from what was measured."""
    rows, held_bytes, before = facts["rows"], facts["bytes"], facts["rows"]["before"]

    def better(name: str) -> float:
        return facts["cosines"][name]["decoder"] - facts["cosines"][name]["pseudo-inverse"]

    def change(name: str, key: str) -> float:
        return rows[name][str(NORM)][key] - before[key]

    forgot, random = -change("decoded", "forget"), -change("random", "forget")
    costs = change("decoded", "retain loss") - change("true gradient", "retain loss")
    largest = held_bytes["R2F"]["largest"] / held_bytes["smallest matrix"]
    peaks = held_bytes["R2F"]["peak"] / held_bytes["true gradient"]["peak"]
    claims = [
        at_least("sibling: cosine, decoder minus pseudo-inverse", better("sibling"), COSINE),
        at_least("forget accuracy that the decoded step takes", forgot, FORGOT),
        at_most("retain loss, decoded minus true step of equal norm", costs, 0.0),
        at_most("largest allocation by the smallest weight's bytes", largest, 0.99),
        at_most("peak memory by that of the true gradient", peaks, 0.5),
    ]
    gained = better("unrelated")
    controls = [
        Claim(
            "unrelated model: cosine, decoder minus pseudo-inverse",
            gained,
            f"< {COSINE:g}",
            gained < COSINE,
        ),
        at_most("forget accuracy that a random step of that norm takes", random, FORGOT / 2),
    ]
    return claims, controls


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, OUT).parse_args(arguments)
    found = write(options.out, run(options.seed), TITLE)
    draw(found, options.out / "steps.png")


if __name__ == "__main__":
    main()
