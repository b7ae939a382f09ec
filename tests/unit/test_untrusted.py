"""Files and names of others: pickles that would run code, and names with a meaning for whoever shows them."""

import csv
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import CLASSES, save_tiny_vit, write_image
from huggingface_hub import ModelCard
from test_hub import rows

import vit_predict
from vit import versions
from vit.checkpoint import CheckpointError, read_state
from vit.console import exit_with_errors, print_rank0, printable
from vit.data.dataset import DataError
from vit.files import csv_cell, write_csv
from vit.model import load_model
from vit.model_folder import read_model_folder
from vit.report.card import model_card
from vit.report.sweep_tables import setting_cells, why_no_numbers
from vit.report.tables import escape_markdown, markdown_table

# ---- pickled weights


@pytest.fixture
def pickled(tmp_path) -> Path:
    """A model folder as old ones on the hub are: without safetensors."""
    from safetensors.torch import load_file

    folder = save_tiny_vit(tmp_path / "pickled", labels=3)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def install(monkeypatch, torch_version: str) -> None:
    found = versions.installed_version
    monkeypatch.setattr(
        versions, "installed_version", lambda name: torch_version if name == "torch" else found(name)
    )


@pytest.mark.parametrize("version", ["2.5.1", "2.5.1+cu124", "2.6.0", "2.9.1"])
def test_pickled_weights_are_refused_with_the_reason_by_a_torch_with_a_hole(
    pickled, monkeypatch, capsys, version
):
    install(monkeypatch, version)
    reason = (
        f"pickled weights alone (pytorch_model.bin), which can run code in torch {version} (CVE-2025-32434"
    )
    for read in (read_model_folder, lambda folder: load_model(str(folder), list(CLASSES))):
        with pytest.raises(DataError) as refused:  # before the launch; a model of the hub is read here first
            read(pickled)
        assert reason in str(refused.value) and "use a model with model.safetensors" in str(refused.value)
    with pytest.raises(SystemExit):
        vit_predict.main(["--model", str(pickled), "leaf.jpg"])
    assert reason in capsys.readouterr().err


def test_pickled_weights_are_read_by_a_torch_without_a_hole(pickled, monkeypatch):
    install(monkeypatch, "2.10.0")
    read_model_folder(pickled)
    loaded = load_model(str(pickled), list(CLASSES))
    assert loaded.model.classifier.out_features == 3


def test_safetensors_are_read_where_there_are_both(pickled, monkeypatch):
    save_tiny_vit(pickled, labels=3)
    (pickled / "pytorch_model.bin").write_bytes(b"not read")
    for version in ("2.5.1", "2.10.0"):
        install(monkeypatch, version)
        load_model(str(pickled), list(CLASSES))


class Script(torch.nn.Module):
    def forward(self, x):
        return x


class Calls:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoints_are_read_from_torchs_own_form_alone(tmp_path):
    state = tmp_path / "state_tp0_pp0_dp0.pt"
    torch.save({"a": torch.ones(3)}, state)
    assert read_state(state)["a"].tolist() == [1, 1, 1]
    torch.jit.save(torch.jit.script(Script()), str(state))  # torch 2.5 runs it although weights_only=True
    with pytest.raises(CheckpointError):
        read_state(state)
    torch.save({"a": torch.ones(3)}, state, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError):
        read_state(state)
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"a": Calls(tmp_path / "ran")}, state)
        with pytest.raises(Exception):  # noqa: B017 - of many kinds
            read_state(state)
    assert not (tmp_path / "ran").exists()


# ---- names

NASTY = "a|b <img src=x onerror=alert(1)> [c](http://d) `e` *f* _g_ \\h &lt; \n# i \x1b[31m"


