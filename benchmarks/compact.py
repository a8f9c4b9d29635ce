"""Where runs with weights of 24 bits and moments in 8 end: `python -m benchmarks.compact`.

Two tasks of ``unlearn``: the demo's ConvNet forgets its wrong labels (AdamW, 200 cycles of one
forget and five retain steps), and the Llama of 2M weights that knows 100 authors by heart forgets
ten of them (``Recipe.language``, 50 cycles; examples/language, pair 0). All arms of a seed start
from the same weights, rounded to bf16, and see the same batches; a seed of the first task has its
own data and model, one of the second its own order of batches. Parameters and gradients of the
last three arms are bf16. ``weight_bits=32`` beside moments in fp32 loses nothing of an update: it
shows what gradients of bf16 do alone. What other batches change in fp32 is the measure of what
matters.
"""

import copy
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf
from sfron_fast.demo import digits
from sfron_fast.evaluation import accuracy, predict

from .harness import provenance

SEEDS = range(5)
FP32, OTHER, COMPACT = "fp32", "fp32, other batches", "24 bits, moments in int8"
ARMS: dict[str, dict[str, Any]] = {
    FP32: {},
    OTHER: {},
    COMPACT: {"weight_bits": 24, "state_dtype": torch.int8},
    "32 bits, moments in fp32": {"weight_bits": 32},
    "bf16 alone, moments in int8": {"state_dtype": torch.int8},
}
RESULT, MODELS = Path(__file__).parent / "results" / "compact.md", Path("build/language")
ADAMW: dict[str, Any] = {
    "cycles": 200, "lr": 1e-3, "forget_decay": "constant", "slow_lr": 0.5, "optimizer": "adamw",
    "weight_decay": 0.01, "max_norm": 0.5, "moments": "shared", "forget_updates_buffers": True,
}  # fmt: skip  # those of benchmarks/moments.py
# the model; what runs it in an order of batches under settings; and its scores, in percent
Run = Callable[[Any, int, dict[str, Any]], Any]
Task = tuple[nn.Module, Run, Callable[[Any], dict[str, float]]]


def demo() -> Iterator[Task]:
    for seed in SEEDS:
        split = digits.make_split("wrong labels", seed)
        original = digits.train(split.train, seed)
        sets = {name: digits.ordered(getattr(split, name)) for name in ("forget", "retain", "test")}
        mask = sf.estimate_mask(
            original, forget=sets["forget"], retain=sets["retain"], estimator="batch"
        )

        def run(model: Any, order: int, more: dict[str, Any], s=split, m=mask) -> None:
            def batches(data: TensorDataset) -> DataLoader:
                inputs, targets = data.tensors
                cast = TensorDataset(inputs.to(next(model.parameters()).dtype), targets)
                draw = torch.Generator().manual_seed(order)
                return DataLoader(cast, digits.BATCH, shuffle=True, generator=draw)

            recipe = sf.Recipe(name="AdamW", **ADAMW, **more)
            sf.unlearn(
                model, forget=batches(s.forget), retain=batches(s.retain), recipe=recipe, mask=m
            )

        def scores(model: Any, sets=sets) -> dict[str, float]:
            return {f"{n} accuracy": accuracy(predict(model, data)) for n, data in sets.items()}

        yield original, run, scores


def language() -> Iterator[Task]:
    from examples.language import arms, judge, train

    pair = train.prepare(MODELS, 0, ("base", "full"))
    full = pair.models["full"]
    mask = arms.Setting(pair.data, pair.tokenizer, full, full, seed=0).mask()

    def run(model: Any, order: int, more: dict[str, Any]) -> None:
        setting = arms.Setting(pair.data, pair.tokenizer, full, full, seed=order)
        arms.sfron(model, setting, mask=lambda _: mask, **more)

    def scores(model: Any) -> dict[str, float]:
        look = judge.Looks(model, pair.tokenizer)
        said = {n: look.answers(getattr(pair.data, n), n) for n in ("forget", "retain", "holdout")}
        known = {n: judge.field.answer_probability(answers) for n, answers in said.items()}
        return {f"p {name}": 100 * float(p.mean()) for name, p in known.items()}

    yield from ((full, run, scores) for _ in SEEDS)


def narrow(model: nn.Module) -> nn.Module:
    """In bf16, but for the angles of a Llama's positions."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not name.endswith("inv_freq"):
            tensor.data = tensor.data.bfloat16()
    return model


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def measured(task: Task, seed: int) -> dict[str, dict[str, float]]:
    """Per arm: distance of the parameters from those of fp32, and the scores."""
    trained, run, scores = task
    original = copy.deepcopy(trained)
    original.load_state_dict(narrow(copy.deepcopy(trained)).state_dict())  # rounded
    start, base, found = flat(original), None, {}
    for arm, settings in ARMS.items():
        model = copy.deepcopy(original)
        model = model if arm in (FP32, OTHER) else narrow(model)
        torch.manual_seed(seed)
        run(model, seed + 100 * (arm == OTHER), settings)
        judged = copy.deepcopy(original)
        judged.load_state_dict(model.state_dict())
        base = flat(judged) if base is None else base
        apart = (flat(judged) - base).norm() / (base - start).norm()
        found[arm] = {"distance": 100 * apart.item(), **scores(judged)}
        print(seed, arm, found[arm], flush=True)
    return found


def lines(name: str, rows: list[dict[str, dict[str, float]]]) -> Iterator[str]:
    """The table of a task, and what it says."""
    columns = list(rows[0][FP32])

    def mean(arm: str, column: str) -> float:
        return statistics.mean(row[arm][column] for row in rows)

    def off(arm: str, column: str) -> float:
        return statistics.mean(abs(row[arm][column] - row[FP32][column]) for row in rows)

    yield from ("", f"## {name.capitalize()}, {len(rows)} seeds", "")
    yield f"| arm | {' | '.join(columns)} |"
    yield "| --- |" + " ---: |" * len(columns)
    for arm in ARMS:
        cells = [f"{mean(arm, column):.2f} ({off(arm, column):.2f})" for column in columns[1:]]
        yield f"| {arm} | {mean(arm, 'distance'):.1f} % | {' | '.join(cells)} |"
    missed = [column for column in columns if off(COMPACT, column) > off(OTHER, column)]
    verdict = f"**missed** by {', '.join(missed)}" if missed else "within other batches in all"
    yield from ("", f"{COMPACT}: {verdict}.")


def main() -> None:
    torch.set_num_threads(1)
    known = RESULT.with_suffix(".json")  # a seed that is there is not run again
    rows = json.loads(known.read_text()) if known.exists() else {}
    for make in (demo, language):
        done = rows.setdefault(make.__name__, [])
        for seed, task in enumerate(make()) if len(done) < len(SEEDS) else ():
            if seed >= len(done):
                done.append(measured(task, seed))
                known.write_text(json.dumps(rows, indent=1) + "\n")
    told = provenance()
    text = ["# Weights of 24 bits, moments in 8", "", str(__doc__).split("\n\n", 1)[1].strip(), ""]
    text += [
        "Distance: of the parameters from those of fp32, over what these moved; means. Scores, in"
        " percent: the mean, and in brackets the mean difference from fp32 by size."
    ]
    text += [line for name, found in rows.items() for line in lines(name, found)]
    origin = ", ".join(f"{k} {told[k]}" for k in ("device", "isa", "torch", "commit", "date"))
    RESULT.write_text("\n".join([*text, "", origin, ""]))
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
