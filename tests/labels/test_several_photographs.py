"""Several photographs through the networks at once: each has what it has alone, and no more go at once than fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.tiny_step import small_vit, tiny

from afa_model.labels.cams import multi_scale_cam
from afa_model.labels.evidence import MapSettings, evidence, evidence_of_several
from afa_model.labels.kinds import kinds_of
from afa_model.labels.label_maps import label_maps, label_maps_of_several
from afa_model.labels.settings import LabelSettings
from afa_model.labels.slots import ClassSlots
from afa_model.networks.afa import AFA
from afa_model.runtime.notices import forget_notices

HOW = LabelSettings(cam_scales=(1.0, 0.5, 1.5), radius=2, dilations=(1, 3), num_iter=2, bkg_score=0.5, walk_score=0.3)
SIZES = MapSettings(48)
# In the model's size the first, the third and the sixth are alike, and so are the second and the last.
PHOTOGRAPHS = [(50, 61), (45, 37), (50, 61), (64, 50), (33, 71), (101, 123), (90, 74)]
SHOWN = [(1,), (2, 4), (1, 2, 3, 4), (), (3,), (4,), (2,)]


@pytest.fixture(scope="module")
def photographs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    coarse = [torch.randn(1, 3, 7, 9, generator=generator) for _ in PHOTOGRAPHS]
    return [F.interpolate(one, size, mode="bilinear")[0] for one, size in zip(coarse, PHOTOGRAPHS)]


def present(*classes: int) -> torch.Tensor:
    return F.one_hot(torch.tensor(classes, dtype=torch.long) - 1, 4).sum(0).float()


PRESENT = [present(*classes) for classes in SHOWN]


def passes_of(model: AFA) -> list[tuple[int, ...]]:
    """Fills with the shape of whatever goes through the backbone."""
    shapes, real = [], model._encode
    model._encode = lambda images: shapes.append(tuple(images.shape)) or real(images)
    return shapes


def close(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def same_maps(got, want) -> None:
    close(got.probabilities, want.probabilities)
    assert torch.equal(got.cls_labels, want.cls_labels)
    for soft in ("cam", "affinity"):
        assert (getattr(got, soft) is None) == (getattr(want, soft) is None)
        if getattr(want, soft) is not None:
            close(getattr(got, soft), getattr(want, soft))
    assert list(got.labels) == list(want.labels)
    for kind, label in want.labels.items():  # but where two classes are as likely
        assert got.labels[kind].shape == label.shape and (got.labels[kind] != label).double().mean() < 2e-3, kind


MODELS = {
    "MiT": tiny,
    "Vision Transformer": small_vit,
    "CNN": lambda: AFA("resnet18", 5, stride=(4, 2, 2, 1)),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_each_has_the_label_maps_it_has_alone(photographs, name, known):
    model, given = MODELS[name]().train(), PRESENT if known else [None] * len(PRESENT)
    settings = dataclasses.replace(SIZES, affinity_of="plain" if known else "largest", scales=(1.0, 0.75))
    kinds = kinds_of(model)
    want = [label_maps(model, image, settings, HOW, labels, kinds) for image, labels in zip(photographs, given)]
    shapes = passes_of(model)
    got = list(label_maps_of_several(model, photographs, settings, HOW, given, kinds))
    assert len(got) == len(want) and model.training
    for one, alone in zip(got, want):
        same_maps(one, alone)
    assert max(shape[0] for shape in shapes) == 6, "three photographs and their mirror images"
    pair = {shape[0] for shape in shapes if shape[2:] == (48, 39)}
    assert pair == {2 if name == "CNN" else 4}, "and the two others of one size; a CNN sees them mirrored apart"
    assert (want[0].cam - want[2].cam).abs().max() > 0.2, "they could be taken for each other"


@pytest.mark.parametrize("affinity_of", ["plain", "largest"])
def test_each_has_the_evidence_it_has_alone(photographs, affinity_of):
    """Of some the classes are known, of others they are found; who knows them all is asked nothing for the others."""
    model, images = tiny(), [image[None] for image in photographs]
    settings = dataclasses.replace(SIZES, affinity_of=affinity_of)
    given = [labels if number % 2 else None for number, labels in enumerate(PRESENT)]
    want = [evidence(model, image, settings, HOW, labels, 0.4) for image, labels in zip(images, given)]
    got = evidence_of_several(model, images, settings, HOW, given, 0.4)
    for one, alone in zip(got, want, strict=True):
        assert (one.probabilities is None) == (alone.probabilities is None)
        assert torch.equal(one.cls_labels, alone.cls_labels)
        assert torch.equal(one.slots.classes, alone.slots.classes)
        assert torch.equal(one.slots.present, alone.slots.present)
        close(one.cam, alone.cam)
        close(one.affinity, alone.affinity)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("cam_scales", [HOW.cam_scales, (1.0,), (0.5, 1.5)])
@pytest.mark.parametrize("flips", [True, False])
def test_the_cam_takes_what_was_seen_before(photographs, flips, cam_scales, count):
    """Of segmentation and classifier; then no photograph and no mirror image goes through the model in a size twice."""
    model, how = tiny(), dataclasses.replace(HOW, cam_scales=cam_scales)
    images, small = [photographs[0] + shift for shift in range(count)], (39, 48)
    want = [
        multi_scale_cam(model, F.interpolate(image[None], small, mode="bilinear"), cam_scales, HOW.radius)
        for image in images
    ]
    shapes, settings = passes_of(model), dataclasses.replace(SIZES, flips=flips)
    got = list(label_maps_of_several(model, images, settings, how, [torch.ones(4)] * count))
    for maps, alone in zip(got, want, strict=True):
        close(maps.cam, alone.cam[0])
        close(maps.affinity, alone.affinity[0])
    rows = sum(shape[0] for shape in shapes if shape[2:] == small)
    assert rows == count * (2 if flips or 1 in cam_scales else 1)
    if count == 3:
        assert (got[0].cam - got[2].cam).abs().max() > 0.05, "they could be taken for each other"


def test_there_are_slots_for_the_photograph_with_most_classes(photographs, monkeypatch):
    """On a GPU it is said how many, so that nobody waits for it."""
    limits, real = [], ClassSlots.of
    monkeypatch.setattr(ClassSlots, "of", lambda labels, limit=None: limits.append(limit) or real(labels, limit))
    images = [photographs[0][None]] * 3
    evidence_of_several(tiny(), images, SIZES, HOW, [present(2), present(1, 3, 4), present()])
    assert limits == [3]


def test_slots_without_the_others():
    labels = torch.stack([present(), present(2, 4), present(1, 3, 4), present(3), present(1, 2, 3, 4)])
    for batch in (labels, labels[:4], labels[:1]):
        slots = ClassSlots.of(batch)
        maps = slots.pick(torch.arange(4.0).view(1, 4, 1, 1).expand(len(batch), 4, 2, 3))
        for number, row in enumerate(batch):
            want = ClassSlots.of(row[None])
            own, its = slots.alone(number, maps)
            assert torch.equal(own.classes, want.classes) and torch.equal(own.present, want.present)
            assert its.shape == (1, len(own.classes[0]), 2, 3) and torch.equal(its[0, :, 0, 0].long(), own.classes[0])
            assert slots.alone(number, None)[1] is None


def layouts(model: AFA) -> dict[str, tuple]:
    return {name: (value.data_ptr(), value.stride()) for name, value in model.named_parameters()}


def test_channels_last_inside_and_as_it_was_afterwards(photographs):
    """Images and weights, and the results are the same."""
    model, seen = tiny(), []
    want = [label_maps(model, image, SIZES, HOW, labels) for image, labels in zip(photographs, PRESENT)]
    before, conv = layouts(model), next(part for part in model.modules() if isinstance(part, torch.nn.Conv2d))
    assert not conv.weight.is_contiguous(memory_format=torch.channels_last)
    conv.register_forward_pre_hook(
        lambda conv, images: seen.extend(
            tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (images[0], conv.weight)
        )
    )
    last = dataclasses.replace(SIZES, channels_last=True)
    for one, alone in zip(label_maps_of_several(model, photographs, last, HOW, PRESENT), want, strict=True):
        same_maps(one, alone)
    assert seen and all(seen) and layouts(model) == before
    seen.clear()
    label_maps(model, photographs[0], SIZES, HOW)
    assert seen and not any(seen)

    def fails(*_):
        raise KeyError("of a hook")

    model.decoder.register_forward_pre_hook(fails)
    with pytest.raises(KeyError, match="of a hook"):
        label_maps(model, photographs[0], last, HOW)
    assert layouts(model) == before


def test_bfloat16_channels_last_and_several_together(photographs):
    model = tiny()
    fast = dataclasses.replace(SIZES, channels_last=True, amp="bf16")
    want = [label_maps(model, image, SIZES, HOW, labels) for image, labels in zip(photographs, PRESENT)]
    got = list(label_maps_of_several(model, photographs, fast, HOW, PRESENT))
    for one, exact in zip(got, want, strict=True):
        assert not torch.equal(one.probabilities, exact.probabilities), "it is used"
        assert torch.allclose(one.probabilities, exact.probabilities, atol=0.02)
        assert one.cam.dtype == one.affinity.dtype == one.probabilities.dtype == torch.float32
        for kind in exact.labels:
            assert (one.labels[kind] != exact.labels[kind]).double().mean() < 0.1, kind


def test_where_memory_does_not_suffice_fewer_go_at_once(photographs, capsys):
    forget_notices()
    model = tiny()
    want = [label_maps(model, image, SIZES, HOW, labels) for image, labels in zip(photographs, PRESENT)]
    most, real = 2, model._encode

    def encode(images):
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(images)

    model._encode = encode
    for one, alone in zip(label_maps_of_several(model, photographs, SIZES, HOW, PRESENT), want, strict=True):
        same_maps(one, alone)
    told = capsys.readouterr().err
    assert told.count("afa: note:") == 1 and "memory does not suffice for 3 photographs at once" in told
    most = 1
    with pytest.raises(torch.OutOfMemoryError):  # a photograph and its mirror image
        label_maps(model, photographs[0], SIZES, HOW)
