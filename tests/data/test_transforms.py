"""Training transforms: where the photograph lies, what lies around it, and that a seed decides everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from afa_model.conventions import MEAN, STD, denormalize
from afa_model.data.transforms import AugmentSettings, Choices, TrainingTransform, normalize


def coordinates(height: int, width: int) -> torch.Tensor:
    """A photograph whose pixels tell where they come from: red the row, green the column."""
    photo = torch.zeros(3, height, width, dtype=torch.uint8)
    photo[0] = torch.arange(height).view(-1, 1)
    photo[1] = torch.arange(width)
    return photo


def back_to_bytes(image: torch.Tensor) -> torch.Tensor:
    return denormalize(image).mul(255).round().long()


BLACK = normalize(torch.zeros(3, 1, 1, dtype=torch.uint8))[:, 0]
PLAIN = {"scale": (1.0, 1.0), "flip": 0.0, "distort": False}


@pytest.mark.parametrize(("height", "width"), [(20, 30), (80, 30), (20, 90), (80, 90), (64, 64), (1, 1)])
def test_the_box_is_where_the_photograph_lies(height, width):
    photo = coordinates(height, width)
    transform = TrainingTransform(AugmentSettings(crop=64, **PLAIN))
    for seed in range(8):
        image, box = transform(photo, seed)
        assert image.shape == (3, 64, 64) and box.dtype == torch.int64
        y0, y1, x0, x1 = box.tolist()
        assert (y1 - y0, x1 - x0) == (min(height, 64), min(width, 64))
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        assert torch.equal(image[:, outside], BLACK.expand(3, int(outside.sum()))), "padding is black, as published"
        inside = back_to_bytes(image)[:, y0:y1, x0:x1]
        top, left = inside[0, 0, 0], inside[1, 0, 0]
        assert torch.equal(inside, photo[:, top : top + y1 - y0, left : left + x1 - x0].long())


def test_windows_and_places_reach_every_border():
    small, large = coordinates(60, 60), coordinates(70, 70)
    transform = TrainingTransform(AugmentSettings(crop=64, **PLAIN))
    tops = {transform(small, seed)[1][0].item() for seed in range(60)}
    assert tops == set(range(5))
    rows = {back_to_bytes(transform(large, seed)[0])[0, 0, 0].item() for seed in range(80)}
    assert rows == set(range(7))


def test_rescaling_stays_in_its_range_and_flips_mirror():
    photo = coordinates(60, 100)
    sizes = []
    for seed in range(60):
        _, (y0, y1, x0, x1) = TrainingTransform(AugmentSettings(crop=256, flip=0.0, distort=False))(
            photo, seed
        )
        assert abs((x1 - x0) / (y1 - y0) - 100 / 60) < 0.06
        sizes.append((y1 - y0).item())
    assert 30 <= min(sizes) < 42 and 105 < max(sizes) <= 120
    settings = {"crop": 128, "scale": (1.0, 1.0), "distort": False}
    straight, box = TrainingTransform(AugmentSettings(**settings, flip=0.0))(photo, 3)
    flipped, same_box = TrainingTransform(AugmentSettings(**settings, flip=1.0))(photo, 3)
    assert torch.equal(box, same_box)
    y0, y1, x0, x1 = box.tolist()
    assert torch.equal(straight[:, y0:y1, x0:x1], flipped[:, y0:y1, x0:x1].flip(2))


def test_a_sample_depends_on_its_seed_alone():
    photo = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    transform = TrainingTransform(AugmentSettings(crop=48))
    first, box = transform(photo, 11)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    again, same_box = transform(photo, 11)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again) and torch.equal(box, same_box)
    assert not torch.equal(first, transform(photo, 12)[0])


def test_distortion_changes_colours_but_never_swaps_channels():
    red = torch.zeros(3, 32, 32, dtype=torch.uint8)
    red[0], red[1], red[2] = 180, 60, 60
    transform = TrainingTransform(AugmentSettings(crop=32, scale=(1.0, 1.0), flip=0.0, distort=True))
    means = torch.stack([denormalize(transform(red, seed)[0]).mean((1, 2)) for seed in range(40)])
    assert (means.argmax(1) == 0).all()
    assert means.std(0).min() > 0.01
    assert (red[0] == 180).all() and (red[1:] == 60).all()  # the input is not modified


def test_normalisation_and_its_inverse():
    photo = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    image = normalize(photo)
    by_hand = (photo.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(image, by_hand)
    torch.testing.assert_close(denormalize(image), photo.float() / 255)
    mean = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(BLACK[:, 0], -mean[0] / mean[1])


def test_published_transform(golden):
    """With the choices given: the same box, and all but one value in a thousand within one grey level."""
    recorded = golden("augment")
    crop = int(recorded["crop"])
    transform, off, values = TrainingTransform(AugmentSettings(crop=crop)), 0, 0
    photographs = sum(name.startswith("image_") for name in recorded)
    for i in range(photographs):
        ratio, flip = float(recorded[f"ratio_{i}"]), bool(recorded[f"flip_{i}"])
        pad, start = (tuple(map(int, recorded[f"{name}_{i}"])) for name in ("pad", "start"))
        photo = torch.from_numpy(recorded[f"image_{i}"]).permute(2, 0, 1)
        image, box = transform.apply(photo, Choices(ratio, flip, pad, start))
        difference = (image - torch.from_numpy(recorded[f"out_{i}"])) * torch.tensor(STD).view(3, 1, 1) * 255
        off, values = off + int((difference.abs() > 1.001).sum()), values + image.numel()
        assert (difference.abs() < 0.5).float().mean() > 0.99, i
        assert box.tolist() == np.minimum(recorded[f"img_box_{i}"], crop).tolist()
    assert photographs and off <= 1e-3 * values


def test_published_choices():
    """Sizes rounded down; the photograph anywhere in a larger crop, the crop anywhere in a larger photograph."""
    transform = TrainingTransform(AugmentSettings(crop=64))
    assert transform.settings.distort is False
    torch.manual_seed(0)
    drawn = [transform.choose(100, 30) for _ in range(400)]
    assert 0.5 <= min(c.ratio for c in drawn) < 0.52 and 1.98 < max(c.ratio for c in drawn) <= 2
    assert 0.4 < sum(c.flip for c in drawn) / len(drawn) < 0.6
    for choices in drawn:
        height, width = int(choices.ratio * 100), int(choices.ratio * 30)
        for side, pad, start in zip((height, width), choices.pad, choices.start):
            assert 0 <= pad <= max(0, 64 - side) and 0 <= start <= max(0, side - 64)
        _, box = transform.apply(coordinates(100, 30), choices)
        assert box[3] - box[2] == min(width, 64) and box[1] - box[0] == min(height, 64)


@pytest.mark.parametrize(
    ("name", "value"), [("crop", 8), ("scale", (2.0, 0.5)), ("scale", (0.0, 1.0)), ("flip", 1.5)]
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        AugmentSettings(**{name: value})
