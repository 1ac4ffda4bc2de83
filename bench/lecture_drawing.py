"""Tables and plots of `docs/lecture.md`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PLOTS = Path("docs/lecture")
BLUE, GREY, ORANGE = "#3465a4", "#b0b0b0", "#d9822b"
Row = Sequence[str]


def table(heads: Row, rows: Sequence[Row]) -> list[str]:
    numbers = [all(row[i][:1] in "0123456789+-" for row in rows) for i in range(len(heads))]
    lines = ["---:" if each else "---" for each in numbers]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, lines, *rows)]


def figure(count: int = 1) -> tuple[Any, Any]:
    """A figure and so many axes beside each other."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(3.6 * count + 1, 2.7), layout="constrained")
    axes = np.atleast_1d(made.subplots(1, count))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes


def image(figure: Any, name: str, what: str) -> str:
    """The line that shows it."""
    save(figure, PLOTS / f"{name}.svg")
    return f"![{what}](lecture/{name}.svg)"


def save(figure: Any, out: Path) -> None:
    """Without a date or random names, so that the same figures give the same file."""
    import matplotlib

    out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": out.stem, "svg.fonttype": "none"}):
        figure.savefig(out, metadata={"Date": None})


def body(text: str, rows: Sequence[str], plot: str, remark: str) -> str:
    """Of a section: how it was measured, the table, the plot, and what to make of them."""
    return "\n".join((text, "", *rows, "", plot, "", remark))
