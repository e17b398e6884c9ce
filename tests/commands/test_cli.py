"""The command `afa` as people type it: help, mistakes, and how every command ends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import support.needs_command_line  # noqa: F401
from support.tiny_run import tiny_args
from support.voc_factory import make_voc

import afa_model
from afa_model import cli
from afa_model.commands import bench
from afa_model.config.parser import parser
from afa_model.errors import CheckpointError, ConfigError, DataError, SavingError, TrainingError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    make_voc(folder, count=6)
    return folder


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in printed
    assert cli.main([]) == 2
    assert "usage: afa" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        (
            "train",
            [
                "--config FILE|NAME",
                "--optim.lr",
                "--step.cam_iters",
                "--resume",
                "learning rate of the backbone",
            ],
        ),
        ("evaluate", ["--checkpoint", "--json", "--csv", "--crf", "--data.root", "--eval.scales"]),
        ("predict", ["IMAGE", "--checkpoint", "--out", "--crf", "--labels", "--affinity_at", "--head_weights"]),
        ("refine", ["IMAGES", "MASKS", "--out", "--method {crf,par,pamr}", "--dense_crf.bi_w", "--shard", "IRN"]),
        ("pseudo-labels", ["--images IMAGES", "--out", "--save WHAT", "--labels", "--kind", "--shard", "--data.root"]),
        ("convert", ["SOURCE TARGET", "--to {public,afa,hub,mit,huggingface,mmseg}", "--partial", "--scores"]),
        ("export", ["--checkpoint", "--out", "--format", "--size", "--dynamic", "--takes", "--gives"]),
        ("serve", ["[CHECKPOINT]", "--host", "--port", "--examples", "--max_megabytes", "127.0.0.1"]),
        ("doctor", ["--json"]),
    ],
)
def test_help_of_a_command(capsys, command, texts):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for text in texts:
        assert text in printed
    assert "``" not in printed


def test_help_of_bench_lists_what_there_is(capsys):
    assert cli.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "data" in printed
    assert "operators" in printed and ", par," in printed
    for name in bench.benchmarks():
        assert f"bench_{name}.py" in printed


def test_bench_of_an_operator_is_the_packages(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("afa_kernels.bench.command.main", lambda argv: asked.append(argv) or 1)
    assert cli.main(["bench", "par", "--device", "cpu"]) == cli.main(["bench", "operators", "--full"]) == 1
    assert asked == [["par", "--device", "cpu"], ["--full"]]


def test_help_of_prepare_lists_its_kinds_and_theirs_their_options(capsys):
    assert cli.main(["prepare", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "prepare folder SOURCE --root DIR" in printed and "voc|sbd|coco --root DIR [--offline]" in printed
    for kind, option in (("folder", "--long_side"), ("voc", "--offline"), ("coco", "--offline")):
        with pytest.raises(SystemExit) as end:
            cli.main(["prepare", kind, "--help"])
        assert end.value.code == 0 and option in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("afa 0.")


def test_an_unknown_command_lists_those_there_are(capsys):
    assert cli.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "no command 'trian'" in error and "train" in error


def test_it_runs_as_a_module_without_the_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "afa_model.cli", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "usage: afa COMMAND" in done.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            ["train", "--optim.lrr", "1"],
            "afa train: error: optim.lrr: unknown setting (did you mean optim.lr?)",
        ),
        (["train", "--optim.lr", "quick"], "afa train: error: optim.lr: expected float, got quick"),
        (["train", "--config", "vooc"], "afa train: error: config: no file 'vooc'"),
        (
            ["train", "--data.root", "/nowhere/voc"],
            "afa train: error: data root /nowhere/voc is not a folder",
        ),
        (["evaluate"], "afa evaluate: error: --checkpoint is required (a run's folder"),
        (["pseudo-labels", "--images", "x"], "afa pseudo-labels: error: --checkpoint is required (a run's folder"),
        (["convert", "a.pth"], "afa convert: error: target is required (the file to write"),
        (["export", "--out", "m.onnx"], "afa export: error: --checkpoint is required (a run's folder"),
        (["refine"], "afa refine: error: images is required (folder of photographs"),
        (
            ["train", "--device", "gpu"],
            "afa train: error: device: expected auto, cpu, cuda or cuda:N, got 'gpu' (there is",
        ),
        (["evaluate", "--checkpoint", "/nowhere"], "afa evaluate: error: checkpoint /nowhere: no such file"),
        (["evaluate", "--checkpoint=/nowhere"], "afa evaluate: error: checkpoint /nowhere: no such file"),
        (
            ["predict", "x.jpg", "--checkpoint", "/nowhere"],
            "afa predict: error: checkpoint /nowhere: no such file",
        ),
        (["bench", "parr"], "afa bench: error: no benchmark 'parr'"),
        (["bench", "data", "--data.root", "/nowhere/voc"], "afa bench data: error: data root /nowhere/voc"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert "Traceback" not in error


def test_missing_files_are_all_listed(capsys, tmp_path):
    make_voc(tmp_path / "voc")
    for name in ("2007_000001", "2007_000003"):
        (tmp_path / "voc" / "JPEGImages" / f"{name}.jpg").unlink()
    assert cli.main(["train", *tiny_args(tmp_path / "voc", tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "2007_000001.jpg" in error and "2007_000003.jpg" in error


def test_what_is_no_command_says_what_is(monkeypatch):
    with pytest.raises(SystemExit, match=r"run `afa evaluate ...`, or `python -m afa_model evaluate ...`"):
        afa_model._refuse_parts(["-m"], ["python", "-u", "-m", "afa_model.commands.evaluate", "--help"])
    with pytest.raises(SystemExit, match=r"run `afa COMMAND ...`"):
        afa_model._refuse_parts(["-m"], ["python", "-m", "afa_model.labels.cams"])
    for fine in ("afa_model", "afa_model.cli", "afa_model.__main__", "pytest"):
        afa_model._refuse_parts(["-m"], ["python", "-m", fine, "afa_model.evaluate"])
    afa_model._refuse_parts(["x.py"], ["python", "x.py", "-m", "afa_model.evaluate"])


def test_help_tells_the_values_that_apply(capsys):
    for command, expected in (
        ("evaluate", ["as those of COCO do. (type: str, default: the run's)", "or cuda:N (type: str, default: auto)"]),
        ("predict", ["the largest logit counts. (type: tuple[float, ...], default: the run's)"]),
        ("demo", ["length of the training, in steps. (type: int, default: 400)"]),
    ):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        for text in expected:
            assert text in printed, text


def test_every_setting_is_explained():
    silent = [action.dest for action in parser("afa train", "")._actions if not (action.help or "").strip()]
    assert not silent


def test_bench_data_measures_the_loader(root, capsys):
    assert (
        cli.main(["bench", "data", "--batches=3", "--json=-", f"--data.root={root}", "--data.num_workers=0"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 6
    assert result["images_per_second"] > 0


ENDS = [
    (ConfigError("x: wrong"), 2),
    (DataError("files", ["a", "b"]), 2),
    (CheckpointError("c"), 2),
    (SavingError("disk full"), 1),
    (TrainingError("n"), 1),
]


@pytest.mark.parametrize(
    "command", ["prepare", "train", "evaluate", "predict", "figures", "serve", "convert", "export", "demo", "bench"]
)
@pytest.mark.parametrize(("error", "code"), ENDS)
def test_every_command_ends_in_the_same_way(monkeypatch, capsys, command, error, code):
    def broken(argv):
        raise error

    monkeypatch.setattr(f"afa_model.commands.{command}.main", broken)
    assert cli.main([command]) == code
    assert capsys.readouterr().err == f"afa {command}: error: {error}\n"


def test_of_several_processes_one_tells_a_mistake(monkeypatch, capsys):
    """What was asked wrongly all of them find; what broke may be one's alone."""
    monkeypatch.setenv("RANK", "1")
    for error, said in (
        (ConfigError("x: wrong"), ""),
        (DataError("files"), ""),
        (CheckpointError("c"), "afa train: error: c\n"),
        (TrainingError("n"), "afa train: error: n\n"),
    ):

        def broken(argv, error=error):
            raise error

        monkeypatch.setattr("afa_model.commands.train.main", broken)
        cli.main(["train"])
        assert capsys.readouterr().err == said


def test_the_package_offers_what_the_commands_call():
    import afa_model

    assert set(afa_model.__all__) <= set(dir(afa_model))
    for name in afa_model.__all__:
        assert getattr(afa_model, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        afa_model.nothing  # noqa: B018


def test_asking_for_help_loads_no_torch():
    program = "import sys\nimport afa_model, afa_model.cli as cli\ncli.main(['--help'])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_operators_load_no_compiler():
    """torch.compile's own modules take as long to import as all of PyTorch, and so do Triton's: no call loads them."""
    program = """
import sys, torch, afa_kernels
x, y = torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4, requires_grad=True)
afa_kernels.par(x, y, (1,), 1).sum().backward()
print([m for m in ('torch._dynamo', 'triton') if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
