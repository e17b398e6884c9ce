"""`afa pseudo-labels`: what is written, that it is what evaluation scores, and what goes wrong."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
import torch
from PIL import Image
from support.color_model import ColorModel
from support.pseudo_label_folders import HOW, NAMES, SHOWN, manifest, six_photographs, write
from support.tiny_run import tiny_args
from support.voc_factory import make_voc, write_xml

from afa_model import cli
from afa_model.conventions import resize
from afa_model.data.classes import VOC_CLASSES, voc_palette
from afa_model.data.datasets import DataSettings
from afa_model.data.files import read_label, read_photo
from afa_model.data.score_files import read_scores
from afa_model.data.transforms import normalize
from afa_model.errors import ConfigError, DataError
from afa_model.evaluation import pseudo_labels as module
from afa_model.evaluation.pseudo_labels import PseudoLabelSettings
from afa_model.evaluation.scores import ScoreKeeper
from afa_model.labels.evidence import MapSettings, evidence


@pytest.fixture
def root(tmp_path):
    return six_photographs(tmp_path / "voc")


# what is written


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set with a label file, and the folder of a run of two steps on it."""
    root = tmp_path_factory.mktemp("voc")
    make_voc(root, count=2)
    (root / "cls_labels.json").write_text(json.dumps(SHOWN))
    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.main(["train", *tiny_args(root, run, schedule__max_iters=2)]) == 0
    return root, run


def test_labels_score_what_evaluation_says(trained, tmp_path, capsys):
    """Evaluated and written by the command, each with the run's own settings; and by another protocol."""
    root, run = trained
    line = ["--checkpoint", str(run), "--device", "cpu"]
    for protocol, kind in ([], "refined_random_walk"), (["training"], "cam"):
        scored = [f"--eval.kinds=[{kind}]", "--json", str(tmp_path / "scores.json")]
        assert cli.main(["evaluate", *line, *scored, *(f"--eval.protocol={name}" for name in protocol)]) == 0
        want = json.loads((tmp_path / "scores.json").read_text())["scores"][kind]
        out = tmp_path / kind
        more = ["--kind", kind, "--unknown", "false", "--save", "labels", *(f"--protocol={name}" for name in protocol)]
        assert cli.main(["pseudo-labels", *line, *more, "--images", "val", "--out", str(out)]) == 0
        keeper = ScoreKeeper([kind], 21)
        for name in NAMES[:2]:
            mask = read_label(root / "SegmentationClassAug" / f"{name}.png")
            keeper.add(kind, read_label(out / "labels" / f"{name}.png"), mask)
        assert keeper.scores()[kind].miou == pytest.approx(want["miou"], abs=1e-6), kind
    told = capsys.readouterr().out
    assert "wrote labels of 2 photographs to" in told and "classes from: label file (2)" in told
    assert "milliseconds a photograph: reading " in told and "CAM passes" in told and "refinement" in told
    settings = manifest(out)["settings"]
    assert settings["long_side"] == 0 and settings["affinity_of"] == "plain" and settings["walk_score"] == 0.35
    assert manifest(tmp_path / "refined_random_walk")["settings"]["long_side"] == 64, "the run's own"


def test_every_file_of_a_photograph(root, tmp_path):
    out = tmp_path / "out"
    done = write(root, out, save=tuple(module.ENDINGS))
    assert (done.done, done.skipped, done.problems) == (6, 0, [])
    for name in NAMES:
        photo = read_photo(root / "JPEGImages" / f"{name}.jpg")
        size, numbers = photo.shape[1:], [VOC_CLASSES.index(shown) for shown in SHOWN[name]]
        cls_labels = torch.zeros(20)
        cls_labels[[number - 1 for number in numbers]] = 1
        seen = evidence(ColorModel(), normalize(photo)[None], MapSettings(0), HOW, cls_labels)
        with np.load(out / "cams" / f"{name}.npz") as cams:  # IRN's names, 0 the first class after the background
            assert cams["keys"].tolist() == [number - 1 for number in numbers]
            assert cams["high_res"].dtype == np.float16
            assert np.array_equal(cams["high_res"], resize(seen.cam, size)[0].half().numpy())
        walk = read_scores(out / "walks" / f"{name}.npz")
        assert walk.numbers == (0, *numbers) and walk.with_background
        with Image.open(out / "labels" / f"{name}.png") as label:
            assert label.mode == "P" and label.size == size[::-1]
            assert np.array_equal(np.array(label.getpalette()).reshape(-1, 3), voc_palette())
            assert set(np.unique(label)) <= {0, 255, *numbers}
            pixels = np.asarray(label)
        entry = manifest(out)["images"][name]
        assert entry["classes"] == SHOWN[name] and entry["classes_from"] == "label file"
        assert entry["size"] == list(size) and sum(entry["shares"].values()) == pytest.approx(1, abs=1e-4)
        assert entry["shares"]["unknown"] == pytest.approx((pixels == 255).mean(), abs=1e-5) and 255 in pixels
        with Image.open(out / "confidence" / f"{name}.png") as confidence:
            assert confidence.mode == "L" and confidence.size == size[::-1]
            sure = np.asarray(confidence)
        assert not sure[pixels == 255].any() and sure[pixels != 255].min() > 255 / (len(numbers) + 1) - 1
    about = manifest(out)
    assert about["checkpoint"]["sha256"] == "a" * 64 and about["class_names"] == list(VOC_CLASSES)
    assert about["settings"]["kind"] == "refined_random_walk" and about["settings"]["num_iter"] == 2
    assert (out / "train.txt").read_text() == "".join(f"{name}\n" for name in NAMES)


