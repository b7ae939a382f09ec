"""table.md and losses.png of prove_parallelism.py, from its rows."""

from pathlib import Path

import parallelism_reference as training

from vit.files import write_atomically
from vit.report.charts import new_figure, save_figure
from vit.report.tables import markdown_table

FP32_COLUMNS = {
    f"loss, {training.SHORT} steps": "loss_20",
    f"loss, {training.STEPS} steps": "loss_50",
    "gradient norm, step 1": "norm_1",
    "gradient norm": "norms",
    "weights, step 1": "weights_1",
    "small gradients": "weights_1_noise",
    "weights, end": "weights_last",
    "evaluation": "evaluation",
    "resume": "resume",
}
BF16_COLUMNS = {
    f"loss, {training.SHORT} steps": "loss_20",
    "gradient norm, step 1": "norm_1",
    "gradient norm": "norms",
}
RUN_COLUMNS = [
    *("run", "processes", "exit status", "train loss", "held-out loss", "accuracy", "by vit_predict.py"),
    *("difference", "bound", "seconds", ""),
]
TEMPLATE = """# Every form of parallelism against one process

```
DATA=/path/to/cifar-10 python results/scripts/prove_parallelism.py results/parallelism
```

ViT-Lite-7/4 from the same weights on the same {t.IMAGES} training images of CIFAR-10: {t.STEPS} steps of \
{t.BATCH} images ({t.PER_EPOCH} an epoch, the last of
{last_batch}), learning rate {t.PEAK:g} after {t.WARMUP} steps of warm-up, label smoothing {t.SMOOTHING}, \
gradients clipped to norm {t.MAX_NORM:g}, weight decay {t.DECAY}, no dropout,
no augmentation; on a CPU, over gloo. The serial run is HuggingFace's model with torch's AdamW and \
`clip_grad_norm_` on one process,
written out in the script. The others go through `parse_scratch`, `boost`, `TrainStep`, \
`CheckpointFolder` and `export_model` with the
config files. Losses and gradient norms of every step are in `rows.jsonl`.

![losses](losses.png)

## fp32

{fp32}
Largest differences from the serial run: losses and weights absolute, gradient norms (before clipping) \
relative. The last line is how
far rounding alone takes the serial run.

- **Weights.** Gathered before step 1 they are the serial ones bit for bit. *Weights, step 1* is over \
those whose gradient is above
  {t.NOISE:g} ({clear:.1f} % of them). Adam's first step is the learning rate ({first_rate}) times the sign \
of the gradient, and where a
  gradient is rounding noise (a key's bias has no other) so is its sign: *small gradients* is over all \
weights, and may reach twice that.
- **Evaluation.** `evaluate` over {t.HELD_OUT} held-out images, padded to whole batches, after the last \
step, against transformers
  alone on the exported folder: the mean loss. Accuracy and count are equal.
- **Resume.** Saved after step {t.SAVED}, built anew in new processes, loaded, and on to step {t.SHORT}: \
losses and norms against the run that went on.

## bf16

{bf16}
{t.SHORT} steps against a serial run of the same precision: bf16 autocast, but for 1d and pipeline \
(Colossal-AI's hybrid_parallel) bf16 weights
with fp32 master weights. The last two lines are those serial runs against the one in fp32: \
hybrid_parallel rounds the weights that it starts
from, so that its first small steps change little, and it is further from fp32 than autocast.

## train.py, started by torchrun

{runs}
One epoch of the same images with the configs' augmentation, from the images to the exported folder, \
which vit_predict.py opens: its
accuracy over the {t.HELD_OUT} images as PNG files must be the run's own. *Difference* is that of the \
losses: from vanilla, and with dropout from
the first run of its kind (the same seed again, stopped by SIGTERM within the epoch, and resumed).

{date}; {hardware}; Python {python}; {versions}
"""


def number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def end_of_line(row: dict) -> list[str]:
    """Seconds, and what came of it."""
    verdict = {True: "pass", False: "**fail**", None: "to compare"}[row.get("pass")]
    return [f"{row['seconds']:.0f}", verdict]


