"""The paper's figures: what each shows is what the models say, and what is left out is said."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from support.tiny_step import ALL, tiny
from support.tiny_step import batch as batch_of

from afa_model.data.classes import VOC_CLASSES
from afa_model.data.transforms import normalize
from afa_model.labels.evidence import MapSettings, affinity_image
from afa_model.labels.label_maps import label_maps
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA
from afa_model.networks.decoder import SegFormerHead
from afa_model.pictures import attention, figures
from afa_model.pictures.attention import attention_of, attention_window, raw_attention, walked_cam
from afa_model.pictures.figures import FIGURES, Style, draw, wanted
from afa_model.pictures.overlays import AFFINITY_COLORS, heat_overlay, label_overlay
from afa_model.pictures.panels import Tile, affinity_tile, training_panel
from afa_model.pictures.seen import SIDE, Models, Photograph, look
from afa_model.pictures.sheets import PAGE_WIDTH, Key, Row, caption_of, sheet
from afa_model.pictures.words import fitted, width_of, wrapped
from afa_model.training.step import TrainingStep

NAMES = ("background", "turtle", "a fish of the deepest sea", "mouse")
SETTINGS = MapSettings(long_side=64, scales=(1.0,), flips=False)
HOW = LabelSettings(cam_scales=(1.0,), radius=2, dilations=(1, 2), num_iter=2)
PRESENT = torch.tensor([1.0, 0.0, 1.0])


def model(seed: int, backbone: str = "mit_b0", classes: int = 4) -> AFA:
    torch.manual_seed(seed)
    made = AFA(backbone, classes, (4, 2, 2, 1) if backbone.startswith("mit") else (4, 2, 2, 2))
    for block in made.encoder.block4 if made.has_affinity else ():
        for linear in (block.attn.q, block.attn.kv):
            linear.weight.data.mul_(20)  # attention that is not the same everywhere
    return made


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(model(0), model(1), model(2, "resnet18"))


def photograph(name: str = "a.jpg", size: tuple[int, int] = (48, 64), seed: int = 3, **known: object) -> Photograph:
    pixels = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Photograph(name, pixels, **known)


def known(name: str = "a.jpg", **changes: object) -> Photograph:
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 10:30], mask[30:32] = 1, 255
    return photograph(name, **{"cls_labels": PRESENT, "source": "mask", "mask": mask, **changes})


def pictures(figure: Figure) -> list[np.ndarray]:
    """What the tiles of a sheet show, row by row; the bar of a key is no picture."""
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]
    return [picture for picture in shown if picture.ndim == 3]


def titles(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts if text.get_ha() == "center"]


def stars(figure: Figure) -> list[tuple[float, float]]:
    return [(line.get_xdata()[0], line.get_ydata()[0]) for axis in figure.axes for line in axis.lines]


# --- raw attention ----------------------------------------------------------------------------------------------------


def plain_attention(full: AFA, image: torch.Tensor) -> torch.Tensor:
    """From queries and keys that hooks catch, by the formula."""
    caught = []
    blocks = full.encoder.block4
    hooks = [block.attn.register_forward_hook(lambda _, __, out: caught.append(out[1:])) for block in blocks]
    with torch.no_grad():
        full.eval()(image, decode=False)
    for hook in hooks:
        hook.remove()
    maps = []
    for query, key in caught:  # [1, heads, N, d]
        scores = torch.einsum("hnd,hmd->hnm", query[0].double(), key[0].double()) / math.sqrt(query.shape[-1])
        exponentials = scores.exp()
        maps.append(exponentials / exponentials.sum(2, keepdim=True))
    return torch.cat(maps).mean(0)


def test_raw_attention_is_the_mean_softmax_of_all_heads(models):
    image = normalize(photograph().pixels)[None]
    got, grid = attention_of(models.full, image)
    assert grid == (3, 4) and got.shape == (12, 12)
    assert torch.allclose(got.sum(1), torch.ones(12), atol=1e-5)
    expected = plain_attention(models.full, image)
    assert (got.double() - expected).abs().max() < 1e-5
    assert (got - got.T).abs().max() > 1e-3 and got.std() > 1e-3  # not a case in which all would be alike


def test_raw_attention_is_refused_where_its_map_were_too_large(monkeypatch):
    monkeypatch.setattr(attention, "MOST_CELLS", 8)
    assert raw_attention(torch.zeros(2, 8, 3), torch.zeros(2, 8, 3)).shape == (8, 8)
    with pytest.raises(ValueError, match="long_side: an attention map of 9 x 9 cells"):
        raw_attention(torch.zeros(2, 9, 3), torch.zeros(2, 9, 3))


def test_a_photograph_whose_attention_were_too_large_is_refused_by_name_before_any_work(models, monkeypatch):
    large = photograph("a.jpg", (96, 128))
    monkeypatch.setattr(attention, "MOST_CELLS", 12)  # 3 x 4 of 64 pixels
    draw(7, models, [large], NAMES, SETTINGS, HOW)
    monkeypatch.setattr("afa_model.pictures.seen.label_maps", None)
    with pytest.raises(attention.TooManyCells, match=r"map of a\.jpg of 20 x 20 cells is too large"):
        draw(7, models, [large], NAMES, replace(SETTINGS, long_side=80), HOW)


def test_a_window_of_attention_is_symmetric_and_one_where_it_is_even(rng):
    assert torch.equal(attention_window(torch.full((12, 12), 1 / 12), (3, 4), 1)[4], torch.ones(3, 4))
    dense = torch.rand(12, 12, generator=rng)
    window = attention_window(dense, (3, 4), 1)
    assert window.shape == (9, 3, 4)
    # the neighbour to the right of (1, 1), cells 5 and 6
    assert window[5, 1, 1] == window[3, 1, 2] == pytest.approx(6 * float(dense[5, 6] + dense[6, 5]))


def test_a_walked_cam_is_the_mean_of_its_neighbours_by_their_affinity(rng):
    """T = D^-1 A^p with the sums over columns, then M' = T M (eq. 7 and 8), here on dense matrices."""
    how = replace(HOW, radius=9, walk_power=2.0, walk_eps=0.25)
    dense = torch.rand(12, 12, generator=rng, dtype=torch.float64)
    dense = (dense + dense.T) / 24
    cam = torch.zeros(3, 3, 4)
    cam[1] = torch.rand(3, 4, generator=rng)
    powered = (dense * 12) ** 2
    walked = (powered / (powered.sum(0)[:, None] + 0.25)) @ cam[1].flatten().double()
    expected = (walked - walked.min()) / (walked.max() - walked.min())
    got = walked_cam(attention_window(dense.float(), (3, 4), 9), cam, how)
    assert torch.allclose(got[1].flatten().double(), expected, atol=1e-3)
    assert not got[0].any() and not got[2].any()


