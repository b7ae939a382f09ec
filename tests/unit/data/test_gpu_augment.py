"""Augmentation of a whole batch on the device: torchvision's operations, drawn for each image by itself."""

import pytest
import torch

from vit.data.gpu_augment import OPERATIONS, BatchAugment, apply_operations, counter_uniform, magnitude_of


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Smooth images, one of noise, one of few levels, one of a single colour."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (5, 3, 8, 8), generator=generator).float()
    pixels = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)
    pixels[2] = torch.randint(0, 256, (3, 32, 32), generator=generator)
    pixels[3] = pixels[3] // 64 * 64
    pixels[4] = 77
    return pixels


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_torchvisions_on_single_images(pictures, name):
    from torchvision.transforms import AutoAugment, InterpolationMode
    from torchvision.transforms.autoaugment import _apply_op

    for bin in (0, 3, 9):
        magnitude = magnitude_of(name, bin, 32)
        theirs = AutoAugment()._augmentation_space(10, (32, 32))[name][0]
        assert theirs.ndim == 0 or magnitude == pytest.approx(theirs[bin].item(), abs=1e-4)
        for sign in (1, -1) if OPERATIONS.index(name) < 9 else (1,):
            ours = apply_operations(
                pictures, torch.full((5,), OPERATIONS.index(name)), torch.full((5,), sign * magnitude)
            )
            expected = torch.stack(
                [_apply_op(p, name, sign * magnitude, InterpolationMode.NEAREST, None) for p in pictures]
            )
            difference = (ours.int() - expected.int()).abs()
            # blends are cut off to whole numbers, where fp32 is just below one or not
            assert difference.max() <= (1 if name in ("Brightness", "Color", "Contrast", "Sharpness") else 0)


@pytest.mark.parametrize("bins, bin", [(31, 9), (31, 30), (11, 10)])
def test_rand_augments_magnitudes_are_torchvisions(bins, bin):
    from torchvision.transforms import RandAugment

    theirs = RandAugment(2, bin, bins)._augmentation_space(bins, (32, 32))
    assert set(theirs) == set(OPERATIONS) - {"Invert"} | {"Identity"}
    augment = BatchAugment(0, 32, rand_augment=(2, bin, bins))
    for name, ours in zip(OPERATIONS, augment.rand_magnitudes.tolist()):
        if name != "Invert":
            magnitudes, signed = theirs[name]
            assert ours == pytest.approx(magnitudes[bin].item() if magnitudes.ndim else 0.0, abs=1e-4), name
            assert signed == (OPERATIONS.index(name) <= OPERATIONS.index("Sharpness"))


def test_rand_augment_draws_layers_of_torchvisions_operations(pictures):
    """Every image is one of those that torchvision's operations make, each operation as often."""
    from torchvision.transforms import InterpolationMode, RandAugment
    from torchvision.transforms.autoaugment import _apply_op

    source, count = pictures[0], 2800
    ours = BatchAugment(5, 32, rand_augment=(1, 9, 31))(
        source.expand(count, -1, -1, -1), 2, torch.arange(count)
    )
    made = {}
    for name, (magnitudes, signed) in RandAugment()._augmentation_space(31, (32, 32)).items():
        magnitude = magnitudes[9].item() if magnitudes.ndim else 0.0
        made |= {
            (name, sign): _apply_op(source, name, sign * magnitude, InterpolationMode.NEAREST, None)
            for sign in ((1, -1) if signed else (1,))
        }
    difference = torch.stack(
        [(ours.int() - expected.int()).abs().amax((1, 2, 3)) for expected in made.values()]
    )
    nearest, which = difference.min(0)
    assert nearest.max() <= 1
    found = torch.bincount(which, minlength=len(made)).tolist()
    times = {name: 0 for name, _ in made}
    for (name, _), number in zip(made, found):
        times[name] += number
    assert all(140 < number < 260 for number in times.values()), times  # of 200
    both = BatchAugment(5, 32, rand_augment=(2, 9, 31))(source.expand(100, -1, -1, -1), 2, torch.arange(100))
    assert (both != ours[:100]).flatten(1).any(
        1
    ).float().mean() > 0.7  # the first layer's draws are the same, the second changes more


def test_each_image_has_its_own_operation(pictures):
    operation = torch.tensor([0, 6, -1, 11, 4])
    magnitude = torch.tensor([0.2, 0.5, 0.0, 0.0, -20.0])
    mixed = apply_operations(pictures, operation, magnitude)
    alone = [
        apply_operations(pictures[i : i + 1], operation[i : i + 1], magnitude[i : i + 1]) for i in range(5)
    ]
    assert torch.equal(mixed, torch.cat(alone)) and torch.equal(mixed[2], pictures[2])


def test_augmentation_follows_seed_epoch_and_image_alone(pictures):
    pixels, index = pictures[[0, 1, 2, 3] * 16], torch.arange(64)
    augment = BatchAugment(7, 32, padding=4, flip=True, policy="cifar10")
    whole = augment(pixels, 3, index)
    assert whole.dtype == torch.uint8 and whole.shape == pixels.shape
    assert torch.equal(whole[40:], augment(pixels[40:], 3, index[40:]))  # in another batch
    assert torch.equal(whole, BatchAugment(7, 32, 4, True, "cifar10")(pixels, 3, index))
    for other in (augment(pixels, 4, index), BatchAugment(8, 32, 4, True, "cifar10")(pixels, 3, index)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9
    assert len({image.numpy().tobytes() for image in whole}) > 50  # of 64, of 4 pictures


@pytest.mark.parametrize("drawn", [dict(policy="cifar10"), dict(rand_augment=(2, 9, 31))], ids=str)
def test_operations_are_drawn_again_in_every_epoch(pictures, drawn):
    """Without a crop, whose draws would hide that."""
    augment, pixels = BatchAugment(7, 32, **drawn), pictures[[0] * 64]
    first, second = (augment(pixels, epoch, torch.arange(64)) for epoch in (0, 1))
    assert (first != second).flatten(1).any(1).float().mean() > 0.8


def test_crop_takes_every_offset_and_pads_with_black():
    pixels = torch.full((4000, 3, 8, 8), 9, dtype=torch.uint8)
    cropped = BatchAugment(0, 8, padding=2)(pixels, 0, torch.arange(4000))
    black = (cropped[:, 0] == 0).all(1).sum(1), (cropped[:, 0] == 0).all(2).sum(1)
    for counts in black:  # offsets -2 ... 2, equally likely
        assert torch.bincount(counts).tolist() == pytest.approx([800, 1600, 1600], rel=0.15)
    ramp = torch.arange(8, dtype=torch.uint8).expand(100, 3, 8, 8)
    flipped = BatchAugment(0, 8, flip=True)(ramp, 0, torch.arange(100))
    assert 30 < (flipped[:, 0, 0, 0] == 7).sum() < 70


def test_draws_are_uniform_and_unrelated():
    draws = counter_uniform(1, 2, torch.arange(20000), 8)
    assert 0 <= draws.min() and draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 0.01 and (draws.std(0) - 12**-0.5).abs().max() < 0.01
    assert (torch.corrcoef(draws.T) - torch.eye(8)).abs().max() < 0.03
    neighbours = torch.corrcoef(
        torch.stack([draws[:-1, 0], draws[1:, 0], counter_uniform(1, 3, torch.arange(20000), 1)[1:, 0]])
    )
    assert (neighbours - torch.eye(3)).abs().max() < 0.03
