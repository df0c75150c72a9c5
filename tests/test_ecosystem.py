"""The networks inside the libraries that people use them with, through those libraries' own API.

The marker names the library's distribution, the docstring says what works: `benchmarks/ecosystem.py` makes the table of
docs/ecosystem.md from both.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from drawing import draw, write_folder
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ghost_resnet  # noqa: F401  (registers the networks)
from ghost_resnet import hub

SHALLOW = {"layers": (1, 1, 1, 1)}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(count: int = 2, side: int = 64) -> Tensor:
    pixels = np.stack([np.asarray(draw(side, side, seed=number)) for number in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def steps(model: nn.Module, loss_of: Callable[[], Tensor], count: int = 4) -> list[float]:
    """The losses of a few training steps on the same images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(count):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def onnx_outputs(model: nn.Module, x: Tensor, path: Path) -> list[np.ndarray]:
    """What onnxruntime makes of `x`, through torch's exporter and the ONNX checker."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


@pytest.mark.ecosystem("timm")
def test_loaders_optimizer_and_scores_of_timm(tmp_path: Path) -> None:
    """What timm's train.py and validate.py call: dataset, loader, optimizer, scheduler, EMA, accuracy."""
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, accuracy

    for label, level in [("dark", 40), ("light", 200)]:
        (tmp_path / label).mkdir()
        for number in range(4):
            Image.new("RGB", (64, 64), (level + 5 * number,) * 3).save(tmp_path / label / f"{number}.png")
    model = timm.create_model("ghost_resnet50", num_classes=2, **SHALLOW)
    config = resolve_data_config({"input_size": (3, 64, 64)}, model=model)

    def loader(training: bool) -> Any:
        return create_loader(
            create_dataset("", root=str(tmp_path), is_training=training),
            batch_size=8,
            input_size=config["input_size"],
            mean=config["mean"],
            std=config["std"],
            is_training=training,
            use_prefetcher=False,
            num_workers=0,
            persistent_workers=False,
            device=torch.device("cpu"),
        )

    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.75)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 4  # it finds the groups of layers
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4)
    ema = ModelEmaV3(model, decay=0.5)
    losses = []
    for epoch in range(epochs):
        for x, target in loader(training=True):
            loss = LabelSmoothingCrossEntropy(0.1)(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
    assert losses[-1] < losses[0]

    ((x, target),) = loader(training=False)
    with torch.no_grad():
        outputs = ema.module.eval()(x)
    (top1,) = accuracy(outputs, target)
    assert top1.item() == 100 * (outputs.argmax(1) == target).double().mean().item()


@pytest.mark.ecosystem("torchvision")
def test_feature_pyramid_of_torchvision() -> None:
    """`FeaturePyramidNetwork` on `features_only`: a training step, and maps of every scale."""
    from torchvision.ops import FeaturePyramidNetwork

    backbone = timm.create_model("ghost_resnet50", features_only=True, out_indices=(1, 2, 3, 4))
    pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), out_channels=32)
    both, x = nn.ModuleList([backbone, pyramid]), images()

    def maps() -> list[Tensor]:
        features = backbone(x)
        return list(pyramid(OrderedDict(zip("0123", features, strict=True))).values())

    losses = steps(both, lambda: sum(m.square().mean() for m in maps()))
    assert losses[-1] < losses[0]
    both.eval()
    with torch.no_grad():
        assert [tuple(m.shape) for m in maps()] == [(2, 32, side, side) for side in (16, 8, 4, 2)]


@pytest.mark.ecosystem("torchvision")
def test_faster_rcnn_of_torchvision() -> None:
    """`FasterRCNN` on `BackboneWithFPN`: a training step on boxes, and boxes out."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    network = timm.create_model("ghost_resnet50_s4")
    stages = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
    backbone = BackboneWithFPN(network, stages, [256, 512, 1024, 2048], out_channels=32)
    detector = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64, box_detections_per_img=5)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}] * 2

    losses = detector(list(images()), targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for p in network.layer1.parameters())

    detector.eval()
    with torch.no_grad():
        answers = detector(list(images()))
    assert all(answer["boxes"].shape == (len(answer["scores"]), 4) for answer in answers)


@pytest.mark.ecosystem("torchvision")
def test_feature_extractor_of_torchvision() -> None:
    """`create_feature_extractor` (torch.fx) gives any node's output, the same as `forward_intermediates`."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model = timm.create_model("ghost_resnet50").eval()
    nodes = {"layer2.3.act3": "middle", "layer4.0.conv1.cheap_operation.0": "ghosts", "global_pool.flatten": "pooled"}
    extractor = create_feature_extractor(model, nodes)
    with torch.no_grad():
        found = extractor(images())
        expected = model.forward_intermediates(images(), indices=[2], intermediates_only=True)[0]
        pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(found["middle"], expected)
    torch.testing.assert_close(found["pooled"], pooled)
    assert found["ghosts"].shape == (2, 256, 4, 4)


