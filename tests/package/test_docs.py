"""README and docs: blocks run, links and citations lead somewhere, the README stays short."""

import re
from importlib.util import find_spec
from itertools import cycle, pairwise
from types import SimpleNamespace

import pages
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import CLASSES, FEATURES, build, data, loader, random_mask
from paths import ROOT
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import sfron_fast as sf
from sfron_fast import heads
from sfron_fast.ops import registry

# they need the frameworks
ELSEWHERE = dict.fromkeys(
    ("docs/frameworks.md", "docs/language-models.md"), "tests/frameworks/test_readme.py"
) | {"docs/diffusion.md": "tests/frameworks/test_diffusers.py"}
RUN_HERE = [b for page in pages.PAGES if page not in ELSEWHERE for b in pages.blocks(page)]
SAMPLES = 16


class LanguageModel(nn.Module):
    """Of 12 tokens; its output has logits [samples, tokens, 12]."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)

    def forward(self, ids):
        return SimpleNamespace(logits=self.head(self.embedding(ids)))


def names(heading):
    """What the page takes for given: a small model, its data, an optimizer within no cycle."""
    torch.manual_seed(0)
    forget, retain, holdout = (loader(SAMPLES, 8, seed=seed) for seed in (1, 2, 3))
    language = heading in ("Language models", "Losses from hidden states")
    model = LanguageModel() if language else build()
    mask = random_mask(model)
    opt = sf.SFRonSGD(
        model.named_parameters(), lr=0.01, saliency=mask, max_norm=1.0, retain_steps=2
    )
    x, y = data(SAMPLES)
    given = {
        "sf": sf,
        "F": F,
        "torch": torch,
        "dist": dist,
        "model": model,
        "mask": mask,
        "opt": opt,
        "scaler": torch.amp.GradScaler("cpu", init_scale=64.0),
        "forget_loader": forget,
        "retain_loader": retain,
        "holdout_loader": holdout,
        "kept_loader": holdout,
        "next_forget_loader": loader(SAMPLES, 8, seed=4),
        "remaining_loader": loader(SAMPLES, 8, seed=2),
        "forget_set": TensorDataset(*data(256, seed=1)),
        "retain_set": TensorDataset(*data(256, seed=2)),
        "retain_batches": cycle(retain),
        "next_retain_batches": lambda count: [next(given["retain_batches"]) for _ in range(count)],
        "forget_weight": 0.5,
        "x": x,
        "y": y,
        "xf": x,
        "yf": y,
        "ids": torch.randint(12, (3, 7)),
        "params": [p.detach().clone() for p in model.parameters()],
        "grads": [torch.randn_like(p) for p in model.parameters()],
        "masks": [mask[name] for name, _ in model.named_parameters()],
    }
    sets = {"forget": forget, "retain": retain, "holdout": holdout}
    given |= {"sets": sets, "trained": build(seed=1), "retrained": build(seed=2)}
    if heading.startswith("4."):  # what comes back
        given |= {"one_half": forget, "other_half": forget}
    if heading in ("Make the two sets from one", "Forget again, later"):
        given |= {"training_set": given["retain_set"], "numbers": range(16)}
        given |= {"DataLoader": DataLoader, "Subset": Subset, "first_loader": forget}
        given["requests"] = set(range(16)), set(range(16, 32))
    if heading == "A loop of your own":
        given["forget_weight"] = lambda number: 1.0 - number / 300
    if heading == "One label per sample":
        given |= {"logits": model(x) * 1.0, "labels": y}
    if heading == "Losses from hidden states":
        ids, head = given["ids"], model.head
        given |= {"hidden": model.embedding(ids), "head": head, "holdout_loss": 9.0}
        given["labels"] = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
        given["samples"] = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    if heading == "Tasks":
        for side, batches in (("forget", forget), ("retain", retain)):
            given[f"{side}_dicts"] = [{"x": x, "y": y.float()} for x, y in batches]
    return given


@pytest.fixture
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("block", RUN_HERE, ids=lambda b: f"{b.page}:{b.line}")
def test_every_block_runs(block, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)  # for a block that writes a checkpoint
    official = sf.Recipe.official
    few = staticmethod(lambda **settings: official(**{"cycles": 10, **settings}))
    monkeypatch.setattr(sf.Recipe, "official", few)  # its 300 cycles take a while
    if block.page == "docs/many-gpus.md":
        request.getfixturevalue("_one_rank")
    given = names(block.heading)
    before = [p.detach().clone() for p in (*given["model"].parameters(), *given["params"])]
    pages.run(block, given)
    if re.search(r"\bstep_?\(|\bunlearn\(", block.code) and "deepcopy" not in block.code:
        after = [*given["model"].parameters(), *given["params"]]
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert all(p.isfinite().all() for p in after)


def test_what_runs_elsewhere_does():
    for page, test in ELSEWHERE.items():
        assert pages.blocks(page)
        assert page in pages.text(test)


def test_the_mask_in_one_statement_has_the_bits_of_three():
    three, one = (b for b in pages.blocks("docs/guide.md") if b.heading == "Masks")
    given = names("Masks")
    first, second = (pages.run(block, dict(given))["mask"] for block in (three, one))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert given["model"][0].in_features == FEATURES
    assert given["model"][-1].out_features == CLASSES


# --- commands -------------------------------------------------------------------------------------


COMMANDS = [
    (block.page, line.split(" #")[0].split())
    for page in (*pages.PAGES, "CONTRIBUTING.md", "examples/README.md")
    for block in pages.blocks(page, "bash")
    for line in block.code.splitlines()
]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: str(value))
def test_commands_exist(page, words):
    """Targets of the Makefile, modules and their options; pip's own words are not looked at."""
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", pages.text("Makefile"), re.M), words
    elif words[0] in ("python", "torchrun"):
        module = words[words.index("-m") + 1]
        path = ROOT / module.replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        source = path.read_text()
        if module == "sfron_fast":
            source += (ROOT / "sfron_fast" / "integrations" / "command.py").read_text()
        after = words[words.index(module) + 1 :]
        for option in (word for word in after if word.startswith("--")):
            assert f'"{option}"' in source, (page, option)
    else:
        assert words[:2] == ["pip", "install"], words


