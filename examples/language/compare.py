"""Run every arm on one pair and measure it; run it from the project's root, after ``train``:

    python -m examples.language.compare --out build/language --pair 1 [--arms "SFR-on" "NPO 1e-3"]

Writes ``pair1.json`` into ``--results``, after every arm; an arm that is in it is not run again.
"""

import argparse
import copy
import json
import os
import platform
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import sfron_fast as sf
from sfron_fast.distributed.ranks import Ranks
from sfron_fast.runs.budget import mean_over

from . import judge
from .arms import ARMS, Setting
from .comes_back import comes_back
from .train import Pair, load

RESULTS = Path("benchmarks/results/language")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where train.py left its models")
    parser.add_argument("--pair", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def environment(pair: int, steps: int) -> dict[str, Any]:
    """What a row depends on beside its arm; rows of another one are refused."""
    return {
        "pair": pair,
        "steps": steps,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sfron_fast": sf.__version__,
        "threads": torch.get_num_threads(),
    }


def read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What is there already.

    Raises:
        ValueError: it is of other settings or other versions.
    """
    if not path.exists():
        return {"environment": wanted, "rows": {}}
    found = json.loads(path.read_text())
    if found["environment"] != wanted:
        raise ValueError(
            f"{path}: expected {wanted}, found {found['environment']}; use another --results"
        )
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, path)


def measured(
    model: LlamaForCausalLM, setting: Setting, retrained: judge.Measured
) -> dict[str, float]:
    """The judge's row, what comes back, and the retain loss in units of the holdout loss."""
    row = judge.judge(model, setting.tokenizer, setting.data, retrained)
    back = comes_back(model, setting.tokenizer, setting.data)
    batches = setting.batches("retain", False)
    retained = mean_over(Ranks(model, None), batches, sf.Language(), "retain").item()
    return {**row, **back, "retain loss": retained}


def run_arm(name: str, setting: Setting, retrained: judge.Measured) -> dict[str, Any]:
    """One row; of an arm that fails, what it said."""
    model = copy.deepcopy(setting.full)
    start = time.perf_counter()
    try:
        facts = ARMS[name](model, setting)
        seconds = time.perf_counter() - start
        return {**measured(model, setting, retrained), **facts, "seconds": seconds}
    except (RuntimeError, ValueError) as error:  # a diverged model is a result too
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def compare(
    pair: Pair, path: Path, names: Sequence[str], number: int, steps: int
) -> dict[str, Any]:
    """All rows of a pair, those that were there included."""
    found = read(path, environment(number, steps))
    left = [name for name in names if name not in found["rows"]]
    if not left:
        return found
    models = pair.models
    setting = Setting(
        pair.data, pair.tokenizer, models["full"], models["retrain"], seed=number, steps=steps
    )
    retrained = judge.measure(models["retrain"], pair.tokenizer, pair.data)
    if "mask density" not in found:
        mask = setting.mask()
        selected = sum(mask.counts().values()) / sum(map(mask.size, mask))
        found |= {"mask density": selected, "mask digest": mask.digest()}
        found["holdout loss"] = setting.holdout_loss()
    if "retrain_second" in models and "second Retrain" not in found["rows"]:
        found["rows"]["second Retrain"] = measured(models["retrain_second"], setting, retrained)
    for name in left:
        row = found["rows"][name] = run_arm(name, setting, retrained)
        write(path, found)
        if "error" in row:
            print(f"{name:>28}: {row['error']}", flush=True)
        else:
            judge.show(name, row)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    disable_progress_bar()  # of files that are read in no time
    path = options.results / f"pair{options.pair}.json"
    pair = load(options.out, options.pair)
    return compare(pair, path, options.arms, options.pair, options.steps)


if __name__ == "__main__":
    main()
