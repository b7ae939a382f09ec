"""Charts of recorded runs."""

import math
import os
import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

from vit.report.reading import epoch_values
from vit.report.tables import short_float

# One colour for each plugin in every chart (the palette of Okabe and Ito, made for colour-blind readers).
PLUGIN_COLORS = {
    "none": "#7f7f7f",
    "torch_ddp": "#0072b2",
    "torch_ddp_fp16": "#56b4e9",
    "low_level_zero": "#e69f00",
    "gemini": "#009e73",
    "hybrid_parallel": "#d55e00",
    "torch_fsdp": "#cc79a7",
    "timm": "#f0e442",
    "transformers": "#000000",
}
PLUGIN_NAMES = {"none": "plain PyTorch", "transformers": "plain transformers"}  # others by their own name
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"
SHORT_NAMES = {
    "batch_size": "BS",
    "learning_rate": "LR",
    "image_size": "size",
    "tp_size": "tp",
    "pp_size": "pp",
}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **how):
    """-> (figure, its axes as a list of rows), all in one plain style. Width and height in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options: dict[str, Any] = {"figsize": (width, height), "layout": "constrained", "squeeze": False} | how
    figure, axes = pyplot.subplots(rows, columns, **options)
    for axis in axes.flat:
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes.tolist()


def save_figure(figure, path: Path) -> None:
    """Write the PNG (120 dots per inch) beside ``path`` and rename it, then close the figure."""
    from matplotlib import pyplot

    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=120)
    os.replace(partial, path)
    pyplot.close(figure)


def whole_epochs(axis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def without_math(text: str) -> str:
    """Text in which dollars are dollars; matplotlib would take what is between them for a formula."""
    return text.replace("$", r"\$")


def epoch_chart(rows: list[dict], path: Path, title: str, split: str = "validation") -> None:
    """Loss and accuracy per epoch of one run. ``split`` names what was evaluated after each epoch."""
    epochs = [row for row in rows if row["kind"] == "epoch"]
    figure, ((loss, accuracy),) = new_figure(9, 3.6, columns=2)
    x, marker = [row["epoch"] for row in epochs], "o" if len(epochs) <= 50 else None
    loss.plot(x, [row["train_loss"] for row in epochs], marker=marker, label="train")
    loss.plot(x, [row["average_loss"] for row in epochs], marker=marker, label=split)
    accuracy.plot(x, [row["accuracy"] for row in epochs], marker=marker, color="C1", label=split)
    for row in rows:
        if row["kind"] == "test":
            star = {"marker": "*", "s": 120, "color": "C2", "zorder": 3, "label": "test (selected epoch)"}
            loss.scatter([row["epoch"]], [row["average_loss"]], **star)
            accuracy.scatter([row["epoch"]], [row["accuracy"]], **star)
    top = max(loss.get_ylim()[1], 1.03 * loss.dataLim.ymax)  # room for the highest marker
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, top))
    accuracy.set(xlabel="epoch", ylabel="accuracy")
    accuracy.set_ylim(top=1.005)
    for axis in (loss, accuracy):
        whole_epochs(axis)
        axis.legend(frameon=False)
    figure.suptitle(without_math(title), fontsize=11)
    save_figure(figure, path)


def distinguishing(labels: list[list[str]]) -> list[int]:
    """The fewest columns in which no two labels are alike: no precision that follows from the plugin."""
    kept = list(range(len(labels[0])))
    for i in reversed(kept.copy()):
        rest = [j for j in kept if j != i]
        if len({tuple(label[j] for j in rest) for label in labels}) == len(labels):
            kept = rest
    return kept


def line_looks(labels: list[list[str]], names: list[str]) -> tuple[list[dict], str]:
    """-> (a `line_style` for each line, title: plugin and model if all lines share them)

    Colour follows the plugin, if lines differ in it or there is one line, otherwise the setting with most
    values. Style and marker follow the other settings.

    Args:
        labels: of each line, the values of its settings as text.
        names: of the settings.
    """
    kept = distinguishing(labels)
    most = max(kept, key=lambda i: (len({label[i] for label in labels}), i), default=0)
    coloured = names.index("plugin") if not kept or names.index("plugin") in kept else most
    colours = list(dict.fromkeys(label[coloured] for label in labels))
    others = [tuple(label[i] for i in kept if i != coloured) for label in labels]
    styles = list(dict.fromkeys(others))
    looks = []
    for label, other in zip(labels, others, strict=True):
        text = ", ".join(f"{SHORT_NAMES.get(names[i], '')} {label[i]}".strip() for i in kept)
        color = PLUGIN_COLORS.get(label[coloured]) if names[coloured] == "plugin" else None
        looks.append(line_style(text, colours.index(label[coloured]), styles.index(other), color))
    titled = [i for i, name in enumerate(names) if name in ("plugin", "model_name_or_path") and i not in kept]
    return looks, ", ".join(labels[0][i] for i in titled)


def line_style(label: str, colour: int, style: int, color: str | None = None) -> dict:
    """One line's ``label``, ``color``, ``style`` and ``marker``; ``color`` replaces the ``colour``th one."""
    return {
        "label": label.replace(", --", ", ").replace(" --", ", ").removeprefix("--"),
        "color": color or f"C{colour % 10}",
        "style": LINE_STYLES[style % len(LINE_STYLES)],
        "marker": MARKERS[(style or colour) % len(MARKERS)],
    }


