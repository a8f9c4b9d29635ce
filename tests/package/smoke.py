"""What an installed wheel must do; run by test_wheel.py and `make smoke`, outside the checkout.

Prints "native" where the compiled kernels are there, else "reference", and the versions.
"""

import platform
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf
from sfron_fast.ops import native

assert Path(sf.__file__).is_relative_to(sys.prefix), sf.__file__
assert (Path(sf.__file__).parent / "py.typed").exists()
torch.manual_seed(0)
x = torch.randn(64, 8)
y = x[:, :3].argmax(1)
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
retain, forget = (DataLoader(TensorDataset(x[s], y[s]), 16) for s in (slice(16, 64), slice(0, 16)))
paper = sf.Recipe.paper(cycles=2, forget_weight=50.0)
for recipe in (paper, sf.Recipe.official(cycles=2, max_norm=50.0)):
    result = sf.unlearn(model, forget=forget, retain=retain, recipe=recipe)
result.mask.save("mask.safetensors")
assert sf.SaliencyMask.load("mask.safetensors") == result.mask
assert all(torch.isfinite(p).all() for p in model.parameters())
kind = "native" if native.available() else "reference"
print(kind, "python", platform.python_version(), "torch", torch.__version__, sf.__version__)
