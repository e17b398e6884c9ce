"""What a forward does besides its result, or does only later, keeps the kernels out of its place."""

from __future__ import annotations

import pytest
import torch
from support.clients import client
from support.common import relative_error
from torch import nn

from afa_kernels import compat

RETURNED = "            masks = (around(masks, self.dilations) * weights[:, None]).sum(2)\n        return masks\n"
LOOP = RETURNED.replace("        return masks\n", "")
NUMBERS = "        self.w1, self.w2 = 0.3, 0.01\n"


@pytest.fixture(autouse=True)
def put_back():
    yield
    compat.unpatch()


def patched(*changes):
    """An instance of a copy that differs so, what serves its class, and its own forward."""
    place = {"__name__": "their_repo.par"}
    exec(client(*changes), place)
    module = place["PAR"]
    rows = compat.patch(verbose=False)
    (row,) = (row for row in rows if row.owner is module)
    theirs = module([1, 2], 2)
    return theirs, row.served, lambda *given: row.served.theirs(theirs, *given)


def returning(expression: str) -> tuple[str, str]:
    return RETURNED, RETURNED.replace("return masks", f"return {expression}")


def pair(rng):
    return torch.rand(2, 3, 19, 26, generator=rng), torch.rand(2, 4, 19, 26, generator=rng)


def counts(served) -> tuple[int, int]:
    return served.calls, served.kept


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("made", ["nn.Parameter(torch.zeros(1))", "torch.zeros(1, requires_grad=True)"])
def test_what_learns_in_it_goes_on_learning(rng, made, grads):
    """Nothing of the result shows this parameter, which starts at 0."""
    changes = (NUMBERS, f"{NUMBERS}        self.gamma = {made}\n"), returning("masks + self.gamma * masks ** 2")
    theirs, served, own = patched(*changes)
    image, scores = pair(rng)
    out = theirs(image, scores.requires_grad_(grads))
    assert out.requires_grad and counts(served) == (0, 1)
    out.sum().backward()
    assert theirs.gamma.grad is not None
    with torch.no_grad():  # there it is a number
        assert relative_error(theirs(image, scores), own(image, scores)) < 1e-4
    assert counts(served) == (1, 1)


def test_a_parameter_that_nothing_depends_on_is_no_hindrance(rng):
    theirs, served, _ = patched((NUMBERS, f"{NUMBERS}        self.gamma = nn.Parameter(torch.zeros(1))\n"))
    image, scores = pair(rng)
    theirs(image, scores.requires_grad_()).sum().backward()
    assert counts(served) == (1, 0) and scores.grad is not None


def test_a_tensor_in_anothers_place_is_another(rng):
    """Each number is at the address of the one before the last."""
    changes = (NUMBERS, f"{NUMBERS}        self.scale = torch.tensor(1.0)\n"), returning("masks * self.scale")
    theirs, served, own = patched(*changes)
    given = pair(rng)
    for step in range(6):
        theirs.scale = torch.tensor(float(max(step, 1)))
        assert relative_error(theirs(*given), own(*given)) < 1e-4
    assert counts(served) == (2, 4)
    theirs.scale = torch.ones(())
    theirs(*given)
    theirs.scale.data.fill_(3)  # which no version shows
    assert torch.equal(theirs(*given), own(*given))


