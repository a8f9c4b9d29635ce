"""How two sets were cut into batches, by which Fishers of squared batch means compare."""

from collections.abc import Mapping
from typing import Any

from ..errors import warn

ALIKE = 1.1  # mean batch sizes: 12 beside 12.7 moves a density of 0.35 to 0.38, beside 13.9 to 0.44


def check_cuts(forget: Mapping[str, Any], retain: Mapping[str, Any]) -> None:
    """Warn (RuntimeWarning) if a threshold on these Fishers' ratio would measure batch sizes; given
    their metadata.

    The mean gradient of b samples squares to the squared mean plus a variance / b. With "batch",
    "batch_equal" and "rank" the smaller batches thus seem to matter more, and weights are selected
    for it.
    """
    if forget.get("estimator") == "sample" or not all(
        m.get("batches") and m.get("samples") for m in (forget, retain)
    ):
        return
    ours, theirs = (m["samples"] / m["batches"] for m in (forget, retain))
    if max(ours, theirs) > ALIKE * min(ours, theirs):
        warn(
            f"the mask depends on how the sets were cut into batches: on average {ours:.4g} samples"
            f" in a forget batch and {theirs:.4g} in a retain batch, and estimator"
            f" {forget.get('estimator')!r} squares batch means, whose noise falls with the size;"
            " cut both sets into batches of one size (mind short last ones), or use"
            " estimator='sample', which does not depend on the cut"
        )
