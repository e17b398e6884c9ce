"""What the page of `afa serve` shows: labels are those of the other commands, refined masks those of `afa refine`."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.color_model import ColorModel
from support.tiny_step import small_vit
from support.voc_factory import make_voc

from afa_model.data.files import read_label
from afa_model.data.transforms import normalize
from afa_model.errors import DataError
from afa_model.evaluation.refine import RefineSettings, refine_files
from afa_model.labels.evidence import MapSettings, evidence
from afa_model.labels.label_maps import label_maps
from afa_model.labels.photograph_labels import photograph_label
from afa_model.labels.settings import LabelSettings
from afa_model.pictures.overlays import affinity_of_point
from afa_model.web.clock import in_words, timed
from afa_model.web.photographs import Photograph, photograph
from afa_model.web.pictures import enlargement, label_files, legend, marked, picture_file, shown_in
from afa_model.web.refined import METHODS, refined
from afa_model.web.refined import settings_of as refine_settings
from afa_model.web.seen import LABELS, affinity_at, heat_of, iterations_of, labels_of, look, peak, settings_of
from afa_model.web.stays_here import HEADERS, StaysHere, is_loopback, without_others

SIZES = MapSettings(long_side=0, scales=(1.0,), flips=False)
HOW = LabelSettings(radius=3, dilations=(1, 2), num_iter=3, cam_scales=(1.0,), low_score=0.3, high_score=0.6)


@pytest.fixture(scope="module")
def taken(tmp_path_factory) -> Photograph:
    """A photograph of odd size with two classes, 8 and 1."""
    root = tmp_path_factory.mktemp("voc")
    names = make_voc(root, 6, (45, 66))
    return photograph(root / "JPEGImages" / f"{names[1]}.jpg")


@pytest.fixture(scope="module")
def seen(taken):
    return look(ColorModel(), taken, SIZES, HOW)


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_a_vision_transformer_is_looked_at_as_any(taken, frozen):
    """Of a photograph whose sides are no multiple of its patches."""
    model = small_vit(classes=21, freeze_backbone=frozen).eval()
    got = look(model, taken, SIZES, HOW)
    image = normalize(torch.from_numpy(taken.pixels).permute(2, 0, 1))
    want = label_maps(model, image, SIZES, HOW)
    assert got.found == want.present and np.array_equal(got.prediction, want.labels["segmentation"].numpy())
    assert got.prediction.shape == taken.pixels.shape[:2] and {side % 16 for side in got.prediction.shape} != {0}
    window, _ = affinity_at(got, (44, 66))
    assert window.shape == (3, 5) and window.isnan()[:, :1].all(), "4 cells away, of a window of 3"
    assert ((window[:, 1:] > 0) & (window[:, 1:] < 1)).all()
    labels = labels_of(got, got.found, replace(HOW, bkg_score=0.5))
    assert set(labels.maps) == set(LABELS)


def test_a_model_says_what_it_says_to_predict(taken, seen):
    image = normalize(torch.from_numpy(taken.pixels).permute(2, 0, 1))
    want = label_maps(ColorModel(), image, SIZES, HOW)
    assert torch.equal(seen.probabilities, want.probabilities) and seen.found == want.present == [8, 15]
    assert np.array_equal(seen.prediction, want.labels["segmentation"].numpy())
    assert set(seen.seconds) == {"classifier", "CAM", "prediction"} and min(seen.seconds.values()) > 0


@pytest.mark.parametrize("classes", [[8], [1, 8, 15], [15]])
def test_labels_are_those_that_training_makes_for_the_ticked_classes(taken, seen, classes):
    image = normalize(torch.from_numpy(taken.pixels).permute(2, 0, 1))[None]
    given = torch.zeros(20)
    given[[index - 1 for index in classes]] = 1
    known = evidence(ColorModel(), image, SIZES, HOW, given)
    made = labels_of(seen, classes, HOW)
    assert list(made.maps) == list(LABELS) == list(made.seconds)
    for kind, label in made.maps.items():
        assert np.array_equal(label, photograph_label(kind, image, known, HOW).label.numpy()), kind
    assert torch.allclose(heat_of(seen, classes), known.cam[0, : len(classes)].amax(0))


def test_refinement_and_scores_change_the_labels(seen):
    before = labels_of(seen, [8, 15], HOW).maps
    none = labels_of(seen, [8, 15], settings_of(HOW, "none", (1,), 3, 0.3, 0.6)).maps
    assert not np.array_equal(before["refined_cam"], none["refined_cam"])
    assert np.array_equal(before["random_walk"], none["random_walk"])
    lower = labels_of(seen, [8, 15], settings_of(HOW, "par", (1, 2), 3, 0.1, 0.1)).maps
    assert 255 in before["cam"] and 255 not in lower["cam"]  # one score leaves nothing open


def test_sliders_make_settings():
    made = settings_of(HOW, "crf", [1, 4], 7, 0.8, 0.2)
    want = replace(HOW, refinement="crf", dilations=(1, 4), num_iter=7, low_score=0.2, high_score=0.8)
    assert made == replace(want, dense_crf=replace(HOW.dense_crf, num_iter=7))
    with pytest.raises(ValueError, match="refinement"):
        settings_of(HOW, "magic", [1], 7, 0.2, 0.8)


@pytest.mark.parametrize("refinement", ["crf", "par", "pamr", "none"])
def test_the_sliders_start_where_the_run_s_own_labels_are(seen, refinement):
    how = replace(HOW, refinement=refinement, num_iter=3, dense_crf=replace(HOW.dense_crf, num_iter=1))
    by = settings_of(how, how.refinement, how.dilations, iterations_of(how), how.low_score, how.high_score)
    own, shown = labels_of(seen, [8, 15], how).maps, labels_of(seen, [8, 15], by).maps
    assert all(np.array_equal(own[kind], shown[kind]) for kind in LABELS)
    assert iterations_of(how) == (1 if refinement == "crf" else 3)


def test_without_classes_all_is_background(seen):
    made = labels_of(seen, [], HOW)
    assert all(label.shape == seen.photograph.size and not label.any() for label in made.maps.values())
    assert not heat_of(seen, []).any()


def test_the_affinity_is_that_of_the_cell_that_was_clicked(seen):
    grid = tuple(seen.affinity.shape[2:])
    height, width = seen.photograph.size
    assert grid == (-(-height // 4), -(-width // 4))
    for point, cell in (((21, 33), (21 * grid[0] // height, 33 * grid[1] // width)), ((999, -4), (grid[0] - 1, 0))):
        made, seconds = affinity_at(seen, point)
        assert torch.equal(made.nan_to_num(-1), affinity_of_point(seen.affinity[0], cell).nan_to_num(-1))
        assert made.isnan().any() and seconds >= 0
    y, x = peak(seen, [8])
    assert heat_of(seen, [8])[y, x] == heat_of(seen, [8]).max()


def test_a_model_without_attention_gives_cam_and_its_label(taken):
    model = ColorModel()
    model.has_affinity = False
    made = look(model, taken, SIZES, HOW)
    assert made.prediction is None and made.affinity is None and affinity_at(made, (1, 1)) is None
    assert list(labels_of(made, made.found, HOW).maps) == ["cam", "refined_cam"]


# --- refinement -------------------------------------------------------------------------------------------------------


def halves(height: int = 41, width: int = 57) -> tuple[np.ndarray, torch.Tensor]:
    """A photograph of a light object on dark ground, and a mask that misses its border by a few pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(60, 4, (height, width, 3))
    pixels[:, 24:] += 120
    label = torch.zeros(height, width, dtype=torch.int64)
    label[:, 28:] = 7
    return pixels.clip(0, 255).astype(np.uint8), label


