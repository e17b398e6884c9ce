"""The pile of photographs that docs/data.md goes through: `python tests/support/phone_pile.py DIR` makes it.

Generated animals in a folder for each kind; a picture of two is in both folders. As in any pile, one lies on its side
and says so in its EXIF, one is a PNG, one is no photograph, one lies in no folder, and there is a film.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from afa_model.data.synthetic import SyntheticSettings, scene
from afa_model.data.synthetic_paint import SPECIES

COUNT = 120


def make_pile(folder: Path, count: int = COUNT) -> None:
    """Write the pile into ``folder``."""
    for number in range(count):
        picture, mask = scene(SyntheticSettings(), number)
        image, how = Image.fromarray(picture), {"quality": 92}
        if number == 1:
            how["exif"] = Image.Exif()
            how["exif"][0x112] = 6
            image = image.transpose(Image.Transpose.ROTATE_90)
        for kind in [SPECIES[index - 1] for index in np.unique(mask) if index > 0]:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            ending = "png" if number == 2 else "jpg"
            image.save(folder / kind / f"IMG_{2000 + number}.{ending}", **how)
    whole = next((folder / SPECIES[0]).glob("*.jpg")).read_bytes()
    (folder / SPECIES[0] / "IMG_2900.jpg").write_bytes(b"<html>not found</html>")
    (folder / SPECIES[1] / "VID_0001.mov").write_bytes(b"film")
    (folder / "IMG_2999.jpg").write_bytes(whole)


if __name__ == "__main__":
    make_pile(Path(sys.argv[1]))
