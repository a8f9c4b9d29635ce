"""The drop-in checklist: every line has a test marked ``@pytest.mark.checklist``; counted here.

Tiers: M must hold, S should (or NOTES says why not), L may fail, with a clear message.
"""

import ast
import re
from pathlib import Path

import pytest
from paths import TESTS

LINES = {
    # the contract of an optimizer
    "A1": ("M", "an Optimizer that every scheduler takes; a new lr counts at the next step"),
    "A2": ("M", "overridden methods have the base class's parameters"),
    "A3": ("M", "a closure runs once, with grad; its gradients are the ones used"),
    "A4": ("M", "without mask, weights and slow step: torch's SGD and AdamW over 50 steps"),
    "A5": ("M", "hooks fire once per public step"),
    "A6": ("M", "a later group gets the defaults, and a mask or an explicit no"),
    "A7": ("M", "no gradient: no state, no change"),
    "A8": ("M", "pickle, deepcopy, torch.save; older pickles"),
    "A9": ("S", "foreach, fused, capturable, differentiable, maximize as torch means them"),
    "A10": ("M", "made from parameters, groups or named parameters"),
    "A11": ("M", "bad settings: ValueError with the name"),
    "A12": ("S", "sparse and complex refused; odd shapes, layouts, ties, mixed groups"),
    "A13": ("S", "torch's generic optimizer tests"),
    # numerics and meaning
    "B1": ("M", "gradient semantics are the authors' update"),
    "B2": ("M", "update semantics keep masked weights' bits"),
    "B3": ("M", "shared and separate moments"),
    "B4": ("M", "mask, then clip, then step"),
    "B5": ("M", "a step with zero gradients and lr 0 moves no weight and no phase"),
    "B6": ("M", "a slow step of 1 costs nothing; others match the reference"),
    "B7": ("M", "same bits again, whatever the order, chunks and groups"),
    "B8": ("S", "backends agree"),
    "B9": ("S", "low precision: fp32 arithmetic; updates that round to nothing are told"),
    "B10": ("S", "a non-finite forget step is skipped and counted"),
    # state and checkpoints
    "C1": ("M", "a state dict keeps dtype, device and value"),
    "C2": ("M", "also through Accelerate's prepare"),
    "C3": ("M", "state holds plain tensors and no mask; a mask's digest is checked"),
    "C4": ("M", "state is shaped like the parameter, or a scalar"),
    "C5": ("M", "stop anywhere, go on in a new process with the same bits"),
    "C6": ("M", "no state before the first step, unless init_state"),
    "C7": ("S", "torch.distributed.checkpoint round trips"),
    "C8": ("S", "torch.optim state dicts in and out"),
    "C9": ("M", "files load with weights_only; masks say how they were made"),
    "C10": ("S", "the same state keys on every rank"),
    # automatic mixed precision
    "D1": ("M", "GradScaler's ordinary path equals the unscaled run"),
    "D2": ("S", "fused unscale without a wait"),
    "D3": ("M", "an overflow skips everything"),
    "D4": ("S", "Accelerate and the skip: documented"),
    "D5": ("M", "one scaler for both phases"),
    # compilation and graphs
    "E1": ("S", "torch.compile of the step, few compilations"),
    "E2": ("S", "ops are registered and pass opcheck"),
    "E3": ("S", "captured graphs follow settings that are tensors"),
    "E4": ("M", "a step does not wait for the device"),
    "E5": ("M", "no autotuning of kernels that write their inputs"),
    "E6": ("S", "masks find the names of a compiled model"),
    # many processes
    "F1": ("M", "DDP ranks equal one process"),
    "F2": (
        "M",
        "a paired loader: ranks draw different samples, together those of one process; resumable",
    ),
    "F3": ("M", "Fisher and mask do not depend on the number of ranks"),
    "F4": ("M", "FSDP2: even, uneven and empty shards equal one process"),
    "F5": ("S", "one mask for every wrapper, and back"),
    "F6": ("S", "offloaded shards"),
    "F7": ("L", "FSDP1 and DeepSpeed ZeRO are refused"),
    "F8": ("L", "meshes of two dimensions, several in one group"),
    # masks, Fisher, evaluation
    "H1": ("M", "a mask reports its coverage and refuses another model"),
    "H2": ("M", "one bit per weight, exactly packed"),
    "H3": ("M", "threshold, top-k global and per layer, SalUn's files"),
    "H4": ("M", "Fisher on the device, resumable, with progress"),
    "H5": ("M", "0/0, first and short batches, training mode: explicit"),
    "H6": ("M", "membership attacks are right"),
    "H7": ("S", "reports name seeds and the retrained reference"),
    # installation
    "I1": ("M", "installs and imports fast without compiler, CUDA or Triton"),
    "I2": ("M", "compiled kernels are optional, at import too"),
    "I3": ("M", "lower bounds only"),
    "I4": ("M", "the built wheel is installed on its own and used"),
    "I5": ("M", "env tells versions, devices, kernels and why not others"),
    "I6": ("S", "a switch for the backend; asking for an absent one is an error"),
}
NOTES = {  # where a line holds in another form than its first wording
    "A4": (
        "within 2 ulp a step: torch contracts a * b + c on some devices, we never do; SGD is"
        " bit-equal where contraction cannot matter (factors that are powers of two)"
    ),
    "A9": "betas are numbers, never tensors",
    "A13": (
        "the tests' bodies are not in torch's wheel and written anew; complex, sparse and repeated"
        " parameters are refused, several devices and peak memory of foreach do not apply"
    ),
    "B1": (
        "AdamW's bias corrections lie in lr and eps (Kingma and Ba, end of section 2): a division"
        " less than torch's"
    ),
    "B6": "a slow step of 0 would undo every cycle and is refused",
    "B7": (
        "on one backend; a clip's norm is an fp64 sum in the order of the parameters: another order"
        " could change its last fp32 bit, once in some 10^8 steps"
    ),
    "B8": (
        "elementwise results are bit-equal, the norm within 1 ulp; CUDA in tests/gpu, Triton in its"
        " interpreter"
    ),
    "B9": "no stochastic rounding: rounding_check warns instead, and unlearn calls it",
    "B10": "retain gradients are measured with clip_retain only; unlearn looks at the retain loss",
    "C5": "on the same machine",
    "C6": "SGD with dampening starts from momentum 0 after init_state",
    "C10": (
        "with init_state, where a gradient is on some ranks only, which DDP and FSDP2 do not let"
        " happen"
    ),
    "D2": (
        "opt-in by fused=True; the host does not see a skip, so the cycle counts the step"
        " (docs/mixed-precision.md)"
    ),
    "E1": (
        "lr as a tensor; as a number torch compiles for each value, 8 times, and then runs eagerly"
    ),
    "E3": "in tests/gpu; on the CPU the same ops read the same tensors",
    "E4": "in tests/gpu; on the CPU no step reads a value",
    "F1": (
        "the same bits where fp32 sums are exact; else within the bound of two orders of the same"
        " sums (tests/distributed/test_ddp.py); gloo on CPUs"
    ),
    "F3": (
        'a sharded model has no estimator "rank": FSDP2 reduces before anybody can square; "sample"'
        " squares before that"
    ),
    "F4": "gloo on CPUs; the norm is one all-reduce per mesh dimension that splits",
    "F6": "CPUOffloadPolicy on a mesh of CPUs; not yet run beside a GPU",
    "F7": "ZeRO by its marks: DeepSpeed is not among the test dependencies",
    "F8": "kernels see local shards, so a call is split by mesh only for the norm",
    "H4": "resumed by the part of the data that is done: estimate_fisher(start=...)",
    "I3": "torch 2.11, the first whose stable ABI has what the kernels use",
    "I5": "python -m sfron_fast env",
    "I6": "SFRON_FAST_NATIVE=0|1|require",
}


