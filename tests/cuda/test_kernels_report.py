"""`make kernels`: the machine code of the CUDA kernels, without a GPU."""

import shutil
from types import SimpleNamespace

import pytest

from benchmarks.tools import kernels_report, kernels_table, sass, sass_loops

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@pytest.mark.long
@needs_nvcc
def test_every_kernel_is_without_spills_and_moves_16_bytes(capsys):
    assert kernels_report.main(["--arch", "90"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    for op in (
        "interpolate",
        "masked_grad_norm",
        "sgd_step",
        "adamw_step",
        "fisher_accumulate",
        "saliency_mask",
    ):
        assert f"\n{op}_kernel" in out


@needs_nvcc
def test_a_spill_and_a_narrow_access_fail(tmp_path, capsys):
    source = tmp_path / "bad.cu"
    source.write_text("""
        // an array that is indexed at run time lies in local memory
        __global__ void bad_kernel(float* x, int n) {
          float local[64];
          for (int i = 0; i < 64; ++i) local[(i * n) % 64] = x[threadIdx.x + i];
          x[threadIdx.x] = local[n % 64];
        }""")
    report = kernels_report.compile_one(
        shutil.which("nvcc"),
        kernels_report.find_cuobjdump(shutil.which("nvcc")),
        source,
        ("90",),
        str(tmp_path),
    )
    problems = "; ".join(report[0].problems())
    assert report[0].name == "bad_kernel"
    assert "bytes of stack" in problems
    if report[0].accesses:
        assert "no 128-bit load" in problems
        assert "no 128-bit store" in problems


SLOW = """
    // 16 chained roots for each element
    __global__ void __launch_bounds__(64) slow_kernel(float4* x, int n) {
      for (int i = threadIdx.x; i < n; i += 64) {
        float4 v = x[i];
        float* f = &v.x;
        #pragma unroll
        for (int k = 0; k < 64; ++k) f[k % 4] = sqrtf(f[k % 4] + 1.0f);
        x[i] = v;
      }
    }"""


@needs_nvcc
def test_too_many_instructions_and_too_few_bytes_in_flight_fail(tmp_path):
    """A planted kernel: 16 roots an element, and 16 bytes for each of few resident threads."""
    source = tmp_path / "slow.cu"
    source.write_text(SLOW)
    nvcc = shutil.which("nvcc")
    cuobjdump = kernels_report.find_cuobjdump(nvcc)
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    (kernel,) = kernels_report.compile_one(nvcc, cuobjdump, source, ("90",), str(tmp_path))
    assert kernel.threads == 64
    assert kernel.blocks == 32  # of 64 threads: as many as one processor takes
    assert kernel.flight in (32 * 64 * 16, 4 * 32 * 64 * 16)  # unrolled by four or not
    assert any(problem.startswith("issue load") for problem in kernel.problems())
    assert kernel.special_load > 1.0
    kernel.shared = 60_000  # leaves room for three blocks
    assert any("KB in flight, below 30" in problem for problem in kernel.problems())
    row = kernels_table.cuda_row(kernel)
    assert kernels_table.judge([row]) == 1
    assert "slow_kernel" in kernels_table.markdown([row])


def test_a_slow_triton_launch_is_judged_if_it_fills_the_card_without_numbers_of_classes(
    monkeypatch,
):
    monkeypatch.setattr(kernels_table.triton_report, "complaints", lambda launch, found: [])
    name = next(iter(kernels_table.triton_report.STREAMS))
    found = {
        "kernel": name,
        "for": "V=9",
        "dtype": "float32",
        "registers": 8,
        "spills": 0,
        "issue_load": 0.81,
        "mufu_load": 0.1,
        "bytes_in_flight": 29_999,
    }
    launches = [
        SimpleNamespace(kernel=name, elements=n, dtype="float32", constants=constants)
        for n, constants in ((1_000, {}), (10_000_000, {}), (10_000_000, {"CLASS_BIAS": True}))
    ]
    rows = [kernels_table.triton_row(launch, found) for launch in launches]
    assert [kernels_table.judge([row]) for row in rows] == [0, 1, 0]
    assert rows[1]["misses"] == ["issue load 0.81, above 0.8", "30.0 KB in flight, below 30"]
    assert sass.slow(0.8, 30_000) == []


CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P2 BRA 0x60 ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   FADD R4, R4, R6 ;
        /*0070*/               @P1 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   ISETP.GE.AND P0, PT, R0, R7, PT ;
        /*0090*/              @!P0 BRA 0x10 ;
        /*00a0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00b0*/               @P0 BRA 0xa0 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
"""


def test_the_longest_way_through_a_streaming_loop():
    """Of two alternatives the longer; the loop over single elements is none."""
    (loop,) = sass_loops.streaming(sass.read(CODE))
    assert [one.address for one in loop.way] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x70, 0x80, 0x90]
    assert (loop.loaded, loop.moved, loop.special) == (16, 32, 0)
    assert loop.issue_load == pytest.approx(8 / 32 * 3.0e12 / (132 * 128 * 1.755e9))


def test_without_nvcc_it_says_so_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(kernels_report.shutil, "which", lambda name: None)
    assert kernels_report.main([]) == 0
    assert "skipped" in capsys.readouterr().out
