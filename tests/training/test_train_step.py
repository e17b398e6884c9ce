"""What makes a training step fast must not change what it computes: slots, reuse, sharing, graphs, compilation."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from support.common import ROOT, relative_error
from support.tiny_step import ALL, batch, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from afa_kernels import use_backend
from afa_model.conventions import IGNORE
from afa_model.labels.cams import multi_scale_cam, same_in_eval_mode
from afa_model.labels.pseudo_labels import labels_of_one_diffusion, propagate, refine_label, refine_propagated
from afa_model.labels.settings import LabelSettings
from afa_model.labels.slots import ClassSlots
from afa_model.networks.afa import AFA
from afa_model.runtime.phases import PhaseTimer, phase
from afa_model.training.acceleration import CompiledNetworks, GraphedFunction
from afa_model.training.step import StepSettings, TrainingStep

pytest_plugins = ["support.pretend_cuda"]  # the fixture of that name


def assert_close(got: dict, want: dict, tolerance: float) -> None:
    """Relative to each tensor's own norm; what is 0 but for rounding (biases before a batch norm) may differ."""
    rounding = 1e-7 * max(float(value.norm()) for value in want.values())
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= tolerance * float(value.norm()) + rounding, name


# --- against the published way ---


@pytest.mark.parametrize("iteration", [1, 2])
def test_same_numbers_as_the_published_way(monkeypatch, iteration):
    """Dense maps, whole passes, image by image (benchmarks/published_step.py): losses, labels, gradients."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from published_step import PublishedStep

    model = tiny(drop=0.2)
    example = batch(96)
    got, want = ({}, {})
    for step, found in ((TrainingStep(model, *ALL), got), (PublishedStep(model, *ALL), want)):
        torch.manual_seed(1)  # the same drop path
        model.zero_grad()
        result = step(example, iteration)
        result.loss.backward()
        found |= {name: getattr(result, name) for name in ("loss", "cls_loss", "seg_loss", "aff_loss")}
        found |= {"counts": torch.stack([result.pos_count, result.neg_count]).double()}
        found |= {"labels": result.refined_label}
        found |= {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
    assert set(want["labels"].unique().tolist()) > {0, 1, 255}, "a case that decides something"
    sys.modules.pop("published_step")
    assert (got.pop("labels") != want.pop("labels")).double().mean() < 1e-3
    assert_close(got, want, 1e-3)


# --- classes in slots ---


def test_slots_hold_each_images_classes_in_order():
    labels = torch.tensor([[0.0, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    slots = ClassSlots.of(labels)
    assert slots.classes[:, :2].tolist()[0] == [1, 3] and slots.classes[1, 0] == 4
    assert slots.present.tolist() == [[True, True], [True, False], [False, False]]
    assert ClassSlots.of(labels[2:]).classes.shape == (1, 1), "an image without classes still has a slot"
    maps = torch.arange(15.0).view(3, 5, 1, 1)
    assert slots.pick(maps)[0].flatten().tolist() == [1, 3]
    assert slots.spread(slots.pick(maps))[0].flatten().tolist() == [0, 1, 0, 3, 0]
    everything = ClassSlots.of(torch.ones(2, 3, dtype=torch.int64))
    assert everything.classes.tolist() == [[0, 1, 2]] * 2 and everything.present.all() and everything.everything
    some = slots.rows([2, 0])
    assert torch.equal(some.present, slots.present[[2, 0]]) and torch.equal(some.classes, slots.classes[[2, 0]])
    for wrong in (labels[0], labels[:0]):
        with pytest.raises(ValueError, match="cls_labels"):
            ClassSlots.of(wrong)
    with pytest.raises(ValueError, match="maps"):
        slots.pick(maps[:, :2])


def test_slots_on_a_gpu_follow_the_limit_without_looking():
    with FakeTensorMode(), torch.device("cuda"):
        labels = torch.ones(2, 20)
        assert ClassSlots.of(labels).present.shape == (2, 20)
        assert ClassSlots.of(labels, 6).present.shape == (2, 6)
        assert ClassSlots.of(labels, 99).present.shape == (2, 20)


def test_cam_of_slots_is_that_of_all_classes():
    model, example = tiny(), batch()
    slots = ClassSlots.of(example["cls_labels"])
    whole = multi_scale_cam(model, example["image"]).cam
    assert torch.equal(multi_scale_cam(model, example["image"], slots=slots).cam, slots.pick(whole))


def test_step_gives_the_cam_of_every_class_shown():
    result = TrainingStep(tiny(), *ALL)(batch(), 2)
    whole = multi_scale_cam(tiny(), batch()["image"]).cam
    assert result.cam.shape == whole.shape
    for image, classes in ((0, [0, 3]), (1, [1])):
        assert relative_error(result.cam[image, classes], whole[image, classes]) < 1e-5
        assert result.labels.cam.shape[1] == 2


def test_slot_numbers_become_class_numbers():
    slots = ClassSlots(torch.tensor([[3, 7], [0, 5]]), torch.ones(2, 2, dtype=torch.bool), 8)
    labels = torch.tensor([[[0, 1, 2, IGNORE]], [[2, 1, 0, 0]]])
    assert slots.name(labels).tolist() == [[[0, 4, 8, IGNORE]], [[6, 1, 0, 0]]]


def test_labels_carry_class_numbers():
    model = tiny(classes=40)
    labels = torch.zeros(2, 39)
    labels[0, 38] = labels[1, 2] = 1
    result = TrainingStep(model, *ALL)({**batch(), "cls_labels": labels}, 2)
    assert set(result.refined_label[0].unique().tolist()) <= {0, 39, IGNORE}
    assert set(result.aff_label[1].unique().tolist()) <= {0, 3, IGNORE}


# --- the training pass used again ---


def test_what_makes_a_pass_noisy():
    assert same_in_eval_mode(tiny().encoder)
    assert not same_in_eval_mode(tiny(drop=0.1).encoder)
    assert same_in_eval_mode(tiny(drop=0.1).eval().encoder)
    assert not same_in_eval_mode(AFA("resnet18", 5).train().encoder)
    assert same_in_eval_mode(AFA("resnet18", 5).eval().encoder)


def test_scale_one_is_taken_from_the_training_pass_where_that_is_exact(monkeypatch):
    seen = []
    real = AFA._encode
    monkeypatch.setattr(AFA, "_encode", lambda self, x: seen.append(len(x) * x.shape[2]) or real(self, x))
    for drop, second in ((0.0, 2 * 64), (0.2, 4 * 64)):
        seen.clear()
        result = TrainingStep(tiny(drop), *ALL)(batch(), 2)
        assert seen == [2 * 64, second, 4 * 32, 4 * 96]
        separate = multi_scale_cam(tiny(drop), batch()["image"], slots=result.slots).cam
        assert relative_error(result.labels.cam, separate) < 1e-5


# --- one diffusion for both labels ---


@pytest.mark.parametrize("scores", [(0.35, 0.55), (0.45,)])
def test_shared_refinement_is_the_same_where_photographs_fill_the_crop(rng, scores):
    slots, how = ClassSlots.of(batch()["cls_labels"]), LabelSettings(radius=2)
    images, cam = torch.rand(2, 3, 40, 56, generator=rng), torch.rand(2, 2, 40, 56, generator=rng)
    affinity = torch.rand(2, 25, 5, 7, generator=rng)
    walked = propagate(affinity, cam, slots, how, scores)
    refined, walked_label = labels_of_one_diffusion(images, walked, cam, slots, how, scores)
    assert torch.equal(refined, refine_label(images, cam, slots, how, scores))
    assert torch.equal(walked_label, refine_propagated(images, walked, slots, how))


def test_shared_refinement_in_a_step():
    coarse = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1.5, 1.5)
    smooth = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")  # as a photograph; noise has no borders
    for box in (None, batch()["img_box"]):
        example = {**batch(), "image": smooth, "img_box": box}
        plain = TrainingStep(tiny(), *ALL)(example, 2)
        shared = TrainingStep(tiny(), StepSettings(0, 1, shared_refinement=True), ALL[1])(example, 2)
        assert torch.equal(shared.refined_label, plain.refined_label)
        differing = (shared.aff_label != plain.aff_label).double().mean()
        assert differing == 0 if box is None else differing < 0.06
        if box is not None:
            for image, (y0, y1, x0, x1) in zip(shared.aff_label, box.tolist()):
                outside = torch.ones_like(image, dtype=torch.bool)
                outside[y0:y1, x0:x1] = False
                assert (image[outside] == IGNORE).all() and (image[~outside] != IGNORE).any()


# --- no waiting, graphs, compilation ---


@pytest.mark.parametrize("shared", [False, True])
def test_pseudo_labels_never_read_a_value_back(shared):
    """On fake CUDA tensors that would raise; what a CUDA graph holds has all its tensors on the GPU."""
    settings = StepSettings(0, 1, shared_refinement=shared)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        step = TrainingStep(tiny(), settings, ALL[1])
        box = torch.tensor([[0, 64, 3, 59], [7, 64, 0, 64]])
        slots = ClassSlots.of(torch.ones(2, 4), 2)
        inputs = torch.randn(2, 3, 64, 64), slots.classes, slots.present, box, None
        labels = step._pseudo_labels(*inputs, count=4, walks=True)
        assert labels.cam.shape == (2, 2, 64, 64)
        assert (labels.aff_label is not None) is shared


def test_graphed_function_replays_for_known_shapes_and_gives_copies(pretend_cuda):
    graphed = GraphedFunction(lambda x, y, scale=1: (x * scale, None if y is None else y + 1))
    first = graphed(torch.ones(2), None, key=1, scale=3)
    second = graphed(torch.full((2,), 5.0), None, key=1, scale=3)
    assert first[0].tolist() == [3, 3] and second[0].tolist() == [15, 15] and second[1] is None
    assert len(graphed._graphs) == 1
    graphed(torch.ones(3), torch.ones(1), key=1, scale=3)
    graphed(torch.ones(2), None, key=2, scale=4)
    assert len(graphed._graphs) == 3 and len(pretend_cuda) == 4


def test_step_with_a_graph_follows_the_weights(pretend_cuda):
    graphed, plain = (TrainingStep(tiny(), *ALL, cuda_graph=on) for on in (True, False))
    for step in (graphed, plain):
        with torch.no_grad():
            step(batch(seed=1), 2)
            step.model.classifier.weight.mul_(-1)  # in place, as an optimizer does
    got, want = (step(batch(), 2) for step in (graphed, plain))
    for name in ("refined_label", "aff_label", "cam", "affinity", "loss"):
        assert relative_error(getattr(got, name), getattr(want, name)) < 1e-4, name
    assert len(pretend_cuda) == 2


def test_graphs_are_for_gpus():
    step = TrainingStep(tiny(), *ALL, cuda_graph=True)
    assert torch.equal(step(batch(), 2).refined_label, TrainingStep(tiny(), *ALL)(batch(), 2).refined_label)
    assert not step._graph._graphs


def test_compiled_networks_are_used_inside_only():
    model, plain = tiny(), tiny()
    networks = CompiledNetworks(model, backend="eager")
    names = list(model.state_dict())
    with networks.in_use():
        inside = model.encoder.forward_pyramid
        out = model(batch()["image"])
        assert list(model.state_dict()) == names
    assert model.encoder.forward_pyramid != inside and "forward" not in vars(model.decoder)
    assert relative_error(out.seg_logits, plain(batch()["image"]).seg_logits) < 1e-6
    with pytest.raises(ZeroDivisionError), networks.in_use():
        raise ZeroDivisionError
    assert "forward_pyramid" not in vars(model.encoder)


def test_compiled_step_trains_alike(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    results = []
    for compiled in (True, False):
        model = tiny()
        result = TrainingStep(model, *ALL, compile=compiled)(batch(), 2)
        result.loss.backward()
        results.append({name: value.grad for name, value in model.named_parameters()} | {"loss": result.loss})
    torch._dynamo.reset()
    assert_close(*results, 1e-3)


def test_bfloat16_step_stays_near_float32():
    """The tolerance stated for half precision: 5 % of losses, 5 % of pixels."""
    want = TrainingStep(tiny(), *ALL)(batch(96), 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = TrainingStep(tiny(), *ALL)(batch(96), 2)
    for name in ("loss", "cls_loss", "seg_loss", "aff_loss"):
        assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=0.05), name
    for name in ("refined_label", "aff_label"):
        assert (getattr(got, name) != getattr(want, name)).double().mean() < 0.05, name


def test_channels_last_changes_nothing():
    want = TrainingStep(tiny(), *ALL)(batch(), 2)
    example = batch()
    example["image"] = example["image"].contiguous(memory_format=torch.channels_last)
    got = TrainingStep(tiny().to(memory_format=torch.channels_last), *ALL)(example, 2)
    assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-4)
    assert (got.aff_label != want.aff_label).double().mean() < 1e-3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_cuda_graph_gives_the_eager_labels(shared, amp):
    settings = StepSettings(0, 1, shared_refinement=shared), ALL[1]
    results = []
    for graph in (True, False):
        model = tiny().cuda()
        step = TrainingStep(model, *settings, max_classes=2, cuda_graph=graph)
        for seed in (1, 0):
            example = {name: value.cuda() for name, value in batch(seed=seed).items()}
            example["img_box"] = example["img_box"].cpu()
            with torch.autocast("cuda", torch.bfloat16) if amp else nullcontext():
                result = step(example, 2)
            result.loss.backward()
            with torch.no_grad():
                model.classifier.weight.add_(model.classifier.weight.grad, alpha=-0.1)
        results.append(result)
    for name in ("refined_label", "aff_label"):
        differing = getattr(results[0], name) != getattr(results[1], name)
        assert differing.double().mean() < (0.02 if amp else 1e-3), name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_step_gives_the_numbers_of_the_cpu():
    want = TrainingStep(tiny(), *ALL)(batch(96), 2)
    example = {name: value.cuda() for name, value in batch(96).items()} | {"img_box": batch(96)["img_box"]}
    got = TrainingStep(tiny().cuda(), *ALL, max_classes=2)(example, 2)
    for name in ("loss", "cls_loss", "seg_loss", "aff_loss"):
        assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=2e-3), name
    for name in ("refined_label", "aff_label"):
        assert (getattr(got, name).cpu() != getattr(want, name)).double().mean() < 5e-3, name


# --- small tools ---


def test_phases_of_a_step_are_timed():
    timer = PhaseTimer()
    step = TrainingStep(tiny(), *ALL)
    with timer:
        step(batch(), 2)
    seconds = timer.seconds()
    assert list(seconds) == ["forward", "CAM", "random walk", "PAR", "losses"]
    assert all(value > 0 for value in seconds.values())
    step(batch(), 2)
    assert timer.seconds() == {}, "nothing is recorded outside the block"


def test_phases_are_ranges_in_a_profile():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, phase("tea"):
        torch.ones(3).sum()
    assert "afa: tea" in {event.key for event in profile.key_averages()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_kept():
    """Page faults of filling 64 MB five times over: five times all pages, or once."""
    code = """
import resource, torch
from afa_model.runs.memory import keep_freed_memory
def faults(times=5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain, able = faults(), keep_freed_memory()
faults(20)  # until the pieces lie as they stay
print(able, plain, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    able, plain, kept = done.stdout.split()
    if able == "False":
        pytest.skip("this C library has no mallopt")
    assert int(kept) < int(plain) / 10


def test_reference_backend_gives_the_same_step():
    want = TrainingStep(tiny(), *ALL)(batch(), 2)
    with use_backend("reference"):
        got = TrainingStep(tiny(), *ALL)(batch(), 2)
    assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-4)
    assert (got.aff_label != want.aff_label).double().mean() < 1e-3
