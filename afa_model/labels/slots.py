"""The classes of each image, side by side: work per class need not be done for all K - 1 of them.

Made once for a batch and handed on. Maps of classes come in two forms: [B, K - 1, H, W], a channel for each foreground
class, and [B, S, H, W], a channel for each slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conventions import IGNORE


@dataclass(frozen=True)
class ClassSlots:
    """Which classes each image shows, and where.

    Attributes:
        classes: [B, S] int64, indices in 0..K-2 of the foreground classes that each image shows, ascending, then some
            that it does not show. At least one slot.
        present: [B, S] bool, which of them it shows.
        count: K - 1.
    """

    classes: Tensor
    present: Tensor
    count: int

    @classmethod
    def of(cls, cls_labels: Tensor, limit: int | None = None) -> ClassSlots:
        """cls_labels: [B, K - 1] multi-hot (bool, integers or floats above 0).

        S is the largest number of classes in one image. That number is read on the CPU; on a GPU the host would have to
        wait for it, so S is ``limit`` (a number that no image exceeds), or without one K - 1.

        Raises:
            ValueError: no [B, K - 1].
        """
        if cls_labels.ndim != 2 or 0 in cls_labels.shape:
            raise ValueError(f"cls_labels: expected [B, K - 1], got {list(cls_labels.shape)}")
        present, count = cls_labels > 0, cls_labels.shape[1]
        if cls_labels.device.type == "cpu":
            slots = max(int(present.sum(1).amax()), 1)
        else:
            slots = min(max(limit or count, 1), count)
        if slots == count:
            return cls(torch.arange(count, device=present.device).expand_as(present), present, count)
        classes = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :slots]
        return cls(classes, present.gather(1, classes), count)

    @property
    def everything(self) -> bool:
        """A slot for every class, in their order."""
        return self.classes.shape[1] == self.count

    @property
    def with_background(self) -> Tensor:
        """[B, 1 + S] bool: ``present``, the background before it."""
        return F.pad(self.present, (1, 0), value=True)

    def pick(self, maps: Tensor) -> Tensor:
        """[B, K - 1, H, W] -> [B, S, H, W]: the channels of the slots."""
        if maps.shape[1] != self.count:
            raise ValueError(f"maps: expected {self.count} channels, one for each class, got {maps.shape[1]}")
        if self.everything:
            return maps
        return maps.gather(1, self.classes[:, :, None, None].expand(-1, -1, *maps.shape[2:]))

    def spread(self, maps: Tensor) -> Tensor:
        """[B, S, H, W] -> [B, K - 1, H, W]; 0 for classes that have no slot."""
        batch, _, height, width = maps.shape
        everywhere = maps.new_zeros(batch, self.count, height, width)
        return everywhere.scatter_(1, self.classes[:, :, None, None].expand_as(maps), maps)

    def name(self, labels: Tensor) -> Tensor:
        """Labels that number the slots from 1 (0 background, ``IGNORE``) [B, H, W] -> that number the classes."""
        names = F.pad(self.classes + 1, (1, 0))
        known = labels != IGNORE
        named = names.gather(1, torch.where(known, labels, 0).flatten(1)).view_as(labels)
        return torch.where(known, named, IGNORE)

    def alone(self, image: int, maps: Tensor | None) -> tuple[ClassSlots, Tensor | None]:
        """One image's slots as they would be without the others of the batch; and its maps, of [B, S, H, W], in them:
        [1, S', H, W].
        """
        wanted = self.present[image].nonzero().flatten()
        if not len(wanted):  # one slot at least
            wanted = wanted.new_zeros(1)
        slots = ClassSlots(self.classes[image, wanted][None], self.present[image, wanted][None], self.count)
        if maps is None:
            return slots, None
        own = maps[image : image + 1]
        return slots, own if len(wanted) == maps.shape[1] else own[:, wanted]

    def rows(self, images: list[int]) -> ClassSlots:
        """The slots of some images of the batch."""
        return ClassSlots(
            torch.stack([self.classes[i] for i in images]), torch.stack([self.present[i] for i in images]), self.count
        )
