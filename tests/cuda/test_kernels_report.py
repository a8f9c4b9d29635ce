"""`make kernels`: the machine code of the CUDA kernels, without a GPU."""

import shutil

import pytest

from benchmarks import kernels_report

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@needs_nvcc
def test_every_kernel_is_without_spills_and_moves_16_bytes(capsys):
    assert kernels_report.main(["--arch", "90"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    for op in ("interpolate", "masked_grad_norm", "sgd_step", "adamw_step", "fisher_accumulate", "saliency_mask",
               "fisher_saliency_mask"):  # fmt: skip
        assert f"\n{op}_kernel" in out


@needs_nvcc
def test_a_spill_and_a_narrow_access_fail(tmp_path, capsys):
    source = tmp_path / "bad.cu"
    source.write_text("""
        __global__ void bad_kernel(float* x, int n) {  // an array that is indexed at run time lies in local memory
          float local[64];
          for (int i = 0; i < 64; ++i) local[(i * n) % 64] = x[threadIdx.x + i];
          x[threadIdx.x] = local[n % 64];
        }""")
    report = kernels_report.compile_one(
        shutil.which("nvcc"), kernels_report.find_cuobjdump(shutil.which("nvcc")), source, ("90",), str(tmp_path)
    )
    problems = "; ".join(report[0].problems())
    assert report[0].name == "bad_kernel"
    assert "bytes of stack" in problems
    if report[0].accesses:
        assert "no 128-bit load" in problems
        assert "no 128-bit store" in problems


def test_without_nvcc_it_says_so_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(kernels_report.shutil, "which", lambda name: None)
    assert kernels_report.main([]) == 0
    assert "skipped" in capsys.readouterr().out
