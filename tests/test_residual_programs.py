"""Random pre-norm programs: the analysis finds exactly the stream that was planted, and the rewrite its numbers."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linked_models import Parts
from models import randomise_sites, relative_error, site_parameters
from reference_models import block_attn_res, partition_layers
from residual_programs import (
    BATCH,
    EMBEDDINGS,
    FLATTEN,
    KEEPS,
    LAYOUTS,
    LEAF_BODIES,
    LENGTH,
    LINKS,
    NARROW,
    NESTED_BODIES,
    NOT_YET,
    SCALES,
    SPELLINGS,
    SQUEEZE,
    UNFLATTEN,
    UNSQUEEZE,
    WIDEN,
    WIDTH,
    Link,
    Model,
    Program,
    Sublayer,
    Wrapper,
    auxiliary_head,
)
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.capture.dynamo import capture
from attnres_rewrite.capture.inputs import Call
from attnres_rewrite.pipeline import Analysis, analyse
from attnres_rewrite.streams import Step

X = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).double()
DOUBLE, MIXED = (torch.float64, torch.float64), (torch.float32, torch.float64)


@st.composite
def programs(draw: st.DrawFn, spoil: str | None = None) -> Program:
    """Two or three layers of one to three sublayers; with ``spoil``, the stream is none from some point on."""

    def one(options: Sequence[object], other: object = None, weight: int = 0) -> object:
        """One of the options, or ``weight`` times as often ``other``."""
        allowed = [option for option in options if option not in NOT_YET]
        return draw(st.sampled_from([*[other] * (weight * len(allowed)), *allowed]))

    def chance(weight: int = 3) -> bool:
        return one([True], False, weight)

    layout = one(LAYOUTS)
    flat, wide = chance(), spoil is None and chance()
    home = "flat" if flat else "BTD"
    most = 1 if layout == "owner" else 3
    last_extra: list[str | None] = [None]

    def transparent(shape: str, is_wide: bool, last: bool) -> tuple[tuple[str, ...], str, bool]:
        """Operations after an add, and the shape and dtype that they lead to; home again after the last."""
        names, moves = [], {"BTD": [(FLATTEN, "flat"), (UNSQUEEZE, "1")], "flat": [(UNSQUEEZE, "1")]}
        for _ in range(one((1, 2), 0, 1)):
            options = [*KEEPS] if spoil else [*KEEPS, NARROW if is_wide else WIDEN]
            back = [(SQUEEZE, home)] if shape == "1" else [(UNFLATTEN, "BTD")] if shape != home else []
            changes = {name: to for table, to in back or moves[shape] for name in table}
            names.append(one((*options, *changes)))
            shape = changes.get(names[-1], shape)
            is_wide = is_wide if names[-1] not in (WIDEN, NARROW) else names[-1] == WIDEN
        if last and shape != home:
            names.append(one([*(SQUEEZE if shape == "1" else UNFLATTEN)]))
        if last and is_wide != wide:
            names.append(WIDEN if wide else NARROW)
        return tuple(names), home if last else shape, wide if last else is_wide

    kinds = (*LEAF_BODIES, *NESTED_BODIES)
    if spoil:
        # A chain that begins on the stream is itself the stream, once that is none.
        kinds = tuple(kind for kind in kinds if kind != "nested on the stream")

    def branch() -> dict[str, object]:
        bodies = tuple(one(kinds) for _ in range(1 + chance()))
        fresh = [name for name, s in SPELLINGS.items() if s.overwrites != "x"]
        # Neither the stream nor a norm that another body reads may be overwritten.
        options = fresh if "nested on the stream" in bodies or len(bodies) > 1 else [*SPELLINGS]
        inner = tuple(one(options) for _ in range(draw(st.integers(1, 3))))
        return {"bodies": bodies, "norm": one(("layer", "rms")), "inner": inner, "gain": chance()}

    def sublayers() -> tuple[Sublayer, ...]:
        count = draw(st.integers(1, most))
        behind = [draw(st.integers(0, 1 + (j > 1))) if j and chance(1) else 0 for j in range(count)]
        shapes, wides, subs, is_wide = [home], [wide], [], wide
        for j in range(count):
            if shapes[-1 - behind[j]] != shapes[-1]:
                behind[j] = 0
            scale, scale_first = one([*SCALES], None, 3), chance(1)
            cast_source = wides[-1 - behind[j]]
            side = tuple(one([*KEEPS]) for _ in range(one((1, 2), 0, 2)))
            if not (spoil or is_wide) and chance(5):
                side, is_wide = (*side, WIDEN), True
            cast = is_wide and chance(1)
            narrow_branch = is_wide and not cast
            extra = None if layout == "sequential" else one(("value", "head"), None, 4)
            after, shape, is_wide = transparent(shapes[-1], is_wide, j + 1 == count)
            shapes.append(shape)
            wides.append(is_wide)
            sub = Sublayer(**branch(), behind=behind[j], scale=scale, scale_first=scale is not None and scale_first)
            subs.append(
                (
                    dataclasses.replace(sub, side=side, cast_source=cast_source, cast=cast, after=after, extra=extra),
                    narrow_branch,
                )
            )
        made = []
        for j, (sub, narrow_branch) in enumerate(subs):
            # What is overwritten must not be read later under its old name.
            before = made[-1].extra if made else last_extra[0]
            kept = before == "value" or any(q - behind[q] <= j for q in range(j + 1, count))
            forbidden = {"x"} if kept and "clone" not in sub.side else set()
            forbidden |= {"f"} if narrow_branch else set()
            options = [name for name, s in SPELLINGS.items() if s.overwrites not in forbidden]
            made.append(dataclasses.replace(sub, spelling=one(options)))
        last_extra[0] = made[-1].extra
        return tuple(made)

    layers = tuple(sublayers() for _ in range(one((2, 3))))
    blocks = one((*range(1, len(layers) + 1), "full", (draw(st.integers(1, len(layers))),)))
    links = []
    for to in range(1, len(layers) + 1):
        # In two dtypes a parameter would say which of them the sum has.
        if layout != "sequential" and not spoil and not wide and chance(2):
            links.append(Link(to, draw(st.integers(0, to - 1)), one([*LINKS])))
    embeddings = tuple(one(EMBEDDINGS) for _ in range(draw(st.integers(0, 2))))
    return Program(layers, layout, chance(1), embeddings, flat, wide, not chance(4), blocks, tuple(links))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was planted: per branch its steps as (kind, alpha), its layer, and its block."""

    steps: tuple[tuple[tuple[str, float], ...], ...]
    layers: tuple[str, ...]
    layer_of: tuple[int, ...]
    block_of: tuple[int, ...]
    owner: str


