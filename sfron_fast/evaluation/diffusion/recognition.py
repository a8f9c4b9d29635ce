"""What an independent judge says of generated images: FA, RA, and how like real ones they are."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import by_keyword, require
from ...tasks import Denoising
from .sampling import sample

Judge = Callable[[Tensor], Tensor]


class Generation(NamedTuple):
    """Of images of every class, at one guidance."""

    guidance: float
    fa: float  # percent of images of forget classes that the judge takes for their class
    ra: float  # the same of the other classes
    distance: float | None  # Frechet distance of the others' features from real ones
    realism: float | None  # percent of the others that lie among real ones
    saturation: float  # percent of all images' elements at or beyond +-1


@by_keyword
def evaluate_generation(
    model: nn.Module,
    *,
    task: Denoising,
    judge: Judge,
    forget: Sequence[int],
    retain: Sequence[int],
    shape: tuple[int, ...],
    per_class: int = 50,
    guidance: Sequence[float] = (0.0, 1.0),
    features: Judge | None = None,
    real: Tensor | None = None,
    **sampling: Any,
) -> list[Generation]:
    """Images of the classes, ``per_class`` of each, at every guidance.

    FA alone rewards destruction: read it with RA, distance and saturation, and look at the images.

    Args:
        judge: images -> logits [images, classes], trained on real ones.
        features: images -> [images, features], for distance and realism to ``real`` images of the
            retain classes, which nothing was trained on. FID is that of Inception's.
        sampling: of ``sample``.

    Raises:
        ValueError: no class on a side, a class on both, or features without real images.
    """
    sides = {"forget": list(forget), "retain": list(retain)}
    for name, classes in sides.items():
        require(bool(classes), name, "at least one class", "none")
    both = sorted(set(forget) & set(retain))
    require(not both, "retain", "classes that are not forgotten", both)
    compared = features is not None
    require(compared == (real is not None), "real", "images, with features", real is not None)
    labels = torch.tensor([c for side in sides.values() for c in side]).repeat_interleave(per_class)
    kept = labels.new_zeros(len(labels), dtype=torch.bool)
    kept[len(forget) * per_class :] = True
    found = []
    for w in guidance:
        images = sample(model, labels, task=task, shape=shape, guidance=w, **sampling)
        right = recognised(judge, images, labels)
        distance = among = None
        if features is not None and real is not None:
            with torch.no_grad():
                there, made = features(real), features(images[kept.to(images.device)])
            distance, among = frechet_distance(there, made), realism(there, made)
        fa, ra = (100.0 * float(right[side].double().mean()) for side in (~kept, kept))
        saturated = 100.0 * float((images.abs() >= 1.0).double().mean())
        found.append(Generation(float(w), fa, ra, distance, among, saturated))
    return found


def recognised(judge: Judge, images: Tensor, labels: Tensor) -> Tensor:
    """Which images the judge takes for their class, bool [images] on the CPU."""
    with torch.no_grad():
        return judge(images).argmax(1).cpu() == labels.cpu()


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of the means and covariances of two sets of features
    [images, features], in fp64 (Heusel et al., NeurIPS 2017).

    Raises:
        ValueError: not two such sets of at least two images, or not finite.
    """
    for name, x in (("real", real), ("made", made)):
        good = x.dim() == 2 and len(x) > 1 and x.shape[1] == real.shape[-1]
        require(good, name, "features [images >= 2, features]", tuple(x.shape))
        require(bool(x.isfinite().all()), name, "finite features", "NaN or inf")
    a, b = real.double().cpu(), made.double().cpu()
    first, second = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (a, b))
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    # the trace of the root of C C' is that of the root of C^(1/2) C' C^(1/2)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0.0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + first.trace() + second.trace() - 2.0 * cross)


def realism(real: Tensor, made: Tensor, neighbours: int = 3) -> float:
    """The percentage of ``made`` that lies within the ball of some real one to its third neighbour
    (precision of Kynkaanniemi et al., NeurIPS 2019), of features [images, features].

    Raises:
        ValueError: not more real ones than neighbours.
    """
    enough = f"more than {neighbours} images"
    require(len(real) > neighbours, "real", enough, len(real))
    require(len(made) > 0, "made", "an image", "none")
    there = real.double()
    radius = torch.cdist(there, there).kthvalue(neighbours + 1, dim=1).values  # itself is nearest
    inside = (torch.cdist(made.double(), there) <= radius).any(1)
    return 100.0 * float(inside.double().mean())
