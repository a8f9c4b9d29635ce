"""examples/distributed: a short run, and one that is stopped ends as if it had not been."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import on_ranks

from examples.distributed import forget_topic

ROOT = Path(__file__).parents[2]


def options(**values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


TINY = options(epochs=1, cycles=6, retain_steps=1, every=4, length=32, batch=128)
SHORT = options(epochs=1, cycles=2, retain_steps=1, every=4, length=128, batch=128)


@pytest.fixture
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_a_short_run(tmp_path):
    found = forget_topic.main(["--folder", str(tmp_path), *SHORT])
    before, after = found["before"], found["after"]
    assert list(before) == list(after) == ["forget", "retain", "unseen"]
    assert all(after[name] != before[name] for name in before)
    assert after["forget"] - before["forget"] > after["retain"] - before["retain"]
    assert {p.name for p in tmp_path.iterdir()} == {"mask.safetensors", "trained", "step-4"}


def resumed_and_whole(folder, other):
    return [forget_topic.main(["--folder", str(f), *TINY]) for f in (folder, other)]


@pytest.mark.long
def test_launched_stopped_and_resumed(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "examples.distributed.forget_topic",
            "--folder",
            str(folder),
            *TINY,
            "--stop",
            "5",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "after step 5 of 12" in done.stdout
    printed = re.findall(r"(?:import|topics|seen): ([\d.]+) -> ([\d.]+)", done.stdout)
    assert len(printed) == 3
    assert sorted(p.name for p in folder.iterdir()) == [
        "mask.safetensors",
        "step-4",
        "step-5",
        "trained",
    ]
    (folder / "step-8").mkdir()  # a checkpoint without its metadata, as a kill leaves it
    other.mkdir()
    shutil.copytree(folder / "trained", other / "trained")
    shutil.copy(folder / "mask.safetensors", other)
    ranks = on_ranks(2, resumed_and_whole, folder, other)
    assert ranks[0] == ranks[1]
    resumed, whole = ranks[0]
    assert resumed == whole
    before, after = resumed["before"], resumed["after"]
    assert [f"{before[name]:.3f}" for name in before] == [b for b, _ in printed]
    assert {p.name for p in folder.iterdir()} >= {"step-5", "step-8", "step-12"}
    risen = {name: after[name] - before[name] for name in before}
    assert risen["forget"] > risen["retain"] + 0.02, risen
