"""Other repositories' PAR and PAMR are served in place, and only where ours is proven to give the same."""

from __future__ import annotations

import functools
import sys
import types

import pytest
import torch
from support.clients import KINDS, client
from support.common import relative_error
from torch import nn

import afa_kernels
from afa_kernels import PAMR, PAR, compat
from afa_kernels.compat import in_place


@pytest.fixture(autouse=True)
def put_back():
    yield
    compat.unpatch()
    assert "__init_subclass__" not in vars(nn.Module)


def repository(*changes, name="their_repo.par") -> types.ModuleType:
    module = types.ModuleType(name)
    exec(client(*changes), module.__dict__)
    return module


def calls(row: compat.Replacement) -> tuple[int, int]:
    return row.served.calls, row.served.kept


def pair(rng, size=(19, 26), mask=(19, 26), batches=(2, 2), channels=3) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.rand(batches[0], channels, *size, generator=rng)
    image[..., size[1] // 2 :] = 0.5 + 1e-2 * image[..., size[1] // 2 :]
    return image, torch.rand(batches[1], 4, *mask, generator=rng)


@pytest.mark.parametrize("mask", [(19, 26), (10, 13), (10, 40)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_becomes_silently_wrong(rng, capsys, kind, mask):
    changes, built, equal = KINDS[kind]
    module = repository(*changes)
    theirs = eval(built, module.__dict__)
    image, scores = pair(rng, mask=mask)
    want = theirs(image, scores)
    done = compat.patch([module], verbose=False)
    got = theirs(image, scores)
    for mine, their in zip(*((out if isinstance(out, tuple) else (out,)) for out in (got, want))):
        assert mine.shape == their.shape and mine.requires_grad == their.requires_grad
        assert relative_error(mine, their) < 1e-4
    # What is aligned otherwise differs only where something is resized.
    (row,) = (row for row in done if row.owner is type(theirs))
    equal = equal or (kind == "aligned otherwise" and mask == (19, 26))
    assert calls(row) == ((1, 0) if equal else (0, 1))
    said = capsys.readouterr().err
    name = f"{type(theirs).__module__}.{type(theirs).__qualname__} keeps its own forward: "
    assert said.count(name) == (not equal)
    theirs(image, scores)
    assert capsys.readouterr().err == ""  # once


def test_a_weight_from_the_environment_is_read_again(rng, monkeypatch):
    monkeypatch.setenv("SHARE", "0.01")
    module = repository(("self.w2 * self.far()", 'float(os.environ["SHARE"]) * self.far()'))
    (row, _) = compat.patch([module], verbose=False)
    theirs, given = module.PAR([1, 2], 2), pair(rng)
    assert relative_error(theirs(*given), row.served.theirs(theirs, *given)) < 1e-4 and calls(row) == (1, 0)
    monkeypatch.setenv("SHARE", "0.3")
    assert torch.equal(theirs(*given), row.served.theirs(theirs, *given)) and calls(row) == (1, 1)


def test_numbers_that_are_changed_count_from_then_on(rng):
    module = repository()
    (row, _) = compat.patch([module], verbose=False)
    theirs, given = module.PAR([1], 1), pair(rng)
    for change in ({}, {"num_iter": 4}, {"dilations": [2, 3]}, {"w1": 0.6}, {"w2": 0.5}):
        vars(theirs).update(change)
        assert relative_error(theirs(*given), row.served.theirs(theirs, *given)) < 1e-4
    assert calls(row) == (5, 0)


def test_numbers_of_the_class_count_too(rng):
    module = repository(("        self.num_iter = num_iter\n", "        type(self).num_iter = num_iter\n"))
    (row, _) = compat.patch([module], verbose=False)
    theirs, given = module.PAR([1], 1), pair(rng)
    theirs(*given)
    module.PAR.num_iter = 4
    assert relative_error(theirs(*given), row.served.theirs(theirs, *given)) < 1e-4 and calls(row) == (2, 0)


@pytest.mark.parametrize(
    "how",
    [
        {"channels": 1},
        {"channels": 4},
        {"batches": (1, 3)},
        {"batches": (3, 1)},
        {"size": (5, 3), "mask": (5, 3)},
        {"mask": (1, 1)},
    ],
    ids=str,
)
def test_other_channels_batches_and_sizes_follow_theirs(rng, how):
    module = repository()
    compat.patch([module], verbose=False)
    for theirs in (module.PAR([1, 2], 2), module.PAMR(2, [1, 2])):
        given = pair(rng, **how)
        want = type(theirs).forward.afa_served.theirs(theirs, *given)
        got = theirs(*given)
        assert got.shape == want.shape and relative_error(got, want) < 1e-4


def test_a_proof_is_for_its_number_of_channels(rng):
    """This copy looks at three channels, whatever there are."""
    module = repository(("kappa.mean(1)", "kappa[:, :3].mean(1)"))
    (row, _) = compat.patch([module], verbose=False)
    theirs = module.PAR([1, 2], 2)
    for channels, counts in ((3, (1, 0)), (5, (1, 1)), (1, (2, 1))):
        given = pair(rng, channels=channels)
        assert relative_error(theirs(*given), row.served.theirs(theirs, *given)) < 1e-4 and calls(row) == counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_follow_theirs(rng, dtype):
    module = repository()
    compat.patch([module], verbose=False)
    image, scores = pair(rng)
    for theirs in (module.PAR([1, 2], 2), module.PAMR(2, [1, 2])):
        for given in ((image.to(dtype), scores), (image, scores.to(dtype)), (image.to(dtype), scores.to(dtype))):
            try:
                want = type(theirs).forward.afa_served.theirs(theirs, *given)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    theirs(*given)
                continue
            got = theirs(*given)
            assert got.dtype == want.dtype and relative_error(got.double(), want.double()) < 1e-4


def test_autocast_follows_theirs(rng):
    """Where theirs sums by a matrix product, autocast gives another dtype."""
    steps = ("(around(masks, self.dilations) * weights[:, None]).sum(2)",
             'torch.einsum("bcthw,bthw->bchw", around(masks, self.dilations), weights)')  # fmt: skip
    module = repository(steps)
    (row, _) = compat.patch([module], verbose=False)
    given = pair(rng)
    theirs = module.PAR([1, 2], 2)
    theirs(*given)
    assert calls(row) == (1, 0)
    with torch.autocast("cpu", torch.bfloat16):
        want = row.served.theirs(theirs, *given)
        got = theirs(*given)
    assert got.dtype == want.dtype == torch.bfloat16 and torch.equal(got, want)


def test_gradients_are_theirs(rng):
    module = repository()
    (row, _) = compat.patch([module], verbose=False)
    image, scores = (value.requires_grad_() for value in pair(rng))
    theirs = module.PAR([1, 2], 2)
    wanted = torch.autograd.grad(row.served.theirs(theirs, image, scores).square().sum(), (image, scores))
    found = torch.autograd.grad(theirs(image, scores).square().sum(), (image, scores))
    assert calls(row) == (1, 0)
    assert all(relative_error(mine, their) < 1e-3 for mine, their in zip(found, wanted))


def test_every_way_of_importing_follows(rng, monkeypatch):
    module = repository()
    alias, registry, bound = module.PAR, {"refine": module.PAR}, functools.partial(module.PAR, num_iter=2)

    class Sub(module.PAR):
        pass

    class Calling(module.PAR):
        def forward(self, imgs, masks):
            return 2 * super().forward(imgs, masks)

    class Model(nn.Module):
        refine_class = module.PAR

        def __init__(self, refine=module.PAR):
            super().__init__()
            self.refine, self.other = refine([1, 2], 2), self.refine_class([1, 2], 2)

    existing = module.PAR([1, 2], 2)
    (row, _) = compat.patch([module], verbose=False)
    given = pair(rng)
    want = row.served.theirs(existing, *given)
    model = Model()
    served = [existing, alias([1, 2], 2), registry["refine"]([1, 2], 2), bound([1, 2]), Sub([1, 2], 2)]
    for count, theirs in enumerate([*served, model.refine, model.other], 1):
        assert relative_error(theirs(*given), want) < 1e-4 and calls(row) == (count, 0)
    assert relative_error(Calling([1, 2], 2)(*given), 2 * want) < 1e-4 and row.served.calls == 8
    assert relative_error(existing(masks=given[1], imgs=given[0]), want) < 1e-4


def test_classes_made_later_are_served_everywhere(rng, capsys):
    existing = repository(name="imported.before")
    done = compat.patch()  # also what other tests have left
    capsys.readouterr()
    assert existing.PAR in [row.owner for row in done]
    before = len(done)
    module = repository(name="imported.later")
    assert [row.owner for row in done[before:]] == [module.PAR, module.PAMR]
    assert "PAR is served by the kernels where they are proven to give the same" in capsys.readouterr().err
    module.PAR([1], 1)(*pair(rng))
    assert calls(done[before]) == (1, 0) and done[before].served in compat.served()
    done.undo()
    assert compat.served() == []
    assert not hasattr(module.PAR.forward, "afa_served") and not hasattr(existing.PAR.forward, "afa_served")
    assert not hasattr(repository().PAR.forward, "afa_served")


def test_patching_twice_serves_once(rng):
    module = repository()
    first, second = compat.patch([module], verbose=False), compat.patch([module], verbose=False)
    assert len(first) == 2 and len(second) == 0
    original = first[0].served.theirs
    compat.unpatch()
    assert module.PAR.forward is original


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("def forward(self, imgs, masks)", "def forward(self, imgs, masks, depth)"), "takes 3 tensors"),
        (("def forward(self, imgs, masks)", "def forward(self, *tensors)"), "takes 0 tensors"),
    ],
)
def test_what_cannot_be_served_is_left_alone_with_the_reason(capsys, change, reason):
    module = repository(change)
    before = module.PAR.forward
    (row, _) = compat.patch([module])
    assert row.served is None and module.PAR.forward is before
    assert f"PAR alone: its forward {reason}" in capsys.readouterr().err


