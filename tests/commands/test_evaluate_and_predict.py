"""`afa evaluate` and `afa predict` as people type them: a checkpoint in, scores and label maps out."""

from __future__ import annotations

import csv
import errno
import json
import shutil

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.tiny_run import tiny_args
from support.voc_factory import make_voc

from afa_model import cli
from afa_model.commands import evaluate, predict
from afa_model.data.classes import VOC_CLASSES
from afa_model.errors import TrainingError
from afa_model.evaluation.scores import EvaluationResult
from afa_model.labels.evidence import MapSettings
from afa_model.labels.settings import LabelSettings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    make_voc(folder, count=6)
    return folder


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """The folder of a run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.main(["train", *tiny_args(root, out, schedule__max_iters=2)]) == 0
    return out


def test_evaluate_prints_a_table_and_writes_json_and_csv(trained, root, tmp_path, capsys):
    files = tmp_path / "scores.json", tmp_path / "scores.csv"
    line = [
        "evaluate",
        "--checkpoint",
        str(trained),
        "--device",
        "cpu",
        "--json",
        str(files[0]),
        "--csv",
        str(files[1]),
    ]
    assert cli.main(line) == 0
    printed = capsys.readouterr().out
    for text in ("iter_00000002.pt, trained for 2 steps", "2 images", "CAM", "random walk", "segmentation"):
        assert text in printed
    for text in ("person", "mIoU", "pixel accuracy"):
        assert text in printed
    scores = json.loads(files[0].read_text())
    assert scores["images"] == 2  # the run's own eval.limit
    assert scores["about"]["iteration"] == 2
    assert 0 <= scores["scores"]["segmentation"]["miou"] <= 1
    with open(files[1], newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table][:2] == ["background", "aeroplane"]


def test_evaluate_takes_other_settings(trained, root, capsys):
    line = [
        "evaluate",
        f"--checkpoint={trained}/iter_00000002.pt",
        "--device=cpu",
        "--eval.limit=1",
        "--eval.kinds=[cam]",
    ]
    assert cli.main([*line, "--data.root", str(root), "--data.val_split", "train_aug"]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # the title of a narrow table is broken into lines
    assert "1 image" in printed and "on train_aug" in printed
    assert "segmentation" not in printed
    assert cli.main([*line, "--eval.kinds=[cams]"]) == 2
    assert "unknown kind 'cams'" in capsys.readouterr().err
    assert cli.main([*line, "--eval.limt=1"]) == 2
    assert "eval.limt: unknown setting (did you mean eval.limit?)" in capsys.readouterr().err


def test_both_take_crf_with_and_without_a_value(trained, root, tmp_path, capsys):
    photo = str(root / "JPEGImages" / "2007_000000.jpg")
    given = ["--checkpoint", str(trained), "--device", "cpu"]
    scored = ["evaluate", *given, "--eval.limit=1", "--eval.kinds=[segmentation]", "--json", str(tmp_path / "s.json")]
    for crf, kinds in ((["--eval.crf=true", "--crf", "false"], 1), (["--crf", "--labels.dense_crf.num_iter=1"], 2)):
        assert cli.main([*scored, *crf]) == 0
        content = json.loads((tmp_path / "s.json").read_text())
        assert list(content["scores"]) == ["segmentation", "segmentation_crf"][:kinds]
    assert content["about"]["labels"]["dense_crf"]["num_iter"] == 1
    assert "+ CRF" in capsys.readouterr().out
    labels = []
    for crf in (["--crf"], ["--crf", "true", "--dense-crf.pos-w", "0", "--dense-crf.bi-w", "0"]):
        assert cli.main(["predict", *crf, photo, *given, "--out", str(tmp_path), "--panels", "false"]) == 0
        labels.append(np.asarray(Image.open(tmp_path / "2007_000000.png")))
    assert not np.array_equal(*labels)


def test_predict_writes_labels_and_panels(trained, root, tmp_path, capsys):
    photos = [root / "JPEGImages" / f"2007_00000{i}.jpg" for i in (0, 1)]
    out = tmp_path / "labels"
    line = ["predict", *map(str, photos), "--checkpoint", str(trained), "--out", str(out), "--device", "cpu"]
    assert cli.main(line) == 0
    printed = capsys.readouterr().out
    assert "2007_000000.jpg" in printed and "wrote labels and panels of 2 photographs" in printed
    with Image.open(photos[1]) as photo, Image.open(out / "2007_000001.png") as label:
        assert label.mode == "P"
        assert label.size == photo.size
        assert np.asarray(label).max() < 21
    assert (out / "2007_000001_panel.png").stat().st_size > 1000


def test_predict_takes_classes_and_a_point(trained, root, tmp_path, capsys):
    photo = str(root / "JPEGImages" / "2007_000000.jpg")
    line = ["predict", photo, "--checkpoint", str(trained), "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main([*line, "--labels", "cat,person", "--affinity-at", "10,20", "--panels", "false"]) == 0
    printed = capsys.readouterr().out
    assert "cat" in printed and "person" in printed and "dog" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["2007_000000.png"]
    for wrong, message in (
        (["--labels", "unicorn"], "unicorn"),
        (["--affinity_at", "1000,2"], "affinity_at"),
        (["--label", "cat"], "label"),
    ):
        assert cli.main([*line, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["predict", str(tmp_path / "none.jpg"), *line[2:]]) == 2
    assert "none.jpg: not found" in capsys.readouterr().err


def test_predict_draws_the_weights_of_the_heads(trained, root, tmp_path, capsys):
    picture = tmp_path / "weights.png"
    line = ["predict", "--checkpoint", str(trained), "--out", str(tmp_path / "labels"), "--device", "cpu"]
    assert cli.main([*line, "--head-weights", str(picture)]) == 0
    assert f"wrote {picture}" in capsys.readouterr().out
    assert picture.stat().st_size > 1000 and not (tmp_path / "labels").exists()
    photo = str(root / "JPEGImages" / "2007_000000.jpg")
    assert cli.main([*line, f"--head-weights={picture}", "--panels", "false", photo]) == 0
    assert "wrote labels of 1 photograph" in capsys.readouterr().out
    assert cli.main(line) == 2
    assert "afa predict: error: images: none given" in capsys.readouterr().err


def test_what_belongs_to_no_option_may_stand_anywhere(trained, root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = root / "JPEGImages" / "2007_000000.jpg"
    for name in ("a.jpg", "b.jpg", "--dash-ed.jpg"):
        shutil.copy(photo, tmp_path / name)
    line = ["predict", "a.jpg", "--panels=false", "--checkpoint", str(trained), "b.jpg", "--device", "cpu"]
    assert cli.main([*line, "--", "--dash-ed.jpg"]) == 0
    assert "3 photographs" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {"a.png", "b.png", "--dash-ed.png"}


def test_predict_lists_what_it_could_not_read_and_ends_with_1(trained, root, tmp_path, capsys):
    for index in (0, 1):
        shutil.copy(root / "JPEGImages" / f"2007_00000{index}.jpg", tmp_path)
    cut = tmp_path / "2007_000000.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    line = ["predict", str(tmp_path), "--checkpoint", str(trained), "--out", str(tmp_path / "out"), "--panels=false"]
    assert cli.main([*line, "--device=cpu"]) == 1
    printed = capsys.readouterr()
    assert "wrote labels of 1 photograph to" in printed.out
    assert f"1 could not be labelled:\n  {cut}: cannot be decoded" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--eval.scales", "[0]"], "eval.scales: expected positive numbers, got (0"),
        (["evaluate", "--eval.scales", "[]"], "eval.scales: expected positive numbers, got ()"),
        (["evaluate", "--eval.long_side", "8"], "eval.long_side: expected at least 32 pixels"),
        (["evaluate", "--labels.bkg_score", "2"], "labels.bkg_score: expected a score in 0..1, got 2"),
        (["evaluate", "--eval.dilations", "[]"], "eval.dilations: expected pixels of at least 1, got ()"),
        (["evaluate", "--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N, got 'tpu' (there is cpu"),
        (["predict", "x", "--scales", "[1,-1]"], "scales: expected positive numbers, got (1.0, -1.0)"),
        (["predict", "x", "--bkg_score", "2"], "bkg_score: expected a score in 0..1, got 2"),
        (["predict", "x", "--walk_score", ".nan"], "walk_score: expected a score in 0..1, got nan"),
        (["predict", "x", "--cam_scales", "[.inf]"], "cam_scales: expected positive numbers, got (inf,)"),
        (["predict", "x", "--long_side", "1"], "long_side: expected at least 32 pixels"),
        (["predict", "x", "--device", "CPU"], "device: expected auto, cpu, cuda or cuda:N, got 'CPU'"),
        (["predict", "x", "--device", "cuda:99"], "device: cuda:99 was asked for, but"),
    ],
)
def test_every_command_checks_its_settings(trained, words, message, capsys):
    command, *others = words
    assert cli.main([command, *others, "--checkpoint", str(trained)]) == 2
    assert capsys.readouterr().err.startswith(f"afa {command}: error: {message}")


def test_files_are_tried_before_the_work_and_written_before_all_else(trained, root, tmp_path, capsys, monkeypatch):
    line = ["evaluate", f"--checkpoint={trained}", "--device=cpu", "--eval.limit=1", "--eval.kinds=[cam]"]
    with monkeypatch.context() as never:
        never.setattr(evaluate, "evaluate", lambda *_: pytest.fail("evaluated before the files were looked at"))
        (tmp_path / "file").write_text("")
        for wrong in (tmp_path, tmp_path / "file" / "x.json"):
            assert cli.main([*line, "--json", str(wrong)]) == 2
            assert capsys.readouterr().err.startswith("afa evaluate: error: json: ")

    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(EvaluationResult, "write_json", full)
    monkeypatch.setattr(EvaluationResult, "print", lambda self, _: print("TABLE"))
    files = tmp_path / "a.json", tmp_path / "a.csv"
    assert cli.main([*line, "--json", str(files[0]), "--csv", str(files[1])]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"afa evaluate: error: json: {files[0]} cannot be written (No space left on device)\n"
    assert printed.out.index(f"wrote {files[1]}") < printed.out.index("TABLE") and files[1].stat().st_size > 20


def test_a_protocol_asked_for_is_not_mixed_with_another(root, tmp_path, monkeypatch):
    """The run has rows of its own, and a protocol; neither is left in the one that is asked for."""
    changes = {"schedule__max_iters": 1, "eval__protocol": "training", "eval__affinity_of": "plain", "eval__batch": 3}
    assert cli.main(["train", *tiny_args(root, tmp_path / "run", **changes)]) == 0
    seen = []

    def noted(model, dataset, settings, labels):
        assert settings.batch == 3, "whichever protocol"
        seen.append((settings.by("test").maps(), settings.labels(labels).one_walk_score))
        raise TrainingError("seen")

    monkeypatch.setattr(evaluate, "evaluate", noted)
    test = ["--eval.protocol", "test"]
    for line in ([], ["--eval.protocol=training"], test, [*test, "--eval.flips=false"]):
        assert cli.main(["evaluate", "--checkpoint", str(tmp_path / "run"), *line]) == 1

    def noted_too(model, images, out, class_names, settings, how):
        seen.append((settings.long_side, settings.flips, settings.affinity_of, settings.batch, how.one_walk_score))
        raise TrainingError("seen")

    monkeypatch.setattr(predict, "predict", noted_too)
    assert cli.main(["predict", "photo.jpg", "--checkpoint", str(tmp_path / "run")]) == 1
    assert seen.pop() == (64, False, "plain", 3, (0.35,)), "as the run is evaluated"
    assert seen == [
        (MapSettings(64, (1.0,), False, "plain"), (0.35,)),
        (MapSettings(0, (1.0,), False, "plain"), (0.35,)),
        (MapSettings(512, (1.0, 0.5, 0.75), True, "largest"), (0.45,)),
        (MapSettings(512, (1.0, 0.5, 0.75), False, "largest"), (0.45,)),
    ]


def test_what_is_given_to_evaluate_has_the_last_word(root, tmp_path, monkeypatch):
    """Over the run's labels and over what its evaluation did otherwise than its training."""
    changes = {"schedule__max_iters": 1, "eval__radius": 3, "labels__walk_power": 4.0}
    assert cli.main(["train", *tiny_args(root, tmp_path / "run", **changes)]) == 0

    def scored(*line: str) -> LabelSettings:
        seen = []

        def noted(model, dataset, settings, labels):
            seen.append(settings.labels(labels))
            return real(model, dataset, settings, labels)

        monkeypatch.setattr(evaluate, "evaluate", noted)
        assert cli.main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--eval.limit=1", *line]) == 0
        return seen[0]

    real = evaluate.evaluate
    run = scored()
    assert (run.radius, run.walk_power, list(run.dilations)) == (3, 4, [1, 2])
    assert scored("--labels.radius=1").radius == 1
    assert scored("--labels.radius=1", "--eval.radius=2").radius == 2


