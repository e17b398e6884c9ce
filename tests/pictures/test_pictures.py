"""Pictures: overlays show what they say, a point's affinity is the right window, panels hold every part."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from afa_kernels import window_to_dense
from afa_model.data.classes import VOC_CLASSES, voc_palette
from afa_model.pictures.overlays import affinity_of_point, cell_of, heat_overlay, label_overlay, photo_of
from afa_model.pictures.panels import (
    cam_tile,
    head_weights_figure,
    peak_of,
    prediction_panel,
    save,
    to_array,
    training_panel,
)

HEIGHT, WIDTH, RADIUS = 48, 64, 2


@pytest.fixture
def photo(rng) -> np.ndarray:
    return photo_of(torch.rand(3, HEIGHT, WIDTH, generator=rng))


def test_photo_of_floats_and_bytes():
    bytes_ = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    assert np.array_equal(photo_of(bytes_), bytes_.permute(1, 2, 0).numpy())
    assert np.array_equal(photo_of(bytes_.float() / 255), photo_of(bytes_))
    assert photo_of(torch.tensor([[[2.0]], [[-1.0]], [[0.5]]])).tolist() == [[[255, 0, 128]]]


@pytest.mark.parametrize("point", [(0, 0), (3, 5), (5, 7), (0, 7)])
def test_affinity_of_a_point_is_its_row_of_the_dense_matrix(rng, point):
    height, width = 6, 8
    affinity = torch.rand(1, (2 * RADIUS + 1) ** 2, height, width, generator=rng)
    got = affinity_of_point(affinity[0], point)
    row = window_to_dense(affinity, RADIUS)[0, point[0] * width + point[1]].view(height, width)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = ((rows - point[0]).abs() <= RADIUS) & ((columns - point[1]).abs() <= RADIUS)
    assert torch.equal(~got.isnan(), inside)
    assert torch.equal(got[inside], row[inside])
    with pytest.raises(ValueError, match="point"):
        affinity_of_point(affinity[0], (6, 0))


def test_pixels_belong_to_cells():
    assert cell_of((0, 0), (100, 60), (10, 6)) == (0, 0)
    assert cell_of((99, 59), (100, 60), (10, 6)) == (9, 5)
    assert cell_of((10, 9), (100, 60), (10, 6)) == (1, 0)


def test_heat_is_coloured_where_hot_and_dim_where_unknown(photo):
    heat = torch.zeros(HEIGHT, WIDTH)
    heat[:, WIDTH // 2 :] = 1
    heat[:8] = torch.nan
    picture = heat_overlay(photo, heat).astype(float)
    spread = picture.max(-1) - picture.min(-1)
    assert spread[8:, WIDTH // 2 :].mean() > spread[8:, : WIDTH // 2].mean() + 20
    assert np.ptp(picture[:8], axis=-1).max() <= 1 + np.ptp(photo[:8].astype(int), axis=-1).max() * 0.25
    assert heat_overlay(photo, heat[::4, ::4]).shape == photo.shape and photo.dtype == np.uint8


def test_labels_show_their_colours_with_a_line_around(photo):
    label = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
    label[10:20, 10:20] = 15
    label[30:40, 30:40] = 255
    picture = label_overlay(photo, label, share=1.0)
    assert (picture[12:18, 12:18] == voc_palette()[15]).all()
    assert (picture[32:38, 32:38] == voc_palette()[255]).all()
    assert (picture[10, 10:20] == 255).all()
    with pytest.raises(ValueError, match="label"):
        label_overlay(photo, label[1:])


def test_peak_is_that_of_the_present_classes():
    cam = torch.zeros(3, 5, 6)
    cam[0, 4, 5], cam[1, 2, 3], cam[2, 1, 1] = 1.0, 0.8, 0.9
    assert peak_of(cam, [2]) == (2, 3) and peak_of(cam, [2, 3]) == (1, 1) and peak_of(cam, []) == (4, 5)


def test_cam_tile_names_its_classes(photo):
    cam = torch.rand(20, HEIGHT, WIDTH)
    assert cam_tile(photo, cam, [8, 15], VOC_CLASSES).title == "CAM: cat, person"
    assert cam_tile(photo, cam, [1, 2, 3, 4], VOC_CLASSES).title.endswith(", ...")
    assert cam_tile(photo, cam, [], VOC_CLASSES).title == "CAM"


def texts(figure) -> list[str]:
    found = [text.get_text() for text in figure.texts]
    for axis in figure.axes:
        found.append(axis.get_title(loc="left"))
        if axis.get_legend():
            found += [text.get_text() for text in axis.get_legend().get_texts()]
    return [text for text in found if text]


def test_prediction_panel_holds_every_part(photo, rng, tmp_path):
    label = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
    label[10:20, 10:20] = 8
    label[0] = 255
    arguments = {
        "title": "a cat",
        "cam": torch.rand(20, HEIGHT, WIDTH, generator=rng),
        "affinity": torch.rand(25, 6, 8, generator=rng),
        "point": (20, 30),
        "pseudo_label": label,
        "prediction": label.clamp(max=8),
        "class_names": VOC_CLASSES,
        "probabilities": torch.full((20,), 0.25),
        "present": [8, 15],
    }
    figure = prediction_panel(photo, **arguments)
    shown = texts(figure)
    for words in (
        "a cat",
        "photograph",
        "CAM: cat, person",
        "affinity of (20, 30)",
        "pseudo-label",
        "prediction",
    ):
        assert words in shown
    assert {"background", "cat  25 %", "person  25 %", "ignored"} <= set(shown)
    with Image.open(save(figure, tmp_path / "new" / "panel.png")) as image:
        assert image.size[0] > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 1000

    with_mask = texts(prediction_panel(photo, **arguments, mask=label))
    assert "ground truth" in with_mask and "cat  25 %" in with_mask
    bare = texts(prediction_panel(photo, **{**arguments, "affinity": None, "prediction": None}))
    assert (
        "pseudo-label" in bare and "prediction" not in bare and not any("affinity" in text for text in bare)
    )


@pytest.mark.parametrize("shape", [(30, 300), (300, 30), (1, 1)])
def test_panels_of_odd_shapes(shape):
    label = torch.zeros(shape, dtype=torch.long)
    figure = prediction_panel(
        np.zeros((*shape, 3), np.uint8), title="", cam=torch.rand(20, *shape), affinity=torch.rand(9, 3, 4),
        point=(0, 0), pseudo_label=label, prediction=label, class_names=VOC_CLASSES, present=[1],
    )  # fmt: skip
    picture = to_array(figure)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and max(picture.shape) < 4000


def test_training_panel_has_a_row_per_image(rng):
    batch, size = 3, 32
    labels = torch.zeros(batch, 20)
    labels[:, 7] = labels[0, 14] = 1
    refined = torch.zeros(batch, size, size, dtype=torch.long)
    refined[:, 5:9, 5:9] = 8
    arguments = {
        "images": torch.randn(batch, 3, size, size, generator=rng),
        "names": ["a", "b", "c"],
        "cls_labels": labels,
        "class_names": VOC_CLASSES,
        "cam": torch.rand(batch, 20, size, size, generator=rng),
        "title": "step 7",
    }
    whole = training_panel(
        **arguments, affinity=torch.rand(batch, 25, 3, 3), refined_label=refined, aff_label=refined,
        seg_logits=torch.randn(batch, 21, 8, 8), max_images=2,
    )  # fmt: skip
    shown = texts(whole)
    assert "a" in shown and "b" in shown and "c" not in shown and "step 7" in shown
    assert shown.count("random-walk label") == shown.count("prediction") == 2
    assert to_array(whole).ndim == 3
    early = texts(training_panel(**arguments, refined_label=refined))
    assert early.count("CAM label, refined") == 3 and "random-walk label" not in early


def test_head_weights_are_bars_of_their_blocks(rng):
    weights = torch.randn(16, generator=rng)
    figure = head_weights_figure(weights.requires_grad_(), torch.tensor([-0.25]), 2, "a run")
    (axis,) = figure.axes
    heights = [bar.get_height() for bar in axis.patches]
    assert heights == weights.tolist()
    negative = {bar.get_facecolor() for bar in axis.patches if bar.get_height() < 0}
    positive = {bar.get_facecolor() for bar in axis.patches if bar.get_height() > 0}
    assert len(negative) == len(positive) == 1 and negative != positive
    assert [label.get_text() for label in axis.get_xticklabels()] == [str(i) for i in (*range(1, 9), *range(1, 9))]
    shown = [text.get_text() for text in axis.texts]
    assert shown.index("last block but one") + 1 == shown.index("last block")
    assert figure.get_suptitle() == "a run: affinity head, bias -0.25"
    assert to_array(head_weights_figure(weights[:3], torch.zeros(1), 1)).ndim == 3
    with pytest.raises(ValueError, match="blocks: expected a divisor of the 16 heads, got 3"):
        head_weights_figure(weights, torch.zeros(1), 3)


def test_drawing_leaves_no_figure_behind(photo):
    label = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
    prediction_panel(
        photo, title="", cam=torch.rand(20, HEIGHT, WIDTH), affinity=None, point=(0, 0), pseudo_label=label,
        prediction=None, class_names=VOC_CLASSES,
    )  # fmt: skip
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == [] and matplotlib.get_backend()
