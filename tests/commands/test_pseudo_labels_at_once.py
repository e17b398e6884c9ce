"""`afa pseudo-labels` with several photographs at a time: the files of one by one, and each has its own fate."""

from __future__ import annotations

import json

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
import torch
from PIL import Image
from support.color_model import ColorModel
from support.pseudo_label_folders import NAMES, SHOWN, manifest, six_photographs, write, written

from afa_model.errors import ConfigError
from afa_model.evaluation import pseudo_labels as module
from afa_model.evaluation.pseudo_labels import ENDINGS, PseudoLabelSettings

SIZES = {"long_side": 40}  # photographs of 48 x 64 ... 48 x 69 then have 30, 29, 29, 28, 28 and 27 rows


class Counting(ColorModel):
    """How many images go through it at once; ``most``: what memory suffices for."""

    def __init__(self, most: int = 100) -> None:
        super().__init__()
        self.passes: list[int] = []
        self.most = most

    def _shares(self, images, cell=4):
        self.passes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._shares(images, cell)


@pytest.fixture
def root(tmp_path):
    """The classes of two photographs are not known."""
    six_photographs(tmp_path / "voc")
    known = {name: shown for name, shown in SHOWN.items() if name not in (NAMES[2], NAMES[4])}
    (tmp_path / "voc" / "cls_labels.json").write_text(json.dumps(known))
    return tmp_path / "voc"


def same_files(one, other) -> None:
    assert sorted(written(one)) == sorted(written(other))
    assert (one / "train.txt").read_text() == (other / "train.txt").read_text()
    for name in written(one):
        if name.endswith(".png"):
            assert np.array_equal(*(np.asarray(Image.open(folder / name)) for folder in (one, other))), name
            continue
        with np.load(one / name) as got, np.load(other / name) as want:
            assert got.files == want.files
            for key in want.files:
                np.testing.assert_allclose(got[key], want[key], atol=1e-3, err_msg=f"{name}: {key}")
    entries = [manifest(folder)["images"] for folder in (one, other)]
    assert entries[0] == entries[1]


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_the_files_are_those_of_one_by_one(root, tmp_path, batch):
    model = Counting()
    want = write(root, tmp_path / "one", save=tuple(ENDINGS), **SIZES)
    got = write(root, tmp_path / "several", save=tuple(ENDINGS), model=model, batch=batch, **SIZES)
    same_files(tmp_path / "several", tmp_path / "one")
    assert (got.done, got.skipped, got.problems, got.sources) == (want.done, 0, [], want.sources)
    assert set(got.phases) == set(want.phases) and max(model.passes) == 2, "one of each pair is asked for its classes"
    (root / "cls_labels.json").write_text(json.dumps(SHOWN))
    write(root, tmp_path / "known", model=model, batch=batch, **SIZES)
    assert max(model.passes) == (2 if batch == 2 else 4)


def test_each_has_its_own_fate(root, tmp_path):
    """One is broken, one is gone, one has an unknown class, one is finished, the others are labelled together."""
    out = tmp_path / "out"
    write(root, out, images=[str(root / "JPEGImages" / f"{NAMES[0]}.jpg")], **SIZES)
    before = written(out)
    (root / "JPEGImages" / f"{NAMES[1]}.jpg").write_bytes(b"")
    (root / "JPEGImages" / f"{NAMES[4]}.jpg").unlink()
    (root / "cls_labels.json").write_text(json.dumps({**SHOWN, NAMES[2]: ["kat"]}))
    done = write(root, out, batch=4, **SIZES)
    assert (done.done, done.skipped) == (2, 1) and before.items() <= written(out).items()
    assert (out / "train.txt").read_text().split() == [NAMES[0], NAMES[3], NAMES[5]]
    said = (f"{NAMES[1]}.jpg: cannot be decoded", f"{NAMES[2]}.jpg: unknown class 'kat'", f"{NAMES[4]}.jpg: not found")
    for problem, words in zip(done.problems, said, strict=True):
        assert words in problem


