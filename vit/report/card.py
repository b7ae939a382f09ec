"""The model card of an output folder."""

from pathlib import Path
from typing import Any

from vit.hub import is_hub_name
from vit.report.tables import escape_markdown, markdown_table

HEADER = ["epoch", "train loss", "average_loss", "accuracy", "images/s", "seconds"]
CLASSES_SHOWN = 100
COLOSSALAI = "https://github.com/hpcaitech/ColossalAI"
NUMBERS = "{train_loss:.4f}|{average_loss:.4f}|{accuracy:.4f}|{images_per_second:.0f}|{seconds:.1f}"


def model_card(rows: list[dict], settings: dict, labels: list[str], from_scratch: str | None = None) -> str:
    """README.md of an output folder, with the hub's metadata and this run's numbers.

    ``from_scratch``: of a model without a base, the name of the split that was evaluated after each epoch.
    """
    run = rows[0]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    best = next(row for row in epochs if row["best"])
    test = next((row for row in rows if row["kind"] == "test"), None)
    evaluated, how = from_scratch or "validation", "trained from scratch" if from_scratch else "fine-tuned"
    split, result = ("test", test) if test else (evaluated, best)
    table = markdown_table(HEADER, [[row["epoch"], *NUMBERS.format_map(row).split("|")] for row in epochs])
    chosen = "\n".join(f"- {name}: {escape_markdown(str(value))}" for name, value in settings.items())
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    classes = ", ".join(map(escape_markdown, labels))
    tested = ""
    if test:
        numbers = f"average_loss {test['average_loss']:.4f}, accuracy {test['accuracy']:.4f}"
        tested = f"Test split ({test['images']} images), epoch {best['epoch']}: {numbers}.\n\n"
    metric = settings.get("selection_metric", "accuracy")
    by = f", the best by {metric}" if metric != "accuracy" else ""
    where = "Held-out part of the training" if run.get("held_out") else evaluated.capitalize()
    whole = bool(test) or not run.get("held_out")
    title = f"{Path(settings['model_name_or_path']).name}, {how} on {Path(settings['dataset']).name}"
    metadata = card_metadata(title, settings, not from_scratch, split, result, whole)
    return f"""---
{metadata}
---

# {escape_markdown(title)}

A Vision Transformer {how} with [Colossal-AI]({COLOSSALAI}). Classes: {classes}.

```python
from transformers import pipeline
print(pipeline("image-classification", model=".")("image.jpg"))
```

## Measured

{tested}{where} split ({best["images"]} images), after each epoch (saved here: epoch {best["epoch"]}{by}):

{table}
![loss and accuracy per epoch](metrics.png)

On {run["hardware"]}, {run["layout"]}, {run["date"]}; {versions}.

{data_section(run["data"])}## Settings

{chosen}
"""


def data_section(data: dict) -> str:
    """The images of each class and split, what guessing would score, and what else was noted of the data."""
    splits = data["images_of_class"]
    classes = list(splits["train"])
    rows = [[name, *(splits[split][name] for split in splits)] for name in classes[:CLASSES_SHOWN]]
    if len(classes) > CLASSES_SHOWN:
        rows.append([f"and {len(classes) - CLASSES_SHOWN} more", *[""] * len(splits)])
    rows.append(["all", *(sum(counts.values()) for counts in splits.values())])
    lines = [
        f"- Always guessing the largest class, {name}: accuracy {accuracy:.4f} on {split}."
        for split, (name, accuracy) in data["largest_class"].items()
    ] + [f"- {note}" for note in data["notes"]]
    text = "".join(f"{line}\n" for line in lines)
    return f"## Data\n\n{markdown_table(['class', *splits], rows)}\n{text}\n"


def card_metadata(title: str, settings: dict, base: bool, split: str, result: dict, whole: bool) -> str:
    """The hub's metadata (YAML) of a model card; names of this machine's folders are left out of it.

    Numbers of a fold, or of a part of a split (not ``whole``), are left out: the hub would rank them.
    """
    from huggingface_hub import EvalResult, ModelCardData

    whole = whole and not settings.get("fold") and not settings.get("max_eval_samples")
    dataset, model = settings["dataset"], settings["model_name_or_path"]
    where: dict[str, Any] = {"dataset_name": Path(dataset).name, "dataset_split": split}
    where["dataset_type"] = dataset if is_hub_name(dataset) else Path(dataset).name
    results = [
        EvalResult("image-classification", metric_type=metric, metric_value=round(result[name], 6), **where)
        for metric, name in (("accuracy", "accuracy"), ("loss", "average_loss"))
    ]
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", "image-classification", "colossalai"],
        base_model=model if base and is_hub_name(model) else None,
        datasets=[dataset] if is_hub_name(dataset) else None,
        model_name=title if whole else None,
        eval_results=results if whole else None,
    )
    return card.to_yaml()
