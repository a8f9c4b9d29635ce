"""Formulas of a cycle on many GPUs: bytes held and sent, seconds of each resource.

tests/distributed/test_scale.py counts the bytes through collectives of small runs, which these
formulas must give exactly. Weights, gradients, moments and slow weights are fp32 shards of FSDP2
(`fully_shard` of every layer and of the rest), gathered in bf16; AdamW; activations are
checkpointed at every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2, prod

from sfron_fast.integrations.memory import INSIDE, activations

from ..cases.lists import Shape, llama
from ..cases.step_cases import FLOORS

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
        INSIDE,
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
    """``layer`` repeats and is gathered on its own; ``rest`` (embeddings, head) until backward."""

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
        embedding, *layer, norm = llama(hidden, 1, between, values, 128_256)
        rest = [embedding, norm, *([] if name == "1B" else [embedding])]
        found.append(Model(name, layer, layers, rest, hidden, 128_256))
    return found


def sent(
    model: Model, gpus: int, retain_steps: int, gathered: int = GATHERED, reduced: int = REDUCED
) -> dict[str, float]:
    """Collective -> bytes that each rank sends in a cycle: rings, all but its part of a message."""
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
    return {
        "weights and moments": 3 * STORED * shard,
        "gradients": STORED * shard if gradients else 0.0,
        "slow weights": slow * shard,
        "mask": MASK * shard,
        # this layer and the next; this layer's gradients, and the rest's, which wait for the end of
        # backward
        "gathered": (2 * layer + rest) * GATHERED + layer * (GATHERED + REDUCED) + rest * GATHERED,
        "activations": activations(tokens, model.width, model.layers)
        + 2 * tokens * model.vocabulary,
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
