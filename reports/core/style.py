"""How things look and are called: colours, names, number formats, direct labels. Figures and tables both use it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.framework.files import write_bytes_atomically

DASH, MINUS = "\u2013", "\u2212"  # what was not measured; a typeset minus
WIDTH = 6.9  # inches: the text width of the PDF page, so that figure text is printed at its own size

# Okabe and Ito's palette: told apart with every common form of colour blindness.
GREY, BLACK, BLUE, GREEN, ORANGE = "#6E6E6E", "#000000", "#0072B2", "#009E73", "#E69F00"
VERMILLION, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"

INK = {ORANGE: "#996A00", PURPLE: "#A3487C", SKY: "#1F78B0"}  # the light ones as letters: contrast 4.5 on white

VARIANT_COLOURS = {
    "dense": GREY,
    "cats-50": BLUE,
    "cats-70": GREEN,
    "cats-90": ORANGE,
    "relufication": VERMILLION,
    "cats-matched": PURPLE,
    "cats-50-attention": SKY,
}
VARIANT_NAMES = {
    "dense": "Base",
    "relufication": "ReLUfication",
    "cats-matched": "CATS at ReLU's sparsity",
}
IMPLEMENTATION_COLOURS = {
    "dense": GREY,
    "cats": BLUE,
    "fused-mask": GREEN,
    "fused-compact": ORANGE,
    "gather": VERMILLION,
    "optimal-all-three-shrunk": BLACK,
    "dense-compiled": PURPLE,
}
IMPLEMENTATION_NAMES = {
    "dense": "dense",
    "cats": "CATS (ours)",
    "fused-mask": "fused, mask",
    "fused-compact": "fused, compacting",
    "gather": "unfused, compacting",
    "optimal-all-three-shrunk": "“Optimal”",
    "dense-compiled": "dense, compiled",
}
TASK_NAMES = {
    "winogrande": "WinoGrande",
    "piqa": "PIQA",
    "sciq": "SciQ",
    "openbookqa": "OBQA",
    "hellaswag": "HellaSwag",
    "boolq": "BoolQ",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "cola": "CoLA",
    "sst2": "SST-2",
}
MODEL_NAMES = {"mistral-7b": "Mistral-7B", "llama2-7b": "Llama2-7B", "llama2-13b": "Llama2-13B"}
PAPER_IMPLEMENTATIONS = {  # the paper's CSV names -> the same algorithm's name here
    "dense": "dense",
    "cats-kernel": "fused-mask",
    "ablation-method1": "fused-compact",
    "ablation-baseline": "gather",
    "optimal-all-three-shrunk": "optimal-all-three-shrunk",
}

End = tuple[float, float, str, str]
_LABELS: WeakKeyDictionary[Figure, list[tuple[Axes, list[End], float, bool]]] = WeakKeyDictionary()

plt.rcParams.update(
    {
        "font.family": ["STIXGeneral", "DejaVu Serif"],  # goes with the report's Libertinus; shipped with matplotlib
        "mathtext.fontset": "stix",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.edgecolor": "#444444",
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "lines.linewidth": 1.4,
        "lines.markersize": 3.5,
        "figure.constrained_layout.use": True,
        "svg.fonttype": "path",  # no font is needed where the report is read
        "svg.hashsalt": "cats",  # the same data give the same file
    }
)


OTHER_COLOURS = (PURPLE, SKY, BLACK, GREEN, ORANGE, VERMILLION)


def variant_colour(variant: str) -> str:
    """Colour of a variant; purple for one that the palette does not know."""
    return VARIANT_COLOURS.get(variant.removesuffix("-finetuned"), PURPLE)


def variant_name(variant: str) -> str:
    """`cats-50` -> `CATS-50`, `dense` -> `Base`, `cats-50-attention` -> `CATS-50, attention too`.

    Another criterion keeps its own name: `gate-norm-50` stays.
    """
    plain = variant.removesuffix("-finetuned")
    name = VARIANT_NAMES.get(plain, plain)
    if name.startswith("cats-"):
        name = name.replace("cats-", "CATS-").replace("-attention", ", attention too")
    return name + ", fine-tuned" * (plain != variant)


def model_name(model: str) -> str:
    """A shape's name as the paper writes it, `mistral-7b` -> `Mistral-7B`; of a path the last part; others stay.

    Of a GGUF file the model and how its weights were quantised: `a-1b.Q4_K_M.gguf` -> `a-1b (Q4_K_M)`.
    """
    name = model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", "./", "../", "~")) else model
    name = re.sub(r"[.-](\w+)\.gguf$", r" (\1)", name)
    return MODEL_NAMES.get(name.removeprefix("shape:"), name)


def plain_name(model: str) -> str:
    """`model_name` without how the weights were quantised."""
    return re.sub(r" \(\w+\)$", "", model_name(model))


def short_name(model: str) -> str:
    """`plain_name` for a narrow place: without what the model was tuned for."""
    return plain_name(model).removesuffix("-instruct")


def size_name(model: str) -> str:
    """How many parameters a model's name says that it has: `gemma-3-270m` -> `270m`; nothing where it says nothing."""
    sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?[mb])(?![a-z0-9])", plain_name(model).lower())
    return str(sizes[-1]) if sizes else ""


