"""Checkpoints of the report's own code: a network written as that code writes it is the oracle."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ghost_resnet import hub
from ghost_resnet.cli import app
from ghost_resnet.conversion import convert
from ghost_resnet.errors import GhostResNetError, WeightsError

LABELS = ["cardboard", "glass", "metal", "paper", "plastic", "trash"]


class Ghost(nn.Module):
    """The GhostNet authors' module."""

    def __init__(self, inp: int, oup: int) -> None:
        super().__init__()
        half = oup // 2
        self.primary_conv = nn.Sequential(nn.Conv2d(inp, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU())
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half), nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        primary = self.primary_conv(x)
        return torch.cat([primary, self.cheap_operation(primary)], 1)


class BottleNeck(nn.Module):
    """weiaicunzai/pytorch-cifar100's block, with a Ghost module first."""

    def __init__(self, inp: int, out: int, stride: int, first: type[nn.Module]) -> None:
        super().__init__()
        self.residual_function = nn.Sequential(
            first(inp, out),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out * 4, 1, bias=False),
            nn.BatchNorm2d(out * 4),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inp != out * 4:
            self.shortcut = nn.Sequential(nn.Conv2d(inp, out * 4, 1, stride, bias=False), nn.BatchNorm2d(out * 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.residual_function(x) + self.shortcut(x))


class ResNet(nn.Module):
    """weiaicunzai/pytorch-cifar100's ResNet-50."""

    def __init__(self, first: type[nn.Module] = Ghost, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        inp = 64
        for stage, number in enumerate(blocks):
            layers = []
            for block in range(number):
                out = 64 * 2**stage
                layers.append(BottleNeck(inp, out, 2 if stage and not block else 1, first))
                inp = out * 4
            setattr(self, f"conv{stage + 2}_x", nn.Sequential(*layers))
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x"):
            x = getattr(self, name)(x)
        return self.fc(self.avg_pool(x).flatten(1))


class Plain(nn.Conv2d):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__(inp, out, 1, bias=False)


@pytest.fixture(scope="module")
def report() -> ResNet:
    torch.manual_seed(0)
    network = ResNet()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: nothing at its initial value
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked += 7
    return network.eval()


@pytest.mark.parametrize("wrap", ["plain", "DataParallel", "in a dictionary"])
def test_converted_network_answers_as_the_reports_own(wrap: str, report: ResNet, tmp_path: Path) -> None:
    state = {"plain": report, "DataParallel": nn.DataParallel(report), "in a dictionary": report}[wrap].state_dict()
    torch.save({"state_dict": state, "epoch": 10} if wrap == "in a dictionary" else state, tmp_path / "report.pth")
    folder = convert(tmp_path / "report.pth", tmp_path / "converted", labels=LABELS)
    with pytest.raises(WeightsError, match="an empty one"):
        convert(tmp_path / "report.pth", folder, labels=LABELS)
    model = hub.load_model(folder)
    assert hub.resolve(folder).labels == tuple(LABELS)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in report.parameters()) == 21_565_060
    photos = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(photos), report(photos), rtol=1e-5, atol=1e-5)


def test_names_inside_a_ghost_module_do_not_matter(report: ResNet, tmp_path: Path) -> None:
    state = {
        k.replace("primary_conv", "primary").replace("cheap_operation", "cheap"): v
        for k, v in report.state_dict().items()
    }
    torch.save(state, tmp_path / "report.pth")
    model = hub.load_model(convert(tmp_path / "report.pth", tmp_path / "converted", labels=LABELS))
    assert torch.equal(
        model.layer4[2].conv1.cheap_operation[0].weight,
        report.conv5_x[2].residual_function[0].cheap_operation[0].weight,
    )


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("code-was-run"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "torch", "empty", "text"])
def test_checkpoint_of_more_than_tensors_is_refused_and_not_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("evil.pth")
    if kind == "torch":
        torch.save({"fc.weight": Payload()}, path)
    else:
        path.write_bytes({"pickle": pickle.dumps(Payload()), "empty": b"", "text": b"hello"}[kind])
    with pytest.raises(WeightsError, match=r"expected a checkpoint of tensors only in evil\.pth"):
        convert(path, "out", labels=LABELS)
    assert not Path("code-was-run").exists() and not Path("out").exists()


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["conv3_x.1.residual_function.3.weight"]


def transpose(state: dict[str, torch.Tensor]) -> None:
    state["conv3_x.1.residual_function.6.weight"] = state["conv3_x.1.residual_function.6.weight"].transpose(0, 1)


def swap(state: dict[str, torch.Tensor]) -> None:
    """A batch norm's tensors in another order: shapes agree, kinds do not."""
    items = list(state.items())
    at = next(i for i, (name, _) in enumerate(items) if name == "conv3_x.1.residual_function.4.weight")
    items[at], items[at + 1] = items[at + 1], items[at]
    state.clear()
    state.update(items)


def nan(state: dict[str, torch.Tensor]) -> None:
    state["fc.bias"] = torch.full((100,), float("nan"))


@pytest.mark.parametrize("change", [drop, transpose, swap, nan])
def test_checkpoint_that_does_not_fit_is_refused(change: object, report: ResNet, tmp_path: Path) -> None:
    state = dict(report.state_dict())
    change(state)  # type: ignore[operator]
    torch.save(state, tmp_path / "report.pth")
    with pytest.raises(WeightsError, match="expected"):
        convert(tmp_path / "report.pth", tmp_path / "out", labels=LABELS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("network", [ResNet(first=Plain), ResNet(blocks=(3, 4, 5, 3))], ids=["no Ghost", "shorter"])
def test_another_network_is_refused(network: ResNet, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="does not fit ghost_resnet50_cifar"):
        convert(tmp_path / "other.pth", tmp_path / "out", labels=LABELS)


def test_more_labels_than_outputs_are_refused(report: ResNet, tmp_path: Path) -> None:
    torch.save(report.state_dict(), tmp_path / "report.pth")
    with pytest.raises(GhostResNetError, match="at most num_classes=100 label names"):
        convert(tmp_path / "report.pth", tmp_path / "out", labels=[str(i) for i in range(101)])


def test_command_converts(report: ResNet, tmp_path: Path) -> None:
    torch.save(report.state_dict(), tmp_path / "report.pth")
    command = ["hub", "convert", str(tmp_path / "report.pth"), "--out", str(tmp_path / "out"), "--labels"]
    done = CliRunner().invoke(app, [*command, ",".join(LABELS)])
    assert done.exit_code == 0 and hub.resolve(tmp_path / "out").labels == tuple(LABELS)
    (tmp_path / "report.pth").write_bytes(b"hello")
    assert CliRunner().invoke(app, [*command, "a"]).exit_code == 2
