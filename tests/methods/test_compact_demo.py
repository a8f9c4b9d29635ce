"""The demo's wrong labels, forgotten with 24-bit weights and moments in 8 bits: as with fp32."""

import statistics

import pytest

from benchmarks import moments

SEEDS = range(3)


@pytest.mark.long
def test_ends_as_accurate_and_as_near_as_other_batches_bring_fp32():
    ways = (moments.FP32, moments.OTHER, moments.CODES, moments.COMPACT)
    results = [moments.run(seed, ways) for seed in SEEDS]

    def mean(how, column):
        return statistics.mean(result[how][column] for result in results)

    for how in (moments.CODES, moments.COMPACT):
        assert mean(how, 0) < mean(moments.OTHER, 0)
        for column in (1, 2, 3):  # accuracy on forget, retain and test samples, in per cent
            assert abs(mean(how, column) - mean(moments.FP32, column)) <= 1.0
