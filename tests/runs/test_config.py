"""Settings: what is accepted, what is refused, and that a refusal names the key."""

from __future__ import annotations

import dataclasses
import json

import pytest
import support.needs_command_line  # noqa: F401
import yaml
from support.common import ROOT

from afa_model.config import (
    Config,
    check,
    find_config,
    from_dict,
    packaged,
    parse,
    to_dict,
    to_yaml,
)
from afa_model.config.config import EvalSettings
from afa_model.errors import ConfigError
from afa_model.evaluation.evaluate import EvaluateSettings
from afa_model.labels.crf import CrfSettings
from afa_model.labels.settings import LabelSettings


def test_dotted_options_override_yaml(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: {root: /somewhere}\noptim: {lr: 1e-4, weight_decay: 0}\neval: {scales: [1, 2]}\n")
    config = parse(["--config", str(file), "--optim.lr", "3e-5"])
    assert config.optim.lr == 3e-5
    assert config.optim.weight_decay == 0.0
    assert config.data.root == "/somewhere"
    assert config.eval.scales == (1.0, 2.0)
    assert config.schedule == Config().schedule


def test_the_later_of_two_configs_wins(tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text("step: {cam_iters: 7}\n")
    config = parse(["--config", "coco", "--config", str(file)])
    assert (config.step.cam_iters, config.step.aff_iters) == (7, 15_000)


@pytest.mark.parametrize("name", ["voc", "voc.yaml"])
def test_packaged_configs_are_found_by_name(name):
    assert parse(["--config", name]).schedule.max_iters == 20_000
    assert parse([f"--config={name}"]).schedule.max_iters == 20_000
    assert find_config(name).endswith("voc.yaml")
    assert {"voc", "coco", "demo"} <= set(packaged())


def test_a_cuda_graph_and_noise_are_refused_together():
    with pytest.raises(ConfigError, match=r"cuda_graph: expected false with step\.cam_mode train"):
        parse(["--config", "voc", "--cuda_graph", "true"])
    graphed = ["--config", "voc", "--cuda_graph", "true", "--step.cam_mode", "eval"]
    assert parse(graphed).cuda_graph
    with pytest.raises(ConfigError, match=r"cuda_graph: expected false with labels\.refinement crf"):
        parse([*graphed, "--labels.refinement", "crf"])


def test_settings_within_settings(tmp_path):
    file = tmp_path / "crf.yaml"
    file.write_text("labels: {refinement: crf, dense_crf: {pos_w: 2}}\neval: {crf: true}\n")
    config = parse(["--config", str(file), "--labels.dense_crf.bi_xy_std", "50"])
    assert config.labels.dense_crf == CrfSettings(pos_w=2.0, bi_xy_std=50.0) and config.eval.crf
    assert from_dict(to_dict(config)) == config
    assert config.eval.labels(config.labels).dense_crf == config.labels.dense_crf
    before = to_dict(config)
    del before["labels"]["dense_crf"], before["eval"]["crf"]  # as an earlier version wrote them
    assert from_dict(before).labels.dense_crf == CrfSettings() and not from_dict(before).eval.crf


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("pos_w=-1", "labels.dense_crf.pos_w: expected at least 0, got -1.0"),
        ("bi_rgb_std=0", "labels.dense_crf.bi_rgb_std: expected a positive number, got 0.0"),
        ("num_iter=null", "labels.dense_crf.num_iter: expected int, got"),
        ("num_iter=x", "labels.dense_crf.num_iter: expected int, got x"),
        ("pos=1", "labels.dense_crf.pos: unknown setting"),
    ],
)
def test_mistakes_in_settings_within_settings_are_named(given, said):
    with pytest.raises(ConfigError) as error:
        parse([f"--labels.dense_crf.{given}"])
    assert str(error.value).startswith(said)


def test_settings_within_settings_are_no_number(tmp_path):
    file = tmp_path / "crf.yaml"
    for given, said in ((5, r"expected settings \(labels\.dense_crf\.KEY\), got 5"), ("null", "expected .* got null")):
        file.write_text(f"labels: {{dense_crf: {given}}}\n")
        with pytest.raises(ConfigError, match=rf"labels\.dense_crf: {said}"):
            parse(["--config", str(file)])


def test_every_packaged_config_is_accepted():
    for name in packaged():
        assert parse(["--config", name]).out == f"runs/{name}"


