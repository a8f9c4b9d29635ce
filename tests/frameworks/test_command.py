"""The command, on a tiny Llama with a tokenizer made here; nothing is downloaded."""

import json
import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sfron_fast import Language
from sfron_fast.__main__ import main
from sfron_fast.integrations.run_settings import Settings
from sfron_fast.integrations.texts import Texts, check_apart

FIRST = ("Ada", "Cleo", "Dora", "Ella", "Fay", "Gwen", "Hana", "Ines")
NAMES = [a + b for a in FIRST for b in ("", "lis", "mar", "so")]
CITIES = ("Rome", "Oslo", "Lima", "Bern", "Kyiv", "Riga", "Cork", "Graz")
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


def test_few_texts_under_a_budget_take_more_than_a_few_passes():
    assert Settings(model="m").steps(3) == 30
    assert Settings(model="m", budget=0.1).steps(3) == 100
    assert Settings(model="m", budget=0.1).steps(12) == 120
    assert Settings(model="m", budget=0.1, epochs=4).steps(3) == 12


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


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(folder, tmp_path, monkeypatch):
    """From the checkpoint, to the weights and figures of one never stopped."""
    from sfron_fast.integrations import run_command

    whole, out = tmp_path / "whole", tmp_path / "out"
    few = ["--epochs", 4, "--batch-size", 4, "--lr", 1e-3]
    assert main(command(folder, "--out", whole, *few)) == 0
    unlearn = run_command.unlearn

    def stopped(*args, **settings):
        def on_cycle(cycle, _):
            if cycle == 3:
                raise Stop

        return unlearn(*args, **{**settings, "checkpoint_every": 2, "on_cycle": on_cycle})

    monkeypatch.setattr(run_command, "unlearn", stopped)
    with pytest.raises(Stop):
        main(command(folder, "--out", out, *few))
    assert (out / "run" / "checkpoint.pt").exists()
    assert main(command(folder, "--out", out, *few, "--seed", 3)) == 2  # another run is in it
    monkeypatch.setattr(run_command, "unlearn", unlearn)
    assert main(command(folder, "--out", out, *few)) == 0
    found = [json.loads((place / "report.json").read_text()) for place in (whole, out)]
    assert {**found[0], "seconds": 0} == {**found[1], "seconds": 0}
    weights = [(place / "model.safetensors").read_bytes() for place in (whole, out)]
    assert weights[0] == weights[1]
    assert not (out / "run").exists()


def _on_a_rank(commands):
    """The exit status of each command, as torchrun starts it, and what it prints."""
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    said = []
    for asked in commands:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            status = main(asked)
        said.append((status, out.getvalue(), err.getvalue()))
    return said