def test_too_large_for_the_memory_is_only_what_is_so_alone(root, tmp_path):
    (root / "cls_labels.json").write_text(json.dumps(SHOWN))
    want = write(root, tmp_path / "one", **SIZES)
    assert want.done == 6 and write(root, tmp_path / "few", model=Counting(2), batch=6, **SIZES).done == 6
    same_files(tmp_path / "few", tmp_path / "one")

    class Full(ColorModel):
        def _shares(self, images, cell=4):
            if images.shape[2] == 30 or len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._shares(images, cell)

    done = write(root, tmp_path / "full", model=Full(), how=module.LabelSettings(cam_scales=(1.0,)), batch=6, **SIZES)
    assert done.done == 5 and len(done.problems) == 1
    assert f"{NAMES[0]}.jpg: too large for the memory of cpu (--long_side makes it smaller)" in done.problems[0]


def test_a_stop_loses_no_more_than_is_under_way(root, tmp_path, monkeypatch):
    out, real, seen = tmp_path / "out", module.write_label, []

    def stopped(path, label):
        real(path, label)
        seen.append(path)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_label", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(root, out, batch=3, **SIZES)
    assert list(manifest(out)["images"]) == NAMES[:3]
    assert write(root, out, batch=2, **SIZES).done == 3, "the batch is none of what a folder was made by"
    write(root, tmp_path / "one", **SIZES)
    same_files(out, tmp_path / "one")


def test_shares_take_their_own_batches(root, tmp_path):
    for share in ("1/2", "2/2"):
        write(root, tmp_path / "out", shard=share, batch=2, channels_last=True, **SIZES)
    write(root, tmp_path / "one", **SIZES)
    same_files(tmp_path / "out", tmp_path / "one")


def test_an_edited_photograph_has_the_files_of_now_alone(root, tmp_path):
    """Those of before show another."""
    write(root, tmp_path / "out", batch=3, **SIZES)
    Image.new("RGB", (64, 48), (220, 30, 30)).save(root / "JPEGImages" / f"{NAMES[0]}.jpg")
    assert write(root, tmp_path / "out", save=("labels",), batch=3, **SIZES).done == 1
    images = manifest(tmp_path / "out")["images"]
    assert images[NAMES[0]]["files"] == ["labels"] and images[NAMES[1]]["files"] == ["cams", "walks", "labels"]


def test_the_weights_are_laid_out_once(root, tmp_path):
    class Convolving(ColorModel):
        laid: list[int] = []

        def __init__(self) -> None:
            super().__init__()
            self.kernel = torch.nn.Parameter(torch.zeros(3, 4, 2, 2))

        def _shares(self, images, cell=4):
            assert self.kernel.is_contiguous(memory_format=torch.channels_last)
            self.laid.append(self.kernel.data_ptr())
            return super()._shares(images, cell)

    model, kept = Convolving(), []
    before = model.kernel.data_ptr(), model.kernel.stride()
    real = torch.Tensor.contiguous

    def contiguous(tensor, *arguments, **options):
        made = real(tensor, *arguments, **options)
        if tensor.shape == model.kernel.shape and made is not tensor:
            kept.append(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", contiguous)
        write(root, tmp_path / "out", model=model, channels_last=True, batch=2, **SIZES)
    assert len(kept) == 1 and set(model.laid) == {kept[0].data_ptr()}
    assert (model.kernel.data_ptr(), model.kernel.stride()) == before


def test_labels_of_bfloat16_are_not_mixed_with_others(root, tmp_path):
    out = tmp_path / "out"
    write(root, out, shard="1/6", amp="bf16", **SIZES)
    assert manifest(out)["settings"]["amp"] == "bf16"
    with pytest.raises(ConfigError, match=r"made otherwise .*amp bf16, now off"):
        write(root, out, **SIZES)
    # a folder that does not say is of a time when there was no such setting
    write(root, tmp_path / "old", shard="1/6", **SIZES)
    content = manifest(tmp_path / "old")
    del content["settings"]["amp"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(content))
    assert write(root, tmp_path / "old", **SIZES).done == 5


def test_a_batch_has_one_photograph_at_least():
    for settings, said in (({"batch": 0}, "batch: expected at least 1"), ({"amp": "fp16"}, "amp: expected auto")):
        with pytest.raises(ValueError, match=said):
            PseudoLabelSettings(**settings)
