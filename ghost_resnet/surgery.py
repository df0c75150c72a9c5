"""Ghost surgery: a trained ResNet becomes a Ghost-ResNet that does nearly the same.

`from_resnet` copies everything that both networks have and splits each bottleneck's first 1x1 convolution in two
halves: filters that are kept, and filters whose feature map is replaced by a depthwise 3x3 of a kept one's. With
nothing but the weights, the maps' statistics are estimated; given images, they are measured, block by block in the
network as it is by then. `distill` then trains what is left of the difference away.
"""

import copy
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rustworkx
import timm
import torch
import torch.nn.functional as F
from timm.models import clean_state_dict
from torch import Tensor, nn

from .data import Preprocessing, find_images
from .distillation import Batches, blocks_of, distill, images_of, photo_batches, stem_features, watch
from .errors import DataError, SurgeryError
from .files import is_free
from .ghost_resnet import GhostResNet
from .hub import load_model, save_pretrained
from .layers import GhostModule

__all__ = ["convert", "from_resnet", "move_strides_to_1x1"]

logger = logging.getLogger(__name__)

ARCHS: dict[tuple[int, ...], tuple[str, ...]] = {
    (3, 4, 6, 3): ("ghost_resnet50", "ghost_resnet50_cifar"),
    (3, 4, 23, 3): ("ghost_resnet101",),
    (3, 8, 36, 3): ("ghost_resnet152",),
}
"""The names that a network with so many blocks goes by; any other, ResNet-26 for one, is `layers=` of the first."""

TAPS = 9
"""Of the depthwise kernels, which are 3x3."""

PRIOR_SHARE = 0.75
"""How much the estimate from the weights counts where pairs are chosen, beside what images say: the best of hundreds of
candidates is easily the best on these images only."""

PRIOR_POSITIONS = 200
"""How many positions of images it is worth where the chosen pairs' kernels are fitted, ten numbers each."""

CALIBRATION_PHOTOS = 256
"""How many photos `convert` calibrates with, spread over all."""


@torch.inference_mode(False)  # gradients are needed, and the network is to be trained
def from_resnet(
    resnet: nn.Module | Mapping[str, Tensor],
    arch: str = "ghost_resnet50",
    calibration: Batches | None = None,
    *,
    stride_on_1x1: bool | None = None,
) -> GhostResNet:
    """Turn a trained ResNet into a Ghost-ResNet that computes nearly the same.

    Stem, 3x3 and expanding 1x1 convolutions, their batch norms, shortcuts and head are copied bit for bit. Of each
    first 1x1, half the filters are kept; each of the others is replaced by a depthwise 3x3 of one kept filter's
    map. Which, is the minimum-cost perfect matching over all pairs; the cost is what is left of the replaced map
    after least squares, times its weight in what follows. Given images, blocks are fitted in order, each to give
    the ResNet's maps from what the blocks before it give by then.

    Args:
        resnet: A bottleneck ResNet (ResNet-26, 50, 101 or 152) of timm or torchvision, or its state dict. Any
            number of classes and input channels.
        arch: `ghost_resnet50`, `ghost_resnet101`, `ghost_resnet152` or `ghost_resnet50_cifar`; it must have as many
            blocks as the ResNet. ResNets of other depths become a `ghost_resnet50` with `layers=` theirs.
        calibration: Images `(N, C, H, W)` preprocessed for the ResNet, a tensor or an iterable of batches; a few
            dozen do. Their features are kept in memory, 6 MB an image of 224 pixels. Without, the maps' statistics
            are estimated from the weights, which is less exact.
        stride_on_1x1: Whether the ResNet strides in the first 1x1 ("v1") and not in the 3x3. Read from a model; a
            state dict doesn't tell, and the 3x3 is taken, as in timm and torchvision.

    Returns:
        The network, in evaluation mode, on the ResNet's device.

    Raises:
        SurgeryError: Not such a ResNet, or not one that `arch` can hold.
    """
    state = _state_dict(resnet)
    student = _blank_student(state, arch)
    teacher = _plain_twin(student)
    if stride_on_1x1 is None and isinstance(resnet, nn.Module):
        stride_on_1x1 = _strides_on_1x1(resnet)
    if stride_on_1x1:
        logger.warning("strides are on the first 1x1: a network made anew needs move_strides_to_1x1 for them too")
        move_strides_to_1x1(student)
        move_strides_to_1x1(teacher)
    _load(teacher, state)
    if isinstance(resnet, nn.Module):
        _check_alike(resnet, teacher)

    shared = teacher.state_dict()
    student.load_state_dict({k: shared.get(k, v) for k, v in student.state_dict().items()})
    device = state["conv1.weight"].device
    with torch.no_grad():
        estimates = _estimate(teacher)
        if calibration is None:
            for name, block in blocks_of(teacher).items():
                pairs = _match(_fit(estimates[name]).error * _importance(block))
                _replace_first_1x1(blocks_of(student)[name], block, pairs, estimates[name])
        else:
            _calibrate(student.to(device).eval(), teacher.to(device), calibration, estimates)
    return student.to(device).eval()


