"""Whether a backward pass reached every weight that is to be trained."""

from torch import nn

from ..errors import warn

NAMED = 3


def gradients_reach(model: nn.Module) -> list[str]:
    """The trainable parameters without a gradient, by name: for after the backward pass of a run's
    first forget step, before ``zero_grad``. It asks no device.

    Adapters of LoRA under activation checkpointing are the usual case: with
    ``use_reentrant=True`` a block whose inputs need no gradient gives none to its weights.

    Warns:
        RuntimeWarning: there are such, with their names and the remedy.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name, p in trained if p.grad is None]
    if missing:
        more = len(missing) - NAMED
        names = ", ".join(missing[:NAMED]) + (f" and {more} more" if more > 0 else "")
        warn(
            f"{len(missing)} of {len(trained)} trainable parameters got no gradient in the first"
            f" forget step and will not forget: {names}; with gradient checkpointing pass"
            " gradient_checkpointing_kwargs={'use_reentrant': False} or call"
            " model.enable_input_require_grads(); what shall not be trained should be frozen"
        )
    return missing
