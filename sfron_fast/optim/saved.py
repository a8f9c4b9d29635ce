"""What SFRonSGD and SFRonAdamW save and load: torch's format, and what torch would lose of it."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import place
from ..errors import require
from ..models.names import canonical_name
from .coded import coded, decoded
from .elsewhere import settle
from .groups import GroupedOptimizer
from .state_kind import FORGET, StateKind, zero_state
from .validation import check_dtypes, check_phase, loaded_group, plain_numbers

CORRECTIONS = ("correction", "slow_correction")


def _check_placement(state: dict[str, Any], param: Tensor) -> None:
    """Raise unless a saved state is in shards where its parameter is, on the same mesh, and nowhere
    else.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            require(
                place(value)[1] == place(param)[1]
                and getattr(value, "placements", None) == getattr(param, "placements", None),
                "state_dict",
                f"{key!r} placed as its parameter",
                "another placement",
                "use set_optimizer_state_dict of torch.distributed.checkpoint.state_dict",
            )


def _loaded(value: Any, kind: StateKind | None, param: Tensor) -> Any:
    """A copy of a saved entry, as its kind is beside this parameter."""
    if kind is not None and kind.role == "count":
        # torch may count in fp64, and once did without a tensor
        value = torch.as_tensor(value, dtype=torch.float32)
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if kind is None:
        return value.detach().clone().to(param.device)
    if kind.is_away(param) and value.shape == param.shape:
        return zero_state(param, kind).copy_(value.detach())
    return value.detach().clone().to(kind.device_of(param), kind.dtype_of(param))


