"""Ghost-ResNet-50 against ResNet-50, both int8 in OpenVINO: interleaved times, their ratio, and where they go.

    python benchmarks/int8_ghost.py --photos my_photos [--batch 1 4 16] [--rounds 30] [--threads 2]

The networks have random weights and batch norms with random scales and shifts, whose statistics are the photos':
speed does not depend on what a network has learnt, as long as no channel is constant. `ghost_resnet50, folded` is
the network before `split_ghost_norms`.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from contextlib import redirect_stdout
from io import StringIO
from itertools import islice
from operator import truediv
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("NNCF_CI", "1")  # no reports to its makers

import nncf
import numpy as np
import openvino as ov
import timm
import torch
from torch import nn

import ghost_resnet
from ghost_resnet import export
from ghost_resnet.data import Preprocessing, find_images
from ghost_resnet.folding import split_ghost_norms


def network(name: str, photos: torch.Tensor) -> nn.Module:
    """A network whose batch norms have seen photos."""
    torch.manual_seed(0)
    model = timm.create_model(name, zero_init_last=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.0)
            nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = None
    with torch.no_grad():
        model(photos)
    return model.eval()


def quantise(model: nn.Module, photos: np.ndarray) -> ov.Model:
    """What `export` does for int8."""
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        export._write_onnx(model, photos, Path(folder) / "model.onnx")
        graph = export._read_openvino(Path(folder) / "model.onnx")
        return nncf.quantize(graph, nncf.Dataset(np.split(photos, len(photos))), subset_size=len(photos))


def compiled(graph: ov.Model, batch: int, threads: int, profile: bool) -> ov.InferRequest:
    """A request for batches of one size, as `OpenVinoRuntime` makes them."""
    graph = graph.clone()
    graph.reshape([batch, 3, 224, 224])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERF_COUNT": profile,
    }
    return ov.Core().compile_model(graph, "CPU", options).create_infer_request()


def shares(request: ov.InferRequest, images: np.ndarray, rounds: int) -> dict[str, float]:
    """Milliseconds in each kind of layer: of each layer the least that was seen."""
    least: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        request.infer([images])
        for layer in request.profiling_info:
            key = f"{layer.node_type} {layer.exec_type}", layer.node_name
            least[key] = min(least.get(key, float("inf")), layer.real_time.total_seconds() * 1e3)
    kinds: dict[str, float] = defaultdict(float)
    for (kind, _), milliseconds in least.items():
        kinds[kind] += milliseconds
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def main() -> None:
    """Quantise, time in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()

    preprocessing = Preprocessing()
    photos = np.stack([preprocessing.read(path) for path in islice(find_images(options.photos), 32)])
    few = torch.from_numpy(photos[:8])
    ghost, resnet = network("ghost_resnet50", few), network("resnet50", few)
    graphs = {
        "resnet50": quantise(ghost_resnet.fold_batch_norm(resnet), photos),
        "ghost_resnet50, folded": quantise(ghost_resnet.fold_batch_norm(ghost), photos),
        "ghost_resnet50": quantise(ghost_resnet.fold_batch_norm(split_ghost_norms(ghost)), photos),
    }
    for batch in options.batch:
        images = np.resize(photos, (batch, *photos.shape[1:]))
        requests = {name: compiled(graph, batch, options.threads, False) for name, graph in graphs.items()}
        wall, cpu = defaultdict(list), defaultdict(list)
        for turn in range(options.rounds + 2):
            for name, request in requests.items():
                started = time.perf_counter(), time.process_time()
                request.infer([images])
                if turn >= 2:  # the first ones allocate
                    wall[name].append(1e3 * (time.perf_counter() - started[0]))
                    cpu[name].append(1e3 * (time.process_time() - started[1]))
        print(f"\nbatch {batch}, {options.threads} threads, {options.rounds} rounds; ms a batch")
        print(f"{'network':<24}{'wall: median':>14}{'quartiles':>18}{'ratio':>8}{'CPU: median':>14}{'ratio':>8}")
        for name in graphs:
            low, middle, high = statistics.quantiles(wall[name], n=4)
            ratios = [statistics.median(map(truediv, kind["resnet50"], kind[name])) for kind in (wall, cpu)]
            print(
                f"{name:<24}{middle:>14.2f}{f'{low:.2f} to {high:.2f}':>18}{ratios[0]:>8.3f}"
                f"{statistics.median(cpu[name]):>14.2f}{ratios[1]:>8.3f}"
            )
        for name, graph in graphs.items():
            kinds = shares(compiled(graph, batch, options.threads, True), images, options.rounds)
            whole = sum(kinds.values())
            parts = (f"{kind} {100 * ms / whole:.1f} %" for kind, ms in kinds.items() if ms > 0.002 * whole)
            print(f"{name}: " + ", ".join(parts))


if __name__ == "__main__":
    main()
