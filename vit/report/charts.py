"""Charts of recorded runs."""

import os
from pathlib import Path
from statistics import mean

from vit.report.tables import short_float


def new_figure(width: float, height: float, columns: int = 1):
    """Figure and axes in one plain style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes[0]


def zero_based_limits(axis) -> tuple[float, float]:
    """Limits with room for the highest marker, also where all values are alike."""
    return 0, max(axis.get_ylim()[1], 1.03 * axis.dataLim.ymax)


def save_figure(figure, path: Path) -> None:
    from matplotlib import pyplot

    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=150)
    os.replace(partial, path)
    pyplot.close(figure)


def epoch_chart(rows: list[dict], path: Path, title: str, split: str = "validation") -> None:
    """Loss and accuracy per epoch of one run (PNG)."""
    from matplotlib.ticker import MaxNLocator

    epochs = [row for row in rows if row["kind"] == "epoch"]
    figure, (loss, accuracy) = new_figure(9, 3.6, columns=2)
    x, marker = [row["epoch"] for row in epochs], "o" if len(epochs) <= 50 else None
    loss.plot(x, [row["train_loss"] for row in epochs], marker=marker, label="train")
    loss.plot(x, [row["average_loss"] for row in epochs], marker=marker, label=split)
    accuracy.plot(x, [row["accuracy"] for row in epochs], marker=marker, color="C1", label=split)
    for row in rows:
        if row["kind"] == "test":
            loss.scatter(
                [row["epoch"]],
                [row["average_loss"]],
                marker="*",
                s=120,
                color="C2",
                zorder=3,
                label="test (epoch kept)",
            )
            accuracy.scatter(
                [row["epoch"]],
                [row["accuracy"]],
                marker="*",
                s=120,
                color="C2",
                zorder=3,
                label="test (epoch kept)",
            )
    loss.set(xlabel="epoch", ylabel="loss", ylim=zero_based_limits(loss))
    accuracy.set(xlabel="epoch", ylabel="accuracy")
    accuracy.set_ylim(top=1.005)
    for axis in (loss, accuracy):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def split_crowded_chart(cases: list[dict]) -> list[list[dict]]:
    """The cases of one chart.

    Of several, eager, compiled and CUDA graphs apart, where one would hold too many colours.
    """
    if len({row["case"] for row in cases}) <= 10:
        return [cases] if cases else []
    forms: dict[tuple, list[dict]] = {}
    for row in cases:
        forms.setdefault((row["compile"], row["cuda_graphs"]), []).append(row)
    return list(forms.values())


def benchmark_bars(sections: list, column: str, label: str, path: Path) -> bool:
    """One row of bars per section: groups are batch sizes, colours are plugins.

    -> whether there was anything to draw
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sections = [
        (key, part)
        for key, cases in sections
        for part in split_crowded_chart([row for row in cases if row["status"] == "ok"])
    ]
    if not sections:
        path.unlink(missing_ok=True)  # an earlier one shows what is not there
        return False
    figure, axes = pyplot.subplots(
        len(sections), 1, figsize=(10, 4.2 * len(sections)), layout="constrained", squeeze=False
    )
    for axis, ((model, size, labels, preset, hardware), cases) in zip(axes[:, 0], sections):
        names = list(dict.fromkeys(row["case"] for row in cases))
        colours = dict(zip(names, pyplot.get_cmap("tab20" if len(names) > 10 else "tab10").colors))
        batch_sizes = sorted({row["batch_size"] for row in cases})
        width = 0.85 / max(sum(row["batch_size"] == size for row in cases) for size in batch_sizes)
        for x, batch_size in enumerate(batch_sizes):
            group = [row for row in cases if row["batch_size"] == batch_size]
            for i, row in enumerate(group):
                bar = axis.bar(
                    x + (i - (len(group) - 1) / 2) * width, row[column], width, color=colours[row["case"]]
                )
                axis.bar_label(
                    bar,
                    fmt="%.3g" if column != "images_per_second" else "%.0f",
                    fontsize=6.5,
                    rotation=90,
                    padding=2,
                )
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
        axis.set_xticks(range(len(batch_sizes)), [str(b) for b in batch_sizes])
        axis.set(xlabel="batch size per data-parallel group", ylabel=label)
        axis.margins(y=0.18)
        axis.set_title(f"{model}{f' at {size} px' if size else ''}, preset {preset}, {hardware}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.legend(handles, names, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)
    return True


def learning_curves(groups: list[dict], named: list[str], cells, path: Path) -> None:
    """Loss and accuracy per epoch, a line for each configuration; of a few, a band from the lowest to the
    highest seed.

    Colour follows the setting of most values, line and marker the others.
    """
    from matplotlib.ticker import MaxNLocator

    labels = [cells(group["settings"]) for group in groups]
    # the fewest settings that tell the lines apart: a precision that follows from the plugin is not among
    # them
    telling = list(range(len(named)))
    for i in reversed(range(len(named))):
        rest = [j for j in telling if j != i]
        if len({tuple(label[j] for j in rest) for label in labels}) == len(labels):
            telling = rest
    coloured = max(telling, key=lambda i: (len({label[i] for label in labels}), i), default=None)

    def look(label: list) -> tuple[str, tuple]:
        return "" if coloured is None else label[coloured], tuple(label[i] for i in telling if i != coloured)

    colours, styles = (list(dict.fromkeys(parts)) for parts in zip(*map(look, labels)))
    words = {
        "batch_size": "BS ",
        "learning_rate": "LR ",
        "image_size": "size ",
        "tp_size": "tp ",
        "pp_size": "pp ",
    }
    figure, (loss, accuracy) = new_figure(11, max(4, 0.22 * len(groups) + 1), columns=2)
    for group, label in zip(groups, labels):
        colour, style = (parts.index(part) for parts, part in zip((colours, styles), look(label)))
        text = ", ".join(words.get(named[i], "") + label[i] for i in telling)
        for axis, name in ((loss, "average_loss"), (accuracy, "accuracy")):
            values = list(zip(*([row[name] for row in run["epochs"]] for run in group["runs"])))
            x = range(1, len(values) + 1)
            axis.plot(
                x,
                list(map(mean, values)),
                color=f"C{colour % 10}",
                ls=("-", "--", ":", "-.")[style % 4],
                marker="osD^vPX*"[style % 8],
                ms=4,
                lw=1.4,
                label=text,
            )
            if len(group["runs"]) > 1 and len(groups) <= 5:
                axis.fill_between(
                    x,
                    list(map(min, values)),
                    list(map(max, values)),
                    color=f"C{colour % 10}",
                    alpha=0.1,
                    lw=0,
                )
    loss.set(xlabel="epoch", ylabel="validation loss", ylim=zero_based_limits(loss))
    accuracy.set(xlabel="epoch", ylabel="validation accuracy")
    accuracy.set_ylim(top=min(1.005, accuracy.get_ylim()[1]))
    for axis in (loss, accuracy):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if telling:
        accuracy.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    shared = [
        text
        for i, text in enumerate(labels[0])
        if i not in telling and named[i] in ("plugin", "model_name_or_path")
    ]
    figure.suptitle(", ".join(shared), fontsize=11)
    save_figure(figure, path)


def heat_maps(folder: Path, groups: list[dict], named: dict[str, str], cells) -> list[str]:
    """Accuracy and loss over batch size x learning rate, one file for each grid of both; -> their names."""
    for earlier in folder.glob("heatmap*.png"):
        earlier.unlink()
    grids: dict[tuple, list[dict]] = {}
    for group in groups:
        key = tuple(
            (n, v)
            for n, v in group["settings"].items()
            if n not in ("batch_size", "learning_rate", "seed", "fold")
        )
        grids.setdefault(key, []).append(group)
    found = []
    for members in grids.values():
        sizes, rates = (
            sorted({g["settings"][name] for g in members}) for name in ("batch_size", "learning_rate")
        )
        if len(sizes) < 2 or len(rates) < 2:
            continue
        figure, axes = new_figure(1.5 * 2 * len(rates) + 2.5, 0.8 * len(sizes) + 1.6, columns=2)
        for axis, name, colours in zip(axes, ("accuracy", "average_loss"), ("viridis", "viridis_r")):
            values = {
                (g["settings"]["batch_size"], g["settings"]["learning_rate"]): g["mean"][name]
                for g in members
            }
            image = axis.imshow(
                [[values.get((size, rate), float("nan")) for rate in rates] for size in sizes],
                cmap=colours,
                aspect="auto",
            )
            for (size, rate), value in values.items():
                ink = (
                    "white" if sum(image.cmap(image.norm(value))[:3]) < 1.5 else "black"
                )  # on a dark ground, or a light one
                axis.text(
                    rates.index(rate), sizes.index(size), f"{value:.4f}", ha="center", va="center", color=ink
                )
            axis.set_xticks(range(len(rates)), map(short_float, rates))
            axis.set_yticks(range(len(sizes)), sizes)
            axis.grid(False)
            axis.set(
                xlabel="learning rate",
                ylabel="batch size",
                title=f"validation {name.replace('average_', '')}, last epoch",
            )
        settings = members[0]["settings"]
        title = f"{settings['plugin']}-{Path(settings['model_name_or_path']).name}"
        others = [
            f"{named[n]} {cell}"
            for n, cell in zip(named, cells(settings))
            if n not in ("plugin", "model_name_or_path", "batch_size", "learning_rate")
        ]
        figure.suptitle(
            "\n".join(filter(None, [title.replace("-", ", ", 1), ", ".join(others)])), fontsize=11
        )
        name = "heatmap.png" if len(grids) == 1 else f"heatmap-{title}.png"
        if name in found:  # grids that differ in another setting
            name = f"heatmap-{title}-{len(found) + 1}.png"
        save_figure(figure, folder / name)
        found.append(name)
    return found
