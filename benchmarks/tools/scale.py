"""A cycle on many GPUs, on paper: bytes held, streamed and sent, and what runs out first.

`python -m benchmarks.tools.scale` writes benchmarks/results/scale.md and scale.png. Nothing here is
measured but the bytes through collectives: tests/distributed/test_scale.py counts those of small
runs, which the same formulas must give exactly. Weights, gradients, moments and slow weights are
fp32 shards of FSDP2 (`fully_shard` of every layer and of the rest), gathered in bf16; AdamW;
activations are checkpointed at every layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2, prod
from pathlib import Path

from ..cases.lists import Shape, llama
from ..cases.step_cases import FLOORS

RESULTS = Path(__file__).parents[1] / "results"
H100, GUESS = "H100 SXM data sheet", "assumption"
MACHINE = {  # name: (value, unit, where from)
    "memory": (80e9, "bytes a GPU", H100),
    "flops": (989e12, "bf16 operations/s a GPU, dense", H100),
    "hbm": (3.35e12, "bytes/s a GPU", H100),
    "nvlink": (450e9, "bytes/s a GPU, each way", H100),
    "pcie": (64e9, "bytes/s a GPU, each way (gen 5 x16)", H100),
    "network": (
        400e9,
        "bytes/s a node of 8, each way: 8 ports of 400 Gbit/s",
        "DGX H100 data sheet",
    ),
    "achieved": (0.8, "of every bandwidth", GUESS),
    "utilised": (0.4, "of the operations/s", GUESS),
    "latency": (20e-6, "s a collective, and a tenth of it for each doubling of the GPUs", GUESS),
    "tokens": (2048, "on each GPU in each step: one sequence", GUESS),
    "layer": (
        34,
        "bytes a token and unit of width in a layer",
        "Korthikanti et al. 2022, without attention maps",
    ),
    "hash": (1.5e9, "bytes/s of SHA-256 on a core", GUESS),
}
NODE = 8
# bytes a weight: bf16 all-gather, fp32 reduce-scatter, fp32 shards
GATHERED, REDUCED, STORED = 2, 4, 4
MASK, NORM = 1 / 8, 8  # bytes: a weight's bit; the fp64 sum of squares


@dataclass(frozen=True)
class Model:
    """``layer`` is repeated and gathered on its own; ``rest`` (embeddings, last norm, head) stays
    until backward.
    """

    name: str
    layer: Sequence[Shape]
    layers: int
    rest: Sequence[Shape]
    width: int
    vocabulary: int

    @property
    def weights(self) -> int:
        return padded(self.rest, 1) + self.layers * padded(self.layer, 1)


def padded(shapes: Sequence[Shape], gpus: int) -> int:
    """Elements of all shards together: every rank's is as large as the largest."""
    return sum(-(-rows // gpus) * gpus * prod(row) for rows, *row in shapes)


def llamas() -> list[Model]:
    """Llama 3's shapes, the smallest with a tied head; the last is invented."""
    found = []
    for name, hidden, layers, between, values in (
        ("1B", 2048, 16, 8192, 512),
        ("8B", 4096, 32, 14_336, 1024),
        ("70B", 8192, 80, 28_672, 1024),
        ("405B", 16_384, 126, 53_248, 1024),
        ("1T", 24_576, 132, 86_016, 1024),
    ):
        embedding, *layer, norm = llama(hidden, 1, between, values, 128_256, tied=True)
        rest = [embedding, norm, *([] if name == "1B" else [embedding])]
        found.append(Model(name, layer, layers, rest, hidden, 128_256))
    return found


def sent(
    model: Model, gpus: int, retain_steps: int, gathered: int = GATHERED, reduced: int = REDUCED
) -> dict[str, float]:
    """Collective -> bytes that each rank sends in a cycle: rings, so all but its own part of each
    message.
    """
    steps, others = 1 + retain_steps, (gpus - 1) / gpus
    layers, rest = model.layers * padded(model.layer, gpus), padded(model.rest, gpus)
    return {
        "all-gather, forward": steps * (layers + rest) * gathered * others,
        "all-gather, backward": steps * layers * gathered * others,
        "reduce-scatter": steps * (layers + rest) * reduced * others,
        "all-reduce of the norm": 2 * NORM * others,
    }


def held(
    model: Model, gpus: int, *, slow: float = STORED, gradients: bool = True
) -> dict[str, float]:
    """Kind -> bytes on each GPU where a cycle holds most: in the backward of its forget step."""
    layer, rest = padded(model.layer, gpus), padded(model.rest, gpus)
    shard, tokens = (model.layers * layer + rest) / gpus, MACHINE["tokens"][0]
    inside = MACHINE["layer"][0] * model.width
    return {
        "weights and moments": 3 * STORED * shard,
        "gradients": STORED * shard if gradients else 0.0,
        "slow weights": slow * shard,
        "mask": MASK * shard,
        # this layer and the next; this layer's gradients, and the rest's, which wait for the end of
        # backward
        "gathered": (2 * layer + rest) * GATHERED + layer * (GATHERED + REDUCED) + rest * GATHERED,
        "activations": tokens * (2 * model.width * model.layers + inside + 2 * model.vocabulary),
    }


def seconds(model: Model, gpus: int, retain_steps: int) -> dict[str, float]:
    """Resource -> time that a cycle needs of it at least; all but the step kernels overlap."""
    m = {name: value for name, (value, *_) in MACHINE.items()}
    steps, traffic = 1 + retain_steps, sum(sent(model, gpus, retain_steps).values())
    nodes = -(-gpus // NODE)
    per_weight = FLOORS["adamw", "pair"] + (retain_steps - 1) * FLOORS["adamw", "plain"]
    shard = (model.layers * padded(model.layer, gpus) + padded(model.rest, gpus)) / gpus
    collectives = 3 * model.layers + 2 if gpus > 1 else 0  # the rest stays gathered
    # a node takes in what the others have, once, and spreads it itself
    whole = traffic * gpus / max(1, gpus - 1)
    return {
        "operations": steps * 8 * model.weights * m["tokens"] / (m["flops"] * m["utilised"]),
        "NVLink": traffic / (m["nvlink"] * m["achieved"]),
        "network": whole * (nodes - 1) / nodes / (m["network"] * m["achieved"]),
        "latency": steps * collectives * m["latency"] * (1 + 0.1 * log2(gpus)),
        "step kernels": per_weight * shard / (m["hbm"] * m["achieved"]),
    }


def bottleneck(model: Model, gpus: int, retain_steps: int) -> str:
    """What runs out first: memory or, where it is enough, what a cycle needs longest."""
    parts = held(model, gpus)
    if sum(parts.values()) > MACHINE["memory"][0]:
        return f"memory ({max(parts, key=lambda k: parts[k])})"
    times = seconds(model, gpus, retain_steps)
    return max(times, key=lambda k: times[k])


GPUS = (1, 8, 64, 512, 4096)
STEPS = 5


def fewest(model: Model) -> int:
    """The fewest of ``GPUS`` whose memory is enough."""
    return next((n for n in GPUS if sum(held(model, n).values()) <= MACHINE["memory"][0]), GPUS[-1])


def tables() -> str:
    """The whole report."""
    lines = [
        "# A cycle on many GPUs, on paper",
        "",
        (
            f"Generated by `python -m benchmarks.tools.scale`; {STEPS} retain steps a cycle, AdamW,"
            " fp32 shards (FSDP2), gathered in bf16, gradients reduced in fp32, slow weights, a"
            " mask. No time here is measured. Bytes sent, and those of the shards held, are checked"
            " against small runs (tests/distributed/test_scale.py); those of gathered layers and"
            " activations are not."
        ),
        "",
        "| | value | | from |",
        "| --- | ---: | --- | --- |",
        *(
            f"| {name} | {value:g} | {unit} | {origin} |"
            for name, (value, unit, origin) in MACHINE.items()
        ),
        "",
        "## Memory, traffic, time",
        "",
        (
            'GB held are a GPU\'s at most, "shards" what more GPUs make smaller and "rest" what'
            " they do not: gathered layers and activations. GB sent are a GPU's in a cycle. Times"
            " are seconds a cycle for each resource alone."
        ),
        "",
        (
            "| weights | GPUs | shards | rest | GB sent | operations | NVLink | network | latency |"
            " step kernels | first to run out |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for model in llamas():
        for gpus in GPUS:
            parts, times = held(model, gpus), seconds(model, gpus, STEPS)
            rest = parts["gathered"] + parts["activations"]
            traffic = sum(sent(model, gpus, STEPS).values())
            numbers = [sum(parts.values()) - rest, rest, traffic]
            cells = [f"{n / 1e9:,.1f}" for n in numbers] + [f"{t:.3g}" for t in times.values()]
            name = bottleneck(model, gpus, STEPS)
            lines.append(f"| {model.name} | {gpus:,} | {' | '.join(cells)} | {name} |")
    return "\n".join([*lines, "", *answers(), ""])


def answers() -> list[str]:
    """What each decision is worth, at the fewest GPUs that hold the model."""
    lines = [
        "## What the design does about it, and what it leaves",
        "",
        "At the fewest GPUs of the table that hold the model; the largest is held by none.",
        "",
        "| | built | " + " | ".join(f"{m.name} on {fewest(m):,}" for m in llamas()) + " |",
        "| --- | --- |" + " ---: |" * len(llamas()),
    ]
    m = {name: value for name, (value, *_) in MACHINE.items()}

    def row(title: str, built: str, value: Callable[[Model, int], str]) -> None:
        lines.append(
            f"| {title} | {built} | " + " | ".join(value(x, fewest(x)) for x in llamas()) + " |"
        )

    def shard(x: Model, n: int) -> float:
        return (x.layers * padded(x.layer, n) + padded(x.rest, n)) / n

    def share(density: float, steps: int) -> Callable[[Model, int], str]:
        def saved(x: Model, n: int) -> str:
            parts = sent(x, n, steps)
            traffic = sum(parts.values())
            return (
                f"{100 * (1 - density) * parts['reduce-scatter'] / (1 + steps) / traffic:.1f} %"
                if traffic
                else "-"
            )

        return saved

    def kernels(x: Model, n: int) -> str:
        times = seconds(x, n, STEPS)
        return (
            f"{100 * times['step kernels'] / (max(times.values()) + times['step kernels']):.1f} %"
        )

    def tokens(x: Model, n: int) -> str:
        times = seconds(x, n, STEPS)
        return f"{m['tokens'] * max(times['NVLink'], times['network']) / times['operations']:,.0f}"

    gb = "{:,.2f}".format
    row(
        "mask as bits, GB less than as bytes",
        "yes",
        lambda x, n: gb((1 - MASK) * shard(x, n) / 1e9),
    )
    row(
        "gradients freed in a retain step's backward, GB less in that step",
        "yes: `step_in_backward`",
        lambda x, n: gb(
            STORED * (shard(x, n) - max(padded(x.layer, n), padded(x.rest, n)) / n) / 1e9
        ),
    )
    row("no slow step (`slow_lr` = 1), GB less", "yes", lambda x, n: gb(STORED * shard(x, n) / 1e9))
    row(
        "slow weights in bf16, GB less",
        "with bf16 weights only",
        lambda x, n: gb(2 * shard(x, n) / 1e9),
    )
    row(
        "slow weights on the host, s a cycle over PCIe, there and back",
        "no",
        lambda x, n: f"{2 * STORED * shard(x, n) / (m['pcie'] * m['achieved']):.3g}",
    )
    row("forget gradient sent for the salient half only, of the traffic", "no", share(0.5, STEPS))
    row("the same for the salient hundredth, `retain_steps=1`", "no", share(0.01, 1))
    row("step kernels, of a cycle", "fused", kernels)
    row("tokens on each GPU below which links run out first", "-", tokens)
    row(
        "weights gathered without resharding, GB more",
        "user's choice",
        lambda x, n: gb(
            GATHERED * max(x.layers - 2, 0) * padded(x.layer, n) / 1e9 if n > 1 else 0.0
        ),
    )
    row(
        "hash of all weights by which a Fisher knows its model, s; twice for a mask",
        "no: see below",
        lambda x, n: f"{STORED * x.weights / m['hash']:,.0f}",
    )
    row(
        "host memory for every rank's copy of the whole mask, GB a node",
        "no: see below",
        lambda x, n: f"{min(n, NODE) * MASK * x.weights / 1e9:,.0f}",
    )
    return [
        *lines,
        "",
        (
            "- Where memory runs out, more GPUs help as long as shards are what fills it. The rest"
            " does not shrink: gathered layers need tensor parallelism beside `fully_shard`,"
            " activations a shorter sequence."
        ),
        (
            "- Before the cycles the two Fishers are held beside weights and gradients: 16 bytes a"
            " weight, less than the 20 of a cycle."
        ),
        (
            "- The forget step is what a cycle's peak is made of: its clip needs every gradient"
            " before the first update. `step_in_backward` frees the retain steps' share, which"
            " counts where their batches are the larger ones."
        ),
        (
            "- Forget batches are small. With fewer tokens on a GPU than in the table, links run"
            " out before operations: use fewer GPUs, so that each has more of the batch, or, where"
            " there is room for them, keep the weights gathered in the forget step"
            " (`reshard_after_forward=False`), which saves a quarter of what it sends."
        ),
        (
            "- Sending only the salient part of the forget gradient would save a few per cent of a"
            " cycle's traffic, as weights are gathered twice and retain gradients sent whole in"
            " every step; a quarter with one retain step a cycle and a mask of a hundredth. It"
            " would need a reduce-scatter of packed gradients inside FSDP2. Not built."
        ),
        (
            "- On thousands of GPUs small tensors are padded to a row for each, and collectives"
            " wait for one another: shard over a part of them (HSDP)."
        ),
        (
            "- A rank takes its shard's bits from the whole mask, one tensor at a time, but holds"
            " the whole packed mask on its host."
        ),
        (
            "- Each Fisher names its model by a hash of all weights, for which every rank gathers"
            " and reads all of them, tensor by tensor. At every size that is some ten cycles of"
            " these, and a mask takes two."
        ),
    ]


def draw(target: Path) -> None:
    """Bytes a GPU against the number of GPUs; seconds of each resource at the fewest that hold the
    model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model in llamas():
        left.plot(
            GPUS,
            [sum(held(model, n).values()) / 1e9 for n in GPUS],
            marker="o",
            markersize=3,
            label=model.name,
        )
    left.axhline(MACHINE["memory"][0] / 1e9, color="black", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.set_xticks(GPUS, [f"{n:,}" for n in GPUS])
    left.set_yscale("log")
    left.set_xlabel("GPUs", fontsize=8)
    left.set_title("GB held on each GPU; the line is its memory", fontsize=9, loc="left")
    left.legend(fontsize=7, title="weights", title_fontsize=7)
    left.grid(alpha=0.3)
    for at, model in enumerate(llamas()):
        times = seconds(model, fewest(model), STEPS)
        for i, (part, value) in enumerate(times.items()):
            right.bar(
                at + 0.16 * (i - 2), value, 0.16, color=f"C{i}", label=part if at == 0 else None
            )
    right.set_yscale("log")
    right.set_xticks(
        range(len(llamas())), [f"{m.name} on {fewest(m):,}" for m in llamas()], fontsize=8
    )
    right.set_title("seconds a cycle needs of each resource", fontsize=9, loc="left")
    right.legend(fontsize=7)
    right.grid(alpha=0.3, axis="y")
    figure.suptitle(
        f"on paper: H100, {STEPS} retain steps a cycle, one sequence of "
        f"{MACHINE['tokens'][0]:,} tokens on each GPU",
        fontsize=8,
    )
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    (RESULTS / "scale.md").write_text(tables())
    draw(RESULTS / "scale.png")
    print(f"{RESULTS / 'scale.md'}, {RESULTS / 'scale.png'}")