def test_published_values():
    voc, coco = parse(["--config", "voc"]), parse(["--config", "coco"])
    # The defaults are the published ones, but for what is slower and no better.
    step = dataclasses.replace(Config().step, cam_mode="train", normalise_across=False)
    loss = dataclasses.replace(Config().loss, regularisation=0.01)
    changed = dataclasses.replace(Config(), amp="off", step=step, loss=loss)
    assert dataclasses.replace(voc, data=Config().data) == changed
    assert (coco.labels.num_iter, coco.step.affinity_target, coco.eval.every) == (15, "segmentation", 5_000)
    assert (voc.labels.num_iter, voc.step.affinity_target, voc.eval.every) == (10, "refined_cam", 2_000)
    assert (coco.data.mask_dir, coco.data.allow_empty) == ("SegmentationClass", True)
    assert voc.labels.dilations == coco.labels.dilations == (1, 2, 4, 8, 12, 24)
    assert (voc.labels.walk_power, voc.labels.walk_eps, voc.labels.bkg_score) == (2, 0.1, 0.45)
    assert (voc.optim.lr, voc.optim.head_multiplier, voc.optim.weight_decay) == (6e-5, 10, 0.01)
    assert (voc.schedule.warmup_iters, voc.schedule.warmup_ratio, voc.schedule.power) == (1500, 1e-6, 1)
    assert (voc.schedule.max_iters, voc.step.cam_iters, voc.step.aff_iters) == (20_000, 2_000, 6_000)
    assert (coco.schedule.max_iters, coco.step.cam_iters, coco.step.aff_iters) == (80_000, 5_000, 15_000)
    assert (voc.data.num_classes, coco.data.num_classes) == (21, 81)
    for config in (voc, coco):
        assert config.augment.crop == 512
        assert config.augment.scale == (0.5, 2.0)
        assert config.loader.batch_size == 2
        assert config.model.stride == (4, 2, 2, 1)
        assert (config.step.seg_weight, config.step.aff_weight, config.labels.radius) == (0.1, 0.1, 8)
        assert (config.labels.high_score, config.labels.low_score) == (0.55, 0.35)
        assert config.labels.cam_scales == (1.0, 0.5, 1.5)
        assert (config.step.cam_mode, config.step.normalise_across, config.amp) == ("train", False, "off")
        assert not config.augment.distort and config.augment.flip == 0.5 and config.optim.clip_norm is None
        assert config.eval == EvalSettings(every=config.eval.every), "nothing but what the protocol says"


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--optim.lrr", "3"], "optim.lrr: unknown setting (did you mean optim.lr?)"),
        (["--data.rooot=x"], "data.rooot: unknown setting (did you mean data.root?)"),
        (["--optim.lr", "fast"], "optim.lr: expected float, got fast"),
        (["--schedule.max_iters", "10.5"], "schedule.max_iters: expected int"),
        (["--eval.scales", "1,2"], "eval.scales: expected tuple[float, ...] or null, got 1,2 (a list is written ["),
        (["--eval.radius", "wide"], "eval.radius: expected int or null, got wide"),
        (["--model.stride", "[4, 2, 2]"], "model.stride: expected tuple with 4 elements"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["stray"], "stray"),
        (["--config", "nowhere.yaml"], "config: no file 'nowhere.yaml'"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv, key):
    with pytest.raises(ConfigError) as error:
        parse(argv)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("data: {rot: x}", "data.rot: unknown setting (did you mean data.root?)"),
        ("optm: {lr: 3}", "optm.lr: unknown setting (did you mean optim.lr?)"),
        ("learning_rate: 3", "learning_rate: unknown setting"),
        ("optim: {lr: fast}", "optim.lr: expected float, got fast"),
        ("optim: {lr: null}", "optim.lr: expected float, got null"),
        ("seed: null", "seed: expected int, got null"),
        ("seed: [1]", "seed: expected int"),
        ("data: 3", "data: expected settings"),
        ("a: : b", "config"),
        ("", "bad.yaml is empty, expected settings"),
        ("# seed: 3\n", "bad.yaml is empty, expected settings"),
        ("- seed", "bad.yaml holds a list, expected settings"),
        ("data:\n  # root: x\nseed: 1", "data: no settings under it"),
        ("data: {root: x", "bad.yaml is not YAML"),
        ("\udcff", "bad.yaml is no text in UTF-8"),
        ("labels: {cam_scales: []}", "labels.cam_scales: expected"),
        ("labels: {dilations: []}", "labels.dilations: expected"),
        ("eval: {scales: []}", "eval.scales: expected"),
        ("augment: {scale: []}", "augment.scale: expected"),
        ("model: {stride: []}", "model.stride: expected"),
    ],
)
def test_mistakes_in_yaml_are_named(tmp_path, text, key):
    file = tmp_path / "bad.yaml"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError) as error:
        parse(["--config", str(file)])
    assert key in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        "augment.crop=0",
        "augment.crop=-64",
        "augment.flip=1.5",
        "optim.lr=0",
        "optim.lr=nan",
        "optim.head_multiplier=-1",
        "optim.weight_decay=-0.1",
        "optim.weight_decay=nan",
        "optim.betas=[0.9, 1.0]",
        "optim.clip_norm=0",
        "schedule.max_iters=0",
        "schedule.warmup_iters=20001",
        "schedule.warmup_ratio=0",
        "step.cam_iters=-1",
        "step.aff_iters=20001",
        "step.aff_iters=1999",
        "labels.cam_scales=[]",
        "labels.cam_scales=[1, 0]",
        "labels.refinement=magic",
        "labels.low_score=0.6",
        "loader.batch_size=0",
        "data.num_workers=-1",
        "model.stride=[4, 2, 2, 0]",
        "eval.scales=[]",
        "eval.every=-1",
        "eval.limit=0",
        "eval.long_side=8",
        "log.every=0",
        "checkpoint.every=0",
        "checkpoint.keep_last=0",
        "seed=-1",
        "out=",
    ],
)
def test_values_without_sense_are_refused(option):
    with pytest.raises(ConfigError) as error:
        parse([f"--{option}"])
    section, _, name = option.partition("=")[0].rpartition(".")
    assert str(error.value).startswith(section)
    assert name in str(error.value)


