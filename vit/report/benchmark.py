"""Tables and charts of a benchmark."""

import json
from pathlib import Path

from vit.console import exit_with_errors
from vit.files import read_jsonl, write_atomically, write_csv
from vit.report.benchmark_charts import benchmark_charts, model_text
from vit.report.charts import PLUGIN_NAMES
from vit.report.tables import escape_markdown, markdown_table
from vit.report.tables_page import write_tables_page

# Rows with equal CASE_KEYS are of one case; with equal METHOD_KEYS, too, they were measured in the same way.
CASE_KEYS = tuple(
    "model_name_or_path image_size num_labels preset plugin precision optimizer batch_size world tp_size "
    "pp_size num_microbatches zero_stage placement_policy offload_optim_frac offload_param_frac "
    "grad_checkpoint compile cuda_graphs max_norm gradient_accumulation_steps mem_cap hardware".split()
)
# of a row on several GPUs, and of the one on one GPU that it is compared with
SCALED_KEYS = tuple(name for name in CASE_KEYS if name not in ("world", "hardware"))
METHOD_KEYS = ("learning_rate", "weight_decay", "seed", "warmup_steps", "windows", "window_steps", "versions")
SECTION_KEYS = ("model_name_or_path", "image_size", "num_labels", "preset", "hardware")

# The published form of the table: label, name in the row, format.
PUBLISHED_LINES = (
    ("throughput, images/s", "images_per_second", ".1f"),
    ("max memory, GiB", "peak_memory_gib", ".2f"),
    ("it/s", "steps_per_second", ".2f"),
)
CASE_HEADER = "case|batch|images/s|it/s|step ms|min-max|allocated GiB|reserved GiB|MFU|loss".split("|")
CASE_NUMBERS = (
    "{images_per_second:.1f}|{steps_per_second:.2f}|{step_ms:.1f}|{step_ms_min:.1f}-{step_ms_max:.1f}|"
    "{peak_memory_gib:.2f}|{reserved}|{mfu:.1%}|{first_loss:.2f} -> {last_loss:.2f}"
)


def case_key(row: dict, names: tuple[str, ...] = CASE_KEYS) -> str:
    return json.dumps([row.get(name) for name in names])


def case_name(row: dict) -> str:
    """A row's plugin with what differs from its usual setting: `hybrid_parallel bf16 tp 2`."""
    device = "processes" if row["hardware"].startswith("CPU") else "GPUs"
    parts = [PLUGIN_NAMES.get(row["plugin"], row["plugin"]), row["precision"]]
    parts += [f"{axis} {row[f'{axis}_size']}" for axis in ("tp", "pp") if row[f"{axis}_size"] > 1]
    parts += [f"ZeRO {row['zero_stage']}"] * (row["plugin"] == "hybrid_parallel" and row["zero_stage"] > 0)
    parts += [f"{row['world']} {device}"] * (row["world"] > 1)
    parts += ["compiled"] * row["compile"] + ["CUDA graphs"] * row["cuda_graphs"]
    return " ".join(parts)


def label_cases(cases: list[dict]) -> None:
    """Set each row's ``case``: its name and, if other rows of its batch size have it, what they differ in."""
    alike: dict[tuple, list[dict]] = {}
    for row in cases:
        alike.setdefault((row["batch_size"], case_name(row)), []).append(row)
    for (_, title), rows in alike.items():
        different = [name for name in CASE_KEYS if len({json.dumps(row.get(name)) for row in rows}) > 1]
        for row in rows:
            row["case"] = " ".join([title, *(f"{name} {row.get(name)}" for name in different)])


def benchmark_report(folder: Path) -> None:
    """Write report.html, tables and charts of ``folder``/rows.jsonl. Of each case, the last row counts."""
    if not (folder / "rows.jsonl").exists():
        exit_with_errors(f"{folder}: holds no rows.jsonl of run_benchmark.sh")
    rows = list({case_key(row): row for row in read_jsonl(folder / "rows.jsonl")}.values())
    sections: dict[tuple, list[dict]] = {}
    for row in rows:
        sections.setdefault(tuple(row[name] for name in SECTION_KEYS), []).append(row)
    text = []
    for (model, size, labels, preset, hardware), cases in sections.items():
        label_cases(cases)
        title = f"{model_text(model, size)}, {labels} labels, preset {preset}, {hardware}"
        text.append(f"## {escape_markdown(title)}\n\n{section_text(cases, rows)}")
    table = "# Benchmark\n\n" + "\n".join(text)
    write_atomically(folder / "table.md", table)
    write_csv(folder / "table.csv", rows, without=("kind", "versions", "case"))
    charts = benchmark_charts(sections, folder)
    write_tables_page(folder, f"Benchmark {folder.resolve().name}", table, charts, best_cases(rows))
    print(f"{folder}/report.html, table.md, table.csv, {', '.join(charts) or 'no charts: no case ran'}\n")
    print("\n".join(text))


