"""examples/cifar10, on its synthetic images and on a tiny archive of CIFAR-10's form."""

import pickle

import numpy as np
import torch

from examples.cifar10 import forget_class


def test_the_class_is_forgotten_and_the_others_are_not(capsys):
    found = forget_class.main([])
    before, after = found["before"], found["after"]
    assert before["forget"] > 90
    assert after["forget"] < 10
    for name in ("retain", "holdout"):
        assert before[name] > 90
        assert after[name] > before[name] - 5
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["forget", "retain", "holdout"]


def test_the_archive_is_read(tmp_path):
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        part = {
            b"data": np.full((4, 3072), number, dtype=np.uint8),
            b"labels": [number, 1, 2, 3],
        }
        (tmp_path / name).write_bytes(pickle.dumps(part))
    (x, y), (held_x, held_y) = forget_class.load(tmp_path)
    assert x.shape == (20, 3, 32, 32)
    assert y.tolist()[::4] == [0, 1, 2, 3, 4]
    assert held_y.tolist() == [5, 1, 2, 3]
    assert torch.equal(held_x, torch.full((4, 3, 32, 32), (5 - 125.0) / 64.0))
