"""Tables and charts of a benchmark."""

import json
from pathlib import Path

from vit.files import read_jsonl, write_atomically, write_csv
from vit.report.benchmark_charts import benchmark_charts
from vit.report.tables import markdown_table

# What makes two benchmark rows measurements of the same thing ...
CASE_KEYS = (
    "model_name_or_path",
    "image_size",
    "num_labels",
    "preset",
    "plugin",
    "precision",
    "optimizer",
    "batch_size",
    "world",
    "tp_size",
    "pp_size",
    "num_microbatches",
    "zero_stage",
    "placement_policy",
    "offload_optim_frac",
    "offload_param_frac",
    "grad_checkpoint",
    "compile",
    "cuda_graphs",
    "max_norm",
    "gradient_accumulation_steps",
    "mem_cap",
    "hardware",
)


# ... and in the same way, so that it need not be measured again.
METHOD_KEYS = ("learning_rate", "weight_decay", "seed", "warmup_steps", "windows", "window_steps", "versions")


def case_key(row: dict, names: tuple[str, ...] = CASE_KEYS) -> str:
    return json.dumps([row.get(name) for name in names])


def case_name(row: dict) -> str:
    """A benchmark row's plugin with what sets it apart: `hybrid_parallel bf16 tp 2`."""
    name = "plain PyTorch" if row["plugin"] == "none" else row["plugin"]
    parts = [name, row["precision"]]
    parts += [f"{axis} {row[f'{axis}_size']}" for axis in ("tp", "pp") if row[f"{axis}_size"] > 1]
    parts += [f"ZeRO {row['zero_stage']}"] * (row["plugin"] == "hybrid_parallel" and row["zero_stage"] > 0)
    parts += [f"{row['world']} {'processes' if row['hardware'].startswith('CPU') else 'GPUs'}"] * (
        row["world"] > 1
    )
    parts += ["compiled"] * row["compile"] + ["CUDA graphs"] * row["cuda_graphs"]
    return " ".join(parts)


def label_cases(cases: list[dict]) -> None:
    """Set each row's ``case``.

    Its name, and where others of its batch size have the same, the settings in which they differ.
    """
    for row in cases:
        alike = [
            other
            for other in cases
            if other["batch_size"] == row["batch_size"] and case_name(other) == case_name(row)
        ]
        different = [name for name in CASE_KEYS if len({json.dumps(other.get(name)) for other in alike}) > 1]
        row["case"] = " ".join([case_name(row), *(f"{name} {row.get(name)}" for name in different)])


def latest_rows(rows: list[dict]) -> list[dict]:
    """The last row of each case, in the order in which the cases first came."""
    latest = {}
    for row in rows:
        latest[case_key(row)] = row
    return list(latest.values())


def benchmark_report(folder: Path) -> None:
    """table.md, table.csv and charts from ``folder``/rows.jsonl, one section per model, size and preset."""
    from vit.console import exit_with_errors

    if not (folder / "rows.jsonl").exists():
        exit_with_errors(f"{folder}: holds no rows.jsonl of run_benchmark.sh")
    rows = latest_rows(read_jsonl(folder / "rows.jsonl"))
    sections: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (
            row["model_name_or_path"],
            row["image_size"],
            row["num_labels"],
            row["preset"],
            row["hardware"],
        )
        sections.setdefault(key, []).append(row)
    text = []
    for (model, size, labels, preset, hardware), cases in sections.items():
        label_cases(cases)
        title = f"{model}{f' at {size} px' if size else ''}, {labels} labels, preset {preset}, {hardware}"
        text.append(f"## {title}\n\n{section_tables(cases)}")
    write_atomically(folder / "table.md", "# Benchmark\n\n" + "\n".join(text))
    write_csv(folder / "table.csv", rows, without=("kind", "versions", "case"))
    charts = benchmark_charts(sections, folder)
    print(f"{folder}/table.md, table.csv, {', '.join(charts) or 'no charts: no case ran'}\n")
    print("\n".join(text))


def section_tables(cases: list[dict]) -> str:
    """The published form (plugins as columns), then every case with all its numbers."""
    parts = []
    for batch_size in sorted({row["batch_size"] for row in cases}):
        found = {row["case"]: row for row in cases if row["batch_size"] == batch_size}

        def line(label: str, column: str, form: str) -> list:
            return [
                label,
                *(
                    format(row[column], form) if row["status"] == "ok" else row["status"]
                    for row in found.values()
                ),
            ]

        header = [f"batch size {batch_size} per group", *found]
        body = [
            line("throughput, images/s", "images_per_second", ".1f"),
            line("max memory, GiB", "peak_memory_gib", ".2f"),
            line("it/s", "steps_per_second", ".2f"),
        ]
        parts.append(markdown_table(header, body))
    long = []
    for row in cases:
        if row["status"] == "ok":
            long.append(
                [
                    row["case"],
                    row["batch_size"],
                    f"{row['images_per_second']:.1f}",
                    f"{row['steps_per_second']:.2f}",
                    f"{row['step_ms']:.1f}",
                    f"{row['step_ms_min']:.1f}-{row['step_ms_max']:.1f}",
                    f"{row['peak_memory_gib']:.2f}",
                    f"{row['peak_reserved_gib']:.2f}" if "peak_reserved_gib" in row else "-",
                    f"{row['mfu']:.1%}",
                    f"{row['first_loss']:.2f} -> {row['last_loss']:.2f}",
                ]
            )
        else:
            long.append([row["case"], row["batch_size"], f"{row['status']}: {row['reason']}", *[""] * 7])
    header = [
        "case",
        "batch",
        "images/s",
        "it/s",
        "step ms",
        "min-max",
        "allocated GiB",
        "reserved GiB",
        "MFU",
        "loss",
    ]
    parts.append(markdown_table(header, long))
    ok = [row for row in cases if row["status"] == "ok"]
    if ok:
        versions = ", ".join(f"{name} {number}" for name, number in ok[-1]["versions"].items())
        dates = sorted({row["date"][:10] for row in ok})
        found: dict[str, list[float]] = {}  # a measured peak differs from case to case
        for row in ok:
            found.setdefault(
                f"TFLOP/s in {'fp32' if row['precision'] == 'fp32' else '16 bit'} ({row['peak_source']})", []
            ).append(row["peak_tflops"])
        peaks = [
            " to ".join(dict.fromkeys(f"{peak:.3g}" for peak in (min(values), max(values)))) + f" {what}"
            for what, values in found.items()
        ]
        parts.append(
            f"Median of the timed windows, slowest process; MFU of {', '.join(peaks)}. "
            f"Measured {' and '.join(dates)}; {versions}.\n\nCommands:\n\n"
            + "\n".join(f"    {command}" for command in dict.fromkeys(row["command"] for row in ok))
            + "\n"
        )
    return "\n".join(parts)
