"""The kernels for ONNX Runtime: that they are what runs, and that they compute what the functions in a file do."""

import json
import math
import os
import shutil
import stat
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from models import Tower, embeddings, llama, randomise_sites, token_ids
from test_onnx_sites import CHAIN, CHAINS, PLAIN, Case, case, change
from torch import Tensor

import attnres_rewrite as ar
from attnres_rewrite.onnx import bodies, build_kernel, comparison, register
from attnres_rewrite.onnx.kernel import build, domains, registration
from attnres_rewrite.onnx.sites import write_shared

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}
# Half a step of the result's dtype, and what float32 sums add to it.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
WIDTH = 70


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for all who run tests here: what the sources are is in its name."""
    if not os.environ.get("CXX") and not any(shutil.which(name) for name in build._COMPILERS):
        pytest.skip("there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "attnres-caches"))
        return build_kernel()


# One site


def site(sources: int, **options: Any) -> bodies.BlockAttnRes:
    chosen = {"rank": 3, "dtype": torch.float32, "gain": True, "sum": False, "scaled": False, "opset_version": 23}
    chosen |= options
    chosen.setdefault("parameter_dtype", chosen["dtype"])
    return bodies.BlockAttnRes(sources=sources, **chosen)


def model_of(form: bodies.BlockAttnRes, constants: dict[str, Tensor], *, function: bool, eps: float = 1e-6) -> bytes:
    """One node; without its function, only a registered operator can run it."""
    helper, scale = onnx.helper, 0.3 if form.scaled else 1.0
    names = [*form.data, *form.parameters]

    def value(name: str, dtype: torch.dtype, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, ONNX_TYPES[dtype], shape)

    free = [None] * (form.rank - 1)
    given = [value(name, form.dtype, [*free, WIDTH]) for name in form.data]
    given += [value(name, form.parameter_dtype, [WIDTH]) for name in form.parameters if name not in constants]
    attributes = {"eps": eps, "scale": scale, "aggregation": "sum" if form.sum else "mean"}
    node = helper.make_node("BlockAttnRes", names, ["narrow"], domain=form.domain, name="the_site", **attributes)
    weights = [
        helper.make_tensor(name, ONNX_TYPES[tensor.dtype], tensor.shape, tensor.float().tolist())
        for name, tensor in constants.items()
    ]
    # As float32, because not every ONNX Runtime gives a bfloat16 to Python.
    wide = helper.make_node("Cast", ["narrow"], ["h"], to=ONNX_TYPES[torch.float32])
    graph = helper.make_graph([node, wide], "g", given, [value("h", torch.float32, [*free, WIDTH])], weights)
    opsets = [helper.make_opsetid("", form.opset_version), helper.make_opsetid(form.domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if function:
        from onnxscript import ir

        model.functions.append(ir.serde.serialize_function(form.function()))
    return bytes(model.SerializeToString())


def inputs_of(form: bodies.BlockAttnRes, rows: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(form.sources)
    values = {name: torch.randn(*rows, WIDTH, generator=generator).to(form.dtype) for name in form.data}
    for name in form.parameters:
        values[name] = torch.randn(WIDTH, generator=generator).to(form.parameter_dtype)
    return values


def quiet_options(threads: int = 1, severity: int = 3) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = severity, threads
    return options


def open_session(model: Any, library: Path | None = None, threads: int = 1, severity: int = 3) -> Any:
    options = quiet_options(threads, severity)
    if library is not None:
        register(options, model, library=library)
    given = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run(session: Any, values: dict[str, Tensor]) -> Tensor:
    given = {read.name: comparison._to_ort(values[read.name]) for read in session.get_inputs()}
    return comparison._from_ort(session.run_with_ort_values(["h"], given)[0])


def listing(form: bodies.BlockAttnRes, values: dict[str, Tensor], eps: float = 1e-6) -> Tensor:
    """The equation in float64, from what the README says."""
    v = torch.stack([values[name].double() for name in form.data])
    w = values["query"].double() * (0.3 if form.scaled else 1.0)
    k = v / (v.square().mean(-1, keepdim=True) + eps).sqrt()
    if form.gain:
        k = k * values["gain"].double()
    h = (torch.softmax(k @ w, 0).unsqueeze(-1) * v).sum(0)
    return h * form.sources if form.sum else h


FORMS = {
    "1": site(1),
    "2, sum": site(2, sum=True),
    "3, no gain": site(3, gain=False),
    "5, scaled": site(5, scaled=True),
    "9, rank 4": site(9, rank=4),
    "4, rank 2": site(4, rank=2, sum=True, gain=False),
    "17, opset 21": site(17, opset_version=21),
    "150": site(150),
    "float16": site(7, dtype=torch.float16, sum=True),
    "float16, float32 parameters": site(6, dtype=torch.float16, parameter_dtype=torch.float32),
    "bfloat16": site(7, dtype=torch.bfloat16),
    "bfloat16, float32 parameters, no gain": site(
        2, dtype=torch.bfloat16, parameter_dtype=torch.float32, gain=False, sum=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("constant", [True, False], ids=["weights", "inputs"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_site_is_the_equation(library: Path, form: bodies.BlockAttnRes, constant: bool) -> None:
    values = inputs_of(form, (3, 5, 2)[: form.rank - 1])
    constants = {name: values[name] for name in form.parameters} if constant else {}
    found = run(open_session(model_of(form, constants, function=False), library), values)
    expected, rtol = listing(form, values), TOLERANCES[form.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("instructions", ["any", "avx2", ""])
def test_every_instruction_set(
    library: Path, dtype: torch.dtype, instructions: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """And what ONNX Runtime says if asked: the name of the site, and the instructions."""
    monkeypatch.setenv("ATTNRES_INSTRUCTION_SET", instructions)
    form = site(6, dtype=dtype)
    values = inputs_of(form, (2, 3))
    session = open_session(model_of(form, {}, function=False), library, severity=1)
    told = capfd.readouterr().err
    assert f"attnres: the node the_site of {form.domain} runs as a kernel, instruction set" in told
    if instructions:
        assert f"instruction set {instructions}" in told or (instructions == "avx2" and "instruction set any" in told)
    expected, rtol = listing(form, values), TOLERANCES[dtype]
    torch.testing.assert_close(run(session, values).double(), expected, rtol=rtol, atol=rtol * expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["any", "avx2", ""])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_float_is_read_and_rounded_as_pytorch_does(
    library: Path, dtype: torch.dtype, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, subnormal ones too; sums of four of them are rounded, lie between two, or are too large."""
    monkeypatch.setenv("ATTNRES_INSTRUCTION_SET", instructions)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    every = every[: len(every) // WIDTH * WIDTH].reshape(1, -1, WIDTH)
    form = site(4, dtype=dtype, sum=True, gain=False)
    values = dict(zip(form.data, [every, every / 8, every / 2, every / 4], strict=True))
    values["query"] = torch.zeros(WIDTH, dtype=dtype)
    found = run(open_session(model_of(form, {}, function=False), library), values)
    # The weights are exactly one. PyTorch adds in the same order.
    expected = sum(values[name].float() for name in form.data)
    assert torch.equal(found, expected.to(dtype).float())


@pytest.mark.slow
@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("opset_version", [21, 23])
def test_what_is_not_finite_is_as_in_the_function(library: Path, opset_version: int, eps: float) -> None:
    form = site(5, opset_version=opset_version)
    values = inputs_of(form, (1, 9))
    for row, number in enumerate([math.nan, math.inf, -math.inf, 1e20, 1e-30]):
        values["v2"][0, row, row] = number
    values["v1"][0, 5:7] = 0.0
    values["v3"][0, 7] = 1e25
    model = model_of(form, {}, function=True, eps=eps)
    found, expected = (run(open_session(model, used), values) for used in (library, None))
    assert not expected[0, :3].isfinite().any()
    assert expected[0, 8].isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_not_finite_stays_so_in_half_floats(library: Path, dtype: torch.dtype) -> None:
    form = site(2, dtype=dtype)
    values = inputs_of(form, (1, 3))
    values["v0"][0, 0, 5], values["v1"][0, 1, 5] = math.nan, math.inf
    found = run(open_session(model_of(form, {}, function=False), library), values)
    assert found[0, :2].isnan().all()
    assert found[0, 2].isfinite().all()


@pytest.mark.slow
def test_domains_that_the_kernel_does_not_take(library: Path) -> None:
    for domain, message in (
        ("attnres.2_sources_float64", "is of float64"),
        ("attnres.2_reads_float64", "is of float64"),
        ("other.2_sources", "is no domain of sites"),
        ("attnres.some_reads", "is no domain of sites"),
        ("attnres.2_reads_of_0_blocks", "is no domain of sites"),
    ):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("attnres.domains.0", domain)
        with pytest.raises(Exception, match=f"'{domain}' {message}"):
            options.register_custom_ops_library(str(library))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e3, -1e3])
