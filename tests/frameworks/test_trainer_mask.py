"""A mask from what a Trainer loads, and an optimizer by its name."""

import pytest
import torch
from models import bits, same
from test_transformers import arguments, bert
from tiny import gpt, sequences
from transformers import Trainer

import sfron_fast as sf
from sfron_fast.integrations.transformers import (
    ForgetCallback,
    make_optimizer,
    optimizer_factory,
    trainer_mask,
)

RETAIN, FORGET = sequences(8, seed=3), sequences(4, seed=4)


def batch(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_it_is_the_mask_of_both_sets(tmp_path):
    """In the factory's settings, when the Trainer is made already; it trains as if from there."""
    model, settings = gpt(), {"optimizer": "sfron_adamw", "lr": 0.01}
    args, before = arguments(tmp_path, max_steps=2), bits(model)
    factory = optimizer_factory, settings
    trainer = Trainer(model, args, train_dataset=RETAIN, optimizer_cls_and_kwargs=factory)
    found = settings["saliency"] = trainer_mask(trainer, FORGET, threshold=0.8)
    sets = {"forget": [batch(FORGET)], "retain": [batch(RETAIN)]}
    expected = sf.estimate_mask(gpt(), **sets, task=sf.Language(), threshold=0.8)
    apart = sum(int((found.to_bool(n) != expected.to_bool(n)).sum()) for n in expected)
    assert apart <= 0.001 * sum(map(expected.size, expected))  # other batches round otherwise
    assert [found.metadata[n]["samples"] for n in ("forget", "retain")] == [4, 8]
    assert same(bits(model), before)
    trainer.add_callback(ForgetCallback(trainer, FORGET))
    trainer.train()
    assert trainer.optimizer.optimizer.saliency is found
    assert isinstance(trainer.optimizer.optimizer, sf.SFRonAdamW)


def test_of_a_classifier(tmp_path):
    model, rows = bert(), []
    for row in FORGET:
        rows.append({"input_ids": row["input_ids"] % 10, "labels": torch.tensor(1)})
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows)
    assert len(trainer_mask(trainer, rows, estimator="batch")) > 0


def test_refusals(tmp_path):
    trainer = Trainer(gpt(), arguments(tmp_path), train_dataset=RETAIN)
    with pytest.raises(ValueError, match=r"^forget_dataset: expected a dataset with a length > 0"):
        trainer_mask(trainer, [])
    bare = [{"input_ids": row["input_ids"]} for row in FORGET]
    with pytest.raises(ValueError, match=r"^forget_dataset: expected labels in its batches"):
        trainer_mask(trainer, bare)
    with pytest.raises(ValueError, match=r"^optimizer: expected a class, or 'sfron_adamw' or"):
        make_optimizer(gpt(), optimizer="adamw", lr=0.1)
    assert isinstance(make_optimizer(gpt(), optimizer="sfron_sgd", lr=0.1), sf.SFRonSGD)
