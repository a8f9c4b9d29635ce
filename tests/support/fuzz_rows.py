"""Random cases of the squared errors, with references and caps that some samples have reached."""

import math

import torch
from cases import DTYPES
from hypothesis import strategies as st
from row_ops import mse_case

from sfron_fast.ops.dtypes import accumulate_dtype


@st.composite
def mse_rows(draw):
    """Any size, scale and spread of references; a cap lies midway between two samples' losses."""
    samples, elements = draw(st.integers(1, 40)), draw(st.integers(1, 300))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    case = mse_case(
        (samples, elements),
        dtype,
        scale=10.0 ** draw(st.integers(-3, 3)),
        temperature=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.7])),
        floor=10.0 ** draw(st.integers(-8, 1)),
        mean=draw(st.booleans()),
    )
    if not draw(st.booleans()):
        return case
    spread = draw(st.integers(0, 6))
    usual = 10.0 ** ((torch.rand(samples, dtype=torch.float64) - 0.5) * spread)
    usual = usual.to(accumulate_dtype(dtype))
    case.tensors["reference"] = usual
    if draw(st.booleans()):
        error = case.tensors["prediction"].double() - case.tensors["target"].double()
        losses = error.square().sum(1) / (elements if case.scalars["mean"] else 1)
        relative = (losses / usual.double()).sort().values
        place = draw(st.integers(0, samples - 1))
        above = relative[place + 1] if place + 1 < samples else 2.0 * relative[place]
        cap = float(relative[place] + above) / 2.0
        apart = float(above - relative[place]) > 1e-3 * cap
        if apart and cap > 1.001 * case.scalars["floor"] and math.isfinite(cap):
            case.scalars["cap"] = cap
    return case
