import importlib.util
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
FRAMEWORKS = ("transformers", "accelerate", "pytorch_lightning", "peft", "diffusers")
missing = [name for name in FRAMEWORKS if importlib.util.find_spec(name) is None]
if missing and os.environ.get("SFRON_FAST_TEST_FRAMEWORKS") == "require":  # `make test`
    raise pytest.UsageError(
        f"tests/frameworks: {', '.join(missing)} not installed; pip install '.[frameworks]'"
    )
collect_ignore_glob = ["test_*.py"] if missing else []  # not collected, not "skipped"


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its state in the process; a test begins and ends without one."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
