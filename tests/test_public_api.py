"""The public surface, pinned by name: a change here is a change for users."""

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnres_rewrite as ar
from attnres_rewrite import distributed

ROOT = Path(__file__).parent.parent

FUNCTIONS = {
    "attnres_parameters": ["model"],
    "decompositions": [],
    "depth_attention": ["model", "example_inputs"],
    "disabled": ["model"],
    "explain": ["model", "blocks", "example_inputs", "config"],
    "export_onnx": ["model", "path", "example_inputs", "use_cache", "dynamic_shapes"],
    "export_state_dict": ["state_dict", "convention"],
    "from_pretrained": ["directory", "model", "backend", "options"],
    "load_plain_optimizer_state": ["optimizer", "state_dict", "model"],
    "import_state_dict": ["state_dict", "convention", "config"],
    "log_dict": ["model", "example_inputs"],
    "muon_groups": ["model", "weight_decay", "attnres_lr"],
    "parameter_groups": ["model", "weight_decay", "attnres_lr"],
    "rewrite": ["model", "blocks", "example_inputs", "config", "backend", "compile_options"],
    "save_pretrained": ["model", "directory", "options"],
    "training_dynamics": ["model", "example_inputs", "loss", "config"],
    "undo": ["model"],
    "verify": ["model", "example_inputs"],
    "warm_up": ["model", "inputs", "modes", "loss", "progress"],
}
CLASSES = {
    "AttnResBackend",
    "AttnResConfig",
    "DepthAttention",
    "OnnxExport",
    "Report",
    "TrainingDynamics",
    "Verification",
}
ERRORS = {
    "AttnResError": RuntimeError,
    "BlockPartitionError": ValueError,
    "CheckpointError": ar.AttnResError,
    "ExampleInputsError": ValueError,
    "GraphBreakError": ar.AttnResError,
    "MeshError": ValueError,
    "MissingPackageError": ImportError,
    "NoResidualStreamError": ar.AttnResError,
    "NotRewrittenError": ar.AttnResError,
    "OnnxExportError": ar.AttnResError,
    "OnnxKernelError": ar.AttnResError,
    "UnsupportedResidualError": ar.AttnResError,
}


def test_names() -> None:
    assert set(ar.__all__) == FUNCTIONS.keys() | CLASSES | ERRORS.keys()
    assert ar.__all__ == sorted(ar.__all__)
    assert all(hasattr(ar, name) for name in ar.__all__)
    assert isinstance(ar.__version__, str)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name) -> None:
    parameters = list(inspect.signature(getattr(ar, name)).parameters)
    assert parameters[: len(FUNCTIONS[name])] == FUNCTIONS[name]


@pytest.mark.parametrize("name", ar.__all__)
def test_every_public_name_is_documented_and_not_shadowed_by_a_module(name) -> None:
    value = getattr(ar, name)
    assert inspect.isfunction(value) or inspect.isclass(value)
    assert len(inspect.getdoc(value) or "") > 40
    assert not (ROOT / "attnres_rewrite" / f"{name}.py").exists()


def test_names_of_the_onnx_module() -> None:
    own = {"RegisteredKernel", "build_kernel", "register"}
    assert set(ar.onnx.__all__) == own | {"OnnxExport", "export_onnx"}
    assert all(len(inspect.getdoc(getattr(ar.onnx, name)) or "") > 40 for name in own)
    assert list(inspect.signature(ar.onnx.register).parameters) == ["session_options", "model", "library"]
    assert list(inspect.signature(ar.onnx.build_kernel).parameters) == ["out", "compiler"]


def test_names_for_several_processes() -> None:
    """In a module of its own, which imports PyTorch's engines when it is asked for one of them."""
    parameters = list(inspect.signature(distributed.build_stages).parameters)
    assert parameters == ["pipe", "device", "group", "cached"]
    assert len(inspect.getdoc(distributed.build_stages) or "") > 40
    with pytest.raises(AttributeError, match="has no attribute 'build_stage'"):
        distributed.build_stage  # noqa: B018


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name) -> None:
    error = getattr(ar, name)
    assert issubclass(error, ar.AttnResError)
    assert issubclass(error, ERRORS[name])
    assert issubclass(error, RuntimeError)


