"""Drawings for a page, as matplotlib's SVG in the page's own colours; and for themselves, as PNG.

The page is light or dark, and a drawing must suit both. So it is drawn in a few stand-in colours,
which become the page's CSS variables; opacity makes their shades. A PNG has the light page's.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from markupsafe import Markup
from matplotlib import cycler, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Each colour has one meaning on the whole page; "C0" is matplotlib's name for the first in force.
ENSEMBLE, MEMBERS, RIGHT, WRONG, INK = "C0", "C1", "C2", "C3", "C4"
SHADES = (0.35, 0.55, 0.75, 1.0)
"""Opacities of the ink for an ordered quantity, from its first step to its last."""
STAND_INS = {
    "#010103": "var(--ensemble)",
    "#010104": "var(--members)",
    "#010105": "var(--right)",
    "#010106": "var(--wrong)",
    "#010101": "var(--ink)",
    "#010102": "var(--line)",
}
LIGHT = ("#0072b2", "#a0468a", "#00805c", "#d55e00", "#1b1f24", "#d5dae0")
"""The light page's colours, in the same order."""
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and selected
    "text.parse_math": False,  # a class may be called $5$
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
_OF_INK = ("axes.edgecolor", "text.color", "axes.labelcolor", "xtick.color", "ytick.color")
_NAMESPACE = re.compile(r"\{[^}]*\}")


@dataclass(frozen=True)
class Drawing:
    """A figure that is drawn when it is asked for.

    Attributes:
        plot: draws on an empty figure, in the colours of this module.
        name: of the figure, unlike any other on the page.
        text: what it shows, for those who do not see it.
        size: width and height in inches.
    """

    plot: Callable[[Figure], None]
    name: str
    text: str
    size: tuple[float, float] = (4.1, 2.9)

    def svg(self) -> Markup:
        """Draw it to be put into a page: an <svg> element without references beyond itself."""
        file = io.BytesIO()
        style = _style(tuple(STAND_INS), background="none")
        with rc_context({**style, "svg.hashsalt": self.name}):
            FigureCanvasSVG(self._figure()).print_svg(file, metadata={"Date": None})
        root = ET.fromstring(file.getvalue())
        for element in root.iter():
            for child in [c for c in element if c.tag.endswith(("}metadata", "}style"))]:
                element.remove(child)
            element.tag = _NAMESPACE.sub("", element.tag)  # HTML knows SVG without namespaces
            element.attrib = {
                _NAMESPACE.sub("", key): _own_names(key, value, self.name)
                for key, value in element.attrib.items()
            }
        for key in ("width", "height", "version"):
            root.attrib.pop(key)
        root.attrib |= {"role": "img", "aria-label": self.text}
        return Markup(_in_page_colors(ET.tostring(root, encoding="unicode")))

    def png(self, title: str = "") -> bytes:
        """Draw it to stand alone, on white, below a title."""
        file = io.BytesIO()
        with rc_context(_style(LIGHT, background="white")):
            figure = self._figure()
            if title:
                figure.suptitle(title, fontsize=10)
            figure.set_dpi(160)
            FigureCanvasAgg(figure).print_png(file)
        return file.getvalue()

    def _figure(self) -> Figure:
        figure = Figure(figsize=self.size, layout="constrained")
        self.plot(figure)
        return figure


def _style(colors: tuple[str, ...], background: str) -> dict[str, Any]:
    *cycle, line = colors
    return {
        **_STYLE,
        "axes.prop_cycle": cycler(color=cycle),
        "grid.color": line,
        **dict.fromkeys(_OF_INK, cycle[-1]),
        "figure.facecolor": background,
        "savefig.facecolor": background,
    }


def _own_names(key: str, value: str, prefix: str) -> str:
    """Make an element's name, and references to one, unlike those of other drawings."""
    if key == "id":
        return f"{prefix}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{prefix}-", 1)
    return value.replace("url(#", f"url(#{prefix}-")


def _in_page_colors(svg: str) -> str:
    for color, variable in STAND_INS.items():
        svg = svg.replace(color, variable)
    return svg
