"""The CUDA kernels, compiled by g++ over a small shim of the CUDA runtime and run under sanitizers:
no GPU needed.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases import mostly_long

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCES = [
    *sorted(ROOT.glob("csrc/*/*_cuda.cu")),
    *sorted(ROOT.glob("csrc/cpu/*.cpp")),  # fp16 of the tests' own buffers
    HERE / "host_tests.cpp",
    HERE / "packing_tests.cpp",
]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-w",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
FOLDERS = [HERE / "shim", ROOT / "csrc", HERE]
# cached tables live as long as the process
NO_LEAKS = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}


def compile_one(source: Path, target: Path, folders: list[Path]) -> Path:
    includes = [f"-I{folder}" for folder in folders]
    subprocess.run(["g++", *FLAGS, *includes, "-x", "c++", "-c", source, "-o", target], check=True)
    return target


def link(objects: list[Path], target: Path) -> Path:
    # complete or absent, also when two test processes build at once
    partial = target.with_suffix(f".{os.getpid()}")
    subprocess.run(["g++", "-fsanitize=address,undefined", *objects, "-o", partial], check=True)
    return partial.replace(target)


def run(program: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [program, *words], env=NO_LEAKS, text=True, capture_output=True, timeout=300
    )


@pytest.fixture(scope="module")
def build():
    """Folder with the objects and the program, kept until a source changes."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *HERE.glob("**/*.h")]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted({*SOURCES, *headers}):
        digest.update(path.read_bytes())
    folder = (
        Path(tempfile.gettempdir()) / f"sfron_fast_host_{os.getuid()}_{digest.hexdigest()[:16]}"
    )
    if not (folder / "host_tests").exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor(2) as pool:
            targets = [Path(scratch) / f"{source.name}.o" for source in SOURCES]
            objects = list(pool.map(compile_one, SOURCES, targets, [FOLDERS] * len(SOURCES)))
            objects = [path.replace(folder / path.name) for path in objects]
        link(objects, folder / "host_tests")
    return folder


def test_kernels_match_plain_loops(build):
    result = run(build / "host_tests")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all host tests passed" in result.stdout


@pytest.mark.parametrize("fault", ["overrun", "mask"])
def test_planted_overrun_is_caught(build, fault):
    """A tensor one element longer than its memory; a mask one byte short."""
    result = run(build / "host_tests", fault)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


MUTATIONS = {
    "one element is skipped": (
        "sweep.cuh",
        "1>{}, rest + lane, end)",
        "1>{}, rest + lane + 1, end)",
    ),
    "half of a unit is forgotten": (
        "table.cuh",
        "begin + (int64_t{1} << table.unit)",
        "begin + (1 << table.unit) / 2",
    ),
    "the index is off by one": ("table.cuh", "high = coarse[1] + 1", "high = coarse[1]"),
    "a slot is used too early": (
        "slots.cuh",
        'check(cudaEventSynchronize(slot.copied), "an earlier copy");',
        "",
    ),
    "the ring does not grow": ("slots.cuh", "kMostSlots = 64", "kMostSlots = 8"),
    "a graph sees refreshes": ("launch.cuh", "captured ? keep(bytes) : ", ""),
    "loaded under capture": ("launch.cuh", "const BesideCapture beside;", ""),
    "neighbours are swapped": (
        "group.cuh",
        "words[k / 2] >> (k % 2 * 16)",
        "words[k / 2] >> (16 - k % 2 * 16)",
    ),
}
# or `make test` takes too long
QUICK = (
    "one element is skipped",
    "the index is off by one",
    "a graph sees refreshes",
)


@pytest.mark.parametrize("name", mostly_long(MUTATIONS, *QUICK))
def test_planted_mistake_is_caught(build, name, tmp_path):
    """A mistake in the indexing of a kernel, or in what a launch waits for, must not pass."""
    header, right, wrong = MUTATIONS[name]
    text = (ROOT / "csrc" / "cuda" / header).read_text()
    assert text.count(right) == 1
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / header).write_text(text.replace(right, wrong))
    source = ROOT / "csrc" / "interpolate" / "interpolate_cuda.cu"
    mutant = compile_one(source, tmp_path / f"{source.name}.o", [tmp_path, *FOLDERS])
    objects = [build / f"{path.name}.o" for path in SOURCES if path != source]
    assert run(link([mutant, *objects], tmp_path / "mutant"), "interpolate").returncode != 0


RACES = {
    "none": ("", ""),
    "no fence before": ("    __threadfence();\n    last", "    last"),
    "no fence after": ("to 0 again\n    __threadfence();", ""),
}


@pytest.mark.parametrize("name", mostly_long(RACES, "none"))
def test_blocks_that_run_at_once_do_not_race(name, tmp_path):
    """Under ThreadSanitizer; without either fence of the last block it must say so."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    right, wrong = RACES[name]
    text = (ROOT / "csrc" / "cuda" / "table.cuh").read_text()
    assert text.count(right) == 1 or not right
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "table.cuh").write_text(text.replace(right, wrong) if right else text)
    kernels = [ROOT / f"csrc/{op}/{op}_cuda.cu" for op in ("masked_grad_norm", "adamw_step")]
    sources = [*kernels, *ROOT.glob("csrc/cpu/*.cpp"), HERE / "race_tests.cpp"]
    includes = [f"-I{folder}" for folder in (tmp_path, *FOLDERS)]
    flags = [
        "-std=c++17",
        "-O1",
        "-g1",
        "-ffp-contract=off",
        "-w",
        "-fsanitize=thread",
        *includes,
        "-x",
        "c++",
    ]
    subprocess.run(["g++", *flags, *sources, "-o", tmp_path / "races"], check=True)
    result = run(tmp_path / "races")
    if name == "none":
        assert result.returncode == 0, result.stdout + result.stderr
        assert "no race" in result.stdout
    else:
        assert "data race" in result.stderr, result.stdout + result.stderr
