"""Draws docs/images/ghost_module.svg: what a Ghost module computes, from a drawn bottle and a real `GhostModule`.

    python docs/images/ghost_module.py [OUT.svg]

The filters are set by hand, so that one sees what each of them does; a network learns its own.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image, ImageDraw
from torch import Tensor

from ghost_resnet import GhostModule

INK, GREY, BLUE, ORANGE = "#263238", "#90a4ae", "#1565c0", "#e65100"
PRIMARY = {
    "upright edges": [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]],
    "level edges": [[-1, -2, -1], [0, 0, 0], [1, 2, 1]],
    "dark places": [[-1, -1, -1]] * 3,
    "light places": [[1, 1, 1]] * 3,
}
CHEAP = {
    "spread": [[1, 1, 1]] * 3,
    "lower rims": [[-1, -2, -1], [0, 0, 0], [1, 2, 1]],
    "outlined": [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]],
    "one slope": [[2, 1, 0], [1, 0, -1], [0, -1, -2]],
}


def bottle(side: int = 40) -> Image.Image:
    """A picture of a bottle on a table."""
    image = Image.new("RGB", (8 * side, 8 * side), "#cfd8dc")
    pen = ImageDraw.Draw(image)
    pen.rectangle([0, 250, 320, 320], fill="#a1887f")
    pen.rounded_rectangle([112, 118, 208, 288], 26, fill="#2e7d32")
    pen.rectangle([140, 48, 180, 130], fill="#2e7d32")
    pen.rectangle([134, 30, 186, 54], fill="#fbc02d")
    pen.rectangle([112, 180, 208, 240], fill="#fff8e1")
    pen.rectangle([126, 130, 138, 172], fill="#a5d6a7")
    return image.resize((side, side), Image.Resampling.LANCZOS)


def maps_of(image: Image.Image) -> tuple[Tensor, Tensor]:
    """The four primary maps and the four ghosts that a module with the filters above makes of a picture."""
    module = GhostModule(3, 8, kernel_size=3).eval()
    first, cheap = module.primary_conv[0].weight.data, module.cheap_operation[0].weight.data
    for number, (kernel, ghost) in enumerate(zip(PRIMARY.values(), CHEAP.values(), strict=True)):
        first[number] = torch.tensor(kernel).float()
        cheap[number, 0] = torch.tensor(ghost).float()
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        maps = module(x - x.mean())[0, :, 1:-1, 1:-1]  # no padding in the picture
    return maps[:4], maps[4:]


def picture(figure: plt.Figure, x: float, y: float, width: float, pixels: np.ndarray, colour: str) -> None:
    """Put a picture's middle at (x, y), in inches."""
    across, up = figure.get_size_inches()
    ax = figure.add_axes([(x - width / 2) / across, (y - width / 2) / up, width / across, width / up])
    ax.imshow(pixels, cmap="Greys_r", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(color=colour, linewidth=1.8)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.4, shrinkA=0))


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.04", fc=colour + "18", ec=colour, lw=1.4)
    ax.add_patch(style)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=colour, fontsize=9.5, linespacing=1.5)


def draw(path: Path) -> None:
    """Draw the figure and write it as SVG, the same bytes each time."""
    plt.rcParams.update({"svg.hashsalt": "ghost", "font.family": "DejaVu Sans", "text.color": INK})
    image = bottle()
    primary, ghosts = maps_of(image)
    size = width, height = 9.6, 5.2
    figure = plt.figure(figsize=size, facecolor="white")
    ax = figure.add_axes([0, 0, 1, 1])
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")

    rows = [4.02 - 0.95 * number for number in range(4)]
    middle = (rows[0] + rows[-1]) / 2
    for x, text, colour in [
        (0.85, "input", INK),
        (4.2, "primary maps", BLUE),
        (7.25, "ghosts", ORANGE),
        (8.9, "output", INK),
    ]:
        ax.text(x, 4.82, text, ha="center", va="center", color=colour, fontsize=11, fontweight="bold")

    picture(figure, 0.85, middle, 1.2, np.asarray(image), INK)
    ax.text(0.85, middle - 0.78, "c maps\n(here 3 colours)", ha="center", va="top", fontsize=8.5)
    arrow(ax, (1.5, middle), (1.85, middle), INK)
    box(ax, 1.95, middle - 0.75, 1.2, 1.5, "convolution\nover all c maps,\nhalf of the\nfilters only", BLUE)

    for y, kept, ghost, (name, ghost_name) in zip(rows, primary, ghosts, zip(PRIMARY, CHEAP, strict=True), strict=True):
        arrow(ax, (3.24, middle + (y - middle) * 0.3), (3.78, y), BLUE)
        picture(figure, 4.2, y, 0.72, kept.numpy(), BLUE)
        ax.text(4.2, y - 0.43, name, ha="center", va="center", fontsize=7.5, color=BLUE)
        arrow(ax, (4.62, y), (5.15, y), ORANGE)
        box(ax, 5.25, y - 0.22, 1.1, 0.44, "one 3×3", ORANGE)
        arrow(ax, (6.44, y), (6.83, y), ORANGE)
        picture(figure, 7.25, y, 0.72, ghost.numpy(), ORANGE)
        ax.text(7.25, y - 0.43, ghost_name, ha="center", va="center", fontsize=7.5, color=ORANGE)
    ax.text(5.8, rows[0] + 0.4, "depthwise", ha="center", va="center", fontsize=9, color=ORANGE)

    for number, (maps, colour) in enumerate([(primary, BLUE), (ghosts, ORANGE)]):
        for index, single in enumerate(maps):
            step = 4 * number + index
            picture(figure, 8.9, rows[0] - 0.42 * step + 0.02, 0.37, single.numpy(), colour)
    arrow(ax, (7.68, middle), (8.55, middle), ORANGE)
    ax.plot([4.2, 4.2, 8.9], [rows[-1] - 0.52, 0.44, 0.44], color=BLUE, lw=1.4, solid_joinstyle="round")
    arrow(ax, (8.9, 0.44), (8.9, 0.82), BLUE)
    ax.text(6.55, 0.5, "kept as they are", ha="center", va="bottom", fontsize=8, color=BLUE)
    ax.text(8.1, middle + 0.13, "beside\nthe primary\nmaps", ha="center", va="bottom", fontsize=8, color=ORANGE)
    ax.text(
        width / 2,
        0.18,
        "Half of the output costs a convolution over all inputs; the other half costs nine multiplications a pixel.",
        ha="center",
        va="center",
        fontsize=9.5,
    )
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
