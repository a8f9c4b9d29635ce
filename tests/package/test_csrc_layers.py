"""Who may include whom in csrc/, and what no file there may do, read from the sources."""

import re
from pathlib import Path

import pytest
from paths import ROOT

NATIVE = ROOT / "csrc"
LONGEST = 300
# a matrix product, whose additions have no order that others must keep (docs/kernels.md, Bits)
FUSED = "sample_square_accumulate_cpu.cpp"
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")

# room -> the rooms whose files it may include, besides its own
ROOMS = {
    "formulas": set(),
    "cpu": {"formulas"},
    "cuda": {"formulas"},
    "host": {"formulas", "cpu"},
}
# file of an op -> the same; the files of one op see its own header, and no other op's
OP_FILES = {
    "{op}.h": {"formulas"},
    "{op}_cpu.cpp": {"formulas", "cpu"},
    "{op}_cuda.cu": {"formulas", "cuda"},
    "{op}_op.cpp": {"formulas", "cpu", "host"},
}
STANDARD = r"[a-z_]+"  # a header of the C++ library has no suffix
TORCH = r"torch/[a-z_/A-Z]+\.h"
# room -> the headers in angle brackets that it may include besides the C++ library's
SYSTEM = {
    "formulas": (),
    "cpu": (r"(emm|imm)intrin\.h", r"cpuid\.h", r"sys/mman\.h"),
    "cuda": (r"cuda_runtime\.h",),
    "host": (r"dlfcn\.h", r"Python\.h", TORCH),
}
OP_SYSTEM = {"{op}_op.cpp": (TORCH,)}

pytestmark = pytest.mark.skipif(not NATIVE.exists(), reason="no csrc/")


def native_files() -> list[Path]:
    files = sorted(path for path in NATIVE.rglob("*") if path.suffix in SUFFIXES)
    assert len(files) > 40, "too few files found: the test would say nothing"
    return files


def op_folders() -> list[Path]:
    folders = (path for path in NATIVE.iterdir() if path.is_dir() and any(path.iterdir()))
    return sorted(path for path in folders if path.name not in ROOMS)


def trespasses(path: Path, text: str) -> set[str]:
    """What a file of that path and text includes and may not."""
    room = path.relative_to(NATIVE).parts[0]
    if path == NATIVE / "module.cpp":
        rooms, system = {"host"}, SYSTEM["host"]
        own = set()
    elif room in ROOMS:
        rooms, system = {room} | ROOMS[room], SYSTEM[room]
        own = set()
    else:
        kind = path.name.replace(room, "{op}", 1)
        if path.suffix == ".h" and kind != "{op}.h":
            kind = "{op}_cpu.cpp"  # a part of it
        rooms, system = OP_FILES.get(kind, set()), OP_SYSTEM.get(kind, ())
        parts = {file.name for file in path.parent.glob("*.h")}
        seen = parts if kind == "{op}_cpu.cpp" else {f"{room}.h"}
        own = set() if kind == "{op}.h" else {f"{room}/{name}" for name in seen}
        if kind == "{op}_cuda.cu":
            system = SYSTEM["cuda"]
        if kind == "{op}_cpu.cpp":
            system = SYSTEM["cpu"]
    quoted = re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.M)
    angled = re.findall(r"^\s*#\s*include\s*<([^>]+)>", text, re.M)
    known = {name for name in quoted if (NATIVE / name).exists() and ".." not in name}
    inside = {name for name in known if name in own or name.split("/")[0] in rooms}
    outside = {
        name
        for name in angled
        if any(re.fullmatch(pattern, name) for pattern in (STANDARD, *system))
    }
    return set(quoted) - inside | set(angled) - outside


def test_every_folder_is_a_room_or_an_op():
    folders = op_folders()
    assert len(folders) > 1
    assert set(ROOMS) <= {path.name for path in NATIVE.iterdir()}
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        wanted = {kind.format(op=folder.name) for kind in OP_FILES}
        assert wanted - {f"{folder.name}_cuda.cu"} <= names, folder
        others = {name for name in names - wanted if not name.endswith(".h")}
        assert not others, (folder, others)
    assert {path.name for path in NATIVE.glob("*.*")} <= {"module.cpp", "README.md"}


