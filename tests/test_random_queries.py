"""With random pseudo-queries all forms of one model agree with one another and with the hand-written models."""

import copy
from collections.abc import Callable

import pytest
import torch
from models import (
    ARCHITECTURES,
    VOCAB,
    Tower,
    embeddings,
    export,
    images,
    logits,
    mostly_slow,
    prepared,
    randomise_sites,
    relative_error,
    site_parameters,
    token_ids,
)
from reference_models import reference_gpt2, reference_gpt_neox, reference_llama, run_stream
from torch import Tensor, nn
from torch.fx import GraphModule

import attnres_rewrite as ar

LAYERS = 5  # Neither 3 nor 4 blocks divide them evenly.
TOLERANCE = 1e-5  # float32
EXACT = 1e-12  # float64
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "llama": reference_llama,
    "gpt2": reference_gpt2,
    "gpt-neox": reference_gpt_neox,
}
PARTITIONS = [{"blocks": 1}, {"blocks": 3}, {"blocks": 4}, {"blocks": "full"}, {"layers_per_block": 2}]


def config_of(partition: dict[str, object], aggregation: str = "mean") -> ar.AttnResConfig:
    return ar.AttnResConfig(**partition, aggregation=aggregation)


def expected(name: str, plain: nn.Module, rewritten: nn.Module, ids: Tensor, **options: object) -> Tensor:
    """The hand-written model on the weights of ``plain`` and the sites of ``rewritten``."""
    queries, gains = site_parameters(rewritten)
    reference = REFERENCES[name](plain, ids, queries, gains, **options)
    assert relative_error(reference, logits(plain(ids))) > 1e-2
    return reference


@pytest.fixture(scope="module", params=list(REFERENCES))
def exported(request: pytest.FixtureRequest) -> tuple[str, nn.Module, torch.export.ExportedProgram]:
    model = prepared(ARCHITECTURES[request.param].make(LAYERS), torch.float64)
    return request.param, model, export(model, token_ids())


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@torch.no_grad()
def test_exported_program_equals_the_hand_written_model(exported, partition, aggregation) -> None:
    name, plain, program = exported
    before = str(program.graph), list(program.state_dict)
    rewritten = ar.rewrite(program, config=config_of(partition, aggregation))
    assert (str(program.graph), list(program.state_dict)) == before
    module = randomise_sites(rewritten.module())
    ids = token_ids(seed=7)
    reference = expected(name, plain, module, ids, **partition, aggregation=aggregation)
    assert relative_error(logits(module(ids)), reference) < EXACT


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("partition", [{"blocks": 3}, {"blocks": "full"}], ids=str)
@torch.no_grad()
def test_graph_module_equals_the_hand_written_model(exported, partition, aggregation) -> None:
    name, plain, program = exported
    module = program.module()
    before = str(module.graph), list(module.state_dict())
    rewritten = randomise_sites(ar.rewrite(module, config=config_of(partition, aggregation)))
    assert isinstance(rewritten, GraphModule)
    assert (str(module.graph), list(module.state_dict())) == before
    ids = token_ids(seed=7)
    reference = expected(name, plain, rewritten, ids, **partition, aggregation=aggregation)
    assert relative_error(logits(rewritten(ids)), reference) < EXACT


LIVE = [
    ("llama", {"blocks": 3}, "mean"),
    ("gpt2", {"blocks": "full"}, "mean"),
    ("gpt-neox", {"layers_per_block": 2}, "sum"),
    ("llama", {"blocks": 1}, "sum"),
    ("llama", {"blocks": 4}, "sum"),
    ("llama", {"blocks": "full"}, "mean"),
    ("llama", {"layers_per_block": 2}, "mean"),
    ("gpt2", {"blocks": 3}, "sum"),
    ("gpt-neox", {"blocks": 3}, "mean"),
]


