"""Charts of recorded runs."""

import math
import os
import textwrap
from pathlib import Path
from statistics import mean

# One colour for a plugin in every chart (Okabe and Ito's palette, made for colour-blind readers).
PLUGIN_COLORS = {
    "none": "#7f7f7f",
    "torch_ddp": "#0072b2",
    "torch_ddp_fp16": "#56b4e9",
    "low_level_zero": "#e69f00",
    "gemini": "#009e73",
    "hybrid_parallel": "#d55e00",
}


PLUGIN_NAMES = {"none": "plain PyTorch"}  # others by their own name


LINE_STYLES = ("-", "--", ":", "-.")


MARKERS = "osD^vPX*"


SETTING_NAMES = {
    "batch_size": "BS ",
    "learning_rate": "LR ",
    "image_size": "size ",
    "tp_size": "tp ",
    "pp_size": "pp ",
}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **how):
    """-> (figure, its axes as a list of rows), all in one plain style. Width and height in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **how
    )
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


def zero_based_limits(axis) -> tuple[float, float]:
    """Limits with room for the highest marker, also where all values are alike."""
    return 0, max(axis.get_ylim()[1], 1.03 * axis.dataLim.ymax)


def whole_epochs(axis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


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
            star = dict(marker="*", s=120, color="C2", zorder=3, label="test (selected epoch)")
            loss.scatter([row["epoch"]], [row["average_loss"]], **star)
            accuracy.scatter([row["epoch"]], [row["accuracy"]], **star)
    loss.set(xlabel="epoch", ylabel="loss", ylim=zero_based_limits(loss))
    accuracy.set(xlabel="epoch", ylabel="accuracy")
    accuracy.set_ylim(top=1.005)
    for axis in (loss, accuracy):
        whole_epochs(axis)
        axis.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
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
    """A look for each line: ``label``, ``color``, ``style`` and ``marker``. -> (looks, what all lines share)

    Colour follows the plugin, where lines differ in it or there is one line; otherwise the setting with most
    values. Style and marker follow the other settings.

    Args:
        labels: of each line the values of its settings, as text.
        names: of the settings.
    """
    kept = distinguishing(labels)
    by_plugin = [i for i in kept if names[i] == "plugin"]
    most = max(kept, key=lambda i: (len({label[i] for label in labels}), i), default=None)
    coloured = by_plugin[0] if by_plugin else most
    colours = list(dict.fromkeys(label[coloured] for label in labels)) if kept else [""]
    styles = list(dict.fromkeys(tuple(label[i] for i in kept if i != coloured) for label in labels))
    looks = []
    for label in labels:
        value = label[coloured] if kept else ""
        style = styles.index(tuple(label[i] for i in kept if i != coloured))
        text = ", ".join(SETTING_NAMES.get(names[i], "") + label[i] for i in kept)
        plugin = value if by_plugin else dict(zip(names, label)).get("plugin") if not kept else None
        looks.append(line_style(text, colours.index(value), style, PLUGIN_COLORS.get(plugin)))
    titled = [i for i, name in enumerate(names) if name in ("plugin", "model_name_or_path") and i not in kept]
    return looks, ", ".join(labels[0][i] for i in titled)


def line_style(label: str, colour: int, style: int, color: str | None = None) -> dict:
    """One line's look; ``color`` instead of the ``colour``th one where it is given."""
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
        sections: name -> lines. A line is a `look` with ``average_loss`` and ``accuracy``: lists of the
            values after each epoch, one list a run (seed or fold).
        split: the images that were evaluated, such as "validation".
    """
    if len(sections) > 1 and all(len(lines) == 1 for lines in sections.values()):
        sections = {
            "": [
                line | line_style(" ".join(filter(None, [name, line["label"]])), i, i)
                for i, (name, (line,)) in enumerate(sections.items())
            ]
        }
    heights = [
        max(3.0, (0.33 if len(lines) <= 24 else 0.2) * len(lines) + 0.9) for lines in sections.values()
    ]
    figure, rows = new_figure(15, sum(heights), len(sections), 3, gridspec_kw={"height_ratios": heights})
    for (name, lines), (loss, accuracy, last) in zip(sections.items(), rows):
        draw_curves(loss, lines, "average_loss")
        draw_curves(accuracy, lines, "accuracy")
        loss.set(xlabel="epoch", ylabel=f"{split} loss")
        accuracy.set(xlabel="epoch", ylabel=f"{split} accuracy", title=name)
        draw_last(last, lines)
        last.set(xlabel=f"{split} accuracy, last epoch")
    same = [row[2].get_xlim() for row in rows]
    for row in rows:
        row[2].set_xlim(min(low for low, _ in same), max(high for _, high in same))
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def draw_curves(axis, lines: list[dict], name: str) -> None:
    """Each line's mean over its runs; of a few lines, a band from the lowest to the highest run.

    Lines that lie on each other stay visible: with a few epochs their points stand side by side and the
    earlier lines are wider, with many epochs their markers take turns.
    """
    settled = []  # several lines: without the first tenth of the epochs, which would press the rest together
    for i, line in enumerate(lines):
        epochs = list(zip(*line[name]))
        x, values = range(1, len(epochs) + 1), list(map(mean, epochs))
        few, every = len(epochs) <= 12, max(1, len(epochs) // 12)
        step = (i - (len(lines) - 1) / 2) * min(0.05, 0.4 / len(lines)) if few else 0
        width = 1.2 + 1.6 * (1 - (i + 1) / len(lines)) if few else 1.4 if len(epochs) <= 50 else 1
        axis.plot(
            [epoch + step for epoch in x],
            values,
            color=line["color"],
            ls=line["style"],
            lw=width,
            marker=line["marker"],
            ms=4,
            markevery=(i % every, every),
            alpha=0.8,
        )
        settled += values[0 if few and len(lines) == 1 else len(values) // 10 :]
        if len(line[name]) > 1 and len(lines) <= 5:
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
    """Each line's accuracy after the last epoch, from the top down: a point a run, a marker for the mean.

    The labels beside it are the figure's legend.
    """
    last = [[run[-1] for run in line["accuracy"]] for line in lines]
    low, high = min(map(min, last)), max(map(max, last))
    margin = 0.08 * (high - low) or 0.01
    for y, (line, values) in enumerate(zip(lines, last)):
        axis.plot([0, mean(values)], [y, y], color=line["color"], ls=line["style"], lw=1.4, alpha=0.6)
        axis.plot(values, [y] * len(values), ".", color=line["color"], alpha=0.35, ms=7, clip_on=False)
        axis.plot(mean(values), y, line["marker"], color=line["color"], ms=7, clip_on=False)
    axis.set_xlim(low - margin, high + margin)
    axis.locator_params(axis="x", nbins=5)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.yaxis.tick_right()
    axis.tick_params(axis="y", length=0)
    texts = [f"{mean(values):.4f}  {line['label']}".rstrip() for line, values in zip(lines, last)]
    axis.set_yticks(
        range(len(lines)),
        ["\n".join(textwrap.wrap(text, 44 if len(lines) <= 24 else 99)) for text in texts],
        fontsize=8,
    )


def heat_map(values: dict[str, dict[tuple, float]], path: Path, title: str, rate_text) -> None:
    """Accuracy and loss over batch size (rows) and learning rate (columns).

    Args:
        values: "accuracy" and "average_loss" -> {(batch size, learning rate): number}.
        rate_text: a learning rate -> its text.
    """
    sizes, rates = (sorted({point[i] for point in values["accuracy"]}) for i in (0, 1))
    figure, (axes,) = new_figure(1.5 * 2 * len(rates) + 2.5, 0.8 * len(sizes) + 1.6, columns=2)
    for axis, name, colours in zip(axes, ("accuracy", "average_loss"), ("viridis", "viridis_r")):
        cells = [[values[name].get((size, rate), float("nan")) for rate in rates] for size in sizes]
        image = axis.imshow(cells, cmap=colours, aspect="auto")
        for (size, rate), value in values[name].items():
            dark = sum(image.cmap(image.norm(value))[:3]) < 1.5
            axis.text(
                rates.index(rate),
                sizes.index(size),
                f"{value:.4f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
            )
        axis.set_xticks(range(len(rates)), map(rate_text, rates))
        axis.set_yticks(range(len(sizes)), sizes)
        axis.grid(False)
        heading = f"validation {name.replace('average_', '')}, last epoch"
        axis.set(xlabel="learning rate", ylabel="batch size", title=heading)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
