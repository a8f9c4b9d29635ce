"""Images of the demonstrations: bundled ones, or a file's."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from examples.systems.images import load, options


def test_images_of_a_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 9, 7), dtype=np.uint8)
    path = tmp_path / "some.npz"
    np.savez(path, images=images, labels=np.array([3, 1, 2, 0], dtype=np.uint8))
    given = options("Shows it.", tmp_path).parse_args(["--data", str(path)])
    found, labels = load(given.data)
    assert found.shape == (4, 1, 9, 7)
    assert torch.equal(found[:, 0], torch.from_numpy(images) / 255.0)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [3, 1, 2, 0]


def test_bundled_images_without_a_file(tmp_path):
    images, labels = load(options("Shows it.", tmp_path).parse_args([]).data)
    assert images.shape == (1797, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert labels.unique().tolist() == list(range(10))
