"""examples/distributed, stopped inside a cycle and resumed: the losses of a run never stopped."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ranks import on_ranks

from examples.distributed import forget_topic

ROOT = Path(__file__).parents[2]
TINY = [
    "--epochs",
    "1",
    "--cycles",
    "6",
    "--retain-steps",
    "1",
    "--every",
    "4",
    "--length",
    "32",
    "--batch",
    "128",
]


def resumed_and_whole(folder, other):
    return [forget_topic.main(["--folder", str(f), *TINY]) for f in (folder, other)]


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
