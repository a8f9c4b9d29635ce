"""The model as it was, without a second model: the weights that move, kept and lent."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..models.lora import adapters_in, add_lora, drop_lora


class Original:
    """Copies of the trainable parameters of ``model`` as they are now; what is frozen is shared."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[None]:
        """Within, the model has its old weights: for passes without gradients."""
        named = dict(model.named_parameters())
        moved = {name: named[name].data for name in self.kept}
        try:
            for name, weight in self.kept.items():
                named[name].data = weight
            yield
        finally:
            for name, weight in moved.items():
                named[name].data = weight


@contextmanager
def only(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Within, no other parameter is trainable."""
    flags = {p: p.requires_grad for p in model.parameters()}
    chosen = set(names)
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


@contextmanager
def adapters_alone(
    model: nn.Module, *, rank: int, alpha: float, dropout: float, seed: int
) -> Iterator[None]:
    """Within, low-rank adapters are all that is trainable: those of the model, or new ones
    (``add_lora``), which stay unless a ValueError says that nothing was to be done.
    """
    adapters = adapters_in(model)
    new = not adapters
    if new:
        adapters = add_lora(model, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
    try:
        with only(model, adapters):
            yield
    except ValueError:  # refused: nothing of it stays
        if new:
            drop_lora(model)
        raise