def test_refine_takes_cams_and_walks(root, tmp_path, capsys):
    shown = {**SHOWN, NAMES[0]: []}
    (root / "cls_labels.json").write_text(json.dumps(shown))
    write(root, tmp_path / "out")
    for what in ("cams", "walks"):
        line = ["refine", str(root / "JPEGImages"), str(tmp_path / "out" / what), "--out", str(tmp_path / what)]
        assert cli.main([*line, "--method", "par", "--device", "cpu"]) == 0, capsys.readouterr().err
        for name in NAMES:
            found = set(read_label(tmp_path / what / f"{name}.png").unique().tolist())
            assert found <= {0, *(VOC_CLASSES.index(shown_) for shown_ in shown[name])}
            assert name == NAMES[0] or len(found) > 1
    assert not read_label(tmp_path / "out" / "labels" / f"{NAMES[0]}.png").any()


def test_a_model_without_attention_gives_cams_and_their_labels(root, tmp_path):
    class Cnn(ColorModel):
        has_affinity = False

    done = write(root, tmp_path / "out", model=Cnn())
    assert done.saved == ("cams", "labels") and done.done == 6
    assert manifest(tmp_path / "out")["settings"]["kind"] == "refined_cam"
    for settings, said in (({"save": ("walks",)}, "save: walks"), ({"kind": "random_walk"}, "kind: random_walk")):
        with pytest.raises(ConfigError, match=f"{said} needs attention"):
            write(root, tmp_path / "out", model=Cnn(), **settings)


# which photographs, and which classes they show


def test_photographs_by_list_split_folder_pattern_and_path(root, tmp_path):
    photos = root / "JPEGImages"
    (tmp_path / "some.txt").write_text(f"{NAMES[1]}\n{photos / NAMES[2]}.jpg\n")
    cases = {
        (str(tmp_path / "some.txt"),): NAMES[1:3],
        ("val",): NAMES,
        (str(photos),): NAMES,
        (str(photos / "*3.jpg"), *(str(photos / f"{NAMES[i]}.jpg") for i in (3, 0))): [NAMES[0], NAMES[3]],
    }
    for number, (images, names) in enumerate(cases.items()):
        out = photos / f"out{number}"  # below the photographs: what is in it are none
        for _ in range(2):
            done = write(root, out, images, save=("labels", "confidence"))
        assert done.skipped == len(names) and list(manifest(out)["images"]) == names, images
    for number in range(4):
        (photos / f"out{number}").rename(tmp_path / f"out{number}")
    # a list beside no data set names files in its own folder; sub-folders are part of a name
    (photos / "sub").mkdir()
    (photos / f"{NAMES[5]}.jpg").rename(photos / "sub" / f"{NAMES[5]}.jpg")
    (tmp_path / "voc" / "own.txt").write_text(f"JPEGImages/sub/{NAMES[5]}.jpg\n")
    out = tmp_path / "by_path"
    write(root, out, [str(root / "own.txt")], data=DataSettings(root="nowhere"))
    assert (out / "labels" / "sub" / f"{NAMES[5]}.png").is_file()
    assert manifest(out)["images"][f"sub/{NAMES[5]}"]["classes_from"] == "label file"


def test_photographs_of_one_name(root, tmp_path):
    photos = root / "JPEGImages"
    (tmp_path / "other").mkdir()
    Image.open(photos / f"{NAMES[0]}.jpg").save(tmp_path / "other" / f"{NAMES[0]}.jpg")
    with pytest.raises(DataError, match=f"of one name.*\n.*other/{NAMES[0]}.jpg: has the name {NAMES[0]}, as"):
        write(root, tmp_path / "out", [str(photos), str(tmp_path / "other")])
    assert not (tmp_path / "out").exists()
    Image.open(photos / f"{NAMES[0]}.jpg").save(photos / f"{NAMES[0]}.bmp")
    write(root, tmp_path / "out", [str(photos)], save=("labels",))
    assert {f"{NAMES[0]}.bmp.png", f"{NAMES[0]}.jpg.png"} < {path.name for path in (tmp_path / "out/labels").iterdir()}


