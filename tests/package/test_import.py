"""What importing the package does, in fresh interpreters; and the paths that need one."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

from sfron_fast import __main__
from sfron_fast.ops import native
from sfron_fast.ops import registry as ops

BUILT = importlib.util.find_spec("sfron_fast._C") is not None


def start(script: str, **environment: str) -> subprocess.Popen:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("SFRON_FAST", "PYTHONWARNINGS"))
    }
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**clean, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> tuple[str, str, int]:
    out, err = process.communicate(timeout=120)
    return out, err, process.returncode


def python(script: str, **environment: str) -> str:
    """Standard output of a script that must succeed and say nothing else."""
    out, err, code = finish(start(script, **environment))
    assert code == 0, err
    assert err == ""
    return out


@pytest.mark.checklist("I1", "I2", "I6")
def test_import_is_quiet_and_light():
    """No output, nothing optional imported, no CUDA started, native kernels off when asked."""
    script = """
import sys, torch
before = set(sys.modules)
import sfron_fast
from sfron_fast import functional
from sfron_fast.ops import native, registry as ops
heavy = ["triton", "sklearn", "matplotlib", "tqdm", "transformers", "accelerate",
         "pytorch_lightning", "peft", "torchvision", "pandas", "scipy"]
assert not set(heavy) & (set(sys.modules) - before), set(heavy) & (set(sys.modules) - before)
assert not torch.cuda.is_initialized()
assert not native.available() and "SFRON_FAST_NATIVE=0" in native.reason()
assert "sfron_fast._C" not in sys.modules
assert all(ops.kernel_for(name, "cpu") == "reference" for name in ops.SCHEMAS)
slow, fast = torch.ones(3), torch.full((3,), 3.0)
functional.interpolate_([slow], [fast], 0.5)
assert slow.tolist() == fast.tolist() == [2.0] * 3
"""
    assert python(script, SFRON_FAST_NATIVE="0") == ""


@pytest.mark.checklist("I2", "I6")
def test_failed_imports_name_the_remedy():
    """A wrong switch, missing and broken kernels that are required; each attempt of a process
    raises anew.
    """
    script = """
import importlib.abc, os, sys
problem = None
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "sfron_fast._C":
            raise problem
sys.meta_path.insert(0, Blocker())
for wish, problem in (
    ("yes", None),
    ("require", ModuleNotFoundError("No module named 'sfron_fast._C'", name="sfron_fast._C")),
    ("1", ImportError("undefined symbol: aoti_torch_nonsense")),
):
    os.environ["SFRON_FAST_NATIVE"] = wish
    try:
        import sfron_fast.ops.registry
    except ImportError as error:
        print(error)
    else:
        raise AssertionError("imported")
"""
    wrong, missing, broken = python(script).splitlines()
    assert (
        wrong
        == "SFRON_FAST_NATIVE: expected 0, 1 or require, found 'yes'; unset it or use one of those"
    )
    assert "SFRON_FAST_NATIVE=require but" in missing
    assert "without its compiled kernels" in missing
    assert "SFRON_FAST_NATIVE=1 but" in broken
    assert "undefined symbol: aoti_torch_nonsense" in broken
    for message in (missing, broken):
        assert "rebuild with `pip install --no-build-isolation" in message


@pytest.mark.checklist("I2")
def test_missing_kernels_are_told_once():
    """On first use, not at import: one RuntimeWarning with the reason and how to silence it."""
    script = """
import importlib.abc, sys, warnings
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "sfron_fast._C":
            raise ModuleNotFoundError("No module named 'sfron_fast._C'", name=name)
sys.meta_path.insert(0, Blocker())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, sfron_fast
    from sfron_fast import functional
    ours = [w for w in caught if "sfron_fast" in str(w.message)]
    assert not ours, ours
    for dtype in (torch.float32, torch.float64):
        for _ in range(2):
            functional.interpolate_([torch.ones(3, dtype=dtype)], [torch.ones(3, dtype=dtype)], 0.5)
            functional.masked_grad_norm([torch.ones(3, dtype=dtype)])
ours = [w for w in caught if "sfron_fast" in str(w.message)]
assert len(ours) == 1, ours
assert ours[0].category is RuntimeWarning
print(ours[0].message)
"""
    message = python(script)
    assert "the package was installed without its compiled kernels" in message
    assert "SFRON_FAST_NATIVE=0 silences" in message


@pytest.mark.checklist("I6")
@pytest.mark.skipif(not BUILT, reason="no compiled kernels here")
def test_kernels_load_when_they_are_there():
    script = """
