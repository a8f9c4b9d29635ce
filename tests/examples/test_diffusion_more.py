"""The transformer, the style and CIFAR-10: each example runs, small, and holds its gate."""

import json
import pickle

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def few(monkeypatch):
    """Two cycles, one draw, two steps of sampling, a hundred images."""
    import sfron_fast as sf
    from examples.diffusion import concept, ddpm, digits

    for name in ("diffusion", "diffusion_ascent"):
        whole = getattr(sf.Recipe, name)
        less = staticmethod(lambda whole=whole, **s: whole(**{"cycles": 2, "draws": 1, **s}))
        monkeypatch.setattr(sf.Recipe, name, less)
    images = digits.Digits(*(part[:100] for part in digits.load()))
    for module in (ddpm, concept):
        monkeypatch.setattr(module, "SAMPLING", {"steps": 2, "clamp": 1.0})
        monkeypatch.setattr(module, "load", lambda: images)
    monkeypatch.setattr(ddpm, "PER_CLASS", 4)
    monkeypatch.setattr(concept, "PER_PROMPT", 4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_the_transformer(tmp_path, monkeypatch, capsys):
    from examples.diffusion import dit

    few(monkeypatch)
    out, results = tmp_path / "models", tmp_path / "results"
    dit.main(["--scale", "0.002", "--out", str(out), "--results", str(results)])
    page = (results / "dit.md").read_text()
    for text in (capsys.readouterr().out, page):
        assert "the base model misses: FA" in text
    arms = {row["arm"] for row in json.loads((out / "results.json").read_text())}
    assert {"base", "Retrain", "SFR-on", "ESD", "DiMUM", "SalUn"} <= arms
    assert all(f"| {arm} |" in page for arm in arms)
    assert (results / "dit.png").exists()


def test_verdicts_on_the_transformer():
    from examples.diffusion import dit

    good = {"guidance": 1.0, "fa": 100.0, "ra": 99.0, "distance": 1.0}
    gone = {**good, "fa": 0.0}
    arms = {"base": good, "Retrain": {**gone, "distance": 0.8}}
    arms |= {"SFR-on": {**gone, "distance": 0.9}, "SFR-on, ascent": gone}
    rows = [{"arm": name, **row} for name, row in arms.items()]
    rows += [{**row, "guidance": 0.0, "fa": 50.0, "ra": 0.0} for row in rows]
    assert dit.verdicts(rows) == [
        "the base model holds its gate",
        "SFR-on holds its gate",
        "SFR-on, ascent misses: FD 1 > 0.92",
    ]
    worse = {"fa": 96.0, "ra": 97.0, "distance": 1.2}
    assert dit.missed(worse, dit.BASE) == "FA 96 < 97, RA 97 < 98, FD 1.2 > 1.1"


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_the_style(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    from examples.diffusion import concept

    few(monkeypatch)
    out, results = tmp_path / "models", tmp_path / "results"
    arguments = ["--steps", "3", "--out", str(out), "--results", str(results)]
    with pytest.raises(SystemExit, match=r"misses its gate, RA .* < 97.0: nothing was unlearned"):
        concept.main(arguments)
    assert not results.exists()
    monkeypatch.setattr(concept, "LEAST_RA", 0.0)
    concept.main(arguments)
    page = (results / "concept.md").read_text()
    arms = (
        "base",
        "relabel, masked",
        "relabel, unmasked",
        "relabel, attn2 alone",
        "ESD and retain",
    )
    assert all(f"| {arm} |" in page for arm in arms)
    assert (results / "concept.png").exists()
    monkeypatch.setattr(concept, "GRID", (1e-3,))
    concept.main([*arguments, "--choose"])
    chosen = capsys.readouterr().out.splitlines()[-1]
    assert set(eval(chosen)) <= set(arms[1:])


def test_prompts_of_the_style():
    pytest.importorskip("diffusers")
    from examples.diffusion import concept

    assert torch.equal(concept.plain(concept.PROMPTS[10:]), concept.PROMPTS[:10])
    assert torch.equal(concept.plain(concept.PROMPTS[:10]), concept.PROMPTS[:10])
    assert concept.PROMPTS.flatten(1).unique(dim=0).shape == (20, 2 * concept.WIDTH)


def test_cross_attention_alone_moves(monkeypatch):
    pytest.importorskip("diffusers")
    import sfron_fast as sf
    from examples.diffusion import concept, digits

    few(monkeypatch)
    data = concept.styled(digits.Digits(*(part[:20] for part in digits.load())))
    torch.manual_seed(0)
    model = concept.network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    concept.arms(data, 0, model)[0]["relabel, attn2 alone"](model, 1e-3)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("attn2" in name for name in moved)
    assert all(p.requires_grad for p in model.parameters())
    assert sf.Recipe.diffusion().cycles == 2


def archive(folder, count=60):
    """CIFAR-10's files, of noise."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = torch.randint(256, (count, 3072), generator=generator, dtype=torch.uint8)
        labels = [i % 10 for i in range(count)]
        content = {b"data": data.numpy(), b"labels": labels}
        (folder / name).write_bytes(pickle.dumps(content))
    return folder


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_cifar10_reports_only_behind_its_gate(tmp_path, monkeypatch, capsys):
    from examples.diffusion import cifar10

    few(monkeypatch)
    folder = archive(tmp_path / "cifar-10-batches-py")
    sampling = {"steps": 2, "clamp": 1.0}
    small = cifar10.SCALES["small"]._replace(training=300, per_class=3, sampling=sampling)
    monkeypatch.setitem(cifar10.SCALES, "small", small)
    arguments = ["--data", str(folder), "--steps", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="nothing is reported: the base model misses its gate"):
        cifar10.main(arguments)
    assert "FA" not in capsys.readouterr().out
    assert (tmp_path / "cifar10_small_2_0.png").exists()
    monkeypatch.setattr(cifar10, "LEAST", 0.0)
    monkeypatch.setattr(cifar10, "MOST_FD", float("inf"))
    cifar10.main(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("automobile forgotten")
    assert all(f"| {arm} |" in printed for arm in ("base", "SFR-on", "SFR-on, no mask"))


def test_cifar10s_images(tmp_path):
    from examples.diffusion import cifar10

    folder = archive(tmp_path / "cifar-10-batches-py")
    data = cifar10.load(folder, cifar10.SCALES["small"]._replace(training=None))
    assert data.images.shape == (90, 3, 16, 16)
    assert data.labels.unique().tolist() == [0, 1, 2]
    assert data.images.abs().max() <= 1.0
    whole = cifar10.load(folder, cifar10.SCALES["full"])
    assert whole.images.shape == (300, 3, 32, 32)
    raw = pickle.loads((folder / "data_batch_1").read_bytes())[b"data"][:, 0]
    first = torch.tensor(raw).float().div(127.5).sub(1.0).sort().values
    everything = whole.images[:, 0, 0, 0].sort().values
    assert torch.isin(first, everything).all()
