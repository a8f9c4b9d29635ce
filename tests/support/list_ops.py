"""Entries of the small ops over lists: interpolation, Fisher, norm, mask."""

import numpy
import tolerances
import torch
from cases import Case, mask_bits, value_list
from judging import formula_of
from op_entries import ListOp
from spoiling import (
    MEASURED,
    bad_lists,
    bad_masks,
    bad_numbers,
    bad_scalar_tensors,
    bad_tensor_numbers,
    blame,
)

from sfron_fast import functional
from sfron_fast.ops import reference

SHAPES = ((3,), (65,))


def tensor_of(numbers, device):
    return torch.tensor(numbers, dtype=torch.float64, device=device)


# --- interpolate_ ---------------------------------------------------------------------------------


def interpolate_case(
    shapes=SHAPES,
    dtype=torch.float32,
    device="cpu",
    slow_lr=0.3,
    special=False,
    numbers=None,
) -> Case:
    lists = {
        name: value_list(shapes, dtype, device, special=special * number)
        for number, name in ((1, "slow"), (2, "fast"))
    }
    if numbers is not None:
        lists["numbers"] = tensor_of(numbers, device)
    return Case(lists, {"slow_lr": slow_lr})


INTERPOLATE = ListOp(
    name="interpolate_",
    call=functional.interpolate_,
    make=interpolate_case,
    settings={str(lr): {"slow_lr": lr} for lr in (0.0, 0.1, 0.49999, 0.5, 0.75, 1.0)},
    thorough=("0.1", "0.5", "0.75"),
    many="0.1",
    like="slow",
    flat=("fast",),
    in_graph=("slow", "fast"),
    numbers=("slow_lr",),
    wrong=[
        *blame(bad_lists("slow", "fast"), "slow", "fast"),
        *bad_numbers(slow_lr=(-0.1, 1.1)),
        *bad_tensor_numbers([0.5], ["slow_lr"]),
    ],
)


# --- fisher_accumulate_ ---------------------------------------------------------------------------


def fisher_case(
    shapes=SHAPES, dtype=torch.float32, device="cpu", weight=0.7, special=False, numbers=None
) -> Case:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fisher = [f.abs() for f in value_list(shapes, wide, device, special=special * 1)]
    tensors = {"fisher": fisher, "grads": value_list(shapes, dtype, device, special=special * 2)}
    if numbers is not None:
        tensors["numbers"] = tensor_of(numbers, device)
    return Case(tensors, {"weight": weight})


def _halved(case):
    case.tensors["fisher"][1] = case.tensors["fisher"][1].bfloat16()


FISHER_ACCUMULATE = ListOp(
    name="fisher_accumulate_",
    call=functional.fisher_accumulate_,
    make=fisher_case,
    settings={f"{weight:.3g}": {"weight": weight} for weight in (0.0, 1.0, 1 / 3, 128.0)},
    thorough=("0", "0.333", "128"),
    many="0.333",
    like="grads",
    flat=("fisher",),
    in_graph=("fisher",),
    numbers=("weight",),
    wrong=[
        *blame(bad_lists("fisher", "grads"), "grads", "fisher"),
        ("fisher-bf16", _halved, "fisher"),
        *bad_numbers(weight=(-1.0,)),
        *bad_tensor_numbers([0.5], ["weight"]),
    ],
)


# --- masked_grad_norm -----------------------------------------------------------------------------


def norm_case(
    shapes=SHAPES,
    dtype=torch.float32,
    device="cpu",
    masked=True,
    scaled=False,
    scale=1.0,
    special=False,
) -> Case:
    """Without ``special`` values: non-finite ones have tests of their own."""
    if dtype == torch.float16 and scale != 1.0:
        scale = 1e4 if scale > 1.0 else 1e-6
    masks = [reference.pack_bits(mask_bits(shape, device)) for shape in shapes] if masked else []
    grads = value_list(shapes, dtype, device, scale=scale)
    grad_scale = torch.tensor(3.0, device=device) if scaled else None
    return Case({"grads": grads, "masks": masks, "grad_scale": grad_scale}, {})


