"""unlearn() stopped anywhere and resumed: the same bits, or a refusal that changes nothing."""

import enum
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import bits, build, data, random_mask, same
from paths import ROOT, SUPPORT
from runs import EACH_RECIPE, RECIPES, TOTAL, loaders, run, whole_run

import sfron_fast as sf


@pytest.mark.checklist("C5")
@EACH_RECIPE
@pytest.mark.parametrize("kind", ["global", "own", "shared", "sampler", "noisy"])
def test_resume_is_bit_identical_from_every_position(name, kind, tmp_path):
    expected = whole_run(RECIPES[name], kind)
    assert not same(expected, bits(build("dropout")))
    for stop in range(1, TOTAL + 1):
        folder = tmp_path / str(stop)
        run(RECIPES[name], kind, folder, stop)
        # the world is another one: other global seeds, fresh loaders, the original model
        torch.manual_seed(99)
        model = build("dropout")
        retain, forget = loaders(kind)
        torch.randn(stop)
        result = sf.unlearn(
            model,
            retain=retain,
            forget=forget,
            recipe=RECIPES[name],
            checkpoint=folder,
            checkpoint_every=2,
        )
        assert same(bits(result.model), expected), stop
        assert result.model is model


def test_resume_of_a_resume_and_of_a_finished_run(tmp_path):
    recipe, expected = RECIPES["official"], whole_run(RECIPES["official"], "own")
    for stop in (1, 4, 6):
        run(recipe, "own", tmp_path, stop)
    assert same(bits(run(recipe, "own", tmp_path).model), expected)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(files) == {"checkpoint.pt", "mask.safetensors"}
    again = run(recipe, "own", tmp_path)
    assert same(bits(again.model), expected)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


