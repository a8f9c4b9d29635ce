"""Images side by side in one picture: no figure says as much."""

import os

import torch
from torch import Tensor

from ...errors import require


def grid(images: Tensor, columns: int = 10) -> Tensor:
    """Images [count, channels or none, height, width] in [-1, 1] in rows of ``columns``, a pixel
    apart: uint8 [height, width, 3].

    Raises:
        ValueError: another shape.
    """
    good = images.dim() == 3 or (images.dim() == 4 and images.shape[1] in (1, 3))
    wanted = "[count, 1 or 3, height, width]"
    require(good and len(images) > 0, "images", wanted, tuple(images.shape))
    require(columns > 0, "columns", "an integer > 0", columns)
    if images.dim() == 3:
        images = images.unsqueeze(1)
    count, _, height, width = images.shape
    rows = -(-count // columns)
    seen = images.detach().cpu().float().expand(count, 3, height, width)
    seen = seen.nan_to_num(-1.0).clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
    whole = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 128).byte()
    for i, image in enumerate(seen):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        whole[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return whole


def save_grid(
    images: Tensor, path: str | os.PathLike[str], columns: int = 10, scale: int = 1
) -> None:
    """``grid`` as a PNG, each pixel ``scale`` wide. Needs matplotlib."""
    from matplotlib.image import imsave

    require(scale > 0, "scale", "an integer > 0", scale)
    whole = grid(images, columns).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    imsave(os.fspath(path), whole.numpy())
