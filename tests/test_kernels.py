"""What a site costs, by Inductor's own account: the loop nests of a training step and the elements that each moves.

Nothing is compiled to machine code here: the kernels are replaced by functions that do nothing, because how long a
compiler takes for them is no matter for what they are. One *value* is a tensor of the size of the stream.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import VOCAB, token_ids

import attnres_rewrite as ar

transformers = pytest.importorskip("transformers")
graph = pytest.importorskip("torch._inductor.graph")
async_compile = pytest.importorskip("torch._inductor.async_compile")

pytestmark = pytest.mark.slow

LAYERS, WIDTH, BATCH, LENGTH = 6, 256, 4, 32
VALUE = BATCH * LENGTH * WIDTH


def llama() -> torch.nn.Module:
    """Wide enough for one number a row to be little."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return transformers.LlamaForCausalLM(config)


@dataclasses.dataclass(frozen=True)
class Loops:
    """A loop nest: the values that it moves, whether it is a library's, and the operators that it came from."""

    values: float
    library: bool
    operators: frozenset[str]
    largest_written: float

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(name.split(".")[1] for name in self.operators if name.startswith("attnres."))


def _loops(node: Any) -> Loops:
    nodes = [part.node for part in node.get_nodes() if part.node is not None]
    origins = {str(origin.meta.get("original_aten")) for part in nodes for origin in part.origins}
    buffers = [] if node.is_extern() else node.get_outputs()
    written = [buffer.node.get_numel() for buffer in buffers]
    moved = node.get_read_write_buffers_sizes() / 4
    return Loops(moved / VALUE, node.is_extern(), frozenset(origins), max(map(int, written), default=0) / VALUE)


def counted(step: Callable[[], None]) -> tuple[list[Loops], list[Loops]]:
    """The loop nests of forward and backward that Inductor makes of a training step, which compiles its model."""
    found: list[list[Loops]] = []
    codegen = graph.GraphLowering.codegen

    def recording(self: Any) -> Any:
        code = codegen(self)
        found.append([_loops(node) for node in self.scheduler.nodes])
        return code

    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(force_disable_caches=True):
        patch.setattr(graph.GraphLowering, "codegen", recording)
        patch.setattr(async_compile.AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
        torch._dynamo.reset()
        step()
    forward, backward = found
    return forward, backward


@functools.cache
def loops_of(schedule: str | None) -> tuple[list[Loops], list[Loops]]:
    """The loop nests of forward and backward of the model, plain or under a schedule."""

    def step() -> None:
        model, ids = llama(), token_ids(BATCH, LENGTH)
        if schedule is None:
            model.compile()
        else:
            ar.rewrite(model, config=ar.AttnResConfig(blocks=3, schedule=schedule))  # type: ignore[arg-type]
        model(input_ids=ids, labels=ids).loss.backward()

    return counted(step)


# Six layers in three blocks: a block has four reads, the first of them without a partial; and there is the final read.
SOURCES = [2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]


def own(loops: list[Loops]) -> list[Loops]:
    """The loop nests that Inductor writes, without the calls of libraries."""
    return [nest for nest in loops if not nest.library]


def moved(loops: list[Loops]) -> float:
    return sum(nest.values for nest in loops)


def test_a_site_is_one_loop_nest_that_reads_every_source_once() -> None:
    plain, _ = loops_of(None)
    forward, _ = loops_of("per_read")
    # The branch add before a read, the read and the norm after it take the place of the plain add and norm.
    assert len(own(forward)) <= len(own(plain))
    sites = [nest for nest in own(forward) if nest.sites]
    # One more than there are sites: the norms of the root are found where the root is made.
    assert len(sites) == len(SOURCES) + 1
    # Every source in, the branch output in place of one of them or beside it, and what the sublayer reads out.
    assert moved(sites) <= sum(n + 1.2 for n in SOURCES) + 3


@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
def test_no_schedule_stacks_sources(schedule: str) -> None:
    forward, backward = loops_of(schedule)
    assert max(nest.largest_written for nest in own(forward + backward) if nest.sites) == 1


def test_the_backward_reads_every_source_once_a_site() -> None:
    _, plain = loops_of(None)
    _, backward = loops_of("per_read")
    # A source is read, its gradient so far is read, and the sum of the gradients is written.
    assert moved(backward) - moved(plain) <= 3 * sum(SOURCES)