def test_no_attention_is_formed_but_for_the_figures_that_show_it(models, monkeypatch):
    asked = []
    original = attention.raw_attention
    monkeypatch.setattr(attention, "raw_attention", lambda q, k: asked.append(q.shape) or original(q, k))
    for number, times in ((3, 1), (4, 0), (5, 2), (6, 0), (7, 2), (8, 0)):
        asked.clear()
        draw(number, models, [known()], NAMES, SETTINGS, HOW)
        assert len(asked) == times, number
        assert set(asked) <= {(16, 12, 16 * 2)}  # heads, cells and width of one image


def test_training_and_its_pictures_form_no_attention(monkeypatch):
    """Neither the step nor its panel, nor by any other name: no softmax over the cells of the grid runs."""
    monkeypatch.setattr(attention, "raw_attention", lambda *_: pytest.fail("attention in training"))
    step, batch = TrainingStep(tiny(), *ALL), batch_of(64)
    rows = []
    original = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, *how, **more: rows.append(x.shape) or original(x, *how, **more))
    result = step(batch, 2)
    result.loss.backward()
    training_panel(
        batch["image"], ["a", "b"], batch["cls_labels"], ["background", "a", "b", "c", "d"], cam=result.cam,
        affinity=result.affinity, refined_label=result.refined_label,
    )  # fmt: skip
    assert not [shape for shape in rows if shape[-1] >= 16 and shape[-1] == shape[-2]]
    assert result.aff_label is not None


