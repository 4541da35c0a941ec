"""Changing shapes: at most one recompilation for the batch and one for the sequence length, counted in graphs."""

import copy
import itertools

import pytest
import torch
from models import (
    Tower,
    embeddings,
    llama,
    logits,
    prepared,
    randomise_sites,
    relative_error,
    site_parameters,
    token_ids,
)
from reference_models import reference_llama, run_stream
from torch import Tensor, nn

import attnres_rewrite as ar

pytestmark = pytest.mark.slow
LAYERS, BLOCKS = 2, 2
TOLERANCE = 1e-5  # float32
BATCHES = [(2, 9), (3, 9), (5, 9), (8, 9)]
LENGTHS = [(2, 9), (2, 12), (2, 7), (2, 31)]


class Counting:
    """An inner backend that keeps every graph that it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.sites: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, _: list[Tensor]) -> object:
        attnres = torch.ops.attnres.block_attn_res.default
        self.sites.append(sum(node.target is attnres for node in module.graph.nodes))
        return module.forward


def rewritten(model: nn.Module, **options: object) -> tuple[nn.Module, Counting]:
    counting = Counting()
    return randomise_sites(ar.rewrite(model, BLOCKS, backend=counting, **options)), counting


def tower(**options: object) -> tuple[nn.Module, Counting]:
    return rewritten(prepared(Tower(LAYERS)), example_inputs=embeddings(), **options)


def expected(model: Tower, x: Tensor) -> Tensor:
    layers = [(layer.first, layer.second) for layer in model.layers]
    return model.head(model.norm(run_stream(model.embed(x), layers, *site_parameters(model), blocks=BLOCKS)))


def check(model: Tower, shapes: list[tuple[int, int]]) -> None:
    for seed, shape in enumerate(shapes):
        x = embeddings(*shape, seed=seed)
        assert relative_error(model(x), expected(model, x)) < TOLERANCE, shape


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shapes", [BATCHES, LENGTHS], ids=["batch", "length"])
def test_one_size_changes(shapes, training) -> None:
    model, counting = tower()
    model.train(training)
    with torch.set_grad_enabled(training):
        check(model, shapes[:1])
        assert len(counting.sites) == 1
        check(model, shapes)
        check(model, shapes[::-1])
    assert counting.sites == [2 * LAYERS] * 2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_both_sizes_change(training) -> None:
    """In whatever order: the second graph has one symbol, the third one two."""
    model, counting = tower()
    model.train(training)
    with torch.set_grad_enabled(training):
        check(model, [*BATCHES, *LENGTHS, *itertools.product((3, 4, 6), (5, 8, 40))])
    assert counting.sites == [2 * LAYERS] * 3


def test_both_sizes_change_at_once() -> None:
    model, counting = tower()
    check(model, [(2, 9), (3, 12), (4, 7), (7, 33), (2, 9)])
    assert counting.sites == [2 * LAYERS] * 2


def test_symbolic_from_the_start() -> None:
    model, counting = tower(dynamic=True)
    check(model, [(2, 9), (3, 12), (4, 7), (7, 33)])
    assert counting.sites == [2 * LAYERS]


def test_fixed_shapes_on_request() -> None:
    """So that the counts above can be other ones."""
    model, counting = tower(dynamic=False)
    check(model, [(2, 9), (3, 9), (4, 9), (3, 9)])
    assert counting.sites == [2 * LAYERS] * 3


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_hugging_face_model(training) -> None:
    # They outlive a reset, with the graph breaks of other tests.
    torch._dynamo.utils.counters.clear()
    model = prepared(llama(LAYERS))
    plain = copy.deepcopy(model)
    model, counting = rewritten(model)
    model.train(training)
    sites = site_parameters(model)
    with torch.set_grad_enabled(training):
        for shape in (*BATCHES[:3], *LENGTHS[:3], (4, 17), (6, 5)):
            ids = token_ids(*shape)
            output = logits(model(ids))
            assert relative_error(output, reference_llama(plain, ids, *sites, blocks=BLOCKS)) < TOLERANCE, shape
    assert counting.sites == [2 * LAYERS] * 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_gradients_at_sizes_that_were_not_compiled_for() -> None:
    model, counting = tower()
    model.train()
    for shape in ((2, 9), (3, 12), (5, 20)):
        x = embeddings(*shape)
        model.zero_grad()
        model(x).square().sum().backward()
        actual = {name: p.grad.clone() for name, p in model.named_parameters()}
        queries, gains = ([p.clone().requires_grad_() for p in part] for part in site_parameters(model))
        layers = [(layer.first, layer.second) for layer in model.layers]
        model.zero_grad()
        output = model.head(model.norm(run_stream(model.embed(x), layers, queries, gains, blocks=BLOCKS)))
        output.square().sum().backward()
        for i, (query, gain) in enumerate(zip(queries, gains, strict=True)):
            assert relative_error(actual[f"attn_res.{i}.query"], query.grad) < 10 * TOLERANCE, shape
            assert relative_error(actual[f"attn_res.{i}.gain"], gain.grad) < 10 * TOLERANCE, shape
        assert relative_error(actual["embed.weight"], model.embed.weight.grad) < 10 * TOLERANCE, shape
    assert counting.sites == [2 * LAYERS] * 2


def test_what_needs_no_new_graph() -> None:
    """Steps of an optimiser, loaded weights, other queries, and modes that were seen before."""
    model, counting = tower()
    x = embeddings()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    other, _ = tower()
    model.load_state_dict(randomise_sites(other, seed=9).state_dict())
    assert relative_error(model(x), expected(model, x)) < TOLERANCE
    assert counting.sites == [2 * LAYERS]
    for _ in range(2):
        with torch.no_grad():
            model(x)
        model(x)
    assert len(counting.sites) == 2
