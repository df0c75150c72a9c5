"""Files from anywhere: no crash, no hang, no code run, no unbounded memory; a typed error or the right model.

The fuzz run of 10 CPU minutes and more:

    GHOST_RESNET_FUZZ_EXAMPLES=20000 nice -n 19 python -m pytest tests/test_hub_hostile.py -m slow --durations=1
"""

import copy
import json
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ghost_resnet  # noqa: F401  (registers the networks)
from ghost_resnet import hub
from ghost_resnet.errors import ConfigError, GhostResNetError, SourceError, WeightsError

EXAMPLES = int(os.environ.get("GHOST_RESNET_FUZZ_EXAMPLES", 150))


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("ghost_resnet50_s4", num_classes=6, layers=[1, 1, 1, 1])
    return hub.save_pretrained(model, tmp_path_factory.mktemp("good"), labels=list("abcdef"))


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        header, body = split(data)
        change(header)
        return join(header, body)

    return apply


def overlap(header: dict[str, Any]) -> None:
    header["bn1.running_mean"]["data_offsets"] = header["bn1.running_var"]["data_offsets"]


def beyond(header: dict[str, Any]) -> None:
    header["fc.bias"]["data_offsets"][1] = 2**60


def huge_shape(header: dict[str, Any]) -> None:
    header["fc.weight"]["shape"] = [2**40, 2**40]


def other_shape(header: dict[str, Any]) -> None:
    header["fc.weight"]["shape"] = header["fc.weight"]["shape"][::-1]


def integers(header: dict[str, Any]) -> None:
    header["fc.weight"]["dtype"] = "I32"


def nonsense_type(header: dict[str, Any]) -> None:
    header["fc.weight"]["dtype"] = "F7"


def renamed(header: dict[str, Any]) -> None:
    header["fc.wait"] = header.pop("fc.weight")


class Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("code-was-run"),)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:100],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "header of 2**63 bytes": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header of 2**64 - 1 bytes": lambda data: struct.pack("<Q", 2**64 - 1) + data[8:],
    "header longer than the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "header that is no JSON": lambda data: data[:8] + b"[" * struct.unpack("<Q", data[:8])[0] + b"\0",
    "overlapping tensors": with_header(overlap),
    "tensor beyond the end": with_header(beyond),
    "shape of 2**80 elements": with_header(huge_shape),
    "wrong shape": with_header(other_shape),
    "wrong type": with_header(integers),
    "unknown type": with_header(nonsense_type),
    "wrong name": with_header(renamed),
    "pickle": lambda data: pickle.dumps(Payload()),
    "pickle of torch": lambda data: pickle.dumps({"fc.weight": Payload()}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("door", ["ours", "timm"])
def test_damaged_weights_are_refused_with_their_name(
    damage: str, door: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    file = run / "model.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(WeightsError) as caught:
        if door == "ours":
            hub.load_model(run)
        else:
            timm.create_model(f"local-dir:{run}", pretrained=True)
    assert str(file) in str(caught.value)
    assert not Path("code-was-run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.conv1.primary_conv.1.running_var"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float, run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, run / "model.safetensors")
    with pytest.raises(WeightsError, match=f"got NaN or infinity in '{name}'"):
        hub.load_model(run)


@pytest.mark.parametrize("door", ["ours", "timm"])
def test_no_pickle_is_read_where_safetensors_are_missing(door: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    (run / "model.safetensors").unlink()
    (run / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(SourceError, match=r"expected model\.safetensors"):
        if door == "ours":
            hub.load_model(run)
        else:
            timm.create_model(f"local-dir:{run}", pretrained=True)
    assert not Path("code-was-run").exists()


CONFIGS: dict[str, tuple[dict[str, Any], type[GhostResNetError]]] = {
    "unknown architecture": ({"architecture": "ghost_resnet5000"}, ConfigError),
    "path as architecture": ({"architecture": "../../../etc/passwd"}, ConfigError),
    "another source as architecture": ({"architecture": "hf-hub:evil/repo"}, ConfigError),
    "tag as architecture": ({"architecture": "resnet50.a1_in1k"}, ConfigError),
    "no architecture": ({"architecture": None}, ConfigError),
    "ten million classes": ({"num_classes": 10_000_000}, WeightsError),
    "more classes than memory": ({"num_classes": 2**50}, ConfigError),
    "more classes than numbers": ({"num_classes": 2**70}, ConfigError),
    "negative classes": ({"num_classes": -1}, ConfigError),
    "classes as text": ({"num_classes": "6"}, ConfigError),
    "true classes": ({"num_classes": True}, ConfigError),
    "labels that are no names": ({"label_names": [1, 2, 3]}, ConfigError),
    "label as text": ({"label_names": "abcdef"}, ConfigError),
    "too many labels": ({"label_names": ["x"] * 7}, ConfigError),
    "temperature as text": ({"temperature": "hot"}, ConfigError),
    "temperature of zero": ({"temperature": 0}, ConfigError),
    "no pretrained_cfg": ({"pretrained_cfg": None}, ConfigError),
    "unknown key of pretrained_cfg": ({"pretrained_cfg": {"eval": "x"}}, ConfigError),
    "input size of one number": ({"pretrained_cfg": {"input_size": [3]}}, ConfigError),
    "photos of a terabyte": ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, ConfigError),
    "mean as text": ({"pretrained_cfg": {"mean": "grey"}}, ConfigError),
    "mean that is no number": ({"pretrained_cfg": {"mean": [float("nan")]}}, ConfigError),
    "crop of nothing": ({"pretrained_cfg": {"crop_pct": 0}}, ConfigError),
    "list of arguments": ({"model_args": [1]}, ConfigError),
    "endless network": ({"model_args": {"layers": [10**9, 1, 1, 1]}}, ConfigError),
    "very long network": ({"model_args": {"layers": [1024, 1024, 1024, 1024]}}, ConfigError),
    "very wide network": ({"model_args": {"layers": [1, 1, 1, 1], "base_width": 4096}}, WeightsError),
    "checkpoint of its own": ({"model_args": {"checkpoint_path": "model.pth"}}, ConfigError),
    "weights of its own": ({"model_args": {"pretrained_cfg_overlay": {"file": "model.pth"}}}, ConfigError),
    "unknown argument": ({"model_args": {"layers": [1, 1, 1, 1], "os": "system"}}, ConfigError),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_that_lies_is_refused_within_seconds_and_megabytes(name: str, run: Path) -> None:
    change, error = CONFIGS[name]
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    memory, started = peak_memory(), time.process_time()
    with pytest.raises(error) as caught:
        hub.load_model(run)
    assert str(run) in str(caught.value) and len(str(caught.value)) < 2000
    assert time.process_time() - started < 10
    assert peak_memory() - memory < 2**30


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b"[" * 1_000_000,
        b'{"architecture": 1e999}',
        b" " * (17 * 2**20),
    ],
    ids=["empty", "no text", "list", "null", "cut", "deep", "infinity", "17 MiB"],
)
def test_configuration_that_is_none_is_refused(text: bytes, run: Path) -> None:
    (run / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        hub.load_model(run)


@pytest.mark.parametrize("key", ["file", "hf_hub_filename", "hf_hub_id", "url"])
def test_names_of_files_in_a_configuration_are_never_followed(key: str, run: Path, good: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["pretrained_cfg"] |= {key: "../../../../etc/passwd", "source": "hf-hub", "custom_load": True}
    (run / "config.json").write_text(json.dumps(config))
    state, wanted = hub.load_model(run).state_dict(), load_file(good / "model.safetensors")
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


# Fuzzing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove", "number"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=16),
    ),
    min_size=1,
    max_size=6,
)


def edited(data: bytes, edits: list[tuple[str, float, bytes]], upto: int) -> bytes:
    """`data` with edits to its first `upto` bytes."""
    for kind, where, new in edits:
        at = int(where * min(upto, len(data)))
        if kind == "flip":
            data = data[:at] + bytes(a ^ b for a, b in zip(data[at:], new, strict=False)) + data[at + len(new) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + len(new) :]
        else:
            data = struct.pack("<Q", int.from_bytes(new[:8], "little")) + data[8:]
    return data


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with some of its parts replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 4))):
        node = value
        while isinstance(node, dict) and node:
            key = draw(st.sampled_from(sorted(node)) | st.text(max_size=8))
            inner = node.get(key)
            if isinstance(inner, dict) and inner and draw(st.booleans()):
                node = inner
                continue
            if draw(st.booleans()):
                node.pop(key, None)
            else:
                node[key] = draw(JSON | st.integers(2**8, 2**66) | st.just(inner))
            break
    return value


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Configuration and weights of two networks, small enough for many tries a second."""
    made = {}
    for name, args in (("ghost_resnet50_s4", {"layers": [1, 1, 1, 1]}), ("test_resnet", {})):
        folder = tmp_path_factory.mktemp(name)
        hub.save_pretrained(timm.create_model(name, num_classes=6, **args), folder, labels=list("abcdef"))
        made[name] = json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()
    return made


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_fuzzed_folders_load_or_are_refused(
    data: st.DataObject,
    tiny: dict[str, tuple[dict[str, Any], bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    config, weights = tiny[data.draw(st.sampled_from(sorted(tiny)), label="network")]
    what = data.draw(st.sampled_from(["bytes", "header", "config", "config text"]), label="what")
    text = json.dumps(config).encode()
    header, body = split(weights)
    if what == "bytes":
        weights = edited(weights, data.draw(EDITS), upto=200 + len(json.dumps(header)))
    elif what == "header":
        some = {name: header[name] for name in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=3))}
        weights = join({**header, **data.draw(changed(some or {"fc.weight": header["fc.weight"]}))}, body)
    elif what == "config":
        text = json.dumps(data.draw(changed(config))).encode()
    else:
        text = edited(text, data.draw(EDITS), upto=len(text))
    (folder / "config.json").write_bytes(text)
    (folder / "model.safetensors").write_bytes(weights)
    memory, started = peak_memory(), time.process_time()
    try:
        model = hub.load_model(folder)
    except GhostResNetError as error:
        assert len(str(error)) < 3000
    else:
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert time.process_time() - started < 60
    assert peak_memory() - memory < 2**30
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
