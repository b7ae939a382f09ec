"""Charts of a benchmark: throughput, memory, scaling."""

from pathlib import Path

from vit.report.charts import PLUGIN_COLORS, PLUGIN_NAMES, new_figure, save_figure

FORM_HATCHES = {"": "", "compiled": "///", "CUDA graphs": "xxx"}


OTHER_HATCHES = ("", "..", "\\\\\\", "++", "oo", "**")  # cases of one plugin that differ in something else


def benchmark_charts(sections: dict[tuple, list[dict]], folder: Path) -> list[str]:
    """throughput.png, peak_memory.png and, where one setting ran on several numbers of GPUs, scaling.png.

    A chart without cases is removed from ``folder``, where an earlier report may have left it.

    Args:
        sections: (model, image size, labels, preset, hardware) -> rows of its cases, with a ``case`` name.

    Returns:
        Names of the files that were written.
    """
    measured = {key: [row for row in cases if row["status"] == "ok"] for key, cases in sections.items()}
    grown = scaling_cases(measured)
    drawn = {id(row) for rows in grown.values() for row in rows}
    panels = [
        (", ".join(filter(None, [panel_title(key), part_name])), part)
        for key, cases in measured.items()
        if any(id(row) not in drawn or row["world"] == 1 for row in cases)
        for part_name, part in by_form(cases)
    ]
    names = []
    for name, column, label in (
        ("throughput.png", "images_per_second", "images/s"),
        ("peak_memory.png", "peak_memory_gib", "peak memory, GiB"),
    ):
        (folder / name).unlink(missing_ok=True)
        if panels:
            panel_chart(panels, column, label, folder / name)
            names.append(name)
    (folder / "scaling.png").unlink(missing_ok=True)
    if grown:
        scaling_chart(grown, folder / "scaling.png")
        names.append("scaling.png")
    return names


def panel_title(key: tuple) -> str:
    model, size, _, preset, hardware = key
    return f"{model}{f' at {size} px' if size else ''}, {preset}, {hardware}"


def form(row: dict) -> str:
    """`compiled`, `CUDA graphs`, or nothing for eager steps."""
    return "CUDA graphs" if row["cuda_graphs"] else "compiled" if row["compile"] else ""


def by_form(cases: list[dict]) -> list[tuple[str, list[dict]]]:
    """The cases of one panel; more than ten of them apart, as eager, compiled and CUDA graphs."""
    if len({row["case"] for row in cases}) <= 10:
        return [("", cases)] if cases else []
    parts: dict[str, list[dict]] = {}
    for row in cases:
        parts.setdefault(form(row) or "eager", []).append(row)
    return list(parts.items())


def hatches_of(cases: list[dict]) -> dict[str, str]:
    """case -> hatch: of its form, or where a plugin has several cases of one form the next free one."""
    hatches, taken = {}, set()
    for row in cases:
        if row["case"] not in hatches:
            free = [FORM_HATCHES[form(row)], *OTHER_HATCHES]
            hatches[row["case"]] = next((h for h in free if (row["plugin"], h) not in taken), free[-1])
            taken.add((row["plugin"], hatches[row["case"]]))
    return hatches


def draw_bars(axis, cases: list[dict], x_of, column: str) -> None:
    """Bars of ``column`` with their numbers, in groups by ``x_of``; the colour is the plugin's."""
    hatches, groups = hatches_of(cases), sorted({x_of(row) for row in cases})
    width = 0.85 / max(sum(x_of(row) == x for row in cases) for x in groups)
    for place, x in enumerate(groups):
        group = [row for row in cases if x_of(row) == x]
        for i, row in enumerate(group):
            bar = axis.bar(
                place + (i - (len(group) - 1) / 2) * width,
                row[column],
                width,
                color=PLUGIN_COLORS.get(row["plugin"], "C9"),
                hatch=hatches[row["case"]],
                edgecolor="white",
                lw=0.3,
            )
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
    for axis, (title, cases) in zip(axes, panels):
        draw_bars(axis, cases, lambda row: row["batch_size"], column)
        axis.set(xlabel="batch size per data-parallel rank", ylabel=label)
        axis.set_title(title, fontsize=9)
        name_hatches(axis, cases)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    plugin_legend(figure, [row for _, cases in panels for row in cases])
    save_figure(figure, path)


