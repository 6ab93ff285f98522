"""The benchmark: its figures, its table and report, and baselines that compute what they claim."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import torch

from bench import baselines, combine, report, table, timing

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("bench") / "result.json"
    # The reference backend runs on every machine, whether anything is built or not.
    done = run(
        "run", "--op", "combine", "--tiny", "--backend", "reference", "--threads", "1,2", "--json", str(path)
    )
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 120 for line in done.stdout.split("\n\n")[1].splitlines())
    return {"path": path, "stdout": done.stdout, **json.loads(path.read_text())}


def test_rows_cover_everything(result):
    ours = [r for r in result["rows"] if r["op"] != "perturb_"]
    cases = {(r["op"], r["k"], r["dtype"], r["dist"], r["rounding"], r["threads"]) for r in ours}
    assert len(cases) == len(ours) == 2 * 2 * (3 + 5 + 5)  # threads, dists, forms of fp32, bf16 and fp16
    assert {r["backend"] for r in ours} == {"reference"}
    loops = [r for r in result["rows"] if r["op"] == "perturb_"]
    assert len(loops) == 2 * 2 * 3 * len(baselines.PERTURB)
    assert {r["backend"] for r in loops} == set(baselines.PERTURB)
    assert result["schema"] == 1
    assert result["command"].startswith("python -m bench run --op combine")


def test_header_names_machine_and_versions(result):
    header = result["machine"]
    assert header["torch"] == torch.__version__
    assert header["contract"] == "zk1"
    for key in ("cpu", "cores", "python", "zokernels", "commit", "date"):
        assert key in header


def test_rows_name_what_they_are_compared_with(result):
    for row in result["rows"]:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["rounds"] >= 3
        assert row["copy"]["name"] == ("copy" if row["op"] == "combine" else "copy_inplace")
        assert row["ratio"].keys() == row["baselines"].keys()
        assert all(base["passes"] == row["k"] for base in row["baselines"].values())


def test_figures_by_hand():
    """A million elements take 2 ms, 2 ns each.

    The copy takes 1 ns an element, two passes of the loop 5 ns each.
    """
    times = lambda p50: timing.Times(0.9 * p50, p50, 1.1 * p50, 5)
    copies = {"copy": times(4e-3), "copy_inplace": times(8e-3)}
    compared = combine.Compared({"mezo": (2_000_000, times(10e-3))}, 4_000_000, copies)
    what = {"op": "combine", "dtype": "bf16", "k": 2}
    found = combine.row(what, times(2e-3), 1_000_000, False, compared)
    assert found["bytes"] == 4_000_000
    assert found["gb_per_s"] == pytest.approx(2)
    assert found["ns_per_element"] == pytest.approx(2)
    assert found["copy_fraction"] == pytest.approx(0.5)
    assert found["ratio"] == {"mezo": pytest.approx(5)}
    # In place the copy takes 2 ns an element; three accesses are one and a half copies, four bytes each in
    # fp32.
    found = combine.row(
        {**what, "dtype": "fp32"}, times(2e-3), 1_000_000, True, compared, accesses=3, passes=4
    )
    assert found["bytes"] == 12_000_000
    assert found["copy_fraction"] == pytest.approx(1.5)
    assert found["ratio"] == {"mezo": pytest.approx(10)}


def test_rows_of_one_group_share_their_baselines(result):
    """The rows of one dtype, dist and thread count are compared with the same times, so ratios are of one
    run.
    """
    groups: dict = {}
    for row in result["rows"]:
        groups.setdefault((row["threads"], row["dtype"], row["dist"]), set()).add(
            row["baselines"]["mezo"]["p50"]
        )
    assert all(len(times) == 1 for times in groups.values())


def test_report_writes_table_and_plot(result, tmp_path):
    output = tmp_path / "performance.md"
    output.write_text(f"# Performance\n\nOwn words.\n\n{report.BEGIN}\nold\n{report.END}\n\nMore words.\n")
    report.write([result["path"]], output)
    text = output.read_text()
    assert "Own words." in text
    assert "More words." in text
    assert "old" not in text
    assert text.count("\n| combine") + text.count("\n| perturb_") == len(result["rows"])
    assert (tmp_path / "performance.png").read_bytes().startswith(b"\x89PNG")
    report.write([result["path"]], output)
    assert output.read_text() == text


def test_list_and_errors():
    assert "combine" in run("list").stdout
    wrong = run("run", "--tiny", "--numel", "17")
    assert wrong.returncode != 0
    assert "--numel: expected a positive multiple of 16, got 17" in wrong.stderr


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mezo_perturb_is_the_published_loop(dtype, dist):
    torch.manual_seed(3)
    theta = [torch.randn(40, 3, dtype=dtype), torch.randn(7, dtype=dtype)]
    params = [torch.nn.Parameter(t.clone()) for t in theta]
    baselines.mezo_perturb(params, -2, 1e-3, seed=11, dist=dist)
    torch.manual_seed(11)
    for param, t in zip(params, theta, strict=True):
        assert torch.equal(param.data, t + -2 * baselines.draw(t, dist) * 1e-3)


def test_mezo_step_moves_by_the_update_alone():
    """+eps, -2 eps and +eps return to theta up to fp32 rounding, so only the update remains, along the
    same z.
    """
    torch.manual_seed(0)
    theta = torch.randn(5000)
    param = torch.nn.Parameter(theta.clone())
    baselines.mezo_step([param], eps=1e-3, lr=0.5, projected_grad=2.0, seed=4)
    torch.manual_seed(4)
    torch.testing.assert_close(param.data, theta - 0.5 * 2.0 * torch.randn(5000), rtol=0, atol=1e-5)


def test_mezo_update_decays():
    param = torch.nn.Parameter(torch.ones(8))
    baselines.mezo_update([param], lr=0.1, projected_grad=0.0, seed=0, weight_decay=0.5)
    torch.testing.assert_close(param.data, torch.full((8,), 0.95))


@pytest.mark.parametrize("name", list(baselines.PERTURB))
def test_every_eager_loop_computes_the_same_sum(name):
    torch.manual_seed(1)
    theta = [torch.randn(300), torch.randn(17)]
    expected = [torch.nn.Parameter(t.clone()) for t in theta]
    params = [torch.nn.Parameter(t.clone()) for t in theta]
    baselines.mezo_perturb(expected, 1, 1e-3, seed=5)
    baselines.PERTURB[name](params, 1, 1e-3, seed=5)
    for a, b in zip(expected, params, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copy_in_place_writes_every_byte(dtype):
    theta = torch.randn(64).to(dtype)
    before = theta.clone()
    baselines.copy_in_place(theta)
    assert (theta.view(torch.uint8) == ~before.view(torch.uint8)).all()


def test_rademacher_draws_are_signs():
    z = baselines.draw(torch.empty(1000, dtype=torch.bfloat16), "rademacher")
    assert z.dtype is torch.bfloat16
    assert set(z.tolist()) == {-1.0, 1.0}


def test_candidates_run_in_turns():
    order = []
    candidates = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.measure(candidates, "cpu", seconds=0.0, min_rounds=4)
    assert order == list("abc") * 5  # one round to warm up
    assert all(t.rounds == 4 for t in times.values())


def test_percentiles():
    times = timing.Times.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (times.p20, times.p50, times.p80, times.rounds) == (2.0, 3.0, 5.0, 6)


def test_table_fits_a_terminal(result):
    printer = table.Printer()
    heads = [head for row in result["rows"] if (head := printer.head(row))]
    assert len(heads) == 1
    for line in [*heads[0].splitlines(), *(printer.row(r) for r in result["rows"])]:
        assert len(line) <= 120
