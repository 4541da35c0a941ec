"""What an ExportedProgram keeps when it is rewritten, and who can take the program that comes out."""

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor
from models import (
    VOCAB,
    WIDTH,
    Block,
    Feed,
    Tower,
    embeddings,
    gpt2,
    llama,
    names_of,
    prepared,
    relative_error,
    token_ids,
)
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

import attnres_rewrite as ar

# PyTorch's own, from inside torch.export.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

LAYERS, SITES = 3, 6
TOLERANCE = 1e-5
DYNAMIC = {0: Dim.DYNAMIC(max=16), 1: Dim.DYNAMIC(min=2, max=32)}


class Counting(nn.Module):
    """Buffers of both kinds, one of them written to, a tensor constant, and a dictionary for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("positions", torch.linspace(-1, 1, 32 * WIDTH).view(32, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls.add_(1)
        x = x + self.positions[: x.shape[1]] * torch.tensor([0.5, -0.5]).repeat(WIDTH // 2)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(self.norm(x)), "calls": self.calls.clone()}


@dataclasses.dataclass(frozen=True)
class Model:
    """A kind of model: how to make one, what its stream's owner is called, and its input by size."""

    make: Callable[[], nn.Module]
    owner: str
    layers: str
    argument: str
    inputs: Callable[[int, int], Tensor]


