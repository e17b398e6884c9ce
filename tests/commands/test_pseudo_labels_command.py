"""`afa pseudo-labels`: what is written, that it is what evaluation scores, shares, resuming, and what goes wrong."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
import torch
from PIL import Image
from support.color_model import ColorModel
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
from afa_model.evaluation.pseudo_labels import PseudoLabelSettings, write_pseudo_labels
from afa_model.evaluation.scores import ScoreKeeper
from afa_model.labels.label_maps import MapSettings, evidence
from afa_model.labels.settings import LabelSettings

HOW = LabelSettings(cam_scales=(1.0, 0.5), radius=3, dilations=(1, 2), num_iter=2)
NAMES = [f"2007_{i:06d}" for i in range(6)]
SHOWN = {name: [("aeroplane", "cat", "person")[i % 3]] for i, name in enumerate(NAMES)}
for odd in (1, 3, 5):
    SHOWN[NAMES[odd]] = sorted({*SHOWN[NAMES[odd]], ("cat", "person", "aeroplane")[odd % 3]}, key=VOC_CLASSES.index)


@pytest.fixture
def root(tmp_path):
    """Six photographs with a label file."""
    make_voc(tmp_path / "voc", count=6)
    (tmp_path / "voc" / "cls_labels.json").write_text(json.dumps(SHOWN))
    return tmp_path / "voc"


def write(root, out, images=("train_aug",), checkpoint="a", how=HOW, model=None, data=None, **settings):
    data = data or DataSettings(root=str(root))
    about = {"file": "x.pt", "sha256": checkpoint * 64}
    settings = PseudoLabelSettings(**{"long_side": 0, "progress": False, **settings})
    return write_pseudo_labels(model or ColorModel(), list(images), out, VOC_CLASSES, about, settings, how, data)


def manifest(out) -> dict:
    return json.loads((out / "manifest.json").read_text())


def written(folder) -> dict[str, int]:
    files = [path for path in folder.rglob("*.*") if path.parent.name != "finished" and path.parent != folder]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


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


# many processes, and some that are stopped


def test_shares_make_one_folder_and_what_is_finished_stays(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    done = write(root, out, shard="2/3")
    assert done.done == 2 and list(manifest(out)["images"]) == [NAMES[1], NAMES[4]]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    write(root, out)
    monkeypatch.delenv("WORLD_SIZE")
    first = written(out)
    assert list(manifest(out)["images"]) == [NAMES[i] for i in (0, 1, 3, 4)] and len(first) == 12
    done = write(root, out)
    assert (done.done, done.skipped) == (2, 4) and first.items() <= written(out).items()
    assert list(manifest(out)["images"]) == NAMES and (out / "train.txt").read_text().split() == NAMES
    records = sorted(path.stem for path in (out / "finished").iterdir())
    assert records == ["1_of_1", "1_of_3", "2_of_3"]


def changed(out, before) -> set[str]:
    now = written(out)
    return {os.path.splitext(os.path.basename(name))[0] for name in now if now[name] != before.get(name)}


def test_only_what_is_no_longer_right_is_made_again(root, tmp_path):
    out = tmp_path / "out"
    write(root, out)
    before = written(out)
    (out / "walks" / f"{NAMES[2]}.npz").unlink()
    shown = {**SHOWN, NAMES[3]: ["dog"]}
    (root / "cls_labels.json").write_text(json.dumps(shown))
    Image.new("RGB", (50, 40)).save(root / "JPEGImages" / f"{NAMES[5]}.jpg")
    assert write(root, out).done == 3
    assert changed(out, before) == {NAMES[2], NAMES[3], NAMES[5]}
    assert manifest(out)["images"][NAMES[3]]["classes"] == ["dog"]
    # what is asked for later is added, what was there stays finished
    assert write(root, out, save=("confidence",)).done == 6
    assert manifest(out)["images"][NAMES[0]]["files"] == ["cams", "walks", "labels", "confidence"]
    assert write(root, out, save=tuple(module.ENDINGS)).skipped == 6


def test_a_photograph_is_known_by_what_is_in_it(tmp_path):
    """A bitmap that was edited has the size that it had; a copy has another time."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{name}.bmp")
    assert write(tmp_path, out, images=[str(folder)], save=("labels",)).done == 2
    before, size = written(out), (folder / "a.bmp").stat().st_size
    Image.new("RGB", (50, 40), (220, 30, 30)).save(folder / "a.bmp")
    (folder / "b.bmp").touch()
    assert (folder / "a.bmp").stat().st_size == size
    result = write(tmp_path, out, images=[str(folder)], save=("labels",))
    assert (result.done, result.skipped) == (1, 1) and changed(out, before) == {"a"}
    folder.rename(tmp_path / "moved")
    assert write(tmp_path, out, images=[str(tmp_path / "moved")], save=("labels",)).skipped == 2