def plan_of(program: Program) -> Plan:
    steps, read = [], set()
    for i, subs in enumerate(program.layers):
        if program.link_to(i):
            steps.append(("link", 1.0, i - 1))
        values = [len(steps)]
        for j, sub in enumerate(subs):
            if sub.scale and sub.scale_first and (i or j):
                # Before the first add it belongs to the root.
                steps.append(("scale", 1.0, i))
                values[-1] = len(steps)
            read.add(values[-1 - sub.behind])
            if sub.scale and not sub.scale_first and (i or j):
                steps.append(("scale", 1.0, i))
            steps.append(("add", SPELLINGS[sub.spelling].alpha, i))
            values.append(len(steps))
            read |= {len(steps)} if sub.extra else set()
    if program.link_to(len(program.layers)):
        steps.append(("link", 1.0, len(program.layers) - 1))
    ends = sorted((read | {len(steps)}) - {0})
    branches = [steps[start:end] for start, end in itertools.pairwise([0, *ends])]
    layer_of: list[int] = []
    for branch in branches:
        # What is scaled between two reads belongs to what was added before it, layer and block.
        added = [layer for kind, _, layer in branch if kind == "add"]
        layer_of.append(added[-1] if added else layer_of[-1])
    block_of = itertools.accumulate((any(s[0] == "add" for s in b) for b in branches[1:]), initial=0)
    if program.blocks != "full":
        per = program.blocks[0] if isinstance(program.blocks, tuple) else None
        sizes = partition_layers(len(program.layers), None if per else program.blocks, per)
        block_of = ([block for block, size in enumerate(sizes) for _ in range(size)][layer] for layer in layer_of)
    owner = "body" if program.wrapped else ""
    prefix = (f"{owner}." if owner else "") + ("layer_" if program.layout == "attributes" else "layers.")
    names = tuple(f"{prefix}{i}" for i in range(len(program.layers)))
    return Plan(tuple(tuple(s[:2] for s in b) for b in branches), names, tuple(layer_of), tuple(block_of), owner)