@pytest.mark.parametrize(
    ("swap", "told"),
    [
        (("aeroplane", "bicycle"), "class 1 is 'aeroplane' to the checkpoint and 'bicycle' in the data"),
        (("person", "human"), "class 15 is 'person' to the checkpoint and 'human' in the data"),
    ],
)
def test_classes_of_other_names_are_not_taken_for_the_models(trained, root, tmp_path, capsys, swap, told):
    """As many classes are not the same ones: neither scored nor gone on with."""
    names = dict(zip(swap, reversed(swap))) if swap[1] in VOC_CLASSES else dict([swap])
    shutil.copytree(root, tmp_path / "voc")
    (tmp_path / "voc" / "classes.txt").write_text("\n".join(names.get(name, name) for name in VOC_CLASSES))
    line = ["--data.root", str(tmp_path / "voc")]
    assert cli.main(["evaluate", "--checkpoint", str(trained), "--device", "cpu", *line]) == 2
    assert told in capsys.readouterr().err
    shutil.copytree(trained, tmp_path / "run")
    more = tiny_args(tmp_path / "voc", tmp_path / "run", schedule__max_iters=3, resume="auto")
    assert cli.main(["train", *more]) != 0
    error = capsys.readouterr().err
    assert told in error and "goes on with the classes it began with" in error
    assert not list((tmp_path / "run").glob("iter_00000003.pt"))


def test_published_weights_have_the_classes_of_the_data(trained, root, tmp_path, capsys):
    """They do not say what their classes are."""
    shutil.copytree(root, tmp_path / "voc")
    (tmp_path / "voc" / "classes.txt").write_text("\n".join(VOC_CLASSES).replace("person", "human"))
    assert cli.main(["convert", str(trained), str(tmp_path / "public.pth")]) == 0
    line = ["evaluate", "--checkpoint", str(tmp_path / "public.pth"), "--data.root", str(tmp_path / "voc")]
    assert cli.main([*line, "--eval.limit=1", "--eval.long_side=64", "--eval.scales=[1.0]", "--device", "cpu"]) == 0
    assert "does not say what its classes are; taken are those of" in capsys.readouterr().err
