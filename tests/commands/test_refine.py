"""`afa refine`: what is read, what is written where, what is skipped and shared out, and what is said of the rest."""

from __future__ import annotations

import json
import os
import pickle
import time

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
import torch
from PIL import Image

from afa_kernels import DenseCRF, pamr, par
from afa_model import cli
from afa_model.data.classes import voc_palette
from afa_model.data.files import made_here, read_label, write_label
from afa_model.errors import DataError
from afa_model.evaluation import refine as module
from afa_model.evaluation.refine import RefineSettings, refine_files
from afa_model.labels import crf as crf_module
from afa_model.runtime import progress as progress_module

SIZE = 20, 28
CRF = {"num_iter": 3, "pos_w": 0.3, "pos_xy_std": 2.0, "bi_w": 0.5, "bi_xy_std": 9.0, "bi_rgb_std": 40.0}
OWN = [f"--dense_crf.{name}={value}" for name, value in CRF.items()]
BY_HAND = DenseCRF(*CRF.values())


@pytest.fixture
def photo(rng, tmp_path):
    """One of two halves, whose border no mask knows; in a sub-folder."""
    pixels = np.full((*SIZE, 3), 60, np.uint8)
    pixels[:, 15:] = 180
    pixels += torch.randint(0, 20, pixels.shape, generator=rng).numpy().astype(np.uint8)
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "masks" / "sub").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "photos" / "sub" / "a.png")
    return pixels


@pytest.fixture
def cam(rng):
    """Of two classes, rough and too far to the left and to the right."""
    cam = torch.rand(2, *SIZE, generator=rng).mul(0.3).numpy()
    cam[0, 4:16, 16:26] += 0.7
    cam[1, 2:15, 2:10] += 0.7
    return cam


def run(tmp_path, *more: str) -> int:
    folders = [str(tmp_path / name) for name in ("photos", "masks", "out")]
    return cli.main(["refine", *folders[:2], "--out", folders[2], "--device", "cpu", *OWN, *more])


def shares(cam: np.ndarray, background: np.ndarray | float) -> np.ndarray:
    scores = np.concatenate([np.broadcast_to(np.float32(background), (1, *SIZE)), cam]).astype(np.float32)
    return scores / scores.sum(0)


def label_at(tmp_path) -> np.ndarray:
    return read_label(tmp_path / "out" / "sub" / "a.png").numpy()


def save_irn(path, cam):
    keys = torch.tensor([7, 2])
    strided = torch.from_numpy(cam[::-1, ::4, ::4].copy())
    np.save(path, {"keys": keys, "cam": strided, "high_res": cam[::-1].copy()})


def among_ten(cam):
    """Classes 2 and 7 of ten, the others nowhere."""
    return np.insert(np.zeros((8, *SIZE)), [2, 6], cam, 0)


