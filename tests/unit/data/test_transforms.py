"""Preprocessing as the model's image processor does it, and random crops as torchvision draws them."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from vit.data.dataset import DataError
from vit.data.pixels import open_image
from vit.data.processor import set_processor_size, transform_of_processor
from vit.data.transforms import RandomResizedCrop, Resize, ResizeCenterCrop, fork_rng_for
from vit.settings import AUTO_AUGMENT

SQUARE, CROP = ({"height": side, "width": side} for side in (20, 16))


def with_pillow(name: str):
    """A class of transformers that resizes with Pillow; since 5 it has another name."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("ViTImageProcessor", dict(size=CROP)),
        # what train.py exports for ImageNet
        ("BitImageProcessor", dict(size={"shortest_edge": 20}, crop_size=CROP)),
        ("DeiTImageProcessor", dict(size=SQUARE, crop_size=CROP)),
    ],
)
def test_preprocessing_equals_the_image_processor(image_folder, kind, settings, size):
    for resample in (2, 3):
        processor = with_pillow(kind)(**settings, resample=resample)
        if size:
            set_processor_size(processor, size)
        resize = transform_of_processor(processor)
        assert resize.size == (size or 16)
        for path in sorted((image_folder / "train").rglob("*.png"))[:8]:
            image = open_image(path)
            expected = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)
            assert (resize(image) == expected["pixel_values"][0]).all(), (path, image.size)


def test_own_processors_do_what_they_say():
    for resize in (Resize(16, 3), ResizeCenterCrop(16, 20, 3)):
        assert transform_of_processor(resize.processor([0.5] * 3, [0.5] * 3)) == resize


@pytest.mark.parametrize(
    "size, crop",
    [({"height": 20, "width": 16}, None), ({"shortest_edge": 20}, None), ({"shortest_edge": 12}, CROP)],
)
def test_preprocessing_that_is_not_known_is_refused(size, crop):
    processor = Namespace(size=size, crop_size=crop, do_center_crop=bool(crop), resample=2)
    with pytest.raises(DataError, match="its preprocessing, size"):
        transform_of_processor(processor)


def test_resize_equals_the_image_processor(image_folder):
    path = next((image_folder / "train" / "red").iterdir())
    for resample in (0, 2, 3):
        processor = with_pillow("ViTImageProcessor")(
            size={"height": 16, "width": 16}, resample=resample, do_rescale=False, do_normalize=False
        )
        expected = processor(Image.open(path), return_tensors="np")["pixel_values"][0]
        assert (Resize(16, resample)(open_image(path)) == expected).all()


@pytest.mark.parametrize("policy", AUTO_AUGMENT)
def test_policies_change_crops_by_seed_epoch_and_image_alone(policy):
    rng = np.random.default_rng(0)
    sources = rng.integers(0, 256, (30, 20, 20, 3), dtype=np.uint8)
    plain, changing = RandomResizedCrop(16, 42), RandomResizedCrop(16, 42, policy=policy)

    def all_of(augment, epoch):
        return torch.stack([augment(source, epoch, i) for i, source in enumerate(sources)])

    first = all_of(changing, 0)
    assert first.dtype == torch.uint8 and first.shape == (30, 3, 16, 16)
    torch.manual_seed(3)
    assert torch.equal(all_of(changing, 0), first)
    assert not torch.equal(all_of(changing, 1), first)
    changed = (first != all_of(plain, 0)).flatten(1).any(1)
    assert 0.5 < changed.float().mean() <= 1


@pytest.mark.parametrize("policy", AUTO_AUGMENT)
def test_policies_are_drawn_again_in_every_epoch_for_every_image_and_seed(policy):
    """Of crops that are always the whole image, so that nothing else differs."""
    source = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def draws(seeds, epochs, images) -> int:
        crops = [
            RandomResizedCrop(16, seed, smallest_crop=1.0, flip=False, policy=policy)(source, epoch, image)
            for seed in seeds
            for epoch in epochs
            for image in images
        ]
        return len({crop.numpy().tobytes() for crop in crops})

    assert draws([42], range(30), [0]) > 10 and draws([42], [0], range(30)) > 10
    assert draws(range(30), [0], [0]) > 10 and draws([42], [0], [0] * 30) == 1


@pytest.mark.parametrize("resample", [2, 3])
def test_augmentation_equals_torchvisions(image_folder, resample):
    from torchvision.transforms import InterpolationMode, v2

    modes = {2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}
    theirs = v2.Compose(
        [v2.RandomResizedCrop(16, (0.2, 1.0), interpolation=modes[resample]), v2.RandomHorizontalFlip()]
    )
    for i, path in enumerate(sorted((image_folder / "train").rglob("*.png"))):
        image = open_image(path)
        pixels = np.array(image)
        with fork_rng_for(42, 1, i):
            expected = theirs(torch.from_numpy(pixels).permute(2, 0, 1))
        augment = RandomResizedCrop(16, 42, resample, 0.2)
        assert torch.equal(augment(image, 1, i), augment(pixels, 1, i))
        # without AVX2 torchvision resizes in floats
        assert (augment(pixels, 1, i).int() - expected.int()).abs().max() <= 1


def test_augmentation_without_flip():
    ramp = np.arange(40, dtype=np.uint8)[None, :, None].repeat(30, 0).repeat(3, 2)

    def rising(crop):
        return [bool(pixels[0, 0, 0] < pixels[0, 0, -1]) for pixels in (crop(ramp, 0, i) for i in range(20))]

    assert all(rising(RandomResizedCrop(16, 0, flip=False))) and not all(rising(RandomResizedCrop(16, 0)))


def test_augmentation_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    RandomResizedCrop(16, 42)(np.zeros((20, 20, 3), np.uint8), epoch=0, index=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_large_images_are_kept_small_for_later_crops():
    assert RandomResizedCrop(16, 0).keep(Image.new("RGB", (400, 200))).shape == (32, 64, 3)
    assert RandomResizedCrop(16, 0).keep(Image.new("RGB", (40, 20))).shape == (20, 40, 3)
