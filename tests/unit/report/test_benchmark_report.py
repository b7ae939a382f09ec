"""Tables and charts of a benchmark, from stored rows: vit/report/benchmark.py and benchmark_charts.py."""

import csv

import pytest
from browser import PageParser, needs_chromium, scroll_widths

from report import main
from vit.files import write_jsonl
from vit.report.benchmark import CASE_KEYS
from vit.report.benchmark_charts import scaling_cases


def row(plugin: str, batch_size: int, **changes) -> dict:
    base = dict.fromkeys(CASE_KEYS) | {
        "kind": "case",
        "plugin": plugin,
        "precision": "bf16",
        "batch_size": batch_size,
        "model_name_or_path": "vit-x",
        "world": 1,
        "tp_size": 1,
        "pp_size": 1,
        "zero_stage": 0,
        "compile": False,
        "cuda_graphs": False,
        "preset": "fast",
        "hardware": "1 x GPU",
        "num_labels": 10,
        "status": "ok",
        "reason": "",
        "images_per_second": 100.0 * batch_size,
        "steps_per_second": 100.0,
        "step_ms": 10.0,
        "step_ms_min": 9.0,
        "step_ms_max": 11.0,
        "peak_memory_gib": 1.5,
        "peak_reserved_gib": 2.0,
        "mfu": 0.25,
        "peak_tflops": 100.0,
        "peak_source": "test",
        "first_loss": 2.3,
        "last_loss": 0.1,
        "date": "2026-01-02 03:04 UTC",
        "versions": {"torch": "0"},
        "command": "python vit_benchmark.py",
    }
    return base | changes


def test_tables_and_charts_are_rebuilt_from_the_rows(tmp_path, capsys):
    rows = [
        row("torch_ddp", 8),
        row("torch_ddp", 32),
        row("none", 8),
        row("none", 32, status="out of memory", reason="CUDA out of memory"),
        row("torch_ddp", 8, images_per_second=901.0),  # measured again: the later row counts
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert "| throughput, images/s | 901.0 | 800.0 |" in text
    assert "| throughput, images/s | 3200.0 | out of memory |" in text
    assert "800.0 | 100.00 | 10.0 | 9.0-11.0 | 1.50 | 2.00 | 25.0% | 2.30 -> 0.10" in text
    with open(tmp_path / "table.csv") as file:
        found = list(csv.DictReader(file))
    assert [(r["plugin"], r["batch_size"], r["status"]) for r in found] == [
        ("torch_ddp", "8", "ok"),
        ("torch_ddp", "32", "ok"),
        ("none", "8", "ok"),
        ("none", "32", "out of memory"),
    ]
    for chart in ("throughput.png", "peak_memory.png"):
        assert (tmp_path / chart).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "scaling.png").exists()


