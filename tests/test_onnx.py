"""Export to ONNX: what ONNX Runtime computes, what is in the file, and what happens when something is wrong."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import WIDTH, Tower, embeddings, gpt2, llama, mostly_slow, randomise_sites, token_ids
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.onnx import conversion, export, files, form, function, sizes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def session(path: Path | bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    given = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run(path: Path | bytes, **inputs: Tensor) -> Tensor:
    output: Tensor = torch.from_numpy(
        session(path).run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    )
    return output


def site_nodes(model: Any) -> list[Any]:
    return [n for n in model.graph.node if n.domain.startswith("attnres.") and n.op_type == "BlockAttnRes"]


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.domain.startswith("attnres."))


def graph_values(result: ar.OnnxExport) -> list[Any]:
    graph = onnx.load(result.path).graph
    return [*graph.input, *graph.output]


@pytest.fixture
def tower() -> nn.Module:
    return randomise_sites(ar.rewrite(Tower(3).eval(), blocks=2, example_inputs=embeddings(), backend="eager"))


@pytest.mark.slow
def test_a_live_llama_with_random_queries_equals_pytorch_at_other_sizes(tmp_path: Path) -> None:
    model = randomise_sites(ar.rewrite(llama().eval(), blocks=3, backend="eager"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(model.__dict__)
    result = ar.export_onnx(model, tmp_path / "model.onnx", {"input_ids": token_ids(2, 7)})

    assert (result.sites, result.inputs, result.outputs) == (10, ("input_ids",), ("logits",))
    assert result.max_difference == max(result.differences.values()) < 1e-5
    assert set(result.differences) == {(3, 6), (4, 3), (1, 8)}
    # Sizes that export_onnx did not try itself, compared here and not by it.
    for batch, length in ((1, 1), (5, 12)):
        ids = token_ids(batch, length, seed=batch)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        torch.testing.assert_close(run(result.path, input_ids=ids), expected, rtol=1e-5, atol=1e-5)
    # With plain residuals the answer would be another one, so the comparison could have failed.
    with ar.disabled(model), torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-2)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.use_cache
    assert set(model.__dict__) == attributes

    file = onnx.load(result.path)
    onnx.checker.check_model(file, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(file, strict_mode=True, data_prop=True)
    assert [d.dim_value or d.dim_param for d in inferred.graph.output[0].type.tensor_type.shape.dim][-1] == 61
    assert [node.name for node in site_nodes(file)] == [f"model.attn_res.{i}" for i in range(10)]
    forms = {
        "attnres.10_queries": "ScaleQueries",
        "attnres.3_reads_first": "AttendBlocks",
        "attnres.4_reads_of_2_blocks_3_partials": "AttendBlocks",
        "attnres.3_reads_of_3_blocks_2_partials_last": "AttendBlocks",
        "attnres.partial": "BlockAttnRes",
        "attnres.no_partial": "BlockAttnRes",
    }
    assert {(f.domain, f.name, f.overload) for f in file.functions} == {(form, forms[form], "") for form in forms}
    assert {entry.domain for entry in file.opset_import} == {"", *forms}
    assert all("arXiv:2603.15031" in f.doc_string for f in file.functions)
    # The norms of the model, and none of its parts, are left.
    counts = Counter(node.op_type for node in file.graph.node)
    assert counts["RMSNormalization"] == 11
    assert not {"ReduceMean", "Pow", "Sqrt"} & set(counts)
    properties = {entry.key: entry.value for entry in file.metadata_props}
    assert properties["attnres.version"] == ar.__version__ == file.producer_version
    assert json.loads(properties["attnres.blocks"]) == {"model": 3}
    sources = json.loads(properties["attnres.sources_per_site"])
    assert sources == {"model": [2, 2, 2, 2, 3, 3, 3, 3, 4, 4]}
    assert [node.domain.removeprefix("attnres.") for node in site_nodes(file)] == [
        *["partial"] * 3,
        *["no_partial", *["partial"] * 3],
        *["no_partial", *["partial"] * 2],
    ]
    names = {initializer.name.removesuffix(".transposed") for initializer in file.graph.initializer}
    assert {name for name in before if "norm" not in name and "_extra_state" not in name} <= names


@pytest.mark.slow
@pytest.mark.parametrize("sites", ["shared", "whole"])
def test_every_zero_query_stays_a_weight_of_its_own(tmp_path: Path, tower: nn.Module, sites: Any) -> None:
    with torch.no_grad():
        for name, parameter in ar.attnres_parameters(tower):
            parameter.fill_(0.0 if name.endswith("query") else 1.0)
    result = ar.export_onnx(tower, tmp_path / "model.onnx", embeddings(), sites=sites)
    file = onnx.load(result.path)
    weights = {initializer.name: initializer for initializer in file.graph.initializer}
    queries = [f"attn_res.{i}.query" for i in range(6)]
    both = [(query, query.replace("query", "gain")) for query in queries]
    if sites == "whole":
        assert [tuple(node.input[-2:]) for node in site_nodes(file)] == both
        assert [len(node.input) - 2 for node in site_nodes(file)] == [2, 2, 2, 2, 3, 3]
    else:
        (scaled,) = (node for node in file.graph.node if node.op_type == "ScaleQueries")
        assert sorted(zip(scaled.input[:6], scaled.input[6:], strict=True)) == both
        merging = [node for node in site_nodes(file) if len(node.input) > 1]
        assert all(node.input[3] == f"{node.name}.column" for node in merging)
    assert not any(onnx.numpy_helper.to_array(weights[query]).any() for query in queries)
    # A query that is set in the file works as the same query in PyTorch.
    query = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    weights["attn_res.3.query"].CopyFrom(onnx.numpy_helper.from_array(query.numpy(), "attn_res.3.query"))
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        unchanged = tower(x)
        tower.attn_res[3].query.copy_(query)
        expected = tower(x)
    actual = run(file.SerializeToString(), x=x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(actual, unchanged, rtol=1e-3)


@pytest.mark.parametrize("options", mostly_slow([{"functions": False}, {"opset_version": 20}]), ids=str)
def test_without_functions_and_for_older_opsets(tmp_path: Path, tower: nn.Module, options: dict[str, Any]) -> None:
    result = ar.export_onnx(tower, tmp_path / "model.onnx", embeddings(), **options)
    file = onnx.load(result.path)
    version = next(entry.version for entry in file.opset_import if not entry.domain)
    assert version == options.get("opset_version", 23)
    assert len(site_nodes(file)) == (6 if options.get("functions", True) else 0)
    assert bool(file.functions) is options.get("functions", True)
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), tower(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_exported_program_is_exported_as_it_is(tmp_path: Path) -> None:
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": dynamic, "use_cache": None}
    inputs = {"input_ids": token_ids(2, 7), "use_cache": False}
    program = torch.export.export(llama(2).eval(), (), inputs, dynamic_shapes=shapes, strict=False)
    program = ar.rewrite(program, blocks=2)
    for name, value in program.state_dict.items():
        if name.endswith(".query"):
            torch.nn.init.normal_(value)
    result = ar.export_onnx(program, tmp_path / "llama.onnx")
    assert (result.outputs, set(result.differences)) == (("logits",), {(3, 6), (4, 3), (2, 8)})
    ids = token_ids(3, 5)
    expected = program.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(run(result.path, input_ids=ids), expected, rtol=1e-5, atol=1e-5)


def test_a_program_without_example_inputs_asks_for_them(tmp_path: Path) -> None:
    program = ar.rewrite(torch.export.export(Tower(2), (embeddings(),)), blocks=2)
    program.example_inputs = None
    with pytest.raises(ar.ExampleInputsError, match="carries no example inputs"):
        ar.export_onnx(program, tmp_path / "model.onnx")
    assert ar.export_onnx(program, tmp_path / "model.onnx", embeddings()).sites == 4


def test_a_graph_module_is_exported_as_it_is(tmp_path: Path) -> None:
    traced = torch.fx.symbolic_trace(Tower(3).eval())
    module = randomise_sites(ar.rewrite(traced, blocks=2, example_inputs=embeddings()))
    result = ar.export_onnx(module, tmp_path / "model.onnx", embeddings())
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_model_in_training_is_exported_for_evaluation(tmp_path: Path) -> None:
    model = Tower(2)
    model.norm = nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.5), nn.Dropout(0.5))
    ar.rewrite(model.train(), blocks=2, example_inputs=embeddings(), backend="eager")
    model.norm[2].eval()
    result = ar.export_onnx(randomise_sites(model), tmp_path / "model.onnx", embeddings())
    assert model.training
    assert [module.training for module in model.norm] == [True, True, False]
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", mostly_slow(["mean", "sum"], "sum"))
def test_aggregation_scale_and_missing_gain(tmp_path: Path, aggregation: str) -> None:
    config = ar.AttnResConfig(blocks=2, aggregation=aggregation, scale=0.5, key_gain=False)  # type: ignore[arg-type]
    model = randomise_sites(ar.rewrite(Tower(3).eval(), config=config, example_inputs=embeddings(), backend="eager"))
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", mostly_slow([torch.float64, torch.float16, torch.bfloat16]), ids=str)
def test_precisions(tmp_path: Path, dtype: torch.dtype) -> None:
    x = embeddings().to(dtype)
    model = randomise_sites(ar.rewrite(Tower(3).eval().to(dtype), blocks=2, example_inputs=x, backend="eager"))
    result = ar.export_onnx(model, tmp_path / "model.onnx", x)
    assert 0 < result.max_difference < {torch.float64: 1e-10, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    file = onnx.load(result.path)
    names = {torch.float64: "DOUBLE", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
    kind = onnx.TensorProto.DataType.Value(names[dtype])
    assert {value.data_type for value in file.graph.initializer if "weight" in value.name} == {kind}
    assert {value.type.tensor_type.elem_type for value in (*file.graph.input, *file.graph.output)} == {kind}
    # The sites compute in float32, or in float64, whatever comes in.
    casts = {node.op_type for f in file.functions for node in f.node}
    assert ("Cast" in casts) is (dtype != torch.float64)


@pytest.mark.slow
def test_a_cache_with_a_padded_batch(tmp_path: Path) -> None:
    model = randomise_sites(ar.rewrite(llama(2).eval(), blocks=2, backend="eager"))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": token_ids(2, 5), "attention_mask": mask}
    result = ar.export_onnx(model, tmp_path / "model.onnx", inputs, use_cache=True)
    caches = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert set(result.inputs) == {
        *("input_ids", "attention_mask", "position_ids"),
        *(f"past_key_values.{cache}" for cache in caches),
    }
    assert result.outputs == ("logits", *(f"present.{cache}" for cache in caches))
    assert result.max_difference < 1e-5
    assert set(result.differences) == {(3, 1, 4), (4, 5, 0), (1, 3, 6)}
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph_values(result)}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "past_sequence + sequence"]
    assert shapes["past_key_values.1.key"] == ["batch", 2, "past_sequence", WIDTH // 4]
    assert shapes["present.1.key"][2].split(" + ") == ["past_sequence", "sequence"]

    # Eight greedy steps of a batch whose first sequence is padded on the left.
    runtime = session(result.path)
    ids, positions = inputs["input_ids"], (mask.cumsum(1) - 1).clamp(min=0)
    past = {f"past_key_values.{cache}": torch.zeros(2, 2, 0, WIDTH // 4) for cache in caches}
    tokens = []
    for _ in range(8):
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        logits, *present = runtime.run(None, {name: feed[name].numpy() for name in result.inputs})
        ids = torch.from_numpy(logits)[:, -1:].argmax(-1)
        tokens.append(ids)
        past = {f"past_key_values.{c}": torch.from_numpy(p) for c, p in zip(caches, present, strict=True)}
        mask, positions = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1), positions[:, -1:] + 1
    with torch.no_grad():
        model.generation_config.eos_token_id = None
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(torch.cat(tokens, 1), expected[:, 5:])


def two_phase(make: Callable[[], nn.Module], inputs: Any, **options: Any) -> nn.Module:
    config = ar.AttnResConfig(**{"blocks": 2, "schedule": "two_phase", **options})
    return randomise_sites(ar.rewrite(make().eval(), config=config, example_inputs=inputs, backend="eager"))


@pytest.mark.slow
def test_both_schedules_write_the_same_file(tmp_path: Path) -> None:
    tower = Tower(4)
    model = two_phase(lambda: copy.deepcopy(tower), embeddings())
    per_read = two_phase(lambda: tower, embeddings(), schedule="per_read")
    per_read.load_state_dict(model.state_dict())
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    assert (result.sites, result.max_difference < 1e-5) == (8, True)
    files = [onnx.load(result.path), onnx.load(ar.export_onnx(per_read, tmp_path / "other.onnx", embeddings()).path)]
    for file in files:
        assert kinds(file) == {"ScaleQueries": 1, "AttendBlocks": 2, "BlockAttnRes": 8}
        assert [node.name for node in site_nodes(file)] == [f"attn_res.{i}" for i in range(8)]
        shared = [node for node in file.graph.node if node.op_type == "AttendBlocks"]
        assert [node.name for node in shared] == ["attn_res.0_to_2.blocks", "attn_res.3_to_7.blocks"]
        assert all("arXiv:2603.15031" in f.doc_string for f in file.functions)
        properties = {e.key: e.value for e in file.metadata_props}
        assert json.loads(properties["attnres.sources_per_site"]) == {"": [2, 2, 2, 2, 3, 3, 3, 3]}
    signatures = [[(n.name, n.op_type, n.domain, len(n.input)) for n in file.graph.node if n.domain] for file in files]
    assert signatures[0] == signatures[1]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
def test_sites_by_themselves(tmp_path: Path, schedule: str) -> None:
    model = two_phase(lambda: Tower(4), embeddings(), schedule=schedule, aggregation="sum")
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings(), sites="whole")
    file = onnx.load(result.path)
    assert kinds(file) == {"BlockAttnRes": 8}
    assert [node.domain for node in site_nodes(file)] == [f"attnres.{n}_sources_sum" for n in [2] * 4 + [3] * 4]
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "shared"),
    [
        (1, ["8_reads_first_last"]),
        (
            4,
            [
                "1_reads_first",
                *(f"2_reads_of_{n}_blocks_1_partials" for n in (2, 3)),
                "3_reads_of_4_blocks_2_partials_last",
            ],
        ),
        (
            "full",
            [
                "1_reads_of_2_blocks_0_partials_first",
                *(f"1_reads_of_{n}_blocks_0_partials" for n in range(3, 8)),
                "2_reads_of_8_blocks_1_partials_last",
            ],
        ),
    ],
)
def test_blocks_of_every_size(tmp_path: Path, blocks: Any, shared: list[str]) -> None:
    model = two_phase(lambda: Tower(4), embeddings(), blocks=blocks)
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    nodes = [node for node in onnx.load(result.path).graph.node if node.op_type == "AttendBlocks"]
    assert [node.domain.removeprefix("attnres.") for node in nodes] == shared
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("opset_version", [20, 23])
@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"key_gain": False, "scale": 0.5}], ids=["gain", "no gain, scaled"])
def test_two_phases_in_every_form(
    tmp_path: Path, aggregation: str, options: dict[str, Any], opset_version: int
) -> None:
    model = two_phase(lambda: Tower(4), embeddings(), aggregation=aggregation, **options)
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings(), opset_version=opset_version)
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_phases_without_functions(tmp_path: Path) -> None:
    model = two_phase(lambda: Tower(4), embeddings(), aggregation="sum")
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings(), functions=False)
    file = onnx.load(result.path)
    assert not file.functions
    assert not kinds(file)
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_two_phases_in_other_precisions(tmp_path: Path, dtype: torch.dtype) -> None:
    x = embeddings().to(dtype)
    model = two_phase(lambda: Tower(4).to(dtype), x)
    result = ar.export_onnx(model, tmp_path / "model.onnx", x)
    assert 0 < result.max_difference < {torch.float64: 1e-10, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    file = onnx.load(result.path)
    # What is shared is in the dtype of the arithmetic, whatever comes in.
    names = {name for node in file.graph.node if node.op_type == "AttendBlocks" for name in node.output}
    assert len(names) > 10
    types = {value.type.tensor_type.elem_type for value in file.graph.value_info if value.name in names}
    assert types == {onnx.TensorProto.DOUBLE if dtype == torch.float64 else onnx.TensorProto.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize(("op", "wrong"), [("ReduceLogSumExp", "ReduceMax"), ("Sigmoid", "Tanh")])
def test_the_comparison_sees_a_wrong_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, wrong: str
) -> None:
    model = two_phase(lambda: Tower(4), embeddings())
    right = form.Form.text
    monkeypatch.setattr(form.Form, "text", lambda form: right(form).replace(op, wrong))
    with pytest.raises(ar.OnnxExportError, match="differs from PyTorch"):
        ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    right_calls = function.calls_of
    monkeypatch.undo()
    monkeypatch.setattr(function, "calls_of", lambda program: _first_query_for_all(right_calls(program)))
    with pytest.raises(ar.OnnxExportError, match="differs from PyTorch"):
        ar.export_onnx(model, tmp_path / "model.onnx", embeddings())


@pytest.mark.slow
def test_programs_and_graph_modules_in_two_phases(tmp_path: Path) -> None:
    config = ar.AttnResConfig(blocks=2, schedule="two_phase")
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = ar.rewrite(torch.export.export(Tower(4), (embeddings(),), dynamic_shapes=(dynamic,)), config=config)
    for name, value in program.state_dict.items():
        if name.endswith(".query"):
            torch.nn.init.normal_(value)
    module = ar.rewrite(torch.fx.symbolic_trace(Tower(4).eval()), config=config, example_inputs=embeddings())
    for model, reference in ((program, program.module()), (randomise_sites(module), module)):
        result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
        assert kinds(onnx.load(result.path)) == {"ScaleQueries": 1, "AttendBlocks": 2, "BlockAttnRes": 8}
        x = embeddings(3, 9, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(run(result.path, x=x), reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_generation_in_two_phases(tmp_path: Path) -> None:
    model = two_phase(lambda: llama(5), {"input_ids": token_ids(2, 5)}, blocks=3)
    result = ar.export_onnx(model, tmp_path / "model.onnx", {"input_ids": token_ids(2, 5)}, use_cache=True)
    file = onnx.load(result.path)
    assert kinds(file) == {"ScaleQueries": 1, "AttendBlocks": 3, "BlockAttnRes": 10}
    assert [node.name for node in site_nodes(file)] == [f"model.attn_res.{i}" for i in range(10)]
    ids = token_ids(2, 5)
    runtime, past = session(result.path), {n: torch.zeros(2, 2, 0, WIDTH // 4) for n in result.inputs if "past" in n}
    tokens, positions = [], torch.arange(5).expand(2, 5)
    fed = ids
    for _ in range(4):
        feed = {"input_ids": fed, "position_ids": positions, **past}
        logits, *present = runtime.run(None, {name: feed[name].numpy() for name in result.inputs})
        fed, positions = torch.from_numpy(logits)[:, -1:].argmax(-1), positions[:, -1:] + 1
        tokens.append(fed)
        past = {name: torch.from_numpy(value) for name, value in zip(past, present, strict=True)}
    with torch.no_grad():
        model.generation_config.eos_token_id = None
        mask = torch.ones_like(ids)
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.cat(tokens, 1), expected[:, 5:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "opset_version", "expected"),
    [
        (llama, 20, {"RotaryEmbedding": 6, "SimplifiedLayerNormalization": 7}),
        (llama, 23, {"RotaryEmbedding": 6, "RMSNormalization": 7, "Attention": 3}),
        (gpt2, 23, {"LayerNormalization": 7, "Attention": 3}),
    ],
)
def test_the_fusions_of_onnx_runtime_still_apply(
    tmp_path: Path, make: Callable[..., nn.Module], opset_version: int, expected: dict[str, int]
) -> None:
    from attnres_rewrite.capture.inputs import Call
    from attnres_rewrite.onnx import transformers_exporters

    inputs = {"input_ids": token_ids(2, 7)}
    plain = transformers_exporters.export(
        make(3).eval(),
        Call((), inputs),
        lambda program: program,
        use_cache=True,
        dynamic_shapes=None,
        opset_version=opset_version,
        ort_fusions="cpu",
    )
    model = randomise_sites(ar.rewrite(make(3).eval(), blocks=2, backend="eager"))
    options: Any = {"use_cache": True, "ort_fusions": "cpu", "opset_version": opset_version}
    result = ar.export_onnx(model, tmp_path / "model.onnx", inputs, **options)
    assert result.max_difference < 1e-4
    assert fusions((node.domain, node.op_type) for node in plain.model.graph) == expected
    assert fusions((node.domain, node.op_type) for node in onnx.load(result.path).graph.node) == expected


class Nothing(Tower):
    """Returns a loss that is none, as nanoGPT does."""

    def __init__(self, kind: type) -> None:
        super().__init__(2)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (logits, None, logits * 2) if self.kind is tuple else {"loss": None, "logits": logits}


NOTHING = [(tuple, ("output_0", "output_2")), (dict, ("logits",))]


@pytest.mark.parametrize("case", mostly_slow(NOTHING, NOTHING[0]))
def test_outputs_that_are_nothing(tmp_path: Path, case: tuple[type, tuple[str, ...]]) -> None:
    kind, outputs = case
    model = randomise_sites(ar.rewrite(Nothing(kind).eval(), 2, example_inputs=embeddings(), backend="eager"))
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    assert result.outputs == outputs
    assert result.max_difference < 1e-4


def fusions(nodes: Iterable[tuple[str, str]]) -> Counter[str]:
    """How many operators of ONNX Runtime, and norms, there are.

    An add and the norm after it are one operator of the plain model. A rewritten one adds before a site and norms after
    it, so there the norm is by itself.
    """
    kinds = ("Normalization", "Attention", "RotaryEmbedding")
    names = [name for domain, name in nodes if domain == "com.microsoft" or name.endswith(kinds)]
    return Counter(name.removeprefix("Skip") for name in names)


class Twins(nn.Module):
    """Two streams, one after the other, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.others = Tower(2).layers, Tower(3).layers
        self.between, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layers in (self.layers, self.others):
            for layer in layers:
                x = x + layer.first(x)
                x = x + layer.second(x)
            x = self.between(self.norm(x))
        return x


