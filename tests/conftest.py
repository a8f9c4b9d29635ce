import ctypes
import gc
import random
import sys

import numpy
import pytest
import torch

# without a GPU not collected, not "skipped"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# glibc fills fresh memory with the complement: 0x7f7f7f7f = 3.4e38, an fp16 NaN
M_PERTURB, FILL_0X7F = -6, 0x80

# xdist workers that spin on each other's cores are many times slower; see set_threads
torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if "long" in config.option.markexpr:
        return
    kept = [item for item in items if item.get_closest_marker("long") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_collection_finish():
    """Thousands of collected tests stay to the end: what looks for garbage need not look there."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What a kernel forgets to write shows: torch.empty gives NaN, and malloc, for native
    allocations, 0x7f bytes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    before, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if mallopt is not None:
        mallopt(M_PERTURB, FILL_0X7F)
    yield
    if mallopt is not None:
        mallopt(M_PERTURB, 0)
    torch.use_deterministic_algorithms(before, warn_only=warn)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
