"""The CPU cases under pytest-benchmark, for its histograms, saved runs and comparisons with them:

`pytest benchmarks/test_cpu.py --benchmark-autosave --benchmark-histogram -k "adamw and forget"`

Each arm runs by itself here. The project's own ratios are from `make bench`, which takes the arms
in turn: a machine that slows down meanwhile slows them all.
"""

import pytest

from benchmarks.harness import Arm, Case, provenance
from benchmarks.run import chosen_cases, label

CASES = [case for case in chosen_cases("cpu", "cpu", tiny=False) if "compiled" not in case.name]
ARMS = [
    pytest.param(case, make, id=f"{case.name}: {label(make)}")
    for case in CASES
    for make in case.arms
]


@pytest.mark.parametrize(("case", "make"), ARMS)
def test_arm(benchmark, case: Case, make) -> None:
    try:
        arm: Arm = make()
    except (ImportError, ValueError, NotImplementedError) as error:  # not here, or not on a CPU
        pytest.skip(str(error))
    benchmark.group = case.name
    benchmark.name = arm.name
    benchmark.extra_info.update(provenance(), bytes=case.bytes)
    benchmark.pedantic(arm.run, warmup_rounds=3, rounds=20)