def marks(tree):
    """(ids, what carries them) of every checklist mark in a module: on tests, classes, or the
    module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.checklist":
            yield [ast.literal_eval(a) for a in node.args], node


def test_every_line_has_a_test():
    found = {}
    for path in sorted(TESTS.rglob("*.py")):
        if path == Path(__file__):
            continue
        for ids, node in marks(ast.parse(path.read_text())):
            assert ids, (path.name, node.lineno)
            for i in ids:
                assert re.fullmatch(r"[A-I]\d+", i), (path.name, node.lineno, i)
                assert i in LINES or i[0] in "FG", f"{path.name}:{node.lineno}: no line {i}"
                found.setdefault(i, []).append(f"{path.name}:{node.lineno}")
    assert not LINES.keys() - found.keys()
    assert NOTES.keys() <= LINES.keys()


def test_marks_sit_on_tests():
    """A mark on a helper would prove nothing."""
    for path in sorted(TESTS.rglob("*.py")):
        tree = ast.parse(path.read_text())
        proper = [
            d
            for n in ast.walk(tree)
            if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name.lower().startswith("test")
            for d in n.decorator_list
        ]
        assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
        proper += [n.value for n in assigned if ast.unparse(n.targets[0]) == "pytestmark"]
        inside = {id(child) for node in proper for child in ast.walk(node)}
        for _, node in marks(tree):
            assert id(node) in inside, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    ("source", "ids"),
    [
        ('@pytest.mark.checklist("A1", "B2")\ndef test_x(): ...', ["A1", "B2"]),
        ('pytestmark = [pytest.mark.long, pytest.mark.checklist("C3")]', ["C3"]),
        ("x = 'checklist(\"A1\")'", []),
    ],
)
def test_marks_are_found(source, ids):
    assert [i for found, _ in marks(ast.parse(source)) for i in found] == ids
