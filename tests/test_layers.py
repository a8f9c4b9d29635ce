"""The layering rules of the design, read from the sources."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, NATIVE = ROOT / "sfron_fast", ROOT / "csrc"
LONGEST = 300
TOO_LONG = {  # path: why it may be longer; no more wanted
    "sfron_fast/reference.py": "every formula in one place, in the README's order; code of a dozen short functions",
}

# module -> what of the package it may import; standard library and torch are free to all but _native
ALLOWED = {
    "_native": set(),
    "layout": set(),
    "flat": {"_native", "layout"},
    "reference": {"flat"},
    "shards": {"reference"},
    "checks": {"flat"},
    "row_checks": {"checks"},
    "differentiable": {"reference", "row_checks"},
    "ops": {"_native", "checks", "differentiable", "reference", "row_checks", "triton"},
    "records": {"_native"},
    "functional": {"ops", "records", "reference", "checks", "layout", "shards"},
    "in_place": {"differentiable", "ops", "checks"},
    "losses": {"differentiable", "in_place", "ops", "reference", "checks", "layout"},
}
ABOVE = {"optim", "cycle", "unlearning", "recipes", "saliency", "fisher", "losses", "in_place", "evaluation",
         "functional"}  # fmt: skip
FRAMEWORKS = {"transformers", "accelerate", "pytorch_lightning", "lightning", "peft"}  # only in integrations/
OPTIONAL = {"triton", "sklearn", "matplotlib", "tqdm", "torchvision", *FRAMEWORKS}  # only inside functions
OPS = ("masked_grad_norm", "sgd_step", "adamw_step", "interpolate", "fisher_accumulate", "saliency_mask",
       "adaptive_cross_entropy", "adaptive_mse", "soft_target_kl")  # fmt: skip
TESTED = (*OPS, "fisher_saliency_mask")  # lives beside saliency_mask


def imports(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Modules of this package and top-level names of foreign ones."""
    own, foreign = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own |= {node.module.split(".")[1]} if node.module.startswith("sfron_fast.") else set()
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            own |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sfron_fast.")}
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return own, foreign - {"sfron_fast"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def includes(path: Path) -> tuple[set[str], set[str]]:
    """What a C++ file includes with quotes, and with angle brackets."""
    text = path.read_text()
    return set(re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.M)), set(
        re.findall(r"^\s*#\s*include\s*<([^>]+)>", text, re.M)
    )


def native_files(*suffixes: str) -> list[Path]:
    files = sorted(path for path in NATIVE.rglob("*") if path.suffix in suffixes)
    assert files or not NATIVE.exists(), f"no {suffixes} found: the test would say nothing"
    return files


needs_native = pytest.mark.skipif(not NATIVE.exists(), reason="no csrc/")


@pytest.mark.parametrize("module", ALLOWED)
def test_python_layers(module):
    own, foreign = imports(parse(PACKAGE / f"{module}.py"))
    assert own <= ALLOWED[module], own - ALLOWED[module]
    free = set(sys.stdlib_module_names) | (set() if module == "_native" else {"torch"})
    assert foreign <= free, foreign - free


def test_nothing_below_functional_knows_an_optimizer():
    lower = [PACKAGE / f"{name}.py" for name in ("reference", "checks", "row_checks", "ops", "_native")]
    lower += sorted((PACKAGE / "triton").glob("*.py"))
    for path in lower:
        own, _ = imports(parse(path))
        assert not own & ABOVE, (path.name, own & ABOVE)
        assert "torch.optim" not in re.sub(r'""".*?"""', "", path.read_text(), flags=re.S), path.name


