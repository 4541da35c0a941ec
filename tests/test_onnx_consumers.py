"""What is in an exported file for those who read it: other runtimes and tools, and people."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import WIDTH, Tower, embeddings, randomise_sites, token_ids
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite import _compat
from attnres_rewrite.onnx import comparison, export, files

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
# It writes opset 21, which ONNX Runtime runs from 1.20 on; the default, 23, from 1.23 on.
OLDEST = os.environ.get("ATTNRES_OLDEST_ONNXRUNTIME")


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file, an input of other sizes than those that were traced, and what PyTorch makes of it."""

    path: Path
    x: Tensor
    expected: Tensor

    def check(self, actual: Any, rtol: float = 1e-5) -> None:
        torch.testing.assert_close(torch.as_tensor(actual), self.expected, rtol=rtol, atol=rtol)


def exported(folder: Path, **options: Any) -> Exported:
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    model = randomise_sites(ar.rewrite(Tower(3).eval(), blocks=2, example_inputs=embeddings(), backend="eager"))
    result = ar.export_onnx(model, folder / "model.onnx", embeddings(), dynamic_shapes=(dynamic,), **options)
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        expected = model(x)
        with ar.disabled(model):
            # Were a site a plain sum in a consumer, it would be seen.
            assert not torch.allclose(model(x), expected, rtol=1e-2)
    return Exported(result.path, x, expected)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("tower"))


def run(model: Any, **inputs: Tensor) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    given = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def test_onnx_runtime_and_the_reference_evaluator_agree_with_pytorch(tower: Exported) -> None:
    tower.check(run(str(tower.path), x=tower.x))
    evaluator = onnx.reference.ReferenceEvaluator(str(tower.path))
    tower.check(evaluator.run(None, {"x": tower.x.numpy()})[0])


def test_no_two_functions_have_one_name_and_domain(tower: Exported) -> None:
    """That is what an overload is for, and what older runtimes do not know."""
    model = onnx.load(tower.path)
    sites = [node for node in model.graph.node if node.op_type == "BlockAttnRes"]
    assert [(node.domain, node.name) for node in sites] == [
        (f"attnres.{form}", f"attn_res.{i}")
        for i, form in enumerate(["partial", "partial", "partial", "no_partial", "partial", "partial"])
    ]
    assert [(f.domain, f.name) for f in model.functions] == [
        ("attnres.6_queries", "ScaleQueries"),
        ("attnres.3_reads_first", "AttendBlocks"),
        ("attnres.partial", "BlockAttnRes"),
        ("attnres.3_reads_of_2_blocks_2_partials_last", "AttendBlocks"),
        ("attnres.no_partial", "BlockAttnRes"),
    ]
    assert not any(thing.overload for thing in (*model.functions, *model.graph.node))


def test_a_part_of_the_model_is_extracted(tower: Exported, tmp_path: Path) -> None:
    model = onnx.load(tower.path)
    site = next(node for node in model.graph.node if node.name == "attn_res.4")
    onnx.utils.extract_model(str(tower.path), str(tmp_path / "part.onnx"), ["x"], [site.output[0]])
    part = run(str(tmp_path / "part.onnx"), x=tower.x)
    model.graph.output.append(onnx.helper.make_tensor_value_info(site.output[0], 1, None))
    evaluator = onnx.reference.ReferenceEvaluator(model)
    torch.testing.assert_close(
        torch.as_tensor(part), torch.as_tensor(evaluator.run([site.output[0]], {"x": tower.x.numpy()})[0])
    )


def test_the_inliner_of_onnx_expands_the_functions(tower: Exported) -> None:
    inliner = pytest.importorskip("onnx.inliner")
    inlined = inliner.inline_local_functions(onnx.load(tower.path))
    assert not any(node.domain for node in inlined.graph.node)
    tower.check(run(inlined, x=tower.x))


# Tools of others. `make test-consumers` installs those that are not here otherwise.


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of standard operators alone."""
    return exported(tmp_path_factory.mktemp("plain"), functions=False)


def simplified(path: str) -> Any:
    model, same = pytest.importorskip("onnxsim").simplify(path)
    assert same
    return model


def in_float16(path: str) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(onnx.load(path), keep_io_types=True)


TOOLS: dict[str, tuple[Callable[[str], Any], float]] = {
    "onnxslim": (lambda path: pytest.importorskip("onnxslim").slim(path), 1e-5),
    "onnxsim": (simplified, 1e-5),
    "float16": (in_float16, 2e-2),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_that_write_the_file_anew(tower: Exported, tool: str) -> None:
    change, tolerance = TOOLS[tool]
    tower.check(run(change(str(tower.path)), x=tower.x), tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_quantised_and_sites_stay(tower: Exported, tmp_path: Path, bits: int) -> None:
    """That it runs; what it does to the numbers of a trained model is measured by benchmarks/quantization.py."""
    target = tmp_path / "small.onnx"
    if bits == 8:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(str(tower.path), str(target))
    else:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(onnx.load(tower.path), block_size=32, is_symmetric=True)
        quantizer.process()
        onnx.save(quantizer.model.model, target)
    kinds = [node.op_type for node in onnx.load(target).graph.node]
    assert kinds.count("BlockAttnRes") == 6
    assert kinds.count("MatMulInteger" if bits == 8 else "MatMulNBits") >= 13
    actual = torch.as_tensor(run(str(target), x=tower.x))
    assert actual.shape == tower.expected.shape
    assert actual.isfinite().all()


@pytest.mark.slow
def test_the_version_converter_takes_standard_operators(plain: Exported) -> None:
    converted = pytest.importorskip("onnx.version_converter").convert_version(onnx.load(plain.path), 24)
    assert not converted.functions
    if not export._is_run(24):
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} runs no opset 24")
    plain.check(run(converted, x=plain.x))


@pytest.mark.slow
def test_openvino_takes_standard_operators(plain: Exported) -> None:
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(str(plain.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    plain.check(compiled({"x": plain.x.numpy()})[0])


OTHER = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"x": numpy.load(sys.argv[2])})[0])
print(onnxruntime.__version__)
"""