def test_a_large_tensor_in_anothers_place_is_another(rng):
    changes = (NUMBERS, f"{NUMBERS}        self.scale = torch.ones(5000)\n"), returning("masks * self.scale.mean()")
    theirs, _, own = patched(*changes)
    given = pair(rng)
    for step in range(8):
        theirs.scale = None if step % 2 else torch.full((5000,), float(1 + step // 2))
        if theirs.scale is not None:
            assert relative_error(theirs(*given), own(*given)) < 1e-4


def test_hooks_within_it_are_called(rng):
    place = {"__name__": "their_repo.pamr"}
    exec(client(), place)
    rows = compat.patch(verbose=False)
    (row,) = (row for row in rows if row.owner is place["PAMR"])
    theirs, given, seen = place["PAMR"](2, [1]), pair(rng), []
    theirs(*given)
    handle = theirs.aff_x.register_forward_hook(lambda *_: seen.append(1))
    theirs(*given)
    theirs(*given)
    assert len(seen) == 2 and counts(row.served) == (1, 2)
    handle.remove()
    theirs.register_forward_hook(lambda *_: seen.append(1))  # its own is called all the same
    theirs(*given)
    assert len(seen) == 3 and counts(row.served) == (2, 2)


def test_what_it_writes_is_written(rng, capsys):
    theirs, served, own = patched(returning("masks if imgs.mul_(0.5) is None else masks"))
    image, scores = pair(rng)
    halved = image / 2
    theirs(image, scores)
    assert torch.equal(image, halved) and counts(served) == (0, 1)
    assert "it writes into its arguments" in capsys.readouterr().err


def test_what_it_keeps_in_a_dictionary_is_kept(rng, capsys):
    kept = (NUMBERS, f"{NUMBERS}        self.seen = {{}}\n"), returning("self.seen.setdefault(len(self.seen), masks)")
    theirs, served, _ = patched(*kept)
    given = pair(rng)
    theirs.seen.clear()
    for call in range(1, 4):
        assert theirs(*given).shape == given[1].shape
        assert counts(served) == (0, call)
    assert "a call changes the instance" in capsys.readouterr().err


@pytest.mark.parametrize("drawn", ["masks if len(torch.rand(3)) else masks", "F.dropout(masks, 0.1)"])
def test_random_numbers_are_drawn_as_without_us(rng, capsys, drawn):
    theirs, served, own = patched(returning(drawn))
    given = pair(rng)
    torch.manual_seed(3)
    want = own(*given), torch.rand(1)
    torch.manual_seed(3)
    got = theirs(*given), torch.rand(1)
    assert all(map(torch.equal, got, want)) and counts(served) == (0, 1)
    assert "it draws random numbers" in capsys.readouterr().err


def test_a_proof_draws_none(rng):
    theirs, served, _ = patched()
    given, before = pair(rng), torch.get_rng_state()
    theirs(*given)
    assert torch.equal(before, torch.get_rng_state()) and counts(served) == (1, 0)


@pytest.mark.parametrize("cut", ["clamp(min=0)", "clamp(max=1)", "abs()"])
def test_what_is_cut_off_later_shows_at_once(rng, cut):
    theirs, served, own = patched((LOOP, f"            masks = masks.{cut}\n{LOOP}"))
    image, scores = pair(rng)
    for given in (scores, 3 * scores - 1):
        assert torch.equal(theirs(image, given), own(image, given))
    assert counts(served) == (0, 2)


def test_scores_far_from_0_hide_no_difference(rng):
    """Averages of 10,000.5 are all nearly that."""
    theirs, served, own = patched(("kappa.mean(1)", "kappa.mean(1) * 0.1"), ("self.w2 * self.far()", "0.01 / 16"))
    image, scores = pair(rng)
    scores = scores + 10_000
    assert torch.equal(theirs(image, scores), own(image, scores)) and counts(served) == (0, 1)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_first_score_that_is_no_number_spoils_no_proof(rng, odd):
    theirs, served, _ = patched()
    image, scores = pair(rng)
    theirs(image, scores.index_fill(3, torch.tensor([3]), odd))
    theirs(image, scores)
    assert counts(served) == (2, 0)


def test_what_no_small_image_can_be_made_of_is_theirs(rng, capsys):
    theirs, _, own = patched(("imgs, masks = self.resized(imgs, masks)", "masks = torch.view_as_real(masks).sum(-1)"))
    image, scores = pair(rng)
    given = image, torch.complex(scores, scores)
    assert torch.equal(theirs(*given), own(*given))
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "aminmax" in line]) == 1 and max(map(len, said)) < 400


def test_the_default_device_is_not_the_proofs(rng):
    theirs, served, _ = patched(
        ("torch.tensor([2, 1, 2, 1, 1, 2, 1, 2.0])", "torch.tensor([2, 1, 2, 1, 1, 2, 1, 2.0], device=self.place)"),
        (NUMBERS, f'{NUMBERS}        self.place = "cpu"\n'),
    )
    given = pair(rng)
    theirs.place = "cpu"
    with torch.device("meta"):
        assert theirs(*given).device.type == "cpu"
    assert counts(served) == (1, 0)


def test_replicas_of_another_class_are_proven_by_themselves(rng):
    theirs, served, _ = patched()
    given = pair(rng)
    other = type("Other", (type(theirs),), {"far": lambda self: 0.5})([1, 2], 2)
    for each in (theirs, other):
        replica = each._replicate_for_data_parallel()
        assert relative_error(replica(*given), served.theirs(each, *given)) < 1e-4
    assert counts(served) == (1, 1)


def test_a_wrapper_around_it_does_not_outlive_unpatch(rng):
    theirs, served, _ = patched()
    given, inner = pair(rng), type(theirs).forward
    type(theirs).forward = lambda *arguments: inner(*arguments)
    theirs(*given)
    compat.unpatch()
    theirs(*given)
    assert counts(served) == (1, 0)


def test_a_class_that_forbids_it_can_still_be_made(capsys):
    class Frozen(type):
        def __setattr__(cls, name, value):
            raise AttributeError("frozen")

    compat.patch()

    class PAR(nn.Module, metaclass=Frozen):
        def forward(self, imgs, masks):
            return masks

    assert "alone: its forward cannot be replaced (frozen)" in capsys.readouterr().err
    assert not hasattr(PAR.forward, "afa_served")


def test_an_interrupt_in_a_proof_is_only_that(rng):
    theirs, served, own = patched(returning("self.end(masks)"))
    given = pair(rng)

    def interrupt(masks):
        raise KeyboardInterrupt

    type(theirs).end = staticmethod(interrupt)
    with pytest.raises(KeyboardInterrupt):
        theirs(*given)
    type(theirs).end = staticmethod(lambda masks: masks)
    assert relative_error(theirs(*given), own(*given)) < 1e-4 and counts(served) == (1, 0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_it_finds_its_own_names(rng, tmp_path, monkeypatch):
    source = "import torch.nn.functional as F\nfrom torch import nn\nclass PAR(nn.Module):\n"
    source += "    def forward(self, imgs, masks):\n        return F.avg_pool2d(masks, 3, 1, 1)\n"
    (tmp_path / "their_scripted_par.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    compat.patch(verbose=False)
    import their_scripted_par

    assert hasattr(their_scripted_par.PAR.forward, "afa_served")
    image, scores = pair(rng)
    assert torch.jit.script(their_scripted_par.PAR())(image, scores).shape == scores.shape