def test_another_photograph_of_a_finished_name_is_refused(tmp_path):
    out = tmp_path / "out"
    for folder, color in (("one", (220, 30, 30)), ("two", (30, 200, 40))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (50, 40), color).save(tmp_path / folder / "a.bmp")
    assert write(tmp_path, out, images=[str(tmp_path / "one")]).done == 1
    before = written(out)
    result = write(tmp_path, out, images=[str(tmp_path / "two")])
    assert (result.done, result.skipped, len(result.problems)) == (0, 0, 1) and not changed(out, before)
    assert f"the name a is that of {tmp_path / 'one' / 'a.bmp'}" in result.problems[0]
    (tmp_path / "three").mkdir()
    (tmp_path / "one" / "a.bmp").rename(tmp_path / "three" / "a.bmp")
    assert write(tmp_path, out, images=[str(tmp_path / "three")]).skipped == 1


def test_folders_behind_links_are_labelled_and_dead_links_are_told(root, tmp_path):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "photos" / "linked").symlink_to(root / "JPEGImages")
    (tmp_path / "photos" / "sub" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "dead.jpg").symlink_to(tmp_path / "nothing.jpg")
    result = write(root, tmp_path / "out", images=[str(tmp_path / "photos")], save=("labels",))
    assert result.done == 6 and list(manifest(tmp_path / "out")["images"]) == [f"linked/{name}" for name in NAMES]
    assert len(result.problems) == 1 and "dead.jpg" in result.problems[0]


def test_a_process_that_is_stopped_leaves_whole_files_and_a_record(root, tmp_path, monkeypatch):
    out, real, seen = tmp_path / "out", module.write_label, []

    def stopped(path, label):
        real(path, label)
        seen.append(path)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_label", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(root, out)
    assert sorted(path.name for path in (out / "labels").iterdir()) == [f"{name}.png" for name in NAMES[:2]]
    assert list(manifest(out)["images"]) == NAMES[:2] and (out / "train.txt").read_text().split() == NAMES[:2]
    # killed while it wrote its record: the torn line is none, and the next one begins anew
    record = out / "finished" / "1_of_1.jsonl"
    record.write_bytes(record.read_bytes()[:-20])
    assert write(root, out).done == 5 and list(manifest(out)["images"]) == NAMES
    assert write(root, out).skipped == 6


def test_the_last_to_write_the_manifest_writes_all(root, tmp_path):
    """Another process finishes an image between this one's look at the records and its writing."""
    out = tmp_path / "out"
    write(root, out, images=["val"], shard="1/6", save=("labels",))
    about = {key: manifest(out)[key] for key in ("checkpoint", "class_names", "settings")}
    one, other = module.Manifest(out, about, (1, 6)), module.Manifest(out, about, (2, 6))
    real, looks = one._write, []

    def late(images):
        looks.append(len(images))
        if len(looks) == 1:
            other.add(NAMES[2], {"files": ["labels"]})
            other.write()
        real(images)

    one._write = late
    one.add(NAMES[1], {"files": ["labels"]})
    one.write()
    assert looks == [2, 3] and list(manifest(out)["images"]) == NAMES[:3]


def test_other_settings_and_checkpoints_are_refused(root, tmp_path):
    out = tmp_path / "out"
    write(root, out, shard="1/6")
    for other, said in (
        ({"checkpoint": "b"}, "checkpoint of sha256 aaaaaaaaaaaa, now of sha256 bbbbbbbbbbbb"),
        ({"kind": "cam"}, "kind refined_random_walk, now cam"),
        ({"how": LabelSettings(radius=3)}, r"cam_scales \[1.0, 0.5\], now \[1.0, 0.5, 1.5\]"),
        ({"unknown": False}, "unknown True, now False"),
    ):
        with pytest.raises(ConfigError, match=f"made otherwise .*{said}.*choose another folder"):
            write(root, out, **other)
    write(root, out, shard="2/6", save=("labels",))
    (out / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json cannot be read"):
        write(root, out)


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