def test_configuration() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(ar.AttnResConfig)}
    assert defaults == {
        "blocks": 8,
        "layers_per_block": None,
        "aggregation": "mean",
        "eps": 1e-6,
        "scale": 1.0,
        "key_gain": True,
        "schedule": "auto",
        "streams": None,
        "leftovers": "refuse",
        "sublayers_per_block": None,
        "compile_layers": "auto",
        "gate": False,
        "value_norm": False,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        ar.AttnResConfig().blocks = 3


@pytest.mark.parametrize(
    "config",
    [
        ar.AttnResConfig(),
        ar.AttnResConfig("full", aggregation="sum", eps=0.0, scale=0.5, key_gain=False),
        ar.AttnResConfig({"encoder": 2, "decoder": "full"}, streams=("encoder", "decoder")),
        ar.AttnResConfig(layers_per_block=12),
        ar.AttnResConfig(sublayers_per_block=3),
    ],
)
def test_configuration_as_json(config) -> None:
    assert ar.AttnResConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["eps"] == config.eps


def test_the_backend_is_registered_and_the_op_is_there() -> None:
    assert "attnres" in torch.compiler.list_backends()
    arguments = "Tensor[] sources, Tensor query, Tensor? gain, float eps, float scale, bool sum"
    arguments += ", Tensor? gate=None, float base=0., bool value_norm=False"
    assert str(torch.ops.attnres.block_attn_res.default._schema) == f"attnres::block_attn_res({arguments}) -> Tensor"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-W", "ignore", "-c", code]
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=True)


REWRITE = "import attnres_rewrite as ar; from models import *; ar.rewrite(Tower(4), 2, example_inputs=embeddings())"


@pytest.mark.slow
def test_the_passes_log_what_they_did() -> None:
    done = run_python(REWRITE, TORCH_LOGS="+attnres_rewrite.passes")
    for line in (
        "InlineRegions: 0 changed in",
        "ResolveInplaceOps: 0 changed in",
        "FindStreams: 1 streams with [8] branches, 0 adds rejected in",
        "GroupLayers: stream '': 4 layers in 2 blocks in",
    ):
        assert line in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_silence_without_being_asked() -> None:
    done = run_python(REWRITE)
    assert (done.stdout, done.stderr) == ("", "")


def test_importing_the_package_imports_no_optional_dependency() -> None:
    code = "import sys, attnres_rewrite; print([m for m in sys.modules if '.' not in m])"
    modules = run_python(code).stdout
    for name in (
        "transformers",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "matplotlib",
        "typer",
        "rich",
        "accelerate",
        "lightning",
    ):
        assert f"'{name}'" not in modules


SETTINGS = """
import sys, torch
import torch.compiler.config as public
import torch.fx.experimental._config
def settings():
    import torch._functorch.config, torch._inductor.config
    modules = (public, torch._dynamo.config, torch._functorch.config, torch._inductor.config)
    return [(m.__name__, name, entry.user_override) for m in modules for name, entry in m._config.items()]
"""


@pytest.mark.slow
def test_importing_the_package_is_lazy_and_sets_nothing() -> None:
    """Neither Dynamo nor Inductor, which take seconds, and no setting of either."""
    code = "import sys, attnres_rewrite; print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"
    code = SETTINGS + "import torch._dynamo; a = settings(); import attnres_rewrite; print(settings() == a)"
    assert run_python(code).stdout.strip() == "True"
    # Nor do rewriting and running a model leave a setting behind, with transformers there, whose logging is ignored.
    code = (
        SETTINGS
        + "import transformers, torch._dynamo; a = settings(); "
        + REWRITE.replace("embeddings())", "embeddings(), backend='eager')(embeddings())")
    )
    code += "; print([(x, y) for x, y in zip(settings(), a) if x != y])"
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.slow
def test_inductor_expands_the_operators_whoever_imports_it() -> None:
    code = """
import attnres_rewrite, torch
from torch._inductor import decomposition
names = ("block_attn_res", "attend_blocks", "merge_partial")
ops = [name + suffix for name in names for suffix in ("", "_backward")]
tables = (decomposition.decompositions, decomposition.fast_random_decomps())
print(all(getattr(torch.ops.attnres, op).default in table for op in ops for table in tables))
"""
    assert run_python(code).stdout.strip() == "True"


def private_names(path: Path, own: set[str]) -> list[str]:
    """What a file takes of other packages that begins with an underscore: imports, and attributes that it looks up."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if any(map(is_private, name.name.split(".")))]
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("attnres_rewrite"):
            names = [f"{node.module}.{name.name}" for name in node.names]
            found += [name for name in names if any(map(is_private, name.split(".")))]
    return [f"{path.name}: {name}" for name in found]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of_our_own(paths: list[Path]) -> set[str]:
    names: set[str] = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for part in (part for target in targets for part in ast.walk(target)):
                if isinstance(part, ast.Name):
                    names.add(part.id)
                elif isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                    names.add(part.attr)
    return names


def test_private_names_of_other_packages_are_in_one_file() -> None:
    """DESIGN: a new PyTorch release is checked by reading `_compat.py`."""
    paths = [path for path in (ROOT / "attnres_rewrite").rglob("*.py") if path.name != "_compat.py"]
    own = names_of_our_own(paths)
    found = {name for path in paths for name in private_names(path, own)}
    assert not found
    assert private_names(ROOT / "attnres_rewrite" / "_compat.py", own), "the search itself finds something"
