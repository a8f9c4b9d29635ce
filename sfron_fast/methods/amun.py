"""AMUN (arXiv 2503.00917, ICML 2025): fine-tuning on the nearest adversarial examples of what is to
be forgotten, under the wrong labels that the model itself gives them.

    min over theta of the mean cross-entropy of  retain, forget and adversarial samples together

Near a forget sample confidence falls, as it is low around data never seen, and elsewhere nothing
moves: what is learnt there the model says already. The closer the examples and the smoother the
model, the nearer the result is to one retrained (``methods.clip_spectral_norms``).

Changes the model in place and returns it. Defaults are those of the authors' code for CIFAR-10 and
ResNet-18, but the rate falls on a cosine, as everywhere here. Their batches are drawn from all
three sets shuffled together; here each retain batch has its share of the other two, so a batch has
as much of every set as the epoch. Further keywords go to ``descend`` (momentum, weight_decay,
max_norm, on_epoch).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import by_keyword, require
from ..tasks import Classification
from .adversarial import Adversarial, adversarial_examples
from .descent import Loader, batches, descend


@by_keyword
def amun(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader | None = None,
    adversarial: Adversarial | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    epochs: int = 10,
    lr: float = 0.01,
    **settings: Any,
) -> nn.Module:
    """AMUN.

    Args:
        forget: batches (inputs, labels) with the true labels; read once, and kept.
        retain: batches of the same kind, with a length. None = without: on the forget and the
            adversarial samples alone, in batches as large as the first of ``forget``.
        adversarial: what ``adversarial_examples`` has made, for example with other settings; None =
            made now.
        bounds: of the inputs, as ``adversarial_examples`` takes them.

    Raises:
        ValueError: as ``adversarial_examples`` and ``descend``; examples of another shape than
            the forget samples; a retain loader without a length.
    """
    sized = retain is None or hasattr(retain, "__len__")
    require(sized, "retain", "batches with a length", type(retain).__name__, "pass a DataLoader")
    task = Classification()
    kept = list(batches(model, forget, "forget", task))
    if adversarial is None:
        adversarial = adversarial_examples(model, kept, bounds=bounds)
    inputs, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    same, found = inputs.shape[1:], adversarial.inputs.shape[1:]
    require(same == found, "adversarial", f"inputs [samples, {same}]", f"[samples, {found}]")
    inputs = torch.cat([inputs, adversarial.inputs.to(inputs)])
    labels = torch.cat([labels, adversarial.labels.to(labels)])

    def losses(_: int) -> Iterator[Tensor]:
        order = torch.randperm(len(labels)).to(labels.device)
        if retain is None:
            for part in order.split(len(kept[0][1])):
                yield task.mean_loss(model, (inputs[part], labels[part]))
            return
        shares = iter(order.tensor_split(max(1, len(retain))))  # type: ignore[arg-type]
        for x, y in batches(model, retain, "retain", task):
            part = next(shares, order[:0])
            both = torch.cat([x, inputs[part]]), torch.cat([y, labels[part]])
            yield task.mean_loss(model, both)

    return descend(model, losses, epochs=epochs, lr=lr, **settings)