class Stream:
    """A stream as the algebra has it, from the branch outputs; without queries, plain sums."""

    def __init__(self, root: Tensor, plan: Plan, queries: Sequence[Tensor], gains: Sequence[Tensor]) -> None:
        self.plan, self.queries, self.gains = plan, queries, gains
        self.parts, self.steps, self.values = Parts({0: root}), 0, []

    def scale(self, scale: Callable[[Tensor], Tensor], counts: bool = True) -> Tensor | None:
        self.parts = Parts({n: scale(part) for n, part in self.parts.parts.items()})
        return self._value() if counts else None

    def add(self, f: Tensor) -> Tensor | None:
        self.parts = self.parts.join(f, self.plan.block_of[len(self.values)] + 1)
        return self._value()

    def link(self, parts: Parts) -> Tensor | None:
        self.parts = parts
        return self._value()

    def _value(self) -> Tensor | None:
        """What is read after this step; nothing where the branch goes on."""
        k, self.steps = len(self.values), self.steps + 1
        if self.steps != sum(map(len, self.plan.steps[: k + 1])):
            return None
        sources = self.parts.sources()
        read = block_attn_res(sources, self.queries[k], self.gains[k]) if self.queries else self.parts.total()
        self.values.append(read)
        return read


@dataclasses.dataclass
class Run:
    """What a program computes: its outputs, the root, the branch output of every add, and all read values."""

    outputs: tuple[Tensor, ...]
    root: Tensor
    operands: list[Tensor]
    values: list[Tensor]


@torch.no_grad()
def reference(model: Model, queries: Sequence[Tensor] = (), gains: Sequence[Tensor] = ()) -> Run:
    """The program as its description says, in one dtype and shape, with the branches of ``model``."""
    program, extras, operands = model.program, [], []
    root = model.embed(X).flatten(0, 1) if program.flat else model.embed(X)
    home, layers = root.shape, [layer.connections for layer in model.all_layers()]
    unscaled = root
    if layers[0][0].sub.scale_first:
        root = layers[0][0].rescale(root)
    stream, value = Stream(root, plan_of(program), queries, gains), root
    # Of every value that a link may go back to, its parts.
    kept = [Parts({0: unscaled})]
    for i, connections in enumerate(layers):
        if program.link_to(i):
            value = stream.link(model.linked(i, stream.parts, kept))
        values, shape = [value], home
        for j, connection in enumerate(connections):
            sub = connection.sub
            if sub.scale_first and (i or j):
                values[-1] = stream.scale(connection.rescale)
            operands.append(connection.branch(values[-1 - sub.behind].reshape(shape)).reshape(home))
            if sub.scale and not sub.scale_first:
                stream.scale(connection.rescale, counts=bool(i or j))
            value = stream.add(SPELLINGS[sub.spelling].alpha * operands[-1])
            values.append(value)
            for name in sub.after:
                tables = {(BATCH * LENGTH, WIDTH): FLATTEN, (BATCH, LENGTH, WIDTH): UNFLATTEN, (1, *shape): UNSQUEEZE}
                shape = next((new for new, table in tables.items() if name in table), shape)
                shape = home if name in SQUEEZE else shape
            if sub.extra:
                extras.append(value if sub.extra == "value" else auxiliary_head(value))
        kept.append(stream.parts)
    if program.link_to(len(layers)):
        value = stream.link(model.linked(len(layers), stream.parts, kept))
    return Run((model.norm(value) if program.final_norm else value, *extras), root, operands, stream.values)


def alpha_of(step: Step) -> float:
    """What a step multiplies the branch output by that it adds."""
    return step.outputs[0].factor if step.outputs else 1.0


