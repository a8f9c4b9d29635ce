"""What SFRonSGD and SFRonAdamW save and load: torch's format, and what torch would lose of it."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .checks import require
from .flat import FlatStates
from .saliency import SaliencyMask


class Resumable(Optimizer):
    """State dicts, pickles and copies that go on where they stopped, also inside a cycle."""

    saliency: SaliencyMask | None
    grad_norm: Tensor | None  # [], of the last step that measured it
    grad_scale: Tensor | None  # torch.amp's: gradients are divided by it
    found_inf: Tensor | None  # torch.amp's: not 0 = skip the update, on the device
    _skipped: dict[torch.device, Tensor]
    _masks: dict[int, tuple[list[Tensor], Tensor]]
    _flat: dict[int, FlatStates]

    @property
    def skipped_steps(self) -> int:
        """Updates skipped so far: a measured norm was not finite, or ``found_inf`` said so. Reads the device."""
        for count in self._skipped.values():
            self.param_groups[0]["skipped"] += int(count)
            count.zero_()
        return self.param_groups[0]["skipped"]

    def state_dict(self) -> dict[str, Any]:
        """As torch's; masks are inputs, so only their digest is in it."""
        self.param_groups[0]["skipped"] = self.skipped_steps
        state = super().state_dict()
        if self.saliency is not None:
            digest = self.saliency.digest()  # reads every mask: once, not per group
            for group in state["param_groups"]:
                group["mask_digest"] = digest
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps the dtype it was saved in; torch.optim's own state dicts load too.

        Raises:
            ValueError: the state was saved under another mask.
        """
        ours = self.saliency.digest() if self.saliency is not None else None
        for group in state_dict["param_groups"]:
            theirs = group.get("mask_digest", ours)
            require(theirs == ours, "state_dict", f"mask digest {ours}", theirs, "pass the mask the run began with")
        # hooks of our own, next to torch's work: the user's see, and may change, what is loaded
        final: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(lambda _, state: final.update(self._with_knobs(state)) or final)
        after = self.register_load_state_dict_post_hook(lambda _: self._keep_dtypes(final), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _with_knobs(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Settings that torch.optim's groups lack stay as they are here."""
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            return state_dict  # torch objects
        ours = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in self.param_groups]
        groups = [{**mine, **theirs} for mine, theirs in zip(ours, saved, strict=True)]
        return {**state_dict, "param_groups": groups}

    def _keep_dtypes(self, state_dict: dict[str, Any]) -> None:
        saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = chain.from_iterable(g["params"] for g in self.param_groups)
        for index, param in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):  # torch has cast it to the parameter's dtype
                    dtype = torch.float32 if key.endswith("step") else value.dtype  # torch may count in fp64
                    self.state[param][key] = value.detach().clone().to(param.device, dtype)
        for group in self.param_groups:
            group.pop("mask_digest", None)

    def __getstate__(self) -> dict[str, Any]:
        self.param_groups[0]["skipped"] = self.skipped_steps  # counted on the device so far
        return {**super().__getstate__(), "saliency": self.saliency}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("saliency", None)
        self._masks, self._skipped, self._flat = {}, {}, {}
        self.grad_norm = self.grad_scale = self.found_inf = None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
