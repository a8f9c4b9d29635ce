"""The wheel, built of the source distribution, installed into an environment of its own and used
there.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from paths import ROOT

PARTS = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"),
    *("CITATION.cff", "csrc", "sfron_fast"),
)
PLAIN = {
    k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SFRON_FAST_NATIVE", "USE_CUDA")
}
SMOKE = Path(__file__).with_name("smoke.py")


def run(*command, **settings):
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True, **settings
    )


def build(folder: Path, **settings: str) -> Path:
    """The wheel of the source distribution: what the latter leaves out is missed here."""
    source, sdist = folder / "source", folder / "sdist"
    source.mkdir()
    for part in PARTS:
        path = ROOT / part
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        (
            shutil.copytree(path, source / part, ignore=ignored)
            if path.is_dir()
            else shutil.copy(path, source)
        )
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(sdist)!r})"
    run(sys.executable, "-c", make, cwd=source, env=PLAIN)
    (archive,) = sdist.glob("sfron_fast-*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    run(*pip, "-w", folder, archive, env={**PLAIN, "USE_CUDA": "0", **settings})
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """A virtual environment with the wheel alone; torch and the like come from here, but not a
    development install.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, env=PLAIN)  # with a PYTHONPATH it may find the checkout, and install nothing
    return python


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory):
    # DEBUG=1 halves the time of the build
    return build(tmp_path_factory.mktemp("native"), SFRON_FAST_NATIVE="require", DEBUG="1")


@pytest.mark.long
def test_wheel_is_for_every_python_and_keeps_to_the_stable_abi(native_wheel):
    assert "-cp310-abi3-" in native_wheel.name
    audit = subprocess.run(
        [sys.executable, "-m", "abi3audit", "--strict", "--report", str(native_wheel)],
        capture_output=True,
        text=True,
    )
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert '"non_abi3_symbols": []' in audit.stdout


@pytest.mark.checklist("I4")
@pytest.mark.long
def test_wheel_works_on_its_own(native_wheel, tmp_path):
    python = install(native_wheel, tmp_path / "venv")
    done = run(python, "-W", "error::RuntimeWarning", SMOKE, cwd=tmp_path, env=PLAIN)
    assert done.stdout.split()[0] == "native"


@pytest.mark.checklist("I1", "I4", "I5")
def test_without_a_compiler_it_still_installs_runs_and_explains(tmp_path):
    wheel = build(tmp_path, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    python = install(wheel, tmp_path / "venv")
    done = run(python, SMOKE, cwd=tmp_path, env=PLAIN)
    assert done.stdout.split()[0] == "reference"
    assert done.stderr.count("runs on its reference kernels") == 1
    explained = run(python, "-m", "sfron_fast", "env", cwd=tmp_path, env=PLAIN).stdout
    assert "installed without its compiled kernels" in explained
    assert "pip install" in explained
    required = subprocess.run(
        [str(python), "-c", "import sfron_fast"],
        cwd=tmp_path,
        env={**PLAIN, "SFRON_FAST_NATIVE": "require"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert required.returncode != 0
    assert "without its compiled kernels" in required.stderr
