"""Other ways to call a model, to give it parameters and to look into it: the numbers stay those of the equation."""

import copy

import pytest
import torch
from models import (
    VOCAB,
    Block,
    Tower,
    embeddings,
    export,
    gpt2,
    llama,
    logits,
    prepared,
    randomise_sites,
    relative_error,
    site_parameters,
    token_ids,
)
from reference_models import block_attn_res, reference_llama, run_stream
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import attnres_rewrite as ar

LAYERS, BLOCKS = 3, 2
TOLERANCE = 1e-5  # float32
IDS = token_ids()
SUM = ar.AttnResConfig(blocks=BLOCKS, aggregation="sum")


def rewritten(model: nn.Module, **options: object) -> nn.Module:
    return randomise_sites(ar.rewrite(model, BLOCKS, backend="eager", **options))


# Hidden states


def test_hidden_states_of_a_fresh_model() -> None:
    model = rewritten(prepared(llama(2)))
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_hidden_states_at_zero_queries_are_those_of_the_original(make) -> None:
    original = prepared(make(2), torch.float64)
    expected = original(IDS, output_hidden_states=True)
    model = prepared(make(2), torch.float64)
    actual = ar.rewrite(model, config=SUM, backend="eager")(IDS, output_hidden_states=True)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    found, wanted = ((*output.hidden_states, output.logits) for output in (actual, expected))
    for state, original_state in zip(found, wanted, strict=True):
        # The norm of Llama rounds to float32 inside.
        assert relative_error(state, original_state) < 1e-6


@torch.no_grad()
def test_hidden_states_are_the_outputs_of_the_sites() -> None:
    """The state after a layer is what the next layer reads; the last one, as ever, has the last norm behind it."""
    model = prepared(llama(LAYERS))
    plain = copy.deepcopy(model)
    rewritten(model)
    states = model(IDS, output_hidden_states=True).hidden_states
    queries, gains = site_parameters(model)
    sources = sources_of_sites(plain, queries, gains)
    outputs = [block_attn_res(*site) for site in zip(sources, queries, gains, strict=True)]
    expected = [plain.model.embed_tokens(IDS), *outputs[1:-1:2], plain.model.norm(outputs[-1])]
    assert [relative_error(a, b) < TOLERANCE for a, b in zip(states, expected, strict=True)] == [True] * 4
    assert relative_error(states[1], plain(IDS, output_hidden_states=True).hidden_states[1]) > 1e-2


def sources_of_sites(model: nn.Module, queries: list[Tensor], gains: list[Tensor]) -> list[list[Tensor]]:
    trace: list[list[Tensor]] = []
    reference_llama(model, IDS, queries, gains, blocks=BLOCKS, trace=trace)
    return trace


# Arguments and parameters


def test_embeddings_in_place_of_token_ids() -> None:
    """Their gradients too, as attribution methods and soft prompts need them."""
    model = rewritten(prepared(llama(2)))
    weights = torch.randn(2, 9, VOCAB)
    passed = model.get_input_embeddings()(IDS).detach().requires_grad_()
    output = model(inputs_embeds=passed).logits
    (output * weights).sum().backward()
    looked_up = model.get_input_embeddings().weight.detach().clone().requires_grad_()
    plain = copy.deepcopy(ar.undo(copy.deepcopy(model)))
    plain.model.embed_tokens.weight = nn.Parameter(looked_up)
    queries, gains = site_parameters(model)
    expected = reference_llama(plain, IDS, queries, gains, blocks=BLOCKS)
    assert relative_error(output, expected) < TOLERANCE
    (expected * weights).sum().backward()
    summed = torch.zeros_like(looked_up).index_add_(0, IDS.flatten(), passed.grad.flatten(0, 1))
    assert relative_error(summed, plain.model.embed_tokens.weight.grad) < 10 * TOLERANCE


