"""The house style of the book: palette, figure size, and tables.

Figures are 6 inches wide on white, so that their text is readable in a column of 700 pixels and on a phone, and are
SVG in notebooks.
"""

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#7a7a7a"
INK = "#262626"


def use_style() -> None:
    """Set the house style for matplotlib; in a notebook, also make its figures SVG."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.0, 3.4),
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "font.family": "DejaVu Sans",
            "font.size": 10.5,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.labelsize": 10.5,
            "axes.labelcolor": INK,
            "axes.edgecolor": GREY,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, RED, GREY]),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 9.5,
            "ytick.labelsize": 9.5,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "lines.linewidth": 2.0,
            "image.interpolation": "none",
            "image.cmap": "cividis",
            "svg.hashsalt": "convnext",
        }
    )
    if "ipykernel" in sys.modules:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


def figure(height: float = 3.4, columns: int = 1, **subplots) -> tuple[Figure, Axes]:
    """Return a figure of the book's width and `height` inches, with `columns` axes side by side: (figure, axes)."""
    use_style()
    fig, axes = plt.subplots(1, columns, figsize=(6.0, height), **subplots)
    plt.close(fig)  # a notebook shows the figure once, as the value of the cell
    return fig, axes


@dataclass(frozen=True)
class Table:
    """Rows under a header, shown as an HTML table in a notebook and as aligned text elsewhere."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = (self.header, *self.rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        aligned = [[f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:]))] for line in lines]
        return "\n".join("  ".join(line).rstrip() for line in aligned)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(cells, tag):
            sides = ("left", *["right"] * (len(cells) - 1))
            return "".join(
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>' for cell, side in zip(cells, sides)
            )

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        return f"<table><thead><tr>{line(self.header, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def table(header: Sequence[str], rows: Sequence[Sequence]) -> Table:
    """Return a table to end a cell with. Raises ValueError for a row without one cell per heading."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row needs {len(header)} cells for {list(header)}, got {len(row)}: {row}")
    return Table(tuple(header), tuple(tuple(str(cell) for cell in row) for row in rows))
