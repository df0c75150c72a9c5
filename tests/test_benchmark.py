"""Speed side by side: that every contestant runs, and that tables say what was measured."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from drawing import write_folder
from typer.testing import CliRunner

from ghost_resnet import benchmark, hub
from ghost_resnet.benchmark import Spread, bench, multiply_adds, plot, to_markdown
from ghost_resnet.cli import app
from ghost_resnet.errors import BenchmarkError


def row(name: str, latency: float, folder: float) -> dict[str, Any]:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "low": value * 0.9, "high": value * 1.1}

    return {
        "name": name,
        "precision": "fp32",
        "latency": spread(latency),
        "batch_size": 8,
        "throughput": spread(2 * folder),
        "folder": spread(folder),
        "memory": 512.0,
        "cold_start": spread(1.5),
        "share_of_peak": 0.5,
    }


RESULT = {"size": 64, "rows": [row("plain resnet50", 80.0, 10.0), row("ours openvino int8", 10.0, 60.0)]}


def test_ratios_are_to_the_plain_script_and_above_one_when_ours_is_better() -> None:
    plain, ours = to_markdown(RESULT).splitlines()[2:]
    assert "80.0 [72.0 to 88.0] (1.00x)" in plain
    assert "10.0 [9.0 to 11.0] (8.00x)" in ours and "60.0 [54.0 to 66.0] (6.00x)" in ours and "| 50% |" in ours


def test_without_the_plain_script_there_are_no_ratios() -> None:
    assert "x)" not in to_markdown({**RESULT, "rows": RESULT["rows"][1:]})


def test_rivals_are_drawn_in_another_colour_than_our_own(tmp_path: Path) -> None:
    rows = [{**RESULT["rows"][0], "name": name} for name in ("plain resnet50", "transformers resnet50", "ours onnx")]
    plot({**RESULT, "rows": rows}, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text()
    assert (text.count("fill: #9aa7b5"), text.count("fill: #1f77b4")) == (2, 1)


def test_the_plot_names_everything_that_took_part(tmp_path: Path) -> None:
    plot(RESULT, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text(encoding="utf-8")
    assert text.startswith("<svg") and len(text) > 5000
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_multiply_adds_are_those_of_the_table_of_networks() -> None:
    assert multiply_adds(timm.create_model("ghost_resnet50"), 224) == pytest.approx(3.629e9, rel=1e-3)
    assert multiply_adds(timm.create_model("resnet50"), 224) == pytest.approx(4.089e9, rel=1e-3)


def test_median_and_range_of_rounds() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_a_process_is_measured_by_its_own_memory_and_its_failure_is_told() -> None:
    ballast = np.ones(50_000_000)  # 400 MB, which the process below does not have
    seconds, memory = benchmark._process([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert seconds > 0.3 and 3 < memory < ballast.nbytes / 1e6
    with pytest.raises(BenchmarkError, match="no such thing"):
        benchmark._process([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_no_photos_are_told(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="expected photos in"):
        bench([], tmp_path)


@pytest.mark.parametrize("seconds, sides", [(0.0, [256, 512, 1024, 2048]), (0.11, [256])])
def test_the_machines_peak_is_measured_with_small_products_where_torch_has_no_kernel(
    seconds: float, sides: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX2 alone an int8 product of side 2048 takes PyTorch a quarter of a minute."""
    seen: dict[int, int] = {}

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.shape == b.shape and a.dtype == b.dtype == torch.int8
        seen[len(a)] = seen.get(len(a), 0) + 1
        time.sleep(seconds)

    monkeypatch.setattr(torch, "_int_mm", product)
    speed = benchmark._gemm("int8")
    assert seen == dict.fromkeys(sides, 6)
    assert speed == pytest.approx(256**3 / seconds, rel=0.5) if seconds else speed > 1e9


def test_share_of_the_peak_is_of_fp32s_where_that_is_faster() -> None:
    values = {key: [2.0] for key in ("latency", "throughput", "folder", "cold", "memory")}
    contestant = benchmark.Contestant("net", "int8", 10, lambda batch: None, lambda paths: (), [])
    assert benchmark._row(contestant, 1, values, {"fp32": 40.0, "int8": 8.0}).share_of_peak == 0.5
    assert benchmark._row(contestant, 1, values, {"fp32": 40.0, "int8": 200.0}).share_of_peak == 0.1


def test_our_networks_compute_in_the_thread_of_their_rivals(run_folder: Path, tmp_path: Path) -> None:
    """A second thread that computes would slow down all that PyTorch does in the first."""
    threads: list[int] = []
    for ours in benchmark._ours(str(run_folder), 32, ["torch"], tmp_path, tmp_path / "work", lambda _: None):
        ours.network.model.register_forward_hook(lambda *_: threads.append(threading.get_ident()))
        ours.network(np.zeros((1, 3, 32, 32), np.float32))
    assert set(threads) == {threading.get_ident()}


def test_without_transformers_its_pipeline_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    assert not list(benchmark._pipeline(64, print))
    assert "left out: the pipeline of transformers" in caplog.text


@pytest.mark.slow
@pytest.mark.ecosystem
def test_every_back_end_takes_part_beside_the_plain_script(tmp_path: Path) -> None:
    for module in ("onnxruntime", "openvino", "nncf", "transformers"):
        pytest.importorskip(module)
    photos = write_folder(tmp_path / "photos", {"glass": 4, "metal": 4})
    model = timm.create_model("ghost_resnet50_s4", num_classes=2).eval()
    hub.save_pretrained(model, tmp_path / "run", labels=["glass", "metal"])
    done = CliRunner().invoke(
        app,
        [
            *("bench", str(photos), "--model", str(tmp_path / "run"), "--size", "64", "--rounds", "1", "--limit", "6"),
            *(
                "--rivals",
                "resnet50,transformers",
                "--json",
                str(tmp_path / "b.json"),
                "--plot",
                str(tmp_path / "b.svg"),
            ),
        ],
    )
    assert done.exit_code == 0, done.output
    for name in (
        "plain resnet50",
        "transformers resnet50",
        *(f"ghost_resnet50_s4 {b} fp32" for b in ("torch", "onnx", "openvino")),
    ):
        assert f"| {name} |" in done.output
    assert "openvino int8" in done.output and "onnx int8" in done.output
    assert (tmp_path / "b.json").is_file() and (tmp_path / "b.svg").is_file()
