"""A model that attends over depth already is refused as what it is; one that sums over depth in other ways is not."""

from collections.abc import Callable

import pytest
import torch
from models import mostly_slow, prepared
from torch import Tensor, nn
from zoo.depth import LINES, READS, Listing, MixAtTheEnd, OverItsPast, PlainBlock, Read
from zoo.handwritten import LAYERS, VOCAB, WIDTH

import attnres_rewrite as ar

IDS = torch.arange(12).reshape(2, 6)
REASON = "attention over depth: the model attends over depth already"


def refused(model: nn.Module, line: str) -> None:
    model = prepared(model)
    with pytest.raises(ar.UnsupportedResidualError, match=REASON) as raised:
        ar.explain(model, 2, example_inputs=IDS)
    assert line in str(raised.value)
    with pytest.raises(ar.UnsupportedResidualError, match=REASON):
        ar.explain(torch.export.export(model, (IDS,)), 2)


# With one or two sublayers a block there is no chain of adds at all, with eight only one block.
@pytest.mark.parametrize("per_block", mostly_slow([1, 2, 3, 6, 8], 2, 6))
@pytest.mark.parametrize("spelling", READS)
def test_the_listing_of_the_paper(spelling: str, per_block: int) -> None:
    refused(Listing(READS[spelling], per_block), LINES[spelling])


@pytest.mark.parametrize("spelling", READS)
def test_an_attention_over_the_past_that_is_added_to_the_stream(spelling: str) -> None:
    refused(OverItsPast(READS[spelling]), LINES[spelling])


class Stream(nn.Module):
    """Layers that a subclass runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(PlainBlock() for _ in range(LAYERS))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self.embed(ids))))


class GatedEmbedding(Stream):
    """The embedding is mixed back in, as much of it as the stream says."""

    def run(self, x: Tensor) -> Tensor:
        first = x
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = layer(x)
            x = x + torch.sigmoid(gate(x)) * first
        return x


class Buffer(Stream):
    """The values are kept in one tensor, of which every layer reads as many as there are."""

    def run(self, x: Tensor) -> Tensor:
        values = x.new_zeros(LAYERS + 1, *x.shape)
        values[0] = x
        for i, (layer, gate) in enumerate(zip(self.layers, self.gates, strict=True)):
            past = values[: i + 1]
            x = layer(x + (torch.softmax(gate(past), 0) * past).sum(0))
            values[i + 1] = x
        return x


@pytest.mark.parametrize(
    ("kind", "line"),
    [(GatedEmbedding, "torch.sigmoid(gate(x)) * first"), (Buffer, "torch.softmax(gate(past), 0) * past")],
)
def test_other_weights_that_compute_from_the_values(kind: Callable[[], nn.Module], line: str) -> None:
    with pytest.raises(ar.UnsupportedResidualError, match=REASON) as raised:
        ar.explain(kind(), 2, example_inputs=IDS)
    assert line in str(raised.value)


# In a loop, the last value times its weight, with the others added, looks like a gated stream.
@pytest.mark.parametrize("spelling", READS)
def test_a_mix_of_all_layers_after_the_last_is_read_by_no_layer(spelling: str) -> None:
    (stream,) = ar.explain(MixAtTheEnd(READS[spelling]), 2, example_inputs=IDS).streams
    assert stream.branches == 2 * LAYERS


class Interpolated(Stream):
    """A gate chooses between the first and the last value, before the last layer or after it."""

    def __init__(self, gated_before: int) -> None:
        super().__init__()
        self.gated_before = gated_before

    def run(self, x: Tensor) -> Tensor:
        first = x
        for i in range(LAYERS + 1):
            if i == self.gated_before:
                gate = torch.sigmoid(self.gates[0](x))
                x = gate * x + (1 - gate) * first
            x = self.layers[i](x) if i < LAYERS else x
        return x


def test_a_gate_between_two_values_after_the_last_layer_is_none_of_the_stream() -> None:
    (stream,) = ar.explain(Interpolated(LAYERS), 2, example_inputs=IDS).streams
    assert stream.branches == 2 * LAYERS
    for before in range(1, LAYERS):
        with pytest.raises(ar.UnsupportedResidualError, match=f"{REASON}|changed between its adds"):
            ar.explain(Interpolated(before), 2, example_inputs=IDS)


class Experts(Stream):
    """Experts in a branch are weighted by what the stream says, and tokens by their neighbours: one depth each."""

    def run(self, x: Tensor) -> Tensor:
        for layer, gate in zip(self.layers, self.gates, strict=True):
            n = self.norm(x)
            outputs = torch.stack([layer.mlp(n), layer.attn(n)])
            x = x + (torch.softmax(torch.stack([gate(n), -gate(n)]), 0) * outputs).sum(0)
            n = self.norm(x)
            shifted = torch.sigmoid(gate(n)) * n + (1 - torch.sigmoid(gate(n))) * n.roll(1, 1)
            x = x + layer.mlp(shifted)
        return x


class TwoKindsOfTokens(Stream):
    """Two streams side by side, whose layers attend to both at once."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.ModuleList(PlainBlock() for _ in range(LAYERS))

    def run(self, x: Tensor) -> Tensor:
        y = self.embed.weight[: x.shape[1]].expand(x.shape[0], -1, -1)
        for layer, other in zip(self.layers, self.other, strict=True):
            both = layer.attn(layer.ln_1(torch.cat([x, y], 1)))
            one, two = both.split([x.shape[1], y.shape[1]], 1)
            x, y = x + one, y + two
            x, y = x + layer.mlp(layer.ln_2(x)), y + other.mlp(other.ln_2(y))
        return x + y


@pytest.mark.parametrize(("kind", "branches"), [(Experts, [8]), (TwoKindsOfTokens, [8, 8])])
def test_what_meets_at_one_depth_is_no_attention_over_depth(kind: Callable[[], nn.Module], branches: list[int]) -> None:
    streams = ar.explain(kind(), 2, example_inputs=IDS).streams
    assert sorted(stream.branches for stream in streams) == branches


def test_every_spelling_computes_the_same() -> None:
    """So the models above are what their names say."""

    def output(read: Read) -> Tensor:
        torch.manual_seed(0)
        model = Listing(read, 3)
        for query in model.queries:
            nn.init.normal_(query)
        return model(IDS)

    expected, *others = (output(read) for read in READS.values())
    for other in others:
        torch.testing.assert_close(other, expected)