def test_rows_of_one_name_are_labelled_by_what_differs(tmp_path, capsys):
    pipeline = {"plugin": "hybrid_parallel", "world": 2, "pp_size": 2}
    rows = [row(batch_size=64, num_microbatches=m, images_per_second=m, **pipeline) for m in (4, 8)]
    rows += [row("none", 64), row("none", 8, grad_checkpoint=True)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    name = "hybrid_parallel bf16 pp 2 2 GPUs num_microbatches"
    assert f"| batch size 64 per data-parallel rank | {name} 4 | {name} 8 | plain PyTorch bf16 |" in text
    assert "| throughput, images/s | 4.0 | 8.0 | 6400.0 |" in text


def test_an_impossible_case_is_not_supported(tmp_path, capsys):
    rows = [row("none", 8), row("gemini", 8, status="impossible", reason="needs a GPU")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert "| throughput, images/s | 800.0 | not supported |" in text
    assert "| gemini bf16 | 8 | not supported: needs a GPU |" in text
    assert ",impossible," in (tmp_path / "table.csv").read_text()  # the row's own value


def test_growth_with_the_gpus_is_a_chart_of_its_own(tmp_path, capsys):
    rows = [
        row(plugin, 64, world=n, hardware=f"{n} x GPU") for n in (1, 2) for plugin in ("torch_ddp", "none")
    ]
    rows.append(row("hybrid_parallel", 128, world=2, tp_size=2, hardware="2 x GPU"))  # 64 images a GPU, too
    sections = {
        ("vit-x", None, 10, "fast", f"{n} x GPU"): [
            r | {"case": r["plugin"]} for r in rows if r["world"] == n
        ]
        for n in (1, 2)
    }
    (grown,) = scaling_cases(sections).values()
    assert len(grown) == 5
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    assert "throughput.png, peak_memory.png, scaling.png" in capsys.readouterr().out
    write_jsonl(tmp_path / "rows.jsonl", rows[:2])
    main(["benchmark", str(tmp_path)])
    assert not (tmp_path / "scaling.png").exists()


def test_folder_without_rows_is_one_clear_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", str(tmp_path)])
    assert "holds no rows.jsonl" in capsys.readouterr().err


def test_the_page_has_tables_charts_and_the_best_cases(tmp_path, capsys):
    rows = [row("none", 8), row("torch_ddp", 8, images_per_second=990.0, peak_memory_gib=1.6)]
    rows.append(row("gemini", 8, status="failed", reason="<script>no</script>"))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    page = PageParser.of(tmp_path / "report.html")
    assert len(page.images) == 2 and all(image.startswith("data:image/png;base64,") for image in page.images)
    assert "cases 2 measured of 3 most images/s 990.0 torch_ddp bf16, batch 8, vit-x" in page.text
    assert "least memory, GiB 1.50 plain PyTorch bf16, batch 8, vit-x" in page.text
    assert "failed: <script>no</script>" in page.text and "python vit_benchmark.py" in page.text
    assert page.tags["script"] == 0 and page.tags["table"] == 2 and "torch 0" in page.text


def test_the_page_of_cases_that_all_failed_has_no_charts(tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [row("none", 8, status="failed", reason="no luck")])
    main(["benchmark", str(tmp_path)])
    page = PageParser.of(tmp_path / "report.html")
    assert not page.images and "cases 0 measured of 1" in page.text and "failed: no luck" in page.text


@needs_chromium
def test_a_browser_shows_the_page_without_scrolling_sideways(tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [row("none", size) for size in (8, 16, 32)])
    main(["benchmark", str(tmp_path)])
    found = scroll_widths((tmp_path / "report.html").read_text(), tmp_path)
    assert all(wide <= width for width, wide in found.items())


def test_several_gpus_are_compared_with_one(tmp_path, capsys):
    two = {"world": 2, "hardware": "2 x GPU", "images_per_second": 1920.0}
    rows = [
        row("torch_ddp", 256, images_per_second=1000.0),
        row("torch_ddp", 256, compile=True, images_per_second=1280.0),
        row("torch_ddp", 256, **two),
        row("torch_ddp", 256, compile=True, **two),
        row("gemini", 256, **two),  # not measured on one
        row("hybrid_parallel", 256, tp_size=2, **two),  # shares images
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    one, several = (tmp_path / "table.md").read_text().split("2 x GPU", 1)
    assert "of one GPU" not in one
    cells = [line.split(" | ") for line in several.splitlines() if "| 256 |" in line]
    assert {line[0].lstrip("| "): line[-1].rstrip(" |") for line in cells} == {
        "torch_ddp bf16 2 GPUs": "96.0%",
        "torch_ddp bf16 2 GPUs compiled": "75.0%",
        "gemini bf16 2 GPUs": "-",
        "hybrid_parallel bf16 tp 2 2 GPUs": "-",
    }


def test_table_says_what_was_compiled(tmp_path, capsys):
    rows = [
        row("torch_ddp", 8, compile=True, compiled="each layer", versions={"torch": "1"}),
        row("timm", 8, compile=True, compiled="the model", versions={"torch": "1", "timm": "2"}),
        row("transformers", 8, compiled=""),
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert "Compiled is each layer of torch_ddp. Compiled is the model of timm." in text
    assert "torch 0, timm 2" in text and "| plain transformers bf16 |" in text
