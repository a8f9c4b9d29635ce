"""SFRonSGD and SFRonAdamW as entries of torch's table of optimizers, with torch's own inputs.

The table is in torch's wheel, the tests that go through it are not; test_torch_generic*.py are such
tests.
"""

import copy

import pytest
import torch
from torch import Tensor

from sfron_fast import SFRonAdamW, SFRonSGD

pytest.importorskip("expecttest", reason="torch.testing's own tools need expecttest")
from torch.testing._internal import common_optimizers as common

# the import forbids setting torch.backends for good
torch.backends.__allow_nonbracketed_mutation_flag = True


def _errors(theirs):
    """torch's inputs that must raise: its types, our words; without what we can do and torch
    cannot.
    """

    def make(device, dtype):
        for error in theirs(device, dtype):
            kwargs = error.optimizer_error_input.kwargs
            if isinstance(kwargs.get("lr"), Tensor) and kwargs.get("foreach"):
                continue  # a tensor lr is as good as a number in our one implementation
            if error.error_regex.startswith(("Invalid", "betas")):
                error.error_regex = ": expected "
            yield error
        sample = torch.empty((), device=device, dtype=dtype)
        for flags in ({"foreach": True, "fused": True}, {"fused": True, "differentiable": True}):
            # torch lists them for GPUs only
            given = common.OptimizerInput(params=[sample], kwargs=flags)
            yield common.ErrorOptimizerInput(
                given, error_type=RuntimeError, error_regex=": expected "
            )

    return make


def _entry(kind, stock, capturable):
    (theirs,) = (info for info in common.optim_db if info.optim_cls is stock)
    return common.OptimizerInfo(
        kind,
        optim_inputs_func=theirs.optim_inputs_func,
        scheduler_inputs=theirs.scheduler_inputs,
        optim_error_inputs_func=_errors(theirs.optim_error_inputs_func),
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=theirs.not_og_supported_flags,
        supports_complex=False,
        has_capturable_arg=capturable,
        supports_fused_on=("cpu", "cuda"),
    )


INFOS = [_entry(SFRonSGD, torch.optim.SGD, True), _entry(SFRonAdamW, torch.optim.AdamW, True)]
EACH = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def inputs(info):
    """Fresh settings (a schedule may write a tensor lr), those torch has for GPUs too, with every
    implementation.
    """
    plain = [
        i.kwargs
        for i in info.optim_inputs_func("cuda")
        if not isinstance(i.kwargs.get("betas", [0])[0], Tensor)
    ]
    return [
        {**copy.deepcopy(kwargs), **flag}
        for kwargs in plain
        for flag in ({}, {"foreach": True}, {"fused": True})
    ]


_ALL = [(info, i, str(kwargs)) for info in INFOS for i, kwargs in enumerate(inputs(info))]
EACH_INPUT = pytest.mark.parametrize(
    ("info", "i"), [a[:2] for a in _ALL], ids=[f"{a[0].name}-{a[1]}" for a in _ALL]
)


def line(weight, bias, x):
    """A loss with gradients in both."""
    return (weight.mv(x) + bias).square().sum()
