"""torch.hub, offline: from a local checkout, and from the cache that a download of the repository leaves."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import ghost_resnet  # noqa: F401
from ghost_resnet.errors import UnsupportedArgumentError

CHECKOUT = str(Path(__file__).parents[1])
NETWORKS = timm.list_models("*ghost_resnet*")


def load(name: str, **kwargs: object) -> torch.nn.Module:
    return torch.hub.load(CHECKOUT, name, source="local", **kwargs)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a repository that torch.hub finds in its cache, which is this checkout."""
    (tmp_path / "someone_ghost-resnet_main").symlink_to(CHECKOUT, target_is_directory=True)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return "someone/ghost-resnet:main"


def test_list_holds_every_registered_network_and_nothing_else(repository: str) -> None:
    assert sorted(torch.hub.list(repository, trust_repo=True)) == sorted(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_help_describes_the_network_and_its_arguments(repository: str, name: str) -> None:
    text = torch.hub.help(repository, name, trust_repo=True)
    assert text.startswith(("Ghost-ResNet-", "The GhostNet paper's Ghost-ResNet-50"))
    assert "Args:" in text


def test_load_from_a_repository_gives_the_network(repository: str) -> None:
    model = torch.hub.load(repository, "ghost_resnet50_s4", trust_repo=True, num_classes=6, device="meta")
    assert model.num_classes == 6


def test_load_works_where_the_package_is_not_on_the_path() -> None:
    code = (
        f"import torch; m = torch.hub.load({CHECKOUT!r}, 'ghost_resnet50_s4', source='local', device='meta');"
        "print(m.num_features)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2048"], done.stderr


@pytest.mark.parametrize("name", NETWORKS)
def test_load_gives_the_registered_network_and_passes_its_arguments_on(name: str) -> None:
    model = load(name, num_classes=6, in_chans=4, device="meta")
    expected = timm.create_model(name, num_classes=6, in_chans=4, device="meta")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in expected.state_dict().items()}
    assert model.pretrained_cfg["architecture"] == name


def test_load_without_arguments_computes() -> None:
    model = load("ghost_resnet50").eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_pretrained_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: asked.append((name, kwargs)))
    for name in NETWORKS:
        load(name, pretrained=True)
        load(name)
    assert asked == [(name, {"pretrained": p}) for name in NETWORKS for p in (True, False)]


def test_unknown_argument_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedArgumentError, match="num_clases"):
        load("ghost_resnet50", num_clases=6)


def test_nothing_but_the_entry_points_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CHECKOUT)
    import hubconf

    public = {name for name in vars(hubconf) if not name.startswith("_")}
    assert public == {*NETWORKS, "dependencies"}
    for name in NETWORKS:
        assert list(inspect.signature(getattr(hubconf, name)).parameters) == ["pretrained", "kwargs"]