def test_further_arguments_go_to_their_own_forward(rng, capsys):
    module = repository(("def forward(self, imgs, masks)", "def forward(self, imgs, masks, scale=1)"))
    (row, _) = compat.patch([module], verbose=False)
    theirs, given = module.PAR([1], 1), pair(rng)
    theirs(*given)
    theirs(*given, scale=2)
    assert calls(row) == (1, 1) and "called with something else than an image and a mask" in capsys.readouterr().err
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        theirs(given[0])


def test_our_own_and_unrelated_names_are_safe():
    module = types.ModuleType("unrelated")
    module.PAR, module.PAMR, module.Linear = 3, nn.Linear, PAR
    before = nn.Linear.forward, PAR.forward, PAMR.forward
    assert list(compat.patch([module], verbose=False)) == []
    assert (nn.Linear.forward, PAR.forward, PAMR.forward) == before


def test_state_keys_attributes_and_pickles_stay_theirs():
    import pickle

    module = repository(name="tests_their_repo")
    sys.modules["tests_their_repo"] = module
    try:
        for name in ("PAR", "PAMR", "Affinity"):
            getattr(module, name).__module__ = "tests_their_repo"
        theirs = module.PAMR(2, [1, 2])
        keys = list(vars(theirs)), list(theirs.state_dict())
        compat.patch([module], verbose=False)
        theirs(torch.rand(1, 3, 8, 9), torch.rand(1, 2, 8, 9))
        assert (list(vars(theirs)), list(theirs.state_dict())) == keys
        assert b"afa_kernels" not in pickle.dumps(theirs)
    finally:
        del sys.modules["tests_their_repo"]


