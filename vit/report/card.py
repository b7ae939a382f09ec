"""The model card of an output folder."""

from pathlib import Path

from vit.hub import is_hub_name
from vit.report.tables import markdown_table


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
    table = markdown_table(
        ["epoch", "train loss", "average_loss", "accuracy", "images/s", "seconds"],
        [
            [
                row["epoch"],
                f"{row['train_loss']:.4f}",
                f"{row['average_loss']:.4f}",
                f"{row['accuracy']:.4f}",
                f"{row['images_per_second']:.0f}",
                f"{row['seconds']:.1f}",
            ]
            for row in epochs
        ],
    )
    chosen = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    tested = (
        f"Test split ({test['images']} images), epoch {best['epoch']}: "
        f"average_loss {test['average_loss']:.4f}, accuracy {test['accuracy']:.4f}.\n\n"
        if test
        else ""
    )
    title = f"{Path(settings['model_name_or_path']).name}, {how} on {Path(settings['dataset']).name}"
    return f"""---
{card_metadata(title, settings, base=not from_scratch, split=split, result=result, whole=bool(test) or not run.get("held_out"))}
---

# {title}

A Vision Transformer {how} with [Colossal-AI](https://github.com/hpcaitech/ColossalAI). Classes: {", ".join(labels)}.

```python
from transformers import pipeline
print(pipeline("image-classification", model=".")("image.jpg"))
```

## Measured

{tested}{"Held-out part of the training" if run.get("held_out") else evaluated.capitalize()} split ({best["images"]} images), after each epoch (saved here: epoch {best["epoch"]}):

{table}
![loss and accuracy per epoch](metrics.png)

On {run["hardware"]}, {run["layout"]}, {run["date"]}; {versions}.

## Settings

{chosen}
"""


def card_metadata(title: str, settings: dict, base: bool, split: str, result: dict, whole: bool) -> str:
    """The hub's metadata (YAML) of a model card; names of this machine's folders are left out of it.

    A fold, or a part of a split (not ``whole``), is no split of the data set: its numbers are none that the
    hub may rank.
    """
    from huggingface_hub import EvalResult, ModelCardData

    whole = whole and not settings.get("fold") and not settings.get("max_eval_samples")
    dataset, model = settings["dataset"], settings["model_name_or_path"]
    where = dict(
        dataset_type=dataset if is_hub_name(dataset) else Path(dataset).name,
        dataset_name=Path(dataset).name,
        dataset_split=split,
    )
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", "image-classification", "colossalai"],
        base_model=model if base and is_hub_name(model) else None,
        datasets=[dataset] if is_hub_name(dataset) else None,
        model_name=title if whole else None,
        eval_results=[
            EvalResult("image-classification", metric_type=metric, metric_value=round(value, 6), **where)
            for metric, value in (("accuracy", result["accuracy"]), ("loss", result["average_loss"]))
        ]
        if whole
        else None,
    )
    return card.to_yaml()
