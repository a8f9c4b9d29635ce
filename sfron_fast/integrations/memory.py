"""`python -m sfron_fast memory`: what unlearning a language model takes on one GPU, on paper.

The optimizer's part is counted to the byte (``optim.footprint``) on a model of the Llama kind that
has about as many weights: as many layers as its width has units of 128, a vocabulary of 128,256,
key and value heads a quarter of the query heads. What is not the optimizer's:

    Fisher       4 bytes a trained weight (``low_memory=True``), before the first step, when there
                 are neither gradients nor moments; and 8 bytes a weight of the largest parameter,
                 while its mask is packed
    activations  2 bytes a token and unit of width for each layer's input (gradient checkpointing),
                 34 for the layer that is computed again (Korthikanti et al. 2022, without attention
                 maps); no logits (``fuse_head``)
    gathered     with several ranks two layers, the embedding and the head

A state dict costs nothing here: it is copied to the host tensor by tensor.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from ..errors import integer, number, require
from ..optim.adamw import SFRonAdamW
from ..optim.footprint import footprint
from .measures import aligned

VOCABULARY, HEAD, BETWEEN = 128_256, 128, 3.5
FISHER, PACKING = 4, 8  # bytes
INSIDE = 34  # bytes a token and unit of width in a layer
CARDS = (24, 40, 80, 141)  # GB
RESERVED = 0.05  # of a card: torch's context, and what its allocator cannot use
TOKENS = 2048
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATES = {**FLOATS, "int8": torch.int8}
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run: the model's size and how it is held."""

    params: float
    dtype: str = "bfloat16"
    weight_bits: int | None = None
    state_dtype: str = "float32"
    slow: bool = False
    slow_device: str | None = None
    shared_moments: bool = False
    masked: bool = True
    lora: int | None = None
    ranks: int = 1
    tokens: int = TOKENS

    def __post_init__(self) -> None:
        number("params", self.params, 1e6, 1e13)
        integer("ranks", self.ranks, 1)
        integer("tokens", self.tokens, 1)
        if self.lora is not None:
            integer("lora", self.lora, 1)
        require(self.slow or self.slow_device is None, "slow_device", "None without slow", "cpu")
        wanted = self.weight_bits is None or self.dtype == "bfloat16"
        require(wanted, "weight_bits", "weights in bfloat16 with it", self.dtype)


def activations(tokens: int, width: int, layers: int) -> int:
    """Bytes of every layer's input, and of what one layer computes from it."""
    return tokens * width * (2 * layers + INSIDE)


def layers_of(params: float) -> int:
    """Of the model with about as many weights."""
    return min(range(1, 400), key=lambda n: abs(_weights(n) - params))


