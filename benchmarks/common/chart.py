"""Charts for benchmarks, with matplotlib (`pip install 'sfumato[benchmarks]'`)."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402


def lines(curves: dict[str, list], x: str, y: str, path: Path, log: bool = False, notes: dict = {}) -> None:
    """One line for each name, through points `(x, y)`; `notes` puts a text beside each point of a name. Writes a PNG."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, points) in enumerate(curves.items()):
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "marker": "o", "markersize": 4}
        axes.plot(*zip(*points), label=name, **style)
        for point, note in zip(points, notes.get(name, [])):
            axes.annotate(note, point, fontsize=6, color=style["color"], xytext=(3, 3), textcoords="offset points")
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