FORMATS = {
    "array": ("a.npy", lambda path, cam: np.save(path, among_ten(cam))),
    "npz of one array": ("a.npz", lambda path, cam: np.savez(path, cam=among_ten(cam)[None])),
    "dictionary": ("a.npy", lambda path, cam: np.save(path, {7: cam[1], 2: cam[0]})),
    "npz by number": ("a.npz", lambda path, cam: np.savez(path, **{"7": cam[1], "2": cam[0].astype(np.float64)})),
    "IRN, with tensors": ("a.npy", save_irn),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_cams_in_the_formats_of_the_field(tmp_path, photo, cam, kind, capsys):
    name, save = FORMATS[kind]
    save(tmp_path / "masks" / "sub" / name, cam)
    assert run(tmp_path, "--soft") == 0
    probs = BY_HAND(photo, shares(cam, 0.45))
    assert np.array_equal(label_at(tmp_path), np.array([0, 3, 8])[probs.argmax(0)])
    assert np.unique(label_at(tmp_path)).tolist() == [0, 3, 8]
    with np.load(tmp_path / "out" / "sub" / "a.npz") as soft:
        assert soft["classes"].tolist() == [0, 3, 8] and soft["scores"].dtype == np.float16
        assert np.abs(soft["scores"] - probs).max() < 2e-3
    with Image.open(tmp_path / "out" / "sub" / "a.png") as image:
        assert image.mode == "P" and np.array_equal(np.array(image.getpalette()).reshape(-1, 3), voc_palette())
    assert made_here(tmp_path / "out" / "sub" / "a.png")
    assert "wrote labels and scores of 1 photograph to" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out" / "sub").iterdir()) == ["a.npz", "a.png"]


def test_the_background_of_cams(tmp_path, photo, cam):
    np.save(tmp_path / "masks" / "sub" / "a.npy", cam)
    cases = {
        "--bkg_score=0.2": ((0, 1, 2), shares(cam, 0.2)),
        "--power=3": ((0, 1, 2), shares(cam, (1 - np.minimum(cam.max(0), 1)) ** 3)),
        "--has_background=true": ((0, 1), cam.clip(0, 1) / cam.clip(0, 1).sum(0)),
    }
    labels = []
    for given, (numbers, probs) in cases.items():
        assert run(tmp_path, given, "--out", str(tmp_path / given)) == 0
        labels.append(read_label(tmp_path / given / "sub" / "a.png").numpy())
        assert np.array_equal(labels[-1], np.array(numbers)[BY_HAND(photo, probs.astype(np.float32)).argmax(0)]), given
    assert len({label.tobytes() for label in labels}) == 3


def test_par_and_pamr(tmp_path, photo, cam):
    np.save(tmp_path / "masks" / "sub" / "a.npy", cam)
    image = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    for method, operator in (("par", par), ("pamr", pamr)):
        more = "--method", method, "--dilations", "[1,3]", "--num_iter", "4", "--out", str(tmp_path / method)
        assert run(tmp_path, *more) == 0
        want = operator(image, torch.from_numpy(shares(cam, 0.45))[None], (1, 3), 4)[0].argmax(0)
        assert torch.equal(read_label(tmp_path / method / "sub" / "a.png"), want), method


def test_labels_become_probabilities_and_what_is_unknown_stays_so(tmp_path, photo):
    label = np.zeros(SIZE, np.uint8)
    label[5:15, 11:22], label[:, 3:5] = 15, 255
    label[16:18, 20:22] = 4
    write_label(tmp_path / "masks" / "sub" / "a.png", label)
    numbers = np.array([0, 4, 15])
    stronger, by_hand = ("--dense_crf.pos_w=1.5", "--dense_crf.bi_w=1.5"), DenseCRF(3, 1.5, 2, 1.5, 9, 40)
    probs = np.where(label == numbers[:, None, None], 0.7, 0.15)
    probs[:, label == 255] = 1 / 3
    want = numbers[by_hand(photo, probs).argmax(0)]
    assert run(tmp_path, *stronger) == 0
    assert np.array_equal(label_at(tmp_path), np.where(label == 255, 255, want)) and (want != label)[label != 255].any()
    assert run(tmp_path, *stronger, "--fill-unknown", "true", "--out", str(tmp_path / "filled")) == 0
    assert np.array_equal(read_label(tmp_path / "filled" / "sub" / "a.png").numpy(), want)
    surer = np.where(label == numbers[:, None, None], 0.98, 0.01)
    surer[:, label == 255] = 1 / 3
    assert run(tmp_path, *stronger, "--gt_prob", "0.98", "--out", str(tmp_path / "surer")) == 0
    sure = numbers[by_hand(photo, surer).argmax(0)]
    assert np.array_equal(read_label(tmp_path / "surer" / "sub" / "a.png").numpy()[label != 255], sure[label != 255])
    assert not np.array_equal(sure, want)


def test_masks_of_nothing_or_of_one_class(tmp_path, photo):
    for value, want in ((255, 255), (0, 0), (9, 9)):
        write_label(tmp_path / "masks" / "sub" / "a.png", np.full(SIZE, value, np.uint8))
        assert run(tmp_path, "--soft", "--out", str(tmp_path / str(value))) == 0
        assert (read_label(tmp_path / str(value) / "sub" / "a.png") == want).all()
    (tmp_path / "masks" / "sub" / "a.png").unlink()
    np.save(tmp_path / "masks" / "sub" / "a.npy", np.zeros((20, 5, 7)))
    assert run(tmp_path) == 0 and not label_at(tmp_path).any()


def test_what_is_written_can_be_refined_again(tmp_path, photo, cam):
    np.save(tmp_path / "masks" / "sub" / "a.npy", cam)
    assert run(tmp_path, "--soft") == 0
    Image.new("RGB", (9, 9)).save(tmp_path / "out" / "sub" / "a_panel.png")  # as beside a prediction
    with np.load(tmp_path / "out" / "sub" / "a.npz") as soft:
        probs = soft["scores"].astype(np.float32)
    again = ["refine", str(tmp_path / "photos"), str(tmp_path / "out"), "--out", str(tmp_path / "out" / "again")]
    for _ in range(2):  # the second time what the first wrote below its masks is none of them
        assert cli.main([*again, "--device", "cpu", *OWN]) == 0
    label = read_label(tmp_path / "out" / "again" / "sub" / "a.png").numpy()
    assert np.array_equal(label, BY_HAND(photo, probs / probs.sum(0)).argmax(0)) and len(np.unique(label)) == 3


def test_a_photograph_that_is_too_large_is_refined_smaller(tmp_path, photo, cam, monkeypatch):
    np.save(tmp_path / "masks" / "sub" / "a.npy", cam)
    monkeypatch.setattr(crf_module, "MOST_BYTES", 14 * 10 * (250 + 24 * 16))
    monkeypatch.setattr(module, "PIXELS", 14 * 10)
    monkeypatch.setattr(module, "is_large", lambda size: size[0] * size[1] > 14 * 10)
    seen, real = [], module.refine
    monkeypatch.setattr(module, "refine", lambda i01, maps, *a: seen.append(maps.shape[2:]) or real(i01, maps, *a))
    for method in ("crf", "par"):
        asked = RefineSettings(method, (1,), 2, soft=True)
        refine_files(tmp_path / "photos", tmp_path / "masks", tmp_path / method, asked)
        assert read_label(tmp_path / method / "sub" / "a.png").shape == SIZE
        with np.load(tmp_path / method / "sub" / "a.npz") as soft:
            assert soft["scores"].shape == (3, *SIZE)
    assert seen == [(10, 14), (10, 14)]


# many files


@pytest.fixture
def several(tmp_path):
    """Seven photographs in one folder, their masks in two."""
    for i in range(7):
        Image.new("RGB", (9, 8), (30 * i, 99, 0)).save(tmp_path / f"{i}.jpg")
        folder = tmp_path / "masks" / ("x" if i % 2 else "y")
        folder.mkdir(parents=True, exist_ok=True)
        write_label(folder / f"{i}.png", np.eye(8, 9, dtype=np.uint8))
    (tmp_path / "photos").mkdir()
    for i in range(7):
        os.replace(tmp_path / f"{i}.jpg", tmp_path / "photos" / f"{i}.jpg")
    return tmp_path


def written(folder) -> dict[str, float]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def test_shares_are_of_all_files_and_what_is_finished_is_skipped(several, capsys, monkeypatch):
    assert run(several, "--shard", "2/3") == 0
    first = written(several / "out")
    assert sorted(first) == ["x/3.png", "y/2.png"]  # sorted by folder: 1 3 5, 0 2 4 6
    assert "share 2 of 3: wrote labels of 2 photographs" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(several) == 0
    assert "share 1 of 3: wrote labels of 3 photographs" in capsys.readouterr().out
    assert run(several, "--shard", "1/2") == 2
    assert "shard: expected null under torchrun" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert len(written(several / "out")) == 5
    assert run(several) == 0
    assert "wrote labels of 2 photographs" in (told := capsys.readouterr().out) and "5 were there" in told
    everything = written(several / "out")
    assert len(everything) == 7 and first.items() <= everything.items()
    # only one that is not there, whole, or older than its mask is made again
    later = time.time() + 9
    os.utime(several / "masks" / "x" / "1.png", (later, later))
    (several / "out" / "y" / "2.png").unlink()
    assert run(several) == 0
    assert "5 were there" in capsys.readouterr().out
    changed = {name for name, made in written(several / "out").items() if everything[name] != made}
    assert changed == {"x/1.png", "y/2.png"}


def test_where_there_is_no_terminal_lines_tell_how_far_it_is(several, capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "_TOLD_EVERY", 1e-9)
    assert run(several) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("refining: 6 of 7, ") and told[-1].endswith(" images a second")
    assert run(several, "--progress", "false") == 0 and not capsys.readouterr().err


def test_a_file_appears_when_it_is_whole(several, monkeypatch):
    real, seen = module.write_label, []

    def stopped(path, label):
        real(path, label)
        seen.append(path)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_label", stopped)
    assert run(several) == 130
    assert len(written(several / "out")) == 2 and not any(path.exists() for path in seen)


def test_files_made_otherwise_are_not_mixed(several, capsys):
    assert run(several, "--shard", "1/7") == 0
    assert json.loads((several / "out" / "refine.json").read_text())["dense_crf"]["num_iter"] == 3
    for more, said in ((["--method", "par"], "method crf, now par"), (["--gt_prob", "0.6"], "gt_prob 0.7, now 0.6")):
        assert run(several, *more) == 2
        error = capsys.readouterr().err
        assert "holds masks that were refined otherwise" in error and said in error
    assert run(several, "--shard", "2/7", "--soft") == 0, "what is written beside changes nothing"


def test_what_cannot_be_refined_is_named_and_ends_nothing(several, capsys):
    masks = several / "masks"
    write_label(masks / "lonely.png", np.zeros((8, 9), np.uint8))
    write_label(masks / "x" / "1.png", np.zeros((9, 8), np.uint8))
    (masks / "x" / "3.png").write_bytes(b"<!DOCTYPE html>")
    (several / "photos" / "5.jpg").write_bytes(b"")
    (masks / "y" / "0.png").unlink()
    np.save(masks / "y" / "0.npy", np.full((2, 4, 4), 7.0))
    (masks / "y" / "2.png").unlink()
    np.save(masks / "y" / "2.npy", {"cat": np.zeros((4, 4))})
    assert run(several) == 1
    out, error = capsys.readouterr()
    assert "wrote labels of 2 photographs" in out and "6 could not be refined:" in error
    for said in (
        "lonely.png: the photograph lonely is needed, there is none in",
        "x/1.png: 8x9 pixels, but the photograph",
        "5.jpg: cannot be decoded (the file is empty)",
        "y/0.npy: expected scores in 0..1, got 7..7",
        "y/2.npy: expected class numbers, or keys and high_res, or classes and scores, got cat",
        "x/3.png",
    ):
        assert said in error, said
    assert error.count("\n") == 7
    assert sorted(written(several / "out")) == ["y/4.png", "y/6.png"]


class Shout:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("shouted",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.zeros((4, 4)), r"expected numbers \[C, h, w\], or a map"),
        (np.full((2, 4, 4), np.nan), "expected scores in 0..1, got nan..nan"),
        ({0: np.zeros((4, 4)), 1: np.zeros((4, 5))}, "maps of different sizes"),
        ({}, "a dictionary without a class"),
        ({300: np.zeros((4, 4))}, "expected classes 0..253, each once, got 300"),
        ({"keys": np.array([1]), "high_res": np.zeros((2, 4, 4))}, "1 classes but 2 maps"),
        (np.zeros((3, 9, 8)), "8x9 pixels, but its photograph has 9x8; is one of them turned"),
        (Shout(), "holds .*mkdir; only dicts of arrays are read"),
        ({1: Shout()}, "holds .*mkdir; only dicts of arrays are read"),
    ],
)
def test_bad_scores_are_named(several, monkeypatch, content, said):
    monkeypatch.chdir(several)
    for path in (several / "masks").rglob("*.png"):
        path.unlink()
    if isinstance(content, np.ndarray):
        np.save(several / "masks" / "y" / "0.npy", content)
    else:
        with open(several / "masks" / "y" / "0.npy", "wb") as file:
            boxed = np.empty((), object)
            boxed[()] = content
            np.lib.format.write_array(file, boxed, allow_pickle=True)
    with pytest.raises(DataError, match=f"0[.]npy.*{said}"):
        refine_files(several / "photos", several / "masks", several / "out")
    assert not (several / "shouted").exists()