@pytest.mark.ecosystem("segmentation-models-pytorch")
def test_unet_of_segmentation_models_trains() -> None:
    """`Unet("tu-ghost_resnet50")` learns a mask."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-ghost_resnet50", encoder_weights=None, classes=1)
    x = images()
    mask = (x.mean(1, keepdim=True) > 0.5).float()
    dice = smp.losses.DiceLoss("binary")
    losses = steps(model, lambda: dice(model(x), mask))
    assert losses[-1] < losses[0]


@pytest.mark.ecosystem("segmentation-models-pytorch")
def test_unet_of_segmentation_models_exports(tmp_path: Path) -> None:
    """`Unet("tu-ghost_resnet50")` through `torch.export` and ONNX: the same masks in onnxruntime."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-ghost_resnet50", encoder_weights=None, classes=2).eval()
    with torch.no_grad():
        expected = model(images(1))
        torch.testing.assert_close(torch.export.export(model, (images(1),)).module()(images(1)), expected)
    (found,) = onnx_outputs(model, images(1), tmp_path / "unet.onnx")
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.ecosystem("transformers")
def test_pipeline_of_transformers_opens_a_run_folder(run_folder: Path) -> None:
    """`pipeline("image-classification", model="runs/mine")`: the scores of the saved network."""
    transformers = pytest.importorskip("transformers")
    photo = draw(60, 50)
    answers = transformers.pipeline("image-classification", model=str(run_folder))(photo, top_k=8)
    model = hub.load_model(run_folder)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(photo)[None]).softmax(1)[0].sort(descending=True).values.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(expected, abs=1e-4)


@pytest.mark.ecosystem("transformers")
def test_wrapper_of_transformers_goes_both_ways(run_folder: Path, tmp_path: Path) -> None:
    """`TimmWrapperForImageClassification` opens a run folder, and `AutoModel...` what it saves."""
    transformers = pytest.importorskip("transformers")
    ours = hub.load_model(run_folder)
    wrapper = transformers.TimmWrapperForImageClassification.from_pretrained(run_folder).eval()
    wrapper.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    x = images(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(wrapper(x).logits, ours(x))
        torch.testing.assert_close(again(x).logits, ours(x))


@pytest.mark.ecosystem("fastai")
def test_vision_learner_of_fastai(tmp_path: Path) -> None:
    """`vision_learner(dls, "ghost_resnet50")`: a cycle with the body frozen, one with all of it, a prediction."""
    pytest.importorskip("fastai")
    from fastai.vision.all import ImageDataLoaders, Resize, vision_learner

    photos = write_folder(tmp_path / "photos", {"glass": 6, "metal": 6})
    loaders = ImageDataLoaders.from_folder(
        photos, valid_pct=0.34, seed=0, item_tfms=Resize(64), bs=4, num_workers=0, device="cpu"
    )
    learner = vision_learner(loaders, "ghost_resnet50", pretrained=False, path=tmp_path, **SHALLOW)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(1)
        label, _, scores = learner.predict(photos / "glass" / "glass1.jpg")
    assert label in {"glass", "metal"} and scores.sum().item() == pytest.approx(1)
    assert np.isfinite(learner.recorder.losses).all()


@pytest.mark.ecosystem("lightning")
def test_module_of_lightning(tmp_path: Path) -> None:
    """A `LightningModule` around the network: `Trainer.fit`, a checkpoint, and the same outputs from it."""
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = timm.create_model("ghost_resnet50", num_classes=2, **SHALLOW)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, target = batch
            return cross_entropy(self.network(x), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.TensorDataset(images(4), torch.tensor([0, 1, 0, 1]))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    model = Classifier()
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=2))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    with torch.no_grad():
        torch.testing.assert_close(again.network(images()), model.eval().network(images()))
    assert trainer.global_step == 2


@pytest.mark.ecosystem("captum")
def test_attributions_of_captum() -> None:
    """`IntegratedGradients` adds up to the score; `LayerGradCam` finds the last stage."""
    attr = pytest.importorskip("captum.attr")
    model = timm.create_model("ghost_resnet50", num_classes=3, **SHALLOW).double().eval()
    x = images(1).double()
    parts, error = attr.IntegratedGradients(model).attribute(x, target=1, n_steps=64, return_convergence_delta=True)
    with torch.no_grad():
        rise = (model(x) - model(torch.zeros_like(x)))[0, 1].item()
    assert parts.shape == x.shape
    assert parts.sum().item() == pytest.approx(rise, rel=0.05) and abs(error.item()) < 0.05 * abs(rise)
    assert attr.LayerGradCam(model, model.layer4).attribute(x, target=1).shape == (1, 1, 2, 2)


@pytest.mark.ecosystem("grad-cam")
def test_heat_maps_of_grad_cam() -> None:
    """`GradCAM` on the last stage: the map is the gradients' means times the features."""
    pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = timm.create_model("ghost_resnet50", num_classes=3, **SHALLOW).eval()
    x = images(1)
    with GradCAM(model, [model.layer4[-1]]) as cam:
        heat = cam(x, targets=[ClassifierOutputTarget(2)])
    features = model.forward_features(x).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(model.forward_head(features)[0, 2], features)
    expected = (gradients.mean((2, 3), keepdim=True) * features).sum(1).relu()[0]
    assert heat.shape == (1, 64, 64) and heat.max() == pytest.approx(1, abs=1e-3)
    corners = heat[0, ::63, ::63] > 0.5 * heat.max()
    assert corners.tolist() == (expected > 0.5 * expected.max()).tolist()


@pytest.mark.ecosystem("onnxruntime")
@pytest.mark.parametrize("name", ["ghost_resnet50", "ghost_resnet50_s4"])
def test_onnx_file_is_valid_and_answers_alike(name: str, tmp_path: Path) -> None:
    """`torch.onnx.export(dynamo=True)` passes the ONNX checker and answers alike in onnxruntime."""
    model = timm.create_model(name, **SHALLOW).eval()
    (found,) = onnx_outputs(model, images(), tmp_path / "model.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images()).numpy(), rtol=1e-3, atol=1e-4)
