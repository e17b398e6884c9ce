"""Other repositories in small: copies of PAR and PAMR as they differ from each other, in plain PyTorch."""

from __future__ import annotations

PLAIN = '''
import os
import torch
import torch.nn.functional as F
from torch import nn

def around(x, dilations):
    height, width = x.shape[2:]
    found = []
    for d in dilations:
        wide = F.pad(x, [d] * 4, mode="replicate")
        for dy in (0, d, 2 * d):
            for dx in (0, d, 2 * d):
                if (dy, dx) != (d, d):
                    found.append(wide[:, :, dy : dy + height, dx : dx + width])
    return torch.stack(found, 2)

class PAR(nn.Module):
    def __init__(self, dilations, num_iter):
        super().__init__()
        self.dilations = dilations
        self.num_iter = num_iter
        self.w1, self.w2 = 0.3, 0.01

    def resized(self, imgs, masks):
        return imgs, F.interpolate(masks, imgs.shape[2:], mode="bilinear", align_corners=True)

    def far(self):
        ring = torch.tensor([2, 1, 2, 1, 1, 2, 1, 2.0]).sqrt()
        far = torch.cat([ring * d for d in self.dilations])
        return torch.softmax(-((far / (far.std() + 1e-8) / self.w1) ** 2), 0)[:, None, None]

    def forward(self, imgs, masks):
        imgs, masks = self.resized(imgs, masks)
        near = around(imgs, self.dilations)
        deviation = near.std(2, keepdim=True)
        kappa = -(((near - imgs[:, :, None]).abs() / (deviation + 1e-8) / self.w1) ** 2)
        weights = torch.softmax(kappa.mean(1), 1) + self.w2 * self.far()
        for _ in range(self.num_iter):
            masks = (around(masks, self.dilations) * weights[:, None]).sum(2)
        return masks

class Affinity(nn.Module):
    def __init__(self, dilations):
        super().__init__()
        self.dilations = dilations

    def forward(self, x):
        near = around(x, self.dilations)
        centre = x[:, :, None]
        every = torch.cat([near, centre.expand(-1, -1, len(self.dilations), -1, -1)], 2)
        return -((near - centre).abs() / (1e-8 + 0.1 * every.std(2, keepdim=True)))

class PAMR(nn.Module):
    def __init__(self, num_iter=1, dilations=[1]):
        super().__init__()
        self.num_iter = num_iter
        self.aff_x = Affinity(dilations)

    def forward(self, x, mask):
        mask = F.interpolate(mask, x.shape[2:], mode="bilinear", align_corners=True)
        weights = torch.softmax(self.aff_x(x).mean(1), 1)[:, None]
        for _ in range(self.num_iter):
            mask = (around(mask, self.aff_x.dilations) * weights).sum(2)
        return mask
'''


def client(*changes: tuple[str, str]) -> str:
    """The source of a repository whose copy differs so."""
    source = PLAIN
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return source


MASK_TO_IMAGE = "return imgs, F.interpolate(masks, imgs.shape[2:], mode=\"bilinear\", align_corners=True)"
IMAGE_TO_MASK = "return F.interpolate(imgs, masks.shape[2:], mode=\"bilinear\", align_corners=True), masks"
FIXED = "def __init__(self, dilations, num_iter):"

# Kind -> the changes, how it is built, and whether ours may serve it.
KINDS: dict[str, tuple[list[tuple[str, str]], str, bool]] = {
    "published": ([], "PAR([1, 2], 3)", True),
    "PAMR": ([], "PAMR(3, [1, 2])", True),
    "image resized to the mask": ([(MASK_TO_IMAGE, IMAGE_TO_MASK)], "PAR([1, 2], 3)", True),
    "defaults of its own": ([(FIXED, "def __init__(self, num_iter=4, dilations=[1, 2, 4]):")], "PAR()", True),
    "no position term": ([(" + self.w2 * self.far()", "")], "PAR([1, 2], 3)", True),
    "other weights": ([("0.3, 0.01", "0.5, 0.2")], "PAR([1, 2], 3)", True),
    "an iteration more": ([("range(self.num_iter)", "range(self.num_iter + 1)")], "PAR([1, 2], 3)", False),
    "aligned otherwise": ([("align_corners=True", "align_corners=False")], "PAR([1, 2], 3)", False),
    "another softening of flat places": ([("(deviation + 1e-8)", "(deviation + 3e-5)")], "PAR([1, 2], 3)", False),
    "masks that are scaled": ([("        return masks\n", "        return masks / masks.amax()\n")],
                              "PAR([1, 2], 3)", False),
    "no gradient": ([("    def forward(self, imgs", "    @torch.no_grad()\n    def forward(self, imgs")],
                    "PAR([1, 2], 3)", True),
    "a pair": ([("        return masks\n", "        return masks, weights\n")], "PAR([1, 2], 3)", False),
    "numbers under other names": ([("self.num_iter", "self.steps")], "PAR([1, 2], 3)", False),
}  # fmt: skip
