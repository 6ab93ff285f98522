"""The stage ncu without a GPU: its metrics exist, its program runs, and what ncu may answer is understood."""

from __future__ import annotations

import ctypes
import json
import pathlib
import subprocess
import sys

import disassembly
import pytest

from bench.gpu import ncu, summary
from bench.gpu.stage import Context, Failure, Skip

ROOT = pathlib.Path(__file__).resolve().parent.parent

HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
    '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def line(launch: int, metric: str, value: str) -> str:
    return (
        f'"{launch}","77","python3","127.0.0.1","void zk::combine<(int)1, 2>(Launch)","1","7",'
        f'"(256, 1, 1)","(9, 1, 1)","0","9.0","Command line profiler metrics","{metric}","","{value}"'
    )


# --- names
# ------------------------------------------------------------------------------------------------------------


class Library:
    """NVIDIA's own list of metrics for a chip, from libnvperf_host.so, which Triton's package has and ncu
    too.
    """

    def __init__(self, path: str, chip: str) -> None:
        self._library, text, pointer, size = (
            ctypes.CDLL(path),
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
        )
        self._call("NVPW_InitializeHost")
        where = (("chip", text, chip.encode()), ("availability", pointer, None))
        evaluator = "NVPW_CUDA_MetricsEvaluator"
        need = self._call(f"{evaluator}_CalculateScratchBufferSize", *where, ("size", size, 0)).size
        self._scratch = (ctypes.c_uint8 * need)()
        memory = (("scratch", pointer, ctypes.addressof(self._scratch)), ("size", size, need))
        counters = (("image", pointer, None), ("image_size", size, 0), ("evaluator", pointer, None))
        self._evaluator = self._call(f"{evaluator}_Initialize", *memory, *where, *counters).evaluator

    def _call(self, name: str, *fields, check: bool = True):
        """Calls a function of the library.

        Its argument is a structure: its size, a null pointer, then ``fields``.
        """
        layout = [
            ("struct_size", ctypes.c_size_t),
            ("private", ctypes.c_void_p),
            *((n, t) for n, t, _ in fields),
        ]
        structure = type(name, (ctypes.Structure,), {"_fields_": layout})()
        structure.struct_size = ctypes.sizeof(structure)
        for key, _, value in fields:
            setattr(structure, key, value)
        structure.status = getattr(self._library, name)(ctypes.byref(structure))
        assert not check or structure.status == 0, (name, structure.status)
        return structure

    def knows(self, metric: str) -> bool:
        request = (ctypes.c_uint8 * 16)()
        asked = self._call(
            "NVPW_MetricsEvaluator_ConvertMetricNameToMetricEvalRequest",
            ("evaluator", ctypes.c_void_p, self._evaluator),
            ("metric", ctypes.c_char_p, metric.encode()),
            ("request", ctypes.c_void_p, ctypes.addressof(request)),
            ("request_size", ctypes.c_size_t, 12),  # an index of 8 bytes, two of 1 and one of 2
            check=False,
        )
        return asked.status == 0


@pytest.mark.parametrize("chip", ["GA100", "GH100", "GB100", "AD104"])
def test_every_metric_exists(chip):
    """The library that ncu uses is asked, for A100, H100 and H200, B200, and L4."""
    nvdisasm = disassembly.find_tool("nvdisasm")
    library = nvdisasm and pathlib.Path(nvdisasm).parent.parent / "lib/cupti/libnvperf_host.so"
    if not library or not library.exists():
        pytest.skip("no libnvperf_host.so: pip install triton")
    known = Library(str(library), chip)
    # ncu itself provides these
    names = [name for name in ncu.METRICS.values() if not name.startswith("launch__")]
    assert [name for name in names if not known.knows(name)] == []
    assert not known.knows("sm__inst_executed_pipe_aluminium.avg.pct_of_peak_sustained_active")


# --- the program
# ------------------------------------------------------------------------------------------------------


def test_the_program_launches_each_kernel_twice():
    code = (
        "import zokernels\n"
        "calls, whole = [], zokernels.combine_\n"
        "def count(theta, seeds, coeffs, **k):\n"
        "    calls.append((str(theta.dtype), len(seeds), k['rounding']))\n"
        "    return whole(theta, seeds, coeffs, **k)\n"
        "zokernels.combine_ = count\n"
        "from bench.gpu import ncu\n"
        "ncu.launch_all('cpu', 64)\n"
        "assert calls[:4] == calls[4:], calls\n"
        "for call in calls[:4]: print(*call)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "4 kernels over 64 elements",
        "torch.bfloat16 1 nearest",
        "torch.bfloat16 1 stochastic",
        "torch.bfloat16 2 stochastic",
        "torch.float32 1 nearest",
    ]


# --- what ncu answers
# -------------------------------------------------------------------------------------------------