@pytest.mark.slow
def test_several_streams_of_one_module(tmp_path: Path) -> None:
    model = randomise_sites(ar.rewrite(Twins().eval(), blocks=2, example_inputs=embeddings(), backend="eager"))
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    assert result.sites == 10
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_large_weights_go_beside_the_file(tmp_path: Path, tower: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LARGEST_FILE", 100)
    result = ar.export_onnx(tower, tmp_path / "model.onnx", embeddings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), tower(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_failed_comparison_leaves_what_was_there(tmp_path: Path, tower: nn.Module) -> None:
    with pytest.raises(ar.OnnxExportError, match=r"differs from PyTorch by .* no file was written"):
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings(), tolerance=0.0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.onnx").write_text("the one before")
    with pytest.raises(ar.OnnxExportError):
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings(), tolerance=0.0)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "the one before")]


@pytest.mark.slow
def test_the_comparison_sees_a_wrong_function(
    tmp_path: Path, tower: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = form.Form.text
    monkeypatch.setattr(form.Form, "text", lambda form: right(form).replace("Softmax", "Sigmoid"))
    with pytest.raises(ar.OnnxExportError, match=r"differs from PyTorch|could not be checked"):
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings())
    right_calls = function.calls_of
    monkeypatch.undo()
    monkeypatch.setattr(function, "calls_of", lambda program: _first_query_for_all(right_calls(program)))
    with pytest.raises(ar.OnnxExportError, match="differs from PyTorch"):
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings())


