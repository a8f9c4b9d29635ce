"""What comes back when weights are stored in few bits."""

import copy

import torch
from torch import Tensor, nn

from ..errors import integer, require

MOST_BITS = 8


def quantised(model: nn.Module, bits: int) -> nn.Module:
    """A copy of ``model`` whose weight matrices went to integers of ``bits`` bits and back.

    Each row of a weight of two dimensions or more has a scale of its own, and its largest absolute
    value becomes the largest integer (symmetric round to nearest, the quantisation of Zhang et al.
    2025, "Catastrophic failure of LLM unlearning via quantization"). Vectors (biases, norms) stay.
    A weight that several modules share stays shared.

    What a method hid within half a step of the integers returns: judge the copy as the model, and
    the retrained model's copy as the retrained model. The copy is in eval mode.

    Raises:
        ValueError: bits outside 2 to 8, or no weight matrix.
    """
    bits = integer("bits", bits, 2)
    require(bits <= MOST_BITS, "bits", f"2 to {MOST_BITS}", bits)
    rounded = copy.deepcopy(model).eval()
    matrices = [p for p in rounded.parameters() if p.dim() > 1 and p.is_floating_point()]
    require(bool(matrices), "model", "a weight of two dimensions or more", "none")
    with torch.no_grad():
        for matrix in matrices:
            integers, scales = to_integers(matrix, bits)
            matrix.copy_(integers.mul_(scales).view_as(matrix))
    return rounded


def to_integers(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(integers, in fp32 or fp64 [rows, columns]; scales [rows, 1]) of a weight [rows, ...]."""
    rows = weight.detach().flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest = 2 ** (bits - 1) - 1
    scales = rows.abs().amax(1, keepdim=True) / largest
    return (rows / torch.where(scales == 0, 1.0, scales)).round(), scales