MODELS = {
    "llama": Model(lambda: llama(LAYERS, use_cache=False), "model", "model.layers", "input_ids", token_ids),
    "gpt2": Model(
        # Its own attention kernel, and a dynamic batch: PyTorch cannot decompose that, rewritten or not.
        lambda: gpt2(LAYERS, use_cache=False, attn_implementation="eager"),
        "transformer",
        "transformer.h",
        "input_ids",
        token_ids,
    ),
    "counting": Model(Counting, "", "layers", "x", embeddings),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program before and after, its live twin with the same weights, and what that gives at another size."""

    model: Model
    plain: ExportedProgram
    rewritten: ExportedProgram
    live: nn.Module
    inputs: dict[str, Tensor]
    expected: Tensor

    @property
    def names(self) -> list[str]:
        return names_of(f"{self.model.owner}.attn_res", SITES)


def export(model: nn.Module, name: str, example: Tensor, **options: object) -> ExportedProgram:
    return torch.export.export(model, (), {name: example}, dynamic_shapes={name: DYNAMIC}, **options)


def random_queries(program: ExportedProgram) -> ExportedProgram:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in program.state_dict.items():
            if name.endswith(".query"):
                value.normal_(generator=generator)
    return program


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    kind = MODELS[request.param]
    model = prepared(kind.make())
    plain = export(copy.deepcopy(model), kind.argument, kind.inputs(2, 7))
    rewritten = random_queries(ar.rewrite(plain, 2))
    live = ar.rewrite(model, 2, backend="eager", example_inputs={kind.argument: kind.inputs(2, 7)})
    live.load_state_dict(rewritten.state_dict)
    inputs = {kind.argument: kind.inputs(3, 11)}
    with torch.no_grad():
        expected = live(**inputs)["logits"]
        # The plain model gives something else, so what agrees has its sites.
        assert relative_error(plain.module()(**inputs)["logits"], expected) > 1e-2
    return Case(kind, plain, rewritten, live, inputs, expected)


def weights_of(live: nn.Module) -> dict[str, Tensor]:
    """Without the settings, which of a program are its graph."""
    return {name: value for name, value in live.state_dict().items() if not name.endswith("attn_res._extra_state")}


def check_numbers(case: Case, module: Callable[..., object], tolerance: float = TOLERANCE) -> None:
    """At a size that was not traced ``module`` gives what the live twin gives, in the plain program's container."""
    with torch.no_grad():
        output = module(**case.inputs)
    assert type(output) is case.plain.call_spec.out_spec.type
    assert relative_error(output["logits"], case.expected) < tolerance


def sites_in(module: nn.Module | ExportedProgram) -> int:
    return len(module.graph.find_nodes(op="call_function", target=torch.ops.attnres.block_attn_res.default))


def paths(module: nn.Module) -> set[str]:
    return {path for path, _ in module.named_modules()}


def test_same_numbers_from_the_live_model_and_the_program(case: Case) -> None:
    check_numbers(case, case.rewritten.module())


def test_the_signature_gains_the_sites_and_nothing_else(case: Case) -> None:
    old, new = case.plain.graph_signature, case.rewritten.graph_signature
    assert [spec for spec in new.input_specs if spec.target not in case.names] == old.input_specs
    assert list(new.parameters) == [*old.parameters, *case.names]
    kinds = [spec.kind for spec in new.input_specs]
    assert kinds[: len(new.parameters)] == [InputKind.PARAMETER] * len(new.parameters)
    assert [(spec.kind, spec.target) for spec in new.output_specs] == [
        (spec.kind, spec.target) for spec in old.output_specs
    ]
    assert new.user_inputs == old.user_inputs == (case.model.argument,)
    placeholders = [node.name for node in case.rewritten.graph.nodes if node.op == "placeholder"]
    assert placeholders == [spec.arg.name for spec in new.input_specs]


def test_the_tensors_are_the_old_ones_and_the_new_parameters(case: Case) -> None:
    old, new = case.plain, case.rewritten
    assert list(new.state_dict) == [*old.state_dict, *case.names]
    assert all(new.state_dict[name] is value for name, value in old.state_dict.items())
    parameters = [new.state_dict[name] for name in case.names]
    assert all(type(p) is nn.Parameter and p.requires_grad and p.shape == (WIDTH,) for p in parameters)
    assert new.state_dict.keys() == weights_of(case.live).keys()
    assert new.constants == old.constants
    assert new.constants is not old.constants
    assert list(dict(new.named_buffers())) == list(dict(old.named_buffers()))
    if case.model.make is Counting:
        assert new.graph_signature.buffers == ("calls", "positions")
        assert new.graph_signature.non_persistent_buffers == ("positions",)
        assert list(new.graph_signature.lifted_tensor_constants) == ["lifted_tensor_0"]


def test_dynamic_shapes_are_kept(case: Case) -> None:
    assert len(case.plain.range_constraints) == 2
    assert case.rewritten.range_constraints == case.plain.range_constraints
    assert case.rewritten.example_inputs == case.plain.example_inputs
    for batch, length in [(17, 4), (3, 33)]:
        inputs = {case.model.argument: case.model.inputs(batch, length)}
        messages = []
        for program in (case.plain, case.rewritten):
            with pytest.raises(AssertionError, match="Guard failed") as raised:
                program.module()(**inputs)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def test_the_calling_convention_is_kept(case: Case) -> None:
    old, new = case.plain, case.rewritten
    assert new.module_call_graph == old.module_call_graph
    assert (new.call_spec.in_spec, new.call_spec.out_spec) == (old.call_spec.in_spec, old.call_spec.out_spec)
    assert (new.verifiers, new.dialect) == (old.verifiers, old.dialect)


def test_save_and_load(case: Case, tmp_path: Path) -> None:
    torch.export.save(case.rewritten, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    check_numbers(case, loaded.module())
    assert loaded.graph_signature == case.rewritten.graph_signature
    assert loaded.range_constraints == case.rewritten.range_constraints
    assert loaded.state_dict.keys() == case.rewritten.state_dict.keys()
    check_numbers(case, torch.export.unflatten(loaded))


def test_a_loaded_program_can_be_rewritten(case: Case, tmp_path: Path) -> None:
    torch.export.save(case.plain, tmp_path / "plain.pt2")
    rewritten = random_queries(ar.rewrite(torch.export.load(tmp_path / "plain.pt2"), 2))
    check_numbers(case, rewritten.module())
    assert rewritten.range_constraints == case.rewritten.range_constraints
    check_numbers(case, torch.export.unflatten(rewritten))


def test_unflatten_gives_the_module_tree(case: Case) -> None:
    module = torch.export.unflatten(case.rewritten)
    check_numbers(case, module)
    prefix = f"{case.model.owner}.attn_res".lstrip(".")
    new = {prefix} | {f"{prefix}.{i}" for i in range(SITES)}
    assert paths(module) == paths(torch.export.unflatten(case.plain)) | new
    # One submodule a layer: a second one for a second call would be named layers.0@1.
    children = [name for name, _ in module.get_submodule(case.model.layers).named_children()]
    assert children == [str(i) for i in range(LAYERS)]
    layers = [module.get_submodule(f"{case.model.layers}.{i}") for i in range(LAYERS)]
    assert [sites_in(layer) for layer in layers] == [SITES // LAYERS] * LAYERS
    assert [name for name, _ in ar.attnres_parameters(case.live)] == case.names
    assert module.state_dict().keys() == weights_of(case.live).keys()


def test_an_unflattened_program_trains_its_sites(case: Case) -> None:
    module = torch.export.unflatten(case.rewritten)
    module(**case.inputs)["logits"].square().sum().backward()
    parameters = dict(module.named_parameters())
    assert [name for name in case.names if parameters[name].grad is None or not parameters[name].grad.any()] == []


@pytest.mark.slow
def test_decompositions(case: Case) -> None:
    decomposed = case.rewritten.run_decompositions()
    assert sites_in(decomposed) == SITES
    check_numbers(case, decomposed.module())
    check_numbers(case, torch.export.unflatten(decomposed))
    # PyTorch puts them in the order of the module tree.
    assert sorted(decomposed.graph_signature.parameters) == sorted(case.rewritten.graph_signature.parameters)


def test_a_buffer_that_counts_goes_on_counting() -> None:
    program = export(prepared(Counting()), "x", embeddings())
    decomposed = program.run_decompositions()
    rewritten = [ar.rewrite(program, 2), random_queries(ar.rewrite(decomposed, 2))]
    # Decomposition makes an output of what is written to a buffer.
    outputs = [(spec.kind, spec.target) for spec in rewritten[1].graph_signature.output_specs]
    assert outputs[0] == (OutputKind.BUFFER_MUTATION, "calls")
    assert outputs == [(spec.kind, spec.target) for spec in decomposed.graph_signature.output_specs]
    for module in (form(program) for program in rewritten for form in (ExportedProgram.module, torch.export.unflatten)):
        module.calls.zero_()
        assert [module(x=embeddings())["calls"].item() for _ in range(3)] == [1, 2, 3]


def test_the_program_passed_in_is_not_changed(case: Case) -> None:
    program = export(prepared(case.model.make()), case.model.argument, case.model.inputs(2, 7))

    def seen() -> list[str]:
        nodes = [f"{node.format_node()} {sorted(node.meta)}" for node in program.graph.nodes]
        calls = [str(entry) for entry in program.module_call_graph]
        rest = program.graph_signature, program.range_constraints, list(program.state_dict), list(program.constants)
        return [*nodes, *calls, *map(str, rest)]

    before, weights = seen(), {name: value.clone() for name, value in program.state_dict.items()}
    rewritten = random_queries(ar.rewrite(program, 2))
    # What a later pass does to the new program is no business of the old one either.
    for spec in rewritten.graph_signature.input_specs:
        spec.arg.name += "_renamed"
    rewritten.constants["more"] = torch.ones(1)
    assert seen() == before
    assert all(torch.equal(program.state_dict[name], value) for name, value in weights.items())


class Wrapped(nn.Module):
    """A stream that lies in a submodule as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Tower(LAYERS)
        self.head = nn.Linear(VOCAB, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Repeated(nn.Module):
    """One layer that is called again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()] * LAYERS)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Adding(nn.Module):
    """The model adds in place; its sublayers know nothing of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Feed() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for layer in self.layers:
            x += layer(x)
        return self.norm(x)


@pytest.mark.parametrize(
    ("make", "kept", "lost"),
    [
        (Wrapped, ["body", "body.layers.0.first.up", "body.layers.1.second", "body.norm", "head"], ["body.layers.1"]),
        (Repeated, ["norm"], ["layers.0"]),
        (Adding, ["layers.0", "layers.1", "layers.2.norm", "norm"], []),
    ],
)
def test_module_call_signatures(make, kept, lost, caplog) -> None:
    """Those that ``torch.export.export`` was asked to preserve; a part of the stream has more than they can say."""
    model = prepared(make())
    program = export(model, "x", embeddings(), preserve_module_call_signature=(*kept, *lost))
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        rewritten = random_queries(ar.rewrite(program, 2))
    before = {entry.fqn: entry.signature for entry in program.module_call_graph}
    after = {entry.fqn: entry.signature for entry in rewritten.module_call_graph}
    assert list(after) == list(before)
    dropped = [path for path in before if before[path] is not None and after[path] is None]
    assert {path.partition("@")[0] for path in dropped} == set(lost)
    assert [
        r.getMessage().split("'")[1] for r in caplog.records if r.name == "attnres_rewrite.forms.exported"
    ] == dropped

    x = embeddings(3, 11)
    expected = rewritten.module()(x=x)
    assert relative_error(program.module()(x=x), expected) > 1e-2
    module = torch.export.unflatten(rewritten)
    assert relative_error(module(x=x), expected) < TOLERANCE
    # What has a signature can be called by itself, or changed for another module.
    if "body" in kept:
        assert relative_error(module.head(module.body(x)), expected) < TOLERANCE
    for path in set(kept) - {"body"}:
        module.set_submodule(path, model.get_submodule(path))
        assert relative_error(module(x=x), expected) < TOLERANCE, path
    decomposed = rewritten.run_decompositions()
    assert [e.fqn for e in decomposed.module_call_graph if e.signature] == [path for path in after if after[path]]
    assert relative_error(torch.export.unflatten(decomposed)(x=x), expected) < TOLERANCE


@pytest.mark.slow
def test_aoti(case: Case, tmp_path: Path) -> None:
    path = torch._inductor.aoti_compile_and_package(case.rewritten, package_path=str(tmp_path / "program.pt2"))
    check_numbers(case, torch._inductor.aoti_load_package(path), tolerance=1e-4)


class Dropping(nn.Module):
    """A tower with dropout in its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.drop = nn.ModuleList(Feed() for _ in range(2)), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.drop(layer(x))
        return x


@pytest.mark.parametrize("training", [True, False])
def test_dropout_that_export_fixed_is_told(training, caplog) -> None:
    program = torch.export.export(Dropping().train(training), (embeddings(),))
    ar.rewrite(program, 2)
    lines = [r.getMessage() for r in caplog.records if r.name == "attnres_rewrite.forms.fixed_by_export"]
    assert [line.split(", and")[0] for line in lines] == [
        "this ExportedProgram was exported in train mode: dropout is active in 2 operators, the first in 'drop'"
    ] * training
