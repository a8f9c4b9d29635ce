"""The benchmark's parameter lists have the sizes of the models they are named after."""

import math

import pytest

from benchmarks.cases import lists

COUNTS = {  # tensors, weights, tensors of at most 1,024 elements
    "resnet18": (62, 11_173_962, 41),
    "swin_t": (173, 27_673_154, 94),
    "ddpm_unet": (334, 38_632_323, 218),
    "dit_xl2": (291, 674_834_720, 1),
    "sd14_unet": (686, 859_520_964, 212),
    "llama_1b": (146, 1_235_814_400, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    sizes = [math.prod(shape) for shape in getattr(lists, name)()]
    assert (len(sizes), sum(sizes), sum(size <= 1024 for size in sizes)) == COUNTS[name]
