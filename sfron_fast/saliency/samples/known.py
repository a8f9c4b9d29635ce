"""The functions that are known, by what torch hands to a mode."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...ops.linear_logp import linear_logp
from .heads import head
from .products import addmm, convolution, embedding, linear, matmul
from .uses import Use
from .vectors import (
    add,
    batch_norm,
    expand,
    group_norm,
    instance_norm,
    layer_norm,
    multiply,
    rms_norm,
)

KNOWN: dict[Any, Callable[..., list[Use]]] = {
    F.linear: linear,
    linear_logp: head,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.mm: matmul,
    torch.Tensor.mm: matmul,
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    torch.add: add,
    torch.Tensor.add: add,
    torch.mul: multiply,
    torch.Tensor.mul: multiply,
    torch.Tensor.expand: expand,
}
