"""The rewrite of a plain ``torch.fx.GraphModule``, from whatever tracer."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Call, ExampleInputs, example_call
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import ExampleInputsError
from attnres_rewrite.forms.settings import SavedSettings
from attnres_rewrite.forms.site_parameters import AttnResSite
from attnres_rewrite.graph.nodes import GraphBuilder, op_name, require_tensor, source_line, tensor_of
from attnres_rewrite.passes import SiteParameters
from attnres_rewrite.passes.reads_without_norm import tell_reads_without_norm
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
    plans, maker = analyse([module], config).plans, SiteMaker(module, config)
    sites = [site for plan in plans for site in insert(module, plan, maker.parameters(plan), config)]
    tell_reads_without_norm(sites, config)
    return module


def with_metadata(module: GraphModule, example_inputs: ExampleInputs | None) -> GraphModule:
    """A copy of ``module`` over the same weights, whose nodes all carry fake values."""
    new = GraphModule(module, _compat.copy_graph(module.graph), class_name=type(module).__name__)
    new.meta.update(module.meta)
    for name, submodule in module.named_children():
        # Submodules that only higher-order operators refer to are not copied by the constructor.
        if not hasattr(new, name):
            new.add_module(name, submodule)
    # Not by train(), which would set the submodules, and these are shared with the module that was given.
    new.training = module.training
    if example_inputs is None:
        if all(tensor_of(n) is None for n in new.graph.nodes):
            raise ExampleInputsError(
                "the nodes of this GraphModule carry no shapes (meta['val'] or meta['example_value']): pass "
                "example_inputs that it runs on"
            )
        return new
    _propagate(new, _arguments(new, example_call(module, example_inputs)))
    return new


def _arguments(module: GraphModule, call: Call) -> list[object]:
    """The values of the placeholders of ``module``, in order, in a call of it."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    names = [n.target for n in placeholders]
    unknown = set(call.kwargs) - set(names[len(call.args) :])
    if unknown or len(call.args) > len(names):
        given = sorted(unknown) or f"{len(call.args)} positional arguments"
        raise ExampleInputsError(f"the GraphModule takes {names}, not {given}")
    arguments = list(call.args)
    for node in placeholders[len(call.args) :]:
        if node.target not in call.kwargs and not node.args:
            raise ExampleInputsError(f"the GraphModule takes {names}, and {node.target!r} is missing")
        arguments.append(call.kwargs.get(node.target, *node.args))
    return arguments


def _propagate(module: GraphModule, arguments: list[object]) -> None:
    """Fill in ``meta['val']`` by running the graph on fake tensors."""

    class Propagation(_compat.FakeTensorProp):
        def run_node(self, node: Node) -> object:
            try:
                return super().run_node(node)
            except Exception as error:
                text = str(error).splitlines()[0]
                raise ExampleInputsError(
                    f"the GraphModule does not run on the example inputs: at node {node.name} "
                    f"({op_name(node) or node.target}), {source_line(node)}: {text}"
                ) from error

    try:
        Propagation(module, _compat.fake_mode()).propagate(*arguments)
    except ExampleInputsError:
        raise
    except Exception as error:
        raise ExampleInputsError(f"the GraphModule does not run on the example inputs: {error}") from error


class SiteMaker:
    """Adds sites to a graph module, as submodules and as nodes that read them before anything is computed."""

    def __init__(self, module: GraphModule, config: AttnResConfig) -> None:
        self.module, self.config = module, config
        self.build = GraphBuilder(module)
        self.first = next(n for n in module.graph.nodes if n.op != "placeholder")
        self.counts: dict[str, int] = {}
        self.settings: dict[str, SavedSettings] = {}

    def parameters(self, plan: StreamPlan) -> list[SiteParameters]:
        """One entry a site of ``plan``; streams of one owner number their sites on."""
        owner = plan.stream.owner
        if owner not in self.settings:
            self.settings[owner] = SavedSettings(owner, self.config)
            self.module.add_submodule(f"{owner}.attn_res".lstrip("."), self.settings[owner])
        self.settings[owner].add(plan.block_sizes)
        start = self.counts.get(plan.stream.owner, 0)
        self.counts[plan.stream.owner] = start + len(plan.stream.branches)
        return [self._site(plan, i) for i in range(start, self.counts[plan.stream.owner])]

    def _site(self, plan: StreamPlan, index: int) -> SiteParameters:
        root, owner = require_tensor(plan.stream.root), plan.stream.owner
        path = f"{owner}.attn_res.{index}" if owner else f"attn_res.{index}"
        which = {"gain": self.config.key_gain, "gate": self.config.gate}
        site = AttnResSite(plan.stream.width, **which, device=root.device, dtype=root.dtype)
        self.module.add_submodule(path, site)
        with self.module.graph.inserting_before(self.first):
            nodes = {
                name: self.build.attribute(f"{path}.{name}", parameter, fake_like=plan.stream.root)
                for name, parameter in site.named_parameters()
            }
        return SiteParameters(nodes["query"], nodes.get("gain"), nodes.get("gate"))
