"""Temperature scaling, against answers that are known, and by the program."""

import numpy as np
import pytest
from helpers import load_images, save_tiny_vit, write_folder

import vit_predict
from vit.calibration import Recorded, calibrate, fit_temperature, read_recorded
from vit.data.dataset import DataError
from vit.predictions import MOST_VALUES, PredictionCollector, write_predictions

NAMES = ["blue", "green", "red"]


def calibrated(images: int, classes: int = 4) -> Recorded:
    """Labels drawn from the softmax of the logits: at temperature 1 the probabilities are right."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (images, classes))
    powers = np.exp(logits)
    chances = (powers / powers.sum(1, keepdims=True)).cumsum(1)
    return Recorded(logits, (rng.random((images, 1)) > chances[:, :-1]).sum(1))


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.7])
def test_logits_times_a_factor_have_a_temperature_times_the_factor(factor):
    found = calibrated(2000)
    scaled = Recorded(factor * found.logits + 5.0, found.labels)
    assert fit_temperature(scaled) == pytest.approx(factor * fit_temperature(found), rel=1e-9)
    assert fit_temperature(found) == pytest.approx(1, abs=0.1)  # of 2,000 draws


def test_the_temperature_has_the_lowest_cross_entropy():
    found = calibrated(500)
    found.logits *= 3

    def loss(temperature):
        return -np.log(found.probabilities(temperature)[np.arange(500), found.labels]).mean()

    best = fit_temperature(found)
    assert loss(best) < min(loss(0.99 * best), loss(1.01 * best), loss(1))


def test_an_overconfident_model_gets_a_lower_calibration_error():
    found = calibrated(2000)
    found.logits *= 4
    before, after = found.calibration_error(), found.calibration_error(fit_temperature(found))
    assert before > 0.15 and after < before / 4


def test_what_has_no_temperature_is_said():
    logits = np.eye(3) * 2
    with pytest.raises(DataError, match="the 3 validation images are all classified rightly"):
        fit_temperature(Recorded(logits, np.arange(3)))
    with pytest.raises(DataError, match="no better than by guessing"):
        fit_temperature(Recorded(logits, np.array([1, 2, 0])))


# ---- a run's folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model folder with predictions of two splits, of which the model is surer than it is right."""
    import torch

    monkeypatch.setattr("vit.predictions.all_reduce_sum", lambda rows: rows)  # of the only process
    images = load_images(write_folder(tmp_path / "set", {"train": 9, "validation": 120, "test": 60}))
    rng, found = np.random.default_rng(3), []
    for split in (images.validation, images.test):
        labels = torch.from_numpy(split.labels)
        logits = torch.from_numpy(rng.normal(0, 4, (len(labels), 3))).float()
        logits[torch.arange(len(labels)), labels] += 4
        collector = PredictionCollector(len(labels), 3)
        collector.add(list(range(len(labels))), logits, labels)
        found.append(collector.join(split))
    names = dict(enumerate(NAMES))
    save_tiny_vit(tmp_path / "model", labels=3, id2label=names, label2id={n: i for i, n in names.items()})
    write_predictions(found, NAMES, tmp_path / "model" / "predictions.parquet")
    return tmp_path, found


def test_the_table_keeps_enough_to_have_the_logits_again(folder):
    root, (validation, _) = folder
    read = read_recorded(root / "model", "validation", NAMES)
    assert read.labels.tolist() == validation.labels.tolist()
    assert read.logits == pytest.approx(validation.log_probabilities, abs=1e-6)
    top = np.take_along_axis(read.probabilities(), validation.classes, 1)
    assert top == pytest.approx(validation.probabilities, abs=1e-6)
    losses = -read.logits[np.arange(120), read.labels]
    assert losses == pytest.approx(validation.losses, abs=1e-5)


def predict(root, capsys, *words):
    code = vit_predict.main(["--model", str(root / "model"), str(root / "set" / "test"), *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_calibrated_predictions_are_less_sure_and_the_same_classes(folder, capsys):
    import json

    root, _ = folder
    words = ("--topk", "3", "--format", "json")
    code, plain, _ = predict(root, capsys, *words)
    calibrated_code, scaled, said = predict(root, capsys, *words, "--calibrate")
    assert code == calibrated_code == 0 and "fitted on 120 validation images; calibration error" in said
    temperature, _ = calibrate(root / "model", NAMES)
    assert temperature > 1.2
    for before, after in zip(json.loads(plain), json.loads(scaled), strict=True):
        first, second = ([row["label"] for row in one["predictions"]] for one in (before, after))
        assert first == second
        sure, less_sure = (
            np.array([row["probability"] for row in one["predictions"]]) for one in (before, after)
        )
        powers = sure ** (1 / temperature)
        assert less_sure == pytest.approx(powers / powers.sum(), abs=1e-5)


def test_a_division_that_makes_logits_equal_changes_no_class():
    import torch

    from vit.classify import Classifier, Found, Prediction

    classifier = Classifier.__new__(Classifier)
    classifier.device, classifier.labels, classifier.temperature = torch.device("cpu"), NAMES, 3e38
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    classifier.model = lambda pixel_values: type("Output", (), {"logits": logits})
    result = Prediction(Found("image"), [])
    classifier._classify([(result, torch.zeros(3, 2, 2))], 3)
    assert [label for label, _ in result.best] == ["red", "green", "blue"]
    assert len({value for _, value in result.best}) == 1


def test_folders_that_cannot_be_calibrated_are_named(folder, capsys):
    root, found = folder
    table = root / "model" / "predictions.parquet"

    def problem():
        with pytest.raises(SystemExit) as end:
            predict(root, capsys, "--calibrate")
        assert end.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        return line.removeprefix(f"error: --calibrate: {root / 'model'}: ")

    write_predictions(found[1:], NAMES, table)
    assert problem() == "predictions.parquet has no validation images, on which the temperature is fitted"
    write_predictions(found, ["blue", "green", "pink"], table)
    assert problem().startswith("predictions.parquet is of other classes than config.json")
    found[0].log_probabilities = None
    write_predictions(found, NAMES, table)
    assert problem().startswith("predictions.parquet holds the best classes of an image only")
    table.write_bytes(b"PAR1")
    assert problem().startswith("predictions.parquet is damaged")
    table.unlink()
    assert problem().startswith("has no predictions.parquet, which a run writes")


def test_too_many_classes_are_not_kept():
    assert PredictionCollector(10, MOST_VALUES // 10).keeps_all
    assert not PredictionCollector(11, MOST_VALUES // 10).keeps_all
