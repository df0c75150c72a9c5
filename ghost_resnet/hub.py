"""Weights: from a source that a user names to verified files, to a model, and back to a folder or a hub.

A source is one of

* a tag of this package's manifest, `ghost_resnet50_cifar.report`, or an architecture for its first tag;
* a run folder (`model.safetensors` beside `config.json`), an exported one (`model.onnx` or `model.xml` in its place),
  or `local-dir:FOLDER`;
* a `.safetensors` file with `config.json` beside it, or an exported file, which carries its configuration;
* `hf-hub:owner/repo@revision`, a repository in timm's format whose architecture is one of this package's.

Every door (timm's `pretrained=True`, `torch.hub`, `GarbageClassifier.from_pretrained`, the command line) goes
through `resolve`. Weights are safetensors or an exported graph, never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .errors import (
    ConfigError,
    DownloadError,
    IntegrityError,
    MissingExtraError,
    SourceError,
    UploadError,
    WeightsError,
)
from .extras import require
from .files import atomic_path, write_text

if TYPE_CHECKING:
    import torch
    from timm.models._pretrained import PretrainedCfg
    from torch import nn

_logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the manifest and the embedded weights."""

EMBEDDED_CONFIG = "ghost_resnet_config"
"""Under this name an exported file carries its `config.json`: metadata in ONNX, rt_info in OpenVINO."""

_WEIGHTS_NAME = "model.safetensors"
_CONFIG_NAME = "config.json"
_CONFIG_LIMIT = 16 * 2**20  # bytes; ImageNet-21k's labels with descriptions need two million
_SUFFIXES = (".safetensors", ".onnx", ".xml")  # torch's own and the exported runtimes'
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


@dataclass(frozen=True)
class ModelFiles:
    """What a source resolves to: files on this disk, verified where there is something to verify against.

    Attributes:
        weights: The weights file.
        config: Content of `config.json` in timm's format.
        source: What the user gave.
    """

    weights: Path
    config: dict[str, Any]
    source: str

    @property
    def architecture(self) -> str:
        """Name of the network in timm's registry."""
        return self.config["architecture"]

    @property
    def num_classes(self) -> int:
        """Outputs of the network; may be more than there are labels."""
        return self.config.get("num_classes", self.config["pretrained_cfg"].get("num_classes"))

    @property
    def temperature(self) -> float:
        """What the outputs are divided by before the softmax."""
        return self.config.get("temperature", 1.0)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the outputs."""
        names = self.config.get("label_names") or self.config["pretrained_cfg"].get("label_names") or ()
        return tuple(names)


@dataclass(frozen=True)
class Entry:
    """One tag of the manifest.

    Attributes:
        architecture: Name of the network in timm's registry.
        num_classes: Outputs of the network.
        classes: Names of the classes; may be fewer than `num_classes`.
        parameters: Parameter count of the network.
        file: Name of the weights file below `WEIGHTS`, whether or not this installation has it.
        size: Its size in bytes.
        sha256: Its hash.
        hf_hub_id: `owner/repo` that holds the same file as `model.safetensors`, if any does.
        revision: Commit or git tag of that repository.
        preprocessing: timm's data configuration: `input_size`, `mean` and so on.
        temperature: What the outputs are divided by before the softmax, if calibrated.
        metrics: What was measured, with the list of photos it was measured on.
        license: SPDX identifier.
        origin: How the weights came to be.
        date: Day they were made, ISO format.
    """

    architecture: str
    num_classes: int
    classes: list[str]
    parameters: int
    file: str
    size: int
    sha256: str
    hf_hub_id: str | None
    revision: str | None
    preprocessing: dict[str, Any]
    temperature: float | None
    metrics: dict[str, Any]
    license: str
    origin: str
    date: str

    @property
    def embedded(self) -> Path:
        """Where the weights file is if this installation has it."""
        return WEIGHTS / self.file

    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's default configuration of these weights; it names a source if there is one."""
        revision = f"@{self.revision}" if self.revision else ""
        return {
            **_as_tuples(self.preprocessing),
            "num_classes": self.num_classes,
            "label_names": tuple(self.classes),
            "license": self.license,
            "description": self.origin,
            "file": str(self.embedded) if self.embedded.is_file() else None,
            "hf_hub_id": self.hf_hub_id and self.hf_hub_id + revision,
        }

    def config(self, tag: str) -> dict[str, Any]:
        """Content of `config.json` in timm's format."""
        cfg = self.pretrained_cfg()
        for name in ("num_classes", "label_names", "file", "hf_hub_id"):
            del cfg[name]
        cfg |= {"tag": tag.partition(".")[2], "first_conv": "conv1", "classifier": "fc"}
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "label_names": list(self.classes),
            "metrics": self.metrics,
            **({} if self.temperature is None else {"temperature": self.temperature}),
            "pretrained_cfg": cfg,
        }


