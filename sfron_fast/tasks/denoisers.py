"""A denoising model: what it is given, and what it says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import require
from ..ops.adaptive_weights import readable
from .outputs import inner

Condition = str | Callable[..., Any] | None


def predict(model: nn.Module, condition: Condition, batch: Any) -> Any:
    """What the model says of a prepared batch of ``Denoising``; of what it returns ``.sample``, or
    the first of a tuple.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), batch["noisy"])
    given, rest = (batch["noisy"].to(weight.dtype), batch["t"]), batch["rest"]
    with _without_own_drop(model):
        if condition is None:
            found = model(*given, **rest)
        elif isinstance(condition, str):
            found = model(*given, **{condition: batch["condition"]}, **rest)
        else:
            found = condition(model, *given, batch["condition"], **rest)
    found = getattr(found, "sample", found)
    return found[0] if isinstance(found, tuple) else found


def check_batch(model: nn.Module, batch: Any, condition: Condition) -> None:
    """What a model of diffusers asks for besides, and whether it has such classes.

    Raises:
        ValueError: it has not.
    """
    config = getattr(inner(model), "config", None)
    kind = getattr(config, "addition_embed_type", None)
    there = kind is None or "added_cond_kwargs" in batch["rest"]
    wanted = f"added_cond_kwargs in every batch, for a model with {kind!r} embeddings"
    require(there, "task", wanted, sorted(batch["rest"]))
    null = getattr(config, "num_embeds_ada_norm", None)  # a DiT has one more, for no class
    classes = null or getattr(config, "num_class_embeds", None)
    labels = batch["condition"]
    if condition != "class_labels" or classes is None or not len(labels) or not readable(labels):
        return
    last = classes if null else classes - 1
    low, high = int(labels.min()), int(labels.max())
    require(low >= 0 and high <= last, "labels", f"classes 0 to {last}", f"{low} to {high}")


@contextmanager
def _without_own_drop(model: nn.Module) -> Iterator[None]:
    """The task drops conditions; label embeddings of diffusers would too, at random, in training
    mode.
    """
    dropping = [m for m in model.modules() if m.training and hasattr(m, "token_drop")]
    for module in dropping:
        module.training = False
    try:
        yield
    finally:
        for module in dropping:
            module.training = True