def test_a_dictionary_with_a_background_must_have_one(several):
    for path in (several / "masks").rglob("*.png"):
        path.unlink()
    np.save(several / "masks" / "0.npy", {3: np.ones((4, 4))})
    with pytest.raises(DataError, match="no class 0, which is to be the background"):
        refine_files(several / "photos", several / "masks", several / "out", RefineSettings(has_background=True))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--shard", "0/3"], "shard: expected I/N with I in 1..N, such as 1/4, got '0/3'"),
        (["--shard", "4/3"], "shard: expected I/N"),
        (["--method", "none"], "method: expected"),
        (["--gt_prob", "1"], "gt_prob: expected a probability above 0 and below 1, got 1.0"),
        (["--power", "0"], "power: expected a positive number, got 0.0"),
        (["--bkg_score", "2"], "bkg_score: expected a score in 0..1, got 2.0"),
        (["--dense_crf.pos_w", "-1"], "dense_crf.pos_w: expected at least 0, got -1.0"),
        (["--softt"], "softt: unknown setting"),
        (["--out", "{root}/masks"], "out: {root}/masks is the folder of the masks"),
        (["--device", "gpu"], "device: expected auto, cpu, cuda"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(several, capsys, line, said):
    assert run(several, *(word.format(root=several) for word in line)) == 2
    error = capsys.readouterr().err
    assert error.startswith("afa refine: error: ") and said.format(root=several) in error
    assert not (several / "out").exists()


def test_folders_that_are_none_and_names_that_clash(several, capsys):
    (several / "empty").mkdir()
    line = ["refine", "--device", "cpu", "--out", str(several / "out")]
    for images, masks, said in (
        ("nowhere", "masks", "images: {0}/nowhere is not a folder"),
        ("photos", "nowhere", "masks: {0}/nowhere is not a folder"),
        ("photos", "empty", "masks: no .npy, .npz or .png in {0}/empty"),
    ):
        assert cli.main([*line, str(several / images), str(several / masks)]) == 2
        assert said.format(several) in capsys.readouterr().err
    for suffix in ("npy", "npz"):
        (several / "masks" / f"0.{suffix}").write_bytes(pickle.dumps({}))
    Image.new("RGB", (9, 8)).save(several / "photos" / "3.png")
    assert run(several) == 2
    assert "files would share a label\n  0: 2 files of this name" in capsys.readouterr().err
    (several / "masks" / "0.npy").unlink()
    (several / "masks" / "0.npz").unlink()
    assert run(several) == 1
    assert "x/3.png: the photograph x/3 is needed, there is several photographs" in capsys.readouterr().err