def _as_tuples(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration from JSON as timm has it in Python."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in cfg.items()}


def manifest() -> dict[str, Entry]:
    """Return the weights that this package knows, by tag."""
    entries = json.loads((WEIGHTS / "manifest.json").read_text(encoding="utf-8"))
    return {tag: Entry(**entry) for tag, entry in entries.items()}


def default_tag() -> str:
    """The weights that are meant when none are named: the manifest's first.

    Raises:
        SourceError: This version ships no weights.
    """
    if not (tags := list(manifest())):
        raise SourceError("no weights come with this version: name a run folder, a file or a hub repository")
    return tags[0]


def resolve(source: str | Path, *, cache_dir: str | Path | None = None, prefer: str = ".safetensors") -> ModelFiles:
    """Find the files that a source names, download them if they are nowhere here, and verify them.

    A tag is looked for in the package, then in the local cache, then on the hub. Its full sha256 is checked
    each time. Files of a hub repository are checked against the hash that the hub announced.

    Args:
        source: Tag, run folder, weights file, `local-dir:FOLDER` or `hf-hub:owner/repo@revision`.
        cache_dir: Cache of downloads in place of Hugging Face's (`HF_HOME`).
        prefer: Which file of a folder to take if it has several: ".safetensors", ".onnx" or ".xml".

    Returns:
        The weights file and the configuration that goes with it.

    Raises:
        SourceError: Nothing by that name.
        IntegrityError: A file is not what it should be. It has been moved aside.
        DownloadError: The hub can't be reached, refuses, or has no such file.
        ConfigError: `config.json` can't be used.
    """
    name = str(source)
    if isinstance(source, str) and (tag := _tag(name)):
        return _resolve_tag(tag, cache_dir)
    if name.startswith("hf-hub:"):
        return _resolve_hub(name, cache_dir)
    return _resolve_local(name, prefer)


def _tag(name: str) -> str | None:
    """The manifest's tag that `name` means: itself, or an architecture's first."""
    return next((tag for tag, entry in manifest().items() if name in (tag, entry.architecture)), None)


def _resolve_tag(tag: str, cache_dir: str | Path | None) -> ModelFiles:
    entry = manifest()[tag]
    repair = "pip install --force-reinstall --no-deps WHERE_GHOST_RESNET_CAME_FROM"
    if entry.hf_hub_id:
        repair = f"ghost-resnet hub download {tag}"
    path = local_file(tag, cache_dir=cache_dir)
    if path is None:
        if entry.hf_hub_id is None:
            raise SourceError(
                f"the weights of {tag} are not here: expected {entry.embedded}, and no hub has them; run `{repair}`"
            )
        path = _download(entry.hf_hub_id, entry.revision, _WEIGHTS_NAME, cache_dir)
    _verify(path, entry.sha256, repair)
    return ModelFiles(path, entry.config(tag), tag)


def local_file(tag: str, *, cache_dir: str | Path | None = None) -> Path | None:
    """Return where a tag's weights are on this disk, unverified: in the package, else in the cache, else None."""
    entry = manifest()[tag]
    if entry.embedded.is_file():
        return entry.embedded
    if entry.hf_hub_id is None:
        return None
    from huggingface_hub import try_to_load_from_cache  # late, as it takes as long to import as the rest

    cached = try_to_load_from_cache(entry.hf_hub_id, _WEIGHTS_NAME, cache_dir=cache_dir, revision=entry.revision)
    return Path(cached) if isinstance(cached, str) else None


def _resolve_hub(source: str, cache_dir: str | Path | None) -> ModelFiles:
    repo, _, revision = source.removeprefix("hf-hub:").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise SourceError(f"expected hf-hub:owner/repo or hf-hub:owner/repo@revision, got {source!r}")
    paths: list[Path] = []
    for name in (_CONFIG_NAME, _WEIGHTS_NAME):
        # the weights come from the commit, snapshots/COMMIT in the cache, that the configuration came from
        path = _download(repo, paths[0].parent.name if paths else revision or None, name, cache_dir)
        if path.is_symlink():  # to a blob that is named by the hash that the hub announced
            _verify(path, Path(path.readlink()).name, f"ghost-resnet hub download {source}")
        else:
            _logger.warning("%s can't be verified: this cache has no links to its files' hashes", path)
        paths.append(path)
    config = _read_config(paths[0])
    if not config["architecture"].startswith("ghost_resnet"):
        raise ConfigError(
            f"{source}: expected an architecture of this package (ghost_resnet...), got "
            f"{config['architecture']!r}; open it by timm.create_model({source!r}, pretrained=True)"
        )
    return ModelFiles(paths[1], config, source)


def _resolve_local(source: str, prefer: str) -> ModelFiles:
    path = Path(source.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        names = [f"model{suffix}" for suffix in dict.fromkeys((prefer, *_SUFFIXES))]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise SourceError(f"expected {_WEIGHTS_NAME} in the folder {path}, or model.onnx or model.xml, got none")
        path = found[0]
    elif not path.is_file():
        known = ", ".join(manifest()) or "none yet"
        raise SourceError(
            f"{source!r} is no tag (known: {known}), folder or file; a hub repository is hf-hub:owner/repo"
        )
    if path.suffix in _PICKLES:
        raise SourceError(
            f"expected a .safetensors file, got {path}, which may hold a pickle; weights of the report's own "
            f"code are converted by `ghost-resnet hub convert {path} --out FOLDER --labels A,B,...`"
        )
    if path.suffix not in _SUFFIXES:
        raise SourceError(f"expected a file that ends with one of {', '.join(_SUFFIXES)}, got {path}")
    config = path.parent / _CONFIG_NAME
    if path.suffix != ".safetensors" and not config.is_file():
        return ModelFiles(path, _embedded_config(path), source)
    return ModelFiles(path, _read_config(config), source)


def _embedded_config(path: Path) -> dict[str, Any]:
    """The configuration that an exported file carries."""
    try:
        if path.suffix == ".onnx":
            ort = require("onnxruntime", "onnx")
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level = 3
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            text = session.get_modelmeta().custom_metadata_map.get(EMBEDDED_CONFIG)
        else:
            network = require("openvino", "openvino").Core().read_model(path)
            text = network.get_rt_info(EMBEDDED_CONFIG).value if network.has_rt_info(EMBEDDED_CONFIG) else None
    except MissingExtraError:
        raise
    except Exception as error:  # of the two libraries' own kinds
        raise WeightsError(f"{path} can't be read: {_summary(error)[:300]}") from error
    if text is None:
        raise ConfigError(
            f"expected {path.parent / _CONFIG_NAME}, or {EMBEDDED_CONFIG!r} in the metadata of {path.name}"
        )
    return _parse_config(text, path)


def _download(repo: str, revision: str | None, name: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    at = f"{repo}@{revision}" if revision else repo
    outcome: Future[str] = Future()

    def download() -> None:
        try:
            outcome.set_result(
                hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir, library_name="ghost-resnet")
            )
        except BaseException as error:
            outcome.set_exception(error)

    # The client waits without end for a server that sends a byte now and then, or the same half of a file
    # again and again. A thread of our own, since an executor's would be waited for when the program ends.
    deadline = float(os.environ.get("GHOST_RESNET_DOWNLOAD_TIMEOUT", 3600))
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(deadline)
    if thread.is_alive():
        raise DownloadError(
            f"can't get {name} of {at} from the hub: not done after {deadline:g} seconds; try again, or "
            "raise the environment variable GHOST_RESNET_DOWNLOAD_TIMEOUT"
        )
    try:
        return Path(outcome.result())
    except Exception as error:  # the client's own, its HTTP library's (which one varies) and the system's
        raise DownloadError(f"can't get {name} of {at} from the hub: {_summary(error)}; {_remedy(error)}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _summary(error: BaseException) -> str:
    """The first line of an error and of what caused it."""
    lines: list[str] = []
    for cause in _chain(error):
        line = str(cause).strip().partition("\n")[0] or type(cause).__name__
        if not any(line in known for known in lines):
            lines.append(line)
    return "; because ".join(lines)


def _remedy(error: BaseException) -> str:
    statuses = {getattr(getattr(cause, "response", None), "status_code", None) for cause in _chain(error)}
    if statuses & {401, 403}:
        return "if it is private or gated, set HF_TOKEN or run `hf auth login`"
    if 404 in statuses:
        return "check the names of owner, repository and revision, and HF_TOKEN if it is private"
    return "check the connection (HTTPS_PROXY; HF_ENDPOINT for a mirror), disk (HF_HOME) and HF_HUB_OFFLINE"


def _verify(path: Path, expected: str, repair: str) -> None:
    """Check a file against its sha256, or its git hash if that is what the hub gave; move a bad one aside."""
    try:
        if _SHA256.fullmatch(expected):
            got = _digest(path, hashlib.sha256())
        else:
            got = _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))
    except OSError as error:  # such as one that another process has just found bad and moved aside
        raise WeightsError(f"expected to read {path}, got {error}; repair: {repair}") from error
    if got == expected:
        return
    bad = path.resolve()
    aside: Path | None = None
    try:
        aside = bad.replace(bad.with_name(f"{bad.name}.bad-{got[:8]}"))
    except OSError as error:
        _logger.warning("%s could not be moved aside: %s", bad, error)
    raise IntegrityError(path, expected, got, repair, aside)


def _digest(path: Path, hasher: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"expected {path} beside the weights, got none")
    if path.stat().st_size > _CONFIG_LIMIT:
        raise ConfigError(f"{path}: expected at most {_CONFIG_LIMIT} bytes, got {path.stat().st_size}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected JSON, got {_summary(error)}") from error
    return _parse_config(text, path)


def _parse_config(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON, got {_summary(error)}") from error
    _check_config(config, path)
    return config


def _check_config(config: Any, path: Path) -> None:
    def need(ok: bool, expected: str, got: Any) -> None:
        if not ok:
            raise ConfigError(f"{path}: expected {expected}, got {str(got)[:200]!r}")

    need(isinstance(config, dict), "timm's config.json, a JSON object", config)
    architecture = config.get("architecture")
    need(
        isinstance(architecture, str) and re.fullmatch(r"\w+", architecture) is not None,
        "the name of a timm architecture under 'architecture'",
        architecture,
    )
    cfg = config.get("pretrained_cfg")
    need(isinstance(cfg, dict), "an object under 'pretrained_cfg'", cfg)
    num_classes = config.get("num_classes", cfg.get("num_classes"))
    need(type(num_classes) is int and num_classes >= 0, "a count under 'num_classes'", num_classes)
    labels = config.get("label_names") or cfg.get("label_names") or []
    need(
        isinstance(labels, list) and all(isinstance(name, str) for name in labels),
        "a list of names under 'label_names'",
        labels,
    )
    need(len(labels) <= num_classes, f"at most num_classes={num_classes} label names", len(labels))
    args = config.get("model_args", {})
    need(isinstance(args, dict), "an object under 'model_args'", args)
    temperature = config.get("temperature", 1.0)
    need(_is_number(temperature) and temperature > 0, "a positive number under 'temperature'", temperature)
    size = cfg.get("input_size", [3, 224, 224])
    need(
        isinstance(size, list) and len(size) == 3 and all(type(side) is int and 0 < side <= 4096 for side in size),
        "channels, height and width of at most 4096 under 'input_size'",
        size,
    )
    for name in ("mean", "std"):
        values = cfg.get(name, [0.5])
        need(isinstance(values, list) and all(map(_is_number, values)), f"numbers under {name!r}", values)
    crop = cfg.get("crop_pct", 1.0)
    need(_is_number(crop) and 0 < crop <= 1, "a share under 'crop_pct'", crop)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def load_model(source: str | Path | ModelFiles, *, num_classes: int | None = None, **model_kwargs: Any) -> nn.Module:
    """Load a model in fp32 and evaluation mode.

    The whole file must fit the network that its configuration describes. Only then may the caller change the
    network: another `num_classes` gets a fresh head, and a log line says so; another `in_chans` gets timm's
    adaptation of the first convolution.

    Args:
        source: Anything that `resolve` takes, or what it returned.
        num_classes: Outputs, if others than the file has.
        model_kwargs: Arguments of the network, such as `in_chans`, `drop_rate`, `features_only`.

    Returns:
        The model; `model.pretrained_cfg` has the preprocessing and, under `label_names`, the labels.

    Raises:
        WeightsError: The file is damaged, has values that are not finite, or does not fit the network.
        ConfigError: `config.json` describes a network that can't be built.
        GhostResNetError: What `resolve` raises.
    """
    import timm
    import torch

    files = source if isinstance(source, ModelFiles) else resolve(source)
    if files.weights.suffix != ".safetensors":
        raise WeightsError(f"expected a .safetensors file to load a model from, got {files.weights}")
    cfg, args = _network(files)
    _check_fit(files, cfg, args)
    args.update(model_kwargs)
    if num_classes is not None:
        args["num_classes"] = num_classes
    _say_if_head_changes(files, args)
    try:
        model = timm.create_model(
            files.architecture,
            pretrained=True,
            pretrained_cfg=cfg,
            pretrained_cfg_overlay={"file": str(files.weights)},
            **args,
        )
    except RuntimeError as error:
        raise WeightsError(f"{files.weights} does not fit {files.architecture}({args}): {error}") from error
    model.pretrained_cfg.pop("file", None)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{files.weights}: expected finite numbers, got NaN or infinity in {name!r}")
    return model.eval()


def pretrained_overlay(
    variant: str, cfg: PretrainedCfg, *, cache_dir: str | Path | None = None, **model_kwargs: Any
) -> dict[str, Any]:
    """Resolve what timm's `pretrained=True` asks for, in the form of an overlay of timm's configuration.

    Args:
        variant: Name of the network.
        cfg: timm's configuration of the weights: of a tag, or of `hf-hub:` or `local-dir:` names.
        cache_dir: Cache of downloads in place of Hugging Face's.
        model_kwargs: The other arguments of the network, for a word on its head.

    Returns:
        What to change in `cfg` so that timm loads the verified file; empty if `cfg` names a file of the
        caller's own, or no weights at all.

    Raises:
        GhostResNetError: What `resolve` and `load_model` raise.
    """
    tag = f"{variant}.{cfg.tag}"
    entry = manifest().get(tag)
    if cfg.source in ("hf-hub", "local-dir"):
        files = resolve(f"{cfg.source}:{cfg.hf_hub_id or cfg.file}", cache_dir=cache_dir)
        _check_fit(files, *_network(files))
    elif entry and not cfg.state_dict and not cfg.url and cfg.file in (None, str(entry.embedded)):
        files = resolve(tag, cache_dir=cache_dir)
    else:
        return {}
    if not model_kwargs.get("features_only"):
        _say_if_head_changes(files, model_kwargs)
    return {"file": str(files.weights), "source": None}


def _say_if_head_changes(files: ModelFiles, model_kwargs: Mapping[str, Any]) -> None:
    wanted = model_kwargs.get("num_classes", files.num_classes)
    if wanted != files.num_classes:
        _logger.warning(
            "%s has %d outputs, %d are wanted: its head is left out, and the new one is untrained",
            files.source,
            files.num_classes,
            wanted,
        )


def _network(files: ModelFiles) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's pretrained_cfg and the network's arguments, without what would make timm open a file."""
    import timm
    from timm.models import build_model_with_cfg, is_model

    if not is_model(files.architecture):
        raise ConfigError(f"{files.source}: timm has no architecture {files.architecture!r}")
    cfg = {
        **_as_tuples(files.config["pretrained_cfg"]),
        "architecture": files.architecture,
        "num_classes": files.num_classes,
        "label_names": files.labels,
        **dict.fromkeys(("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")),
    }
    args = {**files.config.get("model_args", {}), "num_classes": files.num_classes}
    factory = {*signature(timm.create_model).parameters, *signature(build_model_with_cfg).parameters}
    if taken := sorted(args.keys() & (factory | {"features_only", "pruned", "device", "dtype"})):
        raise ConfigError(f"{files.source}: expected arguments of the network in 'model_args', got {taken}")
    for name, value in args.items():
        if name != "num_classes" and not _is_modest(value):
            raise ConfigError(f"{files.source}: expected a modest {name!r} in 'model_args', got {value!r:.200}")
    return cfg, args


def _is_modest(value: Any, nested: bool = False) -> bool:
    """Whether a network's argument is a plain value that can't make anything endless by itself."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return not nested and len(value) <= 32 and all(_is_modest(item, nested=True) for item in value)
    if isinstance(value, int | float):
        return abs(value) <= (1024 if nested else 4096)
    return value is None or (isinstance(value, str) and len(value) <= 64)


def _check_fit(files: ModelFiles, cfg: dict[str, Any], args: dict[str, Any]) -> None:
    """Compare the file's names, shapes and types with the network's before anything is allocated."""
    import timm
    import torch

    header = list(_header(files.weights))
    try:
        # a block takes the parameters of the layers that it then replaces
        with torch.device("meta"), _at_most_parameters(4 * len(header)):
            network = timm.create_model(files.architecture, pretrained_cfg=cfg, **args).state_dict()
    except Exception as error:  # the arguments come from a file: timm and torch may say anything
        raise ConfigError(
            f"{files.source}: can't build {files.architecture}({args}): {_summary(error)[:300]}"
        ) from error
    expected = {name: (tuple(t.shape), t.is_floating_point()) for name, t in network.items()}
    got = {name: (shape, dtype in _FLOATS) for name, shape, dtype in header}
    wrong = [
        *(f"{name!r} is missing" for name in expected.keys() - got.keys()),
        *(f"{name!r} is not in the network" for name in got.keys() - expected.keys()),
        *(
            f"{name!r} has shape {got[name][0]} and {'a' if got[name][1] else 'no'} floating type, "
            f"expected {expected[name][0]} and {'a' if expected[name][1] else 'no'} floating type"
            for name in expected.keys() & got.keys()
            if expected[name] != got[name]
        ),
    ]
    if wrong:
        some = "; ".join(sorted(wrong)[:5]) + ("; ..." if len(wrong) > 5 else "")
        raise WeightsError(
            f"{files.weights} does not fit {files.architecture} with {files.num_classes} classes: "
            f"{len(wrong)} of {len(expected)} tensors differ: {some}"
        )


@contextmanager
def _at_most_parameters(limit: int) -> Iterator[None]:
    """Stop a network whose arguments would make its construction endless; other threads' networks are let be."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    thread, count = threading.get_ident(), 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise ConfigError("the network has far more parameters than the file has tensors")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of each tensor, from a safetensors file's header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_slice(name)
                yield name, tuple(tensor.get_shape()), tensor.get_dtype()
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no whole safetensors file: {error}") from error


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    labels: Sequence[str],
    preprocessing: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    tag: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `model.safetensors`, `config.json` in timm's format and a model card, each wholly or not at all.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` opens the folder. Other files in it stay.

    Args:
        model: A model that `timm.create_model` made.
        folder: Where to; made if it is not there.
        labels: Names of the classes, in the order of the outputs; may be fewer than the outputs.
        preprocessing: timm's data configuration (`input_size`, `mean`, `std`, `crop_pct`, `crop_mode`,
            `interpolation`), if it differs from the model's.
        metrics: What was measured, for the configuration and the card.
        temperature: What the outputs are divided by before the softmax (calibration).
        tag: Name of these weights. Without it the configuration names none: they are no longer the tag that
            training may have started from.
        dtype: Type to store floating-point tensors in, such as `torch.float16`.

    Returns:
        The folder.

    Raises:
        WeightsError: A value is not finite, or isn't after the conversion to `dtype`.
        ConfigError: More labels than outputs.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"expected finite numbers to save, got NaN or infinity in {name!r} as {tensor.dtype}")
        state[name] = tensor.contiguous()  # a channels_last model's are not
    config = _config_of(model, labels, preprocessing, tag)
    if metrics:
        config["metrics"] = dict(metrics)
    if temperature is not None:
        config["temperature"] = float(temperature)
    _check_config(config, folder / _CONFIG_NAME)
    with atomic_path(folder / _WEIGHTS_NAME) as path:
        save_file(state, path, metadata={"format": "pt"})
    write_text(folder / _CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    write_text(folder / "README.md", _card(config))
    return folder


def set_temperature(folder: str | Path, temperature: float) -> None:
    """Set what the outputs of the classifier in a folder are divided by before the softmax.

    Raises:
        ConfigError: It is not above 0, or the folder holds no classifier.
    """
    path = Path(folder) / _CONFIG_NAME
    config = {**_read_config(path), "temperature": temperature}
    _check_config(config, path)
    write_text(path, json.dumps(config, indent=2) + "\n")


def _config_of(
    model: nn.Module, labels: Sequence[str], preprocessing: Mapping[str, Any] | None, tag: str | None
) -> dict[str, Any]:
    from timm.models._hub import save_config_for_hf

    with TemporaryDirectory() as folder:
        path = Path(folder) / _CONFIG_NAME
        save_config_for_hf(
            model,
            str(path),
            model_config={"label_names": list(labels), "pretrained_cfg": {"tag": tag}},
            data_config=dict(preprocessing or {}),
        )
        config = json.loads(path.read_text(encoding="utf-8"))
    config["pretrained_cfg"].pop("label_names", None)  # timm reads the outer one; two could contradict
    if tag is None:
        for name in ("tag", "description"):
            config["pretrained_cfg"].pop(name, None)
    del config["model_args"]["num_classes"]  # said above; transformers refuses to hear it twice
    return config


def _card(config: dict[str, Any]) -> str:
    """A model card in Hugging Face's format."""
    from huggingface_hub import ModelCard, ModelCardData

    cfg = config["pretrained_cfg"]
    data = ModelCardData(
        license=cfg.get("license"),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "ghost-resnet"],
    )
    tag = f".{cfg['tag']}" if cfg.get("tag") else ""
    rows = [
        ("Architecture", f"`{config['architecture']}`"),
        ("Classes", ", ".join(config.get("label_names") or []) or config["num_classes"]),
        (
            "Input",
            " × ".join(map(str, cfg["input_size"])) + f", {cfg['interpolation']}, crop {cfg['crop_pct']}",
        ),
        ("Mean, std", f"{list(cfg['mean'])}, {list(cfg['std'])}"),
        *((name, value) for name, value in config.get("metrics", {}).items() if not isinstance(value, dict | list)),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    text = f"""---
{data.to_yaml()}
---
# {config["architecture"]}{tag}

{cfg.get("description") or "An image classifier trained with ghost-resnet."}

| | |
|---|---|
{table}

```python
import ghost_resnet, timm  # importing ghost_resnet registers its networks

model = timm.create_model("hf-hub:OWNER/REPO", pretrained=True)  # or "local-dir:FOLDER"
```
"""
    return str(ModelCard(text))


def push_to_hub(
    source: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a Ghost-ResNet",
) -> str:
    """Upload a model to a hub: the weights byte by byte, their configuration and their card.

    Args:
        source: What `resolve` takes, such as a run folder or a tag.
        repo_id: `owner/name`; made if it is not there.
        private: Whether a new repository is private.
        revision: Branch to upload to; `main` if None.
        message: The commit's message.

    Returns:
        Address of the commit.

    Raises:
        UploadError: The hub can't be reached or refuses.
        GhostResNetError: What `resolve` and `load_model` raise.
    """
    from huggingface_hub import HfApi

    files = resolve(source)
    _check_fit(files, *_network(files))
    with TemporaryDirectory() as folder:
        staged = Path(folder)
        shutil.copyfile(files.weights, staged / _WEIGHTS_NAME)
        write_text(staged / _CONFIG_NAME, json.dumps(files.config, indent=2) + "\n")
        card = files.weights.parent / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else _card(files.config)
        write_text(staged / "README.md", text.replace("OWNER/REPO", repo_id))
        for name in ("metrics.json", "recipe.toml"):
            if (files.weights.parent / name).is_file():
                shutil.copyfile(files.weights.parent / name, staged / name)
        api = HfApi(library_name="ghost-resnet")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=staged, revision=revision, commit_message=message)
        except Exception as error:  # as in _download
            raise UploadError(f"can't upload {source} to {repo_id}: {_summary(error)}; {_remedy(error)}") from error
    return str(commit.commit_url)


def embed(
    source: str | Path,
    tag: str,
    *,
    metrics: Mapping[str, Any],
    origin: str,
    license: str = "apache-2.0",
    hf_hub_id: str | None = None,
    revision: str | None = None,
    made: str | None = None,
) -> Entry:
    """Take a model into this package (for its maintainers): an fp16 file and an entry of the manifest.

    An entry of the same tag is replaced in its place.

    Args:
        source: What `resolve` takes, usually a run folder; the network's arguments must be the defaults.
        tag: `architecture.name`.
        metrics: What was measured, as `Metrics.to_dict` has it: `measured_on` names the list of photos. Tables
            are left to the run.
        origin: How the weights came to be, one sentence.
        license: SPDX identifier.
        hf_hub_id: `owner/repo` that holds, or will hold, the same file.
        revision: Commit or git tag of that repository.
        made: Day they were made, ISO format; today if None.

    Returns:
        The new entry.

    Raises:
        ConfigError: `tag` is not of the model's architecture, the network is not the default one, or the metrics
            don't say what they were measured on.
        GhostResNetError: What `load_model` and `save_pretrained` raise.
    """
    import torch

    files = resolve(source)
    if tag.partition(".")[0] != files.architecture or not tag.partition(".")[2]:
        raise ConfigError(f"expected a tag {files.architecture}.NAME, got {tag!r}")
    cfg, args = _network(files)
    harmless = {"num_classes", "in_chans", "global_pool", "zero_init_last"}  # the last is about training's start
    if extra := args.keys() - harmless:
        raise ConfigError(f"expected the network's default arguments, got {sorted(extra)}")
    if not metrics.get("measured_on"):
        raise ConfigError(f"expected the list of photos under 'measured_on' in the metrics, got {sorted(metrics)}")
    model = load_model(files)
    preprocessing = {name: cfg[name] for name in _PREPROCESSING if cfg.get(name) is not None}
    figures = {
        name: value
        for name, value in metrics.items()
        if all(isinstance(item, int | float | str) for item in (value if isinstance(value, list | tuple) else [value]))
    }
    file = f"{tag}.safetensors"
    with TemporaryDirectory(dir=WEIGHTS) as folder:
        save_pretrained(model, folder, labels=files.labels, dtype=torch.float16)
        weights = Path(folder) / _WEIGHTS_NAME
        entry = Entry(
            architecture=files.architecture,
            num_classes=files.num_classes,
            classes=list(files.labels),
            parameters=sum(p.numel() for p in model.parameters()),
            file=file,
            size=weights.stat().st_size,
            sha256=_digest(weights, hashlib.sha256()),
            hf_hub_id=hf_hub_id,
            revision=revision,
            preprocessing=preprocessing,
            temperature=files.config.get("temperature"),
            metrics=figures,
            license=license,
            origin=origin,
            date=made or date.today().isoformat(),
        )
        weights.replace(WEIGHTS / file)
    entries = {**manifest(), tag: entry}
    text = json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=2)
    write_text(WEIGHTS / "manifest.json", text + "\n")
    return entry
