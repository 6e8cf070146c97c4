"""Drawings for a page: matplotlib's SVG, in the page's own colours.

The page is light or dark, and a drawing must suit both. So it is drawn in a few stand-in colours,
which become the page's CSS variables; opacity makes their shades.
"""

import io
import re
from collections.abc import Callable
from xml.etree import ElementTree as ET

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, FAINT = "#010101", "#010102"
SERIES = ("#010103", "#010104", "#010105", "#010106")
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--line)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)},
}
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
    "grid.color": FAINT,
    "axes.edgecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
_NAMESPACE = re.compile(r"\{[^}]*\}")


def draw(
    plot: Callable[[Figure], None], name: str, text: str, *, size: tuple[float, float] = (4.6, 3.1)
) -> Markup:
    """Draw a figure as SVG to be put into a page.

    Args:
        plot: draws on an empty figure, in the colours of this module.
        name: of the figure, unlike any other on the page.
        text: what it shows, for those who do not see it.
        size: width and height in inches.

    Returns:
        an <svg> element without references beyond itself.
    """
    file = io.BytesIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    for element in root.iter():
        for child in [c for c in element if c.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
        element.tag = _NAMESPACE.sub("", element.tag)  # HTML knows SVG without namespaces
        element.attrib = {
            _NAMESPACE.sub("", key): _own_names(key, value, name)
            for key, value in element.attrib.items()
        }
    for key in ("width", "height", "version"):
        root.attrib.pop(key)
    root.attrib |= {"role": "img", "aria-label": text}
    return Markup(_in_page_colors(ET.tostring(root, encoding="unicode")))


def _own_names(key: str, value: str, prefix: str) -> str:
    """Make an element's name, and references to one, unlike those of other drawings."""
    if key == "id":
        return f"{prefix}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{prefix}-", 1)
    return value.replace("url(#", f"url(#{prefix}-")


def _in_page_colors(svg: str) -> str:
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