CHILD = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from models import bits
from runs import RECIPES, run
torch.save(bits(run(RECIPES[{name!r}], {kind!r}, {folder!r}).model), {out!r})
"""


@pytest.mark.checklist("C5")
@pytest.mark.parametrize(("name", "kind", "stop"), [("official", "own", 4), ("paper", "global", 5)])
def test_resume_in_a_new_process(name, kind, stop, tmp_path):
    run(RECIPES[name], kind, tmp_path / "run", stop)
    code = CHILD.format(
        tests=str(SUPPORT),
        root=str(ROOT),
        name=name,
        kind=kind,
        folder=str(tmp_path / "run"),
        out=str(tmp_path / "weights.pt"),
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert same(torch.load(tmp_path / "weights.pt"), whole_run(RECIPES[name], kind))


def test_checkpoints_do_not_change_the_run(tmp_path):
    for name, recipe in RECIPES.items():
        expected = whole_run(recipe, "noisy")
        assert same(bits(run(recipe, "noisy", tmp_path / name).model), expected)


def refused(folder, match, *, model="dropout", recipe=RECIPES["official"], kind="own", **settings):
    """The call raises, and the model, the random generator and the files keep their bits."""
    model = build(model) if isinstance(model, str) else model
    retain, forget = loaders(kind)
    before, files = bits(model), {p.name: p.read_bytes() for p in folder.iterdir()}
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        sf.unlearn(
            model, retain=retain, forget=forget, recipe=recipe, checkpoint=folder, **settings
        )
    assert same(bits(model), before)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files


def test_a_checkpoint_from_before_zero_over_zero_goes_on(tmp_path):
    """The mask lies in the folder, so the setting it was made with has no more say."""
    for name, kind in (("official", "own"), ("paper", "global")):
        folder = tmp_path / name
        run(RECIPES[name], kind, folder, 4)
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        del saved["recipe"]["zero_over_zero"]
        torch.save(saved, folder / "checkpoint.pt")
        assert same(bits(run(RECIPES[name], kind, folder).model), whole_run(RECIPES[name], kind))


def test_checkpoint_of_another_run_is_refused(tmp_path):
    run(RECIPES["official"], "own", tmp_path, 4)
    refused(tmp_path, "checkpoint: expected a run with this recipe", recipe=RECIPES["paper"])
    refused(
        tmp_path,
        "checkpoint: expected a run with this recipe",
        recipe=RECIPES["official"].replace(lr=0.06),
    )
    refused(
        tmp_path,
        "model: expected the weights the checkpointed run started from",
        model=build("dropout", seed=3),
    )
    refused(tmp_path, "model: expected", model="plain")
    refused(tmp_path, "mask: expected the mask", mask=random_mask(build("dropout")))
    (tmp_path / "mask.safetensors").unlink()
    random_mask(build("dropout")).save(tmp_path / "mask.safetensors")
    refused(tmp_path, "mask digest")


def test_its_own_mask_and_a_list_of_betas_are_not_another_run(tmp_path):
    recipe = RECIPES["adamw"].replace(betas=[0.8, 0.9])
    expected = whole_run(recipe, "own")
    run(recipe, "own", tmp_path, 4)
    mask = sf.SaliencyMask.load(tmp_path / "mask.safetensors")
    assert same(bits(run(recipe, "own", tmp_path, mask=mask).model), expected)


@pytest.mark.checklist("C5")
def test_corrupted_checkpoints_are_refused(tmp_path):
    run(RECIPES["official"], "own", tmp_path, 4)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(tmp_path, "checkpoint: expected a checkpoint of unlearn")
    torch.save(build().state_dict(), path)
    refused(tmp_path, "checkpoint: expected a checkpoint of unlearn")
    path.write_bytes(whole)
    run(RECIPES["official"], "own", tmp_path)


class Mode(enum.Enum):
    ONE = 1


class Extra(torch.nn.Linear):
    extra = torch.ones(1)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize(
    "extra",
    [np.float64(3.0), {"mode": Mode.ONE}, [io.BytesIO(b"scales")], {Mode.ONE: 1}],
    ids=["numpy", "enum", "bytes", "key"],
)
def test_what_could_never_be_read_is_never_written(extra, tmp_path):
    """Before the run begins; or, where it comes up later, before the file is touched."""
    x, y = data(8)
    model = Extra(x.shape[1], 4)
    everything = sf.SaliencyMask.from_bool(
        {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    )
    start = bits(model)
    settings = {
        "recipe": sf.Recipe.paper(cycles=4, retain_steps=1),
        "mask": everything,
        "checkpoint_every": 1,
    }

    def run(folder, **more):
        return sf.unlearn(
            model,
            retain=[(x, y)],
            forget=[(x, y)],
            checkpoint=tmp_path / folder,
            **settings,
            **more,
        )

    model.extra = extra
    with pytest.raises(
        ValueError, match=r"checkpoint: expected values that .* found .* at .*'_extra_state'"
    ):
        run("never")
    assert all(torch.equal(model.state_dict()[n], start[n]) for n in ("weight", "bias"))
    assert not (tmp_path / "never").exists()
    del model.extra
    with pytest.raises(ValueError, match="checkpoint: expected values"):
        run("late", on_cycle=lambda cycle, m: cycle == 2 and setattr(m, "extra", extra))
    assert torch.load(tmp_path / "late" / "checkpoint.pt", weights_only=True)["position"] == 3


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    run(RECIPES["official"], "own", tmp_path, 4)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved.pop("format")
    torch.save(saved, tmp_path / "checkpoint.pt")
    refused(tmp_path, "checkpoint: expected format 2, found 1")


@pytest.mark.checklist("C5")
@pytest.mark.parametrize("module", ["torch.save", "os.replace"])
def test_dying_while_writing_leaves_the_previous_checkpoint(module, tmp_path, monkeypatch):
    recipe, expected = RECIPES["official"], whole_run(RECIPES["official"], "own")
    run(recipe, "own", tmp_path, 4)
    whole = (tmp_path / "checkpoint.pt").read_bytes()

    def dies(state, file, *args):
        if module == "torch.save":
            file.write(b"half a")
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(module, dies)
        with pytest.raises(OSError, match="power cut"):
            run(recipe, "own", tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "mask.safetensors"]
    assert same(bits(run(recipe, "own", tmp_path).model), expected)


def test_checkpoint_every_counts_steps(tmp_path, monkeypatch):
    positions = []
    monkeypatch.setattr(
        sf.runs.run, "save_whole", lambda state, path: positions.append(state["position"])
    )
    retain, forget = loaders("own")
    sf.unlearn(
        build(),
        retain=retain,
        forget=forget,
        recipe=RECIPES["paper"],
        checkpoint=tmp_path,
        checkpoint_every=4,
    )
    assert positions == [4, 8, 9]
