"""The rewrite of an ``ExportedProgram``: a new program with the site parameters in its signature."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import GraphBreakError
from attnres_rewrite.forms.fixed_by_export import tell_what_export_fixed
from attnres_rewrite.graph.nodes import require_tensor
from attnres_rewrite.passes import InlineRegions, Site, SiteParameters
from attnres_rewrite.passes.reads_without_norm import tell_reads_without_norm
from attnres_rewrite.pipeline import analyse, insert
from attnres_rewrite.streams import ResidualStream, StreamPlan

_logger = logging.getLogger(__name__)


def rewrite_exported(
    program: ExportedProgram, config: AttnResConfig, recorded: Mapping[str, Sequence[Sequence[int]]] | None = None
) -> ExportedProgram:
    """A new program with Block AttnRes; ``program`` is not changed.

    Parameters that are in the program already under the right names (as in the export of a rewritten
    module with AttnRes disabled) are taken; otherwise new ones are added, with query zero and gain one.

    Args:
        program: What to rewrite.
        config: How.
        recorded: For the streams of a model that was rewritten before, by owner and in graph order: the number of
            branch outputs in every block. Without it the layers are grouped as ``config`` says.

    Raises:
        UnsupportedResidualError, NoResidualStreamError, BlockPartitionError: As in ``rewrite``.
        GraphBreakError: A recorded stream has another number of branch outputs in ``program``.
    """
    module = GraphModule(program.graph_module, _compat.copy_graph(program.graph))
    module.meta.update(program.graph_module.meta)
    plans = analyse([module], config).plans
    if recorded is not None:
        plans = _recorded([plan.stream for plan in plans], recorded)
    binder = _Binder(program, module, config)
    sites = [insert(module, plan, binder.parameters(plan), config) for plan in plans]
    if recorded is None:
        tell_reads_without_norm([site for inserted in sites for site in inserted], config)
        tell_what_export_fixed(program)
    calls = _module_calls(program, module, plans, sites)
    module, signature = _compat.outline_modes(module, binder.signature())
    return _with_graph(program, module, signature, binder.state, calls)


def flattened(program: ExportedProgram) -> ExportedProgram:
    """``program`` as one graph for inference, in which every site can be seen; the same object if it is one already.

    Parts of it may have run without gradients, which makes no difference to the values, or under autocast, which does.
    """
    module = GraphModule(program.graph_module, _compat.copy_graph(program.graph))
    if not InlineRegions()(module):
        return program
    for node in [node for node in module.graph.nodes if _compat.sets_grad_enabled(node) is not None]:
        module.graph.erase_node(node)
    module.recompile()
    signature = _signature(program, program.graph_signature.input_specs, module)
    return _with_graph(program, module, signature, program.state_dict, program.module_call_graph)


def _with_graph(
    program: ExportedProgram,
    module: GraphModule,
    signature: ExportGraphSignature,
    state: dict[str, Any],
    calls: list[ModuleCallEntry],
) -> ExportedProgram:
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=dict(program.range_constraints),
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )


def _signature(program: ExportedProgram, inputs: Sequence[InputSpec], module: GraphModule) -> ExportGraphSignature:
    """The signature of ``program`` with these inputs, and with outputs under their names in ``module``."""
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    specs = []
    for spec, node in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if isinstance(spec.arg, TensorArgument) and isinstance(node, Node):
            spec = dataclasses.replace(spec, arg=TensorArgument(node.name))
        specs.append(spec)
    return ExportGraphSignature(input_specs=list(inputs), output_specs=specs)


def _recorded(
    streams: Sequence[ResidualStream], recorded: Mapping[str, Sequence[Sequence[int]]]
) -> tuple[StreamPlan, ...]:
    found = {owner: [s for s in streams if s.owner == owner] for owner in recorded}
    for owner, blocks in recorded.items():
        counts, expected = [len(s.branches) for s in found[owner]], [sum(sizes) for sizes in blocks]
        if counts != expected:
            raise GraphBreakError(
                f"module {owner or '(root)'!r} was rewritten with {expected} AttnRes sites, but its program has "
                f"{counts} branch outputs: export it with the arguments that it was rewritten with"
            )
    sizes = {owner: iter(blocks) for owner, blocks in recorded.items()}
    return tuple(StreamPlan.recorded(stream, next(sizes[stream.owner])) for stream in streams)


def _module_calls(
    program: ExportedProgram, module: GraphModule, plans: Sequence[StreamPlan], sites: Sequence[Sequence[Site]]
) -> list[ModuleCallEntry]:
    """The module calls of ``program``; signatures that export was asked to preserve refer to the new graph.

    Where a module took or returned a stream value, it now takes or returns what is read in its place. A module that
    runs a part of a stream cannot keep its signature: the sums of the blocks go in and out of it too.
    """
    names = {node.name: node.name for node in module.graph.nodes}
    split: set[str] = set()
    for plan, inserted in zip(plans, sites, strict=True):
        branches = plan.stream.branches
        names |= {branch.value.name: site.read.name for branch, site in zip(branches, inserted, strict=True)}
        calls = [_calls(node) for branch in branches for node in (branch.value, *(s.node for s in branch.steps))]
        split |= set[str]().union(*calls) - calls[0].intersection(*calls)
    entries = []
    for entry in program.module_call_graph:
        if (signature := entry.signature) is not None:
            # Constants have no name.
            named = {a.name for a in (*signature.inputs, *signature.outputs) if a.name}
            kept = entry.fqn not in split and named <= names.keys()
            signature = _renamed(signature, names) if kept else None
            if not kept:
                _logger.warning("module call signature of %r not preserved: a residual stream runs in it", entry.fqn)
        entries.append(dataclasses.replace(entry, signature=signature))
    return entries


def _renamed(signature: ModuleCallSignature, names: dict[str, str]) -> ModuleCallSignature:
    inputs, outputs = (
        [dataclasses.replace(argument, name=names.get(argument.name, argument.name)) for argument in arguments]
        for arguments in (signature.inputs, signature.outputs)
    )
    return dataclasses.replace(signature, inputs=inputs, outputs=outputs)


def _calls(node: Node) -> set[str]:
    """The module calls in which ``node`` ran, named as in a module call graph: ``layers.0``, then ``layers.0@1``."""
    stack = node.meta.get("nn_module_stack") or {}
    return {path + "".join(key.partition("@")[1:]) for key, (path, _) in stack.items()}


class _Binder:
    """Finds or makes the placeholders of the site parameters and keeps the program's signature."""

    def __init__(self, program: ExportedProgram, module: GraphModule, config: AttnResConfig) -> None:
        self.program, self.module, self.config = program, module, config
        self.state = dict(program.state_dict)
        # Copies: a pass over the new program may rename what a specification refers to.
        self.specs = [
            dataclasses.replace(spec, arg=dataclasses.replace(spec.arg)) for spec in program.graph_signature.input_specs
        ]
        self.placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._sites: dict[str, int] = {}
        self._by_name = {spec.target: n for spec, n in zip(self.specs, self.placeholders, strict=True)}
        self._parameters = sum(spec.kind == InputKind.PARAMETER for spec in self.specs)

    def parameters(self, plan: StreamPlan) -> list[SiteParameters]:
        """One entry a site of ``plan``; streams of one owner number their sites on."""
        owner = plan.stream.owner
        prefix = f"{owner}.attn_res" if owner else "attn_res"
        first = self._sites.get(owner, 0)
        self._sites[owner] = first + len(plan.stream.branches)
        root = require_tensor(plan.stream.root)
        width = int(root.shape[-1])
        made = []
        for i in range(first, self._sites[owner]):
            query = self._bind(f"{prefix}.{i}.query", root, width, 0.0)
            gain = self._bind(f"{prefix}.{i}.gain", root, width, 1.0) if self.config.key_gain else None
            gate = self._bind(f"{prefix}.{i}.gate", root, 1, 0.0) if self.config.gate else None
            made.append(SiteParameters(query, gain, gate))
        return made

    def _bind(self, name: str, root: torch.Tensor, width: int, start: float) -> Node:
        if name in self._by_name:
            return cast(Node, self._by_name[name])
        self.state[name] = torch.nn.Parameter(torch.full((width,), start, dtype=root.dtype, device=root.device))
        position, self._parameters = self._parameters, self._parameters + 1
        with self.module.graph.inserting_before(self.placeholders[position]):
            node = self.module.graph.placeholder("p_" + re.sub(r"\W", "_", name))
        with root.fake_mode:  # type: ignore[attr-defined]
            node.meta["val"] = torch.nn.Parameter(torch.empty(width, dtype=root.dtype, device=root.device))
        self.placeholders.insert(position, node)
        self.specs.insert(position, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name))
        return node

    def signature(self) -> ExportGraphSignature:
        """The program's signature with the new inputs, and outputs under their present names."""
        return _signature(self.program, self.specs, self.module)