def test_other_blocks_are_none():
    kinds = {block.language for page in pages.PAGES for block in pages.blocks(page, None)}
    assert kinds == {"python", "bash", "text"}


# --- the README's form, links, figures ------------------------------------------------------------


def test_the_readme_is_short():
    lines = pages.text("README.md").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


def anchors(page):
    """As GitHub makes them of headings."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


OTHERS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("examples", "benchmarks/results", "docs/reference")
    for path in (ROOT / folder).rglob("*.md")
)
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


@pytest.mark.parametrize("page", [*pages.PAGES, *PROJECT, *OTHERS])
def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", pages.text(page), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_changelog_names_modules_that_exist():
    """What is under "now" in its table of modules; `.name` is beside the one before."""
    rows = re.findall(r"^\| `sfron_fast\..*\| (.*) \|$", pages.text("CHANGELOG.md"), re.M)
    assert len(rows) > 5
    for row in rows:
        beside = ""
        for name in re.findall(r"`([\w.]+)`", row):
            if name.startswith("."):
                name = beside + name
            beside = name.rpartition(".")[0]
            assert find_spec(name), name


SOURCES = [
    path
    for folder in ("sfron_fast", "csrc", "benchmarks", "examples", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu")
]


def test_sources_cite_pages_that_exist():
    """`docs/<page>.md`, and numbers of equations by their page, not the README."""
    numbers = set(re.findall(r"^\| (\d+) \|", pages.text("docs/equations.md"), re.M))
    cited = set()
    for path in SOURCES:
        text = path.read_text()
        for page in re.findall(r"\bdocs/[\w-]+\.md", text):
            assert page in pages.PAGES, (path, page)
        for first, last in re.findall(r"docs/equations\.md, (\d+)(?: (?:and|to) (\d+))?", text):
            cited |= {first, last} - {""}
        assert not re.search(r"README,? (?:equation|section)|README, [\"']", text), path
    assert len(cited) > 4
    assert cited <= numbers


def test_every_page_is_reached_in_order():
    listed = re.findall(r"^\d+\. \[[^\]]+\]\((\S+)\)", pages.text("README.md"), re.M)
    assert sorted(listed) == sorted(pages.PAGES[1:])
    for page, after in pairwise(listed):
        last = pages.text(page).rstrip().splitlines()[-1]
        assert re.fullmatch(rf"Next: \[[^\]]+\]\({after.removeprefix('docs/')}\)", last), page


def test_the_readmes_figures_are_those_of_the_results():
    measured = pages.section("README.md", "## Measured")
    rows = [line for line in measured.splitlines() if re.search(r"\| [\d.]+ \|", line)]
    assert len(rows) == 10
    results = pages.text("docs/results.md")
    for row in rows:
        assert row in results, row
    cycle = re.search(r"cycle takes ([\d.]+) ms, ([\d.]+) in the authors' style", measured)
    for cycle_ms in cycle.groups():
        assert f"| {cycle_ms} |" in results


def test_the_tables_of_kernels_name_every_op():
    ops = {
        name
        for name in registry.SCHEMAS
        if "_backward" not in name and name != "adaptive_cross_entropy_scale_"
    } | {name for name in heads.__all__ if name.startswith("linear")}
    tables = (
        pages.section("README.md", "## Kernels"),
        pages.text("docs/kernels.md").split("\n## ")[0],
    )
    for table in tables:
        rows = re.findall(r"^\| (`.*?`) \|", table, re.M)
        assert {name for row in rows for name in re.findall(r"\w+", row)} == ops
