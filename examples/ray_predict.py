"""Batch prediction over a large collection with Ray Data.

    pip install "ghost-resnet[ray]"
    python examples/ray_predict.py my_photos --model runs/mine --out answers --workers 2

reads photos, classifies them in a pool of actors, each with a model of its own, and writes Parquet files to the folder
`answers`: path, label, score, scores (most likely first), error. Order is not kept. A worker that dies is started again
and its photos are done again. On a cluster, run it on a node of it (Ray finds it through RAY_ADDRESS), with the photos
and the model where every node sees them.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pyarrow as pa
import ray

from ghost_resnet import GarbageClassifier

# Of a core, in Ray's books. Actors hold it to the end, and a read that finds no whole core waits for ever.
ACTOR_CPUS = 0.5

SCORES = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float64())]))


class Predictor:
    """What each actor does: classify a block of photos."""

    def __init__(self, model: str | None) -> None:
        self.classifier = GarbageClassifier.from_pretrained(model)

    def __call__(self, block: pa.Table) -> pa.Table:
        paths, contents = block["path"].to_pylist(), block["bytes"].to_pylist()
        answers = self.classifier.predict(contents)
        scores = [[{"label": label, "score": score} for label, score in answer.scores] for answer in answers]
        return pa.table(
            {
                "path": pa.array(paths, pa.string()),
                "label": pa.array([answer.label or None for answer in answers], pa.string()),
                "score": pa.array([None if answer.error else answer.score for answer in answers], pa.float64()),
                "scores": pa.array(scores, SCORES),
                "error": pa.array([answer.error and str(answer.error) for answer in answers], pa.string()),
            }
        )


def predict(photos: list[str], model: str | None, out: str, *, workers: int, predictor: Any = Predictor) -> None:
    """Classify photos and write Parquet files.

    Args:
        photos: Paths or folders, of any file system that Ray Data reads.
        model: What `GarbageClassifier.from_pretrained` takes.
        out: Folder of the Parquet files.
        workers: Number of actors, at most two for each core but one.
        predictor: The actors' class.
    """
    ray.init(ignore_reinit_error=True)
    cores = ray.cluster_resources().get("CPU", 0)
    if workers * ACTOR_CPUS > cores - 1:
        raise SystemExit(f"{workers} workers would leave no core of {cores:g} to read with: take fewer")
    (
        ray.data.read_binary_files(photos, include_paths=True)
        .map_batches(
            predictor,
            fn_constructor_args=(model,),
            batch_format="pyarrow",
            batch_size=64,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=ACTOR_CPUS,
        )
        .write_parquet(out)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--model", help="what GarbageClassifier.from_pretrained takes")
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    photos = [str(Path(path).resolve()) if Path(path).exists() else path for path in args.photos]
    model = str(Path(args.model).resolve()) if args.model and Path(args.model).exists() else args.model
    predict(photos, model, str(Path(args.out).resolve()), workers=args.workers)