def parameters(model: str) -> float:
    """`size_name` as a number; NaN where the name says nothing."""
    size = size_name(model)
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]] if size else math.nan


def dtype_name(dtype: str) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return dtype.removeprefix("torch.")


def task_name(task: str) -> str:
    """A task's name as its authors write it; one of the pocket tasks with spaces for underscores."""
    task = task.removeprefix("pocket_").removeprefix("instruct_")
    return TASK_NAMES.get(task, task.replace("_", " "))


def number(value: float, digits: int = 4) -> str:
    """Fixed number of decimals; a dash for what was not measured."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def plus_minus(value: float, stderr: float, digits: int = 4) -> str:
    """`0.6890 ± 0.0043`; without the error when it is unknown."""
    if not math.isfinite(value):
        return DASH
    return f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if math.isfinite(stderr) else "")


def percent(share: float, digits: int = 1) -> str:
    """`0.5` -> `50.0 %`."""
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of accuracies in points, signed: `-1.04`."""
    return DASH if not math.isfinite(difference) else f"{100 * difference:+.2f}".replace("-", MINUS)


def signed_percent(share: float, digits: int = 1) -> str:
    """An increase: `0.0121` -> `+1.2 %`."""
    return DASH if not math.isfinite(share) else f"{100 * share:+.{digits}f} %".replace("-", MINUS)


def times(ratio: float) -> str:
    """A speed-up: `1.52x`."""
    return DASH if ratio is None or not math.isfinite(ratio) else f"{ratio:.2f}x"


def times_range(low: float, high: float) -> str:
    """`1.55 to 1.57x`; one number where both are written the same."""
    return times(high) if times(low) == times(high) else f"{low:.2f} to {times(high)}"


def ratio_error(stderr: float) -> str:
    """` ± 0.02` after a ratio, at least 0.001; nothing when it is unknown."""
    if not math.isfinite(stderr):
        return ""
    return f" ± {stderr:.2f}" if stderr >= 0.01 else f" ± {max(stderr, 0.001):.3f}"