def _first_query_for_all(calls: list[function.FunctionCall]) -> list[function.FunctionCall]:
    import dataclasses

    return [dataclasses.replace(call, queries=calls[0].queries[:1] * len(call.queries)) for call in calls]


def test_paths_that_cannot_be_written(tmp_path: Path, tower: nn.Module) -> None:
    with pytest.raises(ar.OnnxExportError, match=r"the folder .*nowhere does not exist"):
        ar.export_onnx(tower, tmp_path / "nowhere" / "model.onnx", embeddings())
    with pytest.raises(ar.OnnxExportError, match=r"it is a folder; name a file in it"):
        ar.export_onnx(tower, tmp_path, embeddings())
    with pytest.raises(ar.OnnxExportError, match=r"cannot write model.onnx in /proc"):
        ar.export_onnx(tower, "/proc/model.onnx", embeddings())


@pytest.mark.parametrize("version", [7, 99])
def test_opsets_that_cannot_be_written(tmp_path: Path, tower: nn.Module, version: int) -> None:
    with pytest.raises(ar.OnnxExportError, match=rf"opset_version is {version}: torch.onnx writes 18 and newer"):
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings(), opset_version=version)


def test_a_form_of_sites_that_there_is_not(tmp_path: Path, tower: nn.Module) -> None:
    with pytest.raises(ar.OnnxExportError, match=r"sites is 'both', and there are two ways .* 'shared' and 'whole'"):
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings(), sites="both")  # type: ignore[arg-type]