def test_numbers_are_read_as_ncu_writes_them():
    text = "\n".join([
        "==PROF== Connected to process 77 (/usr/bin/python3.12)",
        HEAD,
        line(0, "gpu__time_duration.sum", "350,000"),
        line(0, "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active", "71.25"),
        line(0, "dram__bytes_read.sum", "n/a"),
        line(0, "something__else.sum", "1"),
        line(1, "gpu__time_duration.sum", "90"),
        "==PROF== Disconnected from process 77",
    ])  # fmt: skip
    assert ncu.read(text) == [{"seconds": 350000.0, "alu": 71.25}, {"seconds": 90.0}]


def test_figures_of_a_kernel_by_hand():
    """1,000 elements take 2 us and 3,400 cycles; 750 warp instructions are 24 for each 32 elements."""
    one = {
        "seconds": 2000.0,
        "cycles": 3400.0,
        "instructions": 750.0,
        "dram_read": 2000.0,
        "issue": 60.0,
        "alu": 80.0,
    }
    rows = ncu.rows_of([one, one, one, {}], 1000)
    assert rows[0]["kernel"] == "bf16 normal, nearest, K = 1"
    assert rows[0]["clock_ghz"] == pytest.approx(1.7)
    assert rows[0]["instructions"] == pytest.approx(24)
    assert rows[0]["dram_read"] == 2.0
    assert rows[0]["busiest"] == "alu"
    assert rows[3] == {"kernel": "fp32 normal, nearest, K = 1", "numel": 1000}
    table = summary.profiled(rows)
    assert {len(cells) for cells in table} == {len(table[0])}
    assert table[1][:3] == ["bf16 normal, nearest, K = 1", "2", "1.70"]
    assert set(table[4][1:]) == {"-"}
    with pytest.raises(Failure, match="expected 4 profiled kernels, got 5"):
        ncu.rows_of([one] * 5, 1000)


FAKE = """#!{python}
import subprocess, sys
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
log, metrics = open(value("--log-file"), "w"), value("--metrics").split(",")
{body}
"""

MEASURES = """
code = subprocess.run(arguments[arguments.index("--metrics") + 2:]).returncode
print({head!r}, file=log)
for launch in range(4):
    for i, metric in enumerate(metrics):
        text = {line!r}.replace("LAUNCH", str(launch)).replace("METRIC", metric)
        print(text.replace("VALUE", f"{{i + 1:,}}"), file=log)
sys.exit(code)
"""
UNKNOWN = """
gone = [m for m in metrics if "pipe_xu" in m]
if gone:
    print("==ERROR== Failed to find metric " + gone[0], file=log)
    sys.exit(1)
"""
FORBIDDEN = """
print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access", file=log)
sys.exit(1)
"""
BROKEN = 'print("==ERROR== Failed to initialize the profiler: LibraryNotLoaded"); sys.exit(1)'


@pytest.fixture
def profiled(tmp_path):
    """Runs the stage's profile with a stand-in for ncu, over the real program on the CPU."""
    ctx = Context(tmp_path, tmp_path)

    def run(body: str) -> list[dict[str, float]]:
        body = body.replace("{head!r}", repr(HEAD))
        body = body.replace("{line!r}", repr(line("LAUNCH", "METRIC", "VALUE")))
        tool = tmp_path / "ncu"
        tool.write_text(FAKE.format(python=sys.executable, body=body.replace("{{", "{").replace("}}", "}")))
        tool.chmod(0o755)
        target = [sys.executable, "-m", "bench.gpu.ncu", "--device", "cpu", "--numel", "64"]
        return ncu.profile(str(tool), ctx, target)

    return run


def test_metrics_are_collected(profiled, capfd):
    found = profiled(MEASURES)
    assert [len(values) for values in found] == [len(ncu.METRICS)] * 4
    assert found[0]["registers"] == float(len(ncu.METRICS))
    assert "4 kernels over 64 elements" in capfd.readouterr().out
    json.dumps(ncu.rows_of(found, 64))


def test_a_metric_that_this_ncu_does_not_know_is_left_out(profiled):
    found = profiled(UNKNOWN + MEASURES)
    assert [set(ncu.METRICS) - set(values) for values in found] == [{"xu"}] * 4


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            FORBIDDEN,
            r"no permission to read the GPU's performance counters \(ERR_NVGPUCTRPERM\) \(exit status 1\)",
        ),
        (BROKEN, r"ncu: Failed to initialize the profiler: LibraryNotLoaded"),
        ("", "ncu measured nothing and did not say why"),
    ],
)
def test_where_it_cannot_measure_it_says_why(profiled, body, reason):
    with pytest.raises(Skip, match=reason):
        profiled(body)


def test_without_ncu(tmp_path, monkeypatch):
    monkeypatch.setattr(ncu.machine, "find_tool", lambda name: None)
    with pytest.raises(Skip, match=r"^no ncu$"):
        ncu.stage(Context(tmp_path, tmp_path))
