"""Inference on a CUDA GPU: a Ghost-ResNet beside the ResNet that it is made from, in one interleaved run.

    python benchmarks/inference_cuda.py [--dtype bfloat16] [--batch 1 32 256] [--size 224] [--rounds 15]

Both networks have their batch norms folded and run channels_last, eager ("eager"), by `torch.compile` ("compile") and
by `torch.compile(mode="reduce-overhead")`, which is with CUDA graphs ("graphs"); the Ghost-ResNet also as autocast
would run it. Each takes its turn once a round. A time is that of the clock on the wall from the call to the finished
answer, over as many calls as take 50 ms, with the images on the GPU already. Printed is a Markdown table of medians;
`ratio` is ResNet-50's time over Ghost-ResNet-50's in the same round, its median and quartiles, above 1 where the
Ghost-ResNet is faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch

import ghost_resnet  # noqa: F401  # timm knows its networks then
from ghost_resnet.folding import fold_batch_norm

NETWORKS = "ghost_resnet50", "resnet50"
MODES = {"eager": None, "compile": "default", "graphs": "reduce-overhead"}

Call = Callable[[], torch.Tensor]


def calls(mode: str, images: torch.Tensor) -> dict[str, Call]:
    """For each network, a function that answers the images."""
    return {name: call(name, mode, images) for name in NETWORKS}


def call(name: str, mode: str, images: torch.Tensor, autocast: bool = False) -> Call:
    torch.manual_seed(0)
    model = fold_batch_norm(timm.create_model(name).eval())
    dtype = torch.float32 if autocast else images.dtype
    network = model.to(images.device, dtype).to(memory_format=torch.channels_last)
    if MODES[mode]:
        network = torch.compile(network, mode=MODES[mode], dynamic=False)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        with torch.autocast("cuda", images.dtype, enabled=autocast):
            return network(images)

    for _ in range(3):  # compiles, records graphs, chooses kernels
        run()
    return run


def seconds(run: Call, repeats: int) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this benchmark needs a CUDA GPU\n")
    torch.backends.cudnn.benchmark = True

    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    print(f"{torch.cuda.get_device_name()}, {versions}, {options.dtype}, {options.size} pixels, medians")
    print("| batch | how | Ghost, ms | ResNet, ms | ratio | Ghost, photos/s | ResNet, photos/s |")
    print("|---:|---|---:|---:|---|---:|---:|")
    for batch in options.batch:
        images = torch.randn(batch, 3, options.size, options.size, device="cuda", dtype=getattr(torch, options.dtype))
        images = images.to(memory_format=torch.channels_last)
        for mode in options.mode:
            runs = calls(mode, images)
            repeats = max(1, int(0.05 / seconds(runs["resnet50"], 3)))
            rounds = [{name: seconds(run, repeats) for name, run in runs.items()} for _ in range(options.rounds)]
            ghost, resnet = (statistics.median(times[name] for times in rounds) for name in NETWORKS)
            low, middle, high = statistics.quantiles([times["resnet50"] / times[NETWORKS[0]] for times in rounds], n=4)
            print(
                f"| {batch} | {mode} | {1e3 * ghost:.3f} | {1e3 * resnet:.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) "
                f"| {batch / ghost:.0f} | {batch / resnet:.0f} |",
                flush=True,
            )
        cast, plain = call(NETWORKS[0], "eager", images, autocast=True), call(NETWORKS[0], "eager", images)
        pairs = [(seconds(cast, 10), seconds(plain, 10)) for _ in range(options.rounds)]
        ratio = statistics.median(one / other for one, other in pairs)
        slower = statistics.median(pair[0] for pair in pairs)
        print(
            f"| {batch} | eager by autocast | {1e3 * slower:.3f} | | Ghost's eager is {ratio:.3f} times as fast | | |"
        )


if __name__ == "__main__":
    main()
