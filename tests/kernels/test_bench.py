"""The benchmark reports errors against float64, the memory of each contender, and the peers that are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kernel_cases import DEVICE
from mel_lite.cli.main import app
from mel_lite.kernels import bench
from mel_lite.kernels.bench import measure, peers
from mel_lite.kernels.bench.report import BOUND, HALF, OURS, SAMPLED, SCORING, Result


def test_report_holds_times_errors_and_reasons(tmp_path: Path) -> None:
    logged: list[str] = []
    shape = bench.Shape(rows=300, width=24, vocab=2000, dtype="bfloat16" if DEVICE == "cuda" else "float32")
    file = tmp_path / "made" / "kernel.json"
    report = bench.run(DEVICE, shapes=[shape], rounds=3, json_path=file, log=logged.append)
    assert json.loads(file.read_text()) == report
    results = {result["name"]: result for result in report["shapes"][0]["results"]}
    assert list(results) == [OURS, SCORING, HALF, BOUND, *peers.PEERS]
    ours, naive = results[OURS], results["naive log-softmax"]
    assert 0 < ours["logp_error"] < 1e-5 and ours["logp_error"] <= naive["logp_error"]
    assert 0 < ours["u_error"] < 3e-3 and ours["u_error"] <= naive["u_error"]
    assert results[SCORING]["logp_error"] == ours["logp_error"] and results[SCORING]["u_error"] is None
    for result in results.values():
        assert (len(result["times_s"]) == 3 and min(result["times_s"]) > 0) or result["problem"], result
    on_cpu = DEVICE == "cpu"
    assert all(len(result["cpu_times_s"]) == on_cpu * len(result["times_s"]) for result in results.values())
    assert not on_cpu or min(results[OURS]["cpu_times_s"]) > 0
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    table = logged[-1]
    assert f"N 300, H 24, V 2000, {shape.dtype}, synthetic states" in table
    assert all(name in table for name in results)


def test_the_command_measures_the_default_shapes_and_writes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PEERS", {})
    monkeypatch.setattr(measure, "default_shapes", lambda device: [bench.Shape(20, 8, 100, "float32")])
    file = tmp_path / "kernel.json"
    done = CliRunner().invoke(app, ["bench", "kernel", "--device", "cpu", "--rounds", "2", "--json", str(file)])
    assert done.exit_code == 0, done.output
    (shape,) = json.loads(file.read_text())["shapes"]
    assert [len(result["times_s"]) for result in shape["results"]] == [2, 2, 2, 2]
    assert "N 20, H 8, V 100, float32, synthetic states" in done.output


def test_kl_is_measured_against_two_full_logits() -> None:
    logged: list[str] = []
    shape = bench.Shape(300, 24, 2000, "bfloat16" if DEVICE == "cuda" else "float32", operator="kl")
    report = bench.run(DEVICE, shapes=[shape], rounds=2, log=logged.append)
    results = {result["name"]: result for result in report["shapes"][0]["results"]}
    assert list(results) == [OURS, SCORING, HALF, BOUND, SAMPLED, *peers.KL_PEERS]
    assert results[SAMPLED]["logp_error"] is None and results[SAMPLED]["u_error"] is None, "another quantity"
    ours, naive = results[OURS], results["naive KL of two logits"]
    assert 0 < ours["logp_error"] < 1e-5 and ours["logp_error"] <= naive["logp_error"]
    assert 0 < ours["u_error"] < 3e-3 and ours["u_error"] <= naive["u_error"]
    assert results[SCORING]["logp_error"] == ours["logp_error"] and results[SCORING]["u_error"] is None
    assert all(len(result["times_s"]) == 2 for result in results.values())
    assert f"V 2000, {shape.dtype}, synthetic states, KL from a teacher" in logged[-1] and "KL err" in logged[-1]


def test_every_size_is_measured_with_both_operators() -> None:
    operators = [shape.operator for shape in bench.default_shapes(torch.device("cpu"))]
    assert sorted(operators) == ["kl", "logprobs"]


@pytest.mark.parametrize("frozen", [False, True])
def test_objects_are_frozen_during_a_run_only(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    """A process that froze its objects before the run, as the tests do, keeps them frozen."""
    monkeypatch.setattr(measure, "PEERS", {})
    unfreezes: list[int] = []
    counts = iter([int(frozen)])
    monkeypatch.setattr(measure.gc, "get_freeze_count", lambda: next(counts))
    monkeypatch.setattr(measure.gc, "unfreeze", lambda: unfreezes.append(1))
    bench.run("cpu", shapes=[bench.Shape(20, 8, 100, "float32")], rounds=1, log=lambda _: None)
    assert len(unfreezes) == (not frozen)


def test_given_states_are_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PEERS", {"naive": lambda: peers.naive})  # the last pass leaves its gradient
    shape = bench.Shape(rows=40, width=8, vocab=100, dtype="float32", states="a model")
    _, weight_VH, target_N = bench.model_like(shape, torch.device(DEVICE))
    weight_VH = torch.nn.functional.normalize(weight_VH)
    certain_NH = (1000 * weight_VH[target_N]).requires_grad_()  # every row is certain: u is almost 0
    given = {shape: (certain_NH, weight_VH, target_N)}
    report = bench.run(DEVICE, shapes=[], given=given, rounds=1, log=lambda _: None)
    (measured,) = report["shapes"]
    assert measured["states"] == "a model" and measured["results"][0]["logp_error"] < 1e-5
    assert certain_NH.grad is not None and certain_NH.grad.norm().item() < 1e-6


def test_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = bench.model_like(bench.Shape(8, 4, 50, "float32"), torch.device("cpu"))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert measure.contenders(inputs)["Unsloth fused_linear"] == "ImportError: unsloth_zoo is not installed"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process is read from /proc")
def test_peak_memory_counts_what_a_pass_allocates() -> None:
    device = torch.device("cpu")
    before = measure._memory_bytes(device, reset=True)
    torch.ones(2**25).sum()
    assert 2**27 - 2**20 <= measure._memory_bytes(device) - before < 2**27 + 2**24


def test_quantiles() -> None:
    assert Result("x", [4.0, 1.0, 2.0, 3.0, 5.0, 6.0]).quantiles_s() == pytest.approx((2.0, 3.5, 5.0))
    assert Result("x", [4.0]).quantiles_s() == (4.0, 4.0, 4.0)


def test_model_like_rows_are_as_certain_as_a_models() -> None:
    """Random hidden states would give near-uniform rows, one-hot states only certain ones."""
    hidden_NH, weight_VH, target_N = bench.model_like(bench.Shape(400, 128, 4096, "float32"), torch.device("cpu"))
    p_NV = (hidden_NH.detach() @ weight_VH.T).softmax(1)
    top_N = p_NV.max(1).values
    assert 0.2 < float((top_N > 0.9).float().mean()) < 0.7 and float((top_N < 0.5).float().mean()) > 0.1
    assert float(p_NV.gather(1, target_N[:, None]).median()) > 20 / 4096
