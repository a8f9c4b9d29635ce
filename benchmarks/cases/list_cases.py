"""Which list cases a device runs, on which lists; row_cases.py has the losses."""

import torch

from ..harness import Case
from .lists import Shape, ddpm_unet, dit_xl2, llama_1b, resnet18, sd14_unet, small_tensors, swin_t
from .peers import peer_case
from .saliency_cases import fisher_case, mask_case
from .step_cases import SWEEP, compiled_case, graph_case, long_case, norm_case, step_case


def cases(kind: str, device: str, tiny: bool) -> list[Case]:
    """For a ``kind`` of device, most important first; ``tiny``: of a few thousand weights."""
    return (gpu_cases if kind == "cuda" else cpu_cases)(device, tiny)


def cpu_cases(device: str, tiny: bool) -> list[Case]:
    wide = resnet18(4) if tiny else resnet18(96)
    many, medium = (
        small_tensors(50 if tiny else 4_000, 64),
        small_tensors(20 if tiny else 1_000, 1_024),
    )
    name, on = "ResNet-18 x 1.5", {"device": device, "seconds": 8.0}
    return [
        step_case(name, wide, "adamw", "forget", **on, narrow=True),
        step_case(name, wide, "adamw", "pair", **on, narrow=True),
        step_case(name, wide, "sgd", "forget", **on),
        step_case(name, wide, "adamw", "plain", **on),
        step_case(name, wide, "sgd", "plain", **on),
        step_case("4,000 x 64", many, "adamw", "pair", **on),
        fisher_case(name, wide, device),
        mask_case(name, wide, device),
        step_case("1,000 x 1,024", medium, "adamw", "forget", device),
        step_case(
            "10,000 x 64", small_tensors(60 if tiny else 10_000, 64), "adamw", "forget", device
        ),
        step_case("Swin-T", [(8, 8)] if tiny else swin_t(), "adamw", "forget", device),
        step_case("DDPM U-Net", [(8, 8)] if tiny else ddpm_unet(), "adamw", "pair", device),
        *density_cases(name, wide, device),
        step_case(name, wide, "adamw", "forget", device, dtype=torch.bfloat16),
        step_case(name, wide, "adamw", "pair", device, channels_last=True),
        *sweep_cases(device, [1_000] if tiny else [10**5, 10**6, 10**7, 10**8]),
    ]


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    dit = dit_xl2(16, 1) if tiny else dit_xl2()
    resnet = resnet18(4) if tiny else resnet18()
    many, medium = (
        small_tensors(50 if tiny else 10_000, 64),
        small_tensors(20 if tiny else 1_000, 1_024),
    )
    return [
        step_case(
            "DiT-XL/2", dit, "adamw", "forget", device, cpu_masks=True, seconds=4.0, narrow=True
        ),
        step_case(
            "DiT-XL/2", dit, "adamw", "pair", device, cpu_masks=True, seconds=4.0, narrow=True
        ),
        graph_case("ResNet-18", resnet, "sgd", "forget", device),
        step_case("ResNet-18", resnet, "sgd", "forget", device, cpu_masks=True),
        step_case("ResNet-18", resnet, "sgd", "pair", device),
        step_case("10,000 x 64", many, "adamw", "forget", device),
        fisher_case("DiT-XL/2", dit, device),
        mask_case("DiT-XL/2", dit, device),
        fisher_case("ResNet-18", resnet, device, published=True),
        step_case("DiT-XL/2", dit, "adamw", "plain", device),
        step_case("DiT-XL/2", dit, "sgd", "plain", device),
        step_case("DiT-XL/2", dit, "sgd", "forget", device),
        step_case("DiT-XL/2", dit, "adamw", "forget", device, dtype=torch.bfloat16),
        norm_case("DiT-XL/2", dit, device),
        step_case("1,000 x 1,024", medium, "adamw", "forget", device),
        step_case("10,000 x 64", many, "sgd", "plain", device),
        long_case("1 x (2^31 + 1)", [(99,)] if tiny else [(2**31 + 1,)], device),
        step_case("Llama-3.2-1B", [(8, 8)] if tiny else llama_1b(), "adamw", "forget", device),
        step_case("SD 1.4 U-Net", [(8, 8)] if tiny else sd14_unet(), "adamw", "pair", device),
        step_case("DDPM U-Net", [(8, 8)] if tiny else ddpm_unet(), "adamw", "pair", device),
        step_case(
            "DDPM U-Net",
            [(8, 8)] if tiny else ddpm_unet(),
            "adamw",
            "pair",
            device,
            channels_last=True,
        ),
        step_case("Swin-T", [(8, 8)] if tiny else swin_t(), "adamw", "forget", device),
        *density_cases("DiT-XL/2", dit, device),
        *sweep_cases(device, [1_000] if tiny else [10**5, 10**6, 10**7, 10**8, 10**9]),
    ]


def density_cases(name: str, shapes: list[Shape], device: str) -> list[Case]:
    """Fewer weights selected; the other cases select half."""
    return [
        step_case(name, shapes, "adamw", "forget", device, density=density)
        for density in (0.1, 0.01)
    ]


def sweep_cases(device: str, sizes: list[int]) -> list[Case]:
    """Time against the number of weights, in tensors of at most a million."""
    return [
        step_case(
            f"{SWEEP}{n:,} weights",
            [(min(n, 10**6),)] * max(1, n // 10**6),
            "adamw",
            "forget",
            device,
        )
        for n in sizes
    ]


def compile_cases(kind: str, device: str, tiny: bool) -> list[Case]:
    """Apart, to be run last: compiling may take longer than everything else."""
    backend = "aot_eager" if tiny else "inductor"
    lists = {("ResNet-18", "sgd"): resnet18(4) if tiny else resnet18()}
    if kind == "cuda":
        lists["DiT-XL/2", "adamw"] = dit_xl2(16, 1) if tiny else dit_xl2()
    return [
        compiled_case(name, shapes, rule, device, backend) for (name, rule), shapes in lists.items()
    ]


def peer_cases(kind: str, device: str, tiny: bool) -> list[Case]:
    """Last too: torchao compiles, and importing a package may change what runs after it."""
    # all arms fit at once
    name, shapes = ("DDPM U-Net", ddpm_unet()) if kind == "cuda" else ("ResNet-18", resnet18())
    chosen = [(name, shapes, "adamw"), (name, shapes, "sgd")]
    if kind == "cuda":
        chosen.append(("10,000 x 64", small_tensors(10_000, 64), "sgd"))
    return [
        peer_case(name, [(8, 8)] if tiny else shapes, rule, device) for name, shapes, rule in chosen
    ]
