"""What is easily given to the list functions in place of lists of tensors and packed bits."""

import numpy as np
import pytest
import torch

import sfron_fast as sf
from sfron_fast import functional
from sfron_fast.ops.bits import unpack_bits

ONE, FLAGS = torch.ones(8), torch.tensor([1, 0] * 4, dtype=torch.bool)
STEP = {"lr": 0.1}
CALLS = {
    "grads": lambda: functional.masked_grad_norm(ONE),
    "params": lambda: functional.sgd_step_(ONE, ONE, **STEP),
    "slow": lambda: functional.interpolate_(ONE, ONE, 0.5),
    "fisher": lambda: functional.fisher_accumulate_(ONE, [ONE], 1.0),
    "forget": lambda: functional.saliency_mask(ONE, [ONE], 1.0),
    "retain": lambda: functional.saliency_mask([ONE], ONE, 1.0),
    "exp_avgs": lambda: functional.adamw_step_([ONE], [ONE], ONE, [ONE], [ONE], **STEP),
    "momentum_buffers": lambda: functional.sgd_step_(
        [ONE], [ONE], momentum_buffers=torch.zeros(8), momentum=0.9, **STEP
    ),
    "slow_from": lambda: functional.sgd_step_([ONE], [ONE], slow_from=ONE, slow_lr=0.5, **STEP),
}


@pytest.mark.parametrize("argument", CALLS)
def test_a_tensor_is_no_list(argument):
    before = ONE.clone()
    with pytest.raises(ValueError, match=rf"^{argument}: expected a list of tensors, found a tens"):
        CALLS[argument]()
    assert torch.equal(ONE, before)


def test_a_mask_that_selects_nothing_is_not_taken_for_none():
    """A tensor of one zero is false, as an absent list is: it was dropped in silence."""
    nothing = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^masks: expected a list of tensors"):
        functional.masked_grad_norm([ONE], nothing)
    assert functional.masked_grad_norm([ONE], [nothing]) == 0.0


def test_arrays_and_other_sequences():
    with pytest.raises(ValueError, match=r"^grads: expected a list of tensors"):
        functional.masked_grad_norm(np.ones(8))
    assert functional.masked_grad_norm((ONE,)) == functional.masked_grad_norm([ONE])


@pytest.mark.parametrize("mask", [FLAGS, FLAGS.float()])
def test_a_mask_of_another_kind_is_told_the_remedy(mask):
    for call in (
        lambda: functional.masked_grad_norm([ONE], [mask]),
        lambda: functional.sgd_step_([ONE.clone()], [ONE], masks=[mask], **STEP),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"masks\[0\]: .*pack_bits.*torch\."):
            call()


def test_packed_bits_do_what_the_flags_say():
    packed = functional.pack_bits(FLAGS)
    assert packed.tolist() == [0b01010101]
    assert functional.masked_grad_norm([ONE], [packed]) == 2.0
    weight = torch.zeros(3, 3)
    chosen = torch.eye(3, dtype=torch.bool)
    functional.sgd_step_([weight], [torch.ones(3, 3)], masks=[functional.pack_bits(chosen)], lr=1.0)
    assert torch.equal(weight, -torch.eye(3))
    assert torch.equal(unpack_bits(functional.pack_bits(chosen), chosen.shape), chosen)
    for wrong in (chosen.float(), chosen.tolist()):
        with pytest.raises(ValueError, match=r"^selected: expected a tensor of bool, found"):
            functional.pack_bits(wrong)


def test_label_smoothing_is_refused_with_a_reason():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    plain = sf.adaptive_cross_entropy(logits, labels, label_smoothing=0.0)
    assert torch.equal(plain, sf.adaptive_cross_entropy(logits, labels))
    with pytest.raises(ValueError, match=r"^label_smoothing: expected 0, as smoothed losses do"):
        sf.adaptive_cross_entropy(logits, labels, label_smoothing=0.1)
