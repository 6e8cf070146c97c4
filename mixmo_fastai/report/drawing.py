"""Plots as SVG in the colours of the page, or as PNG.

The page has a light and a dark theme, and plots must work in both. Plots are therefore drawn in a
few placeholder colours, which are replaced by CSS variables of the page; shades are made by
opacity. A PNG uses the colours of the light theme.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from markupsafe import Markup
from matplotlib import cycler, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Each colour has one meaning on the whole page; "C0" is the first colour of matplotlib's cycle.
ENSEMBLE, MEMBERS, CORRECT, INCORRECT, INK = "C0", "C1", "C2", "C3", "C4"
OPACITIES = (0.35, 0.55, 0.75, 1.0)
"""Opacities of INK for the lines of an ordered quantity, from first to last."""
PLACEHOLDER_COLORS = {
    "#010103": "var(--ensemble)",
    "#010104": "var(--members)",
    "#010105": "var(--correct)",
    "#010106": "var(--incorrect)",
    "#010101": "var(--ink)",
    "#010102": "var(--line)",
}
LIGHT = ("#0072b2", "#a0468a", "#00805c", "#d55e00", "#1b1f24", "#d5dae0")
"""Colours of the light theme, in the same order."""
_STYLE = {
    "svg.fonttype": "none",  # text stays text, for screen readers, search and selection
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
_INK_KEYS = ("axes.edgecolor", "text.color", "axes.labelcolor", "xtick.color", "ytick.color")
_NAMESPACE = re.compile(r"\{[^}]*\}")


@dataclass(frozen=True)
class Plot:
    """A plot that is rendered on demand.

    Attributes:
        draw: draws on an empty figure, in the colours of this module.
        name: name of the plot, unique on the page.
        alt_text: description of the content, for screen readers.
        size: width and height in inches.
    """

    draw: Callable[[Figure], None]
    name: str
    alt_text: str
    size: tuple[float, float] = (4.1, 2.9)

    def svg(self) -> Markup:
        """Render as an <svg> element for a page, without external references."""
        file = io.BytesIO()
        style = _style(tuple(PLACEHOLDER_COLORS), background="none")
        with rc_context({**style, "svg.hashsalt": self.name}), warnings.catch_warnings():
            # Text stays text, so fonts without its letters, as Chinese ones, do not matter.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            FigureCanvasSVG(self._figure()).print_svg(file, metadata={"Date": None})
        root = ET.fromstring(file.getvalue())
        for element in root.iter():
            for child in [c for c in element if c.tag.endswith(("}metadata", "}style"))]:
                element.remove(child)
            element.tag = _NAMESPACE.sub("", element.tag)  # inline SVG needs no namespaces in HTML
            element.attrib = {
                _NAMESPACE.sub("", key): _add_prefix(key, value, self.name)
                for key, value in element.attrib.items()
            }
        for key in ("width", "height", "version"):
            root.attrib.pop(key)
        root.attrib |= {"role": "img", "aria-label": self.alt_text}
        return Markup(_in_page_colors(ET.tostring(root, encoding="unicode")))

    def png(self, title: str = "") -> bytes:
        """Render as PNG data on a white background, with a title."""
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
        self.draw(figure)
        return figure


def _style(colors: tuple[str, ...], background: str) -> dict[str, Any]:
    *cycle, line = colors
    return {
        **_STYLE,
        "axes.prop_cycle": cycler(color=cycle),
        "grid.color": line,
        **dict.fromkeys(_INK_KEYS, cycle[-1]),
        "figure.facecolor": background,
        "savefig.facecolor": background,
    }


def _add_prefix(key: str, value: str, prefix: str) -> str:
    """Add a prefix to ids and to references to them, so that ids are unique on the page."""
    if key == "id":
        return f"{prefix}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{prefix}-", 1)
    return value.replace("url(#", f"url(#{prefix}-")


def _in_page_colors(svg: str) -> str:
    for color, variable in PLACEHOLDER_COLORS.items():
        svg = svg.replace(color, variable)
    return svg