def best_cases(rows: list[dict]) -> list[tuple]:
    """For the page: (what, number, case) of the fastest case and of the one that needs least memory."""
    measured = [row for row in rows if not failure(row)]
    numbers: list[tuple] = [("cases", len(measured), f"measured of {len(rows)}")]
    for what, name, form, choose in (
        ("most images/s", "images_per_second", ".1f", max),
        ("least memory, GiB", "peak_memory_gib", ".2f", min),
    ):
        if measured:
            row = choose(measured, key=lambda row: row[name])
            case = f"{row['case']}, batch {row['batch_size']}"
            model = model_text(row["model_name_or_path"], row["image_size"])
            numbers.append((what, format(row[name], form), f"{case}, {model}"))
    return numbers


def section_text(cases: list[dict], rows: list[dict]) -> str:
    """For each batch size the published form (plugins as columns), then each case with all its numbers.

    ``rows``: of all sections; those on one GPU are what several GPUs are compared with.
    """
    parts = []
    for batch_size in sorted({row["batch_size"] for row in cases}):
        found = {row["case"]: row for row in cases if row["batch_size"] == batch_size}
        body = [
            [label, *(failure(row) or format(row[name], form) for row in found.values())]
            for label, name, form in PUBLISHED_LINES
        ]
        parts.append(markdown_table([f"batch size {batch_size} per data-parallel rank", *found], body))
    header, body = CASE_HEADER, [case_cells(row) for row in cases]
    scaling = [scaling_efficiency(row, rows) for row in cases]
    if any(scaling):
        header = [*header, "of one GPU"]
        body = [[*cells, f"{part:.1%}" if part else "-"] for cells, part in zip(body, scaling, strict=True)]
    parts.append(markdown_table(header, body))
    measured = [row for row in cases if not failure(row)]
    return "\n".join([*parts, provenance(measured)] if measured else parts)


def scaling_efficiency(row: dict, rows: list[dict]) -> float | None:
    """A GPU's images/s as a part of what one GPU alone does with as many images; None if that has no row."""
    if failure(row) or row["world"] == 1 or row["tp_size"] * row["pp_size"] > 1:
        return None

    def kind(row: dict, world: int) -> tuple:
        hardware = row["hardware"].removeprefix(f"{row['world']} x ")
        return world, hardware, case_key(row, SCALED_KEYS)

    for other in rows:
        if not failure(other) and kind(other, other["world"]) == kind(row, 1):
            return row["images_per_second"] / row["world"] / other["images_per_second"]
    return None


def failure(row: dict) -> str:
    """Why a case has no numbers; empty if it has."""
    return {"ok": "", "impossible": "not supported"}.get(row["status"], row["status"])


def case_cells(row: dict) -> list:
    """One row of the long table."""
    if failure(row):
        return [
            row["case"],
            row["batch_size"],
            f"{failure(row)}: {escape_markdown(row['reason'])}",
            *[""] * 7,
        ]
    reserved = f"{row['peak_reserved_gib']:.2f}" if "peak_reserved_gib" in row else "-"
    return [row["case"], row["batch_size"], *CASE_NUMBERS.format(reserved=reserved, **row).split("|")]


def provenance(measured: list[dict]) -> str:
    """How a section was measured: peaks that MFU refers to, dates, versions, commands."""
    values: dict[str, list[float]] = {}  # a measured peak differs from case to case
    for row in measured:
        unit = f"TFLOP/s in {'fp32' if row['precision'] == 'fp32' else '16 bit'} ({row['peak_source']})"
        values.setdefault(unit, []).append(row["peak_tflops"])
    peaks = []
    for unit, numbers in values.items():
        ends = dict.fromkeys(f"{peak:.3g}" for peak in (min(numbers), max(numbers)))
        peaks.append(f"{' to '.join(ends)} {unit}")
    found = {name: number for row in measured for name, number in row["versions"].items()}
    versions = ", ".join(f"{name} {number}" for name, number in found.items())
    dates = " and ".join(sorted({row["date"][:10] for row in measured}))
    commands = "\n".join(f"    {command}" for command in dict.fromkeys(row["command"] for row in measured))
    note = f"Median of the timed windows, slowest process; MFU of {', '.join(peaks)}."
    compiled: dict[str, dict] = {}
    for row in measured:
        if row.get("compiled"):
            compiled.setdefault(row["compiled"], {})[PLUGIN_NAMES.get(row["plugin"], row["plugin"])] = None
    note += "".join(f" Compiled is {part} of {', '.join(names)}." for part, names in compiled.items())
    return f"{note} Measured {dates}; {versions}.\n\nCommands:\n\n{commands}\n"
