"""`afa pseudo-labels` in shares, stopped and run again: one folder, whole files, and nothing made twice."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.pseudo_label_folders import NAMES, SHOWN, manifest, six_photographs, write, written

from afa_model.errors import ConfigError
from afa_model.evaluation import pseudo_labels as module
from afa_model.labels.settings import LabelSettings


@pytest.fixture
def root(tmp_path):
    return six_photographs(tmp_path / "voc")


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