from sfron_fast.ops import native, registry as ops
assert native.available() and native.reason() is None
assert all(ops.kernel_for(name, "cpu") == "native" for name in ops.SCHEMAS)
"""
    assert python(script, SFRON_FAST_NATIVE="require") == ""


@pytest.mark.parametrize(
    ("torch_has", "wheel_has", "kernel", "note"),
    [
        (False, True, "none", "is built without CUDA; install"),
        (False, False, "none", "is built without CUDA; install"),
        (True, False, "reference", "the package was built without its CUDA kernels; rebuild"),
        (True, True, "native", None),
    ],
)
def test_what_is_said_of_cuda_is_true_of_this_torch(
    torch_has, wheel_has, kernel, note, monkeypatch
):
    """The kernels of a CUDA wheel are of no use to a torch without CUDA."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: torch_has)
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: key == "CPU" or wheel_has
    )
    monkeypatch.setattr(native, "available", lambda: True)
    assert [ops.kernel_for("sgd_step_", device) for device in ("cpu", "cuda")] == ["native", kernel]
    said = __main__.environment()
    assert (
        note in said
        if note
        else not any("sgd_step_" in line for line in said.split("why no faster")[1:])
    )
    assert [line.split()[1:] for line in said.splitlines() if line.startswith("sgd_step_ ")] == [
        ["native", kernel]
    ]


# every op on awkward sizes and dtypes; prints one digest of all the bits
DIGEST = """
import sys, hashlib, torch
sys.path[:0] = ["tests/support", "tests/ops"]
torch.set_num_threads(1)
import cases, op_table
shapes = [*cases.ODD, (513,), (2049,)]
longer = {"adaptive_cross_entropy": (3, 5, 2085), "adaptive_mse": (3, 2085)}
longer["soft_target_kl"] = (5, 2085)
assert set(longer) == set(op_table.ROWS)
narrow = {"adaptive_cross_entropy": (35, 2, 10), "soft_target_kl": (70, 10)}
tiles = {name: op for name, op in op_table.OPS.items() if name.startswith("linear_")}
assert tiles
longer |= dict.fromkeys(tiles, (5, 2085))
for dtype in cases.NATIVE_DTYPES:
    torch.manual_seed(0)
    tensors = []
    for name, op in {**op_table.LISTS, **op_table.ROWS, **tiles}.items():
        kind = dtype if dtype in op.dtypes else torch.float32
        found = op.full(longer.get(name, shapes), kind)
        found = [*found, *(op.full(narrow[name], kind) if name in narrow else ())]
        for case in found:
            tensors += op.outcome(case) + [t for _, t in case.flat()]
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    print(dtype, digest.hexdigest())
"""


@pytest.mark.skipif(not BUILT, reason="no compiled kernels here")
def test_every_instruction_set_gives_the_same_bits():
    """SFRON_FAST_ISA forces a level; one that the processor lacks is refused, so the test is weaker
    there.
    """
    running = [
        start(DIGEST, SFRON_FAST_NATIVE="require", SFRON_FAST_ISA=isa)
        for isa in ("baseline", "avx2", "avx512")
    ]
    outs = [finish(process) for process in running]
    digests = [
        out
        for out, err, code in outs
        if code == 0 or "expected a level of this processor" not in err
    ]
    assert digests[0].count("torch.") == 3, outs
    assert len(set(digests)) == 1, outs


def test_the_remedy_is_a_command_that_works_here(monkeypatch, tmp_path):
    """The package is on no index: it is installed from where it came."""
    command = "pip install --no-build-isolation --force-reinstall --no-deps"
    assert native.remedy() == f"{command} -e {ROOT}"
    monkeypatch.setattr(native, "__file__", str(tmp_path / "a" / "b" / "native.py"))

    class Noted:
        text = json.dumps({"url": tmp_path.as_uri()})

        def read_text(self, name):
            assert name == "direct_url.json"
            return self.text

    noted = Noted()
    monkeypatch.setattr(native.importlib.metadata, "distribution", lambda name: noted)
    assert native.remedy() == f"{command} {tmp_path}"
    for unknown in (None, "{}", "no json", json.dumps({"url": "https://example.org/a.whl"})):
        noted.text = unknown
        assert native.remedy() == f"{command} PATH_TO_THE_SOURCE"


def test_a_switch_needs_no_remedy():
    told = python(
        "from sfron_fast.__main__ import environment as e; print(e())", SFRON_FAST_NATIVE="0"
    )
    assert "switched off by SFRON_FAST_NATIVE=0" in told
    assert "unset SFRON_FAST_NATIVE" in told
    assert "pip install" not in told.split("triton")[0]


def test_methods_and_functions_are_there_with_the_package():
    script = "import sfron_fast as sf; sf.methods.finetune, sf.functional.pack_bits"
    assert python(script) == ""


def test_a_path_that_cannot_be_is_said_before_the_demo_begins(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        __main__.main(["demo", "--out", str(tmp_path / "file")])
    assert "--out: expected a folder, found a file" in capsys.readouterr().err
