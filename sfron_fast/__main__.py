"""`python -m sfron_fast unlearn` lets a language model forget texts and `evaluate` says how well it
knows them; `memory` says what that takes; `demo` watches a classifier forget; `env` says what runs
where and why.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch


def environment() -> str:
    """Versions, devices, which kernel serves each op on each device, and why no faster one."""
    from . import __version__
    from .ops import native, triton
    from .ops import registry as ops

    used = ("numpy", "safetensors", "triton")
    set_here = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("SFRON_FAST_")]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = [
        f"sfron_fast  {__version__}",
        f"torch       {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"with        {', '.join(f'{name} {_version(name)}' for name in used)}",
        f"python      {platform.python_version()} on {platform.platform()}",
        f"threads     {torch.get_num_threads()}",
        f"devices     cpu{''.join(', cuda: ' + name for name in devices)}",
        f"switches    {', '.join(set_here) or 'none set'}",
        f"native      {'loaded' if native.available() else 'absent: ' + str(native.reason())}",
    ]
    if native.switched_off():
        lines.append("            to get it: unset SFRON_FAST_NATIVE")
    elif not native.available():
        lines.append(f"            to get it: {native.remedy()}")
    absent = next(filter(None, map(triton.reason, triton.MODULES)), None)
    lines.append(f"triton      {'found' if absent is None else 'absent: ' + absent}")
    width = max(map(len, ops.SCHEMAS))
    lines += ["", f"{'op':{width}}  {'cpu':10}  cuda"]
    for name in ops.SCHEMAS:
        lines.append(
            f"{name:{width}}  {ops.kernel_for(name, 'cpu'):10}  {ops.kernel_for(name, 'cuda')}"
        )
    refused: dict[str, list[str]] = {}
    for device in ("cpu", "cuda"):
        for name in ops.SCHEMAS:
            if ops.kernel_for(name, device) in ("reference", "none"):
                refused.setdefault(f"{device}: {_refusal(name, device)}", []).append(name)
    if refused:
        lines += ["", "why no faster kernel serves"]
        for reason, names in refused.items():
            lines.append(
                f"  {'every op' if len(names) == len(ops.SCHEMAS) else ', '.join(names)} on"
                f" {reason}"
            )
    if not devices:
        lines += ["", "no CUDA device is visible: the cuda column says what would serve one"]
    return "\n".join(lines)


def _refusal(name: str, device: str) -> str:
    """Why no faster kernel than the reference serves an op."""
    from .ops import native, triton

    if device == "cuda" and not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of it"
    if device == "cuda" and name in triton.MODULES:
        return str(triton.reason(name))
    if not native.available():
        return str(native.reason())
    return "the package was built without its CUDA kernels; rebuild it with nvcc and USE_CUDA=1"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sfron_fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="unlearn on scikit-learn's digits and write a report")
    demo.add_argument(
        "--out", type=Path, default=Path("report"), help="folder for the report (default: report)"
    )
    demo.add_argument("--seeds", type=int, default=3, help="number of training seeds (default: 3)")
    commands.add_parser("env", help="versions, devices, and which kernel serves which op")
    from .integrations import command, memory

    command.add_parsers(commands)
    memory.add_parser(commands)
    chosen = parser.parse_args(arguments)
    if chosen.command == "env":
        print(environment())
        return 0
    if chosen.command in ("unlearn", "evaluate", "memory"):
        try:
            (memory if chosen.command == "memory" else command).execute(chosen)
        except (ValueError, ImportError, OSError) as error:  # input, optional packages, paths
            print(error, file=sys.stderr)
            return 1 if isinstance(error, ImportError) else 2
        return 0
    if chosen.seeds < 1:
        parser.error(f"--seeds: expected an integer >= 1, found {chosen.seeds}")
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"--out: expected a folder, found a file {chosen.out}")
    from .demo import run as digits

    try:
        folder = digits.main(chosen.out, tuple(range(chosen.seeds)))
    except ImportError as error:  # an optional package
        print(error, file=sys.stderr)
        return 1
    print(folder.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
