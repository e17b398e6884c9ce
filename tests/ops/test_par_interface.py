"""PAR and PAMR in PyTorch: registration, compilation, choice of backend, bad input, the modules."""

from __future__ import annotations

import pickle
import pickletools
import threading

import pytest
import torch
from support.common import DEVICE, ROOT, available
from support.par_cases import inputs, on_device
from support.running import EMULATED_CHIPS, ONE_EMULATED

import afa_kernels
from afa_kernels import PAMR, PAR, pamr, par
from afa_kernels.core import backends
from afa_kernels.ops.par import reference as par_reference

BACKENDS = available("par")
AUTOMATIC = [None, *EMULATED_CHIPS]  # where a test leaves the choice to the operator


# --- PyTorch ---


@pytest.mark.parametrize("backend", [*BACKENDS[1:], *ONE_EMULATED], indirect=True)
def test_opcheck(rng, backend, request):
    images, masks = inputs(rng, 2, 2, 3, 4)
    grad = masks.clone().requires_grad_()
    present = on_device([[True, False], [True, True]])
    leaf = images.clone().requires_grad_()
    par_factors, pamr_factors = [0.3, 0.3, 0.01], []
    cases = [
        (images, pamr_factors, present, True),
        (leaf, par_factors, None, False),
        (images, par_factors, None, False),
        (leaf, pamr_factors, None, False),
    ]
    # Registration is the same for all backends; those that are interpreted or emulated take ten times as long for it.
    slow = request.node.callspec.params["backend"] != "native" and DEVICE == "cpu"
    for x, factors, mask, transpose in cases[: 2 if slow else None]:
        torch.library.opcheck(torch.ops.afa.par, (x, grad, [1], 1, factors, mask, transpose, backend))
    for factors in (par_factors, pamr_factors)[: 1 if slow else None]:
        torch.library.opcheck(torch.ops.afa.par_weights, (leaf, [1], factors, backend))


@pytest.mark.parametrize("backend", [*BACKENDS, *ONE_EMULATED], indirect=True)
def test_compiles_without_a_graph_break(rng, backend):
    torch._dynamo.reset()  # torch 2.11 confuses functions compiled by earlier tests with this one's
    images, masks = inputs(rng, 1, 2, 9, 10)
    masks.requires_grad_()

    def step(x, m):
        return par(x, m * 2, (1, 2), 2, backend=backend).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(images, masks).backward()
    got, masks.grad = masks.grad, None
    step(images, masks).backward()
    torch.testing.assert_close(got, masks.grad)


@pytest.mark.parametrize("backend", [None, *ONE_EMULATED], indirect=True)
def test_module_compiles_and_picks_its_backend_inside(rng, backend):
    images, masks = inputs(rng, 1, 2, 9, 10)
    module = PAR([1, 2], 2)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(images, masks), module(images, masks))


@pytest.mark.parametrize("backend", AUTOMATIC, indirect=True)
def test_autocast_and_no_grad(rng, backend):
    images, masks = inputs(rng)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = par(images, masks)
    assert torch.equal(out, par(images, masks))


# --- choice of backend ---


