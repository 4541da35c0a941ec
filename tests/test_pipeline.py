"""Pipelines: each schedule has the loss and the gradients of one process, and a block sum is sent to a process once."""

import functools
import inspect
import json
import tempfile
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

from torch.distributed.pipelining import PipelineStage, SplitPoint, pipeline

from attnres_rewrite.distributed.routes import Routes, routes_of

CASES = Path(__file__).with_name("pipeline_cases.py")
SECONDS = 300
# A micro-batch of one sequence of 8 tokens of 96 channels, in float64; four of them in a step.
STEP = 4 * 8 * 96 * 8
SENDS_WHAT_HAS_NO_GRADIENT = "input_grads" in inspect.signature(PipelineStage).parameters


@functools.cache
def outcomes(group: str, processes: int) -> dict[str, Any]:
    """What the processes say of the cases of a group."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        # Longer than the processes give themselves, which end with a traceback.
        done = launch(CASES, group, file, SECONDS, processes=processes, seconds=SECONDS + 60)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def on_two(case: str) -> dict[str, Any]:
    return outcomes("two", 2)[case]


def require_equal(found: dict[str, Any]) -> None:
    """The loss and the gradients of all parameters, queries and gains among them, are those of one process."""
    assert "gradients" in found, found
    assert {"loss", "body.attn_res.3.query", "body.attn_res.3.gain"} < found["gradients"].keys()
    assert max(found["gradients"].values()) < 1e-12, found
    assert found["left"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["GPipe, PyTorch's stages", "1F1B, PyTorch's stages", "GPipe", "1F1B"])
def test_two_stages(case) -> None:
    require_equal(on_two(case))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "2 a process",
        "2 a process, resent",
        "3 a process",
        "3 a process, resent",
        "cuts within blocks",
        "every sublayer a block",
        "breadth first",
        "zero bubbles",
        "zero bubbles, resent",
    ],
)
def test_several_stages_a_process(case) -> None:
    require_equal(on_two(case))


@pytest.mark.slow
def test_pytorchs_stages_have_no_backward_for_what_several_stages_read() -> None:
    """Why there are stages of ours, also without caching."""
    assert "skip connections not supported" in on_two("four of PyTorch's stages")["message"]


@pytest.mark.slow
def test_reads_that_begin_in_another_stage() -> None:
    found = on_two("two phases")
    assert found["error"] == "UnsupportedResidualError"
    assert "AttnResConfig(schedule='per_read')" in found["message"]


@pytest.mark.slow
@pytest.mark.skipif(not SENDS_WHAT_HAS_NO_GRADIENT, reason="this PyTorch sends nothing that has no gradient")
def test_llama() -> None:
    """Of Hugging Face: rotary embeddings and a mask cross too."""
    found = on_two("Llama")
    assert "gradients" in found, found
    assert {"loss", "model.attn_res.7.query", "model.attn_res.7.gain"} < found["gradients"].keys()
    assert max(found["gradients"].values()) < 1e-12, found
    assert found["left"] == 0


def tensors(sent: dict[str, int]) -> list[int]:
    """How many tensors of the stream every transition sent."""
    assert all(count % STEP == 0 for count in sent.values())
    return [sent[str(stage)] // STEP for stage in sorted(map(int, sent))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "processes", "a_process"), [("two", 2, 2), ("two", 2, 3), ("four", 4, 2)], ids=["2x2", "2x3", "4x2"]
)
def test_the_bytes_that_are_sent(group, processes, a_process) -> None:
    """Every stage is a block. What crosses is block sums, the embedding among them, and one read."""
    found = {name: outcomes(group, processes)[f"{a_process} a process{name}"] for name in ("", ", resent")}
    stages = processes * a_process
    for one in found.values():
        require_equal(one)
        assert one["forward"] == one["backward"]
        assert one["total"] == sum(one["forward"].values()) + sum(one["backward"].values())
    cached, resent = (tensors(one["forward"]) for one in found.values())
    # Resent, they grow with the stages; cached, with the processes: those of the processes between.
    assert resent == [stage + 2 for stage in range(1, stages)]
    assert cached == [stage + 2 if stage < processes else processes for stage in range(1, stages)]
    # The block sums of the largest transition: a factor of the stages of a process.
    assert max(resent) - 1 == a_process * (max(cached) - 1)


@pytest.mark.slow
def test_a_stage_for_each_of_four() -> None:
    require_equal(outcomes("four", 4)["1F1B"])


def split_tower(layers: int, processes: int | None) -> tuple[Routes, nn.Module, torch.Tensor]:
    model, x = Tower(layers), embeddings()
    modules = randomise_sites(torch.export.unflatten(ar.rewrite(torch.export.export(model, (x,)), layers)))
    split = {f"layers.{i}": SplitPoint.BEGINNING for i in range(1, layers)}
    return routes_of(pipeline(modules, (x,), split_spec=split), processes), modules, x


def test_routes() -> None:
    """Every process sees a value once, and every stage has what it needs."""
    routes, *_ = split_tower(5, 2)
    seen: list[set[str]] = [set(), set()]
    for stage, call in enumerate(routes.calls):
        incoming, own = set(routes.incoming(stage)), seen[stage % 2]
        assert not incoming & own
        assert set(routes.taken(stage)) <= own
        assert set(call.arguments) <= incoming | set(routes.taken(stage))
        own |= incoming | {name for name in call.results if name is not None}
        assert set(routes.outgoing(stage)) <= incoming | set(call.results)
    # Whoever takes something last is the last one of its process to do so.
    last = {(stage % 2, n) for stage in range(5) for n in routes.taken(stage) if routes.is_last_to_take(stage, n)}
    assert last == {(stage % 2, n) for stage in range(5) for n in routes.taken(stage)}


def test_a_cut_within_a_layer_is_refused_and_the_model_as_it_was() -> None:
    model, x = Tower(2), embeddings()
    program = ar.rewrite(torch.export.export(model, (x,)), 2)
    modules = randomise_sites(torch.export.unflatten(program))
    expected = modules(x)
    for split in ({"layers.1.second": SplitPoint.BEGINNING}, {"layers.1": SplitPoint.BEGINNING}):
        # The second time by the mark of the first, which would still cut there.
        with pytest.raises(RuntimeError) as caught:
            pipeline(modules, (x,), split_spec=split)
        (error,) = (e for e in chain_of(caught.value) if isinstance(e, ar.UnsupportedResidualError))
        assert "'layers.1.second', within the layer 'layers.1'" in str(error)
        assert "unflatten the program again" in str(error)
    assert torch.equal(modules(x), expected)
    stages = pipeline(randomise_sites(torch.export.unflatten(program)), (x,), split_spec=split)
    assert stages.num_stages == 2
    assert relative_error(stages(x)[0], expected) < 1e-6


class WithoutGradients(Tower):
    """Hugging Face's rotary embeddings are computed so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            places = torch.arange(x.shape[1], device=x.device).to(x.dtype).cos()
        return super().forward(x * places[:, None])


def test_a_part_without_gradients_is_told_and_exported_without() -> None:
    model, x = WithoutGradients(2), embeddings()
    split = {"layers.1": SplitPoint.BEGINNING}
    program = ar.rewrite(torch.export.export(model, (x,)), 2)
    with pytest.raises(RuntimeError) as caught:
        pipeline(torch.export.unflatten(program), (x,), split_spec=split)
    (error,) = (e for e in chain_of(caught.value) if isinstance(e, ar.UnsupportedResidualError))
    assert "within torch.no_grad()" in str(error)
    with torch.no_grad():
        program = ar.rewrite(torch.export.export(model, (x,)), 2)
    modules = randomise_sites(torch.export.unflatten(program))
    expected = modules(x)
    assert relative_error(pipeline(modules, (x,), split_spec=split)(x)[0], expected) < 1e-6
