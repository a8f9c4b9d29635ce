"""examples/start in small: each runs, and does what it says; the language model is in
tests/frameworks.
"""

import copy
import re
from functools import partial

import pytest
from paths import ROOT

from examples.diffusion.digits import train_judge
from examples.start import diffusion, image_folder, swap
from sfron_fast.demo import digits


def test_pictures_of_a_folder(tmp_path, capsys):
    small = ["--epochs", "5", "--cycles", "12"]
    made = image_folder.main(["--out", str(tmp_path), *small])
    found = made.to_dict()["settings"]["pictures"]
    assert list(found) == ["Original", "Retrain", "SFR-on"]
    assert found["SFR-on"]["FA"]["mean"] < found["Original"]["FA"]["mean"]
    assert found["SFR-on"]["RTE"]["mean"] > 0
    assert "FA, forget accuracy" in (tmp_path / "report.md").read_text()
    assert "pictures: 120 of 1200 training pictures" in capsys.readouterr().out

    folder = tmp_path / "digits"  # as a folder of the caller's
    names = (folder / "forget.txt").read_text().split()
    assert len(names) == 120
    (folder / "forget.txt").write_text("\n".join(names[:7]))
    sets, classes = image_folder.load(folder, side=8)
    assert [len(part) for part in sets.values()] == [7, 1193, 347]
    assert classes == 10
    assert sets["forget"].tensors[1].tolist() == [int(n.split("/")[0]) for n in names[:7]]
    (folder / "forget.txt").write_text("3/none.png")
    with pytest.raises(SystemExit, match=r"expected paths below .*, found 3/none.png"):
        image_folder.load(folder, side=8)


def test_a_digit_is_no_longer_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "STEPS", 5)
    monkeypatch.setattr(diffusion, "train_judge", partial(train_judge, epochs=1))
    small = ["--steps", "30", "--cycles", "2", "--per-class", "4"]
    found = diffusion.main(["--out", str(tmp_path), *small])
    assert found["before"].keys() == found["after"].keys() == {"FA", "RA"}
    before, after = ((tmp_path / f"{name}.png").read_bytes() for name in ("before", "after"))
    assert before != after


def test_two_lines_make_a_script_forget(monkeypatch):
    """Without them it is a script of torch's, and what is to be forgotten stays."""
    trained = digits.train(digits.make_split("wrong labels", 0).train, seed=0)
    for place in (swap, digits):  # both forms start from it
        monkeypatch.setattr(place, "train", lambda *_, **__: copy.deepcopy(trained))
    found = swap.main(["--epochs", "3"])
    text = (ROOT / "examples/start/swap.py").read_text().splitlines()
    kept = [line for line in text if not line.endswith(("# swapped", "# added"))]
    assert len(text) - len(kept) == 2
    stock, put_back = re.subn(r"# (opt = torch\.optim)", r"\1", "\n".join(kept))
    assert put_back == 1
    names = {"__name__": "stock", "__doc__": swap.__doc__}
    exec(compile(stock, "swap.py without two lines", "exec"), names)
    without = names["main"](["--epochs", "3"])
    assert without["before"] == found["before"]
    assert without["after"]["forget"] > 90
    assert found["after"]["forget"] < 40
    assert found["after"]["retain"] > 98
