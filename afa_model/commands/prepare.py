"""`afa prepare`: make a data set that `afa train` takes as it is, of any photographs or of a published one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import Parser, section
from ..data.prepare.coco import prepare_coco
from ..data.prepare.folder import REFUSED, FolderSettings, prepare_folder
from ..data.prepare.sbd import prepare_sbd
from ..data.prepare.voc import prepare_voc
from .options import mistakes_named, part, positionals_first, switched_on

_PUBLISHED = {
    "voc": (prepare_voc, "PASCAL VOC 2012: photographs, masks, lists, image-level labels (2 GB to download)"),
    "sbd": (prepare_sbd, "the rest of train_aug (10,582 photographs) beside VOC 2012: masks of SBD (1.4 GB)"),
    "coco": (prepare_coco, "COCO 2014: photographs, VOC-style masks, lists, image-level labels (20 GB)"),
}
_USAGE = """usage: afa prepare folder SOURCE --root DIR [--labels FILE | --masks FOLDER] [--classes ...] [--val ...]
       afa prepare voc|sbd|coco --root DIR [--offline]

Make a data set that `afa train --data.root DIR` takes as it is. `afa prepare KIND --help` lists the options of a kind.

  folder  any photographs, labelled by sub-folder, label file, annotations or masks; image-level labels alone"""


def main(argv: Sequence[str]) -> int:
    """`afa prepare folder SOURCE --root DIR` or `afa prepare voc|sbd|coco --root DIR`."""
    if not argv or argv[0] in ("-h", "--help"):
        kinds = [f"  {name:6}  {what}" for name, (_, what) in _PUBLISHED.items()]
        print("\n".join([_USAGE, *kinds]), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "folder":
        return _folder(argv[1:])
    if argv[0] not in _PUBLISHED:
        kinds = ", ".join(["folder", *_PUBLISHED])
        print(f"afa prepare: error: no data set {argv[0]!r} (there are {kinds})", file=sys.stderr)
        return 2
    return _published(argv[0], argv[1:])


def _folder(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="afa prepare folder",
        description="Make a data set with image-level labels alone of the photographs in a folder and its sub-folders,"
        " of any format. What is there is kept, so the line can be given again, after it was stopped or with more"
        " photographs.",
    )
    parser.add_argument("source", type=str, metavar="SOURCE", help="folder of photographs")
    parser.add_argument("--root", type=str, required=True, help="folder to make the data set in")
    parser.add_class_arguments(FolderSettings)
    options = parser.parse_args(positionals_first(switched_on(argv, "--allow_empty")))
    settings = section(FolderSettings, part(FolderSettings, options))
    root = Path(options.root).expanduser()
    with mistakes_named():
        made = prepare_folder(options.source, root, settings)
    if made.refused:
        count = f"{len(made.refused)} refused (also in {root / REFUSED}):"
        print(count, *made.refused, sep="\n  ", file=sys.stderr, flush=True)
    width = max(map(len, made.classes))
    for name, (train, val) in made.classes.items():
        print(f"{name:{width}}  {train} to train on, {val} to validate on")
    total = made.train + made.val
    before = f", {total - made.added} were there" if total > made.added else ""
    print(f"wrote {made.added} photograph{'s' * (made.added != 1)} to {root}{before}: {made.train} in train_aug,"
          f" {made.val} in val, {len(made.classes)} class{'es' * (len(made.classes) != 1)} in classes.txt")  # fmt: skip
    empty = " --data.allow_empty true" if settings.allow_empty else ""
    print(f"next: afa train --data.root {root}{empty} --out runs/{root.name} --model.pretrained mit_b1.pth")
    return 0


def _published(name: str, argv: Sequence[str]) -> int:
    prepare, what = _PUBLISHED[name]
    parser = Parser(prog=f"afa prepare {name}", description=f"Prepare {what}. What is there is kept.")
    parser.add_argument("--root", type=str, required=True, help="folder to make the data set in")
    parser.add_argument("--offline", type=bool, default=False, help="download nothing: say what is missing")
    options = parser.parse_args(switched_on(argv, "--offline"))
    for line in prepare(Path(options.root).expanduser(), options.offline):
        print(line)
    return 0
