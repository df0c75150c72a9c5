"""Why all of PyTorch's work is done in one thread: one photo's time, alone and after a second thread has computed too.

python benchmarks/one_thread.py [--rounds 40]
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import timm
import torch

import ghost_resnet


def main() -> None:
    """Time the same call three times over."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    first, second = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def prepare() -> tuple[torch.nn.Module, torch.Tensor]:
        model = ghost_resnet.fold_batch_norm(timm.create_model("ghost_resnet50"))
        return model.to(memory_format=torch.channels_last), torch.rand(1, 224, 224, 3).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def milliseconds() -> float:
        model(image)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            model(image)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    model, image = first.submit(prepare).result()
    print(f"{torch.get_num_threads()} threads a pool, one photo of 224 x 224, fp32, median of {rounds}")
    print(f"one thread has ever computed:  {first.submit(milliseconds).result():6.1f} ms")
    print(f"a second one computes:         {second.submit(milliseconds).result():6.1f} ms")
    print(f"the first one again:           {first.submit(milliseconds).result():6.1f} ms")
    second.shutdown()
    print(f"the second one has ended:      {first.submit(milliseconds).result():6.1f} ms")


if __name__ == "__main__":
    main()