def test_optional_packages_are_imported_late():
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("triton", "integrations"))
    assert len(files) > 5
    for path in files:
        top = ast.Module([n for n in parse(path).body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert not imports(top)[1] & OPTIONAL, path


def test_nothing_needs_a_framework():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name != "integrations":
            own, foreign = imports(parse(path))
            assert "integrations" not in own, path
            assert not foreign & FRAMEWORKS, path


@needs_native
def test_only_op_files_check_h_and_names_h_know_torch():
    entitled = 0
    for path in native_files(".cpp", ".h", ".cu", ".cuh"):
        quoted, angled = includes(path)
        knows_torch = any(re.match(r"(torch|ATen|c10|aten)/", name) for name in quoted | angled)
        headers = (NATIVE / "common" / "check.h", NATIVE / "common" / "names.h")
        may = path.name.endswith("_op.cpp") or path in (*headers, NATIVE / "module.cpp")
        # headers that include check.h belong to its side and may be included by op files only
        reaches = "common/check.h" in quoted
        entitled += knows_torch or reaches
        assert may or not knows_torch, path
        assert may or not reaches or (path.parent.name == "common" and path.suffix == ".h"), path
        assert path == NATIVE / "module.cpp" or "Python.h" not in angled, path
    assert entitled > 1


@needs_native
def test_kernels_and_formulas_are_free_of_torch():
    """<op>.h and the kernels see, directly or through other headers, only standard, CUDA and our torch-free ones."""

    def reached(path: Path, seen: set[Path]) -> set[Path]:
        for name in includes(path)[0]:
            header = NATIVE / name if (NATIVE / name).exists() else path.parent / name
            assert header.exists(), (path, name)
            if header not in seen:
                seen.add(header)
                reached(header, seen)
        return seen

    checked = 0
    for folder in (NATIVE / op for op in OPS):
        for path in sorted(folder.glob("*")):
            if path.suffix not in (".h", ".cpp", ".cu", ".cuh") or path.name.endswith("_op.cpp"):
                continue
            assert NATIVE / "common" / "check.h" not in reached(path, set()), path
            if path.name == f"{folder.name}.h":
                checked += 1
                quoted, angled = includes(path)
                assert all(name.startswith("common/") for name in quoted), (path, quoted)
                assert all(re.fullmatch(r"[a-z_]+", name) for name in angled), (path, angled)
    assert checked > 0


@needs_native
def test_each_op_has_its_files():
    """Folders without any file yet are an op that runs on its reference."""
    folders = [NATIVE / op for op in OPS if any((NATIVE / op).glob("*"))]
    assert folders
    for folder in folders:
        for name in (f"{folder.name}.h", f"{folder.name}_cpu.cpp", f"{folder.name}_op.cpp"):
            assert (folder / name).exists(), folder / name
    assert {path.name for path in NATIVE.iterdir() if path.is_dir()} <= {"common", *OPS}


def test_files_are_short():
    files = sorted([*PACKAGE.rglob("*.py"), *native_files(".cpp", ".h", ".cu", ".cuh"), ROOT / "setup.py"])
    assert len(files) > 10
    long = {}
    for path in files:
        lines = len(path.read_text().splitlines()) if path.exists() else 0
        if lines > LONGEST:
            long[str(path.relative_to(ROOT))] = lines
    assert set(long) <= set(TOO_LONG), long


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no setup.py")
def test_flags_keep_ieee_arithmetic():
    text = (ROOT / "setup.py").read_text()
    for flag in ("fast-math", "fast_math", "Ofast", "unsafe-math", "associative-math", "reciprocal-math", "fmad=true",
                 "finite-math", "march=", "fp:fast", "ftz=true", "prec-div=false", "prec-sqrt=false"):  # fmt: skip
        assert flag not in text, flag
    for flag in ("-ffp-contract=off", "-fmad=false"):
        assert flag in text, flag
    for path in native_files(".cpp", ".h", ".cu", ".cuh"):
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"\b__f(?:ma|mul|add|div|sqrt)\w*|\bfmaf?\(|#pragma\s+STDC|optimize\(", code), path


def test_every_op_has_the_same_tests():
    """A missing test shows: every test_<op>.py has the names below, the losses a gradient check as well."""
    wanted = {"test_matches_reference", "test_hand_example", "test_masked_out_is_untouched", "test_opcheck",
              "test_compile", "test_deterministic", "test_empty_odd_and_large", "test_rejects",
              "test_version_counter"}  # fmt: skip
    for op in TESTED:
        tree = parse(ROOT / "tests" / f"test_{op}.py")
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        more = {"test_gradcheck"} if op.startswith(("adaptive", "soft")) else set()
        assert wanted | more <= names, (op, (wanted | more) - names)