# --- what the figures show --------------------------------------------------------------------------------------------


def test_figure_3_shows_the_cams_of_cnn_and_transformer_and_both_walks(models):
    view = look(models, known(), wanted([3]), SETTINGS, HOW)
    figure = draw(3, models, [known()], NAMES, SETTINGS, HOW)
    assert titles(figure)[:3] == ["photograph", "CNN CAM", "transformer CAM"]
    assert {"CAM refined with raw", "CAM refined with learned"} <= set(titles(figure))
    raw = attention_window(view.full.attention, (3, 4), 2)
    walks = [walked_cam(along, view.full.cam, HOW) for along in (raw, view.full.affinity)]
    seen = [view.cnn.cam, view.full.cam, *walks]
    expected = [view.photo, *(heat_overlay(view.photo, cam[[0, 2]].amax(0)) for cam in seen)]
    shown = pictures(figure)
    assert len(shown) == 5 and all(np.array_equal(*pair) for pair in zip(shown, expected))
    assert not any(np.array_equal(shown[i], shown[j]) for i in range(5) for j in range(i))
    assert "Classes: from the masks." in caption_of(figure) and "left out" not in caption_of(figure)
    without_cnn = draw(3, replace(models, cnn=None), [known()], NAMES, SETTINGS, HOW)
    assert len(pictures(without_cnn)) == 4 and "CNN CAM" not in titles(without_cnn)
    assert figures.CNN_IS_LEFT_OUT in caption_of(without_cnn)


def test_figure_4_shows_labels_before_and_after_the_refinement(models):
    image = normalize(known().pixels)
    labels = label_maps(models.full, image, SETTINGS, HOW, PRESENT, ("cam", "refined_cam")).labels
    figure = draw(4, models, [known()], NAMES, SETTINGS, HOW)
    photo = known().pixels.permute(1, 2, 0).numpy()
    expected = [photo, *(label_overlay(photo, label) for label in (labels["cam"], labels["refined_cam"], known().mask))]
    assert all(np.array_equal(*pair) for pair in zip(pictures(figure), expected)) and len(pictures(figure)) == 4
    assert titles(figure) == ["photograph", "pseudo-label of the CAM", "CAM + PAR", "ground truth"]
    assert "(background score 0.45) before and after PAR" in caption_of(figure)
    by_pamr = draw(4, models, [photograph(cls_labels=PRESENT)], NAMES, SETTINGS, replace(HOW, refinement="pamr"))
    assert titles(by_pamr)[-1] == "CAM + PAMR" and "Ground truth is left out" in caption_of(by_pamr)


def test_figure_5_is_of_the_starred_cell(models):
    shown = known(point=(20, 50))  # of 48 x 64 pixels, the cell (1, 3) of 3 x 4
    view = look(models, shown, wanted([5]), SETTINGS, HOW)
    figure = draw(5, models, [shown], NAMES, SETTINGS, HOW)
    seen = pictures(figure)
    assert len(seen) == 7 and stars(figure) == [(50, 20)] * 3
    row = view.full.attention[1 * 4 + 3].view(3, 4)
    assert np.array_equal(seen[1], heat_overlay(view.photo, row / row.max(), AFFINITY_COLORS))
    assert np.array_equal(seen[2], affinity_tile(view.photo, view.full.affinity, (20, 50)).picture)
    assert not np.array_equal(seen[2], affinity_tile(view.photo, view.full.affinity, (20, 30)).picture)
    full, other = view.full.labels, view.without.labels
    labels = [other["refined_cam"], full["refined_cam"], full["refined_random_walk"], view.mask]
    assert all(np.array_equal(*pair) for pair in zip(seen[3:], (label_overlay(view.photo, one) for one in labels)))
    caption = caption_of(figure)
    assert "left out" not in caption and "of the model without AFA, of the CAM with AFA but" in caption
    bare = draw(5, Models(models.full), [photograph(cls_labels=PRESENT)], NAMES, SETTINGS, HOW)
    assert len(pictures(bare)) == 5
    assert figures.WITHOUT_IS_LEFT_OUT in caption_of(bare) and "no masks" in caption_of(bare)