@pytest.mark.slow
@pytest.mark.skipif(OLDEST is None, reason="ATTNRES_OLDEST_ONNXRUNTIME names no interpreter that has an old one")
def test_the_oldest_onnx_runtime(tmp_path: Path) -> None:
    """``make test-oldest-onnxruntime`` makes the environment, and runs this."""
    import numpy

    old = exported(tmp_path, opset_version=21)
    numpy.save(tmp_path / "x.npy", old.x.numpy())
    command = [str(OLDEST), "-c", OTHER, str(old.path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1.20.")
    old.check(numpy.load(tmp_path / "y.npy"))


# What people find in the file, and beside it


def test_no_path_of_this_machine_is_in_the_file(tower: Exported) -> None:
    content = tower.path.read_bytes()
    assert b"namespace" in content, "what a node belongs to stays"
    for place in (ROOT, Path(torch.__file__).parent, Path(sys.prefix)):
        assert str(place).encode() not in content


@pytest.mark.slow
def test_stack_traces_stay_where_they_are_asked_for(tmp_path: Path) -> None:
    content = exported(tmp_path, stack_traces=True).path.read_bytes()
    assert b"models.py" in content
    assert str(ROOT).encode() in content


def test_what_a_killed_export_left_behind_is_removed(tmp_path: Path) -> None:
    old, recent, other = (tmp_path / name for name in (".attnres-onnx-old", ".attnres-onnx-new", ".attnres-mine"))
    for folder in (old, recent, other):
        folder.mkdir()
        (folder / "model.onnx").write_text("half")
    yesterday = time.time() - 90_000
    for path in (old, old / "model.onnx", other, other / "model.onnx", recent):
        os.utime(path, (yesterday, yesterday))
    with files.temporary_folder(tmp_path / "model.onnx") as mine:
        assert set(tmp_path.iterdir()) == {recent, other, mine}
    assert set(tmp_path.iterdir()) == {recent, other}


def small_model() -> Any:
    from onnxscript import ir

    weight = ir.Value(name="w", const_value=ir.tensor(torch.arange(1000.0), name="w"))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1000]))
    node = ir.node("Add", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def test_weights_of_the_file_before_are_removed(tmp_path: Path) -> None:
    target, folder = tmp_path / "model.onnx", tmp_path / "made"
    folder.mkdir()

    def write(**options: Any) -> list[str]:
        files.save(small_model(), folder / "model.onnx", **options)
        files.publish(folder / "model.onnx", target)
        return sorted(path.name for path in tmp_path.iterdir() if path.is_file())

    assert write(external_data_above=100) == ["model.onnx", "model.onnx.data"]
    assert write() == ["model.onnx"]
    # A file of that name that the model does not refer to is somebody's.
    (tmp_path / "model.onnx.data").write_text("mine")
    assert write() == ["model.onnx", "model.onnx.data"]
    target.write_text("no model")
    assert write() == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").read_text() == "mine"


def test_an_opset_that_onnx_runtime_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = onnx.defs.onnx_opset_version()
    runs = next(version for version in range(newest, 17, -1) if export._is_run(version))
    export._require_opset(runs)
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 99)
    with pytest.raises(ar.OnnxExportError, match=rf"ONNX Runtime .* does not run.* pass opset_version={runs} or an"):
        export._require_opset(runs + 1)


# The comparison


A, OTHER_A = torch.ones(2, 3), torch.ones(2, 3) * 1.5


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"logits": A, "present.0.key": A}, r"has 2 outputs \(logits, present.0.key\) and PyTorch's 1 \(logits\)"),
        ({}, r"has 0 outputs \(\) and PyTorch's 1 \(logits\)"),
        ({"hidden": A}, r"1 outputs \(hidden\) and PyTorch's 1 \(logits\)"),
        ({"logits": torch.ones(2, 4)}, r"output 'logits' has shape \(2, 4\) in ONNX Runtime and \(2, 3\) in PyTorch"),
    ],
)
def test_outputs_are_compared_before_their_values(found: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ar.OnnxExportError, match=message):
        comparison._by_output(found, {"logits": A})


