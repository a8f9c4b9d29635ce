"""The model as it was, without a second model: what moves of it, kept and lent."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..models.lora import adapters_in, add_lora, drop_lora


class Original:
    """Copies of the trainable parameters of ``model`` as they are now, and of its buffers, as
    passes in train mode move BatchNorm's; frozen parameters are shared.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.buffers = {n: b.detach().clone() for n, b in model.named_buffers()}

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[None]:
        """Within, the model has its old weights and buffers: for passes in eval mode, without
        gradients.
        """
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        old = {**self.kept, **self.buffers}
        moved = {name: named[name].data for name in old}
        try:
            for name, tensor in old.items():
                named[name].data = tensor
            yield
        finally:
            for name, tensor in moved.items():
                named[name].data = tensor


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