def check_plan(found: Analysis, program: Program) -> None:
    """One stream, with the branches, layers and blocks that were planted."""
    (plan,), planted = found.plans, plan_of(program)
    assert found.found == (plan.stream.owner,) == (planted.owner,)
    assert plan.stream.width == WIDTH
    # What a link is written with are scales too, as many as there are in its spelling.
    kinds = ("add",) if program.links else ("add", "scale")
    steps = tuple(tuple((s.kind, alpha_of(s)) for s in b.steps if s.kind in kinds) for b in plan.stream.branches)
    assert steps == tuple(tuple(step for step in branch if step[0] in kinds) for branch in planted.steps)
    assert plan.layer_of == planted.layer_of
    assert len(plan.layers) == len(planted.layers)
    for name, expected in zip(plan.layers, planted.layers, strict=True):
        assert f"{name}.".startswith(f"{expected}."), plan.layers
    assert plan.block_of == planted.block_of
    assert plan.sources == tuple(block + 2 for block in planted.block_of)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    return relative_error(actual.detach().double().reshape(-1), expected.reshape(-1)) < tolerance


class Values(torch.fx.Interpreter):
    """Runs a graph and notes the value of every node, which serves the analysis as its metadata."""

    def run_node(self, n: torch.fx.Node) -> object:
        value = super().run_node(n)
        n.meta["val"] = value.detach().clone() if isinstance(value, Tensor) else value
        return value


def traced(model: nn.Module) -> torch.fx.GraphModule:
    module = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        Values(module).run(X)
    return module


def check_values(found: Analysis, run: Run) -> None:
    """The nodes that were taken for root, branch outputs and read values compute just these."""
    stream = found.plans[0].stream
    nodes = [
        stream.root,
        *(output.node for b in stream.branches for add in b.adds for output in add.outputs),
        *(b.value for b in stream.branches),
    ]
    expected = [run.root, *run.operands, *run.values]
    assert all(close(node.meta["val"], value) for node, value in zip(nodes, expected, strict=True))


def build(program: Program, dtypes: Sequence[torch.dtype] = DOUBLE) -> tuple[Model, nn.Module]:
    torch.manual_seed(0)
    body = Model(program, dtypes)
    return body, Wrapper(body) if program.wrapped else body


def config_of(program: Program, aggregation: str = "mean") -> ar.AttnResConfig:
    if isinstance(program.blocks, tuple):
        return ar.AttnResConfig(layers_per_block=program.blocks[0], aggregation=aggregation)
    return ar.AttnResConfig(blocks=program.blocks, aggregation=aggregation)


def property_test(examples: int, spoil: str | None = None) -> Callable:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    limits = settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)
    return lambda test: limits(given(programs(spoil))(test))


@pytest.mark.slow
@property_test(452)
def test_the_planted_stream_is_found(program: Program) -> None:
    body, model = build(program)
    module, run = traced(model), reference(body)
    found = analyse([module], config_of(program))
    check_plan(found, program)
    check_values(found, run)


def check_numbers(rewritten: nn.Module, body: Model, *, random: bool, tolerance: float = 1e-9) -> None:
    """``rewritten`` computes what the description says with its queries and gains."""
    plan = plan_of(body.program)
    owner = f"{plan.owner}." if plan.owner else ""
    expected = [f"{owner}attn_res.{i}.{part}" for i in range(len(plan.steps)) for part in ("query", "gain")]
    assert [name for name, _ in ar.attnres_parameters(rewritten)] == expected
    queries, gains = site_parameters(randomise_sites(rewritten)) if random else ((), ())
    module = rewritten.module() if isinstance(rewritten, torch.export.ExportedProgram) else rewritten
    with torch.no_grad():
        outputs = module(X.to(body.dtypes[0]))
    wide = Model(body.program, DOUBLE)
    wide.load_state_dict(body.state_dict(), strict=False)
    run = reference(wide, [q.double() for q in queries], [g.double() for g in gains])
    assert len(outputs) == len(run.outputs)
    assert all(close(*pair, tolerance) for pair in zip(outputs, run.outputs, strict=True))


