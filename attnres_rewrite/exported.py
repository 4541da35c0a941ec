"""The rewrite of an ``ExportedProgram``: a new program with the site parameters in its signature."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.graph import require_tensor
from attnres_rewrite.passes import SiteParameters
from attnres_rewrite.pipeline import analyse, insert
from attnres_rewrite.streams import StreamPlan


def rewrite_exported(program: ExportedProgram, config: AttnResConfig) -> ExportedProgram:
    """A new program with Block AttnRes; ``program`` is not changed.

    Parameters that are in the program already under the right names (as in the export of a rewritten
    module with AttnRes disabled) are taken; otherwise new ones are added, with query zero and gain one.

    Raises:
        UnsupportedResidualError, NoResidualStreamError, BlockPartitionError: As in ``rewrite``.
    """
    module = GraphModule(program.graph_module, _compat.copy_graph(program.graph))
    module.meta.update(program.graph_module.meta)
    analysis = analyse([module], config)
    binder = _Binder(program, module, config)
    insert(module, analysis.plans, binder.parameters, config)
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=binder.signature(),
        state_dict=binder.state,
        range_constraints=dict(program.range_constraints),
        module_call_graph=list(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


class _Binder:
    """Finds or makes the placeholders of the site parameters and keeps the program's signature."""

    def __init__(self, program: ExportedProgram, module: GraphModule, config: AttnResConfig) -> None:
        self.program, self.module, self.config = program, module, config
        self.state = dict(program.state_dict)
        self.specs = list(program.graph_signature.input_specs)
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
        made = []
        for i in range(first, self._sites[owner]):
            query = self._bind(f"{prefix}.{i}.query", root, 0.0)
            gain = self._bind(f"{prefix}.{i}.gain", root, 1.0) if self.config.key_gain else None
            made.append(SiteParameters(query, gain))
        return made

    def _bind(self, name: str, root: torch.Tensor, start: float) -> Node:
        if name in self._by_name:
            return cast(Node, self._by_name[name])
        width = int(root.shape[-1])
        self.state[name] = torch.nn.Parameter(torch.full((width,), start, dtype=root.dtype, device=root.device))
        position, self._parameters = self._parameters, self._parameters + 1
        with self.module.graph.inserting_before(self.placeholders[position]):
            node = self.module.graph.placeholder("p_" + name.replace(".", "_"))
        with root.fake_mode:  # type: ignore[attr-defined]
            node.meta["val"] = torch.nn.Parameter(torch.empty(width, dtype=root.dtype, device=root.device))
        self.placeholders.insert(position, node)
        self.specs.insert(position, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name))
        return node

    def signature(self) -> torch.export.ExportGraphSignature:
        """The program's signature with the new inputs, and outputs under their present names."""
        output = next(n for n in reversed(self.module.graph.nodes) if n.op == "output")
        specs = []
        for spec, node in zip(self.program.graph_signature.output_specs, output.args[0], strict=True):
            if isinstance(spec.arg, TensorArgument) and isinstance(node, Node):
                spec = dataclasses.replace(spec, arg=TensorArgument(node.name))
            specs.append(spec)
        return torch.export.ExportGraphSignature(input_specs=self.specs, output_specs=specs)
