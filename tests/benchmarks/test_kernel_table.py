"""Test the kernel table with a recorded CPU trace and a synthetic GPU trace."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from benchmarks import kernel_table
from benchmarks.kernel_table import as_markdown, op_names, read_trace

CPU_TRACE = Path(__file__).parent / "data" / "cpu_trace.json.gz"  # two steps of a scan over three layers

HLO = """
  %gemm_fusion_dot.7 = bf16[64,64]{1,0} fusion(%a, %b), kind=kCustom, metadata={op_name="jit(step)/mlp/dot"}
  ROOT %loop_add-fusion.2 = f32[64]{0} fusion(%c), metadata={op_name="jit(step)/add" stack_frame_id=3}
"""


def gpu_trace() -> list[dict]:
    """Return events of two kernels in a CUDA graph on the compute stream, a copy stream, and the host."""
    names = {(1, 14): "Stream #14(Compute)", (1, 15): "Stream #15(MemcpyD2D)", (1, 90): "Framework Ops"}
    meta = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0 NVIDIA H200"}}]
    meta += [{"ph": "M", "pid": 7, "name": "process_name", "args": {"name": "/host:CPU"}}]
    meta += [
        {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for (pid, tid), name in names.items()
    ]

    def event(pid, tid, name, start, duration, **args):
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": duration, "args": args}

    graph = dict(hlo_module="jit_step", hlo_op="command_buffer_3", correlation_id="12")
    return [
        *meta,
        event(1, 14, "gemm_fusion_dot_7", 100.0, 60.0, **graph),
        event(1, 14, "gemm_fusion_dot_7", 160.0, 40.0, **graph),
        event(1, 14, "loop_add_fusion_2", 200.0, 20.0, hlo_op="loop_add-fusion.2"),
        event(1, 14, "nvjet_sm90_tst_128x160_64x5", 220.0, 50.0, hlo_op="cublas-gemm.1"),
        event(1, 14, "nvjet_sm90_tst_128x160_64x5", 270.0, 10.0, hlo_op="cublas-gemm.2"),
        event(1, 15, "MemcpyD2D", 150.0, 20.0, hlo_op="copy.4"),
        event(1, 90, "fc1", 100.0, 100.0),  # the same kernels once more, by operation
        event(7, 3, "PjitFunction(step)", 0.0, 500.0),
    ]


def by_name(table) -> dict:
    return {kernel.name: kernel for kernel in table.kernels}


def test_kernels_of_a_gpu_are_those_of_its_streams_with_the_hlo_op_of_each():
    table = kernel_table.tabulate_kernels(gpu_trace(), steps=2, paths=op_names(HLO))
    kernels = by_name(table)
    assert [kernel.name for kernel in table.kernels[:2]] == [
        "gemm_fusion_dot_7",
        "nvjet_sm90_tst_128x160_64x5",
    ]
    assert set(kernels) == {
        "gemm_fusion_dot_7",
        "nvjet_sm90_tst_128x160_64x5",
        "loop_add_fusion_2",
        "MemcpyD2D",
    }
    gemm, nvjet = table.kernels[:2]
    assert (gemm.ms, gemm.calls, gemm.share) == (0.05, 1.0, 0.5)
    assert gemm.hlo_ops == ("gemm_fusion_dot.7",) and gemm.op_name == "jit(step)/mlp/dot"
    assert nvjet.hlo_ops == ("cublas-gemm.1", "cublas-gemm.2") and nvjet.op_name == ""
    assert kernels["loop_add_fusion_2"].op_name == "jit(step)/add"
    assert (table.busy_ms, table.span_ms) == (0.1, 0.09)
    assert "| `nvjet_sm90_tst_128x160_64x5` | 0.030 | 1 | 30.0% | cublas-gemm.1 and 1 more |" in as_markdown(
        table
    )


def test_without_the_programs_text_the_trace_alone_names_them():
    gemm = kernel_table.tabulate_kernels(gpu_trace()).kernels[0]
    assert gemm.hlo_ops == ("command_buffer_3",) and gemm.calls == 2 and gemm.ms == 0.1


def test_operations_of_a_cpu_count_without_those_inside_them():
    events = read_trace(CPU_TRACE)
    table = kernel_table.tabulate_kernels(events, steps=2)
    loop_ms = sum(e["dur"] for e in events if e.get("name") == "while.13") / 2e3
    kernels = by_name(table)
    assert kernels["dot.4"].calls == 3 and kernels["while.13"].calls == 1  # a step: three layers, one loop
    assert kernels["while.13"].ms < 0.2 * loop_ms
    assert sum(kernel.share for kernel in table.kernels) == pytest.approx(1)
    assert sum(kernel.ms for kernel in table.kernels) == pytest.approx(table.busy_ms)
    assert loop_ms < table.busy_ms <= table.span_ms
    assert [kernel.ms for kernel in table.kernels] == sorted((k.ms for k in table.kernels), reverse=True)


def test_the_command_prints_the_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernel_table", str(CPU_TRACE), "--steps=2", "--rows=3"])
    kernel_table.main()
    printed = capsys.readouterr().out
    assert printed.count("\n| `") == 3 and "busy 0.95 ms a step" in printed


def test_files_that_are_not_traces_are_refused(monkeypatch, tmp_path):
    (tmp_path / "text.gz").write_text("no gzip")
    (tmp_path / "other.gz").write_bytes(gzip.compress(json.dumps([1]).encode()))
    for name in ("text.gz", "other.gz", "missing.gz"):
        monkeypatch.setattr(sys, "argv", ["kernel_table", str(tmp_path / name)])
        with pytest.raises(SystemExit, match=f"kernel_table: .*{name}"):
            kernel_table.main()
    host = [event for event in gpu_trace() if event.get("pid") == 7]
    with pytest.raises(ValueError, match="no operation of a device; on a CPU set XLA_FLAGS"):
        kernel_table.tabulate_kernels(host)
