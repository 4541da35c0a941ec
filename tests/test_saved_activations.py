"""What training keeps for the backward."""

import pytest
import torch
from models import activations_kept, llama, prepared, randomise_sites, token_ids
from torch.utils.checkpoint import CheckpointPolicy

import attnres_rewrite as ar
from attnres_rewrite.forms.saved_activations import recompute_results
from attnres_rewrite.forms.summed_gradients import keep_sums

SITE = torch.ops.attnres.merge_partial.default


def test_wide_results_of_sites_are_marked_and_nothing_else() -> None:
    graph = torch.fx.Graph()
    shapes = {"wide": (SITE, (2, 3, 8)), "scalar": (SITE, (2, 3, 1)), "other": (torch.ops.aten.add.Tensor, (2, 3, 8))}
    nodes = {name: graph.placeholder(name) for name in (*shapes, "users_own", "unknown")}
    for name, (origin, shape) in shapes.items():
        nodes[name].meta.update(original_aten=origin, val=torch.empty(shape))
    nodes["users_own"].meta.update(nodes["wide"].meta, recompute=CheckpointPolicy.MUST_SAVE)
    recompute_results(graph)
    marked = {name: node.meta.get("recompute") for name, node in nodes.items()}
    assert marked == {
        "wide": CheckpointPolicy.PREFER_RECOMPUTE,
        "scalar": None,
        "other": None,
        "users_own": CheckpointPolicy.MUST_SAVE,
        "unknown": None,
    }


def kept_by(schedule: str | None, passes: list[int]) -> int:
    """How many tensors of the size of the stream a compiled training step keeps."""
    model, ids = prepared(llama(6)), token_ids(4, 32)
    if schedule is None:
        model.compile()
    else:
        options = {"joint_custom_post_pass": lambda graph: passes.append(len(graph.nodes))}
        ar.rewrite(model, config=ar.AttnResConfig(blocks=3, schedule=schedule), options=options)  # type: ignore[arg-type]
        randomise_sites(model)
    model(input_ids=ids, labels=ids).loss.backward()
    with activations_kept(model) as kept:
        model(input_ids=ids, labels=ids)
    return sum(size == ids.numel() * 32 * 4 for size in kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
def test_training_keeps_as_many_tensors_as_the_plain_model(schedule: str) -> None:
    passes: list[int] = []
    # Three blocks beside the root; and a pass that the user gave to Inductor has run too.
    assert kept_by(schedule, passes) <= kept_by(None, passes) + 1
    assert len(passes) == 1


@pytest.mark.parametrize(("device", "contiguous", "stored"), [("meta", True, 1), ("cpu", True, 0), ("meta", False, 0)])
def test_sums_of_gradients_of_a_site_are_stored_where_they_are_not_on_a_cpu(
    device: str, contiguous: bool, stored: int
) -> None:
    graph = torch.fx.Graph()
    value = torch.empty(2, 3, 8, device=device)
    value = value if contiguous else value.transpose(0, 1)
    term, before, others = (graph.placeholder(name) for name in ("term", "before", "others"))
    gradient = graph.call_function(torch.ops.aten.as_strided.default, (term, [2, 3, 8], [24, 8, 1]))
    gradient.meta.update(original_aten=torch.ops.attnres.merge_partial_backward.default)
    total = graph.call_function(torch.ops.aten.add.Tensor, (before, gradient))
    plain = graph.call_function(torch.ops.aten.add.Tensor, (before, others))
    output = graph.output((total, plain))
    for node in graph.nodes:
        node.meta["val"] = value
    assert keep_sums(graph) == stored
    graph.lint()
    given, untouched = output.args[0]
    assert untouched is plain
    assert (given.target is torch.ops.aten.as_strided.default) == bool(stored)
    if stored:
        assert given.args == (total, [2, 3, 8], [24, 8, 1])
