"""The exported model: its checksums, modes and files, and what is refused."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import flip_one_bit, save_tiny_vit, tiny_vit

from vit.checksums import sums_problem
from vit.data.dataset import DataError
from vit.model import export_model, load_model


@pytest.fixture
def exported(tmp_path) -> Path:
    from transformers import AutoImageProcessor

    source = save_tiny_vit(tmp_path / "source", labels=3)
    model, out = tiny_vit(3), tmp_path / "out"
    out.mkdir()
    processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
    export_model(model.state_dict(), model.config, processor, out)
    return out


def test_export_has_sums_and_ordinary_modes_and_leaves_no_other_file(exported):
    names = {"model.safetensors", "config.json", "preprocessor_config.json", "SHA256SUMS"}
    assert {path.name for path in exported.iterdir()} == names
    sums = (exported / "SHA256SUMS").read_text().split()[1::2]
    assert set(sums) == names - {"SHA256SUMS"} and sums_problem(exported) == ""
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_export_is_refused_by_training_and_prediction(exported, name, capsys):
    import vit_predict

    labels = ["LABEL_0", "LABEL_1", "LABEL_2"]
    load_model(str(exported), labels)
    flip_one_bit(exported / name)
    with pytest.raises(DataError, match=f"{name} is not the file that was written.*copy the folder again"):
        load_model(str(exported), labels)
    with pytest.raises(SystemExit):
        vit_predict.main(["--model", str(exported), "leaf.jpg"])
    assert f"{name} is not the file that was written" in capsys.readouterr().err
    (exported / "SHA256SUMS").unlink()  # as the message says
    assert sums_problem(exported) == ""


def test_sums_name_files_of_their_folder_alone(exported):
    (exported / "SHA256SUMS").write_text(f"{'0' * 64}  ../source/config.json\n")
    assert sums_problem(exported) == "SHA256SUMS is damaged"
    (exported / "SHA256SUMS").write_bytes(b"\xff\xfe\n")
    assert sums_problem(exported) == "SHA256SUMS is damaged"


def test_export_that_fails_leaves_the_earlier_one(exported, monkeypatch):
    before = (exported / "model.safetensors").read_bytes()
    model = tiny_vit(3)

    def fail(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        export_model(model.state_dict(), model.config, SimpleNamespace(save_pretrained=fail), exported)
    assert (exported / "model.safetensors").read_bytes() == before and sums_problem(exported) == ""
    assert not [path for path in exported.iterdir() if path.name.startswith(".")]