def test_includes_stay_within_the_rooms():
    """torch and Python are known to host/, the <op>_op.cpp and module.cpp alone; formulas need the
    C++ library and each other; the CPU and CUDA sides know neither each other nor host/.
    """
    for path in native_files():
        assert not trespasses(path, path.read_text()), path


def test_the_entitled_are_found():
    """A pattern that matches nothing would let everything pass."""
    texts = {path: path.read_text() for path in native_files()}
    for pattern in (r"#include <torch/", r"#include <Python\.h>", r"#include <cuda_runtime\.h>"):
        assert any(re.search(pattern, text) for text in texts.values()), pattern


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("formulas/clip.h", '#include "cpu/lanes.h"'),
        ("formulas/clip.h", '#include "host/check.h"'),
        ("formulas/clip.h", "#include <cuda_runtime.h>"),
        ("formulas/clip.h", "#include <torch/csrc/stable/tensor.h>"),
        ("cpu/lanes.h", '#include "host/check.h"'),
        ("cpu/lanes.h", '#include "cuda/table.cuh"'),
        ("cpu/lanes.h", "#include <ATen/ATen.h>"),
        ("cuda/table.cuh", '#include "cpu/runs.h"'),
        ("cuda/table.cuh", '  #  include "host/check.h"'),
        ("cuda/table.cuh", "#include <c10/cuda/CUDAStream.h>"),
        ("host/check.h", '#include "cuda/launch.cuh"'),
        ("host/check.h", '#include "interpolate/interpolate.h"'),
        ("interpolate/interpolate.h", '#include "cpu/lanes.h"'),
        ("interpolate/interpolate.h", '#include "host/check.h"'),
        ("interpolate/interpolate.h", "#include <cuda_runtime.h>"),
        ("interpolate/interpolate_cpu.cpp", '#include "host/check.h"'),
        ("interpolate/interpolate_cpu.cpp", '#include "cuda/group.cuh"'),
        ("interpolate/interpolate_cpu.cpp", '#include "sgd_step/sgd_step.h"'),
        ("interpolate/interpolate_cuda.cu", '#include "cpu/tiles.h"'),
        ("interpolate/interpolate_cuda.cu", '#include "host/check.h"'),
        ("interpolate/interpolate_cuda.cu", '#include "../host/check.h"'),
        ("interpolate/interpolate_cuda.cu", "#include <torch/headeronly/util/shim_utils.h>"),
        ("interpolate/interpolate_op.cpp", "#include <Python.h>"),
        ("interpolate/interpolate_op.cpp", '#include "cuda/launch.cuh"'),
    ],
)
def test_a_planted_include_is_found(file, line):
    path = NATIVE / file
    planted = path.read_text() + f"\n{line}\n"
    assert len(trespasses(path, planted)) == 1


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in native_files()
        if (lines := len(path.read_text().splitlines())) > LONGEST
    }
    assert not long


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no setup.py")
def test_flags_keep_ieee_arithmetic():
    text = (ROOT / "setup.py").read_text()
    for flag in (
        "fast-math",
        "fast_math",
        "Ofast",
        "unsafe-math",
        "associative-math",
        "reciprocal-math",
        "fmad=true",
        "finite-math",
        "march=",
        "fp:fast",
        "ftz=true",
        "prec-div=false",
        "prec-sqrt=false",
    ):
        assert flag not in text, flag
    for flag in ("-ffp-contract=off", "-fmad=false"):
        assert flag in text, flag
    for path in native_files():
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(
            r"\b__f(?:ma|mul|add|div|sqrt)\w*|\bfmaf?\(|#pragma\s+STDC|optimize\(", code
        ), path
        assert ("__builtin_fma" in code) == (path.name == FUSED), path
