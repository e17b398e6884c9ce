"""`patch(pydensecrf=True, rloss=True)`: other repositories import ours under the names of packages they know."""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import pytest

import afa_kernels.compat.pydensecrf as ours
from afa_kernels import compat
from afa_kernels.compat import rloss

NAMES = ("pydensecrf", "pydensecrf.densecrf", "pydensecrf.utils", "bilateralfilter")

CLIENT = """
import numpy as np
import pydensecrf.densecrf as dcrf
import pydensecrf.utils as utils
from pydensecrf.utils import unary_from_softmax
from bilateralfilter import bilateralfilter, bilateralfilter_batch

def refine(image, probs):
    d = dcrf.DenseCRF2D(image.shape[1], image.shape[0], len(probs))
    d.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probs)))
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=8, srgb=60, rgbim=image, compat=4)
    return np.array(d.inference(2)).reshape(probs.shape)
"""


@pytest.fixture(autouse=True)
def imports():
    """``sys.modules`` as it was, whatever is installed here."""
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    yield
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def client(name="their_repo.crf"):
    module = types.ModuleType(name)
    exec(CLIENT, module.__dict__)
    return module


class Proxy:
    """What some frameworks have in their modules: nothing may be asked of it yet."""

    @property
    def __module__(self):
        raise RuntimeError("outside of a request")


def theirs():
    """The packages as if they were installed, with something to be told from ours by."""
    made = {name: types.ModuleType(name) for name in NAMES}
    made["pydensecrf"].__path__ = []
    made["pydensecrf"].densecrf, made["pydensecrf"].utils = made["pydensecrf.densecrf"], made["pydensecrf.utils"]
    for home, name in (("pydensecrf.densecrf", "DenseCRF2D"), ("pydensecrf.densecrf", "other"),
                       ("pydensecrf.utils", "unary_from_softmax"), ("bilateralfilter", "bilateralfilter"),
                       ("bilateralfilter", "bilateralfilter_batch")):  # fmt: skip

        def function(*_):
            raise AssertionError("theirs")

        function.__name__, function.__module__ = name, home
        setattr(made[home], name, function)
    # SWIG's wrapper gives functions of its compiled half.
    made["bilateralfilter"].bilateralfilter_batch.__module__ = "_bilateralfilter"
    sys.modules.update(made)
    return made


def test_a_client_runs_where_the_packages_are_not_installed():
    with pytest.raises(ImportError):
        client()
    done = compat.patch([], pydensecrf=True, rloss=True, verbose=False)
    module = client()
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (7, 9, 3)).astype(np.uint8)
    probs = random.random((3, 7, 9)).astype(np.float32)
    probs /= probs.sum(0)
    refined = module.refine(image, probs)
    assert np.abs(refined.sum(0) - 1).max() < 1e-5 and np.abs(refined - probs).max() > 0.01
    assert module.dcrf is ours.densecrf and module.bilateralfilter_batch is rloss.bilateralfilter_batch
    assert importlib.import_module("pydensecrf").utils is ours.utils
    done.undo()
    assert not set(NAMES) & set(sys.modules)
    with pytest.raises(ImportError):
        client()


def test_modules_that_have_imported_theirs_get_ours(capsys):
    made = theirs()
    module = client()
    module.other = made["pydensecrf.densecrf"].other
    module.proxy = Proxy()
    done = compat.patch([module], pydensecrf=True, rloss=True)
    said = capsys.readouterr().err
    assert module.dcrf is ours.densecrf and module.utils is ours.utils
    assert module.unary_from_softmax is ours.utils.unary_from_softmax
    assert module.bilateralfilter is rloss.bilateralfilter
    assert module.bilateralfilter_batch is rloss.bilateralfilter_batch
    assert module.other is made["pydensecrf.densecrf"].other, "what we have not stays theirs"
    assert "their_repo.crf.dcrf -> afa_kernels.compat.pydensecrf.densecrf" in said
    assert "import pydensecrf.densecrf -> afa_kernels.compat.pydensecrf.densecrf" in said
    assert "their_repo.crf.unary_from_softmax -> afa_kernels.compat.pydensecrf.utils.unary_from_softmax" in said
    assert made["pydensecrf"].densecrf is made["pydensecrf.densecrf"], "their package itself stays as it is"
    assert client("later").dcrf is ours.densecrf
    assert compat.patch([module], pydensecrf=True, rloss=True, verbose=False) == []
    done.undo()
    assert module.dcrf is made["pydensecrf.densecrf"] and sys.modules["pydensecrf"] is made["pydensecrf"]
    assert module.bilateralfilter_batch is made["bilateralfilter"].bilateralfilter_batch


@pytest.mark.parametrize(("asked", "kept"), [("pydensecrf", "bilateralfilter"), ("rloss", "pydensecrf")])
def test_only_what_is_asked_for_is_replaced(asked, kept):
    made = theirs()
    module = client()
    compat.patch([module], verbose=False)
    assert module.dcrf is made["pydensecrf.densecrf"] and sys.modules["pydensecrf"] is made["pydensecrf"]
    compat.patch([module], **{asked: True}, verbose=False)
    assert sys.modules[kept] is made[kept]
    assert (module.dcrf is ours.densecrf) == (asked == "pydensecrf")
    assert (module.bilateralfilter is rloss.bilateralfilter) == (asked == "rloss")