def test_choice_of_backend(rng, monkeypatch):
    images, masks = inputs(rng)
    with pytest.raises(ValueError, match="backend must be one of native, triton, reference"):
        par(images, masks, backend="cuda")
    with pytest.raises(ValueError, match=f"native cannot run par on {DEVICE}.*: .*float64"):
        par(images.double(), masks.double(), backend="native")
    with pytest.raises(ValueError, match="name must be one of"), afa_kernels.use_backend("fast"):
        pass
    par(images, masks)  # on a GPU a backend compares itself with the reference first
    calls = []
    monkeypatch.setattr(par_reference, "refine", lambda *a: calls.append(1) or torch.zeros(1))
    with afa_kernels.use_backend("reference"):
        par(images, masks)
    assert len(calls) == 1
    monkeypatch.setenv("AFA_BACKEND", "reference")
    par(images, masks)
    assert len(calls) == 2
    with afa_kernels.use_backend("native"):
        par(images, masks)
    assert len(calls) == 2
    monkeypatch.setenv("AFA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="AFA_BACKEND must be one of"):
        par(images, masks)


@pytest.mark.parametrize("backend", AUTOMATIC, indirect=True)
def test_use_backend_reaches_compiled_code_and_this_thread_only(rng, backend):
    torch._dynamo.reset()  # torch 2.11 confuses functions compiled by earlier tests with this one's
    images, masks = inputs(rng)
    compiled = torch.compile(lambda x, m: par(x, m, (1,), 1), fullgraph=True, backend="aot_eager")
    first = compiled(images, masks)
    with afa_kernels.use_backend("reference"):
        with afa_kernels.use_backend("native"):
            pass
        assert backends.choose("par", None, images) == "reference"
        found = []
        thread = threading.Thread(target=lambda: found.append(backends.choose("par", None, images)))
        thread.start(), thread.join()
        assert found == ["native"]
        assert torch.equal(compiled(images, masks), par(images, masks, (1,), 1, backend="reference"))
    assert torch.equal(compiled(images, masks), first)


def test_backends_says_why_not():
    table = afa_kernels.backends()
    assert {row.operator for row in table} >= {"par", "par_weights", "diffuse"}
    for row in table:
        assert row.available == (row.reason == "")
    assert "par " in str(table) and "yes" in str(table)


# --- bad input ---

GOOD_IMAGES, GOOD_MASKS = torch.rand(2, 3, 8, 9, device=DEVICE), torch.rand(2, 4, 8, 9, device=DEVICE)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"images": GOOD_IMAGES[0]}, ValueError, "images"),
        ({"images": torch.rand(2, 0, 8, 9, device=DEVICE)}, ValueError, "images"),
        ({"images": torch.rand(3, 3, 8, 9, device=DEVICE)}, ValueError, "masks .* with B = 3"),
        ({"images": GOOD_IMAGES.int()}, TypeError, r"images / 255 is in 0\.\.1"),
        ({"images": (255 * GOOD_IMAGES).byte()}, TypeError, r"images .* got \(2, 3, 8, 9\) .*uint8: images / 255 is"),
        ({"images": GOOD_IMAGES.permute(0, 2, 3, 1)}, ValueError, r"\(2, 8, 9, 3\).*images\.permute\(0, 3, 1, 2\) has"),
        ({"images": GOOD_IMAGES[0].permute(1, 2, 0)}, ValueError, r"images\.permute\(2, 0, 1\)\[None\] has that shape"),
        ({"images": GOOD_IMAGES[0]}, ValueError, r"images\[None\] has that shape"),
        (
            {"images": GOOD_IMAGES.permute(0, 2, 3, 1).byte()},
            TypeError,
            r"images\.permute\(0, 3, 1, 2\) has that shape, images / 255",
        ),
        ({"images": "photo"}, TypeError, "images"),
        ({"images": torch.rand(2, 3, 0, 9)}, ValueError, "images"),
        ({"masks": GOOD_MASKS[0]}, ValueError, "masks"),
        ({"masks": torch.rand(2, 0, 8, 9)}, ValueError, "masks"),
        ({"masks": GOOD_MASKS.bool()}, TypeError, "masks"),
        ({"masks": GOOD_MASKS.to("meta")}, ValueError, "masks"),
        ({"dilations": ()}, ValueError, "dilations"),
        ({"dilations": (1, 0)}, ValueError, "dilations"),
        ({"dilations": (1, -2)}, ValueError, "dilations"),
        ({"dilations": (1.5,)}, TypeError, "dilations"),
        ({"dilations": 4}, TypeError, "dilations"),
        ({"num_iter": -1}, ValueError, "num_iter"),
        ({"num_iter": 2.5}, TypeError, "num_iter"),
        ({"num_iter": 2**70}, ValueError, "num_iter must be from 0 to"),
        ({"w1": 0.0}, ValueError, "w1"),
        ({"w2": float("nan")}, ValueError, "w2"),
        ({"w3": "much"}, TypeError, "w3"),
        ({"class_mask": torch.ones(2, 4, device=DEVICE)}, TypeError, "class_mask"),
        ({"class_mask": torch.ones(2, 3, dtype=torch.bool, device=DEVICE)}, ValueError, "class_mask"),
    ],
)
def test_bad_input_is_named(change, error, named, backend):
    arguments = {"images": GOOD_IMAGES, "masks": GOOD_MASKS, "backend": backend, **change}
    with pytest.raises(error, match=named):
        par(**arguments)


# --- the modules ---


