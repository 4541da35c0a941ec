"""Every sublayer is on a stream or in a branch of one, or the model is refused."""

import itertools
from collections.abc import Callable

import pytest
import torch
from models import WIDTH, Block, Feed, embeddings, export, prepared, relative_error, site_parameters
from torch import Tensor, nn

import attnres_rewrite as ar

X = embeddings()
PLAIN = ar.AttnResConfig(blocks=2, aggregation="sum", leftovers="plain")


class Skips(nn.Module):
    """The second half of the layers takes in what the first half kept, by a projection of both: a U-ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Feed() for _ in range(8))
        self.skips = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.embed(x), []
        for i, layer in enumerate(self.layers):
            x = self.skips[i - 4](torch.cat([x, kept.pop()], -1)) if i >= 4 else x
            x = x + layer(x)
            if i < 4:
                kept.append(x)
        return self.norm(x)


class Projected(nn.Module):
    """The stream goes through a projection of its own width before the last of eight layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Feed() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, layer in enumerate(self.layers):
            x = self.between(x) if i == 7 else x
            x = x + layer(x)
        return x


class Tower(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Feed() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


class SingleLayer(nn.Module):
    """A tower of four layers, and one of a single layer."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.head = Tower(4), Tower(1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.text(x)) * self.image(x)


# The line of the first sublayer left out, and the branch outputs that there are without them.
LEFT_OUT: dict[type[nn.Module], tuple[str, int]] = {
    Skips: ("self.skips[i - 4](torch.cat([x, kept.pop()], -1))", 4),
    Projected: ("x = self.between(x) if i == 7 else x", 7),
    SingleLayer: ("x = self.embed(x)", 4),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_sublayer_that_is_left_out_is_refused(kind: type[nn.Module]) -> None:
    model = prepared(kind())
    keys, expected = list(model.state_dict()), model(X)
    with pytest.raises(ar.UnsupportedResidualError) as raised:
        ar.rewrite(model, 2, example_inputs=X, backend="eager")
    message = str(raised.value)
    # What is left out, what it is added to, why that is no stream, and what to do.
    assert message.startswith("a sublayer would stay plain: it is on no residual stream that was found")
    assert "a chain of one add" in message
    assert LEFT_OUT[kind][0] in message
    assert "x = x + layer(x)" in message
    assert 'AttnResConfig(leftovers="plain")' in message
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.parametrize("form", ["live", "program"])
def test_one_word_accepts_the_rest_as_plain(kind: type[nn.Module], form: str) -> None:
    model = prepared(kind()).double()
    x = X.double()
    expected = model(x)
    if form == "live":
        rewritten = ar.rewrite(model, config=PLAIN, example_inputs=x, backend="eager")
    else:
        with pytest.raises(ar.UnsupportedResidualError, match="a sublayer would stay plain"):
            ar.rewrite(export(model, x), 2)
        rewritten = ar.rewrite(export(model, x), config=PLAIN).module()
    assert len(site_parameters(rewritten)[0]) == LEFT_OUT[kind][1]
    assert relative_error(rewritten(x), expected) < 1e-12


class DeepSkips(Skips):
    """The same with layers of two sublayers, each of which then looks like a stream by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.embed(x), []
        for i, layer in enumerate(self.layers):
            x = layer(self.skips[i - 4](torch.cat([x, kept.pop()], -1)) if i >= 4 else x)
            kept += [x] if i < 4 else []
        return self.norm(x)


def test_a_layer_with_a_stream_of_its_own_is_refused() -> None:
    model = prepared(DeepSkips())
    expected = model(X)
    with pytest.raises(ar.UnsupportedResidualError, match="a layer would be cut off from those beside it") as raised:
        ar.rewrite(model, 2, example_inputs=X, backend="eager")
    message = str(raised.value)
    assert "module 'layers.4' has a stream of its own, apart from that of 'layers.0'" in message
    assert "self.skips[i - 4](torch.cat([x, kept.pop()], -1))" in message
    config = ar.AttnResConfig(blocks=2, aggregation="sum", leftovers="plain", streams=("",))
    ar.rewrite(model, config=config, example_inputs=X, backend="eager")
    assert len(site_parameters(model)[0]) == 8
    assert relative_error(model(X), expected) < 1e-5


def test_streams_by_name_leave_other_modules_alone() -> None:
    with pytest.raises(ar.UnsupportedResidualError, match=r"name them: AttnResConfig\(streams=\('text',\)\)"):
        ar.rewrite(SingleLayer(), 2, example_inputs=X, backend="eager")
    config = ar.AttnResConfig(blocks=2, streams=("text",))
    model = ar.rewrite(SingleLayer(), config=config, example_inputs=X, backend="eager")
    assert {name.split(".")[0] for name, _ in ar.attnres_parameters(model)} == {"text"}


def test_leftovers_is_one_of_two_words() -> None:
    with pytest.raises(ValueError, match=r"leftovers must be one of \('refuse', 'plain'\), not 'ignore'"):
        ar.AttnResConfig(leftovers="ignore")


# Layers that hide their adds


class Region(Block):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


@torch.library.custom_op("attnres_tests::add_norm", mutates_args=())
def add_norm(f: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    total = f + x
    return nn.functional.rms_norm(total, (total.shape[-1],)), total.clone()


@add_norm.register_fake
def _(f: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(f), torch.empty_like(f)


class Fused(Block):
    def forward(self, x: Tensor) -> Tensor:
        y, x = add_norm(self.first(x), x)
        return x + self.second(y)


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, f: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        total = f + x
        return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6), total

    @staticmethod
    def backward(ctx: object, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return second, second


class Function(Block):
    def forward(self, x: Tensor) -> Tensor:
        y, x = AddNorm.apply(self.first(x), x)
        return x + self.second(y)


class Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, f: Tensor) -> Tensor:
        return x + f

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


class AddedByFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = Added.apply(x, self.first(x))
        return Added.apply(x, self.second(x))


@torch.library.custom_op("attnres_tests::whole_layer", mutates_args=())
def whole_layer(x: Tensor, weight: Tensor) -> Tensor:
    return x + x @ weight


@whole_layer.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class Opaque(Block):
    def forward(self, x: Tensor) -> Tensor:
        return whole_layer(whole_layer(x, self.first.up.weight[:WIDTH]), self.second.up.weight[:WIDTH])


class Stack(nn.Module):
    """Four blocks, of which those in ``hidden`` are of another class."""

    def __init__(self, block: Callable[[], nn.Module], hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(block() if i in hidden else Block() for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


# Of a region that runs once Dynamo makes no operator.
HIDDEN = [*itertools.product((Region, Fused, Function, Opaque), ((2, 3), (0, 1)))]


@pytest.mark.parametrize(("block", "hidden"), [*HIDDEN, (Fused, (3,)), (Function, (0,)), (Opaque, (3,))])
def test_layers_that_hide_their_adds_are_refused(block: type[nn.Module], hidden: tuple[int, ...]) -> None:
    model = prepared(Stack(block, hidden))
    expected = model(X)
    with pytest.raises(ar.UnsupportedResidualError, match="a sublayer would stay plain") as raised:
        ar.rewrite(model, 2, example_inputs=X, backend="eager")
    assert f"module 'layers.{hidden[0]}" in str(raised.value)
    assert torch.equal(model(X), expected)


def test_adds_in_functions_of_autograd_are_no_stream() -> None:
    """Dynamo calls inputs of the functions' graphs ``getitem``, which they are not."""
    with pytest.raises(ar.NoResidualStreamError, match="no residual stream was found"):
        ar.explain(Stack(AddedByFunction, (0, 1, 2, 3)), 2, example_inputs=X)


def test_the_second_net_says_which_layer_ran_without_an_add() -> None:
    with pytest.raises(ar.UnsupportedResidualError, match=r"'layers\.3' ran without an add .* as there is in 'layers"):
        ar.explain(Stack(Opaque, (3,)), 2, example_inputs=X)


def test_layers_that_hide_their_adds_can_be_left_plain() -> None:
    model = prepared(Stack(Fused, (2, 3)))
    expected = model(X)
    ar.rewrite(model, config=PLAIN, example_inputs=X, backend="eager")
    assert len(site_parameters(model)[0]) == 4
    assert relative_error(model(X), expected) < 1e-5


# What is no leftover


class PooledHead(Tower):
    """One token attends to all others and has a feed-forward of its own, as in SigLIP's head."""

    def __init__(self) -> None:
        super().__init__(4)
        self.probe, self.attention = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.MultiheadAttention(WIDTH, 4)
        self.feed = Feed()

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x).transpose(0, 1)
        pooled = self.attention(self.probe.expand(1, x.shape[1], -1), x, x)[0].transpose(0, 1)
        return pooled + self.feed(pooled)


class LongSkip(Tower):
    """A convolution of what all layers did is added to their input, as in image restoration."""

    def __init__(self) -> None:
        super().__init__(4)
        self.last = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(super().forward(x).mT).mT


class Recurrence(Tower):
    """Every sublayer steps a state, of which the last one is returned beside the output, as a cache is."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, states = self.embed(x), []
        for layer in self.layers:
            state = torch.zeros(x.shape[0], 1, WIDTH, WIDTH)
            n = layer(x)
            outputs = torch.zeros_like(x)
            outputs[:] = n @ state[:, 0]
            state = 0.5 * state + (n.mT @ (n - n @ state[:, 0]))[:, None]
            x = x + layer.down(layer.up(outputs + n))
            states.append(state)
        return x, *states


class UnusedEnd(Tower):
    """What the last layer adds to is not used."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, layer in enumerate(self.layers):
            before, x = x, x + layer(x)
            if i == len(self.layers) - 1:
                return before
        return x


@pytest.mark.parametrize("kind", [PooledHead, LongSkip, Recurrence, lambda: UnusedEnd(5)])
def test_what_is_no_layer_is_no_leftover(kind: Callable[..., nn.Module]) -> None:
    model = kind(4) if kind is Recurrence else kind()
    (stream,) = ar.explain(prepared(model), 2, example_inputs=X).streams
    assert stream.branches == 4
