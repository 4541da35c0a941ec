"""Several processes: each way to share a model or its data has the gradients of one process, or is refused."""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launched import launch
from models import Tower, chain_of, embeddings, randomise_sites, relative_error
from torch import nn

import attnres_rewrite as ar

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

CASES = Path(__file__).with_name("distributed_cases.py")
SECONDS = 240
# 37 of them; 4 sites with a query and a gain.
SITES = [f"body.attn_res.{i}.{part}" for i in range(4) for part in ("query", "gain")]


@functools.cache
def outcomes(group: str) -> dict[str, Any]:
    """What two processes say of the cases of a group."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        # Longer than the processes give themselves, which end with a traceback.
        done = launch(CASES, group, file, SECONDS, seconds=SECONDS + 60)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def require_equal(group: str, case: str) -> None:
    """The gradients of all parameters, queries and gains among them, are those of one process, in float64."""
    found = outcomes(group)[case]
    assert "gradients" in found, found
    assert set(SITES) < found["gradients"].keys()
    assert max(found["gradients"].values()) < 1e-12, found


def require_refused(group: str, case: str, error: str, *words: str) -> None:
    found = outcomes(group)[case]
    assert found.get("error") == error, found
    for word in words:
        assert word in found["message"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["defaults", "static graph", "unused parameters", "no_sync", "around whole"])
def test_distributed_data_parallel(case) -> None:
    """Over a model of several buckets, at which Dynamo splits a graph by default."""
    require_equal("data_parallel", case)


@pytest.mark.slow
def test_a_compilation_around_data_parallel_that_splits_the_stream() -> None:
    require_refused("data_parallel", "around splits", "GraphBreakError", "optimize_ddp = False")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rewritten inside", "rewritten inside, compiled around", "rewritten around"])
def test_data_parallel_that_was_there_before_the_sites(case) -> None:
    require_refused("data_parallel", case, "UnsupportedResidualError", "Rewrite first, then wrap")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["root", "root, aot_eager"])
def test_fully_shard_of_the_root(case) -> None:
    require_equal("sharded", case)


@pytest.mark.slow
def test_fully_shard_of_every_layer_of_an_unflattened_program() -> None:
    require_equal("sharded", "program")


@pytest.mark.slow
def test_weights_gathered_in_the_graph() -> None:
    require_equal("sharded", "gathered in the graph")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["layers", "layers, warm"])
def test_fully_shard_of_the_layers_of_a_live_model(case) -> None:
    require_refused("sharded", case, "GraphBreakError", "'body.layers.0' is sharded by FSDP", "fsdp_per_layer.py")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rewritten after", "part rewritten after", "gathered before"])
def test_a_model_that_was_sharded_before(case) -> None:
    require_refused("sharded", case, "UnsupportedResidualError", "ewrite first, then shard")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["FSDP1", "FSDP1, original parameters", "FSDP1, warm", "FSDP1 before"])
def test_fsdp1_is_refused_by_name(case) -> None:
    require_refused("sharded", case, "UnsupportedResidualError", "FSDP1", "fully_shard(model)")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sequence", "sequence, aot_eager", "sequence, before"])
def test_sequence_parallel(case) -> None:
    require_equal("tensor", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tensor", "tensor, before"])
def test_tensor_parallel(case) -> None:
    require_equal("tensor", case)


@pytest.mark.slow
def test_a_stream_whose_placements_contradict_one_another() -> None:
    require_refused("tensor", "contradicting", "UnsupportedResidualError", "place all of it alike", "Shard(dim=1)")


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_a_wrapper_that_was_there_before_is_refused_and_nothing_changed() -> None:
    model, x = Tower(2), embeddings()
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ar.UnsupportedResidualError, match=r"Rewrite first, then wrap"):
        ar.rewrite(wrapped, 2, example_inputs=x, backend="eager")
    assert not list(ar.attnres_parameters(model))
    # What is wrapped does not tell, so that the first call does.
    randomise_sites(ar.rewrite(wrapped.module, 2, example_inputs=x, backend="eager"))
    for _ in range(2):
        with pytest.raises(ar.UnsupportedResidualError, match=r"does not know the parameters of attn_res"):
            wrapped(x)
    again = nn.parallel.DistributedDataParallel(model)
    assert relative_error(again(x), model(x)) < 1e-6


def test_a_pipeline_of_one_stage_where_two_were_asked_for() -> None:
    from torch.distributed.pipelining import SplitPoint, pipeline

    model, x = Tower(2), embeddings()
    program = ar.rewrite(torch.export.export(model, (x,)), 2)
    split = {"layers.1": SplitPoint.BEGINNING}
    with pytest.raises(RuntimeError) as caught:
        pipeline(program.module(), (x,), split_spec=split)
    (error,) = (e for e in chain_of(caught.value) if isinstance(e, ar.UnsupportedResidualError))
    assert "torch.export.unflatten(program)" in str(error)
    modules = randomise_sites(torch.export.unflatten(program))
    expected = modules(x)
    stages = pipeline(modules, (x,), split_spec=split)
    assert stages.num_stages == 2
    (actual,) = stages(x)
    assert relative_error(actual, expected) < 1e-6