def move_strides_to_1x1(network: nn.Module) -> None:
    """Move the stride of each block from its 3x3 to its first 1x1 convolution, in place.

    So the first ResNets had it ("v1"; He et al., CVPR 2016). Weights don't record it: a Ghost-ResNet that
    `from_resnet` made from one has to be built with `timm.create_model` and this function to load its weights.
    """
    for block in blocks_of(network).values():
        first = block.conv1.primary_conv[0] if isinstance(block.conv1, GhostModule) else block.conv1
        first.stride, block.conv2.stride = (block.stride, block.stride), (1, 1)


def convert(
    source: str,
    folder: str | Path,
    *,
    arch: str = "ghost_resnet50",
    photos: str | Path | None = None,
    block_epochs: int = 4,
    logit_epochs: int = 2,
    batch_size: int = 32,
) -> Path:
    """Turn trained ResNet weights into a folder of Ghost-ResNet weights, by `from_resnet` and `distill`.

    Args:
        source: A name of timm's, such as `resnet50` or `resnet50.a1_in1k`, or what `load_model` takes: a run
            folder, a `.safetensors` file.
        folder: Where `model.safetensors` and `config.json` go.
        arch: As `from_resnet`.
        photos: Folder of photos to calibrate and distil with; classes play no part. None: from the weights alone.
        block_epochs: As `distill`.
        logit_epochs: As `distill`.
        batch_size: Photos a step.

    Returns:
        The folder.

    Raises:
        SurgeryError: As `from_resnet`; or the folder holds something.
        DataError: No photos in the folder.
        GhostResNetError: What `load_model` raises.
    """
    if not is_free(Path(folder)):
        raise SurgeryError(f"expected a folder to make, or an empty one, got {folder}")
    named = timm.is_model(source.partition(".")[0])
    teacher: Any = timm.create_model(source, pretrained=True) if named else load_model(source)
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    preprocessing = Preprocessing.from_config(teacher.pretrained_cfg)
    if photos is None:
        student = from_resnet(teacher, arch)
    else:
        if not (paths := list(find_images(Path(photos)))):
            raise DataError(f"expected photos in {photos}, found none")
        some = paths[:: math.ceil(len(paths) / CALIBRATION_PHOTOS)]
        student = from_resnet(teacher, arch, photo_batches(some, preprocessing, batch_size))
        crops = photo_batches(paths, preprocessing, batch_size, augment=True)
        distill(student, teacher, crops, block_epochs=block_epochs, logit_epochs=logit_epochs)
    student.pretrained_cfg["license"] = teacher.pretrained_cfg.get("license")
    labels = teacher.pretrained_cfg.get("label_names") or ()
    return save_pretrained(student, folder, labels=labels, preprocessing=asdict(preprocessing))


# The networks: reading the ResNet, refusing what is none --------------------------------------------------------


