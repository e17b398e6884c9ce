"""A training step with a Vision Transformer, learning or frozen: gradients, what is made once, what is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.common import relative_error
from support.tiny_step import ALL, VIT, batch, small_vit, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from afa_model.labels.cams import Known, multi_scale_cam, same_in_eval_mode
from afa_model.labels.slots import ClassSlots
from afa_model.networks.afa import AFA
from afa_model.training.schedule import build_optimizer, parameter_groups
from afa_model.training.step import TrainingStep

pytest_plugins = ["support.pretend_cuda"]  # the fixture of that name

STEP, LABELS = ALL
NUMBERS = ("loss", "cls_loss", "seg_loss", "aff_loss", "aux_loss", "contrast_loss")


def frozen(**changes) -> AFA:
    return small_vit(freeze_backbone=True, **changes)


def learning(model: AFA) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# --- gradients ---


@pytest.mark.parametrize("iteration", [0, 1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: small_vit(aux_layer=-2, decoder="largefov"),
        lambda: frozen(aux_layer=-2),
        lambda: small_vit(backbone_args=VIT | {"reg_tokens": 2, "global_pool": "avg"}),
        lambda: AFA("eva02_tiny_patch14_224", 5, embedding=16, backbone_args={**VIT, "img_size": 56}).train(),
    ],
    ids=["toco", "frozen", "registers", "eva02"],
)
def test_every_parameter_that_learns_has_a_gradient_in_every_phase(make, iteration):
    """So that DDP need not look for unused ones; and the backbone of a frozen model has none."""
    model = make()
    TrainingStep(model, STEP, LABELS)(batch(), iteration).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == [name for name, _ in model.named_parameters() if name not in learning(model)]
    assert any(without) == model.freeze_backbone
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_frozen_step_has_the_losses_of_one_that_learns():
    """In eval mode, which a frozen backbone always is in, both compute the same."""
    for iteration in (0, 2):
        want = TrainingStep(small_vit(aux_layer=-2), STEP, LABELS)(batch(), iteration)
        got = TrainingStep(frozen(aux_layer=-2), STEP, LABELS)(batch(), iteration)
        for name in ("cls_loss", "aux_loss", "seg_loss", "aff_loss"):
            if getattr(want, name) is not None:
                assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=1e-4), name
        assert got.contrast_loss is None and want.contrast_loss > 0, "tokens that do not learn are not contrasted"


@pytest.mark.parametrize("backbone", ["vit", "mit"])
def test_steps_of_a_frozen_model_change_its_heads_alone(backbone):
    model = frozen(drop=0.3) if backbone == "vit" else tiny(drop=0.3)
    if backbone == "mit":
        model = AFA("mit_b0", 5, freeze_backbone=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step, optimizer = TrainingStep(model, STEP, LABELS), build_optimizer(model, 1e-2)
    for iteration in (1, 2):
        optimizer.zero_grad()
        step(batch(), iteration).loss.backward()
        optimizer.step()
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier", "attn_proj", "decoder"}
    assert not any(module.training for module in model.encoder.modules()) and model.decoder.training


def test_a_frozen_backbone_has_no_drop_path():
    model = frozen(drop=0.9)
    assert same_in_eval_mode(model.encoder)
    first, second = (model(batch()["image"], decode=False).cls_logits for _ in range(2))
    assert torch.equal(first, second)


# --- what is made once ---


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Images times rows of every pass of a backbone."""
    seen: list[int] = []
    real = AFA._encode
    monkeypatch.setattr(AFA, "_encode", lambda self, x: seen.append(len(x) * x.shape[2]) or real(self, x))
    return seen


@pytest.mark.parametrize(
    ("scales", "wanted"),
    [
        ((1.0, 0.5, 1.5), [2 * 64, 2 * 64, 4 * 32, 4 * 96]),
        ((1.0, 0.5), [2 * 64, 2 * 64, 4 * 32]),  # the affinity's pass is the training pass
        ((0.5, 1.5), [2 * 64, 4 * 32, 4 * 96]),
        ((1.0,), [2 * 64, 2 * 64]),
    ],
)
def test_a_frozen_backbone_never_sees_an_image_twice(passes, scales, wanted):
    model, labels = frozen(aux_layer=-2), dataclasses.replace(LABELS, cam_scales=scales)
    result = TrainingStep(model, STEP, labels)(batch(), 2)
    assert passes == wanted
    separate = multi_scale_cam(model, batch()["image"], scales, 2, slots=result.slots)
    assert relative_error(result.labels.cam, separate.cam) < 1e-5
    assert relative_error(result.affinity, separate.affinity) < 1e-5


