"""What the site adds to the pages: reference, menu, tests that hold the field's bugs, workflow."""

import ast
import re
from pkgutil import resolve_name

import pages
import pytest
from paths import ROOT

import sfron_fast as sf
from sfron_fast import methods

REFERENCE = sorted(f"docs/reference/{path.name}" for path in (ROOT / "docs/reference").glob("*.md"))
SHOWN = [name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", pages.text(page), re.M)]
FRAMEWORKS = ("sfron_fast.integrations.transformers", "sfron_fast.integrations.diffusers")


@pytest.mark.parametrize("name", sorted({*SHOWN} - {*FRAMEWORKS}))
def test_what_the_reference_shows_is_there(name):
    assert resolve_name(name).__doc__


def test_the_reference_shows_every_public_name():
    """A method under the name of its file, which hides it from the generator otherwise."""
    public = {f"sfron_fast.{name}" for name in sf.__all__ if name != "__version__"}
    files = {path.stem for path in (ROOT / "sfron_fast/methods").glob("*.py")}
    for name in {*methods.__all__} - {*sf.__all__}:
        public.add(f"sfron_fast.methods.{name}" + (f".{name}" if name in files else ""))
    missing = public - {*SHOWN}
    assert not missing, f"add a line '::: NAME' to a page of docs/reference for {sorted(missing)}"
    assert len(SHOWN) == len({*SHOWN})


def test_the_menu_lists_every_page():
    """``mkdocs build --strict`` says so too, but not in ``make test``."""
    menu = re.findall(r"[\w/.-]+\.md$", pages.text("mkdocs.yml"), re.M)
    pages_there = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    project = {path.name for path in ROOT.glob("*.md")}
    assert {*menu} == pages_there | project | {"examples/README.md"}


HELD = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", pages.text("docs/field-bugs.md"))


@pytest.mark.parametrize(("file", "name"), HELD, ids=lambda value: value.rpartition("/")[2])
def test_each_bug_of_the_field_has_its_test(file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_bug_of_the_field_names_one():
    bugs = re.findall(r"^- \*\*", pages.text("docs/field-bugs.md"), re.M)
    assert len(bugs) == len(HELD) > 20


def test_the_version_stands_in_one_place():
    assert 'dynamic = ["version"]' in pages.text("pyproject.toml")
    for file in ("pyproject.toml", "CITATION.cff", "setup.py", "mkdocs.yml"):
        assert not re.search(r"^version\b.*\d\.\d+\.\d", pages.text(file), re.M), file
    assert re.fullmatch(r"\d+\.\d+\.\d+", sf.__version__)


def test_the_workflow_runs_what_developers_run():
    commands = re.findall(r"^\s+- run: (.+)$", pages.text(".github/workflows/ci.yml"), re.M)
    assert len(commands) > 4
    for command in commands:
        program, target, *_ = command.split()
        assert program == "make"
        assert re.search(rf"^{target}:", pages.text("Makefile"), re.M), target
