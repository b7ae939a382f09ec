"""vit_predict.py: three formats, bad images aside, and what transformers itself predicts."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from helpers import save_tiny_vit, write_image
from PIL import Image
from safetensors.torch import load_file, save_file

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
    for i, place in enumerate(("kind 0", "kind 1", "kind 1/more", "kind 2")):
        write_image(root / "labelled" / "test" / place / f"{i}.png", int(place[5]), 7 + i)
    write_image(root / "labelled" / "unknown" / "9.png", 0, 9)
    return root


@pytest.fixture
def predict(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def predict(*words):
        code = vit_predict.main(["--model", "model", *words])
        return code, *capsys.readouterr()

    return predict


def expected(folder, path):
    from transformers import AutoImageProcessor, pipeline

    # transformers 5 resizes with torchvision if it is not asked
    processor = AutoImageProcessor.from_pretrained(folder / "model", use_fast=False)
    classify = pipeline(
        "image-classification", model=str(folder / "model"), image_processor=processor, device="cpu"
    )
    return [
        (row["label"], row["score"]) for row in classify(Image.open(folder / path).convert("RGB"), top_k=3)
    ]


def test_json_equals_transformers_pipeline(predict, folder):
    code, out, err = predict("images", "--topk", "3", "--format", "json", "--batch_size", "3")
    rows = json.loads(out)
    assert code == 0 and err == "not used: .txt files that are no images (1: images/notes.txt)\n"
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


def test_an_image_that_cannot_be_prepared_does_not_stop_the_others(predict, folder):
    """A processor that does not resize: one image has the size of the model, and the batch has four."""
    shutil.copytree(folder / "model", folder / "unsized", dirs_exist_ok=True)
    path = folder / "unsized" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_resize": False}))
    Image.new("RGB", (16, 16), (200, 0, 0)).save(folder / "fits.png")
    code, out, err = predict("images", "fits.png", "--model", "unsized")
    assert code == 1 and out.startswith("fits.png  kind ")
    assert [": cannot be classified: " in line for line in err.splitlines()[1:]] == [True] * 4


@pytest.mark.parametrize("height", [1, 3, 4])  # 4: since transformers 5
def test_image_as_high_as_it_has_channels_is_no_other_image(predict, folder, height):
    """The same as its enlargement by whole pixels, which a filter of the nearest pixel does not see."""
    shutil.copytree(folder / "model", folder / "nearest", dirs_exist_ok=True)
    path = folder / "nearest" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 0}))
    pixels = np.random.default_rng(height).integers(0, 256, (height, 8, 3), dtype=np.uint8)
    for name, factor in (("thin.png", 1), ("large.png", 5)):
        Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1)).save(folder / name)
    _, out, _ = predict("thin.png", "large.png", "--model", "nearest", "--format", "json", "--topk", "3")
    thin, large = (row["predictions"] for row in json.loads(out))
    assert [row["label"] for row in thin] == [row["label"] for row in large]
    # the two rows of a product may be rounded differently
    close = pytest.approx([row["probability"] for row in large], rel=1e-5)
    assert [row["probability"] for row in thin] == close


def test_images_of_more_than_8_bits_are_read_as_in_training(predict, folder):
    shutil.copytree(folder / "model", folder / "deep", dirs_exist_ok=True)
    path = folder / "deep" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pixel_range": [0, 4095]}))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "8.png")
    Image.fromarray(np.rint(pixels / 255 * 4095).astype(np.uint16)).save(folder / "12.png")
    words = ("8.png", "12.png", "--format", "json", "--topk", "3")
    for more in (("--model", "deep"), ("--pixel_range", "0", "4095")):
        code, out, _ = predict(*words, *more)
        expected, found = (row["predictions"] for row in json.loads(out))
        assert code == 0 and found == expected
    code, out, err = predict(*words)
    assert code == 1 and len(json.loads(out)) == 1 and "12.png: cannot be read: has more than 8 bits" in err


TRUE = ["kind 0", "kind 1", "kind 1", "kind 2", None]


def test_labelled_folder_has_true_classes_and_accuracy_in_every_form(predict):
    code, out, err = predict("labelled", "--format", "json")
    rows = json.loads(out)
    assert code == 0 and [row.get("true_label") for row in rows] == TRUE
    found = [row["predictions"][0]["label"] for row in rows]
    right = sum(a == b for a, b in zip(found, TRUE))
    accuracy = f"accuracy {right / 4:.4f} ({right} of 4 images in a folder of the name of a class)"
    assert err.splitlines() == [accuracy]
    _, out, err = predict("labelled", "--format", "csv", "--topk", "2")
    table = list(csv.DictReader(io.StringIO(out)))
    assert [row["true_label"] or None for row in table if row["rank"] == "1"] == TRUE
    assert err.splitlines() == [accuracy]
    _, out, err = predict("labelled")
    *lines, last = out.splitlines()
    assert (last, err) == (accuracy, "")
    assert [f"({true})" in line if true else "(" not in line for true, line in zip(TRUE, lines)] == [True] * 5
    assert [label in line.rpartition("  ")[2] for label, line in zip(found, lines)] == [True] * 5


def test_the_named_folder_itself_can_be_a_class_and_other_folders_are_none(predict):
    _, out, _ = predict("labelled/test/kind 1", "--format", "json")
    assert [row["true_label"] for row in json.loads(out)] == ["kind 1"] * 2
    _, out, err = predict("images", "labelled/test/kind 1/2.png")
    assert "accuracy" not in out + err and "(" not in out


def test_damaged_image_of_a_class_is_named_and_not_counted(predict, folder):
    shutil.copytree(folder / "labelled" / "test", folder / "damaged", dirs_exist_ok=True)
    (folder / "damaged" / "kind 0" / "a.png").write_bytes(b"none")
    code, out, err = predict("damaged")
    assert code == 1 and " of 4 images" in out and err.startswith("damaged/kind 0/a.png: cannot be read")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "./nowhere", "images"], "--model ./nowhere: no such model folder"),
        (["--model", "nowhere", "images"], "--model nowhere: no such model folder"),
        (["--model", "bare", "images"], "--model bare: "),
        (["--model", "cut", "images"], "--model cut: "),
        (
            ["--model", "headless", "images"],
            "--model headless: has no weights for 2 parameters, e.g. classifier",
        ),
        (
            ["--model", "from one", "images"],
            "--model from one: config.json does not number its classes from 0",
        ),
        (["--model", "unprepared", "images"], "--model unprepared: "),
        (["empty"], "no images under empty"),
        (["--topk", "0", "images"], "--topk 0: must be a whole number >= 1"),
        (["--pixel_range", "9", "9", "images"], "--pixel_range 9 9: black must be below white"),
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
    for name in ("headless", "from one", "unprepared"):
        shutil.copytree(folder / "model", folder / name, dirs_exist_ok=True)
    weights = {key: value for key, value in load_file("model/model.safetensors").items() if "vit." in key}
    save_file(weights, "headless/model.safetensors", metadata={"format": "pt"})
    (folder / "unprepared" / "preprocessor_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "model" / "config.json").read_text())
    config["id2label"] = {str(int(i) + 1): name for i, name in config["id2label"].items()}
    (folder / "from one" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        predict(*words)
    assert end.value.code == 2 and message in capsys.readouterr().err