def significant(value: float) -> str:
    """Three significant digits, never as a power of ten: `34.7`, `0.183`."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def listed(value: Any) -> str:
    """A recorded setting in words: `{"float32": [0.5, 0.7]}` -> `float32 0.5, 0.7`; nothing for what is not set."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {listed(inner)}" for key, inner in value.items() if inner not in (None, "", [], {}))
    if isinstance(value, list):
        return ", ".join(map(listed, value))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def duration(seconds: float) -> str:
    """Seconds in words: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    if not math.isfinite(seconds):
        return "an unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def panels(count: int, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of ``count`` panels, three side by side or lines of two, and its axes (lines, columns); a line is
    ``height`` inches high."""
    columns = 3 if count == 3 else min(2, count)
    lines = -(-count // columns)
    size = (WIDTH if columns > 1 else 4.6, height * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, axes


def sparsity_axis(ax: Axes, end: float) -> None:
    """A horizontal axis of 0 to 100 % sparsity that leaves room for labels up to `end`."""
    ax.set_xlim(-3, end)
    ax.set_xticks([0, 25, 50, 75, 100])
    ax.spines.bottom.set_bounds(-3, 100)


def level_line(ax: Axes, y: float) -> None:
    """A grey line across the measured part of a sparsity axis, behind the data."""
    ax.plot([-3, 100], [y, y], color=GREY, lw=0.8, zorder=1)


def label_ends(ax: Axes, ends: Iterable[End], size: float = 8.0, in_a_column: bool = True) -> None:
    """Write each line's name at its end when the figure is saved. `ends`: (x, y, text, colour).

    The names stand in one column to the right of every line of the axes, so that none is written over a longer line;
    with ``in_a_column`` False each stands beside its own point.
    """
    figure = ax.get_figure(root=True)
    if figure is not None:
        finite = [end for end in ends if math.isfinite(end[1])]
        _LABELS.setdefault(figure, []).append((ax, finite, size, in_a_column))


def _place_labels(figure: Figure) -> None:
    """Push the names of each axes apart, so that none overlaps another; needs the final layout, hence at saving."""
    if figure not in _LABELS:
        return
    figure.draw_without_rendering()
    for ax, ends, size, in_a_column in _LABELS.pop(figure):
        right = max([*(end[0] for end in ends), *_right_ends(ax)], default=0.0)
        gap = size * 1.15 * figure.dpi / 72
        items = sorted(ends, key=lambda end: end[1])
        wanted = [float(ax.transData.transform((x, y))[1]) for x, y, _, _ in items]
        placed = _apart(wanted, gap)
        if placed:  # pushing only upwards would drift a crowded group: back to its middle, and out of the title
            shift = sum(placed) / len(placed) - sum(wanted) / len(wanted)
            placed = _apart([now - shift for now in placed], gap)
            above = max(0.0, placed[-1] + gap / 2 - float(ax.bbox.y1))
            placed = [now - above for now in placed]
        for (x, y, text, colour), now, then in zip(items, placed, wanted, strict=True):
            offset = (4.0, (now - then) * 72 / figure.dpi)
            x = right if in_a_column else x
            look: dict[str, Any] = {"fontsize": size, "va": "center", "annotation_clip": False}
            look["color"] = INK.get(colour, colour)
            if not in_a_column:  # beside its point it may lie on a line across the panel
                look["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            ax.annotate(text, (x, y), xytext=offset, textcoords="offset points", **look)


def _right_ends(ax: Axes) -> list[float]:
    """Where the lines end that are drawn in units of the data."""
    drawn = [np.asarray(line.get_xdata(), dtype=float) for line in ax.lines if line.get_transform() == ax.transData]
    return [float(x[np.isfinite(x)].max()) for x in drawn if np.isfinite(x).any()]


def _apart(pixels: list[float], gap: float) -> list[float]:
    out: list[float] = []
    for pixel in pixels:
        out.append(max(pixel, out[-1] + gap) if out else pixel)
    return out


def save(figure: Figure, stem: Path) -> None:
    """Write `stem`.png (200 dpi, for the web) and `stem`.svg (vectors, for the PDF), each whole or not at all."""
    _place_labels(figure)
    for suffix, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix, bbox_inches="tight", pad_inches=0.03, **options)
        write_bytes_atomically(stem.with_name(f"{stem.name}.{suffix}"), drawn.getvalue())
    plt.close(figure)
