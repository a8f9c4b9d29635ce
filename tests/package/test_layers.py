"""The layering rules of the design, read from the sources."""

import ast
import re
import sys
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "sfron_fast"
LONGEST = 300
TOO_LONG: dict[str, str] = {}  # path: why it may be longer

# room -> the rooms it may import; every row names only rooms above it, so there is no circle
ROOMS = {
    "errors": set(),
    "files": {"errors"},
    "version": set(),
    "data": {"errors"},
    "ops": {"errors"},
    "distributed": {"errors", "data", "ops"},
    "functional": {"ops"},
    "heads": {"errors", "ops"},
    "models": {"errors", "data", "distributed"},
    "losses": {"errors", "ops"},
    "weights": {"errors", "ops"},
    "tasks": {"errors", "data", "ops", "heads", "losses", "weights"},
    "evaluation": {"errors", "files", "data", "distributed", "models", "ops", "tasks"},
    "saliency": {
        "errors",
        "files",
        "version",
        "data",
        "distributed",
        "models",
        "ops",
        "functional",
        "tasks",
    },
    "optim": {"errors", "distributed", "models", "ops", "functional", "saliency"},
    "methods": {
        "errors",
        "data",
        "distributed",
        "models",
        "losses",
        "evaluation",
        "saliency",
        "optim",
        "tasks",
        "weights",
    },
    "runs": {
        "errors",
        "files",
        "data",
        "distributed",
        "models",
        "evaluation",
        "saliency",
        "optim",
        "losses",
        "tasks",
        "weights",
    },
    "integrations": {
        "errors",
        "files",
        "version",
        "heads",
        "losses",
        "ops",
        "evaluation",
        "saliency",
        "optim",
        "methods",
        "runs",
        "tasks",
    },
    "demo": {"data", "evaluation", "saliency", "methods", "runs"},
    "__init__": {
        "version",
        "data",
        "heads",
        "losses",
        "evaluation",
        "saliency",
        "optim",
        "methods",
        "runs",
        "tasks",
        "weights",
    },
    "__main__": {"", "ops", "demo", "integrations"},
}
FLOORS = 8
# only in integrations/
FRAMEWORKS = {"transformers", "accelerate", "pytorch_lightning", "lightning", "peft", "diffusers"}
# only inside functions
OPTIONAL = {"triton", "sklearn", "matplotlib", "tqdm", "torchvision", *FRAMEWORKS}
OPS = sorted(p.name for p in (ROOT / "csrc").iterdir() if list(p.glob("*_op.cpp")))


def imports(path: Path, tree: ast.AST | None = None) -> tuple[set[str], set[str]]:
    """Modules of this package, dotted, and top-level names of foreign ones."""
    own, foreign = set(), set()
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(parse(path) if tree is None else tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                start = [*package[: len(package) + 1 - node.level], *module]
            elif module[0] == "sfron_fast":
                start = module[1:]
            else:
                foreign.add(module[0])
                continue
            own |= {".".join([*start, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                (own if top == "sfron_fast" else foreign).add(rest if top == "sfron_fast" else top)
    return own, foreign


def room(module: str) -> str:
    """The room that a dotted name of the package lies in; the package itself, for its own names, is
    "".
    """
    first = module.split(".")[0]
    return first if first in ROOMS else ""


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def trespasses(path: Path, tree: ast.AST | None = None) -> set[str]:
    """What a file imports of rooms that its own may not enter."""
    own, _ = imports(path, tree)
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return {name for name in own if room(name) not in {here, *ROOMS[here]}}


def test_every_room_is_in_the_table():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders | {path.stem for path in PACKAGE.glob("*.py")} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_imports_run_one_way(name):
    files = sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / f"{name}.py"]
    for path in files:
        assert not trespasses(path), path


def test_a_planted_import_is_found():
    path = PACKAGE / "ops" / "lists.py"
    for line in (
        "from ..optim.base import SFRonOptimizer",
        "from .. import saliency",
        "import sfron_fast.runs.run",
        "def f():\n    from sfron_fast.losses import adaptive_mse",
    ):
        assert trespasses(path, ast.parse(line)), line
    assert not trespasses(path, ast.parse("from ..errors import require\nfrom . import native"))


def test_floors():
    floors = {}
    for name, below in ROOMS.items():
        # KeyError: a circle
        floors[name] = 1 + max((floors[other] for other in below if other), default=0)
    assert max(floor for name, floor in floors.items() if not name.startswith("__")) <= FLOORS


def test_no_circle_between_modules():
    """Imports at the top of files; one inside a function runs later."""
    edges = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        top = ast.Module(
            [n for n in parse(path).body if isinstance(n, ast.Import | ast.ImportFrom)], []
        )
        edges[name] = imports(path, top)[0]
    known = set(edges)
    edges = {
        n: {t if t in known else t.rpartition(".")[0] for t in found} - {n}
        for n, found in edges.items()
    }
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, [*trail, name]
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, [*trail, name])
            done.add(name)

    for name in edges:
        visit(name, [])


def test_ops_know_torch_alone():
    """No optimizer of torch's either; and what finds the kernels needs no torch."""
    free = set(sys.stdlib_module_names) | {"torch"}
    for path in sorted((PACKAGE / "ops").rglob("*.py")):
        _, foreign = imports(path)
        more = {"triton"} if path.parent.name == "triton" else set()
        assert foreign <= (free - {"torch"} if path.name == "native.py" else free | more), (
            path,
            foreign - free,
        )
        assert "torch.optim" not in re.sub(r'""".*?"""', "", path.read_text(), flags=re.S), (
            path.name
        )


def test_optional_packages_are_imported_late():
    files = sorted(
        path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("triton", "integrations")
    )
    assert len(files) > 5
    for path in files:
        top = ast.Module(
            [n for n in parse(path).body if isinstance(n, ast.Import | ast.ImportFrom)], []
        )
        assert not imports(path, top)[1] & OPTIONAL, path


def test_nothing_needs_a_framework():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name != "integrations":
            own, foreign = imports(path)
            runs_it = path.name == "__main__.py"  # the command
            assert runs_it or "integrations" not in {room(name) for name in own}, path
            assert not foreign & FRAMEWORKS, path


def test_files_are_short():
    files = sorted([*PACKAGE.rglob("*.py"), ROOT / "setup.py"])
    assert len(files) > 10
    long = {}
    for path in files:
        lines = len(path.read_text().splitlines()) if path.exists() else 0
        if lines > LONGEST:
            long[str(path.relative_to(ROOT))] = lines
    assert set(long) <= set(TOO_LONG), long


def test_every_op_has_an_example_by_hand():
    """The losses a gradient check as well; what all ops show is in tests/ops/test_every_op.py."""
    for op in OPS:
        tree = parse(ROOT / "tests" / "ops" / f"test_{op}.py")
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        wanted = {"test_hand_example"}
        if op.startswith(("adaptive", "soft")):
            wanted |= {"test_gradcheck", "test_masked_out_is_untouched"}
        assert wanted <= names, (op, wanted - names)
