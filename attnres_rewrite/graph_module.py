"""The rewrite of a plain ``torch.fx.GraphModule``, from whatever tracer."""

from __future__ import annotations

import copy

from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.capture import ExampleInputs, example_call
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import ExampleInputsError
from attnres_rewrite.graph import GraphBuilder, op_name, source_line, tensor_of, value_of
from attnres_rewrite.live import AttnResSite
from attnres_rewrite.passes import SiteParameters
from attnres_rewrite.pipeline import analyse, insert
from attnres_rewrite.streams import StreamPlan


def rewrite_graph_module(
    module: GraphModule, config: AttnResConfig, example_inputs: ExampleInputs | None
) -> GraphModule:
    """A new graph module with Block AttnRes, which shares the weights of ``module``; that is not changed.

    Raises:
        ExampleInputsError: The graph has no metadata, and the example inputs are missing or do not fit.
        UnsupportedResidualError, NoResidualStreamError, BlockPartitionError: As in ``rewrite``.
    """
    module = with_metadata(module, example_inputs)
    analysis = analyse(module, config)
    counts: dict[str, int] = {}

    def parameters(plan: StreamPlan) -> list[SiteParameters]:
        owner = plan.stream.owner
        first = counts.get(owner, 0)
        counts[owner] = first + len(plan.stream.branches)
        return [_site(module, plan, i, config) for i in range(first, counts[owner])]

    insert(module, analysis.plans, parameters, config)
    return module


def with_metadata(module: GraphModule, example_inputs: ExampleInputs | None) -> GraphModule:
    """A copy of ``module`` over the same weights, whose nodes all carry fake values."""
    new = GraphModule(module, copy.deepcopy(module.graph), class_name=type(module).__name__)
    new.meta.update(module.meta)
    for name, submodule in module.named_children():
        # Submodules that only higher-order operators refer to are not copied by the constructor.
        if not hasattr(new, name):
            new.add_module(name, submodule)
    new.train(module.training)
    if example_inputs is None:
        if any(n.op == "call_function" and value_of(n) is None for n in new.graph.nodes):
            raise ExampleInputsError(
                "the nodes of this GraphModule carry no shapes (meta['val'] or meta['example_value']): pass "
                "example_inputs that it runs on"
            )
        return new
    call = example_call(module, example_inputs)
    names = [n.target for n in new.graph.nodes if n.op == "placeholder"]
    missing = set(call.kwargs) - set(names)
    if missing:
        raise ExampleInputsError(f"the GraphModule takes {names}, not {sorted(missing)}")
    arguments = [*call.args, *(call.kwargs[name] for name in names[len(call.args) :] if name in call.kwargs)]
    _propagate(new, arguments)
    return new


def _propagate(module: GraphModule, arguments: list[object]) -> None:
    """Fill in ``meta['val']`` by running the graph on fake tensors."""

    class Propagation(_compat.FakeTensorProp):  # type: ignore[misc, name-defined]
        def run_node(self, node: Node) -> object:
            try:
                return super().run_node(node)
            except Exception as error:
                text = str(error).splitlines()[0]
                raise ExampleInputsError(
                    f"the GraphModule does not run on the example inputs: at node {node.name} ({op_name(node)}), "
                    f"{source_line(node)}: {text}"
                ) from error

    try:
        Propagation(module).propagate(*arguments)
    except ExampleInputsError:
        raise
    except Exception as error:
        raise ExampleInputsError(f"the GraphModule does not run on the example inputs: {error}") from error


def _site(module: GraphModule, plan: StreamPlan, index: int, config: AttnResConfig) -> SiteParameters:
    root = tensor_of(plan.stream.root)
    assert root is not None
    owner = plan.stream.owner
    path = f"{owner}.attn_res.{index}" if owner else f"attn_res.{index}"
    site = AttnResSite(plan.stream.width, gain=config.key_gain, device=root.device, dtype=root.dtype)
    module.add_submodule(path, site)
    first = next(n for n in module.graph.nodes if n.op != "placeholder")
    build = GraphBuilder(module)
    with module.graph.inserting_before(first):
        query = build.attribute(f"{path}.query", site.query, fake_like=plan.stream.root)
        gain = None
        if site.gain is not None:
            gain = build.attribute(f"{path}.gain", site.gain, fake_like=plan.stream.root)
    return SiteParameters(query, gain)


