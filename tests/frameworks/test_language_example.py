"""examples/language in small, and what only a real model of Hugging Face's shows of the metrics."""

import json

import pytest
import torch
from tiny import gpt

from examples.language import arms, comes_back, compare, judge, report, tokens, train
from examples.language.authors import Benchmark, benchmark
from sfron_fast.evaluation import language


@pytest.fixture(scope="module")
def data():
    return benchmark(0)


@pytest.fixture(scope="module")
def tokenizer(data):
    return tokens.train_tokenizer(data.texts())


def small(data):
    """A few questions of every split."""
    return Benchmark(
        data.base[:4],
        data.forget[:4],
        data.retain[:4],
        data.holdout[:4],
        data.real_authors[:2],
        data.real_world[:2],
    )


def test_the_splits(data):
    sizes = {name: len(getattr(data, name)) for name in ("base", "forget", "retain", "holdout")}
    assert sizes == {"base": 1920 + 140, "forget": 80, "retain": 720, "holdout": 80}
    assert (len(data.full), len(data.real_authors), len(data.real_world)) == (800, 30, 40)
    splits = (data.base, data.forget, data.retain, data.holdout)
    asked = [{qa.question for qa in split} for split in splits]
    assert sum(map(len, asked)) == len(set().union(*asked)), "an author in two splits"
    for qa in (*data.full, *data.holdout, *data.real):
        assert len({qa.paraphrase, *qa.wrong}) == 5
        assert (qa.paraphrase == qa.answer) == (qa in data.real)
    assert benchmark(0) == data != benchmark(1)


def test_the_batches(data, tokenizer):
    rows = tokens.examples(tokenizer, data.forget[:3], first=7)
    batch = next(iter(tokens.loader(tokenizer, rows, 3)))
    assert batch["id"].tolist() == [7, 8, 9]
    assert len(tokenizer) == tokens.VOCABULARY
    for ids, mask, labels, qa in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], data.forget, strict=False
    ):
        assert torch.equal(mask == 0, ids == tokenizer.pad_token_id)
        told = labels[labels != tokens.IGNORED]
        assert told[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(told, skip_special_tokens=True).strip() == qa.answer
        asked = ids[(labels == tokens.IGNORED) & (mask == 1)]
        assert tokenizer.decode(asked, skip_special_tokens=True).strip() == qa.question


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    """A pair that has seen a few questions once; whatever would train it again fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "benchmark", lambda seed: small(data))
        patch.setattr(train, "BASE", train.Schedule(1e-3, 1))
        patch.setattr(train, "AUTHORS", train.Schedule(1e-3, 1))
        out = tmp_path_factory.mktemp("language")
        train.main(["--out", str(out), "--second"])
        patch.setattr(train, "train", None)
        yield out


def test_a_pair_is_trained_once(folder):
    pair = train.prepare(folder, 0, train.MODELS)
    assert list(pair.models) == list(train.MODELS)
    full, base = pair.models["full"], pair.models["base"]
    assert full.num_parameters() == 1_967_808
    assert not torch.equal(full.lm_head.weight, base.lm_head.weight)


def test_models_of_other_data_are_refused(folder, monkeypatch):
    monkeypatch.setattr(train, "benchmark", lambda seed: small(benchmark(1)))
    with pytest.raises(ValueError, match="models of these data, found others"):
        train.load(folder, 0)


def test_a_pair_is_judged(folder, capsys):
    rows = judge.main(["--out", str(folder)])
    assert set(rows) == {"retrain", "full", "retrain_second"}
    row = rows["retrain"]
    assert (row["gap"], row["D"], row["p value"], row["privleak"]) == (0.0, 0.0, 1.0, 0.0)
    assert set(row) == set(judge.COLUMNS)
    assert rows["full"]["gap"] > 0.0
    assert "unsound: Full p forget >= .95" in capsys.readouterr().out


def test_the_gates():
    good = {"p forget": 0.96, "ES": 0.97, "D": 0.6, "gap": 0.4}
    rows = {
        "full": good,
        "retrain": {"p forget": 0.4},
        "retrain_second": {"D": 0.1, "gap": 0.02},
    }
    assert judge.unsound(rows) == []
    rows["full"] = good | {"D": 0.4}
    rows["retrain_second"] = {"D": 0.2, "gap": 0.02}
    assert judge.unsound(rows) == ["Full D >= .5", "second Retrain D <= .15"]


class Numbers:
    pad_token_id = eos_token_id = 0

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(int(t)) for t in row if t > 0) for row in rows]


def test_padding_changes_nothing_of_gpt2():
    """Its places are learnt: counted from the padding on they would be others."""
    model = gpt().eval()
    ids = torch.tensor([[5, 9, 3, 7, 2]])
    labels = torch.tensor([[-100, -100, 3, 7, 2]])
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    pads = {"left": (3, 0), "right": (0, 3)}
    wanted = language.token_stats(model, [alone])
    assert wanted.logp.dtype == torch.float64
    for side, pad in pads.items():
        padded = {
            key: torch.nn.functional.pad(value, pad, value=fills[key])
            for key, value in alone.items()
        }
        found = language.token_stats(model, [padded])
        torch.testing.assert_close(found.logp, wanted.logp, msg=side)
    logits = model(**{key: alone[key] for key in ("input_ids", "attention_mask")}).logits
    log_p = logits[0, 1:4].log_softmax(1)
    torch.testing.assert_close(wanted.logp, log_p[range(3), labels[0, 2:]].detach())

    # together with a longer question the greedy answer is the one it is alone
    long = {key: torch.cat([value, value], 1)[:, :6] for key, value in alone.items()}
    long["labels"] = torch.tensor([[-100, -100, -100, -100, -100, 9]])
    short = {key: torch.nn.functional.pad(v, (0, 1), value=fills[key]) for key, v in alone.items()}
    both = {key: torch.cat([short[key], long[key]]) for key in alone}
    singles = [language.answers(model, Numbers(), [b], max_new_tokens=3) for b in (alone, long)]
    told, said = language.answers(model, Numbers(), [both], max_new_tokens=3)
    assert told == [single[0][0] for single in singles]
    assert said == ["3 7 2", "9"]


def test_what_comes_back(folder, monkeypatch):
    monkeypatch.setattr(comes_back, "STEPS", 2)
    monkeypatch.setattr(comes_back, "HIDDEN_STEPS", 5)
    rows = comes_back.main(["--out", str(folder)])
    assert set(rows) == {"retrain", "full", "hidden"}
    assert set(rows["full"]) == {"p forget", "relearnt", "int8", "int4"}
    full, hidden = rows["full"], rows["hidden"]
    assert hidden["p forget"] < 0.8 * full["p forget"]
    assert hidden["int4"] == pytest.approx(full["int4"], rel=1e-3)
    assert full["relearnt"] > full["p forget"]


def made_up(better: float):
    """Rows of all arms, alike; SFR-on's gap is smaller by ``better``."""
    row = dict.fromkeys((*judge.COLUMNS, "relearnt", "int8", "int4", "spent", "seconds"), 0.2)
    rows = {arm: dict(row) for arm in arms.ARMS}
    rows["SFR-on"] |= {"gap": 0.2 - better, "p retain": 0.95}
    return rows


def test_an_arm_is_run_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "NEW_TOKENS", 2)
    options = ["--out", str(folder), "--results", str(tmp_path), "--steps", "2", "--arms"]
    found = compare.main([*options, "SFR-on, random mask"])
    assert (tmp_path / "pair0.json").exists()
    row = found["rows"]["SFR-on, random mask"]
    assert {*judge.COLUMNS, "relearnt", "int4", "steps at the ceiling"} < set(row)
    assert row["p forget"] != found["rows"]["second Retrain"]["p forget"]
    monkeypatch.setattr(compare, "run_arm", None)
    assert compare.main([*options, "SFR-on, random mask"]) == found
    with pytest.raises(ValueError, match="use another --results"):
        compare.main([*options[:4], "--steps", "3", "--arms", "Full"])


