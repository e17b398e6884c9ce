"""The parts of an installation: the operators need torch alone, and what needs more says how to get it.

Here everything is installed; a process of its own is made to believe that nothing but torch is.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
from support.common import ROOT
from support.requirements import brought, project

import afa_kernels
from afa_model.errors import OF_SERVE, OF_TRAIN, MissingError, missing_named

ALONE = f"""
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OF_TRAIN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing())
"""


def run(program: str) -> str:
    """What a program prints where nothing but torch is installed."""
    command = [sys.executable, "-W", "ignore", "-c", ALONE + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(package: str) -> set[str]:
    """The packages that the modules of one import, within functions too, of other people's."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"afa_kernels", "afa_model"}


@pytest.fixture(scope="module")
def alone() -> dict:
    """What the operators do where nothing but torch is installed."""
    return json.loads(
        run("""
import json, sys, torch
before = set(sys.modules)
import afa_kernels
told = {"imported": sorted(set(sys.modules) - before), "loaded": list(sys.modules), "made": [], "dispatched": []}

from afa_kernels.core import registration
make = registration.make_autograd_impl
registration.make_autograd_impl = lambda op, info: told["dispatched"].append(op.name()) or make(op, info)
function = registration.Operator._as_function
registration.Operator._as_function = lambda operator: told["made"].append(operator.name) or function(operator)
masks = torch.rand(1, 1, 4, 4, requires_grad=True)
told["gradients"] = []
for _ in range(2):
    afa_kernels.par(torch.rand(1, 3, 4, 4), masks, (1,), 1).sum().backward()
    told["gradients"].append(float(masks.grad.sum()))

image = torch.randint(256, (3, 8, 9), dtype=torch.uint8)
told["crf"] = list(afa_kernels.crf_inference(image, torch.rand(2, 8, 9), t=1).shape)
try:
    afa_kernels.crf_inference(image, [[[1.0]]])
except ModuleNotFoundError as error:
    told["error"] = str(error)
print(json.dumps(told))
""")
    )


def test_importing_the_operators_imports_torch_and_nothing_else(alone):
    """Of our own modules too only what is needed: neither kernels of a backend nor what is asked for by its name."""
    assert {name.partition(".")[0] for name in alone["imported"]} == {"afa_kernels"}
    assert {"timm", "torchvision", "numpy", "PIL", "rich", "triton", "torch._dynamo"} & set(alone["loaded"]) == set()
    asked_for = re.compile(r"triton_|\.bench|\.compat|ops\.\w+\.native")
    assert [name for name in alone["imported"] if asked_for.search(name)] == []


def test_a_gradient_is_not_prepared_before_it_is_asked_for(alone):
    """For each of the operators that takes a millisecond."""
    if not afa_kernels.build_info()["native"]:
        pytest.skip(afa_kernels.build_info()["native_reason"])
    assert "afa::par" in alone["made"] and len(set(alone["made"])) == len(alone["made"]) < 5
    assert alone["dispatched"] == []  # eager calls need no more than a function of autograd
    first, both = alone["gradients"]
    assert first > 1 and both == pytest.approx(2 * first, rel=0.2)


def test_the_operators_run_on_torch_alone(alone):
    assert alone["crf"] == [2, 8, 9]
    expected = "probs is no tensor, and numpy, which would read it, is not installed: pip install numpy"
    assert alone["error"] == expected


def test_what_the_operators_import_is_torch():
    assert imported("afa_kernels") == {"torch", "triton", "numpy", "pydensecrf"}  # numpy: of those who hand over arrays


def test_what_is_left_out_is_named_with_the_command_that_brings_it():
    program = """
from afa_model import cli
import afa_model, contextlib, io
assert cli.main(["--help"]) == cli.main(["doctor"]) == cli.main(["bench", "--help"]) == 0
for command in set(cli.COMMANDS) - {"doctor", "bench"}:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main([command])
    print("told", code, said.getvalue().strip())
for name in afa_model.__all__:
    try:
        getattr(afa_model, name)
    except ImportError as error:
        print("told 2 afa : error:", error)
"""
    told = [line for line in run(program).splitlines() if line.startswith("told")]
    assert len(told) == 12 + 5
    form = r"told 2 afa [\w-]*\s?: error: \w+ is not installed \(.*\): pip install 'afa\[train\]'"
    assert [line for line in told if not re.fullmatch(form, line)] == []


def test_an_error_of_ones_own_import_stays():
    """A module of this package, or of someone else's, that is not there is no part left out."""
    for name in ("afa_model.nothing", "someone"):
        with pytest.raises(ModuleNotFoundError) as caught, missing_named():
            raise ModuleNotFoundError(name=name)
        assert not isinstance(caught.value, MissingError)


NAMED_WHERE_THEY_ARE_USED = {"onnx", "onnxruntime", "pillow_heif", "pycocotools", "scipy"}


def test_every_package_that_the_model_imports_is_known_to_be_of_an_extra():
    """Of the message, and of what pip is told."""
    assert imported("afa_model") - {"torch"} == OF_TRAIN - {"tensorboard"} | OF_SERVE | NAMED_WHERE_THEY_ARE_USED
    asked = {_name(each) for each in brought("train")}
    below = {_name(each) for name in asked for each in importlib.metadata.requires(name) or ()}
    everything = importlib.metadata.packages_distributions()
    of_none = [name for name in OF_TRAIN if not {_name(each) for each in everything[name]} & (asked | below)]
    assert of_none == []


def test_what_is_asked_for_is_torch_and_all_of_it_is_everything_that_runs():
    assert [_name(each) for each in project["dependencies"]] == ["torch"]
    users = set(project["optional-dependencies"]) - {"test", "dev", "docs", "all"}
    assert set(brought("all")) == {each for extra in users for each in brought(extra)}
    assert "torch" not in {_name(each) for each in brought("all")}


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