@pytest.mark.parametrize("backend", AUTOMATIC, indirect=True)
def test_modules_are_drop_ins(rng, backend):
    images, masks = inputs(rng, 2, 3, 16, 20)
    module = PAR(num_iter=10, dilations=[1, 2, 4])
    assert torch.equal(module(imgs=images, masks=masks), par(images, masks, (1, 2, 4), 10))
    assert module.dim == 2 and module.w1 == 0.3 and module.w2 == 0.01 and module.pos.numel() == 24
    assert dict(module.named_buffers())["kernel"].shape == (8, 1, 3, 3)
    other = PAMR(15, [1, 2]).to(DEVICE)
    assert torch.equal(other(images, masks), pamr(images, masks, (1, 2), 15))
    assert set(other.state_dict()) == {"aff_x.kernel", "aff_m.kernel", "aff_std.kernel"}
    assert (PAMR().num_iter, PAMR().dilations) == (1, [1])
    with pytest.raises(ValueError, match="imgs"):
        module(images[0], masks)


def test_published_kernels_pick_the_neighbours(rng):
    """The kept buffers mean what the published modules convolve with."""
    image = torch.rand(1, 1, 7, 7, generator=rng)
    picked = torch.nn.functional.conv2d(image, PAR([1], 1).kernel)
    assert torch.equal(picked, par_reference.shifted(image, par_reference.tap_offsets([1]))[:, 0, :, 1:-1, 1:-1])


def test_pickles_of_whole_modules_name_public_classes_only():
    texts = [text for _, text, _ in pickletools.genops(pickle.dumps([PAR([1], 1), PAMR()])) if isinstance(text, str)]
    assert {text for text in texts if text.startswith("afa_kernels")} == {"afa_kernels"}
    assert {"PAR", "PAMR"} < set(texts)
    for name in afa_kernels.__all__:
        assert getattr(getattr(afa_kernels, name), "__qualname__", name) == name
        if isinstance(getattr(afa_kernels, name), type):
            assert getattr(afa_kernels, name).__module__ == "afa_kernels"


def test_pickles_of_whole_modules_written_before_still_load(rng):
    """golden/modules.pkl: [PAR([1, 2], 3), PAMR(2, [1])], written when they lived in afa_kernels/par_modules.py."""
    recorded = (ROOT / "tests" / "golden" / "modules.pkl").read_bytes()
    assert b"afa_kernels.par_modules" in recorded and b"_Kernel" in recorded
    images, masks = inputs(rng, 1, 2, 9, 10)
    for old, new in zip(pickle.loads(recorded), (PAR([1, 2], 3), PAMR(2, [1]))):
        assert type(old) is type(new) and list(old.state_dict()) == list(new.state_dict())
        assert all(torch.equal(value, new.state_dict()[key]) for key, value in old.state_dict().items())
        assert torch.equal(old(images, masks), new(images, masks))


@pytest.mark.parametrize("channels", [3, 5])
def test_numbers_that_may_change_compile(rng, channels):
    """``dynamic=True`` takes the smoothing factors for such, the defaults too."""
    torch._dynamo.reset()
    images, masks = torch.rand(2, channels, 6, 7, generator=rng), torch.rand(2, 4, 6, 7, generator=rng)

    def step(images, masks, w1):
        return par(images, masks, (1, 2), 2, w1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for w1 in (0.3, 0.4, 0.5):
        assert torch.allclose(compiled(images, masks, w1), step(images, masks, w1), atol=1e-5)


def test_export_leaves_the_batch_free(rng):
    class Step(torch.nn.Module):
        def forward(self, images, masks):
            return par(images, masks, (1, 2), 2)

    def pair(batch, height):
        return torch.rand(batch, 3, height, 7, generator=rng), torch.rand(batch, 4, height, 7, generator=rng)

    free = {0: torch.export.Dim("batch", min=2, max=9), 2: torch.export.Dim("height", min=4, max=99)}
    exported = torch.export.export(Step(), pair(2, 6), dynamic_shapes=(free, free)).module()
    given = pair(5, 11)
    assert torch.equal(exported(*given), Step()(*given))


@pytest.mark.parametrize("channels", [3, 5])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_default_device_is_not_the_images(rng, backend, channels):
    images, masks = torch.rand(1, channels, 6, 7, generator=rng), torch.rand(1, 4, 6, 7, generator=rng)
    want = par(images, masks, (1, 2), 2, backend=backend)
    with torch.device("meta"):
        assert torch.equal(par(images, masks, (1, 2), 2, backend=backend), want)
