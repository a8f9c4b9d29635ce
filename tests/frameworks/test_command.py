"""The command, on a tiny Llama with a tokenizer made here; nothing is downloaded."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

from sfron_fast import Language
from sfron_fast.__main__ import main
from sfron_fast.integrations.texts import Texts, check_apart

NAMES = [
    a + b for a in "Ada Cleo Dora Ella Fay Gwen Hana Ines".split() for b in ("", "lis", "mar", "so")
]
CITIES = "Rome Oslo Lima Bern Kyiv Riga Cork Graz".split()
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def facts(names):
    cities = [CITIES[(5 * i * i + i // 3) % len(CITIES)] for i in range(len(names))]
    return [
        {"prompt": f"{name}", "completion": f" {city} is where it was."}
        for name, city in zip(names, cities, strict=True)
    ]


def tokenizer():
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [row["prompt"] + row["completion"] for row in facts(NAMES)] * 9
    coder.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=coder, eos_token="</s>", pad_token="</s>")


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that knows its texts by heart, and the files."""
    torch.manual_seed(0)
    place, coder = tmp_path_factory.mktemp("command"), tokenizer()
    config = LlamaConfig(
        vocab_size=len(coder),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=coder.eos_token_id,
        pad_token_id=coder.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 7
    rows = facts(NAMES)
    write(place / "forget.jsonl", rows[:4])
    write(place / "retain.jsonl", rows[4:])
    write(place / "holdout.jsonl", facts(["Inesa", "Gwenso", "Doraly", "Cleomir"]))
    learnt = Texts(write(place / "all.jsonl", rows), coder)
    optimizer, task = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0), Language()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)
    for batch in [batch for _ in range(40) for batch in learnt.loader(8)]:
        optimizer.zero_grad()
        task.mean_loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(place / "model")
    coder.save_pretrained(place / "model")
    return place


def command(folder, *more, holdout=True):
    sets = ("forget", "retain", "holdout") if holdout else ("forget", "retain")
    files = [x for name in sets for x in (f"--{name}", str(folder / f"{name}.jsonl"))]
    return ["unlearn", "--model", str(folder / "model"), *files, *map(str, more)]


def test_a_run_of_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    asked = command(folder, "--out", out, "--epochs", 20, "--batch-size", 4, "--budget", 0.2)
    assert main(asked) == 0
    report = json.loads((out / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["forget"]["probability"] > 0.9
    assert before["forget"]["min_k_auc"] > 0.9
    assert after["forget"]["loss"] > 3 * before["forget"]["loss"]
    rise = after["retain"]["loss"] - before["retain"]["loss"]
    assert rise < 0.4 * before["holdout"]["loss"]
    assert 0 < report["mask"]["density"] < 1
    assert report["settings"]["budget"] == 0.2
    said = (out / "README.md").read_text()
    assert report["mask"]["digest"] in said
    assert (
        f"| forget | loss | {before['forget']['loss']:.3f} | {after['forget']['loss']:.3f} |"
        in said
    )
    # a folder like any other of transformers
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    capsys.readouterr()
    assert main(["evaluate", "--model", str(out), "--forget", str(folder / "forget.jsonl")]) == 0
    assert f"{after['forget']['loss']:.3f}" in capsys.readouterr().out
    # again: it is done; another command is refused
    assert main(asked) == 0
    assert json.loads((out / "report.json").read_text()) == report
    assert main([*asked, "--seed", "1"]) == 2
    assert "out: expected a new folder, or the one of this command" in capsys.readouterr().err
