"""A folder of small repositories, one for each kind of copy and each style of importing, and a script that runs all."""

from __future__ import annotations

from pathlib import Path

from support.clients import KINDS, client

# How the published copy, which is in copies/PAR.py, is come by: each gives ``refine``, built with [1, 2] and 3.
STYLES = {
    "from_import": "from copies.PAR import PAR\nrefine = PAR([1, 2], 3)\n",
    "import_module": "import copies.PAR\nrefine = copies.PAR.PAR(num_iter=3, dilations=[1, 2])\n",
    "star": "from copies.PAR import *\nrefine = PAR([1, 2], 3)\n",
    "renamed": "from copies.PAR import PAR as Refinement\nrefine = Refinement([1, 2], 3)\n",
    "renamed_module": "import copies.PAR as RefineModule\nrefine = RefineModule.PAR([1, 2], 3)\n",
    "registry": "import copies.PAR\nREGISTRY = {'par': copies.PAR.PAR}\nrefine = REGISTRY['par']([1, 2], 3)\n",
    "partial": "import functools\nfrom copies.PAR import PAR\nrefine = functools.partial(PAR, num_iter=3)([1, 2])\n",
    "class_attribute": """
from copies.PAR import PAR

class Model:
    refinement = PAR

    def __init__(self):
        self.par = self.refinement([1, 2], 3)

refine = Model().par
""",
    "default_argument": """
from copies.PAR import PAR

def build(kind=PAR):
    return kind([1, 2], 3)

refine = build()
""",
    "subclass": "from copies.PAR import PAR\n\nclass Own(PAR):\n    pass\n\nrefine = Own([1, 2], 3)\n",
    "subclass_of_its_name": "import copies.PAR\n\nclass PAR(copies.PAR.PAR):\n    pass\n\nrefine = PAR([1, 2], 3)\n",
    "subclass_with_forward": """
from copies.PAR import PAR

class Own(PAR):
    def forward(self, imgs, masks):
        return super().forward(imgs, masks) / 2

refine = Own([1, 2], 3)
""",
    "local": """
def refine(imgs, masks):
    from copies.PAR import PAR
    return PAR([1, 2], 3)(imgs, masks)
""",
    "late": """
import importlib

def refine(imgs, masks):
    return importlib.import_module("copies.PAR_late").PAR([1, 2], 3)(imgs, masks)
""",
    "from_source": """
import pathlib

exec(pathlib.Path(__file__).with_name("PAR.py").read_text())
refine = PAR([1, 2], 3)
""",
    "deep_copy": "import copy\nfrom copies.PAR import PAR\nrefine = copy.deepcopy(PAR([1, 2], 3))\n",
    "sequential": """
from torch import nn
from copies.PAR import PAMR

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"refine": PAMR(num_iter=3, dilations=[1, 2])})

    def forward(self, imgs, masks):
        return self.parts["refine"](imgs, mask=masks)

refine = Head()
""",
}

