"""What is pushed to a hub comes back bit for bit, in this package, in plain timm and in transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hub_server import Hub
from PIL import Image
from safetensors.torch import load_file

from ghost_resnet import hub

LABELS = ["cardboard", "glass", "metal", "paper", "plastic", "trash"]
REPO = "me/garbage"


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("ghost_resnet50_s4", num_classes=6, layers=[1, 1, 1, 1])
    folder = tmp_path_factory.mktemp("runs") / "run"
    hub.save_pretrained(model, folder, labels=LABELS, preprocessing={"input_size": (3, 64, 64)}, temperature=1.5)
    (folder / "metrics.json").write_text('{"top1": 0.5}')
    (folder / "photo.jpg").write_bytes(b"nobody else's business")
    return folder


def python(server: Hub, home: Path, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = {
        **clean,
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **environment,
    }
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


SESSION = """
import json, os, sys
from typer.testing import CliRunner
import ghost_resnet, timm
from ghost_resnet import hub
from ghost_resnet.cli import app
from safetensors.torch import save_file

run, repo, out = sys.argv[1:]
def cli(*arguments):
    done = CliRunner().invoke(app, ["hub", *arguments])
    return done.exit_code, done.stdout, done.stderr

facts = {"no token": cli("push", run, "me/other")}
os.environ["HF_TOKEN"] = "hf_mine"
facts["push"] = cli("push", run, repo)
facts["private"] = cli("push", run, "me/secret", "--private")
facts["with token"] = cli("download", "hf-hub:me/secret")
del os.environ["HF_TOKEN"]
facts["without token"] = cli("download", "hf-hub:me/secret", "--cache-dir", out)
commit = facts["push"][1].strip().rpartition("/")[2]
for name, source in (("main", f"hf-hub:{repo}"), ("commit", f"hf-hub:{repo}@{commit}")):
    save_file(hub.load_model(source).state_dict(), f"{out}/ours-{name}.safetensors")
    plain = timm.create_model(source, pretrained=True)
    save_file(plain.state_dict(), f"{out}/plain-{name}.safetensors")
    files = hub.resolve(source)
    facts[name] = [files.labels, files.temperature, plain.num_classes, plain.pretrained_cfg["input_size"]]
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def session(server: Hub, run: Path) -> dict[str, Any]:
    """What a client process saw: pushes by the command line, then the same models opened by name."""
    done = python(server, run.parent / "home", "-c", SESSION, run, REPO, run.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_push_sends_weights_configuration_card_and_metrics_only(
    session: dict[str, Any], server: Hub, run: Path
) -> None:
    commit, files = server.repos[REPO][-1]
    assert session["push"][:2] == [0, f"{server.endpoint}/{REPO}/commit/{commit}\n"]
    assert files.keys() == {"model.safetensors", "config.json", "README.md", "metrics.json"}
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert json.loads(files["config.json"]) == json.loads((run / "config.json").read_text())
    assert f"hf-hub:{REPO}" in files["README.md"].decode()


@pytest.mark.parametrize("revision", ["main", "commit"])
@pytest.mark.parametrize("by", ["ours", "plain"])
def test_round_trip_is_bitwise_equal_here_and_in_plain_timm(
    by: str, revision: str, session: dict[str, Any], run: Path
) -> None:
    assert session[revision] == [LABELS, 1.5, 6, [3, 64, 64]]
    wanted = load_file(run / "model.safetensors")
    got = load_file(run.parent / f"{by}-{revision}.safetensors")
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_push_without_a_token_says_what_to_do(session: dict[str, Any], server: Hub) -> None:
    code, out, err = session["no token"]
    assert code == 2 and out == "" and "set HF_TOKEN or run `hf auth login`" in err
    assert "me/other" not in server.repos


def test_pushed_private_repository_opens_with_its_token_only(session: dict[str, Any]) -> None:
    assert session["private"][0] == 0
    assert session["with token"][0] == 0 and session["with token"][1].endswith("model.safetensors\n")
    assert session["without token"][0] == 2 and "HF_TOKEN" in session["without token"][2]


@pytest.mark.ecosystem("transformers")
def test_pushed_model_runs_in_the_pipeline_of_transformers(
    server: Hub, session: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    """`pipeline("image-classification", model="owner/repo")`: the scores of the saved network."""
    pytest.importorskip("transformers")
    pixels = np.random.default_rng(0).integers(0, 255, (80, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    script = (
        "import json, sys, ghost_resnet; from transformers import pipeline\n"
        "answer = pipeline('image-classification', model=sys.argv[1])(sys.argv[2], top_k=6)\n"
        "print(json.dumps(answer))"
    )
    done = python(server, tmp_path / "home", "-c", script, REPO, tmp_path / "photo.png")
    assert done.returncode == 0, done.stderr
    answer = {entry["label"]: entry["score"] for entry in json.loads(done.stdout.splitlines()[-1])}
    model = hub.load_model(run)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        scores = model(transform(Image.open(tmp_path / "photo.png"))[None]).softmax(1)[0].tolist()
    assert answer == pytest.approx(dict(zip(LABELS, scores, strict=True)), abs=1e-4)


def test_repository_of_another_architecture_is_left_to_timm(server: Hub, run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text()) | {"architecture": "resnet18"}
    data = (run / "model.safetensors").read_bytes()
    server.put("me/resnet", {"config.json": json.dumps(config).encode(), "model.safetensors": data})
    script = "from ghost_resnet import hub; hub.resolve('hf-hub:me/resnet')"
    done = python(server, tmp_path, "-c", script)
    assert "ConfigError" in done.stderr and "timm.create_model('hf-hub:me/resnet', pretrained=True)" in done.stderr