@torch.no_grad()
def test_functional_call_with_parameters_of_another_model() -> None:
    """All parameters come from the call, pseudo-queries included; the model's own stay out of it and unchanged."""
    x = embeddings()
    model = rewritten(prepared(Tower(LAYERS)), example_inputs=x)
    other = prepared(Tower(LAYERS), seed=5)
    randomise_sites(ar.rewrite(other, BLOCKS, example_inputs=x, backend="eager"), seed=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = functional_call(model, dict(other.named_parameters()), (x,))
    assert relative_error(output, tower_by_hand(other, x, *site_parameters(other))) < TOLERANCE
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    queries, gains = site_parameters(model)
    own = tower_by_hand(model, x, queries, gains)
    assert relative_error(model(x), own) < TOLERANCE
    doubled = {name: 2 * p for name, p in ar.attnres_parameters(model) if name.endswith("query")}
    expected = tower_by_hand(model, x, list(doubled.values()), gains)
    assert relative_error(functional_call(model, doubled, (x,)), expected) < TOLERANCE
    assert relative_error(expected, own) > 1e-2


def tower_by_hand(tower: Tower, x: Tensor, queries: list[Tensor], gains: list[Tensor]) -> Tensor:
    layers = [(layer.first, layer.second) for layer in tower.layers]
    return tower.head(tower.norm(run_stream(tower.embed(x), layers, queries, gains, blocks=BLOCKS)))


def test_tied_embeddings_stay_tied() -> None:
    """One parameter with one gradient, the sum of those of both uses."""
    model = prepared(llama(2, tie_word_embeddings=True), torch.float64)
    names = [name for name, _ in model.named_parameters()]
    rewritten(model)
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is embedding
    assert [name for name, _ in model.named_parameters() if "attn_res" not in name] == names
    assert "lm_head.weight" not in names
    weights = torch.randn(2, 9, VOCAB, dtype=torch.float64)
    (model(IDS).logits * weights).sum().backward()
    twin = ar.undo(copy.deepcopy(model))
    twin.lm_head.weight = nn.Parameter(embedding.detach().clone())
    twin.model.embed_tokens.weight = nn.Parameter(embedding.detach().clone())
    (reference_llama(twin, IDS, *site_parameters(model), blocks=BLOCKS) * weights).sum().backward()
    both = twin.lm_head.weight.grad + twin.model.embed_tokens.weight.grad
    # Both round to float32 inside the norms, in different orders.
    assert relative_error(embedding.grad, both) < TOLERANCE
    assert relative_error(embedding.grad, twin.lm_head.weight.grad) > 1e-2


# Function transforms, on the forms that are plain graphs


def traced_tower() -> tuple[nn.Module, Tensor]:
    traced = torch.fx.symbolic_trace(prepared(Tower(LAYERS), torch.float64))
    x = embeddings(4).double()
    return randomise_sites(ar.rewrite(traced, BLOCKS, example_inputs=x)), x


def exported_gpt2() -> tuple[nn.Module, Tensor]:
    program = export(prepared(gpt2(LAYERS), torch.float64), token_ids(1))
    return randomise_sites(ar.rewrite(program, BLOCKS).module()), token_ids(4)[:, None]


@pytest.mark.parametrize("make", [traced_tower, exported_gpt2], ids=["GraphModule", "ExportedProgram"])
def test_gradients_per_sample_equal_a_loop_over_the_samples(make) -> None:
    module, samples = make()
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    targets = torch.randn(VOCAB, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return (logits(functional_call(module, parameters, (sample,))) * targets).square().mean()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, samples)
    sites = [name for name, _ in ar.attnres_parameters(module)]
    assert len(sites) == 4 * LAYERS
    for i, sample in enumerate(samples):
        module.zero_grad()
        loss(dict(module.named_parameters()), sample).backward()
        floor = 1e-9 * torch.stack([p.grad.norm() for p in module.parameters()]).norm()
        for name, parameter in module.named_parameters():
            difference = (together[name][i] - parameter.grad).norm()
            assert difference <= 1e-9 * parameter.grad.norm() + floor, name
        assert all(together[name][i].any() for name in sites)
    assert all(not torch.allclose(together[name][0], together[name][1], rtol=1e-3) for name in sites)


def test_functional_call_of_a_graph_module() -> None:
    module, x = traced_tower()
    tower = prepared(Tower(LAYERS), torch.float64, seed=5)
    queries, gains = ([torch.randn_like(p) for p in part] for part in site_parameters(module))
    sites = [name for name, _ in ar.attnres_parameters(module)]
    given = [p for pair in zip(queries, gains, strict=True) for p in pair]
    output = functional_call(module, {**dict(tower.named_parameters()), **dict(zip(sites, given, strict=True))}, (x,))
    assert relative_error(output, tower_by_hand(tower, x, queries, gains)) < 1e-12


@pytest.mark.slow
def test_a_forward_on_the_object_does_not_change_the_blocks() -> None:
    # Libraries wrap the forward of an object and put the original back: then a graph tells other module paths.
    model = randomise_sites(ar.rewrite(gpt2().eval(), blocks=3, backend="eager"))
    example = {"input_ids": token_ids(), "use_cache": False}
    expected, weights = model(**example).logits, ar.depth_attention(model, example).weights
    model.forward = model.forward
    torch._dynamo.reset()
    torch.testing.assert_close(model(**example).logits, expected)
    torch.testing.assert_close(ar.depth_attention(model, example).weights, weights, equal_nan=True)


# Modes that watch what is computed


@pytest.mark.parametrize("make", [lambda: (prepared(llama(2)), IDS), lambda: (prepared(Tower(LAYERS)), embeddings())])
def test_a_mode_that_counts_operations(make) -> None:
    """Dynamo compiles nothing while such a mode is active; the count is that of the plain model, in both passes."""
    from torch.utils.flop_counter import FlopCounterMode

    model, x = make()
    plain = copy.deepcopy(model)
    model = rewritten(model, example_inputs=x)
    expected = model(x)

    def counted(model: nn.Module) -> tuple[int, Tensor]:
        with FlopCounterMode(display=False) as counter:
            output = model(x)
            output = output if isinstance(output, Tensor) else output.logits
            output.sum().backward()
        return counter.get_total_flops(), output

    flops, output = counted(model)
    assert relative_error(output, expected if isinstance(expected, Tensor) else expected.logits) < TOLERANCE
    assert flops == counted(plain)[0] > 0
    assert all(parameter.grad is not None for _, parameter in ar.attnres_parameters(model))
    assert isinstance(model(x), type(expected))


# Names that are unusual


class Owner(nn.Module):
    """The root has an attribute called owner, in which the layers have a name that is no Python."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = Named()

    def forward(self, x: Tensor) -> Tensor:
        return self.owner(x)


class Named(Tower):
    def __init__(self) -> None:
        super().__init__(0)
        self.layers = nn.ModuleDict({"a-b": Stack()})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers["a-b"](self.embed(x))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_modules_with_unusual_names() -> None:
    x, plain = embeddings(), prepared(Owner())
    live = rewritten(copy.deepcopy(plain), example_inputs=x)
    names = [name for name, _ in ar.attnres_parameters(live)]
    assert names[0] == "owner.layers.a-b.attn_res.0.query"
    (stream,) = ar.explain(plain, BLOCKS, example_inputs=x).streams
    assert (stream.owner, stream.layers[0]) == ("owner.layers.a-b", "owner.layers.a-b.blocks.0")
    assert ar.verify(live, x)
    program = ar.rewrite(torch.export.export(plain, (x,)), BLOCKS).module()
    graph = ar.rewrite(torch.fx.symbolic_trace(plain), BLOCKS, example_inputs=x)
    for form in (program, graph):
        assert len(list(ar.attnres_parameters(form))) == len(names)
        assert relative_error(form(x), plain(x)) < 1e-3
