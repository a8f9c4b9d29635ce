"""Images from a diffusion model: DDIM (Song et al., ICLR 2021) with guidance, from noise that is
the same for every model.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batches import model_device
from ...data.draws import normal, sample_keys
from ...errors import by_keyword, integer, number, require
from ...models.modes import evaluating
from ...tasks import Denoising


@by_keyword
def sample(
    model: nn.Module,
    conditions: Tensor | None,
    *,
    task: Denoising,
    shape: tuple[int, ...],
    count: int | None = None,
    steps: int = 20,
    guidance: float = 1.0,
    clamp: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Images [count, *shape] on the model's device, one for each condition, in eval mode.

    Image i begins from noise that depends on ``seed`` and i alone, so models can be compared image
    by image, whatever the batch size.

    Args:
        conditions: [count, ...]; None for a task without a condition, then ``count`` says how many.
        task: whose scheduler, condition and prediction these are.
        steps: of the way from the last timestep to the first, evenly spaced.
        guidance: w >= 0 of (1 + w) conditional - w unconditional predictions; 0 asks the model
            once a step. It hides damage: report 0 too.
        clamp: the images' largest absolute value, held to at every step; None = none.

    Raises:
        ValueError: a setting out of range, by name, or guidance without a null condition.
    """
    require(isinstance(task, Denoising), "task", "Denoising", type(task).__name__)
    total = task.timesteps
    steps, batch_size = integer("steps", steps, 1, total), integer("batch_size", batch_size, 1)
    number("guidance", guidance, 0.0)
    guided = guidance > 0.0 and conditions is not None
    require(not guided or task.null is not None, "guidance", "0 without a null", guidance)
    given = count if conditions is None else len(conditions)
    wanted = "an integer >= 0, or conditions"
    require(isinstance(given, int) and given >= 0, "count", wanted, repr(count))
    assert isinstance(given, int)
    device = model_device(model)
    schedule = task.schedule
    times = torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    made = []
    with evaluating(model), torch.no_grad():
        for first in range(0, given, batch_size):
            rows = torch.arange(first, min(first + batch_size, given), device=device)
            x = normal(sample_keys(rows, seed, "sample"), shape)
            own = None if conditions is None else conditions.to(device)[rows]
            for now, left in pairwise([*times, None]):
                t = torch.full((len(x),), now, device=device)
                said = _predicted(model, task, x, own, t, guidance if guided else 0.0)
                image = schedule.image(x, said, t)
                if clamp is not None:
                    image = image.clamp(-clamp, clamp)
                # the noise that goes with that image: after a clamp another than was said
                noise = schedule.noise(x, image, t)
                x = image if left is None else schedule.noisy(image, noise, t.fill_(left))
            made.append(x)
    return torch.cat(made) if made else torch.empty(0, *shape, device=device)


def _predicted(
    model: nn.Module, task: Denoising, x: Tensor, own: Tensor | None, t: Tensor, guidance: float
) -> Tensor:
    """(1 + w) conditional - w unconditional predictions, fp32, by one call."""
    conditions = own
    if guidance and own is not None:
        x, t = torch.cat([x, x]), torch.cat([t, t])
        conditions = torch.cat([own, task.nothing(own)])
    batch: dict[str, Any] = {
        "noisy": x,
        "target": x,
        "t": t,
        "condition": conditions,
        "rest": {},
    }
    said = task.outputs(model, batch).float()
    if not guidance:
        return said
    conditional, plain = said.chunk(2)
    return (1.0 + guidance) * conditional - guidance * plain