def test_the_raw_attention_of_a_figure_is_that_of_the_pass_that_gives_the_affinity(models):
    how = replace(HOW, cam_scales=(1.0, 2.0))
    view = look(models, known(), wanted([7]), SETTINGS, how)
    image = affinity_image(normalize(known().pixels)[None], SETTINGS, how)
    assert view.full.grid == tuple(view.full.affinity.shape[1:]) == (6, 8)
    assert torch.allclose(view.full.attention.double(), plain_attention(models.full, image), atol=1e-5)
    plain = look(models, known(), wanted([7]), replace(SETTINGS, affinity_of="plain"), how)
    assert plain.full.grid == tuple(plain.full.affinity.shape[1:]) == (3, 4)


def test_figure_6_shows_the_segmentation_beside_the_truth(models):
    figure = draw(6, models, [known(), photograph("b.jpg")], NAMES, SETTINGS, HOW)
    maps = label_maps(models.full, normalize(known().pixels), SETTINGS, HOW, None, ("segmentation",))
    photo = known().pixels.permute(1, 2, 0).numpy()
    expected = [photo, label_overlay(photo, known().mask), label_overlay(photo, maps.labels["segmentation"])]
    assert all(np.array_equal(*pair) for pair in zip(pictures(figure), expected))
    assert len(pictures(figure)) == 5 and "There is no mask of b.jpg." in caption_of(figure)
    assert titles(figure) == ["photograph", "ground truth", "segmentation"] * 2  # side by side


def test_figure_7_shows_both_models(models):
    shown = known(point=(20, 50))
    view = look(models, shown, wanted([7]), SETTINGS, HOW)
    seen = pictures(draw(7, models, [shown], NAMES, SETTINGS, HOW))
    rows = [seen_by.attention[7].view(3, 4) for seen_by in (view.without, view.full)]
    expected = [heat_overlay(view.photo, row / row.max(), AFFINITY_COLORS) for row in rows]
    assert len(seen) == 3 and all(np.array_equal(*pair) for pair in zip(seen[1:], expected))
    assert not np.array_equal(seen[1], seen[2])


def test_figure_8_shows_the_weights_of_the_model(models):
    figure = draw(8, models, [], NAMES)
    (axis,) = figure.axes
    weights = models.full.attn_proj.weight.flatten()
    assert [bar.get_height() for bar in axis.patches] == weights.tolist()
    assert f"{int((weights < 0).sum())} of 16 (red)" in caption_of(figure)
    assert figure.get_size_inches()[0] == PAGE_WIDTH
    figure.draw_without_rendering()  # lays out: the axis must not reach into the caption
    box = axis.get_tightbbox().transformed(figure.transFigure.inverted())
    top = max(text.get_position()[1] for text in figure.texts if text.get_gid() == "caption")
    assert box.y0 > top


def test_classes_are_found_where_nobody_knows_them(models):
    alone = photograph("b.jpg")
    figure = draw(4, models, [known(), alone], NAMES, SETTINGS, HOW)
    caption = caption_of(figure)
    assert "Classes: from the masks (a.jpg), found by the classifier (b.jpg)." in caption
    found = label_maps(models.full, normalize(alone.pixels), SETTINGS, HOW).present
    assert f"b.jpg: {', '.join(NAMES[i] for i in found)}" in [text.get_text() for text in figure.texts]
    assert "a.jpg: turtle, mouse" in [text.get_text() for text in figure.texts]


def test_classes_that_the_caller_gives_are_not_said_to_be_found(models):
    caller = photograph("b.jpg", cls_labels=PRESENT)
    assert "Classes: given." in caption_of(draw(4, models, [caller], NAMES, SETTINGS, HOW))


def test_the_point_is_the_cams_peak_unless_it_is_given(models):
    view = look(models, known(), wanted([7]), SETTINGS, HOW)
    heat = view.full.cam[[0, 2]].amax(0)
    y, x = view.point
    assert heat[y, x] == heat.max()
    with pytest.raises(ValueError, match=r"point: expected a pixel X,Y inside a.jpg \(0..63, 0..47\), got 64,3"):
        known(point=(3, 64))


