"""vit_predict.py: three formats, bad images aside, and what transformers itself predicts."""

import csv
import io
import json

import pytest
from helpers import save_tiny_vit, write_image
from PIL import Image

import vit_predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    names = {i: f"kind {i}" for i in range(3)}
    save_tiny_vit(root / "model", labels=3, id2label=names, label2id={name: i for i, name in names.items()})
    for i in range(3):
        write_image(root / "images" / "deep" / f"{i}.png", i, i)
    Image.new("L", (20, 30), 99).save(root / "images" / "grey.jpg")
    (root / "images" / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def predict(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def predict(*words):
        code = vit_predict.main(["--model", "model", *words])
        return code, *capsys.readouterr()

    return predict


def expected(folder, path):
    from transformers import pipeline

    classify = pipeline("image-classification", model=str(folder / "model"), device="cpu", use_fast=False)
    return [
        (row["label"], row["score"]) for row in classify(Image.open(folder / path).convert("RGB"), top_k=3)
    ]


def test_json_equals_transformers_pipeline(predict, folder):
    code, out, err = predict("images", "--topk", "3", "--format", "json", "--batch_size", "3")
    rows = json.loads(out)
    assert code == 0 and err == ""
    assert [row["image"] for row in rows] == [
        "images/deep/0.png",
        "images/deep/1.png",
        "images/deep/2.png",
        "images/grey.jpg",
    ]
    for row in rows:
        for found, (label, score) in zip(row["predictions"], expected(folder, row["image"]), strict=True):
            assert found["label"] == label and found["probability"] == pytest.approx(score, abs=1e-5)


def test_csv_has_a_row_for_each_rank(predict):
    code, out, _ = predict("images/grey.jpg", "images/deep/0.png", "--topk", "2", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [(row["image"], row["rank"]) for row in rows] == [
        ("images/grey.jpg", "1"),
        ("images/grey.jpg", "2"),
        ("images/deep/0.png", "1"),
        ("images/deep/0.png", "2"),
    ]
    assert float(rows[0]["probability"]) > float(rows[1]["probability"]) and rows[0]["label"].startswith(
        "kind "
    )


def test_table_has_a_line_for_each_image(predict):
    code, out, _ = predict("images")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 4
    assert all(line.startswith("images/") and " kind " in line for line in lines)
    assert len({line.index(" kind ") for line in lines}) == 1  # columns line up


def test_topk_beyond_the_classes_gives_all(predict):
    _, out, _ = predict("images/grey.jpg", "--topk", "9", "--format", "json")
    found = json.loads(out)[0]["predictions"]
    assert len(found) == 3 and sum(row["probability"] for row in found) == pytest.approx(1, abs=1e-5)


def test_bad_image_is_reported_and_the_rest_go_on(predict, folder):
    (folder / "broken.png").write_bytes((folder / "images" / "deep" / "0.png").read_bytes()[:100])
    code, out, err = predict("broken.png", "images/grey.jpg", "missing.png", "--format", "json")
    assert code == 1
    assert [row["image"] for row in json.loads(out)] == ["images/grey.jpg"]
    assert [line.split(":")[0] for line in err.splitlines()] == [
        "broken.png",
        "missing.png",
    ] and "cannot be read" in err


def test_nothing_but_bad_images_still_is_valid_output(predict):
    for form, nothing in (("json", "[]\n"), ("csv", "image,rank,label,probability\n"), ("table", "")):
        code, out, err = predict("missing.png", "--format", form)
        assert code == 1 and out.replace("\r", "") == nothing and "missing.png: cannot be read" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "./nowhere", "images"], "--model ./nowhere: no such model folder"),
        (["--model", "nowhere", "images"], "--model nowhere: no such model folder"),
        (["--model", "bare", "images"], "--model bare: "),
        (["--model", "cut", "images"], "--model cut: "),
        (["empty"], "no images under empty"),
        (["--topk", "0", "images"], "--topk 0: must be a whole number >= 1"),
        (["--format", "xml", "images"], "invalid choice: 'xml'"),
    ],
)
def test_bad_arguments_are_named_and_end_with_2(predict, folder, capsys, words, message):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "cut").mkdir(exist_ok=True)
    (folder / "cut" / "config.json").write_text('{"model_type": "vit"}')
    (folder / "cut" / "model.safetensors").write_bytes(bytes(20))
    (folder / "bare").mkdir(exist_ok=True)
    (folder / "bare" / "config.json").write_text('{"model_type": "vit"}')  # and no weights
    with pytest.raises(SystemExit) as end:
        predict(*words)
    assert end.value.code == 2 and message in capsys.readouterr().err
