"""`python -m sfron_fast unlearn` and `python -m sfron_fast evaluate`: what they are asked, and what
they print.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..runs.budget import BUDGET
from ..runs.result import share_spent
from . import model_card
from .measures import aligned, measure, table
from .processes import Processes, started
from .run_command import run
from .run_settings import CYCLES, DTYPES, METHODS, PASSES, STATES, Settings
from .texts import Texts, check_apart

TEXTS = "jsonl: prompt and completion, question and answer, text, or messages"
PARTS = ("forget", "retain", "holdout")


def add_parsers(commands: Any) -> None:
    """``unlearn`` and ``evaluate`` among the commands."""
    unlearning = commands.add_parser(
        "unlearn",
        help="let a causal language model forget texts",
        description="Let a causal language model forget texts, and write it, a report and a model"
        " card to a folder. The same command again goes on where it stopped. Under torchrun the"
        " model is sharded over all processes (sfron).",
    )
    _common(unlearning, retain=True)
    add = unlearning.add_argument
    add("--out", type=Path, required=True, help="folder to write, new or of this run")
    add("--method", choices=METHODS, default="sfron")
    add("--lora", type=int, metavar="RANK", help="train adapters and merge them at the end")
    add(
        "--budget",
        type=float,
        help="how far the loss of retain texts may rise, as a share of the holdout texts' loss"
        f" (sfron with --holdout; default {BUDGET})",
    )
    passes = (
        f"passes over the forget texts (default {PASSES}; with a budget {CYCLES} steps or more)"
    )
    add("--epochs", type=int, help=passes)
    add("--lr", type=float, help="default: by the model's size, 1e-3 (small) to 1e-5; LoRA 1e-4")
    add("--seed", type=int, default=0)
    bits = "of weights in bfloat16: no update is lost (sfron, without --lora)"
    add("--weight-bits", type=int, choices=(24, 32), help=bits)
    add("--state-dtype", choices=STATES, help="of the moments (sfron; default: the weights')")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    looking = commands.add_parser(
        "evaluate",
        help="how well a causal language model knows texts",
        description="Loss, probability, extraction strength and exact memorization of each set.",
    )
    _common(looking, retain=False)
    looking.add_argument("--json", type=Path, help="file for the figures")


def _common(parser: argparse.ArgumentParser, retain: bool) -> None:
    """What both commands are told; whether they need retain texts."""
    parser.add_argument("--model", required=True, help="folder of transformers, or a name")
    parser.add_argument("--forget", required=True, help=TEXTS)
    parser.add_argument("--retain", required=retain, help=TEXTS)
    parser.add_argument("--holdout", help="the same, never seen by the model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens (default 1024)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")


def execute(chosen: argparse.Namespace) -> None:
    """Run the command; prints a table.

    Raises:
        ValueError: bad input, before anything is done.
    """
    import torch

    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with started(device) as processes:
        _execute(chosen, processes)


def _execute(chosen: argparse.Namespace, processes: Processes) -> None:
    files = {part: getattr(chosen, part) for part in PARTS if getattr(chosen, part) is not None}
    if chosen.command == "evaluate":
        columns = {"now": _evaluate(chosen, files, processes)}
    else:
        names = Settings.__dataclass_fields__
        settings = Settings(**{name: getattr(chosen, name) for name in names})
        report = run(settings, files, chosen.out, processes)
        columns = {"before": report["before"], "after": report["after"]}
    if processes.rank:
        return
    print(aligned(table(columns)))
    if chosen.command == "unlearn":
        if report["budget_spent"] is not None:
            spent = share_spent(report["budget_spent"])
            print(f"budget: {spent} of {report['settings']['budget']} spent")
        for sentence in report["limits"]:
            print(f"- {sentence}")
        print(chosen.out.resolve())


def _evaluate(chosen: argparse.Namespace, files: dict[str, str], processes: Processes) -> Any:
    """Figures of each set."""
    from . import pretrained

    tokenizer = pretrained.load_tokenizer(chosen.model)
    sets = {
        name: Texts(path, tokenizer, max_length=chosen.max_length, name=name)
        for name, path in files.items()
    }
    check_apart(**sets)
    model = pretrained.load_model(chosen.model, chosen.dtype, processes.device)
    pretrained.check_fits(model, sets)
    model = processes.shard(model)
    found = measure(model, sets, batch_size=chosen.batch_size, processes=processes)
    if chosen.json is not None and processes.rank == 0:
        write_whole(chosen.json, model_card.writing(json.dumps(found, indent=1) + "\n"))
    return found