CRF = """
import numpy as np
import pydensecrf.densecrf as dcrf
import pydensecrf.densecrf as DCRF
from pydensecrf import densecrf
import pydensecrf.utils as utils
from pydensecrf.utils import unary_from_softmax
from pydensecrf.utils import unary_from_labels, create_pairwise_bilateral, create_pairwise_gaussian
from bilateralfilter import bilateralfilter, bilateralfilter_batch

def crf_inference(img, probs, t=10, scale_factor=1, labels=21):
    h, w = img.shape[:2]
    d = dcrf.DenseCRF2D(w, h, labels)
    d.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probs)))
    d.addPairwiseGaussian(sxy=3 / scale_factor, compat=3)
    d.addPairwiseBilateral(sxy=80 / scale_factor, srgb=13, rgbim=np.copy(img), compat=10)
    return np.array(d.inference(t), dtype=np.float32).reshape((labels, h, w))

def crf_inference_label(img, labels, t=10, n_labels=21, gt_prob=0.7):
    h, w = img.shape[:2]
    d = DCRF.DenseCRF2D(w, h, n_labels)
    d.setUnaryEnergy(unary_from_labels(labels, n_labels, gt_prob=gt_prob, zero_unsure=False))
    d.addPairwiseGaussian(sxy=3, compat=3, kernel=dcrf.DIAG_KERNEL, normalization=dcrf.NORMALIZE_SYMMETRIC)
    d.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.ascontiguousarray(img), compat=10)
    return np.argmax(d.inference(t), axis=0).reshape(h, w)

def general(img, probs):
    h, w = img.shape[:2]
    d = densecrf.DenseCRF(h * w, len(probs))
    d.setUnaryEnergy(np.ascontiguousarray(utils.unary_from_softmax(probs)))
    d.addPairwiseEnergy(create_pairwise_gaussian(sdims=(3, 3), shape=img.shape[:2]), compat=3)
    d.addPairwiseEnergy(create_pairwise_bilateral(sdims=(8, 8), schan=(13, 13, 13), img=img, chdim=2), compat=10)
    return np.array(d.inference(5)).reshape(probs.shape)

def run(img, probs):
    several = np.zeros((1, *probs.shape), np.float32).ravel()
    planar = img.transpose(2, 0, 1).astype(np.float32)
    sizes = len(probs), *img.shape[:2]
    bilateralfilter_batch(planar.ravel(), probs.ravel(), several, 1, *sizes, 15.0, 50.0)
    one = np.zeros_like(several)
    bilateralfilter(planar.ravel(), probs.ravel(), one, *sizes[1:], 15.0, 50.0)
    labels = crf_inference_label(img, probs.argmax(0), 3, len(probs))
    return [crf_inference(img, probs, 3, labels=len(probs)), labels, general(img, probs), several, one]
"""

TRAIN = """
import importlib
import os
import sys
import numpy as np
import torch

torch.manual_seed(0)
image = torch.rand(2, 3, 19, 26)
image[..., 13:] = 0.5 + 1e-2 * image[..., 13:]
sizes = {"alike": (19, 26), "smaller": (10, 13), "wider": (10, 40)}
masks = {name: torch.rand(2, 4, *size) for name, size in sizes.items()}

def tried(refine):
    out = {name: refine(image, mask) for name, mask in masks.items()}
    out["one channel"] = refine(image[:, :1], masks["alike"])
    out["one image"] = refine(image[:1], masks["alike"])
    out["one mask"] = refine(image, masks["smaller"][:1])
    with torch.autocast("cpu", torch.bfloat16):
        out["autocast"] = refine(image, masks["alike"])
    return out

results = {name: tried(importlib.import_module("copies." + name).refine) for name in STYLES}
for number, (built, _) in enumerate(KINDS):
    module = importlib.import_module(f"copies.kind{number}")
    results[f"kind{number}"] = tried(eval(built, vars(module)))
fickle = importlib.import_module("copies.environment").PAR([1, 2], 3)
for weight in ("0.4", "0.7"):
    os.environ["PAR_WEIGHT"] = weight
    results["environment " + weight] = tried(fickle)
if len(sys.argv) > 2:
    crf = importlib.import_module("copies.crf")
    probs = torch.rand(4, 20, 28).mul(3).softmax(0).numpy()
    results["crf"] = crf.run((255 * torch.rand(20, 28, 3)).to(torch.uint8).numpy(), probs)
torch.save(results, sys.argv[1])
print("trained, as", __name__)
"""


def write(folder: Path) -> Path:
    """The folder, filled."""
    copies = folder / "copies"
    copies.mkdir()
    (copies / "__init__.py").write_text("")
    for name in ("PAR", "PAR_late"):
        (copies / f"{name}.py").write_text(client())
    for name, text in STYLES.items():
        (copies / f"{name}.py").write_text(text)
    for number, (changes, _, _) in enumerate(KINDS.values()):
        (copies / f"kind{number}.py").write_text(client(*changes))
    reading = "        self.w2 = float(os.environ.get('PAR_WEIGHT', 0.2))\n        imgs, masks = self.resized"
    (copies / "environment.py").write_text(client(("        imgs, masks = self.resized", reading)))
    (copies / "crf.py").write_text(CRF)
    kinds = [(built, served) for _, built, served in KINDS.values()]
    (folder / "train.py").write_text(f"STYLES = {list(STYLES)!r}\nKINDS = {kinds!r}\n{TRAIN}")
    return folder
