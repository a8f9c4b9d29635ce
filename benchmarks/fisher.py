"""What the Fisher of samples costs beside that of batches: `python -m benchmarks.fisher`.

A whole pass of ``estimate_fisher`` over the same batches, on four models: squared batch means, each
sample's squares by saved inputs and output gradients, and each sample's squares by torch.func.vmap
(32 samples at a time; timed twice, as it takes minutes), which is how they were made before. Rounds
of all arms one after another; medians. Peak: what torch's allocator holds at most above the model
and the data, in units of the model's weights in fp32. Error: of the sums of samples, largest
difference from vmap's over the largest value of the parameter, worst parameter.
"""

import gc
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfron_fast as sf
from sfron_fast.demo import digits
from sfron_fast.distributed.ranks import Ranks
from sfron_fast.models.modes import evaluating
from sfron_fast.saliency.gradients import Pass, SquareSums, sample_gradients
from sfron_fast.saliency.samples.one_pass import sums_like, trainable
from sfron_fast.tasks.classification import MeanLoss

from .cases.models import Decoder, ResNet18
from .harness import provenance
from .timer import cpu_allocations

ROUNDS = 5
RESULT = Path(__file__).parent / "results" / "fisher.md"
Batches = list[tuple[Tensor, Tensor]]
Loss = Callable[[Any, Tensor], Tensor] | None


def tokens_loss(output: Any, targets: Tensor) -> Tensor:
    """Of every token; of a model's output, or one that has logits."""
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def images(count: int, size: int, *shape: int) -> Batches:
    return [(torch.randn(size, *shape), torch.randint(10, (size,))) for _ in range(count)]


def sentences(count: int, size: int, length: int, vocabulary: int) -> Batches:
    shape = (size, length)
    drawn = [torch.randint(vocabulary, (2, *shape)) for _ in range(count)]
    return [(ids, targets) for ids, targets in drawn]


def adapters() -> nn.Module:
    """A Llama of 4 layers with LoRA factors on every linear layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 4096}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))
    adapted: Any = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:  # at its start, where half of the gradients are 0
                p.normal_(std=0.02)
    return adapted


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batches], Loss]] = {
    "demo's ConvNet, 20 batches of 64": (
        digits.small_convnet,
        lambda: images(20, 64, 1, 8, 8),
        None,
    ),
    "ResNet-18, 4 batches of 32": (ResNet18, lambda: images(4, 32, 3, 32, 32), None),
    "decoder, 12 batches of 8 x 128": (
        lambda: Decoder(4096, 256, 4, 128),
        lambda: sentences(12, 8, 128, 4096),
        tokens_loss,
    ),
    "LoRA, 12 batches of 8 x 128": (
        adapters,
        lambda: sentences(12, 8, 128, 4096),
        tokens_loss,
    ),
}


def by_vmap(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """What "sample" was before: gradients of 32 samples at a time, then squared."""
    params = trainable(model)
    values = sums_like(params)
    sums = SquareSums(values)
    one = Pass(model, MeanLoss(loss), params, Ranks(model, None), 32)
    with evaluating(model):
        for batch in batches:
            for grads in sample_gradients(one, batch):
                sums.add([grads.get(n) for n in values], 1.0)
    samples = sum(len(y) for _, y in batches)
    return {n: v / samples for n, v in values.items()}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak(call: Callable[[], Any]) -> int:
    """Bytes that torch's allocator holds at most during the call, above what it held before."""
    gc.collect()
    return max(accumulate(cpu_allocations(call), initial=0))


def measured(name: str, vmap: bool) -> list[str]:
    """A row of the table."""
    make, data, loss = CASES[name]
    torch.manual_seed(0)
    model, batches = make().eval(), data()
    arms: dict[str, Callable[[], Any]] = {
        how: lambda how=how: sf.estimate_fisher(model, batches, loss, estimator=how)  # type: ignore[misc]
        for how in ("batch", "sample")
    }
    error = "-"
    if vmap:
        arms["vmap"] = lambda: by_vmap(model, batches, loss)
        pairs = zip(arms["sample"]().values(), arms["vmap"]().values(), strict=True)
        error = f"{max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs):.0e}"
    times: dict[str, list[float]] = {how: [] for how in arms}
    for turn in range(ROUNDS + 1):
        for how, call in arms.items():
            if how == "vmap" and turn > 1:
                continue  # once: it takes minutes
            spent = seconds(call)
            if turn or how == "vmap":  # the first warms up
                times[how].append(spent)
    middle = {how: statistics.median(t) for how, t in times.items()}
    size = 4 * sum(p.numel() for p in model.parameters())
    memory = {how: peak(call) / size for how, call in arms.items()}
    ratios = [r["sample"] / r["batch"] for r in (middle, memory)]
    row = [name, *(f"{middle[how]:.2f}" for how in ("batch", "sample")), f"{ratios[0]:.2f}x"]
    row += [f"{middle['vmap'] / middle['sample']:.1f}x" if vmap else "-"]
    row += [f"{memory[how]:.1f}" for how in ("batch", "sample")]
    return [*row, f"{ratios[1]:.2f}x", f"{memory['vmap']:.1f}" if vmap else "-", error]


def main() -> None:
    """Measure every case and write the table."""
    origin = provenance()
    heads = ["pass", "batch, s", "sample, s", "time", "vmap over sample"]
    heads += ["batch, peak", "sample, peak", "memory", "vmap, peak", "error"]
    lines = ["# The Fisher of samples", "", str(__doc__).split("\n\n", 1)[1].strip(), ""]
    lines += [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name in CASES:
        # vmap has no rule for what transformers' masks are made of
        row = measured(name, vmap="LoRA" not in name)
        print(row, flush=True)
        lines.append(f"| {' | '.join(row)} |")
    told = ", ".join(
        f"{k} {origin[k]}" for k in ("device", "isa", "threads", "load", "torch", "commit", "date")
    )
    RESULT.write_text("\n".join([*lines, "", told, ""]))


if __name__ == "__main__":
    main()
