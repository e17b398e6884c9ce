"""Replacing the published classes in other repositories' modules."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from afa_kernels import PAMR, PAR, compat

# Stand-ins with the published constructors, forwards and state keys; the mathematics is none of theirs.
THEIRS = """
import torch
from torch import nn
import torch.nn.functional as F

class _Keys(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.register_buffer("kernel", torch.zeros(rows, 1, 3, 3))

class PAR(nn.Module):
    def __init__(self, dilations, num_iter):
        super().__init__()
        self.register_buffer("kernel", torch.zeros(8, 1, 3, 3))
    def forward(self, imgs, masks):
        return masks * 0

class PAMR(nn.Module):
    def __init__(self, num_iter=1, dilations=[1]):
        super().__init__()
        self.aff_x, self.aff_m, self.aff_std = _Keys(8), _Keys(8), _Keys(9)
    def forward(self, x, mask):
        return mask * 0

def refine(image, mask):
    return PAR(num_iter=2, dilations=[1, 2])(image, mask)
"""


@pytest.fixture
def theirs():
    made = []

    def make(source=THEIRS, name="their_repo.par"):
        module = types.ModuleType(name)
        exec(source, module.__dict__)
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == "builtins":
                value.__module__ = name
        sys.modules[name] = module
        made.append(name)
        return module

    yield make
    for name in made:
        del sys.modules[name]


def test_patch_replaces_in_imported_modules_and_says_so(theirs, capsys):
    module = theirs()
    old_state = {**module.PAR([1], 1).state_dict()}, {**module.PAMR().state_dict()}
    done = compat.patch()
    assert module.PAR is PAR and module.PAMR is PAMR
    printed = capsys.readouterr().out
    assert "their_repo.par.PAR -> afa_kernels.PAR" in printed and "their_repo.par.PAMR -> afa_kernels.PAMR" in printed
    image, mask = torch.rand(1, 3, 8, 9), torch.rand(1, 2, 8, 9)
    assert torch.equal(module.refine(image, mask), PAR([1, 2], 2)(image, mask))
    module.PAR([1], 1).load_state_dict(old_state[0])
    module.PAMR(2, [1, 2]).load_state_dict(old_state[1])
    done.undo()
    assert module.PAR is not PAR and not module.refine(image, mask).any()


def test_second_patch_finds_nothing(theirs, capsys):
    module = theirs()
    compat.patch(verbose=False)
    assert capsys.readouterr().out == ""
    assert compat.patch([module]) == []
    assert "found nothing to replace" in capsys.readouterr().out


def test_other_argument_names_still_work(theirs):
    module = theirs(
        THEIRS.replace("forward(self, imgs, masks)", "forward(self, image, cam)").replace("masks *", "cam *")
    )
    compat.patch([module], verbose=False)
    image, mask = torch.rand(1, 3, 8, 9), torch.rand(1, 2, 8, 9)
    want = PAR([1], 1)(image, mask)
    assert torch.equal(module.PAR([1], 1)(image=image, cam=mask), want)
    assert torch.equal(module.PAR([1], 1)(image, cam=mask), want)
    assert isinstance(module.PAR([1], 1), PAR)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("class PAR:\n    pass", "not a torch module"),
        (THEIRS.replace("dilations, num_iter)", "num_iter, dilations)"), "constructor takes \\(num_iter, dilations\\)"),
        (THEIRS.replace("dilations, num_iter)", "dilations, num_iter, weight)"), "also needs weight"),
        (THEIRS.replace("forward(self, imgs, masks)", "forward(self, imgs, masks, depth)"), "takes 3 tensors"),
    ],
)
def test_what_differs_is_left_alone_with_the_reason(theirs, capsys, source, reason):
    module = theirs(source)
    before = module.PAR
    compat.patch([module])
    assert module.PAR is before
    import re

    assert re.search(f"left their_repo.par.PAR alone: .*{reason}", capsys.readouterr().out)


def test_our_own_and_unrelated_names_are_safe():
    module = types.ModuleType("unrelated")
    module.PAR, module.PAMR = 3, nn.Linear
    done = compat.patch([module], verbose=False)
    assert module.PAR == 3 and module.PAMR is nn.Linear
    assert [row.new for row in done] == [None]
