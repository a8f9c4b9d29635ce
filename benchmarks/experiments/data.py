"""CIFAR-10 from any of its forms, as uint8 tensors on the device; splits and batches of them."""

import io
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfron_fast.errors import require
from sfron_fast.methods import wrong_labels

CLASSES, SIDE, MARGIN = 10, 32, 4
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
FORGOTTEN_CLASS = 3  # cat
FORGET_SHARE, VAL_SHARE = 0.1, 0.1
HOW_TO_GET_IT = (
    "the folder cifar-10-batches-py of https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, the"
    " folder that torchvision.datasets.CIFAR10(folder, download=True) fills, or an .npz with"
    " {train,test}_{jpeg,offsets,labels}"
)


@dataclass(frozen=True)
class Images:
    """Pixels uint8 [n, 40, 40, 3], with a margin of 4 to crop from, and labels int64 [n]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Images":
        """Those of a bool mask or of positions."""
        return Images(self.pixels[index], self.labels[index])

    def relabelled(self, labels: Tensor) -> "Images":
        """The same pixels with other targets."""
        return Images(self.pixels, labels)

    def __add__(self, other: "Images") -> "Images":
        return Images(
            torch.cat([self.pixels, other.pixels]), torch.cat([self.labels, other.labels])
        )


class Batches:
    """Batches (inputs, targets) of normalised float32 [batch, 3, 32, 32], contiguous.

    Not channels-last, as the pixels lie: on CPUs without AVX-512, torch 2.13's oneDNN computes a
    wrong weight gradient for a channels-last 1x1 convolution of stride 2 from 3 or 4 channels, or
    ends the process. With ``train`` each pass is shuffled, flipped at random and cropped up to
    ``crop`` pixels off the centre, all drawn from torch's global generator of the CPU, so that
    every device sees the same batches.
    """

    def __init__(
        self, images: Images, size: int, *, train: bool = False, crop: int = MARGIN
    ) -> None:
        self.images, self.size, self.train, self.crop = images, size, train, crop
        device = images.labels.device
        self._mean, self._std = (torch.tensor(v, device=device) for v in (MEAN, STD))
        self._line = torch.arange(SIDE, device=device)

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self.images), self.images.labels.device
        order, flips = torch.arange(count), torch.zeros(count, dtype=torch.bool)
        corners = torch.full((2, count), MARGIN)
        if self.train:
            order, flips = torch.randperm(count), torch.rand(count) < 0.5
            corners = torch.randint(MARGIN - self.crop, MARGIN + self.crop + 1, (2, count))
        parts = (t.to(device).split(self.size, -1) for t in (order, flips, corners))
        for chosen, flip, (top, left) in zip(*parts, strict=True):
            rows = top[:, None] + self._line
            columns = left[:, None] + torch.where(flip[:, None], SIDE - 1 - self._line, self._line)
            pixels = self.images.pixels[
                chosen[:, None, None], rows[:, :, None], columns[:, None, :]
            ]
            inputs = ((pixels - self._mean) / self._std).permute(0, 3, 1, 2)
            yield inputs.contiguous(), self.images.labels[chosen]


@dataclass(frozen=True)
class Split:
    """What one seed and setting train on, forget, keep, choose with and test on."""

    train: Images
    forget: Images
    retain: Images
    val: Images
    test: Images

    def wrong(self) -> Images:
        """Retain set and relabelled forget set (RL, SalUn)."""
        labels = wrong_labels(self.forget.labels, CLASSES)
        return self.retain + self.forget.relabelled(labels)

    def marked(self) -> Images:
        """Retain and forget set with True for what is to be forgotten (BT)."""
        marks = (
            images.relabelled(torch.full_like(images.labels, gone, dtype=torch.bool))
            for images, gone in ((self.retain, False), (self.forget, True))
        )
        return next(marks) + next(marks)


def make_split(train: Images, test: Images, setting: str, seed: int) -> Split:
    """Validation and forget set ("random": a tenth, "class": all of one) drawn by ``seed``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(train), generator=generator).to(train.labels.device)
    cut = round(VAL_SHARE * len(train))
    val, rest = train[order[:cut]], train[order[cut:]]
    if setting == "class":  # a model that never saw the class is judged on the others
        forget = rest.labels == FORGOTTEN_CLASS
        val, test = (images[images.labels != FORGOTTEN_CLASS] for images in (val, test))
    else:
        forget = torch.arange(len(rest), device=rest.labels.device) < round(
            FORGET_SHARE * len(rest)
        )
    return Split(rest, rest[forget], rest[~forget], val, test)