def test_plain_models_are_errors_that_name_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ar.AttnResError, match="call rewrite"):
        ar.export_onnx(Tower(2), tmp_path / "model.onnx", embeddings())
    program = torch.export.export(Tower(2), (embeddings(),))
    with pytest.raises(ar.AttnResError, match=r"this ExportedProgram was not rewritten; call rewrite"):
        ar.export_onnx(program, tmp_path / "model.onnx")
    with pytest.raises(ar.AttnResError, match=r"this GraphModule was not rewritten; call rewrite"):
        ar.export_onnx(torch.fx.symbolic_trace(Tower(2)), tmp_path / "model.onnx", embeddings())
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_onnx_lacks_is_named_with_its_tensor(tmp_path: Path, tower: nn.Module) -> None:
    tower.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ar.OnnxExportError, match="phases is complex64, which ONNX Runtime does not compute with"):
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra(tmp_path: Path, tower: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ar.MissingPackageError, match=r"onnxscript.*attnres-rewrite\[onnx\]") as caught:
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings())
    assert isinstance(caught.value, ImportError)


def test_options_that_need_a_hugging_face_model(tmp_path: Path, tower: nn.Module) -> None:
    for options in ({"use_cache": True}, {"ort_fusions": "cpu"}):
        with pytest.raises(ar.OnnxExportError, match=rf"{next(iter(options))} is for Hugging Face models .* Tower"):
            ar.export_onnx(tower, tmp_path / "model.onnx", embeddings(), **options)  # type: ignore[arg-type]


