"""How sites are written in ONNX: graphs of sites alone, in every form, against the formula in NumPy.

Nothing is traced here, so these tests take no time; test_onnx.py exports models.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch

from attnres_rewrite.onnx.sites import Settings, Site, write_shared, write_whole

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnxscript").ir

WIDTH, EPS = 6, 1e-3
PLAIN = Settings(
    eps=EPS,
    scale=1.0,
    sum=False,
    gain=True,
    rank=3,
    dtype=torch.float32,
    parameter_dtype=torch.float32,
    opset_version=23,
)
# The sources of each site, by their numbers: two blocks of two layers, and the read after them.
CHAIN = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 4, 5), (0, 4, 6), (0, 4, 7)]
NUMPY: dict[torch.dtype, Any] = {
    torch.float32: numpy.float32,
    torch.float64: numpy.float64,
    torch.float16: numpy.float16,
    torch.bfloat16: pytest.importorskip("ml_dtypes").bfloat16,
}


@dataclasses.dataclass
class Case:
    """A graph whose inputs are the sources, and whose outputs are the reads."""

    model: Any
    sites: list[Site]
    given: dict[str, Any]
    expected: list[Any]

    def check(self, tolerance: float, reads: Sequence[Any] | None = None) -> None:
        names = [value.name for node in self.model.graph for value in node.outputs]
        assert len(names) == len(set(names))
        onnx.checker.check_model(ir.to_proto(self.model), full_check=True)
        found = self.run() if reads is None else reads
        for actual, expected in zip(found, self.expected, strict=True):
            assert actual.dtype == expected.dtype
            numpy.testing.assert_allclose(actual.astype(float), expected.astype(float), rtol=tolerance, atol=tolerance)

    def run(self) -> list[Any]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        content = ir.to_proto(self.model).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return list(session.run(None, self.given))

    def define(self, forms: Sequence[Any]) -> "Case":
        for form in forms:
            self.model.opset_imports[form.domain] = 1
            function = form.function()
            self.model.functions.setdefault(function.identifier(), function)
        return self

    def kinds(self) -> Counter[str]:
        return Counter(node.op_type for node in self.model.graph)


def case(
    chain: Sequence[tuple[int, ...]],
    settings: Settings | Sequence[Settings] = PLAIN,
    *,
    width: int = WIDTH,
    rows: Sequence[int] = (2, 3, 4, 5),
) -> Case:
    each = [settings] * len(chain) if isinstance(settings, Settings) else list(settings)
    rank, opset = each[0].rank, each[0].opset_version
    random = numpy.random.default_rng(0)
    shape = tuple(rows[: rank - 1])
    dtype = ir.DataType.from_numpy(numpy.dtype(NUMPY[each[0].dtype]))
    values, given = [], {}
    for number in range(1 + max(max(sources) for sources in chain)):
        name = f"source_{number}"
        dims = ir.Shape([f"d{i}" for i in range(rank - 1)] + [width])
        values.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=dims))
        given[name] = random.standard_normal((*shape, width)).astype(NUMPY[each[0].dtype])
    nodes, sites, expected, initializers = [], [], [], []
    for index, (sources, one) in enumerate(zip(chain, each, strict=True)):
        vectors = [random.standard_normal(width).astype(NUMPY[one.parameter_dtype]) for _ in range(1 + one.gain)]
        parameters = []
        for kind, vector in zip(("query", "gain"), vectors, strict=False):
            tensor = ir.tensor(vector, name=f"attn_res.{index}.{kind}")
            value = ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            parameters.append(value)
        initializers += parameters
        node = ir.node("BlockAttnRes", [values[i] for i in sources], domain="attnres", name=f"attn_res.{index}")
        node.outputs[0].name, node.outputs[0].type = f"read_{index}", values[0].type
        node.outputs[0].shape = values[0].shape
        nodes.append(node)
        sites.append(Site(node, tuple(values[i] for i in sources), tuple(parameters), one))
        expected.append(read([given[f"source_{i}"] for i in sources], vectors, one))
    results, imports = [node.outputs[0] for node in nodes], {"": opset}
    graph = ir.Graph(values, results, nodes=nodes, initializers=initializers, opset_imports=imports, name="g")
    return Case(ir.Model(graph, ir_version=10), sites, given, expected)


def read(sources: Sequence[Any], vectors: Sequence[Any], settings: Settings) -> Any:
    """The equation of README.md, in float64."""
    v = numpy.stack(sources).astype(float)
    k = v / numpy.sqrt((v**2).mean(-1, keepdims=True) + EPS)
    for vector in vectors[1:]:
        k = k * vector.astype(float)
    logits = settings.scale * (k @ vectors[0].astype(float))
    weights = numpy.exp(logits - logits.max(0))
    h = (weights[..., None] / weights.sum(0)[..., None] * v).sum(0) * (len(sources) if settings.sum else 1)
    return h.astype(sources[0].dtype)


def change(**options: Any) -> Settings:
    return dataclasses.replace(PLAIN, **options)


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        change(sum=True),
        change(gain=False, scale=0.5),
        change(opset_version=18),
        change(opset_version=18, sum=True, scale=2.0),
        change(rank=2),
        change(rank=4),
        change(rank=4, opset_version=18, gain=False),
        change(dtype=torch.float64, parameter_dtype=torch.float64),
        change(dtype=torch.float32, parameter_dtype=torch.float64),
        change(dtype=torch.float16, parameter_dtype=torch.float16),
        change(dtype=torch.float16, parameter_dtype=torch.float32, sum=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [False, True], ids=["shared", "whole"])
def test_every_setting_in_both_forms(settings: Settings, whole: bool) -> None:
    made = case(CHAIN, settings)
    made.define([write_whole(site) for site in made.sites] if whole else write_shared(made.sites))
    made.check({torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3}[settings.dtype])
    assert made.kinds() == ({"BlockAttnRes": 7} if whole else {"ScaleQueries": 1, "AttendBlocks": 2, "BlockAttnRes": 7})
    assert [node.name for node in made.model.graph if node.op_type == "BlockAttnRes"] == [s.name for s in made.sites]


# Other ways in which sites can share, and the forms of phase one that they need.
CHAINS: dict[str, tuple[list[tuple[int, ...]], set[str]]] = {
    "one block": ([(0, 1), (0, 2), (0, 3)], {"3_reads_first_last"}),
    "full": (
        [(0, 1), (0, 1, 2), (0, 1, 2, 3)],
        {"1_reads_of_2_blocks_0_partials_first", "2_reads_of_3_blocks_1_partials_last"},
    ),
    "two blocks at a time": (
        [(0, 1), (0, 1, 2, 3, 4), (0, 1, 2, 3, 5)],
        {"1_reads_of_2_blocks_0_partials_first", "2_reads_of_4_blocks_2_new_last"},
    ),
    # Two streams that begin with the same block.
    "two that follow": (
        [(0, 1), (0, 2), (0, 2, 3), (0, 2, 4), (0, 5), (0, 5, 6), (0, 5, 7)],
        {"1_reads_first_2_following", "3_reads_of_2_blocks_2_partials_last"},
    ),
    # Nothing in common, and one of them by itself.
    "a lone site": ([(0, 1), (0, 2), (3, 4, 5)], {"2_reads_first_last"}),
    "two streams": ([(0, 1), (0, 2), (3, 4), (3, 5), (3, 6)], {"2_reads_first_last", "3_reads_first_last"}),
}


@pytest.mark.parametrize(("chain", "shared"), CHAINS.values(), ids=CHAINS)
def test_the_sources_decide_what_is_shared(chain: list[tuple[int, ...]], shared: set[str]) -> None:
    made = case(chain)
    made.define(write_shared(made.sites))
    nodes = [node for node in made.model.graph if node.op_type == "AttendBlocks"]
    assert {node.domain.removeprefix("attnres.") for node in nodes} == shared
    made.check(1e-5)


def test_sites_of_different_settings_share_nothing() -> None:
    made = case([(0, 1), (0, 2), (0, 3)], [PLAIN, change(scale=0.5), change(eps=1e-3, gain=False)])
    made.define(write_shared(made.sites))
    assert made.kinds() == {"BlockAttnRes": 3}
    made.check(1e-5)


def test_a_block_is_normalised_once() -> None:
    """That is what sharing is for: eight norms for eighteen sources."""
    made = case(CHAIN)
    made.define(write_shared(made.sites))
    inlined = pytest.importorskip("onnx.inliner").inline_local_functions(ir.to_proto(made.model))
    norms = [node for node in inlined.graph.node if node.op_type == "RMSNormalization"]
    blocks, partials = {0, 4}, {1, 2, 3, 5, 6, 7}
    assert len(norms) == len(blocks | partials)
    assert len(norms) < sum(len(sources) for sources in CHAIN)
    evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(made.model))
    made.check(1e-5, evaluator.run(None, made.given))


def test_large_logits_do_not_overflow() -> None:
    made = case(CHAIN, change(scale=1e3))
    made.define(write_shared(made.sites))
    made.check(1e-4)