def test_every_output_has_a_difference_of_its_own() -> None:
    differences = comparison._by_output({"a": OTHER_A, "output_x": A}, {"a": A, "x": A})
    assert differences == {"a": 0.5, "output_x": 0.0}


class Wrapped(dict[str, Any]):
    """An output that is a pytree without names, as diffusers' are."""


torch.utils._pytree.register_pytree_node(
    Wrapped, lambda d: (list(d.values()), list(d)), lambda values, keys: Wrapped(zip(keys, values, strict=True))
)


def test_names_of_outputs_without_key_paths() -> None:
    assert list(_compat.named_tensors(Wrapped(sample=A, rest=(A, None, A)))) == ["sample", "rest.0", "rest.2"]
    assert list(_compat.named_tensors((A, Wrapped(sample=A)))) == ["0", "1"]
    assert list(_compat.named_tensors({"a": A, "b": [None, A]})) == ["a", "b.1"]
    assert list(_compat.named_tensors(A)) == [""]


class Reader(Tower):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return Wrapped(sample=logits, nothing=None, twice=logits * 2)


@pytest.mark.slow
def test_an_output_class_without_key_paths(tmp_path: Path) -> None:
    model = randomise_sites(ar.rewrite(Reader(2).eval(), 2, example_inputs=embeddings(), backend="eager"))
    assert ar.export_onnx(model, tmp_path / "model.onnx", embeddings()).outputs == ("sample", "twice")


# Architectures


@pytest.mark.slow
def test_diffusers_dit(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    options = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "patch_size": 2}
    sizes = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10}
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**options, **sizes).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([1, 2]),
    }
    randomise_sites(ar.rewrite(model, 2, example_inputs=inputs, backend="eager"))
    result = ar.export_onnx(model, tmp_path / "model.onnx", inputs)
    assert result.outputs == ("sample",)
    assert result.max_difference < 1e-4


@pytest.mark.slow
def test_t5_without_a_cache(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=61, d_model=WIDTH, d_kv=8, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": token_ids(2, 7), "decoder_input_ids": token_ids(2, 5, seed=1)}
    randomise_sites(ar.rewrite(model, 2, example_inputs=inputs, backend="eager"))
    configurations = [model.config, model.encoder.config, model.decoder.config]
    before = [configuration.use_cache for configuration in configurations]
    assert before[2], "the decoder's own configuration asks for a cache"
    result = ar.export_onnx(model, tmp_path / "model.onnx", inputs)
    assert result.outputs == ("logits", "encoder_last_hidden_state")
    assert result.max_difference < 1e-4
    assert [configuration.use_cache for configuration in configurations] == before


def mistral(window: int) -> nn.Module:
    config = transformers.MistralConfig(
        vocab_size=61,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=window,
    )
    return transformers.MistralForCausalLM(config)


def gemma3(window: int) -> nn.Module:
    """Every other layer has a window."""
    config = transformers.Gemma3TextConfig(
        vocab_size=61,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return transformers.Gemma3ForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("make", [mistral, gemma3])
@pytest.mark.parametrize("length", [3, 9], ids=["prompt within the window", "prompt past the window"])
def test_a_cache_with_a_sliding_window(tmp_path: Path, make: Callable[[int], nn.Module], length: int) -> None:
    torch.manual_seed(0)
    model = randomise_sites(ar.rewrite(make(6).eval(), 2, example_inputs={"input_ids": token_ids()}, backend="eager"))
    ids = token_ids(2, length)
    result = ar.export_onnx(model, tmp_path / "model.onnx", {"input_ids": ids}, use_cache=True)
    assert result.max_difference < 1e-4
    past_names = [name for name in result.inputs if name.startswith("past_key_values.")]
    layers = range(model.config.num_hidden_layers)
    assert past_names == [f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")]

    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    shapes = {read.name: read.shape for read in session.get_inputs()}
    past = {name: torch.zeros(2, shapes[name][1], 0, shapes[name][3]) for name in past_names}
    fed, positions, tokens = ids, torch.arange(length).expand(2, length), []
    for _ in range(12):
        feed = {"input_ids": fed, "position_ids": positions, **past}
        logits, *present = session.run(None, {name: feed[name].numpy() for name in result.inputs})
        fed, positions = torch.from_numpy(logits)[:, -1:].argmax(-1), positions[:, -1:] + 1
        tokens.append(fed)
        past = {name: torch.from_numpy(value) for name, value in zip(past_names, present, strict=True)}
    made = torch.cat([ids, *tokens], 1)
    wide = ar.rewrite(make(64).eval(), 2, example_inputs={"input_ids": token_ids()}, backend="eager")
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, seeing_all = (m(input_ids=made[:, :-1], use_cache=False).logits for m in (model, wide))
    assert torch.equal(made[:, length:], expected[:, length - 1 :].argmax(-1))
    torch.testing.assert_close(torch.from_numpy(logits)[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seeing_all[:, -1], expected[:, -1], rtol=1e-2)
