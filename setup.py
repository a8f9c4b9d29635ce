"""Builds the one extension, `sfron_fast._C`. Metadata are in pyproject.toml.

Environment: USE_CUDA=0|1 (default: 1 if torch is a CUDA build and nvcc is found),
TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1, SFRON_FAST_NATIVE=require (a failed build is an error, else
the package installs without kernels and says so).
"""

import glob
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("SFRON_FAST_NATIVE") in ("1", "require")
DEBUG = os.environ.get("DEBUG") == "1"
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
)

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension as Builder
    from torch.utils.cpp_extension import CppExtension
except ImportError as error:
    torch, Builder, CppExtension = None, build_ext, Extension
    reason = (
        f"torch cannot be imported ({error}); install torch, then use `pip install"
        " --no-build-isolation`"
    )
CUDA = os.environ.get("USE_CUDA", str(int(bool(torch and torch.version.cuda and NVCC)))) == "1"
# loads in torch >= 2.11
DEFINES = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *(["-DUSE_CUDA"] if CUDA else []),
]


class Build(Builder):
    """Without a working compiler the package installs without its kernels, unless they are
    required.
    """

    def build_extensions(self) -> None:  # noqa: D102
        try:
            if torch is None:
                raise RuntimeError(reason)
            if CUDA:
                self.compile_kernels(self.extensions[0])
            super().build_extensions()
        except Exception as error:
            if REQUIRED:
                raise
            print(
                f"\n*** sfron_fast: the native kernels were NOT built ***\n*** {error}\n*** The"
                " package works on its PyTorch reference kernels: same results, much slower.\n***"
                " To build them: install a C++17 compiler (Debian: apt install g++; macOS:"
                " xcode-select --install;\n*** conda: conda install cxx-compiler) and ninja, then"
                " `pip install --no-build-isolation` again.\n*** SFRON_FAST_NATIVE=require makes"
                " this an error.\n",
                file=sys.stderr,
            )

    def compile_kernels(self, extension: Extension) -> None:
        """The .cu files know nothing of torch: nvcc alone compiles them, whatever build of torch is
        installed.
        """
        if NVCC is None:
            raise RuntimeError("USE_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME")
        flags = [
            "-std=c++17",
            "-O3",
            "-fmad=false",
            "-prec-div=true",
            "-prec-sqrt=true",
            "-ftz=false",
            "-Icsrc",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden,-ffp-contract=off",
            *DEFINES,
        ]
        for name in re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")):
            arch = name.removesuffix("+PTX").replace(".", "")
            ptx = f",compute_{arch}" if name.endswith("+PTX") else ""
            flags.append(f"-gencode=arch=compute_{arch},code=[sm_{arch}{ptx}]")
        os.makedirs(self.build_temp, exist_ok=True)
        sources = sorted(glob.glob("csrc/*/*.cu"))
        objects = [
            os.path.abspath(f"{self.build_temp}/{os.path.basename(source)}.o") for source in sources
        ]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
            list(
                pool.map(
                    lambda s, o: subprocess.check_call([NVCC, *flags, "-c", s, "-o", o]),
                    sources,
                    objects,
                )
            )
        said = subprocess.run(
            [NVCC, "--dryrun", sources[0]], stderr=subprocess.PIPE, text=True
        ).stderr
        # with the runtime linked in, where nvcc has it, they ask nothing of torch
        extension.extra_objects = objects
        extension.extra_link_args = [
            *re.findall(r'"(-L[^"]+)"', said),
            "-lcudart_static",
            "-ldl",
            "-lrt",
            "-lpthread",
        ]


# no contraction: the same bits on every processor. The other two change no value, but let loops
# vectorise.
strict = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
flags = [
    "-std=c++17",
    "-fvisibility=hidden",
    *(["-O0", "-g"] if DEBUG else ["-O3", "-g0"]),
    *strict,
    *DEFINES,
]
if os.name == "nt":
    flags = ["/std:c++17", "/Od" if DEBUG else "/O2", "/fp:precise", *DEFINES]
sources = sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/*/*.cpp"))
extension = CppExtension(
    "sfron_fast._C",
    sources,
    optional=not REQUIRED,
    include_dirs=[os.path.abspath("csrc")],
    extra_compile_args={"cxx": flags} if torch else [],
    py_limited_api=True,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
