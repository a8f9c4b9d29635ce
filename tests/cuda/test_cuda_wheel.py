"""A CUDA wheel is built where no GPU nor CUDA build of torch is, and its CPU kernels load there."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PARTS = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc", "sfron_fast")
USE = """
import torch, sfron_fast
from sfron_fast import functional
from sfron_fast.ops import native, registry as ops
assert native.available(), native.reason()
assert torch._C._dispatch_has_kernel_for_dispatch_key("sfron_fast::interpolate_", "CUDA")
assert ops.kernel_for("interpolate_", "cpu") == "native"
wanted = "native" if torch.backends.cuda.is_built() else "none"
assert ops.kernel_for("interpolate_", "cuda") == wanted
slow, fast = [torch.zeros(100)], [torch.ones(100)]
functional.interpolate_(slow, fast, 0.25)
assert slow[0].eq(0.25).all() and fast[0].eq(0.25).all()
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_builds_links_and_loads(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for part in filter(lambda part: (ROOT / part).exists(), PARTS):
        path = ROOT / part
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        (
            shutil.copytree(path, source / part, ignore=ignored)
            if path.is_dir()
            else shutil.copy(path, source)
        )
    settings = {
        **os.environ,
        "USE_CUDA": "1",
        "SFRON_FAST_NATIVE": "require",
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(pip, env=settings, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    alone = {**os.environ, "PYTHONPATH": str(site), "SFRON_FAST_NATIVE": "require"}
    subprocess.run([sys.executable, "-c", USE], env=alone, cwd=tmp_path, check=True)
    assert asked_of_others(site / "sfron_fast" / "_C.abi3.so") == {"libtorch_cpu", "libc10"}


def asked_of_others(library: Path) -> set[str]:
    """The libraries of torch that it needs; none of CUDA, whose runtime is linked in."""
    read = {"capture_output": True, "text": True, "check": True}
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], **read).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert names
    assert [name for name in names if re.match(r"_*(cuda|cu[A-Z]|nv)", name)] == []
    needed = subprocess.run(["readelf", "-d", str(library)], **read).stdout
    libraries = re.findall(r"NEEDED.*\[([\w+-]+)", needed)
    assert not [name for name in libraries if "cuda" in name]
    return {name for name in libraries if name.startswith(("libtorch", "libc10"))}
