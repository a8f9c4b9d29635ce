"""Instructions of one call, counted by callgrind: unlike times they do not depend on what else the
machine does. One thread; under valgrind the processor has AVX2, not AVX-512.

    python -m benchmarks.instructions [FOLDER of another checkout, built, to count first] > TABLE

Needs valgrind, and minutes.
"""

import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[], object]
CALLS = 10
MARKS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(void) { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; }
"""
LORA = [(8, 64) if i % 2 else (64, 8) for i in range(450)]


def tensors(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def ours(shapes: list[tuple[int, ...]], rule: str, pair: bool) -> Call:
    import sfron_fast as sf

    named = [(f"{i}", p) for i, p in enumerate(tensors(shapes))]
    mask = sf.SaliencyMask.from_bool({n: torch.rand(p.shape) < 0.5 for n, p in named})
    make = sf.SFRonAdamW if rule == "adamw" else sf.SFRonSGD
    optimizer = make(named, 1e-4, saliency=mask, max_norm=1.0, slow_lr=0.5 if pair else 1.0)

    def call() -> None:
        optimizer.forget_step()
        if pair:
            optimizer.step()
        optimizer.param_groups[0]["retain_pending"] = 0

    return call


def stock(shapes: list[tuple[int, ...]], rule: str, pair: bool) -> Call:
    params = tensors(shapes)
    make = torch.optim.AdamW if rule == "adamw" else torch.optim.SGD
    optimizer, slow = make(params, 1e-4, fused=True), [p.detach().clone() for p in params]
    masks = [(torch.rand(p.shape) < 0.5).float() for p in params]

    @torch.no_grad()
    def call() -> None:
        grads = [p.grad for p in params]
        torch._foreach_mul_(grads, masks)
        norm = nn.utils.get_total_norm(grads, foreach=True)
        optimizer.grad_scale = (norm + 1e-6).clamp(min=1.0)
        optimizer.step()
        optimizer.grad_scale = None
        if pair:
            optimizer.step()
            torch._foreach_lerp_(slow, params, 0.5)
            torch._foreach_copy_(params, slow)

    return call


def loss(kind: str, rows: int, classes: int, own: bool) -> Call:
    import sfron_fast as sf

    torch.manual_seed(0)
    x, y = torch.randn(rows, classes, requires_grad=True), torch.randn(rows, classes)
    labels = torch.randint(classes, (rows,))

    def value() -> Tensor:
        if kind == "kl" and own:
            return sf.soft_target_kl(x, y)
        if kind == "kl":
            pair = [F.log_softmax(t, 1) for t in (x, y)]
            return F.kl_div(*pair, log_target=True, reduction="batchmean")
        if own:
            return sf.adaptive_cross_entropy(x, labels)
        losses = F.cross_entropy(x, labels, reduction="none")
        raw = losses.detach().clamp_min(1e-6).pow(-0.5)
        return (raw / raw.sum() * losses).sum()

    def call() -> None:
        x.grad = None
        value().backward()

    return call


STEPS = {
    "forget step, 1 x 100,000": ([(100_000,)], "adamw", False),
    "forget step, 62 x 64": ([(64,)] * 62, "adamw", False),
    "forget step and retain step, 62 x 64": ([(64,)] * 62, "adamw", True),
    "forget step, 62 x 64, SGD": ([(64,)] * 62, "sgd", False),
    "forget step, LoRA, 450 x 512": (LORA, "adamw", False),
}
LOSSES = {
    "soft-target KL 8,192 x 10": ("kl", 8192, 10),
    "soft-target KL 256 x 10": ("kl", 256, 10),
    "cross-entropy 256 x 10": ("ce", 256, 10),
    "cross-entropy 256 x 200": ("ce", 256, 200),
}


def count(arm: str, library: str) -> None:
    """Under callgrind: a dump for each case."""
    marks = ctypes.CDLL(library)
    torch.set_num_threads(1)
    gc.disable()
    made = [ours(*s) if arm == "ours" else stock(*s) for s in STEPS.values()]
    made += [loss(*given, arm == "ours") for given in LOSSES.values()]
    for call in made:
        for _ in range(8):  # until all is prepared
            call()
        marks.begin()
        for _ in range(CALLS):
            call()
        marks.end()


def counted(folder: str, arm: str) -> list[float]:
    """Instructions of a call of every case, in order."""
    with tempfile.TemporaryDirectory() as out:
        library = f"{out}/marks.so"
        cc = ["cc", "-x", "c", "-shared", "-fPIC", "-", "-o", library]
        subprocess.run(cc, input=MARKS, text=True, check=True)
        program = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}/c"]
        command = ["valgrind", "-q", *program, sys.executable, __file__, "--count", arm, library]
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        dumps = [Path(out, f"c.{i + 1}").read_text() for i in range(len(STEPS) + len(LOSSES))]
    totals = [re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE) for text in dumps]
    return [int(total[1]) / CALLS for total in totals if total]


def table(before: str | None) -> str:
    here = str(Path(__file__).resolve().parents[1])
    columns = {"before": counted(before, "ours")} if before else {}
    columns |= {"now": counted(here, "ours"), "torch": counted(here, "torch")}
    lines = [
        f"| thousand instructions a call | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for i, name in enumerate([*STEPS, *LOSSES]):
        lines.append(f"| {name} | {' | '.join(f'{c[i] / 1e3:,.0f}' for c in columns.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--count"]:
        count(*sys.argv[2:])
    else:
        print(table(sys.argv[1] if len(sys.argv) > 1 else None))