def _shapes(layers: int) -> tuple[list[Shape], list[Shape]]:
    """(of one layer, of the rest)."""
    width = HEAD * layers
    inner, values = int(BETWEEN * width), max(HEAD, width // 4)
    layer: list[Shape] = [(width, width), (values, width), (values, width), (width, width)]
    layer += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return layer, [(VOCABULARY, width), (width,), (VOCABULARY, width)]


def _weights(layers: int) -> int:
    layer, rest = _shapes(layers)
    return layers * sum(map(prod, layer)) + sum(map(prod, rest))


def _adapters(layer: list[Shape], rank: int) -> list[Shape]:
    """LoRA factors of a layer's matrices."""
    pairs = [((rank, shape[1]), (shape[0], rank)) for shape in layer if len(shape) == 2]
    return [shape for pair in pairs for shape in pair]


def needed(plan: Plan) -> dict[str, dict[str, float]]:
    """Bytes on each GPU by phase ("Fisher", "cycle") and part."""
    layers = layers_of(plan.params)
    layer, rest = _shapes(layers)
    whole = _weights(layers)
    trained = [*layer * layers, *rest]
    if plan.lora is not None:
        trained = _adapters(layer, plan.lora) * layers
    trained_weights = sum(map(prod, trained))
    # shards of the first dimension
    shards = [(-(-shape[0] // plan.ranks), *shape[1:]) for shape in trained]
    kind = FLOATS[plan.dtype] if plan.lora is None else torch.float32
    found = footprint(_optimizer(plan, shards, kind), masked=plan.masked)
    # of another size than the model counted
    scale = plan.params / whole
    parts = {name: value * scale for name, value in found.items()}
    size = FLOATS[plan.dtype].itemsize
    if plan.lora is not None:
        parts["weights"] += plan.params * size / plan.ranks
    width = rest[0][1]
    shared = {
        "activations": float(activations(plan.tokens, width, layers)),
        "gathered": 0.0,
    }
    if plan.ranks > 1:
        shared["gathered"] = float(size * (2 * sum(map(prod, layer)) + sum(map(prod, rest))))
    fisher = 0.0
    if plan.masked:
        largest_one = max(map(prod, trained)) * PACKING
        fisher = (FISHER * trained_weights + largest_one) * scale / plan.ranks
    return {
        "Fisher": {"weights": parts["weights"], "Fisher": fisher, "mask": parts["mask"], **shared},
        "cycle": {**parts, **shared},
    }


def _optimizer(plan: Plan, shapes: list[Shape], dtype: torch.dtype) -> Any:
    """Over weights that are not there."""
    params = [nn.Parameter(torch.empty(s, dtype=dtype, device="meta")) for s in shapes]
    bits: Any = plan.weight_bits if dtype == torch.bfloat16 else None
    place: Any = plan.slow_device
    return SFRonAdamW(
        params,
        state_dtype=None if plan.state_dtype == "float32" and bits else STATES[plan.state_dtype],
        weight_bits=bits,
        moments="shared" if plan.shared_moments else "separate",
        slow_lr=0.5 if plan.slow else 1.0,
        slow_device=place,
    )


def peak(plan: Plan) -> float:
    """Bytes on each GPU, at most."""
    return max(sum(parts.values()) for parts in needed(plan).values())


def largest(card: float, **settings: Any) -> float:
    """Weights of the largest model that fits a card of so many GB, to two digits."""
    low, high = 1e6, 1e13
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        fits = peak(Plan(params=middle, **settings)) <= card * 1e9 * (1 - RESERVED)
        low, high = (middle, high) if fits else (low, middle)
    return low


KINDS: dict[str, dict[str, Any]] = {
    "fp32, moments in fp32": {"dtype": "float32"},
    "bf16, moments in bf16": {"state_dtype": "bfloat16"},
    "bf16 with `weight_bits=24`, moments in int8": {"weight_bits": 24, "state_dtype": "int8"},
    "bf16, LoRA 16": {"lora": 16},
}


SLOW: dict[str, dict[str, Any]] = {
    "": {},
    ", slow weights": {"slow": True},
    ", slow weights on the host": {"slow": True, "slow_device": "cpu"},
}


def sizes() -> list[list[str]]:
    """Rows of text: how large a model fits which card, for each way to hold it."""
    rows = [["held as", *(f"{card} GB" for card in CARDS)]]
    for name, settings in KINDS.items():
        for title, slow in SLOW.items() if "lora" not in settings else [("", {})]:
            fits = [largest(card, **slow, **settings) for card in CARDS]
            rows.append([name + title, *(f"{weights / 1e9:.1f}B" for weights in fits)])
    return rows


def table(plan: Plan) -> Iterator[str]:
    """Lines that say what a run takes."""
    phases = needed(plan)
    names = dict.fromkeys(name for parts in phases.values() for name in parts)
    yield f"{'':14}{'before the steps':>26}{'in a cycle':>26}"
    yield f"{'':14}" + f"{'bytes a weight':>17}{'GB':>9}" * 2
    for name in [*names, "in all"]:
        cells = ""
        for parts in phases.values():
            value = sum(parts.values()) if name == "in all" else parts.get(name, 0.0)
            cells += f"{value / plan.params:17.3f}{value / 1e9:9.2f}"
        yield f"{name:14}{cells}"
    fits = [card for card in CARDS if peak(plan) <= card * 1e9 * (1 - RESERVED)]
    yield f"fits {', '.join(f'{card} GB' for card in fits) or 'none of the cards'}" + (
        f" (of {', '.join(map(str, CARDS))} GB, {RESERVED:.0%} of each left to torch)"
    )


def add_parser(commands: Any) -> None:
    """``memory`` among the commands."""
    parser = commands.add_parser(
        "memory",
        help="what unlearning a model takes on a GPU, on paper",
        description="Bytes on each GPU by part. Without --params: how large a model fits.",
    )
    add = parser.add_argument
    add("--params", type=float, help="weights of the model: 8e9")
    add("--dtype", choices=FLOATS, default="bfloat16", help="of the weights")
    add("--weight-bits", type=int, choices=(24, 32), help="of bfloat16 weights, by corrections")
    add("--state-dtype", choices=STATES, default="float32", help="of the moments")
    add("--slow", action="store_true", help="slow weights too (slow_lr < 1)")
    add("--slow-device", choices=("cpu",), help="slow weights in the host's memory")
    add("--shared-moments", action="store_true", help="one pair of moments for both phases")
    add("--method", choices=("sfron", "others"), default="sfron", help="others: no mask")
    add("--lora", type=int, metavar="RANK", help="adapters of this rank are trained")
    add("--ranks", type=int, default=1, help="GPUs that FSDP2 shards over")
    add("--tokens", type=int, default=TOKENS, help=f"of a step on each GPU (default {TOKENS})")


def execute(chosen: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ValueError: a number out of range, by name.
    """
    if chosen.params is None:
        print(aligned(sizes()))
        return
    ours = chosen.method == "sfron"
    plan = Plan(
        params=chosen.params,
        dtype=chosen.dtype,
        weight_bits=chosen.weight_bits,
        state_dtype=chosen.state_dtype,
        slow=chosen.slow or chosen.slow_device is not None,
        slow_device=chosen.slow_device,
        shared_moments=chosen.shared_moments or not ours,  # the others have one pair
        masked=ours,
        lora=chosen.lora,
        ranks=chosen.ranks,
        tokens=chosen.tokens,
    )
    print(*table(plan), sep="\n")