@pytest.mark.slow
@property_test(20)
def test_a_rewritten_graph_module_has_the_numbers(program: Program) -> None:
    body, model = build(program)
    module = traced(model)
    check_numbers(ar.rewrite(module, config=config_of(program, "sum")), body, random=False)
    check_numbers(ar.rewrite(module, config=config_of(program)), body, random=True)


@pytest.mark.slow
@property_test(12)
def test_a_rewritten_graph_of_two_dtypes_has_the_numbers(program: Program) -> None:
    """In the others the wide dtype is the narrow one, so that nothing is rounded."""
    body, model = build(program, MIXED)
    module = torch.fx.symbolic_trace(model)
    inputs = X.float()
    sums = ar.rewrite(module, config=config_of(program, "sum"), example_inputs=inputs)
    check_numbers(sums, body, random=False, tolerance=1e-5)
    mean = ar.rewrite(module, config=config_of(program), example_inputs=inputs)
    check_numbers(mean, body, random=True, tolerance=1e-5)


@pytest.mark.slow
@property_test(12)
def test_in_an_exported_program(program: Program) -> None:
    body, model = build(program)
    exported = torch.export.export(model, (X,))
    check_numbers(ar.rewrite(exported, config=config_of(program)), body, random=True)
    check_plan(analyse([exported.graph_module], config_of(program)), program)


@property_test(4)
def test_in_a_graph_of_dynamo(program: Program) -> None:
    torch._dynamo.reset()
    _, model = build(program)
    check_plan(analyse(capture(model, Call((X,), {})).modules, config_of(program)), program)


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("kind", ["norm", "gate"])
def test_what_is_no_sum_of_branch_outputs_is_refused(kind: str, everywhere: bool) -> None:
    """A norm or a gate on the stream, at every add, or once between two sublayers before and two after."""

    @property_test(10, kind)
    def refused(program: Program) -> None:
        count = sum(map(len, program.layers))
        spoiled = range(count) if everywhere else [count // 2 - (kind == "norm")]
        numbers = itertools.count()
        layers = tuple(
            tuple(dataclasses.replace(sub, spoil=kind if next(numbers) in spoiled else None) for sub in subs)
            for subs in program.layers
        )
        _, model = build(dataclasses.replace(program, layers=layers))
        # One gate alone may be met as what changes the stream between two pieces of it.
        reason = (
            "post-norm"
            if kind == "norm"
            else "gated stream"
            if everywhere
            else "gated stream|changed between its adds|post-norm"
        )
        with pytest.raises(ar.UnsupportedResidualError, match=reason):
            analyse([traced(model)], config_of(program))

    refused()


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_mix_over_depth_is_refused_as_such(everywhere: bool) -> None:
    """Every value takes in the one before by weights that compute from both, or one does before the last sublayer."""

    @property_test(10, "depth")
    def refused(program: Program) -> None:
        count = sum(map(len, program.layers))
        _, model = build(spoiled(program, "depth", range(count) if everywhere else [count - 2]))
        # Where less than two adds are left there is no stream whose values could be told.
        reason = "the model attends over depth already" + ("" if everywhere else "|gated stream|no residual stream")
        with pytest.raises(ar.AttnResError, match=reason):
            analyse([traced(model)], config_of(program))

    refused()


def test_a_sublayer_behind_a_projection_is_left_over() -> None:
    @property_test(10, "projection")
    def refused(program: Program) -> None:
        count = sum(map(len, program.layers))
        last = program.layers[-1][-1]
        if last.behind or last.scale:
            return
        _, model = build(spoiled(program, "projection", [count - 2]))
        with pytest.raises(ar.AttnResError, match=r"a sublayer would stay plain|no residual stream"):
            analyse([traced(model)], config_of(program))

    refused()


def spoiled(program: Program, kind: str, numbers: Sequence[int]) -> Program:
    """The program with the sublayers of these numbers spoiled."""
    counter = itertools.count()
    layers = tuple(
        tuple(dataclasses.replace(sub, spoil=kind if next(counter) in numbers else None) for sub in subs)
        for subs in program.layers
    )
    return dataclasses.replace(program, layers=layers)