def learning_curves(sections: dict[str, list[dict]], path: Path, title: str, split: str) -> None:
    """Loss and accuracy per epoch, and accuracy after the last: a row of three panels for each section.

    Sections of one line each share a row; their lines are labelled with the section.

    Args:
        sections: name -> lines. A line is a `line_style` with ``runs``: its seeds or folds.
        split: the images that were evaluated, such as "validation".
    """
    if len(sections) > 1 and all(len(lines) == 1 for lines in sections.values()):
        lines = [line | {"label": f"{name} {line['label']}".strip()} for name, (line,) in sections.items()]
        sections = {"": [line | line_style(line["label"], i, i) for i, line in enumerate(lines)]}
    sizes = [len(lines) for lines in sections.values()]
    heights = [max(3.0, (0.33 if size <= 24 else 0.2) * size + 0.9) for size in sizes]
    figure, rows = new_figure(15, sum(heights), len(sections), 3, gridspec_kw={"height_ratios": heights})
    for (name, lines), (loss, accuracy, last) in zip(sections.items(), rows, strict=True):
        draw_curves(loss, lines, "average_loss")
        draw_curves(accuracy, lines, "accuracy")
        loss.set(xlabel="epoch", ylabel=f"{split} loss")
        accuracy.set(xlabel="epoch", ylabel=f"{split} accuracy", title=without_math(name))
        draw_last(last, lines)
        last.set(xlabel=f"{split} accuracy, last epoch")
    limits = [row[2].get_xlim() for row in rows]
    left, right = min(low for low, _ in limits), max(high for _, high in limits)
    for row in rows:
        row[2].set_xlim(left, right + 0.04 * (right - left))  # no marker under a label
    figure.suptitle(without_math(title), fontsize=11)
    save_figure(figure, path)