@lru_cache(maxsize=1)
def load(
    path: Path, train_size: int | None, test_size: int | None, device: str
) -> tuple[Images, Images, int]:
    """Training and test images, and a checksum of the labels.

    Fewer are the first of one fixed shuffle.

    Raises ValueError, saying how to get the data, if ``path`` holds none.
    """
    parts, checksum = [], 0
    for part, size in (("train", train_size), ("test", test_size)):
        labels, pixels = _open(path, part)
        size = len(labels) if size is None else size
        require(
            len(labels) >= size, "data", f"{size} {part} images", len(labels), "use a smaller scale"
        )
        chosen = np.random.default_rng(0).permutation(len(labels))[:size]
        checksum = zlib.crc32(np.ascontiguousarray(labels).tobytes(), checksum)
        loaded = torch.from_numpy(pixels(chosen)).to(device).permute(0, 3, 1, 2)
        framed = F.pad(loaded, (MARGIN,) * 4).permute(0, 2, 3, 1).contiguous()
        parts.append(Images(framed, torch.from_numpy(labels[chosen].astype(np.int64)).to(device)))
    return parts[0], parts[1], checksum


Pixels = Callable[[np.ndarray], np.ndarray]  # positions -> uint8 [n, 32, 32, 3]


def _open(path: Path, part: str) -> tuple[np.ndarray, Pixels]:
    """Labels of one part, and a function that reads some of its images."""
    folder = path / "cifar-10-batches-py" if (path / "cifar-10-batches-py").is_dir() else path
    names = [f"data_batch_{i}" for i in range(1, 6)] if part == "train" else ["test_batch"]
    if all((folder / name).is_file() for name in names):
        return _archive([folder / name for name in names])
    if path.is_file() and path.suffix == ".npz":
        return _jpegs(path, part)
    raise ValueError(
        f"data: expected CIFAR-10 at {path}, found {'none' if path.exists() else 'no such path'};"
        f" give {HOW_TO_GET_IT}"
    )


def _archive(files: list[Path]) -> tuple[np.ndarray, Pixels]:
    """The official python pickles: "data" uint8 [n, 3072] by planes, "labels"."""
    batches = []
    for file in files:
        with file.open("rb") as opened:
            batches.append(pickle.load(opened, encoding="bytes"))
    planes = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, SIDE, SIDE)
    labels = np.concatenate([np.asarray(batch[b"labels"]) for batch in batches])
    return labels, lambda chosen: np.ascontiguousarray(planes[chosen].transpose(0, 2, 3, 1))


def _jpegs(path: Path, part: str) -> tuple[np.ndarray, Pixels]:
    """JPEG files one after the other, file i at offsets[i] to offsets[i + 1]."""
    with np.load(path) as archive:
        missing = [k for k in ("jpeg", "offsets", "labels") if f"{part}_{k}" not in archive]
        require(
            not missing,
            "data",
            f"{part}_jpeg, {part}_offsets and {part}_labels in {path}",
            f"no {part}_{' and '.join(missing)}",
            f"give {HOW_TO_GET_IT}",
        )
        data, offsets, labels = (archive[f"{part}_{k}"] for k in ("jpeg", "offsets", "labels"))
    decode = _decoder()
    return labels, lambda chosen: np.stack(
        [decode(data[offsets[i] : offsets[i + 1]]) for i in chosen]
    )


def _decoder() -> Callable[[np.ndarray], np.ndarray]:
    """uint8 bytes of a JPEG -> uint8 [32, 32, 3], by Pillow or torchvision."""
    try:
        from PIL import Image
    except ImportError:
        try:
            from torchvision.io import ImageReadMode, decode_jpeg
        except ImportError as error:
            raise ImportError(
                "the .npz holds JPEGs: pip install pillow (or torchvision)"
            ) from error
        return lambda file: (
            decode_jpeg(torch.from_numpy(file), ImageReadMode.RGB).permute(1, 2, 0).numpy()
        )
    return lambda file: np.asarray(Image.open(io.BytesIO(file.tobytes())).convert("RGB"))
