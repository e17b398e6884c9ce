"""Image-level labels: which classes a photograph shows; here from XML annotations."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .texts import encoding_of


def multi_hot(present: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """Class indices (0 and 255 do not count) -> float32 [num_classes - 1] of 0 and 1."""
    label = torch.zeros(num_classes - 1)
    for index in torch.as_tensor(present).tolist():
        if 0 < index < num_classes:
            label[index - 1] = 1
    return label


def labels_from_xml(path: str | Path, names: Sequence[str], empty: bool = False, skip: Sequence[str] = ()) -> Tensor:
    """Classes of the objects in a VOC annotation -> float32 [K - 1]; with ``empty`` there may be none.

    Objects whose class is in ``skip`` do not count.

    Raises:
        ValueError: no object in it, an object of an unknown class, or no XML; OSError if it cannot be read.
    """
    found = [name for name in objects_in(path) if name not in skip]
    if not found and not empty:
        raise ValueError("empty annotation: no object")
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ValueError(
            f"unknown class {', '.join(map(repr, unknown))}"
            f" (data.xml_skip: [{', '.join(unknown)}] leaves such objects out)"
        )
    return multi_hot([names.index(name) for name in found], len(names))


def objects_in(path: str | Path) -> list[str]:
    """The names of the objects in a VOC annotation, one for each object.

    Raises:
        ValueError: no XML; OSError if it cannot be read.
    """
    # only the direct children: an <object> has <part>s (head, hand) with names of their own
    objects = [item for item in parsed_xml(Path(path)) if _local(item) == "object"]
    said = [next((part.text for part in item if _local(part) == "name"), None) for item in objects]
    return [" ".join((text or "").split()) for text in said]


def _local(item: ElementTree.Element) -> str:
    """A tag without its namespace."""
    return str(item.tag).rpartition("}")[2]


def parsed_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file, also where its encoding is none that the parser knows, or another than it says."""
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        content = path.read_bytes()
        said = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.-]+)", content)
        for encoding in (said[1].decode() if said else "utf-8", encoding_of(content), "cp1252"):
            try:
                text = content.decode(encoding)
                return ElementTree.fromstring(re.sub(r"^\ufeff?\s*<\?xml[^>]*\?>", "", text))
            except (ElementTree.ParseError, ValueError, LookupError):
                continue
        raise ValueError(f"not XML ({error})") from None
