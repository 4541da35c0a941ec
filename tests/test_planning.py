"""What a plan says of many processes is what one process counts, and what the paper says of its own configuration."""

import json
import operator

import pytest
import torch
from models import Tower, embeddings, llama, prepared

import attnres_rewrite as ar
from attnres_rewrite.distributed import plan
from attnres_rewrite.distributed.model_size import ModelSize, Parameters

transformers = pytest.importorskip("transformers")

TOKENS = 128 * 1024
# The paper's, section 4.2: 128K tokens and 8 blocks in bfloat16 are 15 GB at this width.
PAPER = ModelSize(layers=64, width=7168)


@pytest.mark.parametrize(
    ("options", "gigabytes"),
    [
        ({}, 15.0),
        ({"mesh": {"tp": 8}, "sequence_sharded": True}, 1.9),
        ({"mesh": {"tp": 8}}, 15.0),
        ({"mesh": {"cp": 8}}, 1.9),
        ({"mesh": {"tp": 8}, "sequence_sharded": True, "chunk": 16 * 1024}, 0.2),
    ],
)
def test_block_sums_of_a_prefill_are_those_of_the_paper(options, gigabytes) -> None:
    assert round(plan(PAPER, blocks=8, **options).block_sum_bytes / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    ("sizes", "billions"),
    [
        ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 6.7),
        ({"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}, 13.0),
        (
            {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
            69.0,
        ),
    ],
)
def test_models_of_many_billions(sizes, billions) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32000, num_key_value_heads=8 if sizes["num_hidden_layers"] == 80 else None, **sizes
    )
    alone = plan(config)
    (rank,) = alone.ranks
    assert rank.parameters - rank.site_parameters == pytest.approx(billions * 1e9, rel=0.01)
    # A query and a gain for each of two sublayers a layer.
    assert rank.site_parameters == 4 * config.num_hidden_layers * config.hidden_size
    many = plan(config, {"fsdp": 4, "tp": 4, "pp": 4, "dp": 2})
    assert sum(one.parameters for one in many.ranks) * 16 == pytest.approx(rank.parameters, rel=0.001)
    assert sum(one.site_parameters for one in many.ranks) * 4 == rank.site_parameters


def test_93_layers_of_experts() -> None:
    config = transformers.DeepseekV3Config(num_hidden_layers=93, hidden_size=7168)
    options = {"config": ar.AttnResConfig(layers_per_block=12), "virtual_stages": 2}
    found = plan(config, {"tp": 8, "ep": 4, "pp": 8}, sequence_sharded=True, **options)
    assert found.blocks == (12, 12, 12, 12, 12, 12, 12, 9)
    assert [rank.layers for rank in found.ranks] == [12, 12, 12, 12, 12, 11, 11, 11]
    assert [rank.block_sums for rank in found.ranks] == [5, 5, 6, 6, 7, 7, 8, 8]
    assert found.block_sum_bytes == 8 * 7168 * 2 * TOKENS // 8
    assert found.size.layer.experts > 0.9 * found.size.layer.total
    whole = plan(config, **options | {"virtual_stages": 1}).ranks[0].parameters
    # Vectors are whole in each, experts are shared by all.
    assert whole / 8 > sum(rank.parameters for rank in found.ranks) > whole / 32


@pytest.mark.parametrize(("ranks", "virtual", "blocks"), [(4, 1, 4), (4, 2, 8), (4, 4, 32), (2, 3, 12), (8, 2, 16)])
def test_a_block_sum_crosses_to_a_rank_once(ranks, virtual, blocks) -> None:
    """With as many whole blocks in every stage; counted from the start, and for the paper's worst transition."""
    stages, width = ranks * virtual, 64
    found = plan(ModelSize(2 * blocks, width), {"pp": ranks}, blocks, virtual_stages=virtual, dtype=torch.float32)
    one, in_a_stage = 4 * width, blocks // stages
    naive = [1 + stage * in_a_stage for stage in range(1, stages)]
    # The embedding and what came since the rank's own stage, or since the start.
    cached = [n if stage < ranks else (ranks - 1) * in_a_stage for stage, n in enumerate(naive, start=1)]
    assert [t.naive // one for t in found.transitions] == naive
    assert [t.cached // one for t in found.transitions] == cached
    assert {t.plain for t in found.transitions} == {one}
    assert found.sent_more == {
        "naive": (sum(naive) - stages + 1) * one,
        "cached": (sum(cached) - stages + 1) * one,
    }
    # O(P) in place of O(P·V).
    assert max(cached) <= 1 + ranks * in_a_stage


def test_a_block_that_goes_on_crosses_as_a_running_sum() -> None:
    found = plan(ModelSize(6, 1), {"pp": 3}, [3, 3], dtype=torch.int8)
    assert [(t.naive, t.cached) for t in found.transitions] == [(2, 2), (3, 3)]
    whole = plan(ModelSize(4, 1), {"pp": 2}, 2, virtual_stages=2, dtype=torch.int8)
    assert [(t.source, t.target, t.naive, t.cached) for t in whole.transitions] == [
        (0, 1, 2, 2),
        (1, 0, 2, 1),
        (0, 1, 3, 1),
    ]


def test_one_rank_sends_nothing() -> None:
    found = plan(ModelSize(8, 16), blocks=4, virtual_stages=4)
    assert found.sent_more == {"naive": 0, "cached": 0}
    assert len(found.transitions) == 3


def test_a_rewritten_model_has_what_was_planned() -> None:
    model, blocks = prepared(llama(3)), [1, 2]
    planned, report = plan(model, blocks=blocks), ar.explain(model, blocks)
    ar.rewrite(model, blocks, backend="eager")
    found = plan(model)
    assert (found.blocks, found.ranks) == (planned.blocks, planned.ranks)
    (rank,) = found.ranks
    assert rank.parameters == sum(p.numel() for p in model.parameters())
    assert rank.site_parameters == sum(p.numel() for _, p in ar.attnres_parameters(model))
    # The last source of a read is the running sum.
    assert rank.block_sums == max(len(site.sources) for site in report.streams[0].sites) - 1
    assert found.memory_traffic["plain"] == 3 * 6 * model.config.hidden_size * 2


def test_stages_of_a_pipeline_get_what_was_planned() -> None:
    """PyTorch's split sends one value more: the result of the next read, which is computed before the border."""
    from torch.distributed.pipelining import SplitPoint, pipeline

    x = embeddings()
    program = ar.rewrite(torch.export.export(prepared(Tower(4)), (x,)), [1, 3])
    split = {f"layers.{i}": SplitPoint.BEGINNING for i in (1, 2, 3)}
    graph = pipeline(torch.export.unflatten(program), (x,), split_spec=split).split_gm.graph
    calls = [node for node in graph.nodes if node.op == "call_module"]
    found = plan(ModelSize(4, x.shape[-1]), {"pp": 4}, [1, 3], dtype=x.dtype)
    one = x.shape[-1] * x.element_size()
    assert [t.naive // one for t in found.transitions] == [2, 3, 3]
    assert [len(call.all_input_nodes) - 1 for call in calls[1:]] == [2, 3, 3]


def test_a_plan_is_a_table_and_data() -> None:
    found = plan(ModelSize(4, 8, Parameters(1000, 10), name="Small"), {"pp": 2, "dp_shard": 2}, 2)
    text = str(found)
    assert "Small: 4 layers of width 8, blocks of [2, 2] layers" in text
    assert "mesh: fsdp 2 x pp 2" in text
    assert "0 -> 1" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["ranks"][0]["layers"] == 2
    assert data["sent_more"] == found.sent_more
    # A layer, its share of the sites (three and five) and half of nothing outside.
    assert [rank.parameters for rank in found.ranks] == [(2020 + 3 * 16) / 2, (2020 + 5 * 16) / 2]


def test_a_device_mesh() -> None:
    from torch.distributed.device_mesh import DeviceMesh

    def mesh(*names: str) -> DeviceMesh:
        ranks = torch.arange(4).reshape(2, 2)
        return DeviceMesh("cpu", ranks, mesh_dim_names=names or None, _init_backend=False, _rank=0)

    assert plan(PAPER, mesh("fsdp", "tp")).mesh == plan(PAPER, {"dp_shard": 2, "tp": 2}).mesh
    with pytest.raises(ar.MeshError, match="have no names: make it with mesh_dim_names"):
        plan(PAPER, mesh())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (PAPER, {"pp": 40}, 8),
            ar.MeshError,
            "40 pipeline ranks of 2 stages each are 80 stages, and the model has 64",
        ),
        ((PAPER, {"zz": 2}), ar.MeshError, "dimension 'zz': known are"),
        ((PAPER, {"tp": 0}), ar.MeshError, "'tp' of the mesh has 0 processes"),
        ((PAPER, 8), TypeError, "mesh is a DeviceMesh or a mapping"),
        ((PAPER, None, 65), ar.BlockPartitionError, "blocks=65"),
        ((PAPER, None, "full"), ar.BlockPartitionError, "blocks of whole layers"),
        ((torch.nn.Linear(2, 2),), ar.NoResidualStreamError, "no nn.ModuleList of layers"),
        ((torch.nn.ModuleList([torch.nn.Linear(2, 2)]),), ar.NoResidualStreamError, "no nn.ModuleList|how wide"),
        ((3,), TypeError, "not a int"),
    ],
)
def test_what_cannot_be_planned(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        plan(*arguments, virtual_stages=2)


def test_names_of_the_package() -> None:
    import attnres_rewrite.distributed as distributed

    assert operator.attrgetter("Plan")(distributed).__name__ == "Plan"
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        operator.attrgetter("plans")(distributed)
