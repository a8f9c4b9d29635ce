"""What is read from a batch of images: a pair, a mapping, or the images alone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import require

IMAGES = ("x0", "latents", "pixel_values", "images")
LABELS = ("condition", "labels", "label")


def count_images(batch: Any) -> int:
    """How many there are, in whatever form."""
    if isinstance(batch, Mapping):
        batch = next((batch[key] for key in IMAGES if key in batch), ())
    elif not isinstance(batch, Tensor):
        batch = batch[0] if len(batch) else ()
    return len(batch)


def read_images(batch: Any, condition: Any, name: str) -> tuple[Tensor, Any, dict[str, Any]]:
    """x0 [samples, ...], what each is conditioned on [samples, ...] (None without ``condition``,
    the keyword for it), and the rest of a mapping.

    Raises:
        ValueError: the loader called ``name`` gives no such batches.
    """
    rest: dict[str, Any] = {}
    given: Any = None
    if isinstance(batch, Mapping):
        rest = dict(batch)
        x0 = next((rest.pop(key) for key in IMAGES if key in rest), None)
        keywords = (condition, *LABELS) if isinstance(condition, str) else LABELS
        given = next((rest.pop(key) for key in keywords if condition and key in rest), None)
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        x0, given = batch[0], batch[-1]
    else:
        x0 = batch
    good = isinstance(x0, Tensor) and x0.dim() > 1 and x0.is_floating_point()
    found: object = type(batch).__name__
    if isinstance(x0, Tensor):
        found = f"{x0.dtype} {tuple(x0.shape)}"
    forms = "(x0, condition), or a mapping with x0, latents, pixel_values or images"
    require(good, name, "floating-point images [samples, ...]", found, forms)
    assert isinstance(x0, Tensor)
    if condition is None:
        return x0, None, rest
    each = isinstance(given, Tensor) and given is not x0 and given.shape[:1] == x0.shape[:1]
    found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    none = "condition=None is for models without"
    require(each, name, f"a condition for each of {len(x0)} images", found, none)
    return x0, given, rest
