"""Charts of a benchmark: throughput, memory, scaling."""

from collections.abc import Callable
from pathlib import Path

from vit.report.charts import PLUGIN_COLORS, PLUGIN_NAMES, new_figure, save_figure, without_math

CHARTS = ("throughput.png", "peak_memory.png", "scaling.png")
FORM_HATCHES = {"": "", "compiled": "///", "CUDA graphs": "xxx"}
OTHER_HATCHES = ("", "..", "\\\\\\", "++", "oo", "**")  # cases of one plugin that differ in something else


def benchmark_charts(sections: dict[tuple, list[dict]], folder: Path) -> list[str]:
    """Write `CHARTS` (scaling.png if a setting ran on several numbers of GPUs) and remove earlier ones.

    Args:
        sections: (model, image size, labels, preset, hardware) -> rows of its cases, with a ``case`` name.

    Returns: names of the files that were written.
    """
    measured = {key: [row for row in cases if row["status"] == "ok"] for key, cases in sections.items()}
    scaled = scaling_cases(measured)
    drawn = {id(row) for rows in scaled.values() for row in rows}
    panels = []
    for (model, size, _, preset, hardware), cases in measured.items():
        if any(id(row) not in drawn or row["world"] == 1 for row in cases):
            title = f"{model_text(model, size)}, {preset}, {hardware}"
            panels += [(f"{title}, {name}" if name else title, part) for name, part in by_form(cases)]
    for name in CHARTS:
        (folder / name).unlink(missing_ok=True)
    if panels:
        panel_chart(panels, "images_per_second", "images/s", folder / CHARTS[0])
        panel_chart(panels, "peak_memory_gib", "peak memory, GiB", folder / CHARTS[1])
    if scaled:
        scaling_chart(scaled, folder / CHARTS[2])
    return [name for name in CHARTS if (folder / name).exists()]


def model_text(model: str, image_size: int | None) -> str:
    return f"{model} at {image_size} px" if image_size else model


def form(row: dict) -> str:
    """`compiled`, `CUDA graphs`, or nothing for eager steps."""
    return "CUDA graphs" if row["cuda_graphs"] else "compiled" if row["compile"] else ""


def by_form(cases: list[dict]) -> list[tuple[str, list[dict]]]:
    """The cases of one panel; if there are more than ten, eager, compiled and CUDA graphs apart."""
    if len({row["case"] for row in cases}) <= 10:
        return [("", cases)] if cases else []
    parts: dict[str, list[dict]] = {}
    for row in cases:
        parts.setdefault(form(row) or "eager", []).append(row)
    return list(parts.items())


def case_looks(cases: list[dict]) -> dict[str, dict]:
    """case -> how its bars are filled: the plugin's colour, and the hatch of its form.

    If a plugin has several cases of one form, each takes the next free hatch.
    """
    looks, taken = {}, set()
    for row in cases:
        if row["case"] not in looks:
            free = [FORM_HATCHES[form(row)], *OTHER_HATCHES]
            hatch = next((h for h in free if (row["plugin"], h) not in taken), free[-1])
            taken.add((row["plugin"], hatch))
            color = PLUGIN_COLORS.get(row["plugin"], "C9")
            looks[row["case"]] = {"facecolor": color, "hatch": hatch, "edgecolor": "white"}
    return looks


def draw_bars(axis, cases: list[dict], x_of: Callable[[dict], int], column: str) -> None:
    """Bars of ``column`` with their numbers, in groups by ``x_of``."""
    looks, groups = case_looks(cases), sorted({x_of(row) for row in cases})
    width = 0.85 / max(sum(x_of(row) == x for row in cases) for x in groups)
    for place, x in enumerate(groups):
        group = [row for row in cases if x_of(row) == x]
        for i, row in enumerate(group):
            x_bar = place + (i - (len(group) - 1) / 2) * width
            bar = axis.bar(x_bar, row[column], width, lw=0.3, **looks[row["case"]])
            number = f"{row[column]:.0f}" if row[column] >= 100 else f"{row[column]:#.3g}"
            axis.bar_label(bar, [number], fontsize=6.5, rotation=90, padding=2)
    axis.set_xticks(range(len(groups)), [str(x) for x in groups])
    axis.margins(y=0.2)
    axis.grid(False, axis="x")


