"""Sources, saving and loading, the manifest and what timm makes of it."""

import hashlib
import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import ghost_resnet  # noqa: F401  (registers the networks)
from ghost_resnet import hub
from ghost_resnet.cli import app
from ghost_resnet.errors import ConfigError, IntegrityError, SourceError, WeightsError

LABELS = ["cardboard", "glass", "metal", "paper", "plastic", "trash"]
ROOT = Path(__file__).parents[1]


def small(**kwargs: Any) -> nn.Module:
    """A Ghost-ResNet with one block a stage."""
    return timm.create_model("ghost_resnet50_s4", **{"num_classes": 6, "layers": [1, 1, 1, 1], **kwargs})


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return small()


@pytest.fixture
def run(model: nn.Module, tmp_path: Path) -> Path:
    return hub.save_pretrained(model, tmp_path / "run", labels=LABELS)


def test_saved_model_is_loaded_bit_for_bit(model: nn.Module, run: Path) -> None:
    loaded = hub.load_model(run)
    assert same(loaded, model)
    assert not loaded.training and next(loaded.parameters()).dtype is torch.float32
    assert loaded.pretrained_cfg["label_names"] == tuple(LABELS)


def test_plain_timm_opens_a_saved_folder(model: nn.Module, run: Path) -> None:
    opened = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert same(opened, model) and opened.num_classes == 6


def test_folder_says_how_photos_are_prepared_and_outputs_calibrated(model: nn.Module, tmp_path: Path) -> None:
    preprocessing = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "crop_pct": 0.9, "interpolation": "bilinear"}
    hub.save_pretrained(
        model, tmp_path, labels=LABELS, preprocessing=preprocessing, temperature=1.5, metrics={"top1": 0.75}
    )
    files = hub.resolve(tmp_path)
    assert files.labels == tuple(LABELS) and files.temperature == 1.5 and files.config["metrics"] == {"top1": 0.75}
    data = timm.data.resolve_model_data_config(hub.load_model(files))
    assert {name: data[name] for name in preprocessing} == preprocessing
    card = (tmp_path / "README.md").read_text()
    assert "library_name: timm" in card and "0.75" in card and "cardboard" in card


def test_the_temperature_of_a_saved_classifier_can_be_set(model: nn.Module, tmp_path: Path) -> None:
    hub.save_pretrained(model, tmp_path, labels=LABELS, metrics={"top1": 0.75})
    hub.set_temperature(tmp_path, 0.8)
    files = hub.resolve(tmp_path)
    assert files.temperature == 0.8 and files.config["metrics"] == {"top1": 0.75}
    with pytest.raises(ConfigError, match="temperature"):
        hub.set_temperature(tmp_path, -1.0)
    assert hub.resolve(tmp_path).temperature == 0.8


def test_saving_names_the_tag_only_if_told(model: nn.Module, tmp_path: Path) -> None:
    model.pretrained_cfg |= {"tag": "report", "description": "Photos."}  # what training started from
    hub.save_pretrained(model, tmp_path, labels=LABELS)
    assert not {"tag", "description"} & hub.resolve(tmp_path).config["pretrained_cfg"].keys()
    hub.save_pretrained(model, tmp_path, labels=LABELS, tag="mine")
    assert hub.resolve(tmp_path).config["pretrained_cfg"]["tag"] == "mine"


def test_channels_last_model_is_saved(model: nn.Module, tmp_path: Path) -> None:
    hub.save_pretrained(model.to(memory_format=torch.channels_last), tmp_path, labels=LABELS)
    assert same(hub.load_model(tmp_path), model)


def test_half_precision_file_becomes_a_full_precision_model(model: nn.Module, tmp_path: Path) -> None:
    hub.save_pretrained(model, tmp_path, labels=LABELS, dtype=torch.float16)
    assert load_file(tmp_path / "model.safetensors")["fc.weight"].dtype is torch.float16
    loaded = hub.load_model(tmp_path)
    assert loaded.fc.weight.dtype is torch.float32
    assert torch.equal(loaded.fc.weight, model.fc.weight.half().float())