@pytest.mark.parametrize("case", mostly_slow(LIVE, *LIVE[:1]), ids=str)
@torch.no_grad()
def test_live_model_equals_the_hand_written_model(case) -> None:
    name, partition, aggregation = case
    plain = prepared(ARCHITECTURES[name].make(LAYERS))
    model = copy.deepcopy(plain)
    randomise_sites(ar.rewrite(model, config=config_of(partition, aggregation), backend="eager"))
    ids = token_ids()
    reference = expected(name, plain, model, ids, **partition, aggregation=aggregation)
    assert relative_error(logits(model(ids)), reference) < TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_live_model_at_other_shapes() -> None:
    """The second shape is another graph, with sizes that are symbols; the third one runs it once more."""
    plain = prepared(ARCHITECTURES["llama"].make(LAYERS))
    model = copy.deepcopy(plain)
    randomise_sites(ar.rewrite(model, 3, backend="eager"))
    for shape in ((2, 9), (3, 12), (4, 7), (1, 5)):
        ids = token_ids(*shape, seed=2)
        reference = expected("llama", plain, model, ids, blocks=3)
        assert relative_error(logits(model(ids)), reference) < TOLERANCE


@pytest.mark.parametrize("name", mostly_slow(["opt", "vit", "encoder"], "encoder"))
@torch.no_grad()
def test_live_and_exported_agree_where_there_is_no_hand_written_model(name) -> None:
    architecture = ARCHITECTURES[name]
    plain = prepared(architecture.make(LAYERS))
    inputs = images() if name == "vit" else token_ids()
    with torch.enable_grad():
        program = export(plain, inputs)
    plain_output = logits(plain(inputs))
    twin = randomise_sites(ar.rewrite(program, 3).module())
    live = ar.rewrite(plain, 3, backend="eager")
    live.load_state_dict(twin.state_dict())
    error = relative_error(logits(live(inputs)), logits(twin(inputs)))
    assert error < TOLERANCE
    assert relative_error(logits(live(inputs)), plain_output) > 1e-2


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = logits(model(ids))
    (output * torch.linspace(-1, 1, VOCAB)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("backend", mostly_slow(["aot_eager", "inductor"], "aot_eager"))
def test_compilers_agree_with_the_hand_written_model(backend) -> None:
    plain = prepared(ARCHITECTURES["llama"].make(3))
    model = copy.deepcopy(plain)
    randomise_sites(ar.rewrite(model, 2, backend=backend))
    ids = token_ids()
    reference = expected("llama", plain, model, ids, blocks=2)
    output = logits(model(ids))
    assert relative_error(output, reference) < TOLERANCE

    actual = gradients(model, ids)
    queries, gains = ([p.clone().requires_grad_() for p in part] for part in site_parameters(model))
    reference = reference_llama(plain, ids, queries, gains, blocks=2)
    (reference * torch.linspace(-1, 1, VOCAB)).mean().backward()
    for i, (query, gain) in enumerate(zip(queries, gains, strict=True)):
        assert relative_error(actual[f"model.attn_res.{i}.query"], query.grad) < 10 * TOLERANCE
        assert relative_error(actual[f"model.attn_res.{i}.gain"], gain.grad) < 10 * TOLERANCE
    for name, parameter in plain.named_parameters():
        assert relative_error(actual[name], parameter.grad) < 10 * TOLERANCE, name


def capture_by_dynamo(model: nn.Module, *inputs: Tensor) -> tuple[GraphModule, list[Tensor]]:
    captured = []

    def keep(module: GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        def run(*arguments: Tensor) -> object:
            captured.append((module, arguments))
            return module.forward(*arguments)

        return run

    torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    return captured[0]


@torch.no_grad()
def test_graph_captured_by_dynamo_equals_the_hand_written_model() -> None:
    plain = prepared(ARCHITECTURES["llama"].make(LAYERS))
    ids = token_ids()
    module, arguments = capture_by_dynamo(plain, ids)
    rewritten = randomise_sites(ar.rewrite(module, 3))
    assert [name for name, _ in ar.attnres_parameters(rewritten)][:2] == [
        "model.attn_res.0.query",
        "model.attn_res.0.gain",
    ]
    reference = expected("llama", plain, rewritten, ids, blocks=3)
    # Dynamo's graph also returns keys and values.
    (output,) = (tensor for tensor in rewritten(*arguments) if tensor.shape[-1] == VOCAB)
    assert relative_error(output, reference) < TOLERANCE


def reference_tower(tower: Tower, x: Tensor, module: nn.Module, **options: object) -> Tensor:
    layers = [(layer.first, layer.second) for layer in tower.layers]
    return tower.head(tower.norm(run_stream(tower.embed(x), layers, *site_parameters(module), **options)))


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@torch.no_grad()
def test_symbolic_trace_equals_the_hand_written_model(partition) -> None:
    """A graph of module calls, without metadata: shapes come from the example inputs."""
    tower = prepared(Tower(LAYERS))
    x = embeddings()
    traced = torch.fx.symbolic_trace(tower)
    rewritten = ar.rewrite(traced, config=config_of(partition), example_inputs=x)
    randomise_sites(rewritten)
    reference = reference_tower(tower, x, rewritten, **partition)
    assert relative_error(rewritten(x), reference) < TOLERANCE
    assert relative_error(traced(x), reference) > 1e-2


def test_all_forms_share_one_state_dict() -> None:
    model = prepared(ARCHITECTURES["gpt2"].make(3))
    program = export(model, token_ids())
    module = program.module()
    with_sites = ar.rewrite(program, 2)
    names = set(dict(ar.attnres_parameters(ar.rewrite(module, 2))))
    assert names == {f"transformer.attn_res.{i}.{part}" for i in range(6) for part in ("query", "gain")}
    assert names == set(with_sites.state_dict) - set(program.state_dict)
    assert names == set(with_sites.graph_signature.parameters) - set(program.graph_signature.parameters)
    live = ar.rewrite(model, 2, backend="eager")
    assert names == {name for name, _ in ar.attnres_parameters(live)}
    assert set(with_sites.state_dict) <= set(live.state_dict())


@pytest.mark.slow
def test_training_moves_live_model_and_exported_twin_alike() -> None:
    """Float64, so that the twins cannot drift apart by rounding; then the weights move between them."""
    plain = prepared(ARCHITECTURES["gpt2"].make(3), torch.float64)
    # A program shares the weights of the model that it was exported from.
    program = export(copy.deepcopy(plain), token_ids())
    twin = randomise_sites(ar.rewrite(program, 2).module())
    live = randomise_sites(ar.rewrite(plain, 2, backend="aot_eager"))
    start = [p.clone() for _, p in ar.attnres_parameters(live)]
    for model in (live, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(20):
            ids = token_ids(seed=step)
            output = logits(model(ids))
            loss = nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                parameters = dict(ar.attnres_parameters(model))
                assert [name for name, p in parameters.items() if p.grad is None or not p.grad.all()] == []
            optimizer.step()
    moved = [(a - b).abs().min() > 0 for a, (_, b) in zip(start, ar.attnres_parameters(live), strict=True)]
    assert all(moved)
    ids = token_ids(seed=99)
    assert relative_error(logits(live(ids)), logits(twin(ids))) < 1e-9
    fresh = ar.rewrite(program, 2).module()
    fresh.load_state_dict(live.state_dict(), strict=False)
    assert relative_error(logits(fresh(ids)), logits(live(ids))) < 1e-9


def test_at_zero_queries_only_the_gains_have_no_gradient() -> None:
    """The logits are <w, k * g>, so at w = 0 the gradient reaches every query and no gain."""
    live = ar.rewrite(prepared(ARCHITECTURES["llama"].make(3)), 2, backend="eager")
    for name, gradient in gradients(live, token_ids()).items():
        if "attn_res" in name:
            assert bool(gradient.any()) == name.endswith("query"), name


@torch.no_grad()
def test_options_reach_the_equation() -> None:
    plain = prepared(ARCHITECTURES["llama"].make(3))
    model = copy.deepcopy(plain)
    options = {"eps": 0.05, "scale": 0.3}
    config = ar.AttnResConfig(blocks=2, key_gain=False, **options)
    randomise_sites(ar.rewrite(model, config=config, backend="eager"))
    queries, gains = site_parameters(model)
    assert (len(queries), gains) == (6, [])
    ids = token_ids()
    reference = reference_llama(plain, ids, queries, None, blocks=2, **options)
    assert relative_error(logits(model(ids)), reference) < TOLERANCE
    assert relative_error(reference_llama(plain, ids, queries, None, blocks=2), reference) > 1e-3
