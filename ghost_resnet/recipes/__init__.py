"""Training recipes: what a training run does, as one small readable file each."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import tomli_w

from ..errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides how a network is trained. A TOML file holds the same names.

    Attributes:
        arch: A network that timm knows.
        model_args: Further arguments of the network.
        head_classes: Outputs of the network; 0 means as many as the photos have classes.
        start: Weights to begin with: a weight tag, run folder or any other source; "" begins from scratch, and
            "auto" with the package's weights of `arch`, if it has any.
        val_fraction: Share of the photos that is set aside for validation where no list of them is given.

        img_size: Side of the training images and of the finished classifier's input, in pixels.
        smaller_first: Pairs of a side and a number of epochs to begin with, which saves time: `[[64, 90]]` trains
            90 epochs at 64 pixels, the rest at `img_size` (progressive resizing).
        crop_mode: How photos come to their size: "center" keeps the aspect ratio, "squash" gives it up.
        crop_pct: Share of the photo's side that validation and prediction keep, in (0, 1].
        interpolation: "nearest", "bilinear" or "bicubic".
        normalize: "imagenet" mean and std, or those of the training photos: "data".
        cache_side: Keep decoded photos in memory with this shorter side, or `img_size` if that is more; 0 decodes at
            each access.

        crop: Training crop: "resized" (random area and aspect, resized) or "padded" (random position after
            padding by `crop_padding`).
        crop_scale: Smallest and largest share of the area of a "resized" crop.
        crop_padding: Pixels of zero around the photo for a "padded" crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        rotation: Largest random rotation, in degrees ("padded" crop only).
        color_jitter: Strength of random brightness, contrast and saturation ("resized" crop only).
        auto_augment: timm's name of an automatic augmentation, such as "rand-m7-mstd0.5" ("resized" crop only).
        random_erasing: Probability of erasing a random rectangle ("resized" crop only).
        mixup: Mixup's alpha; 0 is off.
        cutmix: CutMix's alpha; 0 is off.
        label_smoothing: In 0..1.
        balance: Exponent of class-balanced sampling: 0 draws each photo once an epoch, 1 all classes alike.

        fit_head: First fit the head alone, on features that are computed once
            (Kumar et al., 2022, say why this should come before any fine-tuning).
        epochs: Passes over the training photos, after that; may be 0.
        patience: Stop after so many epochs without a better validation accuracy; 0 never does.
        batch_size: Photos a step, over all processes.
        accumulate: Steps whose gradients are averaged before the weights change.
        opt: timm's name of the optimizer; "sgd" is with Nesterov's momentum, "momentum" without.
        lr: Peak learning rate.
        momentum: Of SGD, or beta1.
        weight_decay: L2 penalty.
        layer_decay: Factor by which the learning rate falls from one layer group to the one before; 0 is off.
        decay_all: Also decay biases and norms, as plain `torch.optim` does; timm leaves them out.
        sched: timm's name of the schedule: "cosine" or "multistep".
        warmup_epochs: Linear warm-up from zero.
        milestones: Epochs at which "multistep" multiplies the learning rate by `decay_rate`.
        decay_rate: See `milestones`.
        clip_grad: Largest gradient norm; 0 is off.
        ema_decay: Exponential moving average of the weights, which is then what is evaluated and saved; 0 is off.

        teacher: Source of a network to learn from beside the labels; "" is none. One with the same classes
            teaches by its outputs (Hinton et al., 2015), any other by its pooled features.
        teacher_weight: Weight of the teacher's loss; the labels' is 1 less it.
        temperature: Of the softmax in the teacher's loss.

        calibration: Temperature that the finished classifier's outputs are divided by; 0 fits it on the validation
            photos.

        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the hardware has it.
        compile: Compile the network with `torch.compile`.
        workers: Processes that prepare images; 0 prepares them in the training process, and -1 takes a core each
            on a CUDA GPU and none elsewhere.
        seed: Of everything random.
    """

    arch: str = "ghost_resnet50"
    model_args: dict[str, Any] = field(default_factory=dict)
    head_classes: int = 0
    start: str = ""
    val_fraction: float = 0.15

    img_size: int = 224
    smaller_first: tuple[tuple[int, ...], ...] = ()
    crop_mode: str = "center"
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    normalize: str = "imagenet"
    cache_side: int = 0

    crop: str = "resized"
    crop_scale: tuple[float, ...] = (0.35, 1.0)
    crop_padding: int = 4
    hflip: float = 0.5
    vflip: float = 0.0
    rotation: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str = ""
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    balance: float = 0.0

    fit_head: bool = False
    epochs: int = 30
    patience: int = 0
    batch_size: int = 32
    accumulate: int = 1
    opt: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    layer_decay: float = 0.0
    decay_all: bool = False
    sched: str = "cosine"
    warmup_epochs: int = 0
    milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1
    clip_grad: float = 0.0
    ema_decay: float = 0.0

    teacher: str = ""
    teacher_weight: float = 0.5
    temperature: float = 2.0

    calibration: float = 0.0

    precision: str = "auto"
    compile: bool = False
    workers: int = -1
    seed: int = 0

    def size_at(self, epoch: int) -> int:
        """Side of the training images in epoch 0, 1, ..., in pixels."""
        for size, epochs in self.smaller_first:
            if epoch < epochs:
                return size
            epoch -= epochs
        return self.img_size

    def replace(self, changes: Mapping[str, Any]) -> "Recipe":
        """A recipe with some values changed, checked.

        Raises:
            RecipeError: An unknown name or a value of the wrong type.
        """
        types = get_type_hints(Recipe)
        checked = {}
        for name, value in changes.items():
            if name not in types:
                raise RecipeError(f"a recipe has no {name!r}; it has {', '.join(types)}")
            checked[name] = _convert(name, value, types[name])
        recipe = dataclasses.replace(self, **checked)
        recipe._check()
        return recipe

    def _check(self) -> None:
        allowed = {
            "crop": ("resized", "padded"),
            "crop_mode": ("center", "squash"),
            "normalize": ("imagenet", "data"),
            "interpolation": ("nearest", "bilinear", "bicubic"),
            "precision": ("auto", "fp32", "bf16", "fp16"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, least in {"epochs": 0, "batch_size": 1, "accumulate": 1, "img_size": 8, "workers": -1}.items():
            if getattr(self, name) < least:
                raise RecipeError(f"{name} must be at least {least}, got {getattr(self, name)}")
        shares = ("crop_pct", "hflip", "vflip", "random_erasing", "label_smoothing", "ema_decay", "teacher_weight")
        for name in (*shares, "val_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise RecipeError(f"lr must be above 0 and finite, got {self.lr}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise RecipeError(f"crop_scale must be two shares, the smaller first, got {self.crop_scale}")
        if any(len(pair) != 2 or min(pair) < 1 or pair[0] < 8 for pair in self.smaller_first):
            raise RecipeError(f"smaller_first must be pairs of a side and a number of epochs, got {self.smaller_first}")
        if self.smaller_first and sum(epochs for _, epochs in self.smaller_first) >= self.epochs:
            raise RecipeError(
                f"smaller_first = {self.smaller_first} leaves none of the epochs = {self.epochs} to img_size"
            )
        if self.epochs == 0 and not self.fit_head:
            raise RecipeError("epochs = 0 trains nothing: set fit_head = true, or more epochs")

    def to_toml(self) -> str:
        """The recipe as a TOML file that `load_recipe` reads back."""
        return tomli_w.dumps(dataclasses.asdict(self))


def _convert(name: str, value: Any, kind: Any) -> Any:
    origin = get_origin(kind) or kind
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, list | tuple):
        element = get_args(kind)[0]
        return tuple(_convert(name, item, element) for item in value)
    if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"{name} must be {kind if get_args(kind) else kind.__name__}, got {value!r}")


def names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(source: str | Path | Recipe) -> Recipe:
    """Read a recipe by its name, from a TOML file, or take one that is there already.

    Raises:
        RecipeError: No such recipe, or not a valid one.
    """
    if isinstance(source, Recipe):
        return source
    path = FOLDER / f"{source}.toml" if str(source) in names() else Path(source)
    if not path.is_file():
        raise RecipeError(f"no recipe {str(source)!r}: expected one of {', '.join(names())}, or a TOML file")
    try:
        return Recipe().replace(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no valid TOML: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def parse_override(text: str) -> tuple[str, Any]:
    """Turn "lr=3e-4" into ("lr", 0.0003). A value that is not TOML is taken as a string.

    Raises:
        RecipeError: No `=` in it.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"expected key=value, got {text!r}")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
