"""Charts and the page of a sweep, from stored rows: vit/report/{charts,sweep,tables_page}.py."""

import re
import shutil
from urllib.parse import unquote

from browser import PageParser, needs_chromium, scroll_widths
from helpers import ROOT
from sweep_rows import store

import report
from vit.report.charts import PLUGIN_COLORS
from vit.report.sweep import sweep_report


def test_charts_and_provenance(grid):
    assert {"epochs.png", "heatmap.png"} <= {path.name for path in grid.iterdir()}
    text = (grid / "table.md").read_text()
    assert "2026-01-02 on 1 x H200; Python 3.11.7, torch 2.5.1" in text
    assert (
        "    MODELS=../models/vit-tiny-patch16-224 LEARNING_RATES='1e-4 2.5e-4' "
        "DATASET=../data/beans RESULTS=./r PARALLEL_RUNS=16 bash run_finetuning.sh "
        "--max_norm 1\n"
    ) in text
    assert text.rstrip().endswith("Runs shared a GPU, so times and images/s compare nothing here.")
    assert "peak memory is the GPU's (without a GPU: resident set size)" in text


def test_the_title_says_what_was_run(grid, tmp_path, monkeypatch):
    text = (grid / "table.md").read_text()
    assert text.startswith(
        "# Sweep\n\nAll runs: ../data/beans, 2 epochs, the model's own image size, fp16, "
        "weight decay 0.5, warm-up ratio 0.3, recipe `none`, from pretrained weights.\n\n"
    )
    monkeypatch.chdir(tmp_path)  # where no folder is called vit-demo
    shared = {"image_size": 384, "max_eval_samples": 133, "augment": True, "mixup": 0.2}
    store(tmp_path, [0.9], [0.3], model_name_or_path="vit-demo", **shared)
    sweep_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "1 epoch, 384 px, at most 133 images of a split evaluated, fp16," in text
    assert "recipe `--augment --mixup 0.2`, from random weights.\n" in text
    store(tmp_path, [0.9], [0.3], batch_size=16, weight_decay=0.1, **shared)
    sweep_report(tmp_path)
    assert (
        "warm-up ratio 0.3, recipe `--augment --mixup 0.2`, vit-tiny-patch16-224 from "
        "pretrained weights, vit-demo from random weights.\n"
    ) in (tmp_path / "table.md").read_text()


def test_a_plugin_has_one_colour_and_equal_lines_are_seen(tmp_path, figures):
    for plugin in ("torch_ddp", "gemini", "hybrid_parallel"):
        store(tmp_path, [0.9, 0.95], [0.3, 0.2], plugin=plugin, precision="fp16")
    sweep_report(tmp_path)
    loss = figures["epochs.png"].axes[0]
    colours = [PLUGIN_COLORS[name] for name in ("torch_ddp", "gemini", "hybrid_parallel")]
    assert [line.get_color() for line in loss.lines] == colours
    assert len({tuple(line.get_xdata()) for line in loss.lines}) == 3, "side by side"


def test_heat_maps_are_numbered_and_name_the_settings_in_which_they_differ(tmp_path, figures):
    (tmp_path / "heatmap-3.png").write_text("of runs before")
    for size, mixup in ((224, 0.0), (384, 0.2)):
        for batch_size in (8, 16):
            for rate in (1e-4, 2e-4):
                changes = {
                    "image_size": size,
                    "mixup": mixup,
                    "batch_size": batch_size,
                    "learning_rate": rate,
                }
                store(tmp_path / "two_sizes", [0.9], [0.3], **changes)
    sweep_report(tmp_path)
    titles = {name: figure.get_suptitle() for name, figure in figures.items() if name.startswith("heatmap")}
    title = "two sizes, gemini, vit-tiny-patch16-224"
    assert titles == {
        "heatmap.png": f"{title}\nimage size 224, recipe none",
        "heatmap-2.png": f"{title}\nimage size 384, recipe --mixup 0.2",
    }
    assert {path.name for path in tmp_path.glob("heatmap*")} == titles.keys()


def test_one_epoch_has_one_tick_and_room_for_its_marker(tmp_path, figures):
    store(tmp_path, [0.3], [1.098])
    store(tmp_path, [0.3], [1.09], batch_size=16)
    sweep_report(tmp_path)
    loss, accuracy, last = figures["epochs.png"].axes
    for axis in (loss, accuracy):
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]
    assert loss.get_ylim()[0] == 0 and loss.get_ylim()[1] > 1.02 * 1.098
    assert [tick.get_text() for tick in last.get_yticklabels()] == ["0.3000  BS 8", "0.3000  BS 16"]


def test_the_page_has_tables_charts_and_the_command(grid):
    page = PageParser.of(grid / "report.html")
    assert len(page.images) == 2 and all(image.startswith("data:image/png;base64,") for image in page.images)
    assert "runs 4 finished of 6 best accuracy 0.9850 BS 16, LR 1e-4" in page.text
    assert "failed, status 1: no | luck" in page.text and "bash run_finetuning.sh --max_norm 1" in page.text
    assert "All runs: ../data/beans, 2 epochs" in page.text and "torch 2.5.1" in page.text
    assert page.tags["table"] == 3 and not page.links  # no run has a page of its own


def test_the_page_is_linked_to_those_of_its_runs(tmp_path):
    folder = tmp_path / "a <b>set</b> of runs"
    for rate in (1e-4, 2e-4):
        run = store(folder / "more # epochs", [0.9], [0.3], learning_rate=rate)
    (run / "report.html").write_text("")
    report.main(["sweep", str(folder)])
    page = PageParser.of(folder / "report.html")
    (link,) = page.links
    assert (folder / unquote(link)).samefile(run / "report.html") and run.name in page.text
    assert page.tags["b"] == 2  # the numbers at the top, not the folder's name


@needs_chromium
def test_a_browser_shows_the_page_without_scrolling_sideways(grid, tmp_path):
    found = scroll_widths((grid / "report.html").read_text(), tmp_path)
    assert all(wide <= width for width, wide in found.items())


def test_runs_from_scratch_have_a_page_too(tmp_path, capsys):
    shutil.copy(ROOT / "results" / "cifar10" / "runs.jsonl", tmp_path)
    report.main(["accuracy", str(tmp_path)])
    page, table = PageParser.of(tmp_path / "report.html"), (tmp_path / "table.md").read_text()
    assert re.search(r"runs [1-9]\d* finished", page.text) and len(page.images) == 1 and not page.links
    assert page.tags["table"] == table.count("\n|---") and "DATA=" in page.text