def test_every_refinement_moves_a_mask_to_the_edge():
    pixels, label = halves()
    done = refined(pixels, label, refine_settings((1, 2, 4, 8), 10, 0.7))
    want = np.zeros(label.shape, np.uint8)
    want[:, 24:] = 7
    assert list(done) == list(METHODS)
    for method, each in done.items():
        assert (each.label != want).mean() < 0.02, method
        assert each.changed == pytest.approx((each.label != label.numpy()).mean()) and each.changed > 0.05
        assert each.seconds > 0


@pytest.mark.parametrize("method", METHODS)
def test_refined_masks_are_those_of_the_command(tmp_path, method):
    pixels, label = halves()
    for folder, array in (("images", pixels), ("masks", label.numpy().astype(np.uint8))):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    settings = RefineSettings(method, dilations=(1, 3), num_iter=2, gt_prob=0.8, progress=False)
    settings = replace(settings, dense_crf=replace(settings.dense_crf, num_iter=2))
    refine_files(tmp_path / "images", tmp_path / "masks", tmp_path / "out", settings)
    made = refined(pixels, label, refine_settings((1, 3), 2, 0.8))[method].label
    assert np.array_equal(made, read_label(tmp_path / "out" / "a.png").numpy())


def test_unknown_pixels_get_a_class_and_count_as_changed():
    pixels, label = halves()
    label[:] = 255
    label[10:30, 2:8], label[10:30, 48:54] = 0, 3
    done = refined(pixels, label, refine_settings((1, 2, 4, 8, 12, 24), 20, 0.9))
    for each in done.values():
        assert set(np.unique(each.label)) == {0, 3}
        assert each.changed > 0.5


