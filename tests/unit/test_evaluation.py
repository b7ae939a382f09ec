"""Loss and accuracy of a split: each image once, padding never, added logits never."""

import pytest
import torch
import torch.nn.functional as F

from vit.layout import ParallelLayout
from vit.step import Normalize, TrainStep, evaluate

ALONE = ParallelLayout(1)


class Boosted:
    """A model whose logits are the first pixels of an image, as 5 classes of which 3 are true."""

    booster = optimizer = graph_stream = None

    def __init__(self, layout: ParallelLayout):
        self.layout, self.model = layout, torch.nn.Identity()
        self.model.forward = lambda pixel_values: type(
            "Output", (), dict(logits=pixel_values.flatten(1)[:, :5])
        )

    def ema_weights(self):
        return torch.no_grad()


@pytest.fixture
def evaluated(monkeypatch):
    """(layout) -> result; the sums of the other ranks are ``others``."""

    def run(layout=ALONE, others=(0.0, 0.0, 0.0), images=5, check=None):
        add = torch.tensor(others, dtype=torch.float64)
        monkeypatch.setattr("vit.step.all_reduce_sum", lambda values: values + add)
        step = TrainStep(Boosted(layout), 3, Normalize((0.0,) * 3, (1.0,) * 3))
        return evaluate(step, BATCHES, images, check)

    return run


def batches() -> tuple[list[dict], torch.Tensor, torch.Tensor]:
    """Two batches of four, of which three images are padding. -> batches, real logits, labels"""
    pixels = torch.randint(
        0, 256, (8, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels[:, :, 1, 0] = 255  # logits of the classes that do not exist: the largest
    pixels.view(8, -1)[:, 3:5] = 255
    labels = torch.tensor([0, 1, 2, 0, 1, -100, -100, -100])
    logits = pixels.view(8, -1)[:5, :3].float() / 255
    labels[1] = logits[1].argmax()
    cut = [{"pixel_values": pixels[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4)]
    return cut, logits, labels[:5]


BATCHES, LOGITS, LABELS = batches()


def test_loss_and_accuracy_are_means_over_the_real_images(evaluated):
    correct = (LOGITS.argmax(1) == LABELS).float().mean().item()
    assert 0 < correct < 1
    result = evaluated()
    assert result["average_loss"] == pytest.approx(F.cross_entropy(LOGITS, LABELS).item(), abs=1e-6)
    assert result["accuracy"] == pytest.approx(correct) and result["images"] == 5


def test_sums_of_all_ranks_are_divided_together(evaluated):
    alone = evaluated()
    result = evaluated(others=(6.0, 3.0, 15.0), images=20)
    assert result["average_loss"] == pytest.approx((5 * alone["average_loss"] + 6) / 20)
    assert result["accuracy"] == pytest.approx((5 * alone["accuracy"] + 3) / 20) and result["images"] == 20


def test_ranks_that_do_not_report_add_nothing(evaluated):
    layout = ParallelLayout(2, tensor_size=2, rank=1)
    assert not layout.reports_loss
    assert evaluated(layout, others=(10.0, 2.0, 4.0), images=4) == {
        "average_loss": 2.5,
        "accuracy": 0.5,
        "images": 4,
    }


@pytest.mark.parametrize("images", [4, 6])
def test_another_number_of_images_is_an_error(evaluated, images):
    with pytest.raises(RuntimeError, match=f"counted 5 images instead of {images}"):
        evaluated(images=images)


def test_signal_is_looked_for_in_the_first_batch_and_every_twenty(monkeypatch):
    monkeypatch.setattr("vit.step.all_reduce_sum", lambda values: values)
    step = TrainStep(Boosted(ALONE), 3, Normalize((0.0,) * 3, (1.0,) * 3))
    seen, asked = [], []

    def many():
        for i in range(41):
            seen.append(i)
            yield {name: tensor.clone() for name, tensor in BATCHES[0].items()}

    evaluate(step, many(), 41 * 4, lambda: asked.append(len(seen)))
    assert asked == [1, 21, 41]


def test_class_weights_are_of_the_training_alone_and_sum_over_images():
    weights = [0.5, 1.0, 2.5]
    step = TrainStep(Boosted(ALONE), 3, Normalize((0.0,) * 3, (1.0,) * 3), class_weights=weights)
    five = torch.cat([LOGITS, torch.full((5, 2), 9.0)], 1)
    each = F.cross_entropy(LOGITS, LABELS, reduction="none")
    padded = torch.cat([five, five[:2]]), torch.cat([LABELS, torch.full((2,), -100)])
    assert torch.allclose(step.training_loss(*padded), (each * torch.tensor(weights)[LABELS]).sum())
    assert torch.allclose(step.sum_cross_entropy(*padded), each.sum())
    # a mixed image has the weighted losses of its two labels, in the same parts
    other = LABELS.flip(0)
    one_hot = [F.one_hot(labels, 3).float() for labels in (LABELS, other)]
    mixed = step.training_loss(five, 0.7 * one_hot[0] + 0.3 * one_hot[1])
    parts = step.training_loss(five, LABELS), step.training_loss(five, other)
    assert torch.allclose(mixed, 0.7 * parts[0] + 0.3 * parts[1])


def test_smoothing_is_of_the_training_alone_and_sums_over_images():
    step = TrainStep(Boosted(ALONE), 3, Normalize((0.0,) * 3, (1.0,) * 3))
    five = torch.cat([LOGITS, torch.full((5, 2), 9.0)], 1)
    expected = F.cross_entropy(LOGITS, LABELS, reduction="sum", label_smoothing=0.2)
    assert torch.allclose(step.sum_cross_entropy(five, LABELS, 0.2), expected)
    assert torch.allclose(
        step.sum_cross_entropy(five, LABELS), F.cross_entropy(LOGITS, LABELS, reduction="sum")
    )