def _state_dict(resnet: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = resnet.state_dict() if isinstance(resnet, nn.Module) else resnet
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SurgeryError(f"expected a ResNet or its state dict, got {type(resnet).__name__}")
    return clean_state_dict(state)


def _blank_student(state: dict[str, Tensor], arch: str) -> GhostResNet:
    depth = {int(stage): 0 for stage in "1234"}
    for key in state:
        if match := re.fullmatch(r"layer([1-4])\.(\d+)\.conv3\.weight", key):
            depth[int(match[1])] = max(depth[int(match[1])], int(match[2]) + 1)
    layers = tuple(depth.values())
    if "conv1.weight" not in state or 0 in layers:
        raise SurgeryError(
            "expected a ResNet with a plain stem and bottlenecks (ResNet-26, 50, 101, 152 of timm or torchvision), "
            f"got {'no conv1.weight' if 'conv1.weight' not in state else 'a stage without any layer*.*.conv3'}"
        )
    names = ARCHS.get(layers, ("ghost_resnet50", "ghost_resnet50_cifar"))
    if arch not in names:
        raise SurgeryError(f"a ResNet of {layers} blocks becomes a {' or '.join(names)}, got arch={arch!r}")
    return timm.create_model(
        arch,
        layers=layers,
        in_chans=state["conv1.weight"].shape[1],
        num_classes=len(state["fc.weight"]) if "fc.weight" in state else 0,
    )


def _plain_twin(student: GhostResNet) -> GhostResNet:
    """The same network with plain first 1x1 convolutions, which is the ResNet itself."""
    twin = copy.deepcopy(student)
    for block in blocks_of(twin).values():
        in_chs = block.conv1.primary_conv[0].in_channels
        block.conv1 = nn.Conv2d(in_chs, block.conv1.out_chs, 1, bias=False)
    return twin.eval()


def _strides_on_1x1(resnet: nn.Module) -> bool:
    return any(getattr(block.conv1, "stride", (1, 1)) != (1, 1) for block in blocks_of(resnet).values())


def _load(teacher: nn.Module, state: dict[str, Tensor]) -> None:
    own = teacher.state_dict()
    wrong = [f"no {key}" for key in own if key not in state and not key.endswith("num_batches_tracked")]
    wrong += [f"an unknown {key}" for key in state if key not in own]
    wrong += [
        f"{key} of shape {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more differences" if len(wrong) > 3 else ""
        raise SurgeryError(
            f"not a plain bottleneck ResNet that this network can take over: {', '.join(wrong[:3])}{more}"
        )
    teacher.load_state_dict({**own, **state})


def _check_alike(resnet: nn.Module, teacher: nn.Module) -> None:
    """What a state dict doesn't tell: strides, padding, activations, pooling."""
    given = dict(resnet.named_modules())
    for name, expected in teacher.named_modules():
        if name not in given or any(expected.children()):
            continue
        if type(given[name]).__name__ != type(expected).__name__:
            raise SurgeryError(f"expected {name} to be {type(expected).__name__}, got {type(given[name]).__name__}")
        for what in ("kernel_size", "stride", "padding", "dilation", "groups", "eps"):
            got, want = getattr(given[name], what, None), getattr(expected, what, None)
            if got != want:
                raise SurgeryError(f"expected {name} with {what} {want}, got {got}")


# Statistics of the maps that a block's first 1x1 makes ----------------------------------------------------------


@dataclass
class _Moments:
    """What least squares need to make a block's `w` first maps, ReLU(bn1(conv1(x))), of one another by a depthwise 3x3.

    The maps to make are the ResNet's; those to make them of may be what is left of them in the Ghost-ResNet."""

    mean: Tensor  # (w,), of the maps to make
    var: Tensor  # (w,), of the maps to make
    tap_mean: Tensor  # (w, 9), of the maps to make them of, as the nine taps see them
    tap_cov: Tensor  # (w, 9, 9), of these
    cross_cov: Tensor  # (w, 9, w): of map j at tap t with map i to make


def _sums(sources: Tensor, targets: Tensor) -> list[Tensor]:
    """Of maps `(N, w, H, W)`: number of positions, and sums of what `_Moments` holds, uncentred."""
    seen = F.unfold(sources, 3, padding=1).unflatten(1, (-1, TAPS))
    seen = seen.permute(1, 2, 0, 3).flatten(2)  # (w, 9, N * H * W)
    flat = targets.transpose(0, 1).flatten(1)
    cross = (seen.flatten(0, 1) @ flat.T).unflatten(0, seen.shape[:2])
    sums = [torch.tensor(flat.shape[1]), flat.sum(1), flat.square().sum(1), seen.sum(2), seen @ seen.mT, cross]
    return [value.to("cpu", torch.float64) for value in sums]


def _measured(batches: Iterable[list[Tensor]]) -> tuple[int, _Moments]:
    """Number of positions, and moments, from the `_sums` of each batch."""
    total = [torch.stack(values).sum(0) for values in zip(*batches, strict=True)]
    mean, square, tap_mean, tap_square, cross = (value / total[0] for value in total[1:])
    tap_cov = tap_square - tap_mean[:, :, None] * tap_mean[:, None]
    return int(total[0]), _Moments(mean, square - mean**2, tap_mean, tap_cov, cross - tap_mean[:, :, None] * mean)


def _blend(measured: _Moments, prior: _Moments, weight: float) -> _Moments:
    return _Moments(**{k: torch.lerp(v, getattr(prior, k), weight) for k, v in vars(measured).items()})


def _estimate(teacher: Any) -> dict[str, _Moments]:
    """Follow mean and covariance of Gaussian features through the network; batch norms say how large they are.

    The image counts as white noise, and neighbouring positions of a map as independent."""
    moments: dict[str, _Moments] = {}
    mean, cov = _rectified(*_normed(teacher.conv1, teacher.bn1, torch.eye(teacher.conv1.in_channels)))
    for name, block in blocks_of(teacher).items():
        if moments:
            mean, cov = _rectified(mean, cov)  # the ReLU at the end of the block before
        short_mean, short_cov = mean, cov
        if block.downsample is not None:
            short_mean, short_cov = _normed(block.downsample[0], block.downsample[1], cov)
        mean, cov = _rectified(*_normed(block.conv1, block.bn1, cov))
        var = cov.diagonal()
        cross_cov = cov.new_zeros(len(var), TAPS, len(var))
        cross_cov[:, TAPS // 2] = cov
        tap_cov = var[:, None, None] * torch.eye(TAPS, dtype=var.dtype)
        moments[name] = _Moments(mean, var, mean[:, None].expand(-1, TAPS), tap_cov, cross_cov)
        mean, cov = _rectified(*_normed(block.conv2, block.bn2, cov))
        mean, cov = _normed(block.conv3, block.bn3, cov)
        mean, cov = mean + short_mean, cov + short_cov
    return moments


def _normed(conv: nn.Conv2d, norm: nn.BatchNorm2d, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance after a convolution of maps with covariance `cov`, and a batch norm."""
    weight = conv.weight.double().flatten(2).permute(2, 0, 1)
    cov = (weight @ cov.to(weight) @ weight.mT).sum(0)
    scale = norm.weight / cov.diagonal().clamp_min(1e-12).sqrt()
    return norm.bias.double(), cov * torch.outer(scale, scale)


def _rectified(mean: Tensor, cov: Tensor, terms: int = 8) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the ReLU of a Gaussian vector, by the ReLU's Hermite series."""
    std = cov.diagonal().clamp_min(1e-12).sqrt()
    correlation, at = cov / torch.outer(std, std), mean / std
    density, above = torch.exp(-(at**2) / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(at)
    coefficient, power, hermite, before = std * above, correlation, torch.ones_like(at), torch.zeros_like(at)
    out = torch.zeros_like(cov)
    for k in range(1, terms + 1):
        out.addcmul_(power, torch.outer(coefficient, coefficient))
        power = power * correlation
        coefficient = std * density * hermite / math.sqrt(k * (k + 1))
        hermite, before = (-at * hermite - math.sqrt(k - 1) * before) / math.sqrt(k), hermite
    return std * (at * above + density), out


# The operation --------------------------------------------------------------------------------------------------


def _calibrate(student: GhostResNet, teacher: GhostResNet, batches: Batches, estimates: dict[str, _Moments]) -> None:
    """Operate block by block: pairs by the ResNet's own maps, kernels so that the student's give the ResNet's."""
    importance, theirs = _importance_on(teacher, batches)
    ours = list(theirs)
    for name, block in blocks_of(teacher).items():

        def maps(features: Tensor, block: Any = block) -> Tensor:
            return F.relu(block.bn1(block.conv1(features)))

        _, own = _measured(_sums(maps(x), maps(x)) for x in theirs)
        error = _fit(_blend(own, estimates[name], PRIOR_SHARE)).error
        positions, across = _measured(_sums(maps(x), maps(y)) for x, y in zip(ours, theirs, strict=True))
        moments = _blend(across, estimates[name], PRIOR_POSITIONS / (positions + PRIOR_POSITIONS))
        ghost_block = blocks_of(student)[name]
        _replace_first_1x1(ghost_block, block, _match(error * importance[name]), moments)
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):  # in place: they are most of the memory
            ours[i], theirs[i] = ghost_block(x), block(y)


@dataclass
class _Fit:
    """Least squares of every map by a depthwise 3x3 of every map."""

    kernels: Tensor  # (w, 9, w): to make map i from map j
    error: Tensor  # (w, w): variance of map i that is left over when it is made from map j


def _fit(moments: _Moments) -> _Fit:
    kernels = torch.linalg.pinv(moments.tap_cov, rtol=1e-6, hermitian=True) @ moments.cross_cov
    return _Fit(kernels, (moments.var - (kernels * moments.cross_cov).sum(1)).clamp_min(0))


def _replace_first_1x1(ghost_block: Any, block: Any, pairs: tuple[Tensor, Tensor], moments: _Moments) -> None:
    """Fill a Ghost bottleneck's module, the batch norm after it, and the 3x3 in the order of the module's maps."""
    primary, ghost = pairs
    order = torch.cat([primary, ghost])
    kernel = _fit(moments).kernels[primary, :, ghost]
    tap_mean, tap_cov = moments.tap_mean[primary], moments.tap_cov[primary]
    cheap_mean = (kernel * tap_mean).sum(1)
    cheap_var = torch.einsum("ws,wst,wt->w", kernel, tap_cov, kernel)
    centre = TAPS // 2
    mean = torch.cat([tap_mean[:, centre], moments.mean[ghost]])
    var = torch.cat([tap_cov[:, centre, centre], moments.var[ghost]])

    module = ghost_block.conv1
    module.primary_conv[0].weight.copy_(block.conv1.weight[primary])
    for key, value in block.bn1.state_dict().items():
        module.primary_conv[1].state_dict()[key].copy_(value[primary] if value.ndim else value)
    module.cheap_operation[0].weight.copy_(kernel.view_as(module.cheap_operation[0].weight))
    _set_identity(module.cheap_operation[1], cheap_mean, cheap_var, moments.mean[ghost] - cheap_mean)
    _set_identity(ghost_block.bn1, mean, var)
    ghost_block.conv2.weight.copy_(block.conv2.weight[:, order])


def _importance_on(teacher: Any, batches: Batches) -> tuple[dict[str, Tensor], list[Tensor]]:
    """How much a unit of white noise in each of a block's first maps changes the answers, and the stem's features.

    The change is the divergence of the predicted classes, to second order: the mean squared gradient of the
    log-probability of a class that is drawn as predicted (Fisher information). Without a head it is that of features.
    """
    importance: dict[str, Tensor] = {}
    features: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for batch in images_of(batches):
        images = batch.clone() if batch.is_inference() else batch
        images = images.to(teacher.conv1.weight.device)
        maps: dict[str, Tensor] = {}
        with torch.enable_grad(), watch(teacher, "act1", maps.__setitem__):
            output = teacher(images)
        if teacher.num_classes:
            drawn = torch.rand(len(images), 1, generator=generator).to(output)
            likely = output.softmax(1)
            classes = torch.searchsorted(likely.cumsum(1), drawn).clamp_max(teacher.num_classes - 1)
            direction = torch.zeros_like(output).scatter(1, classes, 1) - likely
        else:
            direction = (torch.rand(output.shape, generator=generator) - 0.5).to(output)
        gradients = torch.autograd.grad(output, list(maps.values()), direction)
        for name, gradient in zip(maps, gradients, strict=True):
            squared = gradient.square().sum((0, 2, 3)).to("cpu", torch.float64)
            importance[name] = importance.get(name, 0) + squared
        features.append(stem_features(teacher, images))
    if not features:
        raise SurgeryError("expected at least one batch of calibration images, got none")
    return importance, features


def _importance(block: Any) -> Tensor:
    """The same without images: how much the noise weighs in what the block adds to its shortcut."""
    gain2 = block.bn2.weight / (block.bn2.running_var + block.bn2.eps).sqrt()
    gain3 = block.bn3.weight / (block.bn3.running_var + block.bn3.eps).sqrt()
    after = (block.conv3.weight.flatten(1) * gain3[:, None]).square().sum(0) * gain2**2
    return after.double() @ block.conv2.weight.double().square().sum((2, 3))


def _match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Split all maps into pairs (kept, replaced) of least total cost; `cost[j, i]` is that of making i from j."""
    pair = torch.minimum(cost, cost.T)
    gain = ((1 - pair / pair.max().clamp_min(1e-300)) * 2**40).long()  # the solver takes integers
    width = len(cost)
    graph = rustworkx.PyGraph()
    graph.add_nodes_from(range(width))
    a, b = torch.triu_indices(width, width, offset=1)
    graph.add_edges_from(list(zip(a.tolist(), b.tolist(), gain[a, b].tolist(), strict=True)))
    pairs = rustworkx.max_weight_matching(graph, max_cardinality=True, weight_fn=int)  # a set, in any order
    a, b = torch.tensor(sorted(sorted(pair) for pair in pairs)).T
    keep_a = cost[a, b] <= cost[b, a]
    return torch.where(keep_a, a, b), torch.where(keep_a, b, a)


def _set_identity(norm: Any, mean: Tensor, var: Tensor, shift: Tensor | float = 0.0) -> None:
    """Make a batch norm add `shift` and nothing else, with the statistics of what it sees."""
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var.clamp_min(0))
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(mean + shift)