def test_two_ranks_write_what_one_process_writes(folder, tmp_path):
    """Every batch is a whole set, so that its order is the same."""
    few = ["--epochs", 8, "--batch-size", 32, "--budget", 0.2]
    alone, out, adapted = tmp_path / "alone", tmp_path / "out", tmp_path / "adapted"
    assert main(command(folder, "--out", alone, *few)) == 0
    lora = ["--lora", 2, "--lr", 5e-2, "--dtype", "bfloat16"]
    evaluated = ["evaluate", "--model", str(out), "--forget", str(folder / "forget.jsonl")]
    asked = [
        command(folder, "--out", out, *few),
        command(folder, "--out", out, *few),  # it is done
        command(folder, "--out", adapted, *few, *lora),
        evaluated,
        command(folder, "--out", tmp_path / "no", "--method", "npo"),
    ]
    first, second = on_ranks(2, _on_a_rank, asked)
    assert [status for status, *_ in first] == [status for status, *_ in second] == [0, 0, 0, 0, 2]
    assert not any(out for _, out, _ in second)  # one prints
    assert "method: expected sfron under torchrun, found npo" in second[4][2]
    found, expected = (json.loads((p / "report.json").read_text()) for p in (out, alone))
    assert found["processes"] == 2
    for key in ("before", "after"):
        for name, figures in expected[key].items():
            assert found[key][name] == pytest.approx(figures, rel=1e-3), (key, name)
    assert found["mask"] == expected["mask"]
    assert f"{found['after']['forget']['loss']:.3f}" in first[3][1]
    models = [AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (out, alone)]
    for name, weight in models[1].items():
        torch.testing.assert_close(models[0][name], weight, rtol=1e-3, atol=1e-4)
    moved = AutoModelForCausalLM.from_pretrained(adapted).state_dict()
    start = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="bfloat16").state_dict()
    assert moved.keys() == start.keys()
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(moved[name], start[name])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
@pytest.mark.parametrize("method", ["sfron", "npo"])
def test_adapters_are_merged(method, folder, tmp_path, capsys):
    """With activations computed again, and without a holdout set, which the card says."""
    out = tmp_path / "out"
    few = ["--method", method, "--lora", 2, "--epochs", 10, "--batch-size", 4, "--lr", 5e-2]
    asked = command(folder, "--out", out, *few, "--gradient-checkpointing", holdout=False)
    assert main(asked) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["trained_weights"] < report["weights"] / 4
    assert report["after"]["forget"]["loss"] > 1.5 * report["before"]["forget"]["loss"]
    bounded = "nothing bounded how far the texts were forgotten"
    assert (bounded in (out / "README.md").read_text()) == (method == "sfron")
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    start = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert weights.keys() == start.keys()
    assert torch.equal(weights["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    moved = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(weights[moved], start[moved])


def test_weights_and_moments_of_few_bits(folder, tmp_path, monkeypatch):
    """The recipe is told; a rate at which weights of bf16 alone stand still is no warning here."""
    from sfron_fast.integrations import run_command

    told, unlearn = [], run_command.unlearn

    def noted(*args, **settings):
        told.append(settings["recipe"])
        return unlearn(*args, **settings)

    monkeypatch.setattr(run_command, "unlearn", noted)
    few = ["--epochs", 2, "--batch-size", 4, "--lr", 1e-4, "--dtype", "bfloat16"]
    bits = ["--weight-bits", 24, "--state-dtype", "int8"]
    out = tmp_path / "out"
    assert main(command(folder, "--out", out, *few, *bits)) == 0
    (recipe,) = told
    assert (recipe.weight_bits, recipe.state_dtype) == (24, torch.int8)
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["state_dtype"] == "int8"
    assert not any("round to nothing" in warning for warning in report["warnings"])


def test_the_card_says_what_the_run_warned_of(folder, tmp_path):
    out = tmp_path / "out"
    few = ["--epochs", 2, "--batch-size", 4, "--lr", 1e-7]
    with pytest.warns(RuntimeWarning, match="nothing was forgotten"):
        assert main(command(folder, "--out", out, *few)) == 0
    said = (out / "README.md").read_text()
    assert "The run warned: nothing was forgotten: the loss of the forget batches" in said
    assert "| lr | 1e-07 |" in said
    assert str(folder) not in said


def test_what_is_wrong_is_said_before_a_step(folder, tmp_path, capsys):
    out = tmp_path / "out"
    bad = {
        "forget: expected a jsonl file": ["--forget", tmp_path / "none.jsonl"],
        "budget: expected holdout texts": ["--budget", 0.1],
        "budget: expected method sfron": ["--budget", 0.1, "--method", "npo"],
        "lora: expected an integer >= 1": ["--lora", 0],
        "lr: expected a number": ["--lr", -1],
        "weight_bits: expected dtype bfloat16": ["--weight-bits", 24],
        "weight_bits: expected method sfron": ["--weight-bits", 24, "--method", "npo"],
        "model: expected a folder with a model": ["--model", tmp_path / "none"],
        "retain, line 1: expected a text that is not in forget too": [
            "--retain",
            folder / "forget.jsonl",
        ],
    }
    for message, more in bad.items():
        assert main(command(folder, "--out", out, *more, holdout=False)) == 2, message
        assert message in capsys.readouterr().err
    long = write(tmp_path / "long.jsonl", [{"text": "Ada " * 200}])
    assert main(command(folder, "--out", out, "--forget", long, holdout=False)) == 2
    assert "forget, line 1: expected at most the model's 128 tokens" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main(command(folder, "--out", out)) == 2
    assert "found" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


# --- texts ----------------------------------------------------------------------------------------


def one(tmp_path, row, coder=None, **more):
    coder = coder or tokenizer()
    return Texts(write(tmp_path / "rows.jsonl", [row]), coder, **more)


FORMS = {
    "question": ({"question": "Who?", "answer": "Ada é."}, "Question: Who?\nAnswer: ", "Ada é."),
    "prompt": ({"prompt": "Ada", "completion": " Rome"}, "Ada", " Rome"),
    "no prompt": ({"prompt": "", "completion": "Rome is"}, "", "Rome is"),
    "text": ({"text": "Ada Rome"}, "", "Ada Rome"),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_those_of_the_answer(form, tmp_path):
    row, prompt, answer = FORMS[form]
    coder = tokenizer()
    texts = one(tmp_path, row, coder)
    ids, labels = texts[0]["input_ids"], texts[0]["labels"]
    assert coder.decode(ids) == prompt + answer + "</s>"
    asked = [label for label in labels if label != -100]
    assert coder.decode(asked) == answer + "</s>"
    assert ids[-len(asked) :] == asked


def test_messages_are_labelled_by_the_chat_template(tmp_path):
    row = {
        "messages": [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Ada."},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "Rome."},
        ]
    }
    coder = tokenizer()
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: .*\{% generation %\}.*no chat temp"):
        one(tmp_path, row, coder)
    coder.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match=r"generation %\}, found one without"):
        one(tmp_path, row, coder)
    coder.chat_template = MARKED
    texts = one(tmp_path, row, coder)
    said = [label for label in texts[0]["labels"] if label != -100]
    assert coder.decode(said) == "Ada.</s>Rome.</s>"


def test_batches_of_texts(tmp_path):
    coder = tokenizer()
    texts = Texts(write(tmp_path / "rows.jsonl", facts(NAMES)), coder)
    (batch,) = texts.loader(len(NAMES), seed=None)
    assert batch["id"].tolist() == list(range(len(NAMES)))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(r["input_ids"]) for r in texts]
    orders = [[b["id"].tolist() for b in texts.loader(8, seed=s)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_texts_that_cannot_be_read_are_named_by_line(tmp_path):
    path, coder = tmp_path / "bad.jsonl", tokenizer()
    good = json.dumps({"text": "Ada Rome"})
    for line, message in {
        "{": "line 3: expected a JSON object",
        "[1]": "line 3: expected an object with one of",
        '{"prompt": "a"}': r"line 3: expected an object with one of .*found \['prompt'\]",
        '{"text": 3}': "line 3: expected words as completion, answer or text, found 3",
        '{"prompt": "Ada", "completion": " "}': "line 3: expected words as completion",
        '{"messages": []}': "line 3: expected messages",
    }.items():
        path.write_text(f"{good}\n\n{line}\n")
        with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
            Texts(path, coder)
    path.write_text("\n")
    with pytest.raises(ValueError, match="at least one text"):
        Texts(path, coder)
    path.write_text(json.dumps({"prompt": "Ada " * 9, "completion": " Rome Oslo"}))
    with pytest.raises(ValueError, match="two labelled tokens or more within 8 tokens"):
        Texts(path, coder, max_length=8)
    path.write_text(json.dumps({"text": "Ada " * 9}))
    with pytest.warns(RuntimeWarning, match="1 of 1 texts were cut at 8 tokens"):
        assert len(Texts(path, coder, max_length=8)[0]["input_ids"]) == 8


def test_sets_that_overlap(tmp_path):
    coder, words = tokenizer(), [f"w{i}" for i in range(60)]

    def texts(name, *rows):
        return Texts(write(tmp_path / f"{name}.jsonl", rows), coder)

    first = texts("a", {"text": "Ada Rome"}, {"text": " ".join(words[:40])})
    same = texts("b", {"text": "Oslo"}, {"prompt": "ada", "completion": "  rome"})
    with pytest.raises(ValueError, match=r"kept, line 2: .* the whole text in gone, line 1"):
        check_apart(gone=first, kept=same)
    run = texts("c", {"text": " ".join(words[8:])})
    with pytest.raises(ValueError, match=r"kept, line 1: .* 32 words in a row in gone, line 2"):
        check_apart(gone=first, kept=run)
    # the same question, fewer words in common, the same text twice in one file: no overlap
    check_apart(gone=first, kept=texts("d", {"text": " ".join(words[9:])}, {"text": "Ada Oslo"}))
    check_apart(gone=texts("e", {"text": "Ada Rome"}, {"text": "Ada Rome"}), kept=None)
