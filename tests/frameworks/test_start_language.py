"""examples/start/language_lora in small."""

import torch

from examples.start import language_lora


def test_people_are_forgotten_by_adapters_that_are_merged(capsys, monkeypatch):
    models = []
    made = language_lora.make_model
    monkeypatch.setattr(language_lora, "make_model", lambda: models.append(made()) or models[0])
    small = ["--people", "36", "--epochs", "40", "--cycles", "12", "--rank", "4"]
    found = language_lora.main(small)
    before, after = found["before"], found["after"]
    assert after["forget"] < before["forget"]
    assert before["holdout"] < before["retain"]
    assert "of the budget spent" in capsys.readouterr().out
    assert not [name for name, _ in models[0].named_parameters() if "lora_" in name]
    torch.manual_seed(0)
    fresh = made().model.embed_tokens.weight
    assert not torch.equal(models[0].model.embed_tokens.weight, fresh)  # it has learnt