def test_one_with_drop_path_does(passes):
    labels = dataclasses.replace(LABELS, cam_scales=(1.0, 0.5))
    TrainingStep(small_vit(drop=0.2), STEP, labels)(batch(), 2)
    assert passes == [2 * 64, 4 * 64, 4 * 32]


def test_what_is_known_gives_both_cams_and_the_affinity(passes):
    model, images, scales = small_vit(aux_layer=-2), batch()["image"], (0.5, 1.0)
    known = Known.of(model(images), scales, affinity=True, aux=True)
    passes.clear()
    slots = ClassSlots.of(batch()["cls_labels"])
    got = multi_scale_cam(model, images, scales, 2, slots, known, aux=True)
    assert passes == [4 * 32, 2 * 64]
    want = multi_scale_cam(model, images, scales, 2, slots, aux=True)
    for name in want._fields:
        assert relative_error(getattr(got, name), getattr(want, name)) < 1e-5, name


def test_a_graph_is_given_what_is_known(pretend_cuda, passes):
    labels = dataclasses.replace(LABELS, cam_scales=(1.0, 0.5))
    models = [frozen(aux_layer=-2) for _ in range(2)]
    graphed, plain = (TrainingStep(model, STEP, labels, cuda_graph=on) for model, on in zip(models, (True, False)))
    for step in (graphed, plain):
        with torch.no_grad():
            step(batch(seed=1), 2)
            step.model.classifier.weight.mul_(-1)
    passes.clear()
    got = graphed(batch(), 2)
    assert passes == [2 * 64, 2 * 64, 4 * 32]
    want = plain(batch(), 2)
    for name in ("cam", "affinity", "refined_label", "aff_label", "loss"):
        assert relative_error(getattr(got, name), getattr(want, name)) < 1e-4, name
    assert len(pretend_cuda) == 2


def test_a_graph_holds_the_labels_of_each_phase(pretend_cuda):
    """With the contrast the classifier's phase has labels too: the CAMs alone."""
    graphed, plain = (TrainingStep(small_vit(aux_layer=-2), STEP, LABELS, cuda_graph=on) for on in (True, False))
    for iteration in (0, 1, 2, 0):
        got, want = graphed(batch(), iteration), plain(batch(), iteration)
        for name in NUMBERS:
            if getattr(want, name) is not None:
                assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=1e-5), name
        assert (got.refined_label is None) == (iteration == 0)
    assert len(graphed._graph._graphs) == 3


# --- what is kept for the backward pass ---