def proofs_counted(row: compat.Replacement) -> list:
    done, prove = [], row.served._prove
    row.served._prove = lambda *arguments: done.append(1) or prove(*arguments)
    return done


def test_an_instance_that_changes_at_every_call_keeps_its_own(rng, capsys, monkeypatch):
    monkeypatch.setattr(in_place, "MOST_CASES", 3)
    counting = "        self.seen = getattr(self, 'seen', 0) + 1\n        return masks\n"
    module = repository(("        return masks\n", counting))
    (row, _) = compat.patch([module], verbose=False)
    theirs, given, proofs = module.PAR([1], 1), pair(rng), proofs_counted(row)
    for _ in range(5):
        theirs(*given)
    assert calls(row) == (0, 5) and len(proofs) == 3, "a proof each is not worth it for ever"
    said = capsys.readouterr().err
    assert "a call changes the instance" in said and "it is called in more than 3 ways" in said


def test_replicas_share_their_proof(rng):
    """DataParallel makes new ones for each call."""
    module = repository()
    (row, _) = compat.patch([module], verbose=False)
    theirs, given, proofs = module.PAR([1], 1), pair(rng), proofs_counted(row)
    for _ in range(3):
        theirs._replicate_for_data_parallel()(*given)
    assert len(proofs) == 1 and calls(row) == (3, 0)


def test_compiled_code_keeps_its_own(rng):
    module = repository()
    (row, _) = compat.patch([module], verbose=False)
    theirs, given = module.PAR([1], 1), pair(rng)
    got = torch.compile(theirs, backend="eager")(*given)
    assert relative_error(got, row.served.theirs(theirs, *given)) < 1e-5


def test_what_the_kernels_refuse_goes_to_their_own(rng, monkeypatch, capsys):
    module = repository()
    (row, _) = compat.patch([module], verbose=False)
    theirs, given = module.PAR([1], 1), pair(rng)
    theirs(*given)

    def refuse(*_):
        raise ValueError("no")

    monkeypatch.setattr(afa_kernels.ops.par.functional, "check_images", refuse)
    assert torch.equal(theirs(*given), row.served.theirs(theirs, *given))
    assert "the kernels refuse this call (no)" in capsys.readouterr().err