class Resumable(GroupedOptimizer):
    """State dicts, pickles and copies that go on where they stopped, also inside a cycle."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's; masks are inputs, so only their digest is in it.

        Moments of int8 are in it in fp32, on the CPU unless they are sharded: what other settings
        and other tools read. Nothing is lost.

        Raises:
            RuntimeError: between ``step_in_backward`` and the ``step()`` that closes it.
        """
        state = self.compact_state_dict()
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            for index, param in zip(saved["params"], group["params"], strict=True):
                if index in state["state"]:
                    state["state"][index] = decoded(state["state"][index], param)
        return state

    def compact_state_dict(self) -> dict[str, Any]:
        """As ``state_dict``, with moments of int8 as they are: codes and scales. It loads, too."""
        if self.mid_step:
            raise RuntimeError(
                "state_dict: expected step() after step_in_backward, found none; call it to close"
                " the step, or after an error go on from a checkpoint"
            )
        self.param_groups[0]["skipped"] = self.skipped_steps
        settle(self)
        state = super().state_dict()
        state["param_groups"] = [plain_numbers(group) for group in state["param_groups"]]
        if self.saliency is not None:
            digest = self.saliency.digest()  # reads every mask: once, not per group
            for group in state["param_groups"]:
                group["mask_digest"] = digest
        return state

    def stock_state_dict(self) -> dict[str, Any]:
        """What ``torch.optim``'s SGD, or AdamW / Adam, would save here: load it there to go on
        without forgetting.

        Raises:
            RuntimeError: inside a cycle, whose end the other optimizer would not know.
        """
        if self.mid_cycle:
            raise RuntimeError(
                "stock_state_dict: expected a finished cycle, found retain steps pending; "
                "call step() for them first"
            )
        saved = self.state_dict()
        ours = set(self.defaults) - set(self.stock([torch.zeros(())]).defaults)
        groups = [
            {k: v for k, v in group.items() if k not in ours} for group in saved["param_groups"]
        ]
        on_device = {i for g in groups if g.get("capturable") or g["fused"] for i in g["params"]}
        states: dict[int, dict[str, Any]] = {}
        for i, state in saved["state"].items():
            theirs = self.stock is torch.optim.SGD
            own = {"slow", *CORRECTIONS, *(["step"] if theirs else [])}
            kept = {k: v for k, v in state.items() if k not in own and not k.startswith(FORGET)}
            if "step" in kept and i not in on_device:
                kept["step"] = kept["step"].cpu()
            states |= {i: kept} if kept else {}
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep to ``state_dtype``; torch.optim's own state dicts load too.

        A run that has done forget steps goes on where it was, also inside a cycle, with its own
        ``forget_lr`` and ``slow_lr``, as with its own ``lr``; its other forget settings must be
        this optimizer's. The state of a training run, torch.optim's or of one of these optimizers
        that has done no forget step, leaves all of them as they were given here: masked, forget_lr,
        max_norm, clip_retain, retain_steps, slow_lr, moments, mask_semantics, state_dtype.

        Raises:
            ValueError: the state was saved under another mask, a masked group with other names or
                in another order, of a run that forgets with other settings, or with settings that
                cannot be.
        """
        ours = self.saliency.digest() if self.saliency is not None else None
        for group in state_dict["param_groups"]:
            theirs = group.get("mask_digest") or ours
            require(
                theirs == ours,
                "state_dict",
                f"mask digest {ours}",
                theirs,
                "pass the mask the run began with",
            )
        for mine, group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            names, theirs = (
                [canonical_name(n) for n in g.get("param_names", ())] for g in (mine, group)
            )
            same = not mine["masked"] or not theirs or names == theirs
            require(
                same,
                "state_dict",
                f"parameters {names}",
                theirs,
                "pass them in the order of the saved run",
            )
            for index, param in zip(group["params"], mine["params"], strict=False):
                _check_placement(state_dict["state"].get(index, {}), param)
        settle(self)
        # hooks of our own, next to torch's work: the user's see, and may change, what is loaded.
        # Torch gets no state: it would cast all of it first, on the device
        final: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(
            lambda _, state: {**(final.update(self._with_knobs(state)) or final), "state": {}}
        )
        after = self.register_load_state_dict_post_hook(
            lambda _: self._load_state(final), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
            self._in_backward.clear()  # a step that an error left half done is gone
        finally:
            before.remove()
            after.remove()

    def _with_knobs(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The groups to load, with this optimizer's settings where ``loaded_group`` says so."""
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            return state_dict  # torch objects
        begun = any(group.get("has_forgotten", "retain_pending" in group) for group in saved)
        groups = [
            loaded_group(mine, theirs, begun)
            for mine, theirs in zip(self.param_groups, saved, strict=True)
        ]
        for group, mine in zip(groups, self.param_groups, strict=True):
            self.check_group(group)
            check_dtypes(group, mine["params"])
        check_phase(groups)
        return {**state_dict, "param_groups": groups}

    def _load_state(self, state_dict: dict[str, Any]) -> None:
        """State in the dtype, and where, this optimizer would have made it."""
        saved_state, known = state_dict["state"], set()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["mask_digest"] = None  # only saved ones have it: it takes reading the masks
            kinds = self.known_kinds(group)
            for index, param in zip(saved["params"], group["params"], strict=True):
                known.add(index)
                if index not in saved_state:
                    continue
                found = coded(decoded(saved_state[index], param), kinds, param)
                for key in CORRECTIONS if group["weight_bits"] is None else ():
                    found.pop(key, None)
                self.state[param] = {
                    key: _loaded(value, kinds.get(key), param) for key, value in found.items()
                }
        self.state.update({key: value for key, value in saved_state.items() if key not in known})

    def __getstate__(self) -> dict[str, Any]:
        self.param_groups[0]["skipped"] = self.skipped_steps  # counted on the device so far
        settle(self)
        return {**super().__getstate__(), "saliency": self.saliency}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        # torch loads a state dict this way too
        self._saliency = state.pop("saliency", self.__dict__.get("_saliency"))
        super().__setstate__(state)
        for kind in type(self).__mro__:  # settings newer than the pickle
            known = inspect.signature(vars(kind).get("__init__", lambda: None)).parameters.values()
            for setting in (p for p in known if p.default is not p.empty and p.name != "saliency"):
                self.defaults.setdefault(setting.name, setting.default)
        if self.defaults["fused"]:
            self._step_supports_amp_scaling = True
        self._remember_nothing()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
