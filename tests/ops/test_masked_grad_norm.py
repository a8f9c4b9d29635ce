import math

import numpy
import pytest
import tolerances
import torch
from cases import (
    DTYPES,
    LAYOUT_SHAPES,
    LAYOUTS,
    MIXED,
    NATIVE_DTYPES,
    SIZES,
    Case,
    assert_all_entries_reject,
    assert_deterministic,
    assert_noncontiguous_is_right_or_refused,
    assert_opcheck,
    assert_same_bits,
    bad_lists,
    bad_masks,
    bad_scalar_tensors,
    compiled_equals_eager,
    each_size,
    lazy_zeros,
    mask_bits,
    reject_params,
    shifted,
    value_list,
)

from sfron_fast import functional
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops


def make(
    shapes=((3,), (65,)), dtype=torch.float32, device="cpu", masked=True, scaled=False, scale=1.0
) -> Case:
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


def assert_close_to_truth(case: Case, kernel=functional.masked_grad_norm) -> None:
    selected = selected_values(case)
    truth = torch.linalg.vector_norm(selected)
    norm = case.run(kernel)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    error = (norm.double() - truth).abs()
    bound = tolerances.grad_norm(
        truth, 2 * selected.numel(), case.tensors["grad_scale"] is not None
    )
    assert error <= bound, (norm, truth, float(error / bound))


@pytest.mark.parametrize("scale", [1.0, 1e18, 1e-18], ids=["normal", "huge", "tiny"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, masked, scaled, scale):
    """Squares of 1e18 and 1e-18 leave the range of fp32, their norms do not."""
    if dtype == torch.float16 and scale != 1.0:
        scale = 1e4 if scale > 1.0 else 1e-6
    case = make([*MIXED[:-1], (4099,)], dtype, device, masked, scaled, scale)
    assert_close_to_truth(case)
    assert_close_to_truth(case, lambda **tensors: reference.masked_grad_norm(**tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """Bits 0 and 2 of 0b101 keep 3 and 4 of (3, 100, 4): norm 5, unscaled by 2 it is 2.5."""
    grad = torch.tensor([3.0, 100.0, 4.0], dtype=dtype, device=device)
    mask = torch.tensor([0b101], dtype=torch.uint8, device=device)
    assert functional.masked_grad_norm([grad], [mask]).item() == 5.0
    assert (
        functional.masked_grad_norm(
            [grad], [mask], grad_scale=torch.tensor(2.0, device=device)
        ).item()
        == 2.5
    )
    none = torch.zeros(0, dtype=torch.uint8, device=device)
    assert functional.masked_grad_norm([grad[::2], grad[1:2] * 0.12], [none, none]).item() == 13.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_masked_out_is_untouched(device, dtype, poison):
    """A non-finite gradient counts where it is selected, and only there."""
    case = make(MIXED[:-1], dtype, device)
    expected = case.run(functional.masked_grad_norm)
    for grad, mask in zip(case.tensors["grads"], case.tensors["masks"], strict=True):
        grad.copy_(torch.where(reference.unpack_bits(mask, grad.shape), grad, poison))
    assert_same_bits(case.run(functional.masked_grad_norm), expected)
    for at in (0, 31, 32, 64):
        grads, masks = (
            [torch.zeros(65, dtype=dtype, device=device)],
            [torch.zeros(9, dtype=torch.uint8, device=device)],
        )
        grads[0][at] = poison
        assert functional.masked_grad_norm(grads, masks).item() == 0.0
        masks[0][at // 8] = 1 << at % 8
        assert not math.isfinite(functional.masked_grad_norm(grads, masks).item())
        assert not math.isfinite(functional.masked_grad_norm(grads).item())


@pytest.mark.checklist("E2")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_opcheck(device, dtype):
    for masked in (False, True):
        assert_opcheck(
            "masked_grad_norm", make([(5,), (0,), (), (65,)], dtype, device, masked, scaled=masked)
        )


def test_compile(device):
    cases = [make([(5,), (0,), (70,)], torch.float32, device, scaled=True) for _ in range(3)]
    assert compiled_equals_eager(ops.masked_grad_norm, cases) == 1


@pytest.mark.checklist("B7")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic(device, dtype, set_threads):
    shapes = [*MIXED, (200_001,)]
    assert_deterministic(make(shapes, dtype, device), ops.masked_grad_norm, set_threads)
    assert_deterministic(
        make(shapes, dtype, device, masked=False), ops.masked_grad_norm, set_threads
    )


@each_size
def test_empty_odd_and_large(device, dtype, size):
    assert functional.masked_grad_norm([]).item() == 0.0
    for masked in (False, True):
        case = make(SIZES[size], dtype, device, masked)
        assert_close_to_truth(case)
        assert_close_to_truth(case.map(shifted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    case = make(LAYOUT_SHAPES, dtype, device)
    laid = case.map(lambda t: t if t.dtype == torch.uint8 else LAYOUTS[layout](t))
    assert_same_bits(laid.run(functional.masked_grad_norm), case.run(functional.masked_grad_norm))
    if dtype != torch.float64:
        whole = Case(
            {**case.tensors, "grads": [g.round() for g in case.tensors["grads"]]}, {}
        )  # exact sums
        assert_noncontiguous_is_right_or_refused("masked_grad_norm", whole)


GRADS = [edit for edit in bad_lists("grads") if "dtype" in edit[0] or "meta" in edit[0]]
SHORT = [("grads-short", lambda case: case.tensors["grads"].pop(), "masks")]


@reject_params([*GRADS, *SHORT, *bad_masks(), *bad_scalar_tensors("grad_scale")])
def test_rejects(edit, argument):
    assert_all_entries_reject("masked_grad_norm", make, edit, argument)


def test_version_counter():
    """Nothing is written: no version moves."""
    case = make()
    before = [t._version for _, t in case.flat()]
    case.run(functional.masked_grad_norm)
    assert [t._version for _, t in case.flat()] == before


@pytest.mark.long
def test_index_arithmetic_above_2_31():
    if ops.kernel_for("masked_grad_norm", "cpu") != "native":
        pytest.skip("the reference would widen 2^31 elements to fp64")
    numel = 2**31 + 65
    grad = lazy_zeros(numel, torch.bfloat16)
    for at, value in ((0, 2.0), (2**31 - 1, 4.0), (2**31, 4.0), (numel - 1, 8.0)):
        grad[at] = value
    assert functional.masked_grad_norm([grad]).item() == 10.0
    mask = lazy_zeros((numel + 7) // 8, torch.uint8)
    mask[-1], mask[2**28] = 1, 1  # the last element and element 2^31
    assert functional.masked_grad_norm([grad], [mask]).item() == pytest.approx(
        math.sqrt(80.0), rel=tolerances.U
    )