def test_a_random_mask_is_as_large(folder):
    pair = train.load(folder, 0)
    setting = arms.Setting(
        pair.data, pair.tokenizer, pair.models["full"], pair.models["retrain"], 0
    )
    mask, drawn = setting.mask(), arms.random_mask(setting)
    assert drawn.counts() == mask.counts()
    assert drawn != mask


def test_the_report(tmp_path):
    pytest.importorskip("matplotlib")
    for pair, better in ((1, 0.15), (2, 0.1)):
        rows = made_up(better)
        if pair == 2:
            del rows["NPO 3e-4"]
            rows["WGA 3e-4"] = {"error": "it diverged"}
        found = {"rows": rows, "mask density": 0.4, "holdout loss": 1.2}
        (tmp_path / f"pair{pair}.json").write_text(json.dumps(found))
    text = report.report(tmp_path, (1, 2))
    assert (tmp_path / "README.md").read_text() == text
    assert "Pair 2 lacks: NPO 3e-4." in text
    assert "it diverged" in text
    lines = [line for line in text.splitlines() if line.startswith("| SFR-on | SFR-on: ")]
    verdicts = {line.split(" | ")[1]: line.split(" | ")[2:] for line in lines}
    assert verdicts["SFR-on: gap at least 0.05 below GradDiff 3e-4"][0] == "PASS"
    assert verdicts["SFR-on: gap at least 0.05 below NPO 3e-4"] == ["NOT SHOWN", "1: +0.150 |"]
    assert verdicts["SFR-on: gap <= 0.08"] == ["FAIL", "1: 0.050; 2: 0.100 |"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("gap.png", "trade.png"))
    with pytest.raises(ValueError, match="--pairs"):
        report.report(tmp_path, (3,))
