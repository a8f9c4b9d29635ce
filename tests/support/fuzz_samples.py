"""Random arguments of ``sample_square_accumulate_``: shapes, dtypes, strides, weights."""

import torch
from cases import Case
from fuzz_lists import DTYPES, LAYOUT_NAMES, laid_out, numbers
from hypothesis import strategies as st
from sample_ops import sample_case

SAMPLES = st.sampled_from([0, 1, 2, 3, 5, 9])
POSITIONS = st.one_of(
    st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3).map(tuple),
    st.sampled_from([(4,), (8,), (9,), (17,), (41,)]),
)
OUTPUTS = st.sampled_from([0, 1, 2, 3, 7, 64, 65])
FEATURES = st.one_of(
    st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=3).map(tuple),
    st.sampled_from([(0,), (31,), (33,), (64,), (130,), (515,), (1025,)]),
)


@st.composite
def square_case(draw):
    torch.manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(SAMPLES), draw(POSITIONS), draw(OUTPUTS), draw(FEATURES)
    weight = draw(st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, -1.0, 1e-20])))
    dtype = draw(st.sampled_from(DTYPES))
    case: Case = sample_case(shape, dtype, weight=weight, power=draw(st.sampled_from([1, 2])))
    for name in ("deltas", "inputs"):
        kind = draw(st.sampled_from(["normal", "normal", "zero", "tiny"]))
        tensor = numbers(case.tensors[name].shape, dtype, kind)
        case.tensors[name] = laid_out(tensor, draw(st.sampled_from(LAYOUT_NAMES)))
    return case