def test_models_that_do_not_do_are_named(models):
    small = model(4, classes=3)
    for number, wrong, told in (
        (7, Models(models.full), "without: figure 7 compares with a model trained without AFA"),
        (5, replace(models, without=small), "without: a model of 3 classes, but checkpoint has 4"),
        (5, replace(models, without=models.cnn), "without: resnet18 has no attention"),
        (3, replace(models, cnn=models.without), "cnn: expected a model with a CNN such as resnet50, got one with mit"),
        (6, Models(models.cnn), "figure 6: resnet18 has no attention"),
        (9, models, "figure: expected one of 3, 4, 5, 6, 7, 8, got 9"),
    ):
        with pytest.raises(ValueError, match=told):
            draw(number, wrong, [known()], NAMES, SETTINGS, HOW)
    with pytest.raises(ValueError, match="photographs: figure 3 needs at least one"):
        draw(3, models, [], NAMES)
    assert len(pictures(draw(4, Models(models.cnn), [known()], NAMES, SETTINGS, HOW))) == 4


def test_models_are_left_as_they_were(models):
    models.full.train()
    models.full.decoder.train()
    before = {name: value.clone() for name, value in models.full.state_dict().items()}
    draw(5, models, [known()], NAMES, SETTINGS, HOW)
    assert models.full.training and isinstance(models.full.decoder, SegFormerHead) and models.full.decoder.training
    assert all(torch.equal(value, before[name]) for name, value in models.full.state_dict().items())


def test_large_photographs_are_drawn_small(models):
    large = photograph("wide.jpg", (100, 2000), cls_labels=PRESENT, point=(50, 1999))
    view = look(models, large, wanted([5]), SETTINGS, HOW)
    assert view.photo.shape == (SIDE // 20, SIDE, 3) and view.full.labels["refined_cam"].shape == (SIDE // 20, SIDE)
    figure = FIGURES[5].drawn([view], Style(NAMES, HOW))
    assert stars(figure)[0] == (SIDE - 1, 20)


# --- sheets -----------------------------------------------------------------------------------------------------------


ODD = [(300, 400), (40, 2000), (2000, 40), (400, 300), (1, 1), (500, 500)]


def blank(height: int, width: int) -> Tile:
    return Tile(np.full((height, width, 3), 128, np.uint8))


@pytest.mark.parametrize(
    ("columns", "shapes"), [(2, ODD[:1]), (2, ODD[:2]), (3, ODD), (4, [(500, 375)] * 6), (7, ODD)]
)
def test_nothing_on_a_sheet_overlaps_or_leaves_it(columns, shapes):
    rows = [Row(f"a very long name of a photograph {'x' * 90}", [blank(*shape)] * columns) for shape in shapes]
    keys = [Key("attention", bar=AFFINITY_COLORS), *(Key(name, (1, 0, 0)) for name in (*VOC_CLASSES, "w" * 200))]
    named = [f"column {i} with a long title" for i in range(columns)]
    figure = sheet(named, rows, "Figure 0. " + "A caption of some length. " * 12, keys)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    assert width == PAGE_WIDTH and height < 9.6
    page = figure.bbox
    texts = [text.get_window_extent() for text in figure.texts]
    tiles = [drawn.get_window_extent() for drawn in (*figure.axes, *figure.artists)]
    assert len(figure.artists) == len(VOC_CLASSES) + 1
    assert len(pictures(figure)) == columns * len(shapes)
    for box in (*texts, *tiles):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
    boxes = [box.padded(-1.5) for box in (*texts, *tiles)]
    for number, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:number]) == 0
    assert min(text.get_fontsize() for text in figure.texts) >= 7


def test_words_fit_their_room():
    assert fitted("cat", 7, 1.0) == "cat" and width_of("catcat", 7) == pytest.approx(2 * width_of("cat", 7), rel=0.02)
    cut = fitted("m" * 100, 7, 1.0)
    assert cut.endswith("…") and width_of(cut, 7) <= 1.0 < width_of("m" + cut, 7)
    lines = wrapped("some words that go " + "m" * 100, 7, 1.0)
    assert len(lines) > 1 and all(width_of(line, 7) <= 1.0 for line in lines)
    assert wrapped("a b", 7, 5.0) == ["a b"] and wrapped("", 7, 1.0) == [""]