def test_head_may_have_more_outputs_than_there_are_labels(tmp_path: Path) -> None:
    hub.save_pretrained(small(num_classes=100), tmp_path, labels=LABELS)
    files = hub.resolve(tmp_path)
    assert (files.num_classes, len(files.labels)) == (100, 6)
    assert hub.load_model(files).num_classes == 100


def test_any_architecture_of_timm_works_in_a_folder(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=6)
    hub.save_pretrained(model, tmp_path, labels=LABELS)
    assert same(hub.load_model(tmp_path), model)


def test_saving_again_keeps_other_files_and_failing_keeps_the_old_ones(model: nn.Module, run: Path) -> None:
    (run / "history.csv").write_text("epoch\n")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    broken = small()
    broken.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"NaN or infinity in 'fc\.weight'"):
        hub.save_pretrained(broken, run, labels=LABELS)
    with pytest.raises(ConfigError, match="at most num_classes=6 label names"):
        hub.save_pretrained(model, run, labels=[*LABELS, "moon"])
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    hub.save_pretrained(small(), run, labels=LABELS)
    assert {path.name for path in run.iterdir()} == before.keys()


def test_numbers_too_large_for_half_precision_are_refused(model: nn.Module, tmp_path: Path) -> None:
    model.fc.bias.data[0] = 1e6
    with pytest.raises(WeightsError, match=r"'fc\.bias' as torch\.float16"):
        hub.save_pretrained(model, tmp_path, labels=LABELS, dtype=torch.float16)