def name_hatches(axis, cases: list[dict]) -> None:
    """A legend of the cases that share plugin and form, and differ in precision or layout."""
    from matplotlib.patches import Patch

    hatches = hatches_of(cases)
    kinds = {row["case"]: (row["plugin"], form(row)) for row in cases}
    alike = [case for case in hatches if list(kinds.values()).count(kinds[case]) > 1]
    if alike:
        patches = [
            Patch(
                facecolor=PLUGIN_COLORS.get(kinds[case][0], "C9"),
                hatch=hatches[case],
                edgecolor="white",
                label=case,
            )
            for case in alike
        ]
        axis.legend(handles=patches, frameon=False, fontsize=7, loc="upper left")
        axis.margins(y=0.35)


def plugin_legend(figure, cases: list[dict]) -> None:
    """The colours of the plugins, and the hatches of the forms, above all panels."""
    from matplotlib.patches import Patch

    plugins = dict.fromkeys(row["plugin"] for row in cases)
    handles = [
        Patch(color=PLUGIN_COLORS.get(name, "C9"), label=PLUGIN_NAMES.get(name, name)) for name in plugins
    ]
    forms = [name for name in FORM_HATCHES if name and any(form(row) == name for row in cases)]
    handles += [
        Patch(facecolor="0.6", hatch=FORM_HATCHES[name], edgecolor="white", label=name) for name in forms
    ]
    figure.legend(handles=handles, frameon=False, fontsize=9, ncols=len(handles), loc="outside upper center")


def scaling_cases(measured: dict[tuple, list[dict]]) -> dict[tuple, list[dict]]:
    """The eager cases that ran on several numbers of GPUs with equally many images per GPU.

    Where several numbers of images per GPU were measured, the one on most numbers of GPUs.

    Returns:
        (model, image size, labels, preset) -> rows.
    """
    alike: dict[tuple, dict[float, list[dict]]] = {}
    for key, cases in measured.items():
        for row in cases:
            images = row["batch_size"] / (row["tp_size"] * row["pp_size"])
            if not form(row):
                alike.setdefault(key[:-1], {}).setdefault(images, []).append(row)
    found = {}
    for key, by_images in alike.items():
        best = max(by_images.values(), key=lambda rows: len({row["world"] for row in rows}))
        if len({row["world"] for row in best}) > 1:
            found[key] = best
    return found


def scaling_chart(grown: dict[tuple, list[dict]], path: Path) -> None:
    """images/s of all GPUs together and memory of one, over the number of GPUs: two panels for each model."""
    figure, rows = new_figure(14, 4 * len(grown) + 0.5, len(grown), 2)
    for (key, cases), axes in zip(grown.items(), rows):
        model, size, _, preset = key
        images = cases[0]["batch_size"] // (cases[0]["tp_size"] * cases[0]["pp_size"])
        cases = [row | {"case": layout_name(row)} for row in cases]
        for axis, column, label in zip(
            axes,
            ("images_per_second", "peak_memory_gib"),
            ("images/s, all GPUs", "peak memory of a GPU, GiB"),
        ):
            draw_bars(axis, cases, lambda row: row["world"], column)
            axis.set(xlabel="GPUs", ylabel=label)
            axis.set_title(
                f"{model}{f' at {size} px' if size else ''}, {preset}, {images} images a GPU", fontsize=9
            )
        name_hatches(axes[0], cases)
    plugin_legend(figure, [row for cases in grown.values() for row in cases])
    save_figure(figure, path)


def layout_name(row: dict) -> str:
    """`hybrid_parallel, tensor x pipeline`: the same name on any number of GPUs."""
    axes = [name for axis, name in (("tp", "tensor"), ("pp", "pipeline")) if row[f"{axis}_size"] > 1]
    return f"{PLUGIN_NAMES.get(row['plugin'], row['plugin'])}, {' x '.join(axes) or 'data'} parallel"