def kept_bytes(model: AFA, iteration: int = 2) -> tuple[int, set[int]]:
    """Of a step: bytes of what autograd keeps, each storage once, and where the storages are."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        TrainingStep(model, STEP, LABELS)(batch(), iteration)
    return sum(storages.values()), set(storages)


@pytest.mark.parametrize("iteration", [0, 2])
def test_nothing_of_a_frozen_backbone_is_kept(iteration):
    deep = VIT | {"depth": 6}
    one = frozen(backbone_args=deep)
    kept, places = kept_bytes(one, iteration)
    assert not places & {parameter.untyped_storage().data_ptr() for parameter in one.encoder.parameters()}
    shallow, _ = kept_bytes(frozen(), iteration)
    assert kept <= 1.05 * shallow, "the depth of the backbone does not count"
    whole, places = kept_bytes(model := small_vit(backbone_args=deep), iteration)
    assert places & {parameter.untyped_storage().data_ptr() for parameter in model.encoder.parameters()}
    assert whole > kept + 6 * 2 * 17 * 32 * 4 * 8, "of each block at least eight activations"


def test_maps_of_a_frozen_backbone_need_no_gradient():
    model = frozen(aux_layer=-2)
    out = model(batch()["image"])
    assert not any(tensor.requires_grad for tensor in (out.last_map, out.query, out.key, out.aux_map))
    assert out.cls_logits.requires_grad and out.seg_logits.requires_grad and out.aux_logits.requires_grad


# --- the optimizer ---


def test_groups_of_a_vision_transformer():
    model = small_vit(aux_layer=-2)
    groups = {group["name"]: group for group in parameter_groups(model)}
    assert set(groups) == {"backbone", "backbone_norms", "backbone_positions", "heads", "decoder"}
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {key: {named[id(parameter)] for parameter in group["params"]} for key, group in groups.items()}
    assert names["heads"] == {"classifier.weight", "aux_classifier.weight", "attn_proj.weight", "attn_proj.bias"}
    assert names["backbone_positions"] == {"encoder.model.pos_embed", "encoder.model.cls_token"}
    assert names["backbone_norms"] == {name for name in named.values() if name.startswith("encoder") and "norm" in name}
    assert sorted(name for group in names.values() for name in group) == sorted(named.values())
    optimizer = build_optimizer(model, 1e-3, weight_decay=0.02)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "backbone": (1e-3, 0.02),
        "backbone_norms": (0.0, 0.0),
        "backbone_positions": (1e-3, 0.0),
        "heads": (1e-2, 0.02),
        "decoder": (1e-2, 0.02),
    }
    free = build_optimizer(model, 1e-3, freeze_norms=False)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in free.param_groups}
    assert rates["backbone_norms"] == (1e-3, 0.0)


def test_norms_that_are_none_of_torchs_are_norms():
    model = AFA("vit_tiny_patch16_224", 5, embedding=16, backbone_args=VIT | {"norm_layer": "rmsnorm"})
    groups = {group["name"]: group["params"] for group in parameter_groups(model)}
    assert len(groups["backbone_norms"]) == sum("norm" in name for name, _ in model.encoder.named_parameters()) > 3


def test_nothing_of_a_frozen_backbone_is_in_a_group():
    model = frozen(aux_layer=-2)
    assert {group["name"] for group in parameter_groups(model)} == {"heads", "decoder"}
    ids = {id(parameter) for group in parameter_groups(model) for parameter in group["params"]}
    assert ids == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert not ids & {id(parameter) for parameter in model.encoder.parameters()}


# --- sizes, precision, compilation ---


@pytest.mark.parametrize("size", [(40, 72), (33, 50)])
def test_crops_of_any_size(size):
    example = batch(96)
    example |= {"image": example["image"][:, :, : size[0], : size[1]], "img_box": torch.tensor([[0, *size, 0]] * 2)}
    example["img_box"] = torch.tensor([[0, size[0], 0, size[1]], [5, size[0], 0, size[1] - 9]])
    model = small_vit(aux_layer=-2)
    result = TrainingStep(model, STEP, LABELS)(example, 2)
    result.loss.backward()
    assert result.aff_label.shape == result.refined_label.shape == (2, *size)
    assert result.loss.isfinite() and all(getattr(result, name) > 0 for name in NUMBERS)


@pytest.mark.parametrize("make", [small_vit, pytest.param(frozen, marks=pytest.mark.slow)])
def test_compiled_step_trains_alike(monkeypatch, make):
    real, labels = torch.compile, dataclasses.replace(LABELS, cam_scales=(1.0,))
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    results = []
    for compiled in (True, False):
        model = make(aux_layer=-1, backbone_args=VIT | {"depth": 2, "drop_path_rate": 0.0})
        result = TrainingStep(model, STEP, labels, compile=compiled)(batch(), 2)
        result.loss.backward()
        results.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
        results[-1]["loss"] = result.loss.detach()
    torch._dynamo.reset()
    assert results[0].keys() == results[1].keys()
    rounding = 1e-6 * max(float(value.norm()) for value in results[1].values())
    for name, want in results[1].items():
        assert float((results[0][name] - want).norm()) <= 2e-3 * float(want.norm()) + rounding, name


def test_bfloat16_step_stays_near_float32():
    """The tolerance stated for half precision: 5 % of losses, 5 % of pixels."""
    for make in (small_vit, frozen):
        want = TrainingStep(make(aux_layer=-2), STEP, LABELS)(batch(96), 2)
        with torch.autocast("cpu", torch.bfloat16):
            got = TrainingStep(make(aux_layer=-2), STEP, LABELS)(batch(96), 2)
        for name in NUMBERS:
            if getattr(want, name) is not None:
                assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=0.05), name
        assert (got.refined_label != want.refined_label).double().mean() < 0.05


def test_pseudo_labels_never_read_a_value_back():
    """On fake CUDA tensors that would raise; what a CUDA graph holds has all its tensors on the GPU."""
    with torch.device("meta"):
        model = frozen(aux_layer=-2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model.to_empty(device="cuda")
        images, box = torch.randn(2, 3, 64, 64), torch.tensor([[0, 64, 3, 59], [7, 64, 0, 64]])
        step, slots = TrainingStep(model, STEP, LABELS), ClassSlots.of(torch.ones(2, 4), 2)
        known = Known.of(model(images), LABELS.cam_scales, affinity=True, aux=True)
        labels = step._pseudo_labels(images, slots.classes, slots.present, box, *known, count=4, walks=True, aux=True)
        assert labels.aux_cam.shape == labels.cam.shape == (2, 2, 64, 64)