def test_process_killed_while_saving_leaves_a_folder_that_loads(run: Path) -> None:
    script = (
        "import sys, ghost_resnet; from ghost_resnet import hub; model = hub.load_model(sys.argv[1])\n"
        "while True: hub.save_pretrained(model, sys.argv[1], labels=list('abcdef')); print('.', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.read(2)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.load_model(run)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("ghost_resnet50.nonsense", "is no tag"),
        ("runs/absent", "is no tag"),
        ("hf-hub:just-a-name", "expected hf-hub:owner/repo"),
        ("hf-hub:../../etc/passwd", "expected hf-hub:owner/repo"),
        ("local-dir:", "expected model.safetensors"),
        ("old.pth", "ghost-resnet hub convert"),
        ("notes.txt", "expected a file that ends with"),
    ],
)
def test_source_that_means_nothing_is_refused_with_advice(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.pth").touch()
    Path("notes.txt").touch()
    with pytest.raises(SourceError, match=says):
        hub.resolve(source)


def test_file_needs_its_configuration_beside_it(run: Path) -> None:
    file = run / "model.safetensors"
    assert hub.resolve(file).labels == tuple(LABELS)
    (run / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"expected .*config\.json beside the weights"):
        hub.resolve(file)


def test_head_changed_on_purpose_is_said(run: Path, model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    loaded = hub.load_model(run, num_classes=4)
    assert "has 6 outputs, 4 are wanted: its head is left out" in caplog.text
    assert loaded.fc.out_features == 4 and torch.equal(
        loaded.layer4[0].conv1.primary_conv[0].weight, model.layer4[0].conv1.primary_conv[0].weight
    )
    caplog.clear()
    hub.load_model(run, num_classes=6)
    assert "head" not in caplog.text


def test_caller_may_change_channels_and_take_features(run: Path, model: nn.Module) -> None:
    gray = hub.load_model(run, in_chans=1)
    assert torch.allclose(gray.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
    assert len(hub.load_model(run, features_only=True)(torch.zeros(1, 3, 64, 64))) == 5


def test_arguments_of_the_network_that_do_not_fit_its_weights_are_refused(run: Path) -> None:
    with pytest.raises(WeightsError, match="does not fit ghost_resnet50_s4"):
        hub.load_model(run, ratio=2)


def test_resolving_needs_no_torch(run: Path) -> None:
    script = "import sys; from ghost_resnet import hub; hub.resolve(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(run)], check=True)


def test_integrity_error_crosses_processes() -> None:
    error = IntegrityError(Path("a"), "b", "c", "d", Path("e"))
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and vars(copy) == vars(error)


# The manifest


@pytest.mark.parametrize("tag", hub.manifest())
def test_manifest_tells_the_truth_about_its_files(tag: str) -> None:
    entry = hub.manifest()[tag]
    assert tag.partition(".")[0] == entry.architecture
    assert entry.metrics["measured_on"] and entry.metrics["top1"] > 0 and entry.license and entry.origin and entry.date
    assert entry.embedded.is_file() or (entry.hf_hub_id and entry.revision)
    if entry.embedded.is_file():
        data = entry.embedded.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256)
        model = hub.load_model(tag)
        assert sum(p.numel() for p in model.parameters()) == entry.parameters
        assert model.num_classes == entry.num_classes and list(hub.resolve(tag).labels) == entry.classes


def test_every_file_beside_the_manifest_is_in_it() -> None:
    assert {p.name for p in hub.WEIGHTS.glob("*.safetensors")} <= {e.file for e in hub.manifest().values()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of two embedded tags; the networks are whole, as a tag's must be."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "manifest.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "WEIGHTS", folder)
        torch.manual_seed(0)
        for tag, outputs in (("ghost_resnet50_s4.trashnet", 6), ("ghost_resnet50_cifar.report", 100)):
            name = tag.partition(".")[0]
            run = folder.parent / tag
            hub.save_pretrained(timm.create_model(name, num_classes=outputs), run, labels=LABELS, temperature=2.0)
            hub.embed(
                run,
                tag,
                metrics={
                    "measured_on": "test.txt",
                    "top1": 0.5,
                    "top1_interval": [0.4, 0.6],
                    "confusion": [[1, 2]],
                },
                origin="random numbers",
                made="2026-01-02",
            )
    return folder


@pytest.fixture
def own_weights(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a folder of this test's own."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(hub, "WEIGHTS", folder)
    return folder


def test_embedding_writes_half_precision_and_the_whole_entry(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "WEIGHTS", weights)
    entry = hub.manifest()["ghost_resnet50_cifar.report"]
    file = weights / "ghost_resnet50_cifar.report.safetensors"
    assert {t.dtype for t in load_file(file).values()} == {torch.float16, torch.int64}
    assert vars(entry) == {
        "architecture": "ghost_resnet50_cifar",
        "num_classes": 100,
        "classes": LABELS,
        "parameters": 21_565_060,
        "file": file.name,
        "size": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "hf_hub_id": None,
        "revision": None,
        "preprocessing": {
            "input_size": [3, 32, 32],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.5071, 0.4865, 0.4409],
            "std": [0.2673, 0.2564, 0.2762],
        },
        "temperature": 2.0,
        "metrics": {"measured_on": "test.txt", "top1": 0.5, "top1_interval": [0.4, 0.6]},
        "license": "apache-2.0",
        "origin": "random numbers",
        "date": "2026-01-02",
    }


def test_tag_or_its_architecture_resolves_to_the_embedded_file(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "WEIGHTS", weights)
    files = hub.resolve("ghost_resnet50_cifar.report")
    assert files.weights == weights / "ghost_resnet50_cifar.report.safetensors"
    assert files.labels == tuple(LABELS) and files.temperature == 2.0
    assert hub.resolve("ghost_resnet50_cifar").weights == files.weights
    assert hub.default_tag() == "ghost_resnet50_s4.trashnet"


def test_changed_head_of_a_tag_is_said_once(
    weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "WEIGHTS", weights)
    assert hub.load_model("ghost_resnet50_s4.trashnet", num_classes=3).num_classes == 3
    assert caplog.text.count("its head is left out") == 1


def test_path_is_never_taken_for_a_tag(weights: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "WEIGHTS", weights)
    monkeypatch.chdir(run.parent)
    run.rename("ghost_resnet50_s4")
    assert hub.resolve(Path("ghost_resnet50_s4")).weights == Path("ghost_resnet50_s4/model.safetensors")
    assert hub.resolve("ghost_resnet50_s4").weights.parent == weights


def test_commands_list_verify_and_download(own_weights: Path) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["hub", *arguments])
        return done.exit_code, done.stdout, done.stderr

    good, bad = (own_weights / f"{tag}.safetensors" for tag in hub.manifest())
    assert command("download", "ghost_resnet50_s4.trashnet") == (0, f"{good}\n", "")
    assert command("verify")[0] == 0
    bad.write_bytes(bad.read_bytes()[:-1])
    code, out, err = command("verify")
    assert code == 1 and out == f"ghost_resnet50_s4.trashnet: good ({good})\n" and f"{bad} is not what it" in err
    code, out, _ = command("list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(hub.manifest())
    assert out.splitlines()[0].endswith(str(good)) and out.splitlines()[1].endswith("not here")
    assert command("download", "ghost_resnet50_cifar.report")[0] == 2


def test_command_embeds_a_run(own_weights: Path, tmp_path: Path) -> None:
    run = hub.save_pretrained(timm.create_model("ghost_resnet50_s4", num_classes=6), tmp_path / "run", labels=LABELS)
    (run / "metrics.json").write_text('{"measured_on": "val.txt", "top1": 0.25, "per_class": {"glass": {"f1": 1}}}')
    command = ["hub", "embed", str(run), "ghost_resnet50_s4.new", "--origin", "A test."]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    entry = hub.manifest()["ghost_resnet50_s4.new"]
    assert entry.metrics == {"measured_on": "val.txt", "top1": 0.25} and entry.sha256 in done.stdout
    assert hub.resolve("ghost_resnet50_s4.new").weights == entry.embedded


def test_embedding_refuses_what_a_tag_could_not_say(run: Path, own_weights: Path) -> None:
    about = {"metrics": {}, "origin": "a test"}
    with pytest.raises(ConfigError, match=r"expected a tag ghost_resnet50_s4\.NAME"):
        hub.embed(run, "ghost_resnet50.mine", **about)
    with pytest.raises(ConfigError, match=r"default arguments, got \['layers'\]"):
        hub.embed(run, "ghost_resnet50_s4.mine", **about)
    hub.save_pretrained(timm.create_model("ghost_resnet50_s4", num_classes=6), run, labels=LABELS)
    with pytest.raises(ConfigError, match="under 'measured_on'"):
        hub.embed(run, "ghost_resnet50_s4.mine", **about)


def test_damaged_embedded_file_is_moved_aside_through_timm_too(own_weights: Path) -> None:
    file = own_weights / "ghost_resnet50_s4.trashnet.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    cfg = hub.manifest()["ghost_resnet50_s4.trashnet"].pretrained_cfg() | {"tag": "trashnet"}
    with pytest.raises(IntegrityError) as caught:
        timm.create_model("ghost_resnet50_s4", pretrained=True, pretrained_cfg=cfg)
    error = caught.value
    assert (error.file, error.got) == (file, hashlib.sha256(data).hexdigest())
    assert error.aside and error.aside.read_bytes() == data and not file.exists()
    assert error.repair == "pip install --force-reinstall --no-deps WHERE_GHOST_RESNET_CAME_FROM"
    with pytest.raises(SourceError, match="are not here"):
        hub.resolve("ghost_resnet50_s4.trashnet")


IN_TIMM = """
import json, logging, sys
from pathlib import Path
import torch
from ghost_resnet import hub
hub.WEIGHTS = Path(sys.argv[1])
import timm

log = []
handler = logging.Handler()
handler.emit = lambda record: log.append(record.getMessage())
logging.getLogger("ghost_resnet").addHandler(handler)
def make(*args, **kwargs):
    model = timm.create_model(*args, **kwargs)
    said = [line for line in log if "head" in line]
    log.clear()
    state = {k: float(v.double().abs().sum()) for k, v in model.state_dict().items()}
    return {"classes": getattr(model, "num_classes", None), "said": said, "state": state,
            "labels": model.pretrained_cfg.get("label_names")}
def from_torch_hub():
    model = torch.hub.load(sys.argv[2], "ghost_resnet50_s4", source="local", pretrained=True)
    return {k: float(v.double().abs().sum()) for k, v in model.state_dict().items()}
print(json.dumps({
    "listed": timm.list_pretrained("ghost_resnet*"),
    "tag": make("ghost_resnet50_s4.trashnet", pretrained=True),
    "default": make("ghost_resnet50_s4", pretrained=True),
    "asked": make("ghost_resnet50_s4", pretrained=True, num_classes=6),
    "other head": make("ghost_resnet50_s4", pretrained=True, num_classes=3),
    "untrained": make("ghost_resnet50_s4"),
    "features": make("ghost_resnet50_s4", pretrained=True, features_only=True),
    "gray": make("ghost_resnet50_s4", pretrained=True, in_chans=1),
    "torch.hub": from_torch_hub(),
}))
"""


@pytest.fixture(scope="module")
def in_timm(weights: Path) -> dict[str, Any]:
    """What timm makes of a manifest, in a process that has it from the start."""
    command = [sys.executable, "-W", "ignore", "-c", IN_TIMM, str(weights), str(ROOT)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_timm_lists_the_manifest(in_timm: dict[str, Any]) -> None:
    assert in_timm["listed"] == [
        "ghost_resnet50_cifar",
        "ghost_resnet50_cifar.report",
        "ghost_resnet50_s4",
        "ghost_resnet50_s4.trashnet",
    ]


@pytest.mark.parametrize("how", ["tag", "default", "asked"])
def test_timm_loads_a_tag_with_its_head(how: str, in_timm: dict[str, Any], weights: Path) -> None:
    model, file = in_timm[how], load_file(weights / "ghost_resnet50_s4.trashnet.safetensors")
    assert model["classes"] == 6 and model["labels"] == LABELS and model["said"] == []
    assert model["state"] == {name: float(t.double().abs().sum()) for name, t in file.items()}


def test_timm_says_when_a_head_is_left_out(in_timm: dict[str, Any]) -> None:
    other, tag = in_timm["other head"], in_timm["tag"]
    assert len(other["said"]) == 1 and "has 6 outputs, 3 are wanted" in other["said"][0]
    assert other["classes"] == 3 and other["state"]["conv1.weight"] == tag["state"]["conv1.weight"]


def test_untrained_network_keeps_the_classes_of_its_name(in_timm: dict[str, Any]) -> None:
    assert in_timm["untrained"]["classes"] == 1000 and in_timm["untrained"]["labels"] is None


def test_timm_takes_features_and_other_channels_from_a_tag(in_timm: dict[str, Any]) -> None:
    state = in_timm["tag"]["state"]
    features = in_timm["features"]
    assert features["said"] == []
    assert features["state"] == {k: v for k, v in state.items() if not k.startswith("fc.")}
    gray = in_timm["gray"]["state"]
    assert {k for k in state if gray[k] != state[k]} == {"conv1.weight"}


def test_torch_hub_loads_the_same_weights(in_timm: dict[str, Any]) -> None:
    assert in_timm["torch.hub"] == in_timm["tag"]["state"]


def test_a_file_of_the_callers_own_is_left_to_timm(weights: Path, tmp_path: Path) -> None:
    model = timm.create_model("ghost_resnet50_s4", num_classes=6)
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    overlay = {"file": str(tmp_path / "mine.safetensors"), "num_classes": 6}
    mine = timm.create_model("ghost_resnet50_s4", pretrained=True, num_classes=6, pretrained_cfg_overlay=overlay)
    assert same(mine, model)