def deviations(rows: list[dict], columns: dict[str, str], precision: str, *others: str) -> str:
    """A table of the cases in ``precision``, and the serial runs in the others to compare."""
    bounds = training.BOUNDS[precision]
    lines = [["bound", "", *[number(bounds.get(name)) for name in columns.values()], "", ""]]
    for wanted in (("case", precision), *[("serial", other) for other in others]):
        for row in rows:
            if (row["kind"], row.get("precision")) == wanted:
                case = row["case"] if row["kind"] == "case" else f"one process, {row['precision']}"
                cells = [number(row.get(name)) for name in columns.values()]
                lines.append([case, row["processes"], *cells, *end_of_line(row)])
    return markdown_table(["case", "processes", *columns, "seconds", ""], lines)


def launches(rows: list[dict]) -> str:
    """A table of the runs of train.py; one that failed has no losses."""
    forms = {"train_loss": ".6f", "average_loss": ".6f", "accuracy": ".4f", "predicted_accuracy": ".4f"}
    lines = []
    for row in rows:
        if row["kind"] == "run":
            results = [format(row[name], form) if name in row else "" for name, form in forms.items()]
            gap = [number(row.get("difference")), number(row.get("bound"))]
            lines.append([row["case"], row["processes"], row["status"], *results, *gap, *end_of_line(row)])
    return markdown_table(RUN_COLUMNS, lines)


def write_table(path: Path, rows: list[dict]) -> None:
    about, shares = rows[-1], [row["noise_share"] for row in rows if "noise_share" in row]
    text = TEMPLATE.format(
        t=training,
        last_batch=training.IMAGES % training.BATCH,
        first_rate=f"{training.PEAK / training.WARMUP:.0e}",
        clear=100 * (1 - shares[0]),
        fp32=deviations(rows, FP32_COLUMNS, "fp32", "fp64"),
        bf16=deviations(rows, BF16_COLUMNS, "bf16", "bf16", "bf16 weights"),
        runs=launches(rows),
        versions=", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        **{name: about[name] for name in ("date", "hardware", "python")},
    )
    write_atomically(path, text)


def write_chart(path: Path, rows: list[dict]) -> None:
    """Losses of the fp32 cases, and their distance from the serial run."""
    serial = next(row for row in rows if row["kind"] == "serial" and row["precision"] == "fp32")["loss"]
    cases = [row for row in rows if row["kind"] == "case" and row["precision"] == "fp32"]
    steps = range(1, len(serial) + 1)
    figure, [[losses, gaps]] = new_figure(12, 4.8, columns=2)
    losses.plot(steps, serial, color="0.8", linewidth=6, label="one process, plain")
    for i, row in enumerate(cases):
        look = {"color": f"C{i % 10}", "linewidth": 1, "linestyle": "-" if i < 10 else "--"}
        losses.plot(steps, row["loss"], **look)
        # a difference of 0 has no place on a log axis
        distance = [max(abs(a - b), 1e-8) for a, b in zip(row["loss"], serial, strict=True)]
        gaps.plot(steps, distance, label=row["case"], **look)
    for last, name in ((training.SHORT, "loss_20"), (training.STEPS, "loss_50")):
        bound = training.BOUNDS["fp32"][name]
        gaps.plot([1, last], [bound, bound], color="0.3", linestyle=":")
        gaps.annotate("bound", (1, bound), xytext=(0, 3), textcoords="offset points", fontsize=8, color="0.3")
    losses.set(xlabel="step", ylabel="loss", title=f"{len(cases)} layouts over the serial run, fp32")
    gaps.set(xlabel="step", ylabel="difference of the loss from the serial run", title="0 is drawn at 1e-8")
    gaps.set(yscale="log", ylim=(7e-9, 3e-3))
    losses.legend(frameon=False)
    gaps.legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    save_figure(figure, path)