def test_markdown_keeps_a_name_in_its_place():
    text = escape_markdown(NASTY)
    assert "\n" not in text and "\x1b" not in text
    for special in "|<>[]`*&":
        assert text.count(special) == text.count("\\" + special) > 0, special
    assert "\\_g\\_" in text and "\\\\h" in text
    for ordinary in ("angular_leaf_spot", "vit-base-patch16-224", "LABEL_0", "Müller 2.5 (x)", "日本_語"):
        assert escape_markdown(ordinary) == ordinary


def test_cells_stay_cells():
    table = markdown_table(["a", "b"], [["x | y\nz", "**1 \\| 2**"]])
    assert table.splitlines()[2] == "| x \\| y z | **1 \\| 2** |"


def test_model_card_shows_names_and_nothing_else():
    settings = {"model_name_or_path": "a/vit", "dataset": "sets/<b>x</b>\n# y"}
    card = model_card(rows(0.5), settings, ["<script>", "a|b", "ordinary_name"])
    assert (
        "<script>" not in card.replace("\\<script\\>", "") and "\\<script\\>, a\\|b, ordinary_name." in card
    )
    assert "\n# y" not in card.split("---")[2] and "<b>" not in card.split("---")[2]
    assert ModelCard(card).data.library_name == "transformers"


def test_tables_of_a_sweep_show_names_and_nothing_else():
    cells = setting_cells({"model_name_or_path": "m/a|b", "dataset": "<i>"}, {"model_name_or_path": "model"})
    assert cells == ["a\\|b"]
    run = {"status": "failed", "exit_status": 1, "last_lines": ["<b> | \x1b[2J"]}
    assert why_no_numbers(run) == "failed, status 1: \\<b\\> \\| \\[2J"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x")'])
def test_csv_cells_are_no_formulas(tmp_path, text):
    assert csv_cell(text) == f"'{text}".replace("\r", " ")
    write_csv(tmp_path / "table.csv", [{"name": text, text: -1.5}], without=())
    with open(tmp_path / "table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"name": csv_cell(text), csv_cell(text): "-1.5"}


def test_terminal_gets_no_commands(capsys):
    text = "red\x1b[31m\x07\r\x9b2J \u202egpj.exe \udcff tab\t two\nlines é 日 👩\u200d🔬"
    shown = "red\\x1b[31m\\x07\\r\\x9b2J \\u202egpj.exe \\udcff tab\\t two\nlines é 日 👩\u200d🔬"
    assert printable(text) == shown
    print_rank0(text)
    with pytest.raises(SystemExit):
        exit_with_errors(text)
    out, err = capsys.readouterr()
    assert out == f"{shown}\n" and err == f"error: {shown}\n"


def test_predictions_of_nasty_names_are_safe_in_every_form(tmp_path, capsys):
    labels = ["=1+1", "\x1b[2J", "c"]
    save_tiny_vit(
        tmp_path / "model",
        labels=3,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    write_image(tmp_path / "images" / "=x\x1b[1m.png", 0, 0)
    (tmp_path / "images" / "\x1b]0;bad.png").write_bytes(b"no image")
    found = {}
    for form in ("table", "csv", "json"):
        words = [
            "--model",
            str(tmp_path / "model"),
            str(tmp_path / "images"),
            "--topk",
            "3",
            "--format",
            form,
        ]
        assert vit_predict.main(words) == 1
        found[form], err = capsys.readouterr()
        assert "\x1b" not in err and "\\x1b]0;bad.png" in err
    assert "\x1b" not in found["table"] and "\\x1b[2J" in found["table"]
    assert {row["label"] for row in csv.DictReader(io.StringIO(found["csv"]))} == {"'=1+1", "\x1b[2J", "c"}
    assert {p["label"] for p in json.loads(found["json"])[0]["predictions"]} == set(labels)


def test_name_with_dollars_is_no_formula_of_the_chart(tmp_path):
    from vit.report.charts import epoch_chart

    epoch_chart(rows(0.5)[:2], tmp_path / "chart.png", "vit on a$b_$ $\\frac$")
    assert (tmp_path / "chart.png").stat().st_size > 1000
