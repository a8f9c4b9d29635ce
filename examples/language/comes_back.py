"""What of a forgotten set comes back: by relearning half of it, and by storing weights in few bits.

    python -m examples.language.comes_back --out build/language --pair 0 [--model FOLDER]

Without ``--model`` it looks at Full, at Retrain, and at ``hidden``: Full trained away from the
forget set until it is as unlikely as data it has never seen, but no weight further than half a step
of four-bit integers. It looks as if it had forgotten, and remembers as soon as it is quantised: an
audit that does not find it finds nothing.
"""

import copy
import math
from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import sfron_fast as sf
from sfron_fast.evaluation import language as field
from sfron_fast.evaluation.quantisation import quantised, to_integers
from sfron_fast.evaluation.relearning import relearned

from .authors import QA, Benchmark
from .judge import parse
from .tokens import examples, loader
from .train import load

BATCH = 20
STEPS, LR = 10, 3e-4  # of relearning
BITS = (8, 4)
HIDDEN_BITS, HIDDEN_STEPS, HIDDEN_LR = 4, 30, 5e-4  # at most so many steps
WITHIN = 0.49  # of a step: less than half, as weights are rounded in fp32


def probability(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, split: Sequence[QA]
) -> float:
    """Mean over the answers."""
    stats = field.token_stats(model, loader(tokenizer, examples(tokenizer, split), 2 * BATCH))
    return float(field.answer_probability(stats).mean())


def comes_back(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Benchmark
) -> dict[str, float]:
    """p forget as it is; of one half after relearning the other; with weights in few bits.

    Every second question is relearnt, so the halves are of the same authors.
    """
    learnt, judged = data.forget[::2], data.forget[1::2]
    order = torch.Generator().manual_seed(0)
    batches = loader(tokenizer, examples(tokenizer, learnt), BATCH, order)
    attacked = relearned(model, batches, steps=STEPS, lr=LR, task=sf.Language())
    found = {
        "p forget": probability(model, tokenizer, data.forget),
        "relearnt": probability(attacked, tokenizer, judged),
    }
    for bits in BITS:
        found[f"int{bits}"] = probability(quantised(model, bits), tokenizer, data.forget)
    return found


def hidden(
    full: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Benchmark
) -> LlamaForCausalLM:
    """``full`` after gradient ascent on the forget set, up to its loss on the holdout set; its
    weights are kept where they round as they did.
    """
    model = copy.deepcopy(full).eval()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    homes = [to_integers(matrix, HIDDEN_BITS) for matrix in matrices]
    optimizer = torch.optim.AdamW(matrices, lr=HIDDEN_LR, weight_decay=0.0)
    task, device = sf.Language(), matrices[0].device
    batches = loader(tokenizer, examples(tokenizer, data.forget), 2 * BATCH)
    unseen = -math.log(probability(full, tokenizer, data.holdout))
    for _ in range(HIDDEN_STEPS // len(batches)):
        for batch in task.prepared(batches, device, "forget"):
            loss = task.mean_loss(model, batch)
            if loss >= unseen:
                return model
            optimizer.zero_grad()
            (-loss).backward()
            optimizer.step()
            with torch.no_grad():
                for matrix, (integers, scales) in zip(matrices, homes, strict=True):
                    _keep(matrix, integers, scales)
    return model


def _keep(matrix: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor) -> None:
    """Back to where the weights round to ``integers``; the largest of a row fix its scale."""
    moved = (matrix / torch.where(scales == 0, 1.0, scales) - integers).clamp_(-WITHIN, WITHIN)
    largest = 2 ** (HIDDEN_BITS - 1) - 1
    moved[integers.abs() == largest] = 0.0
    matrix.copy_((integers + moved) * scales)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Rows by name of the model."""
    options = parse(__doc__, arguments)
    disable_progress_bar()  # of files that are read in no time
    pair = load(options.out, options.pair)
    if options.model is not None:
        models = {options.model.name: LlamaForCausalLM.from_pretrained(options.model)}
    else:
        models = {name: pair.models[name] for name in ("retrain", "full")}
        models["hidden"] = hidden(pair.models["full"], pair.tokenizer, pair.data)
    rows = {}
    for name, model in models.items():
        rows[name] = comes_back(model, pair.tokenizer, pair.data)
        print(
            f"{name:>10}: " + "  ".join(f"{key} {value:.3f}" for key, value in rows[name].items())
        )
    return rows


if __name__ == "__main__":
    main()
