"""How long a training step of a Ghost-ResNet takes, and how much memory, beside the ResNet that it is made from.

    python benchmarks/train_step.py [--precision fp32 bf16] [--format nchw channels_last] [--batch 16 32 64]
        [--size 128 224] [--rounds 9] [--threads N] [--device cpu]
    python benchmarks/train_step.py --profile [...]

prints a Markdown table with a row for each combination. Both networks take steps by turns in one process, the first of
each round changing; a step is forward, cross-entropy, backward and SGD with momentum. `ms` are medians over the rounds,
`ratio` is the ResNet's time over the Ghost-ResNet's in the same round (above 1: the Ghost-ResNet is faster), its median
and quartiles. Peak memory is that of a child process that takes three steps with one network: resident memory on a
CPU, allocated memory on a GPU. `--profile` prints instead where the time of a step goes, by torch.profiler.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

NETWORKS = "ghost_resnet50", "resnet50"
PARTS = "forward", "backward", "optimizer"


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(measure(json.loads(options.child))))
        return
    print(describe(options) + "\n")
    if options.profile:
        print("| precision | format | size | batch | network | part | ms | share |\n|---|---|---|---|---|---|---|---|")
    else:
        parts = " | ".join(f"{part} ghost / resnet, ms" for part in PARTS)
        print(
            f"| precision | format | size | batch | step ghost / resnet, ms | ratio | {parts} | peak, MB | peak ratio |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
    for precision, memory_format, size, batch in itertools.product(
        options.precision, options.format, options.size, options.batch
    ):
        case = {"precision": precision, "format": memory_format, "size": size, "batch": batch}
        case |= {"device": options.device, "threads": options.threads, "rounds": options.rounds}
        start = f"| {precision} | {memory_format} | {size} | {batch} |"
        for row in profile_rows(case) if options.profile else [step_row(case)]:
            print(start, row, flush=True)


def step_row(case: dict[str, Any]) -> str:
    """The cells of a combination: times from one process with both networks, memory from one process each."""
    rounds = child({**case, "task": "time", "networks": NETWORKS})
    peaks = [child({**case, "task": "memory", "networks": [network]}) / 2**20 for network in NETWORKS]
    ratios = [sum(resnet) / sum(ghost) for ghost, resnet in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4)
    cells = [f"{milliseconds(sum(ghost) for ghost, _ in rounds)} / {milliseconds(sum(resnet) for _, resnet in rounds)}"]
    cells.append(f"**{middle:.3f}** ({low:.3f} to {high:.3f})")
    for part in range(len(PARTS)):
        cells.append(
            f"{milliseconds(ghost[part] for ghost, _ in rounds)} / {milliseconds(resnet[part] for _, resnet in rounds)}"
        )
    cells.append(f"{peaks[0]:.0f} / {peaks[1]:.0f}")
    cells.append(f"{peaks[0] / peaks[1]:.3f}")
    return " | ".join(cells) + " |"


def milliseconds(seconds: Iterator[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f}"


def profile_rows(case: dict[str, Any]) -> Iterator[str]:
    for network in NETWORKS:
        kinds = child({**case, "task": "profile", "networks": [network]})
        total = sum(kinds.values())
        for kind, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
            yield f"{network} | {kind} | {1000 * seconds:.1f} | {seconds / total:.1%} |"


def child(case: dict[str, Any]) -> Any:
    command = [sys.executable, __file__, "--child", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


# In a child process: the parent stays small and does not import torch -------------------------------------------------


def measure(case: dict[str, Any]) -> Any:
    """Do the case's task in this process."""
    import torch

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    steps = [Step(network, case) for network in case["networks"]]
    if case["task"] == "time":
        for step in steps:
            step(), step()
        rounds = []
        for number in range(case["rounds"]):
            order = range(len(steps)) if number % 2 else range(len(steps) - 1, -1, -1)
            rounds.append([times for _, times in sorted((i, steps[i]()) for i in order)])
        return rounds
    (step,) = steps
    if case["task"] == "profile":
        return profile(step, case["rounds"])
    for _ in range(3):
        step()
    if case["device"] == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Step:
    """A training step of a network on one batch of noise; gives the seconds of its parts."""

    def __init__(self, network: str, case: dict[str, Any]) -> None:
        import timm
        import torch

        import ghost_resnet  # noqa: F401  # timm knows its networks then

        self.device = torch.device(case["device"])
        order = torch.channels_last if case["format"] == "channels_last" else torch.contiguous_format
        self.model = timm.create_model(network).train().to(self.device, memory_format=order)
        images = torch.randn(case["batch"], 3, case["size"], case["size"])
        self.images = images.to(self.device, memory_format=order)
        self.targets = torch.randint(1000, (case["batch"],)).to(self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case["precision"]]
        self.autocast = torch.autocast(self.device.type, dtype, enabled=case["precision"] != "fp32")

    def __call__(self) -> list[float]:
        import torch

        times = [self.now()]
        with self.autocast:
            loss = torch.nn.functional.cross_entropy(self.model(self.images), self.targets)
        times.append(self.now())
        loss.backward()
        times.append(self.now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(self.now())
        return [end - start for start, end in itertools.pairwise(times)]

    def now(self) -> float:
        import time

        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def profile(step: Step, rounds: int) -> dict[str, float]:
    """Seconds a step in each kind of work."""
    import torch
    from torch.profiler import ProfilerActivity

    step(), step()
    cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(rounds):
            step()
    kinds: dict[str, float] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.key.startswith("aten::"):
            name = kind(event.key.removeprefix("aten::"), event.input_shapes)
            kinds[name] = kinds.get(name, 0) + time / 1e6 / rounds
    return kinds


def kind(operator: str, shapes: list[Any]) -> str:
    """What an operator of torch belongs to, told from its name and the shapes of its inputs."""
    backward = "backward" in operator
    if "conv" in operator:
        weights = shapes[2:3] if backward else shapes[1:2]
        depthwise = any(len(shape) == 4 and shape[1] == 1 for shape in weights)
        return f"{'depthwise' if depthwise else 'other'} convolutions, {'backward' if backward else 'forward'}"
    if "batch_norm" in operator:
        return f"batch norms, {'backward' if backward else 'forward'}"
    if operator == "cat":
        return "concatenation"
    if operator.startswith("copy_"):
        return "copies"
    if operator in ("add_", "add", "clamp_min_", "relu_", "threshold_backward"):
        return "ReLU and addition"
    return "optimizer" if operator.startswith("_foreach") else "rest"


def describe(options: argparse.Namespace) -> str:
    code = (
        "import torch; print(torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), "
        "torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU', sep=', ')"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return f"torch, threads by default, CPU, GPU: {told}; {options.device}, {options.rounds} rounds"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--format", nargs="+", default=["nchw", "channels_last"], choices=["nchw", "channels_last"])
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--size", nargs="+", type=int, default=[128, 224])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves torch its default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
