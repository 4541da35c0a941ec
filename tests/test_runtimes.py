"""Models that run where this package is not: the recipes of docs/onnx.md, in the runtimes that they are for.

``make test-consumers`` installs these; a test is skipped where its runtime is not installed. Those that do not get on
with what else is installed are in folders of their own under ``<environment>/consumers``.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tower, embeddings, llama, randomise_sites, token_ids

import attnres_rewrite as ar

CONSUMERS = Path(sys.prefix) / "consumers"
PAGE = Path(__file__).parents[1] / "docs" / "onnx.md"

pytestmark = pytest.mark.slow


def recipe(name: str) -> str:
    """The code behind the comment ``name`` in docs/onnx.md."""
    found = re.search(rf"<!-- {name} -->\n\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found, name
    return found[1]


def folder_of(consumer: str) -> Path:
    folder = CONSUMERS / consumer
    if not folder.is_dir():
        pytest.skip(f"`make test-consumers` has not installed {consumer}")
    return folder


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What ``command`` prints, which is run in ``folder`` and does not find this package."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options: dict[str, Any] = {"cwd": folder, "env": {**inherited, **environment}, "timeout": 600}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_python(code: str, consumer: Path, folder: Path) -> None:
    (folder / "recipe.py").write_text(f'import sys\n\nsys.modules["attnres_rewrite"] = None\n{code}')
    run([sys.executable, "-W", "ignore", "recipe.py"], folder, PYTHONPATH=str(consumer))


def rewritten_llama() -> Any:
    torch.manual_seed(0)
    model = randomise_sites(ar.rewrite(llama(2).eval(), blocks=2, backend="eager"))
    model.generation_config.eos_token_id = None
    return model


def write_decoder(model: Any, folder: Path) -> None:
    """A file with a cache and a mask."""
    example = {"input_ids": token_ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    ar.export_onnx(model, folder / "model.onnx", example, use_cache=True)


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """16 tokens; others than without the rewrite."""
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    with torch.no_grad():
        tokens = model.generate(ids, **options)
        with ar.disabled(model):
            assert not torch.equal(model.generate(ids, **options), tokens)
    return tokens


def test_onnxruntime_genai(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model, ids = rewritten_llama(), token_ids(1, 5)
    write_decoder(model, tmp_path)
    expected = generated(model, ids, torch.ones_like(ids))[0]
    absent = next(token for token in range(model.config.vocab_size) if token not in expected)
    names: dict[str, Any] = {"config": model.config, "eos": absent}
    exec(recipe("genai_config"), names)
    (tmp_path / "genai_config.json").write_text(json.dumps(names["genai_config"]))
    loaded = genai.Model(str(tmp_path))
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=21, batch_size=1)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(ids.numpy())
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == expected.tolist()


OPTIMUM = """
# What is installed beside it is for a newer huggingface_hub.
sys.modules["diffusers"] = None
import torch
input_ids, attention_mask = torch.load("inputs.pt")
{recipe}
torch.save(tokens, "tokens.pt")
"""


def test_optimum_generates_from_a_folder(tmp_path: Path) -> None:
    consumer = folder_of("optimum")
    model, ids = rewritten_llama(), token_ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    write_decoder(model, tmp_path)
    exec(recipe("optimum_folder"), {"model": model, "folder": tmp_path})
    torch.save((ids, mask), tmp_path / "inputs.pt")
    run_python(OPTIMUM.format(recipe=recipe("optimum").replace('"folder"', '"."')), consumer, tmp_path)
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), generated(model, ids, mask))


@pytest.fixture(scope="module", params=[True, False], ids=["functions", "standard operators"])
def for_node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a file and the packages, and the model."""
    consumer, folder = folder_of("node"), tmp_path_factory.mktemp("node")
    (folder / "node_modules").symlink_to(consumer / "node_modules")
    model = rewritten_llama()
    ar.export_onnx(model, folder / "model.onnx", {"input_ids": token_ids(2, 5)}, functions=request.param)
    return folder, model


@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_node(for_node: tuple[Path, Any], package: str) -> None:
    (folder, model), ids = for_node, token_ids(1, 9)
    node = shutil.which("node") or pytest.skip("there is no node")
    code = recipe("node").replace("onnxruntime-node", package)
    report = "console.log(JSON.stringify([logits.dims, Array.from(logits.data)]));"
    (folder / "run.mjs").write_text(f"const tokens = {ids[0].tolist()};\n{code}\n{report}\n")
    shape, values = json.loads(run([node, "run.mjs"], folder).splitlines()[-1])
    with torch.no_grad():
        expected = model(ids).logits
        with ar.disabled(model):
            assert not torch.allclose(model(ids).logits, expected, rtol=1e-2)
    torch.testing.assert_close(torch.tensor(values).reshape(shape), expected, rtol=1e-4, atol=1e-4)


EXECUTORCH = """
import torch
expanded = torch.export.load("expanded.pt2")
x = torch.load("x.pt")
{recipe}
torch.save(y, "y.pt")
"""


@pytest.mark.parametrize("partitioner", ["XNNPACK", "portable"])
def test_executorch(tmp_path: Path, partitioner: str) -> None:
    consumer = folder_of("executorch")
    sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("sequence", max=64)}
    plain = torch.export.export(Tower(4).eval(), (embeddings(),), dynamic_shapes=(sizes,))
    program = ar.rewrite(plain, blocks=2)
    for name, value in program.state_dict.items():
        if name.endswith(".query"):
            torch.nn.init.normal_(value)
    x = embeddings(3, 9, seed=1)
    torch.export.save(program.run_decompositions(ar.decompositions()), tmp_path / "expanded.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = recipe("executorch")
    if partitioner == "portable":
        code = code.replace("[XnnpackPartitioner()]", "[]")
    run_python(EXECUTORCH.format(recipe=code), consumer, tmp_path)
    expected = program.module()(x).detach()
    assert not torch.allclose(plain.module()(x), expected, rtol=1e-2)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), expected, rtol=1e-4, atol=1e-4)