def test_without_a_mask_there_is_nothing_to_refine():
    pixels, label = halves()
    for empty in (torch.zeros_like(label), torch.full_like(label, 255)):
        with pytest.raises(DataError, match="no mask yet"):
            refined(pixels, empty, refine_settings((1,), 1, 0.7))
    with pytest.raises(DataError, match="nothing but one class"):
        refined(pixels, torch.full_like(label, 3), refine_settings((1,), 1, 0.7))
    with pytest.raises(ValueError, match="num_iter"):
        refine_settings((1,), -1, 0.7)
    with pytest.raises(ValueError, match="gt_prob"):
        refine_settings((1,), 1, 1.0)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(90, 131), (7, 5)])
def test_a_mark_surrounds_its_point_and_leaves_the_rest(size):
    picture = np.full((*size, 3), 128, np.uint8)
    point = size[0] // 2, 1
    made = marked(picture, point)
    assert (picture == 128).all() and marked(picture, None) is picture
    changed = (made != 128).any(-1)
    assert changed.any() and not changed[point]
    far = np.hypot(*(np.mgrid[: size[0], : size[1]] - np.array(point)[:, None, None]))
    assert not changed[far > 12].any()


def test_a_legend_names_classes_as_text():
    names = ["background", "<b>cat</b> & dog", "cow"]
    made = legend([0, 1, 255], names, {1: 0.934, 2: 0.5}, ticked=[1])
    assert "<b>&lt;b&gt;cat&lt;/b&gt; &amp; dog</b> 93 %" in made and "left open" in made and "cow" not in made
    assert made.count("afa-patch") == 3 and "#800000" in made
    assert shown_in([np.array([[2, 0]]), np.array([[255]])]) == [0, 2, 255]


def test_label_files_hold_the_labels_and_have_tame_names(tmp_path):
    label = np.array([[0, 3], [255, 1]], np.uint8)
    paths = label_files({"cam": label, "prediction": label * 0}, "../my photo?.jpg", tmp_path)
    assert [path.rpartition("/")[2] for path in paths] == ["cam_my_photo_.png", "prediction_my_photo_.png"]
    assert read_label(paths[0]).tolist() == label.tolist()


def test_times_in_words():
    want = {0.00042: "0.4 ms", 0.0231: "23 ms", 1.44: "1.4 s"}
    assert [in_words(seconds) for seconds in want] == list(want.values())
    made, seconds = timed(lambda: "made")
    assert made == "made" and 0 <= seconds < 1


# --- what keeps it here -----------------------------------------------------------------------------------------------


PAGE = b"""<html><head><link rel="preconnect" href="https://fonts.example.com"><link href=//cdn.example.com/a.css>
<script src="https://cdn.example.com/a.js" async></script><script src="./own.js"></script><link href="/own.css">
<script>const a = "https://docs.example.com"</script></head></html>"""


def test_scripts_and_links_of_other_hosts_are_taken_out():
    made = without_others(PAGE)
    assert b"fonts.example" not in made and b"cdn.example" not in made
    assert b'src="./own.js"' in made and b'href="/own.css"' in made and b"docs.example" in made


@pytest.mark.parametrize("kind", [b"text/html; charset=utf-8", b"image/png"])
def test_pages_are_cleaned_on_their_way_and_all_else_passes(kind):
    async def app(scope, receive, send):
        headers = [(b"content-type", kind), (b"content-length", str(len(PAGE)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": PAGE[:40], "more_body": True})
        await send({"type": "http.response.body", "body": PAGE[40:]})

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(StaysHere(app)({"type": "http"}, None, send))
    body = b"".join(message.get("body", b"") for message in sent)
    headers = dict(sent[0]["headers"])
    assert body == (without_others(PAGE) if kind.startswith(b"text/html") else PAGE)
    assert headers[b"content-length"] == str(len(body)).encode()
    assert all(headers[name] == value for name, value in HEADERS)
    assert b"default-src 'self'" in headers[b"content-security-policy"]


def test_addresses_that_only_this_machine_reaches():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.1.4", "::", "example.com", "127.evil.com")))


def test_small_pictures_are_drawn_larger_pixel_by_pixel(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (200, 101, 3), np.uint8)
    path = picture_file(picture, "cam", "a.jpg", tmp_path)
    with Image.open(path) as image:
        made = np.asarray(image)
    assert path.endswith("shown_cam_a.png") and made.shape == (800, 404, 3)
    assert np.array_equal(made[2::4, 1::4], picture) and np.array_equal(made[::4, ::4], picture)
    assert [enlargement(size) for size in ((640, 3), (639, 700), (320, 320), (319, 200))] == [1, 1, 2, 3]