def selected_values(case: Case) -> torch.Tensor:
    """fp64 [selected elements], unscaled."""
    parts = []
    for i, grad in enumerate(case.tensors["grads"]):
        flat, masks = grad.detach().reshape(-1).double(), case.tensors["masks"]
        if masks and len(masks[i]):
            bits = numpy.unpackbits(masks[i].cpu().numpy(), count=flat.numel(), bitorder="little")
            flat = flat[torch.from_numpy(bits).bool().to(flat.device)]
        parts.append(flat)
    return torch.cat(parts) / (
        1.0 if case.tensors["grad_scale"] is None else case.tensors["grad_scale"].double()
    )


def norm_is_close(case: Case) -> None:
    """Of the public call and of the formula; sums are added in other orders."""
    selected = selected_values(case)
    truth = torch.linalg.vector_norm(selected)
    bound = tolerances.grad_norm(
        truth, 2 * selected.numel(), case.tensors["grad_scale"] is not None
    )
    for kernel in (functional.masked_grad_norm, formula_of("masked_grad_norm")):
        norm = case.run(kernel)
        assert norm.dtype == torch.float32
        assert norm.shape == ()
        error = (norm.double() - truth).abs()
        assert error <= bound, (norm, truth, float(error / bound))


# squares of 1e18 and 1e-18 leave the range of fp32, their norms do not
NORMS = {
    ", ".join(filter(None, (chosen, divided, size))): {
        "masked": chosen == "masked",
        "scaled": divided == "scaled",
        "scale": {"huge": 1e18, "tiny": 1e-18}.get(size, 1.0),
    }
    for chosen in ("all", "masked")
    for divided in ("", "scaled")
    for size in ("", "huge", "tiny")
}

MASKED_GRAD_NORM = ListOp(
    name="masked_grad_norm",
    call=functional.masked_grad_norm,
    make=norm_case,
    judge=norm_is_close,
    settings=NORMS,
    thorough=("all", "masked", "masked, scaled"),
    many="masked",
    like="grads",
    flat=("masks",),
    wrong=[
        # one list measures itself: another length is seen at the masks, another shape is right
        *[edit for edit in bad_lists("grads") if edit[0] in ("grads-dtype", "grads-meta")],
        ("grads-short", lambda case: case.tensors["grads"].pop(), "masks"),
        *bad_masks(),
        *bad_scalar_tensors("grad_scale"),
    ],
)


# --- saliency_mask --------------------------------------------------------------------------------

EPS = reference.FISHER_EPS


def mask_case(
    shapes=SHAPES, dtype=torch.float32, device="cpu", threshold=1.0, eps=EPS, special=False
) -> Case:
    lists = {
        name: [f * f for f in value_list(shapes, dtype, device, special=special * number)]
        for number, name in ((1, "forget"), (2, "retain"))
    }
    return Case(lists, {"threshold": threshold, "eps": eps})


def _low_precision(case):
    case.tensors["forget"][0] = case.tensors["forget"][0].bfloat16()


SALIENCY_MASK = ListOp(
    name="saliency_mask",
    call=functional.saliency_mask,
    make=mask_case,
    settings={
        f"{threshold:g}, eps {eps:g}": {"threshold": threshold, "eps": eps}
        for threshold in (0.1, 1.0, 3.0, 1e30)
        for eps in (0.0, EPS, 1.0)
    },
    thorough=("1, eps 1e-15",),
    many="1, eps 1e-15",
    like="forget",
    flat=("retain",),
    dtypes=[torch.float32, torch.float64],
    wrong=[
        *blame(bad_lists("forget", "retain"), "forget", "retain", kinds=MEASURED + ("meta",)),
        ("forget-bf16", _low_precision, "forget"),
        *bad_numbers(threshold=(0.0, -1.0), eps=(-1.0,)),
    ],
)
