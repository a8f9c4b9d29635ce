"""Checklist C5: SIGKILL at random moments, on in a new process: the bits of an undisturbed run."""

import os
import subprocess
import sys

import pytest
import torch
from cases import only_long
from models import equal
from paths import ROOT, SUPPORT

pytest.importorskip("fcntl", reason="a system without fork")
import killed

pytestmark = pytest.mark.checklist("C5")


def run(job, folder, kills):
    """How many lives were killed, how many of them inside a write, and what the last one ended
    with.
    """
    paths = os.pathsep.join(map(str, (SUPPORT, ROOT)))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "killed.py"), job, str(folder), str(kills)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    count, inside = map(int, done.stdout.split())
    return count, inside, torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize("job", [only_long("sgd"), "adamw", only_long("official"), "paper"])
def test_killed_again_and_again_ends_with_the_same_bits(job, tmp_path):
    killed_lives, _, result = run(job, tmp_path, 25)
    # a life makes four checkpoints at most
    assert killed_lives >= (14 if job in ("sgd", "adamw") else 2)
    assert equal(result, killed.JOBS[job]())
    if job in ("official", "paper"):
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "checkpoint.pt",
            "mask.safetensors",
            "result.pt",
        ]


def test_a_file_is_whole_whenever_its_writer_dies(tmp_path):
    """Every life first reads what the one before left; enough of them died while they wrote."""
    inside = 0
    for attempt in range(5):  # whether one of them dies inside a write is chance
        folder = tmp_path / str(attempt)
        folder.mkdir()
        killed_lives, inside, result = run("writer", folder, 60)
        assert killed_lives >= 9
        assert equal(result, killed.content(killed.SAVES))
        if inside:
            break
    assert inside >= 1