def draw_curves(axis, lines: list[dict], name: str) -> None:
    """Each line's mean over its runs; of at most five lines, a band from the lowest to the highest run.

    Lines that lie on each other stay visible: with few epochs their points stand side by side and the earlier
    lines are wider, with many epochs their markers take turns.
    """
    settled = []  # what the y axis shows: not the first tenth of the epochs, which would flatten the rest
    for i, line in enumerate(lines):
        epochs = list(zip(*epoch_values(line["runs"], name), strict=True))
        x, values = range(1, len(epochs) + 1), list(map(mean, epochs))
        few, every = len(epochs) <= 12, max(1, len(epochs) // 12)
        step = (i - (len(lines) - 1) / 2) * min(0.05, 0.4 / len(lines)) if few else 0
        width = 1.2 + 1.6 * (1 - (i + 1) / len(lines)) if few else 1.4 if len(epochs) <= 50 else 1
        look = {"color": line["color"], "ls": line["style"], "lw": width, "marker": line["marker"], "ms": 4}
        axis.plot([epoch + step for epoch in x], values, **look, markevery=(i % every, every), alpha=0.8)
        settled += values[0 if few and len(lines) == 1 else len(values) // 10 :]
        if len(line["runs"]) > 1 and len(lines) <= 5:
            low, high = list(map(min, epochs)), list(map(max, epochs))
            axis.fill_between(x, low, high, color=line["color"], alpha=0.1, lw=0)
            settled += (low + high) if few else []
    whole_epochs(axis)
    settled = list(filter(math.isfinite, settled)) or [1.0]
    if name == "accuracy":
        margin = 0.06 * (max(settled) - min(settled)) or 0.05
        axis.set_ylim(min(settled) - margin, min(1.005, max(settled) + margin))
    else:
        axis.set_ylim(0, 1.06 * max(settled))


def draw_last(axis, lines: list[dict]) -> None:
    """Each line's accuracy after the last epoch, from the top down: a point per run, a marker for the mean.

    The labels beside it are the figure's legend.
    """
    last = [[values[-1] for values in epoch_values(line["runs"], "accuracy")] for line in lines]
    low, high = min(map(min, last)), max(map(max, last))
    margin = 0.08 * (high - low) or 0.01
    for y, (line, values) in enumerate(zip(lines, last, strict=True)):
        color = line["color"]
        axis.plot([0, mean(values)], [y, y], color=color, ls=line["style"], lw=1.4, alpha=0.6)
        axis.plot(values, [y] * len(values), ".", color=color, alpha=0.35, ms=7, clip_on=False)
        axis.plot(mean(values), y, line["marker"], color=color, ms=7, clip_on=False)
    axis.set_xlim(low - margin, high + margin)
    axis.locator_params(axis="x", nbins=5)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.yaxis.tick_right()
    axis.tick_params(axis="y", length=0)
    texts = [
        f"{mean(values):.4f}  {line['label']}".rstrip() for line, values in zip(lines, last, strict=True)
    ]
    texts = ["\n".join(textwrap.wrap(text, 44 if len(lines) <= 24 else 99)) for text in texts]
    axis.set_yticks(range(len(lines)), texts, fontsize=8)


def heat_map(points: dict[tuple, dict], path: Path, title: str) -> None:
    """Accuracy and loss over batch size (rows) and learning rate (columns).

    Args:
        points: (batch size, learning rate) -> ``accuracy`` and ``average_loss``.
    """
    sizes, rates = (sorted({point[i] for point in points}) for i in (0, 1))
    figure, (axes,) = new_figure(1.5 * 2 * len(rates) + 2.5, 0.8 * len(sizes) + 1.6, columns=2)
    for axis, name, colours in zip(axes, ("accuracy", "average_loss"), ("viridis", "viridis_r"), strict=True):
        missing = {name: float("nan")}
        cells = [[points.get((size, rate), missing)[name] for rate in rates] for size in sizes]
        image = axis.imshow(cells, cmap=colours, aspect="auto")
        for (size, rate), numbers in points.items():
            color = "white" if sum(image.cmap(image.norm(numbers[name]))[:3]) < 1.5 else "black"
            place, text = (rates.index(rate), sizes.index(size)), f"{numbers[name]:.4f}"
            axis.text(*place, text, ha="center", va="center", color=color)
        axis.set_xticks(range(len(rates)), map(short_float, rates))
        axis.set_yticks(range(len(sizes)), sizes)
        axis.grid(False)
        heading = f"validation {name.replace('average_', '')}, last epoch"
        axis.set(xlabel="learning rate", ylabel="batch size", title=heading)
    figure.suptitle(without_math(title), fontsize=11)
    save_figure(figure, path)
