"""log_dict: every number is what its name says, computed another way."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from models import Tower, embeddings, prepared, randomise_sites, site_parameters, token_ids
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import attnres_rewrite as ar
from attnres_rewrite.inspection.statistics import decayed_parameters

LAYERS, SITES = 2, 4


def tower(**config: object) -> nn.Module:
    config = ar.AttnResConfig(blocks=2, **config)
    return ar.rewrite(prepared(Tower(LAYERS)), config=config, example_inputs=embeddings(), backend="eager")


def test_without_inputs_the_norms_and_nothing_else() -> None:
    model = randomise_sites(tower())
    queries, gains = site_parameters(model)
    expected = {f"attnres/query_norm/{i:03d}": query.norm().item() for i, query in enumerate(queries)}
    drifts = [(gain - 1).square().mean().sqrt().item() for gain in gains]
    expected |= {f"attnres/gain_drift/{i:03d}": drift for i, drift in enumerate(drifts)}
    expected["attnres/total/query_norm"] = torch.cat(queries).norm().item()
    expected["attnres/total/gain_drift"] = (torch.cat(gains) - 1).square().mean().sqrt().item()
    values = ar.log_dict(model)
    assert values == pytest.approx(expected, rel=1e-6)
    assert all(type(value) is float for value in values.values())
    assert [name.split("/")[1] for name in list(values)[:2]] == ["total", "total"]


def test_a_new_model_has_drifted_nowhere_and_weighs_equally() -> None:
    values = ar.log_dict(tower(), embeddings())
    assert {value for name, value in values.items() if "norm/" in name or "drift/" in name} == {0.0}
    # One block a layer: the sources are the embedding and the partial, then the complete block as well.
    sources = [2, 2, 3, 3]
    entropies = [value for name, value in values.items() if name.startswith("attnres/weight_entropy/")]
    largest = [value for name, value in values.items() if name.startswith("attnres/largest_weight/")]
    assert entropies == pytest.approx([math.log(n) for n in sources])
    assert largest == pytest.approx([1 / n for n in sources])


def test_depth_weights_are_those_of_depth_attention() -> None:
    model = randomise_sites(tower())
    depth, values = ar.depth_attention(model, embeddings()), ar.log_dict(model, embeddings())
    entropies, largest = [], []
    for row, (site, weights) in enumerate(zip(depth.sites, depth.weights, strict=True)):
        own = [weight for weight in weights.tolist() if not math.isnan(weight)]
        entropies.append(-sum(weight * math.log(weight) for weight in own))
        largest.append(max(own))
        assert values[f"attnres/weight_entropy/{row:03d}.{site}"] == pytest.approx(entropies[-1], rel=1e-5)
        assert values[f"attnres/largest_weight/{row:03d}.{site}"] == pytest.approx(max(own), rel=1e-6)
    assert len(set(entropies)) == SITES
    assert values["attnres/total/weight_entropy"] == pytest.approx(sum(entropies) / SITES, rel=1e-5)
    assert values["attnres/total/largest_weight"] == pytest.approx(sum(largest) / SITES, rel=1e-5)
    assert len(values) == 4 * SITES + 4


def test_without_gains_there_is_no_drift() -> None:
    assert [name for name in ar.log_dict(tower(key_gain=False)) if "gain" in name] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_in_every_dtype(dtype: torch.dtype) -> None:
    model = randomise_sites(tower()).to(dtype)
    # The squares of this one are infinite in float16.
    model.attn_res[0].query.data.fill_(1000.0)
    queries, gains = site_parameters(model)
    values = ar.log_dict(model)
    assert values["attnres/total/query_norm"] == pytest.approx(torch.cat(queries).double().norm().item(), rel=1e-6)
    drift = (torch.cat(gains).double() - 1).square().mean().sqrt().item()
    assert values["attnres/total/gain_drift"] == pytest.approx(drift, rel=1e-6)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Tower(2), Tower(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).sum() + self.second(x)


def test_several_owners() -> None:
    model = randomise_sites(ar.rewrite(TwoTowers(), 2, example_inputs=embeddings(), backend="eager"))
    values = ar.log_dict(model, embeddings())
    norms = [name.rpartition("/")[2] for name in values if name.startswith("attnres/query_norm/")]
    assert norms == [f"first.{i:03d}" for i in range(4)] + [f"second.{i:03d}" for i in range(6)]
    query = model.second.attn_res[5].query
    assert values["attnres/query_norm/second.005"] == pytest.approx(query.norm().item(), rel=1e-6)
    readers = {name.split(".")[1] for name in values if name.startswith("attnres/weight_entropy/")}
    assert readers == {"first", "second"}
    assert len(values) == 4 * 10 + 4


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_sharded_parameters_count_whole() -> None:
    model = randomise_sites(tower())
    expected = ar.log_dict(model)
    mesh = init_device_mesh("cpu", (1,))
    for i, site in enumerate(model.attn_res):
        for name, parameter in list(site.named_parameters()):
            placement = Shard(0) if i % 2 else Replicate()
            setattr(site, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [placement])))
    assert isinstance(model.attn_res[1].query, DTensor)
    assert ar.log_dict(model) == pytest.approx(expected, rel=1e-6)


def test_a_plain_model_is_an_error() -> None:
    with pytest.raises(ar.AttnResError, match="log_dict: this Tower was not rewritten"):
        ar.log_dict(Tower(2))


def test_what_an_optimizer_decays() -> None:
    model = tower()
    attnres = dict(ar.attnres_parameters(model))
    others = [parameter for name, parameter in model.named_parameters() if name not in attnres]
    make = torch.optim.AdamW
    assert decayed_parameters(model, make(model.parameters(), lr=0.1, weight_decay=0.0)) == []
    assert decayed_parameters(model, make(model.parameters(), lr=0.1, weight_decay=0.1)) == list(attnres)
    groups = [{"params": others, "weight_decay": 0.1}, {"params": list(attnres.values()), "weight_decay": 0.0}]
    assert decayed_parameters(model, make(groups, lr=0.1)) == []
    groups = [{"params": others}, {"params": [attnres["attn_res.1.gain"]], "weight_decay": 0.1}]
    assert decayed_parameters(model, make(groups, lr=0.1, weight_decay=0.0)) == ["attn_res.1.gain"]


def test_nothing_of_the_model_changes() -> None:
    model = randomise_sites(tower())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ar.log_dict(model, {"x": embeddings()})
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_token_ids_are_inputs_too() -> None:
    """A mapping, a tuple and a tensor are the same call."""
    model = randomise_sites(tower())
    values = ar.log_dict(model, embeddings())
    assert ar.log_dict(model, (embeddings(),)) == values
    with pytest.raises(ar.ExampleInputsError, match="example_inputs is a list"):
        ar.log_dict(model, [token_ids()])