def test_a_shorter_run_is_told_what_else_to_shorten():
    with pytest.raises(ConfigError, match=r"warmup_iters.*cam_iters.*aff_iters"):
        parse(["--schedule.max_iters", "60"])
    short = ["--schedule.warmup_iters=6", "--step.cam_iters=6", "--step.aff_iters=18"]
    assert parse(["--schedule.max_iters", "60", *short]).schedule.max_iters == 60


def test_yaml_and_plain_data_round_trip(tmp_path):
    config = parse(
        ["--eval.scales", "[1]", "--optim.clip_norm", "5", "--model.pretrained", "w.pth", "--resume", "auto"]
    )
    file = tmp_path / "out.yaml"
    file.write_text(to_yaml(config))
    assert parse(["--config", str(file)]) == config
    assert from_dict(to_dict(config)) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


def test_old_plain_data_with_an_unknown_key_is_refused():
    values = to_dict(Config())
    values["optim"]["momentum"] = 0.9
    with pytest.raises(ConfigError, match=r"optim\.momentum"):
        from_dict(values)


def test_print_config_prints_yaml_that_can_be_read_back(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        parse(["--config", "coco", "--optim.lr", "3e-5", "--print_config"])
    assert end.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(["--config", str(file)]) == parse(["--config", "coco", "--optim.lr", "3e-5"])


def test_check_names_values_changed_in_python():
    config = Config()
    config.optim.lr = -1.0
    with pytest.raises(ConfigError, match=r"optim\.lr: expected a positive number, got -1\.0"):
        check(config)


# --- earlier versions ---

BEFORE = json.loads((ROOT / "tests" / "golden" / "config_before_rooms.json").read_text())  # of a run's checkpoint


def test_settings_of_an_earlier_version_keep_their_meaning():
    config = from_dict(BEFORE)
    assert (config.labels.high_score, config.labels.low_score, config.labels.bkg_score) == (0.45, 0.25, 0.4)
    assert (config.labels.walk_power, config.labels.walk_eps, config.labels.radius) == (3, 0.1, 4)
    assert (config.labels.dilations, config.labels.num_iter) == ((1, 2, 4, 8, 12), 10)
    scored = config.eval.labels(config.labels)
    assert (scored.radius, scored.cam_scales, scored.num_iter) == (8, (1.0, 0.5, 2.0), 7)
    assert scored.walk_power == 3, "evaluation walks as training does"
    assert config.eval.maps().long_side == 0, "None said as they are, before there were protocols"
    assert (config.eval.protocol, config.eval.maps().scales) == ("test", (1.0,))
    known = {"labels", "eval", "step"}
    now = to_dict(config)
    for key in set(BEFORE) - known:
        assert (now[key] | BEFORE[key] if isinstance(BEFORE[key], dict) else BEFORE[key]) == now[key], key


@pytest.mark.parametrize(
    ("old", "told"),
    [
        ("step.par_iters=3", "step.par_iters: unknown setting (it is labels.num_iter now)"),
        ("eval.par_dilations=[1]", "eval.par_dilations: unknown setting (it is eval.dilations now)"),
        ("step.image_mean=[0, 0, 0]", "step.image_mean: unknown setting (there is one value for all)"),
    ],
)
def test_who_asks_by_an_old_name_is_told_the_new_one(old, told):
    with pytest.raises(ConfigError) as error:
        parse([f"--{old}"])
    assert str(error.value) == told


def test_evaluation_takes_from_training_what_it_does_not_say():
    training = LabelSettings(radius=5, walk_power=3.0, walk_eps=0.2, dilations=(1, 3), num_iter=4, bkg_score=0.3)
    assert EvaluateSettings().labels(training) == training
    own = EvaluateSettings(radius=2, cam_scales=(1.0,), dilations=(7,), num_iter=0).labels(training)
    assert own == dataclasses.replace(training, radius=2, cam_scales=(1.0,), dilations=(7,), num_iter=0)
    with pytest.raises(ValueError, match="radius"):
        EvaluateSettings(radius=-1)


@pytest.mark.parametrize(("before", "now"), [("background", True), ("refuse", False)])
def test_what_an_earlier_version_said_of_images_without_a_class(before, now):
    values = to_dict(Config())
    del values["data"]["allow_empty"]
    values["data"]["without_class"] = before
    assert from_dict(values).data.allow_empty is now


def test_one_number_scales_every_count_of_steps():
    short = parse(["--config=coco", "--schedule.scale=0.01"])
    schedule, step = short.schedule, short.step
    assert (schedule.max_iters, schedule.warmup_iters, step.cam_iters, step.aff_iters) == (800, 15, 50, 150)
    assert (short.eval.every, short.checkpoint.every, short.log.every, short.log.pictures_every) == (50, 20, 1, 5)
    assert short.checkpoint.keep_last == parse(["--config=coco"]).checkpoint.keep_last
    assert schedule.scale == 1 and from_dict(to_dict(short)) == short, "what is kept is not scaled again"
    longer = parse(["--config=coco", "--schedule.scale=1.5", "--eval.every=0"])
    assert (longer.schedule.max_iters, longer.eval.every) == (120_000, 0)
    least = parse(["--config=coco", "--schedule.scale=0.0001", "--log.pictures_every=0"])
    assert (least.schedule.max_iters, least.schedule.warmup_iters, least.log.every) == (8, 1, 1)
    assert least.log.pictures_every == 0 and least.step.cam_iters == 1
    for wrong in ("0", "-1", "nan", ".inf"):
        with pytest.raises(ConfigError, match=r"schedule\.scale: expected (a positive number|float)"):
            parse(["--config=coco", f"--schedule.scale={wrong}"])


def test_settings_of_vision_transformers_are_those_they_name():
    """What stands in their comments as ToCo's, for its public code and logs say so; the rest is AFA's."""
    voc, coco, afa = parse(["--config", "voc_vit"]), parse(["--config", "coco_vit"]), parse(["--config", "voc"])
    for config in (voc, coco):
        assert config.augment.crop == 448 and config.loader.batch_size == 4 and config.amp == "off"
        assert (config.model.decoder, config.model.aux_layer, config.model.pooling) == ("largefov", -3, "gmp")
        assert config.model.backbone == "vit_base_patch16_224.augreg_in21k_ft_in1k"
        assert (config.optim.lr, config.optim.head_multiplier, config.optim.weight_decay) == (6e-5, 10, 0.01)
        assert (config.schedule.warmup_iters, config.schedule.warmup_ratio, config.schedule.power) == (1500, 1e-6, 0.9)
        assert (config.step.seg_weight, config.step.aux_weight, config.step.contrast_weight) == (0.1, 1.0, 0.2)
        assert not config.optim.freeze_norms and config.loss.regularisation == 0.05
        assert (config.labels.cam_scales, config.labels.num_iter) == ((1.0, 0.5, 1.5), 10)
        assert (config.step.aff_weight, config.labels.radius) == (afa.step.aff_weight, afa.labels.radius)
    scores = [(c.labels.high_score, c.labels.low_score, c.labels.bkg_score) for c in (voc, coco)]
    assert scores == [(0.7, 0.25, 0.5), (0.65, 0.25, 0.45)]
    steps = [(c.schedule.max_iters, c.step.cam_iters, c.step.aff_iters, c.step.contrast_from) for c in (voc, coco)]
    assert steps == [(20_000, 2_000, 6_000, 0), (80_000, 8_000, 15_000, 12_001)]
    assert (voc.data.num_classes, coco.data.num_classes) == (21, 81)


def test_a_shorter_run_begins_its_contrast_sooner():
    short = parse(["--config", "coco_vit", "--schedule.scale", "0.01"])
    assert short.step.contrast_from == 120
    with pytest.raises(ConfigError, match=r"step\.contrast_from: expected at most schedule\.max_iters = 10"):
        parse(["--schedule.max_iters", "10", "--schedule.warmup_iters", "0", "--step.cam_iters", "0",
               "--step.aff_iters", "0", "--step.contrast_from", "11"])  # fmt: skip