def panel_chart(panels: list[tuple[str, list[dict]]], column: str, label: str, path: Path) -> None:
    """``column`` over the batch size: a panel for each title, two side by side."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(6.7 * columns + 0.3, 3.1 * rows + 0.5, rows, columns)
    axes = [axis for row in axes for axis in row]
    for axis, (title, cases) in zip(axes, panels, strict=False):
        draw_bars(axis, cases, lambda row: row["batch_size"], column)
        axis.set(xlabel="batch size per data-parallel rank", ylabel=label)
        axis.set_title(without_math(title), fontsize=9)
        case_legend(axis, cases)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    plugin_legend(figure, [row for _, cases in panels for row in cases])
    save_figure(figure, path)


def case_legend(axis, cases: list[dict]) -> None:
    """A legend of the cases that share plugin and form, and differ in precision or layout."""
    from matplotlib.patches import Patch

    kinds = {row["case"]: (row["plugin"], form(row)) for row in cases}
    looks = {
        case: look for case, look in case_looks(cases).items() if [*kinds.values()].count(kinds[case]) > 1
    }
    if looks:
        patches = [Patch(label=case, **look) for case, look in looks.items()]
        axis.legend(handles=patches, frameon=False, fontsize=7, loc="upper left")
        axis.margins(y=0.35)


def plugin_legend(figure, cases: list[dict]) -> None:
    """The colours of the plugins, and the hatches of the forms, above all panels."""
    from matplotlib.patches import Patch

    plugins, forms = dict.fromkeys(row["plugin"] for row in cases), {form(row) for row in cases}
    handles = [Patch(color=PLUGIN_COLORS.get(p, "C9"), label=PLUGIN_NAMES.get(p, p)) for p in plugins]
    for name, hatch in FORM_HATCHES.items():
        if name and name in forms:
            handles.append(Patch(facecolor="0.6", hatch=hatch, edgecolor="white", label=name))
    figure.legend(handles=handles, frameon=False, fontsize=9, ncols=len(handles), loc="outside upper center")


def images_per_gpu(row: dict) -> float:
    return row["batch_size"] / (row["tp_size"] * row["pp_size"])


def scaling_cases(measured: dict[tuple, list[dict]]) -> dict[tuple, list[dict]]:
    """The eager cases that ran on several numbers of GPUs with equally many images per GPU.

    If several numbers of images per GPU were measured: the one that ran on most numbers of GPUs.

    Returns: (model, image size, labels, preset) -> rows.
    """
    alike: dict[tuple, dict[float, list[dict]]] = {}
    for key, cases in measured.items():
        for row in cases:
            if not form(row):
                alike.setdefault(key[:-1], {}).setdefault(images_per_gpu(row), []).append(row)
    found = {}
    for key, by_images in alike.items():
        best = max(by_images.values(), key=lambda rows: len({row["world"] for row in rows}))
        if len({row["world"] for row in best}) > 1:
            found[key] = best
    return found


def scaling_chart(scaled: dict[tuple, list[dict]], path: Path) -> None:
    """images/s of all GPUs together and memory of one, over the number of GPUs: two panels for each model."""
    figure, rows = new_figure(14, 4 * len(scaled) + 0.5, len(scaled), 2)
    panels = (("images_per_second", "images/s, all GPUs"), ("peak_memory_gib", "peak memory of a GPU, GiB"))
    for ((model, size, _, preset), cases), axes in zip(scaled.items(), rows, strict=True):
        title = f"{model_text(model, size)}, {preset}, {images_per_gpu(cases[0]):.0f} images a GPU"
        cases = [row | {"case": layout_name(row)} for row in cases]
        for axis, (column, label) in zip(axes, panels, strict=True):
            draw_bars(axis, cases, lambda row: row["world"], column)
            axis.set(xlabel="GPUs", ylabel=label)
            axis.set_title(without_math(title), fontsize=9)
        case_legend(axes[0], cases)
    plugin_legend(figure, [row for cases in scaled.values() for row in cases])
    save_figure(figure, path)


def layout_name(row: dict) -> str:
    """`hybrid_parallel, tensor x pipeline parallel`: the same name on any number of GPUs."""
    axes = [name for axis, name in (("tp", "tensor"), ("pp", "pipeline")) if row[f"{axis}_size"] > 1]
    return f"{PLUGIN_NAMES.get(row['plugin'], row['plugin'])}, {' x '.join(axes) or 'data'} parallel"
