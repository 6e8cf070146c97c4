"""Plot one mask of every kind to docs/images/masks.png: `python docs/images/masks.py [FILE]`."""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from mixmo_fastai.config.choices import MASK_KINDS
from mixmo_fastai.mixing import draw_masks
from mixmo_fastai.plots.png import COLORS
from mixmo_fastai.rng import make_generator

SIZE = 32
SEED = 26  # gives an unclipped box, and areas near 0.4
NUM_CHANNELS, GRID = 16, 4
RATIOS = {2: (0.4, 0.6), 3: (0.4, 0.4, 0.2)}
PANELS = (*((kind, 2) for kind in MASK_KINDS), ("cutmix", 3))
"""Mask kind and number of members of each panel."""


def draw_panel(kind: str, num_members: int) -> tuple[Tensor, list[float]]:
    """Draw masks with member 1 in role 0; return them (M, D, h, w) and their M means."""
    masks, means = draw_masks(
        kind,
        torch.tensor([RATIOS[num_members]]),
        (NUM_CHANNELS, SIZE, SIZE),
        generator=make_generator(SEED, "masks"),
        shuffle_roles=False,
    )
    return masks[0], means[0].tolist()


def main(path: Path) -> None:
    """Plot all panels."""
    figure = Figure(figsize=(9.6, 4.2), dpi=100, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, hspace=0.04)
    FigureCanvasAgg(figure)
    for axes, (kind, num_members) in zip(figure.subplots(2, 6).flat, PANELS, strict=True):
        masks, means = draw_panel(kind, num_members)
        _plot_masks(axes, masks)
        name = kind if num_members == 2 else f"{kind}, M = {num_members}"
        ratios = " / ".join(f"{mean:.2f}" for mean in means)
        axes.set_title(f"{name}\n", fontsize=10, fontweight="bold")
        axes.text(0.5, 1.03, ratios, transform=axes.transAxes, ha="center", fontsize=9)
    members = [Patch(color=color, label=f"member {i + 1}") for i, color in enumerate(COLORS[:3])]
    figure.legend(handles=members, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def _plot_masks(axes: Axes, masks: Tensor) -> None:
    """Colour each location by its visible member; draw one tile per channel of channel masks."""
    colors = torch.tensor([to_rgb(color) for color in COLORS[: len(masks)]])
    if masks.shape[1] > 1:
        tiles = masks[:, :, 0, 0].unflatten(1, (GRID, GRID))  # (M, 4, 4)
        values = tiles.repeat_interleave(SIZE // GRID, 1).repeat_interleave(SIZE // GRID, 2)
        for edge in range(SIZE // GRID, SIZE, SIZE // GRID):
            axes.axhline(edge - 0.5, color="white", linewidth=1.5)
            axes.axvline(edge - 0.5, color="white", linewidth=1.5)
    else:
        values = masks[:, 0]
    axes.imshow(torch.einsum("mhw,mc->hwc", values, colors), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("masks.png"))
