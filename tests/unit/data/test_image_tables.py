"""Tables of images and labels: CSV and JSON lines beside images, and the columns of parquet files."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import load_images, write_image
from PIL import Image

from vit.data.dataset import DataError
from vit.data.pixels import open_image

NAMES = ["cat", "dog"] * 6


def write_images(folder, count=12):
    for i in range(count):
        write_image(folder / f"{i}.png", i % 2, i)


def write_csv(path, rows, head="id,label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *rows]) + "\n")


def labels_by_file(images) -> dict[str, str]:
    return {
        split.images[i].rpartition("/")[2]: images.label_names[split.labels[i]]
        for split in images.splits()
        for i in range(len(split))
    }


EXPECTED = {f"{i}.png": NAMES[i] for i in range(12)}


def test_kaggles_csv_names_files_with_or_without_their_suffix(tmp_path):
    for name, suffix in (("with", ".png"), ("without", "")):
        write_images(tmp_path / name / "train")
        write_images(tmp_path / name / "test", 3)  # the same file names
        write_csv(tmp_path / name / "train.csv", [f"{i}{suffix},{NAMES[i]}" for i in range(12)])
        write_csv(tmp_path / name / "sample_submission.csv", ["0"], head="id")
        images = load_images(tmp_path / name)
        assert labels_by_file(images) == EXPECTED and images.label_names == ["cat", "dog"]
        assert all("/train/" in path for path in images.train.images)
        assert "tables without a column of files or of labels (1:" in images.notes[-1]


def test_a_table_can_be_named_itself_and_its_columns_too(tmp_path):
    write_images(tmp_path / "pictures")
    rows = [f"pictures/{i}.png,{i},{NAMES[i]}" for i in range(12)]
    write_csv(tmp_path / "list.csv", rows, head="where,age,kind")
    with pytest.raises(DataError, match="the columns where, age, kind: name those .* --image_column"):
        load_images(tmp_path / "list.csv")
    flags = ("--image_column", "where", "--label_column", "kind")
    assert labels_by_file(load_images(tmp_path / "list.csv", *flags)) == EXPECTED


@pytest.mark.parametrize("kind", ["metadata.csv", "metadata.jsonl"])
def test_the_hubs_metadata_files_are_read_in_each_split(tmp_path, kind):
    for split, count in (("train", 12), ("validation", 4)):
        write_images(tmp_path / split, count)
        rows = [{"file_name": f"{i}.png", "label": NAMES[i]} for i in range(count)]
        if kind == "metadata.csv":
            write_csv(
                tmp_path / split / kind, [f"{r['file_name']},{r['label']}" for r in rows], "file_name,label"
            )
        else:
            (tmp_path / split / kind).write_text("\n".join(map(json.dumps, rows)))
    images = load_images(tmp_path)
    assert len(images.train) == 12 and len(images.validation) == 4 and labels_by_file(images) == EXPECTED


def test_a_split_column_gives_the_splits(tmp_path):
    write_images(tmp_path / "images")
    splits = ["train"] * 8 + ["valid"] * 2 + ["test"] * 2
    write_csv(
        tmp_path / "all.csv", [f"{i}.png,{NAMES[i]},{splits[i]}" for i in range(12)], "file,class,split"
    )
    images = load_images(tmp_path)
    assert [len(split) for split in images.splits()] == [8, 2, 2]


def test_numbers_are_classes_in_their_order_and_blanks_do_not_count(tmp_path):
    write_images(tmp_path / "train")
    write_csv(tmp_path / "train.csv", [f"{i}.png,{' ' * (i % 3)}{(2, 10)[i % 2]} " for i in range(12)])
    assert load_images(tmp_path).label_names == ["2", "10"]


@pytest.mark.parametrize(
    "row, message",
    [
        ("99.png,cat", "1 of its 13 images are not under .*, such as 99.png"),
        ("../outside.png,cat", r"1 of its 13 images are not under .*, such as \.\./outside.png"),
        ("3.png,cat", "3.png has two labels, dog and cat"),
    ],
)
def test_what_a_table_must_not_have(tmp_path, row, message):
    write_images(tmp_path / "set" / "train")
    write_image(tmp_path / "outside.png", 0, 0)
    write_csv(tmp_path / "set" / "train.csv", [f"{i}.png,{NAMES[i]}" for i in range(12)] + [row])
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "set")
    if "outside" in row:
        images = load_images(tmp_path / "set", "--allow_external_images")
        assert labels_by_file(images) == EXPECTED | {"outside.png": "cat"}


def test_class_folders_come_before_a_table_beside_them(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 4)
    write_csv(tmp_path / "sizes.csv", ["0.png,20"], head="file,label")
    assert load_images(tmp_path).label_names == ["a", "b"]


# ---- parquet


def png(colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


COLOURS = [(0, 0, 255), (255, 0, 0)] * 6
RAW = [png(colour) for colour in COLOURS]
STRUCT = pyarrow.array([{"bytes": raw, "path": None} for raw in RAW])
INTS = [0, 1] * 6
LARGE = pyarrow.struct([("bytes", pyarrow.large_binary()), ("path", pyarrow.large_string())])


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.parent


@pytest.mark.parametrize(
    "labels, names",
    [
        (pyarrow.array(NAMES, pyarrow.large_string()), ["cat", "dog"]),  # polars
        (pyarrow.array(NAMES).dictionary_encode(), ["cat", "dog"]),  # pandas' category
        (pyarrow.array(["cat", "dog "] * 6), ["cat", "dog"]),
        (pyarrow.array(INTS, pyarrow.uint8()), ["0", "1"]),
        (pyarrow.array([float(i) for i in INTS]), ["0", "1"]),  # pandas after a join
        (pyarrow.array([bool(i) for i in INTS]), ["False", "True"]),
    ],
    ids=["large_string", "dictionary", "blanks", "uint8", "float", "bool"],
)
def test_labels_of_every_type(tmp_path, labels, names):
    images = load_images(write_parquet(tmp_path / "a" / "train.parquet", image=STRUCT, label=labels))
    assert images.label_names == names
    for split in images.splits():
        for i in range(len(split)):
            assert open_image(split.images[i]).getpixel((0, 0)) == COLOURS[split.labels[i]]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(RAW),
        pyarrow.array(RAW, pyarrow.large_binary()),
        pyarrow.array([{"bytes": raw, "path": None} for raw in RAW], LARGE),
        pyarrow.array([{"bytes": raw, "path": None, "width": 8} for raw in RAW]),
    ],
    ids=["bytes", "large_bytes", "large_struct", "struct_with_more"],
)
def test_images_of_every_type(tmp_path, column):
    images = load_images(write_parquet(tmp_path / "a" / "train.parquet", image=column, label=NAMES))
    assert {open_image(images.train.images[i]).getpixel((0, 0)) for i in range(10)} == set(COLOURS)


def test_columns_are_found_by_name_before_type(tmp_path):
    more = {"id": list(range(12)), "filename": [f"{i}.png" for i in range(12)]}
    folder = write_parquet(tmp_path / "a" / "train.parquet", image=STRUCT, target=INTS, **more)
    assert load_images(folder).label_names == ["0", "1"]
    folder = write_parquet(tmp_path / "b" / "train.parquet", img=STRUCT, fine_label=INTS, coarse_label=INTS)
    with pytest.raises(DataError, match="2 label columns among .*name one with --label_column"):
        load_images(folder)


@pytest.mark.parametrize("labels", [[["cat"], ["cat", "dog"]] * 6, [[1, 0], [0, 1]] * 6])
def test_several_labels_an_image_are_refused(tmp_path, labels):
    with pytest.raises(DataError, match="column 'label' has lists"):
        load_images(write_parquet(tmp_path / "a" / "train.parquet", image=STRUCT, label=labels))


def test_images_as_lists_of_numbers_are_refused(tmp_path):
    arrays = [np.zeros((4, 4, 3), "u1").tolist()] * 12
    with pytest.raises(DataError, match="column 'image' has lists of numbers: store encoded images"):
        load_images(write_parquet(tmp_path / "a" / "train.parquet", image=arrays, label=NAMES))


def test_labels_that_are_no_classes_are_refused(tmp_path):
    folder = write_parquet(tmp_path / "a" / "train.parquet", image=STRUCT, label=[0.5, 1.0] * 6)
    with pytest.raises(DataError, match="column 'label' has 0.5, which is no class"):
        load_images(folder)


def test_paths_stay_in_the_folder_of_the_table(tmp_path):
    write_images(tmp_path / "set" / "images")
    write_image(tmp_path / "outside.png", 0, 0)
    paths = [f"images/{i}.png" for i in range(11)] + ["../outside.png"]
    folder = write_parquet(tmp_path / "set" / "train.parquet", image=paths, label=NAMES)
    images = load_images(folder, "--validation_fraction", 0.3)
    outside = 0
    for split in images.splits():
        for i in range(len(split)):
            try:
                open_image(split.images[i])
            except DataError as error:
                assert "outside of the folder of the table; --allow_external_images reads it" in str(error)
                outside += 1
    assert outside == 1
    images = load_images(folder, "--allow_external_images")
    assert all(open_image(split.images[i]) for split in images.splits() for i in range(len(split)))


def test_configurations_are_kept_apart(tmp_path):
    for config, count in (("full", 12), ("small", 6)):
        columns = {"image": STRUCT.slice(0, count), "label": NAMES[:count]}
        write_parquet(tmp_path / config / "train-00000-of-00001.parquet", **columns)
    with pytest.raises(DataError, match="has the configurations full, small: choose one by --dataset_config"):
        load_images(tmp_path)
    images = load_images(tmp_path, "--dataset_config", "small")
    assert sum(len(split) for split in images.splits()) == 6
    with pytest.raises(DataError, match="--dataset_config tiny: it has the configurations full, small"):
        load_images(tmp_path, "--dataset_config", "tiny")
    # folders of splits, and `data`, are no configurations
    folder = tmp_path / "plain"
    for split in ("train", "test"):
        write_parquet(folder / "data" / split / "0.parquet", image=STRUCT, label=NAMES)
    assert len(load_images(folder).test) == 12


def test_a_folder_of_a_table_is_the_same_split_that_it_is_for_images(tmp_path):
    for folder, count in (("trainset", 12), ("testset", 4), ("Val2017", 6)):
        write_parquet(tmp_path / folder / "0.parquet", image=STRUCT.slice(0, count), label=NAMES[:count])
    assert [len(split) for split in load_images(tmp_path).splits()] == [12, 6, 4]


def test_an_empty_cell_is_an_unreadable_image(tmp_path):
    column = pyarrow.array([None, *RAW[1:]])
    images = load_images(write_parquet(tmp_path / "a" / "train.parquet", image=column, label=NAMES))
    split = next(
        split for split in images.splits() for i in range(len(split)) if split.images.indices[i] == 0
    )
    with pytest.raises(DataError, match="the table holds null"):
        split.images[int(np.flatnonzero(split.images.indices == 0)[0])]