def test_a_model_that_cannot_be_traced_keeps_its_state(tmp_path: Path) -> None:
    class Branching(Tower):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
                raise RuntimeError("not for export")
            return super().forward(x)

    model = ar.rewrite(Branching(2), blocks=2, example_inputs=embeddings(), backend="eager")
    expected = model(embeddings())
    with pytest.raises(ar.OnnxExportError, match=r"cannot trace Branching: .*not for export"):
        ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    assert torch.equal(model(embeddings()), expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_hugging_face_model_that_cannot_be_traced_keeps_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ar.rewrite(llama(2).eval(), blocks=2, backend="eager")
    attributes, inputs = set(model.__dict__), {"input_ids": token_ids()}
    expected = model(**inputs).logits

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("not for export")

    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(ar.OnnxExportError, match=r"cannot export LlamaForCausalLM: .*not for export"):
        ar.export_onnx(model, tmp_path / "model.onnx", inputs)
    assert set(model.__dict__) == attributes
    assert model.config.use_cache
    assert torch.equal(model(**inputs).logits, expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_outputs_that_are_inputs_and_outputs_of_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Chooser(Tower):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = super().forward(x)
            return {"x": x, "chosen": logits.argmax(-1)}

    model = randomise_sites(ar.rewrite(Chooser(3).eval(), blocks=2, example_inputs=embeddings(), backend="eager"))
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    assert result.outputs == ("output_x", "chosen")
    right = form.Form.text
    monkeypatch.setattr(form.Form, "text", lambda form: right(form).replace("Softmax <axis = -1>", "Neg"))
    with pytest.raises(ar.OnnxExportError, match="differs from PyTorch"):
        ar.export_onnx(model, tmp_path / "model.onnx", embeddings())


@pytest.mark.slow
def test_equal_lengths_of_two_inputs_are_two_sizes(tmp_path: Path) -> None:
    class Reader(Tower):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return super().forward(x) + memory.mean(1, keepdim=True)

    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = embeddings(2, 7), embeddings(2, 7, seed=1)
    model = Reader(2).eval()
    model.head = nn.Linear(WIDTH, WIDTH)
    ar.rewrite(model, blocks=2, example_inputs=example, backend="eager")
    result = ar.export_onnx(model, tmp_path / "model.onnx", example, dynamic_shapes=(dynamic, dynamic))
    first, second = (value.type.tensor_type.shape.dim[1].dim_param for value in onnx.load(result.path).graph.input)
    assert first != second
    given = embeddings(3, 5), embeddings(3, 3)
    with torch.no_grad():
        expected = model(*given)
    torch.testing.assert_close(run(result.path, x=given[0], memory=given[1]), expected, rtol=1e-4, atol=1e-4)


def test_names_of_caches() -> None:
    assert conversion.cache_name("input.past_key_values.layers.3.keys", "past_key_values") == "past_key_values.3.key"
    assert conversion.cache_name("past_key_values.layers.0.conv_states", "present") == "present.0.conv_states"
    assert conversion.cache_name("logits", "present") == "logits"


def test_sizes_without_dynamic_dimensions() -> None:
    program = ar.rewrite(torch.export.export(Tower(2), (embeddings(),)), blocks=2)
    assert sizes.dynamic_sizes(program) == []


class HalfBranches(nn.Module):
    """Branches in half precision on a float32 stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH).half() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (WIDTH,)).half())
        return x


@pytest.mark.slow
def test_branches_in_half_precision_on_a_float_stream(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise_sites(ar.rewrite(HalfBranches(), blocks=2, example_inputs=embeddings(), backend="eager"))
    assert export._tolerance(torch.export.export(HalfBranches(), (embeddings(),)).run_decompositions({})) == 2e-2
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model(x), rtol=1e-2, atol=1e-2)
