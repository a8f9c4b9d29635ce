"""The CUDA branch of every list op, on the host and under sanitizers: the ops' own tests pass.

The extension is built with the ops' CUDA code over the shims of this folder, so a call goes the way
it goes on a GPU, but for the dispatcher: checks, flat lists, tables, launches and kernels, with
every access watched.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCES = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*/*.cpp"), *ROOT.glob("csrc/*/*_cuda.cu")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FOLDERS = [
    HERE / "on_host",
    HERE / "shim",
    ROOT / "csrc",
    *include_paths(),
    sysconfig.get_path("include"),
]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-w",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DPy_LIMITED_API=0x030A0000",
    *SANITIZE,
    *[f"-I{folder}" for folder in FOLDERS],
]
TESTS = (
    "every_op",
    "steps",
    "flat_ops",
    "flat",
    "tensor_settings",
    "interpolate",
    "fisher_accumulate",
    "saliency_mask",
    "masked_grad_norm",
    "sgd_step",
    "adamw_step",
    "split_weights",
    "moment_codes",
    "tables",
    "optim",
    "compact",
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
    ),
]


def compile_one(source: Path, target: Path) -> Path:
    subprocess.run(["g++", *FLAGS, "-x", "c++", "-c", source, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def library() -> Path:
    """The extension, kept until a source changes."""
    digest = hashlib.sha256(" ".join(FLAGS).encode() + torch.__version__.encode())
    for path in sorted(
        {*SOURCES, *ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *HERE.glob("**/*.h")}
    ):
        digest.update(path.read_bytes())
    target = (
        Path(tempfile.gettempdir())
        / f"sfron_fast_ops_on_host_{os.getuid()}_{digest.hexdigest()[:16]}.so"
    )
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            objects = [Path(folder) / f"{source.name}.o" for source in SOURCES]
            made = list(pool.map(compile_one, SOURCES, objects))
            places = [
                word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")
            ]
            partial = target.with_suffix(f".{os.getpid()}")  # complete or absent
            command = [
                "g++",
                "-shared",
                *SANITIZE,
                *made,
                *places,
                "-lc10",
                "-ltorch",
                "-ltorch_cpu",
                "-o",
                partial,
            ]
            subprocess.run(command, check=True)
        partial.replace(target)
    return target


@pytest.fixture(scope="module")
def site(library, tmp_path_factory) -> Path:
    """A folder with the package and that extension."""
    folder = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "sfron_fast", folder / "sfron_fast", ignore=ignored)
    (folder / "sfron_fast" / "_C.abi3.so").symlink_to(library)
    return folder


def run(site: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # which throws: found by the sanitizer
    ]
    settings = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "PYTHONPATH": str(site),
        "SFRON_FAST_NATIVE": "require",
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=0",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, *words], env=settings, cwd=site, text=True, capture_output=True
    )


def test_the_ops_tests_pass(site):
    """But those of torch's own machinery, which the sanitizers only slow down, and of threads: the
    shims have one.
    """
    chosen = [
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    files = [next(ROOT.glob(f"tests/*/test_{name}.py")) for name in TESTS]
    # nor the losses over rows, which have no CUDA C++
    unwanted = "not compile and not opcheck and not threads and not adaptive and not soft_target"
    result = run(site, *chosen, "-k", unwanted, *files)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_a_flat_list_that_is_too_short_is_caught(site):
    """What the checks do not see, the sanitizer does: the plant tells the op of more memory than
    there is.
    """
    plant = """
import torch
from sfron_fast import functional, __file__ as here
assert here.startswith({site!r}), here
whole = torch.zeros(4096)
whole.untyped_storage().resize_(4 * 4000)
functional.interpolate_([torch.zeros(2048), torch.zeros(2000)], [whole], 0.5)
"""
    result = run(site, "-c", plant.replace("{site!r}", repr(str(site))))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr, result.stderr[-3000:]
    assert "interpolate_cuda.cu" in result.stderr  # where it happened: not in the CPU's kernel