def test_logits_whose_exponentials_are_no_floats(library: Path, factor: float) -> None:
    form = site(3)
    values = inputs_of(form, (1, 9))
    values["query"] *= factor
    found = run(open_session(model_of(form, {}, function=False), library), values)
    torch.testing.assert_close(found.double(), listing(form, values), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_threads_share_the_rows(library: Path) -> None:
    form = site(9)
    model, values = model_of(form, {}, function=False), inputs_of(form, (2, 513))
    one, three = (run(open_session(model, library, threads), values) for threads in (1, 3))
    assert torch.equal(one, three)
    torch.testing.assert_close(one.double(), listing(form, values), rtol=1e-5, atol=1e-5)
    empty = {name: value[:0] if value.dim() == 3 else value for name, value in values.items()}
    assert run(open_session(model, library), empty).shape == (0, 513, WIDTH)


@pytest.mark.slow
def test_tensors_that_do_not_belong_together(library: Path) -> None:
    form = site(2)
    session, values = open_session(model_of(form, {}, function=False), library), inputs_of(form, (1, 4))
    with pytest.raises(Exception, match="the sources of a BlockAttnRes differ in shape or type"):
        run(session, values | {"v1": values["v1"][:, :1]})
    three = onnx.load_from_string(model_of(site(3), {}, function=False))
    three.graph.node[0].domain = three.opset_import[1].domain = "attnres.1_sources"
    with pytest.raises(Exception, match=r"a BlockAttnRes of attnres.1_sources has 5 inputs; it takes its sources"):
        open_session(three.SerializeToString(), library)


# Sites that share

# So many reads that their columns are more than one vector of any size, and blocks that are more than a group.
LONG = [tuple(range(end)) for end in range(2, 21)] + [(*range(20), 20 + i) for i in range(4)]
SHARED_CHAINS = {"chain": CHAIN, "long": LONG, **{name: chain for name, (chain, _) in CHAINS.items()}}
SHARED_SETTINGS = {
    "mean": PLAIN,
    "sum": change(sum=True),
    "no gain, scaled, opset 18": change(gain=False, scale=0.5, opset_version=18),
    "rank 2": change(rank=2),
    "rank 4": change(rank=4, opset_version=18, sum=True),
    "float16": change(dtype=torch.float16, parameter_dtype=torch.float16),
    "float16, float32 parameters": change(dtype=torch.float16, parameter_dtype=torch.float32, sum=True),
    "float16 parameters": change(parameter_dtype=torch.float16),
    "bfloat16": change(dtype=torch.bfloat16, parameter_dtype=torch.bfloat16, sum=True),
    "bfloat16, float32 parameters, no gain": change(
        dtype=torch.bfloat16, parameter_dtype=torch.float32, gain=False, rank=4
    ),
}


def shared(chain: Any, settings: Any = PLAIN, **sizes: Any) -> Case:
    made = case(chain, settings, **{"width": WIDTH, **sizes})
    return made.define(write_shared(made.sites))


def run_kernels(made: Case, library: Path, threads: int = 1, constant: bool = True) -> list[Tensor]:
    """The reads by kernels alone: the functions are taken away."""
    model = onnx.load_from_string(onnx_model(made))
    options, given = quiet_options(threads), {name: as_torch(value) for name, value in made.given.items()}
    if not constant:
        for weight in model.graph.initializer:
            model.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
            given[weight.name] = as_torch(onnx.numpy_helper.to_array(weight))
        del model.graph.initializer[:]
    assert register(options, onnx_model(made), library=library).functions == ()
    del model.functions[:]
    model.graph.value_info.extend(model.graph.output)
    for output in model.graph.output:
        # As float32, because not every ONNX Runtime gives a bfloat16 to Python; then it is one again.
        model.graph.node.append(onnx.helper.make_node("Cast", [output.name], [f"{output.name}_wide"], to=1))
        output.name, output.type.tensor_type.elem_type = f"{output.name}_wide", 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = {name: comparison._to_ort(value) for name, value in given.items()}
    found = session.run_with_ort_values([output.name for output in model.graph.output], values)
    dtypes = [as_torch(expected).dtype for expected in made.expected]
    return [comparison._from_ort(value).to(dtype) for value, dtype in zip(found, dtypes, strict=True)]


def onnx_model(made: Case) -> bytes:
    from onnxscript import ir

    return bytes(ir.to_proto(made.model).SerializeToString())


def as_torch(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(numpy.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def check_reads(made: Case, found: list[Tensor]) -> None:
    """Against the equation in float64."""
    for actual, expected in zip(found, map(as_torch, made.expected), strict=True):
        assert actual.dtype == expected.dtype
        rtol = TOLERANCES[expected.dtype]
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.double().abs().max())
        )


@pytest.mark.slow
@pytest.mark.parametrize("settings", SHARED_SETTINGS.values(), ids=SHARED_SETTINGS)
def test_sites_that_share_are_the_equation(library: Path, settings: Any) -> None:
    for name, chain in SHARED_CHAINS.items():
        for width in (WIDTH, 6) if name == "chain" else (WIDTH,):
            made = shared(chain, settings, width=width)
            check_reads(made, run_kernels(made, library))
    check_reads(made, run_kernels(made, library, constant=False))


@pytest.mark.slow
def test_sites_that_share_are_what_the_functions_compute(library: Path) -> None:
    """Also of sources that are not finite, or as large as squares of them are not."""
    made = shared(LONG, rows=(3, 7))
    made.given["source_2"][1, :5, 3] = [math.nan, math.inf, -math.inf, 1e25, 1e-30]
    made.given["source_0"][2, :2] = 0.0
    for actual, expected in zip(run_kernels(made, library), made.run(), strict=True):
        torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert actual[1, :3].isnan().any()
    assert actual[1, 3:].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_sites_that_share_have_logits_whose_exponentials_are_no_floats(library: Path, scale: float) -> None:
    made = shared(CHAIN, change(scale=scale))
    for actual, expected in zip(run_kernels(made, library), made.expected, strict=True):
        torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("instructions", ["any", "avx2", ""])
def test_sites_that_share_in_every_instruction_set(
    library: Path, dtype: torch.dtype, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNRES_INSTRUCTION_SET", instructions)
    made = shared(LONG, change(dtype=dtype, parameter_dtype=dtype))
    check_reads(made, run_kernels(made, library))


@pytest.mark.slow
def test_threads_share_the_rows_of_sites_that_share(library: Path) -> None:
    made = shared(LONG, rows=(2, 257))
    one, three = (run_kernels(made, library, threads) for threads in (1, 3))
    assert all(torch.equal(*pair) for pair in zip(one, three, strict=True))
    check_reads(made, one)
    made.given = {name: value[:0] for name, value in made.given.items()}
    assert all(read.shape == (0, 257, WIDTH) for read in run_kernels(made, library))


@pytest.mark.slow
def test_what_of_sites_that_share_does_not_belong_together(library: Path) -> None:
    made = shared(CHAIN)
    right = dict(made.given)
    wrong = {"source_4": "the blocks of an AttendBlocks", "source_2": "a partial and a column of a BlockAttnRes"}
    for name, message in wrong.items():
        made.given = {**right, name: right[name][:, :1]}
        with pytest.raises(Exception, match=f"{message}.* differ in shape or type"):
            run_kernels(made, library)
    made.given = right
    for node in made.model.graph:
        if node.op_type in ("AttendBlocks", "ScaleQueries"):
            count = len(node.inputs)
            node.resize_inputs(count + 1)
            node.replace_input_with(count, node.inputs[0])
            with pytest.raises(Exception, match=f"{node.op_type} of {node.domain} has {count + 1} inputs; it takes"):
                run_kernels(made, library)
            node.resize_inputs(count)


# Models


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """An exported file, an input of another size, and what PyTorch makes of it."""
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    model = randomise_sites(ar.rewrite(Tower(3).eval(), blocks=2, example_inputs=embeddings(), backend="eager"))
    path = tmp_path_factory.mktemp("tower") / "model.onnx"
    assert ar.export_onnx(model, path, embeddings(), dynamic_shapes=(dynamic,), sites="whole").sites == 6
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        return path, x, model(x)


def nodes_that_ran(session: Any) -> list[str]:
    """The operators of the nodes that ONNX Runtime's profiler saw."""
    events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"]["op_name"] for event in events if event.get("cat") == "Node" and "op_name" in event["args"]]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["register", "register for any", "library alone", "functions"])
def test_the_sites_of_a_file_run_as_kernels(tower: Any, library: Path, tmp_path: Path, way: str) -> None:
    path, x, expected = tower
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    if way == "register":
        registered = register(options, path, library=library)
        assert registered.domains == ("attnres.2_sources", "attnres.3_sources")
        assert registered.functions == ()
        assert registered.sites == 0
    elif way == "register for any":
        assert {"attnres.2_sources", "attnres.3_sources"} < set(register(options, library=library).domains)
    elif way == "library alone":
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.as_tensor(session.run(None, {"x": x.numpy()})[0]), expected, rtol=1e-5, atol=1e-5)
    kinds = nodes_that_ran(session)
    assert kinds.count("BlockAttnRes") == (0 if way == "functions" else 6)
    assert ("Softmax" in kinds) == (way == "functions")
    if way == "register":
        # The options can open another one; with the sessions their kernels are gone.
        second = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        assert registered.sites == 12
        del session, second
        assert registered.sites == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", [site(18), site(2, sum=True), site(3, rank=2)], ids=["18", "sum", "rank 2"])
def test_a_site_in_a_domain_that_is_not_named_runs_as_its_function(library: Path, form: bodies.BlockAttnRes) -> None:
    model, values = model_of(form, {}, function=True), inputs_of(form, (2, 3)[: form.rank - 1])
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert registration._load(library).attnres_kernels() == 0
    torch.testing.assert_close(run(session, values).double(), listing(form, values), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def default_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A small Llama with a cache as ``export_onnx`` writes it by default, and the model."""
    model = randomise_sites(ar.rewrite(llama(2).eval(), blocks=2, backend="eager"))
    path = tmp_path_factory.mktemp("llama") / "model.onnx"
    ar.export_onnx(model, path, {"input_ids": token_ids(2, 5)}, use_cache=True)
    return path, model


@pytest.mark.slow
def test_a_default_file_generates_with_kernels(default_file: Any, library: Path, tmp_path: Path) -> None:
    path, model = default_file
    content, ids = path.read_bytes(), token_ids(1, 5)
    options = quiet_options()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    registered = register(options, path, library=library)
    assert registered.functions == ()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert registered.sites == 4
    fed, positions = ids, torch.arange(5)[None]
    past = {given.name: numpy.zeros((1, 2, 0, 8), numpy.float32) for given in session.get_inputs()[2:]}
    tokens = []
    for _ in range(12):
        logits, *present = session.run(None, {"input_ids": fed.numpy(), "position_ids": positions.numpy(), **past})
        fed, positions = torch.from_numpy(logits)[:, -1:].argmax(-1), positions[:, -1:] + 1
        past = dict(zip(past, present, strict=True))
        tokens.append(int(fed))
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokens == expected[0, 5:].tolist()
    kinds = Counter(nodes_that_ran(session))
    assert {kind: count / 12 for kind, count in kinds.items() if kind in NODES} == NODES
    assert path.read_bytes() == content


# Of a Llama of two layers and two blocks. None but ONNX Runtime's own functions have a node like these.
NODES = {"ScaleQueries": 1, "AttendBlocks": 2, "BlockAttnRes": 4}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["default", "whole"])
def test_a_file_that_a_tool_made_float16(default_file: Any, tower: Any, library: Path, form: str) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if form == "whole":
        path, x, expected = tower
        given = {"x": x.numpy()}
    else:
        path, model = default_file
        ids = token_ids(3, 9)
        given = {"input_ids": ids.numpy(), "position_ids": numpy.arange(9)[None].repeat(3, 0)}
        given |= {f"past_key_values.{i}.{kind}": numpy.zeros((3, 2, 0, 8), numpy.float32) for i, kind in CACHES}
        with torch.no_grad():
            expected = model(input_ids=ids).logits
    narrow = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    del narrow.functions[:]
    found = open_session(narrow.SerializeToString(), library).run(None, given)[0]
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


CACHES = [(layer, kind) for layer in range(2) for kind in ("key", "value")]


@pytest.mark.slow
def test_what_stays_a_function_is_told(library: Path, tower: Any, default_file: Any, caplog: Any) -> None:
    """A file in which one site has a gate, and one that has nothing else."""
    path, *_ = tower
    model = onnx.load(path)
    model.opset_import.add(domain="attnres.3_sources_gate", version=1)
    registered = register(onnxruntime.SessionOptions(), model.SerializeToString(), library=library)
    assert registered.domains == ("attnres.2_sources", "attnres.3_sources")
    assert registered.functions == ("attnres.3_sources_gate",)
    assert "What is in attnres.3_sources_gate runs as functions, not as kernels" in caplog.text
    with pytest.raises(ar.OnnxKernelError, match=r"it has attnres.3_sources_gate\. Export the model anew"):
        register(onnxruntime.SessionOptions(), model_with("attnres.3_sources_gate"), library=library)
    registered = register(onnxruntime.SessionOptions(), default_file[0], library=library)
    assert registered.functions == ()
    assert registered.domains == (
        "attnres.1_reads_first",
        "attnres.3_reads_of_2_blocks_2_partials_last",
        "attnres.4_queries",
        "attnres.no_partial",
        "attnres.partial",
    )


@pytest.mark.slow
def test_onnxruntime_genai_runs_the_kernel(library: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    from test_runtimes import recipe

    config = ar.AttnResConfig(blocks=2, aggregation="sum")
    model, ids = randomise_sites(ar.rewrite(llama(3).eval(), config=config, backend="eager")), token_ids(1, 5)
    example = {"input_ids": token_ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    path = ar.export_onnx(model, tmp_path / "model.onnx", example, use_cache=True).path
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[0]
    absent = next(token for token in range(model.config.vocab_size) if token not in expected)
    # It takes libraries from the folder of the model alone.
    beside = shutil.copy(library, tmp_path / "attnres_kernel.so")
    registered = register(onnxruntime.SessionOptions(), path, library=beside)
    names: dict[str, Any] = {"config": model.config, "eos": absent}
    exec(recipe("genai_config"), names)
    folder = names["genai_config"]
    folder["model"]["decoder"]["session_options"] |= {
        "custom_ops_library": beside.name,
        "attnres.domains.0": ",".join(registered.domains),
    }
    (tmp_path / "genai_config.json").write_text(json.dumps(folder))
    loaded = genai.Model(str(tmp_path))
    assert registered.sites == 6
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=21, batch_size=1)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(ids.numpy())
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == expected.tolist()


# What register takes


def model_with(*names: str) -> bytes:
    helper = onnx.helper
    value = helper.make_tensor_value_info("x", 1, [2])
    out = helper.make_tensor_value_info("y", 1, [2])
    weight = helper.make_tensor("w", 1, [2], [1.0, 2.0])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [value], [out], [weight])
    opsets = [helper.make_opsetid(name, 23 if not name else 1) for name in ("", *names)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def test_the_domains_of_a_file_are_read_without_its_weights(tmp_path: Path) -> None:
    names = ["attnres.3_sources", "ai.onnx.ml", "attnres.12_sources_sum"]
    content = model_with(*names)
    (tmp_path / "model.onnx").write_bytes(content)
    for model in (content, tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        assert domains.imported_domains(model) == ["", *names]
    for wrong in (content[:-3], b"no model at all", b"\xff" * 40):
        with pytest.raises(ValueError, match=r"field|number"):
            domains.imported_domains(wrong)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_with(), "no site of the model can run as a kernel: .* and it has no functions of sites"),
        (
            model_with("attnres.partial_add", "attnres.2_blocks_2_reads"),
            "it has attnres.2_blocks_2_reads, attnres.part",
        ),
        (model_with("attnres.partial_float64"), "it has attnres.partial_float64"),
        (model_with("attnres.2_reads_of_tomorrow"), "it has attnres.2_reads_of_tomorrow"),
        (model_with("attnres.3_sources_float64"), "it has attnres.3_sources_float64"),
        (model_with("attnres.3_sources_float16_float64_parameters"), "it has attnres.3_sources_float16_float64"),
        (model_with("attnres.3_sources_of_tomorrow"), "it has attnres.3_sources_of_tomorrow"),
        (model_with("attnres.0_sources"), "it has attnres.0_sources"),
        (b"\xff", "the model cannot be read as an ONNX file"),
        ("missing.onnx", "missing.onnx cannot be read as an ONNX file: .*No such file"),
    ],
)
def test_models_without_a_site_for_the_kernel(model: Any, message: str) -> None:
    with pytest.raises(ar.OnnxKernelError, match=message):
        register(onnxruntime.SessionOptions(), model, library="not needed")


def test_a_library_that_is_none_changes_no_options(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    for library in (tmp_path / "text.so", tmp_path / "missing.so"):
        options = onnxruntime.SessionOptions()
        with pytest.raises(ar.OnnxKernelError, match=r"is no kernel that this process can load: .*build-onnx-kernel"):
            register(options, model_with("attnres.3_sources"), library=library)
        assert not registration._has_entry(options, "attnres.domains.0")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_has_a_domain_that_is_known(form: bodies.BlockAttnRes) -> None:
    assert registration._KERNELS.fullmatch(form.domain)
    wide = bodies.BlockAttnRes(**{**vars(form), "parameter_dtype": torch.float64})
    assert not registration._KERNELS.fullmatch(wide.domain)


@pytest.mark.parametrize("settings", [*SHARED_SETTINGS.values(), change(dtype=torch.float64)], ids=str)
def test_every_form_of_sites_that_share_has_a_domain_that_is_known(settings: Any) -> None:
    for chain in SHARED_CHAINS.values():
        for form in write_shared(case(chain, settings).sites):
            assert bool(registration._KERNELS.fullmatch(form.domain)) == (settings.dtype != torch.float64)


@pytest.mark.slow
def test_options_are_for_one_model(library: Path) -> None:
    options = onnxruntime.SessionOptions()
    register(options, model_with("attnres.3_sources"), library=library)
    with pytest.raises(ar.OnnxKernelError, match="these session options have the kernel already"):
        register(options, model_with("attnres.4_sources"), library=library)


@pytest.mark.slow
def test_more_domains_than_one_entry_holds(library: Path) -> None:
    names = [f"attnres.{n}_sources_sum_no_gain" for n in range(1, 301)]
    assert len(registration._entries(names)) > 1
    assert ",".join(registration._entries(names)).split(",") == names
    form = site(300, sum=True, gain=False)
    options = onnxruntime.SessionOptions()
    register(options, model_with(*names), library=library)
    session = onnxruntime.InferenceSession(model_of(form, {}, function=False), options)
    values = inputs_of(form, (1, 2))
    torch.testing.assert_close(run(session, values).double(), listing(form, values), rtol=1e-5, atol=1e-4)


# The build


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that writes its arguments to the output, slowly and in two parts; and caches in a folder of the test."""
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\nfor o in "$@"; do :; done\necho "$1" > "$o"\nsleep 0.2\necho done >> "$o"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("CXX", raising=False)
    return script


def test_builds_at_the_same_time_make_one_file(compiler: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build_kernel(compiler=str(compiler)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert found[0].read_text() == "-std=c++17\ndone\n"
    assert list(found[0].parent.iterdir()) == [found[0]]
    # It is found again, without a compiler.
    compiler.unlink()
    assert build_kernel(compiler=str(compiler)) == found[0]


def test_another_source_is_another_kernel(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_kernel(compiler=str(compiler))
    changed = tmp_path / "rows.h"
    changed.write_text("// other")
    monkeypatch.setattr(build, "SOURCES", (build.SOURCES[0], changed))
    assert build_kernel(compiler=str(compiler)) != first


def test_a_file_of_ones_own_is_always_built(compiler: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.so"
    target.write_text("old")
    assert build_kernel(target, compiler=str(compiler)) == target
    assert "done" in target.read_text()
    assert not (tmp_path / "caches").exists()


def test_without_a_compiler(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(
        ar.OnnxKernelError, match=r"there is no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\): install one"
    ):
        build_kernel()
    monkeypatch.setenv("CXX", "nothing -O3")
    with pytest.raises(ar.OnnxKernelError, match=r"there is no C\+\+ compiler 'nothing', which \$CXX names"):
        build_kernel()
    assert not (tmp_path / "caches").exists()


def test_a_build_that_fails_leaves_what_was_there(compiler: Path, tmp_path: Path) -> None:
    compiler.write_text("#!/bin/sh\necho 'rows.h:1: error: it is wrong' >&2\nexit 3\n")
    target = tmp_path / "mine.so"
    target.write_text("old")
    before = set(tmp_path.iterdir())
    with pytest.raises(
        ar.OnnxKernelError, match=r"(?s)the compiler failed with status 3: .*rows.h:1: error: it is wrong"
    ):
        build_kernel(target, compiler=str(compiler))
    assert (target.read_text(), set(tmp_path.iterdir())) == ("old", before)
    with pytest.raises(ar.OnnxKernelError, match=r"cannot write .*nowhere/mine.so: No such file.*--out FILE"):
        build_kernel(tmp_path / "nowhere" / "mine.so", compiler=str(compiler))


def test_the_command(compiler: Path, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from attnres_rewrite import cli

    def told(*arguments: str) -> Any:
        return CliRunner().invoke(cli.make_app(), ["build-onnx-kernel", "--compiler", str(compiler), *arguments])

    target = tmp_path / "mine.so"
    assert told("--out", str(target)).output.strip() == str(target)
    assert json.loads(told("--json").output)["path"].startswith(str(tmp_path / "caches"))
    failed = told("--json", "--out", str(tmp_path / "nowhere" / "x.so"))
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["error"] == "OnnxKernelError"
