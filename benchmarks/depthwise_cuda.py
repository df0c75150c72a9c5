"""Depthwise convolutions of a Ghost-ResNet on a CUDA GPU: cuDNN against torch's own kernel.

    python benchmarks/depthwise_cuda.py --model ghost_resnet50 --batch 64 --dtype bfloat16 [--backward]

Every path is timed once a round, in turns, and the median of the rounds is reported. `docs/cuda.md` says
when torch takes which path by itself.
"""

import argparse
import contextlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import timm
import torch
from torch import nn

import ghost_resnet  # noqa: F401

NCHW, NHWC = torch.contiguous_format, torch.channels_last
PATHS = {  # name: memory format of the input, whether cuDNN is on
    "cuDNN": (NHWC, True),
    "native": (NCHW, False),
    "native from channels_last": (NHWC, False),
}


class Depthwise(NamedTuple):
    """A depthwise convolution and the size of its input."""

    in_channels: int
    out_channels: int
    kernel_size: int
    dilation: int
    size: tuple[int, ...]


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def depthwise_of(name: str, size: int) -> Counter[Depthwise]:
    """The depthwise convolutions of a network, and how often each occurs. Computes nothing."""
    model = timm.create_model(name, device="meta").eval()
    found: Counter[Depthwise] = Counter()

    def note(conv: nn.Conv2d, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> None:
        shape = conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.dilation[0]
        found[Depthwise(*shape, tuple(inputs[0].shape[2:]))] += 1

    for module in filter(is_depthwise, model.modules()):
        module.register_forward_hook(note)
    model(torch.empty(1, 3, size, size, device="meta"))
    return found


@contextlib.contextmanager
def cudnn(enabled: bool) -> Iterator[None]:
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, enabled
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def microseconds(step: Callable[[], object], repeats: int) -> float:
    """GPU time of one step. The GPU first waits until all steps are queued, so launching is not timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end) / repeats


def interleaved(steps: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    """Median time of each step; the steps take turns."""
    for step in steps.values():
        microseconds(step, repeats)  # warm-up: cuDNN chooses its algorithm, the clocks rise
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(microseconds(step, repeats))
    return {name: statistics.median(measured) for name, measured in times.items()}


def convolution_step(
    layer: Depthwise, batch: int, dtype: torch.dtype, backward: bool, path: str
) -> Callable[[], object]:
    memory_format, enabled = PATHS[path]
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        padding=layer.dilation * (layer.kernel_size // 2),
        dilation=layer.dilation,
        groups=layer.in_channels,
        bias=False,
        device="cuda",
        dtype=dtype,
    )
    x = torch.randn(batch, layer.in_channels, *layer.size, device="cuda", dtype=dtype)
    x = x.to(memory_format=memory_format).requires_grad_(backward)

    def step() -> None:
        with cudnn(enabled), torch.set_grad_enabled(backward):
            out = conv(x)
            if backward:  # within the same setting: the backward pass chooses its kernel anew
                torch.autograd.grad(out, (x, conv.weight), torch.ones_like(out))

    return step


def network_step(
    name: str, size: int, batch: int, dtype: torch.dtype, depthwise_on_cudnn: bool
) -> Callable[[], object]:
    """Inference of a whole network, channels_last, all else on cuDNN."""
    model = timm.create_model(name).eval().to("cuda", memory_format=NHWC)
    for module in filter(is_depthwise, model.modules()):
        forward = module.forward

        def with_setting(x: torch.Tensor, forward: Callable = forward) -> torch.Tensor:
            with cudnn(depthwise_on_cudnn):
                return forward(x)

        module.forward = with_setting
    x = torch.randn(batch, 3, size, size, device="cuda").to(memory_format=NHWC)

    @torch.inference_mode()
    def step() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            model(x)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ghost_resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--backward", action="store_true", help="time forward and backward of the convolutions")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=20, help="steps in a round")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this benchmark needs a CUDA GPU\n")
    dtype = getattr(torch, args.dtype)
    torch.backends.cudnn.benchmark = True

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, "
        f"{args.model}, batch {args.batch}, {args.dtype}, {'forward + backward' if args.backward else 'forward'}"
    )
    print(f"| convolution | times | {' | '.join(f'{path}, us' for path in PATHS)} |")
    print("|---|---|" + "---|" * len(PATHS))
    total = dict.fromkeys(PATHS, 0.0)
    for layer, count in depthwise_of(args.model, args.size).items():
        steps = {path: convolution_step(layer, args.batch, dtype, args.backward, path) for path in PATHS}
        times = interleaved(steps, args.rounds, args.repeats)
        for path in PATHS:
            total[path] += count * times[path]
        shape = f"{layer.in_channels} to {layer.out_channels}, {layer.size[0]} x {layer.size[1]}"
        print(f"| {shape} | {count} | {' | '.join(f'{times[path]:.1f}' for path in PATHS)} |")
    print(f"| all | | {' | '.join(f'{total[path]:.1f}' for path in PATHS)} |")

    steps = {
        f"depthwise on {'cuDNN' if on else 'native'}": network_step(args.model, args.size, args.batch, dtype, on)
        for on in (True, False)
    }
    for path, time in interleaved(steps, args.rounds, args.repeats).items():
        print(f"whole network, inference, {path}: {time / 1000:.3f} ms a batch")


if __name__ == "__main__":
    main()