def test_where_classes_are_from(root, tmp_path):
    def sources(**settings):
        done = write(root, tmp_path / str(len(list(tmp_path.iterdir()))), save=("labels",), **settings)
        return dict(done.sources)

    del (shown := dict(SHOWN))[NAMES[4]]
    (root / "cls_labels.json").write_text(json.dumps(shown))
    assert sources() == {"label file": 5, "classifier": 1}, "no entry in the data set's own file"
    write_xml(root, NAMES[4], ["cat"])
    assert sources() == {"label file": 5, "annotation": 1}
    assert sources(labels="classifier") == {"classifier": 6}
    assert sources(data=DataSettings(root=str(root), label_source="masks")) == {"mask": 6}
    (root / "cls_labels.json").rename(tmp_path / "mine.json")
    assert sources() == {"annotation": 1, "classifier": 5}, "masks are not looked into unless asked"
    out = tmp_path / "given"
    done = write(root, out, labels=str(tmp_path / "mine.json"))
    assert dict(done.sources) == {"label file": 5} and "no entry in mine.json" in done.problems[0]
    assert NAMES[4] in done.problems[0] and len(done.problems) == 1
    # of the classifier: those above the threshold, or the likeliest
    found = {}
    for threshold in (0.5, 1.0):
        write(root, tmp_path / f"at{threshold}", save=("cams",), labels="classifier", threshold=threshold)
        found[threshold] = [entry["classes"] for entry in manifest(tmp_path / f"at{threshold}")["images"].values()]
    assert found[0.5] == list(SHOWN.values()) and {len(classes) for classes in found[1.0]} == {1}


# what goes wrong


def test_what_cannot_be_labelled_is_listed_and_the_rest_is_done(root, tmp_path, monkeypatch):
    (root / "JPEGImages" / f"{NAMES[1]}.jpg").write_bytes(b"")
    (root / "JPEGImages" / f"{NAMES[2]}.jpg").unlink()
    (root / "cls_labels.json").write_text(json.dumps({**SHOWN, NAMES[3]: ["kat"]}))
    real = module.evidence

    def scarce(model, image, *more):
        if image.shape[3] == 68:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, image, *more)

    monkeypatch.setattr(module, "evidence", scarce)
    done = write(root, tmp_path / "out")
    assert done.done == 2 and (tmp_path / "out" / "train.txt").read_text().split() == [NAMES[0], NAMES[5]]
    for problem, said in zip(
        done.problems,
        (
            f"{NAMES[1]}.jpg: cannot be decoded (the file is empty)",
            f"{NAMES[2]}.jpg: not found (line 3 of train_aug.txt)",
            f"{NAMES[3]}.jpg: unknown class 'kat' in cls_labels.json",
            f"{NAMES[4]}.jpg: too large for the memory of cpu (--long_side makes it smaller)",
        ),
        strict=True,
    ):
        assert said in problem


def test_the_command_lists_failures_and_ends_with_1(trained, tmp_path, capsys):
    root, run = trained
    line = ["pseudo-labels", "--checkpoint", str(run), "--device", "cpu", "--out", str(tmp_path / "out")]
    (tmp_path / "list.txt").write_text(f"{NAMES[0]}\nlost\n{NAMES[1]}\n")
    assert cli.main([*line, "--images", str(tmp_path / "list.txt"), "--save=cams,labels"]) == 1
    out, error = capsys.readouterr()
    assert "wrote cams and labels of 2 photographs to" in out and "images a second" in out
    assert "1 could not be labelled:\n  " in error and "lost.jpg: not found (line 2 of list.txt)" in error
    assert cli.main([*line, "--images", *map(str, sorted((root / "JPEGImages").iterdir())), "--shard", "2/2"]) == 0
    assert "share 2 of 2: wrote cams, walks and labels of 1 photograph to" in capsys.readouterr().out


def test_a_full_disk_ends_it(trained, tmp_path, capsys, monkeypatch):
    def full(path, label):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_label", full)
    line = ["pseudo-labels", "--checkpoint", str(trained[1]), "--images", "val", "--out", str(tmp_path / "out")]
    assert cli.main([*line, "--device", "cpu"]) == 1
    assert "cannot be written (No space left on device); 0 photographs are finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--save", "cams", "masks"], "save: expected some of cams, walks, labels, confidence, got 'cams masks'"),
        (["--labels", "/nowhere.json"], "label_file /nowhere.json not found"),
        (["--images", "trian"], "images: some cannot be read\n  trian: not found"),
        (["--unknwon", "false"], "unknwon: unknown setting (did you mean unknown?)"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(trained, tmp_path, capsys, line, said):
    usual = ["--checkpoint", str(trained[1]), "--device", "cpu", "--out", str(tmp_path / "out"), "--images", "val"]
    assert cli.main(["pseudo-labels", *usual, *line]) == 2
    error = capsys.readouterr().err
    assert error.startswith("afa pseudo-labels: error: ") and said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "segmentation"}, "kind: expected a kind of label map"),
        ({"threshold": 2.0}, "threshold: expected a probability in 0..1, got 2.0"),
        ({"save": ()}, "save: expected some of cams"),
        ({"shard": "3/2"}, "shard: expected I/N"),
        ({"long_side": 9}, "long_side: expected at least 32 pixels"),
        ({"protocol": "own"}, "protocol: expected training or test"),
    ],
)
def test_settings_check_themselves(settings, said):
    with pytest.raises(ValueError, match=said):
        PseudoLabelSettings(**settings)
