"""The anchor: how the parameters of a rewritten model reach the graph, and why a plain run is an error.

The forward of an owner calls the anchor with the site parameters before it runs its layers. In a graph
that Dynamo captures the parameters thereby are ordinary inputs, with guards and gradients; the backend
reads them off the anchor's node and deletes it. Executed by anything else, the anchor raises.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import NotRewrittenError
from attnres_rewrite.graph.nodes import is_inside, module_path
from attnres_rewrite.passes.insert_attnres import SiteParameters


@dataclasses.dataclass(frozen=True)
class AnchorSpec:
    """What an anchor says of its owner.

    Attributes:
        owner: Name of the owner module in the model that was rewritten.
        blocks: For each of its streams, in graph order, the number of branch outputs in every block. Recorded, and not
            found anew in every graph: what a graph says of the modules depends on how the model is called.
        config: The configuration of the rewrite.
        plain: Names of the owners whose streams the configuration leaves plain.
    """

    owner: str
    blocks: tuple[tuple[int, ...], ...]
    config: AttnResConfig
    plain: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[int, ...]:
        """Number of sites of each stream: one for every branch output."""
        return tuple(sum(sizes) for sizes in self.blocks)

    def to_json(self) -> str:
        """This specification as one line of JSON."""
        fields = {"owner": self.owner, "blocks": self.blocks, "plain": self.plain}
        return json.dumps({**fields, "config": self.config.to_json()})

    @classmethod
    def from_json(cls, text: str) -> AnchorSpec:
        """The specification that :meth:`to_json` wrote."""
        fields = json.loads(text)
        config = AttnResConfig.from_json(fields["config"])
        blocks = tuple(tuple(sizes) for sizes in fields["blocks"])
        return cls(fields["owner"], blocks, config, tuple(fields["plain"]))


# The token is declared as mutated so that no compiler may drop the call: a compiler that does not know
# the anchor must keep it, run it, and so fail.
@torch.library.custom_op("attnres::anchor", mutates_args=("token",))
def anchor(token: Tensor, parameters: Sequence[Tensor], spec: str) -> None:
    """Mark where the forward of an owner begins; raises :class:`NotRewrittenError` when executed."""
    raise NotRewrittenError(not_rewritten_message(AnchorSpec.from_json(spec).owner))


@anchor.register_fake
def _(token: Tensor, parameters: Sequence[Tensor], spec: str) -> None:
    # A strict export traces by Dynamo, but no backend sees its graph: an error now, not a program that is none.
    if _compat.is_exporting():
        raise NotRewrittenError(not_rewritten_message(AnchorSpec.from_json(spec).owner))


# The permission to run plain residuals is in the graph, so it is for this owner and for the calls that wanted it.
@torch.library.custom_op("attnres::plain_anchor", mutates_args=("token",))
def plain_anchor(token: Tensor, spec: str) -> None:
    """Mark where the forward of an owner begins in a call that wants plain residuals; does nothing."""


@plain_anchor.register_fake
def _(token: Tensor, spec: str) -> None:
    return None


def not_rewritten_message(owner: str) -> str:
    """What to tell someone who is about to run the owner's layers with plain residuals."""
    return (
        f"module {owner or '(root)'!r} was rewritten to Attention Residuals, which run through torch.compile with the "
        "backend of this package, but its layers are being run without it: with torch.compile switched off "
        "(TORCH_COMPILE_DISABLE=1), past Dynamo's recompile limit, with another backend, or by a tracer "
        "(torch.jit.trace, torch.export, torch.onnx.export). Call the model itself, or "
        'torch.compile(model, backend="attnres"); in a Trainer leave torch_compile out, the model compiles itself; '
        "to export, rewrite the ExportedProgram or use attnres_rewrite.export_onnx; for plain residuals on purpose, "
        "use attnres_rewrite.disabled(model)"
    )


@dataclasses.dataclass(frozen=True)
class Anchor:
    """An anchor in a captured graph.

    Attributes:
        node: Its node.
        path: Path of the owner in this graph.
        spec: What it says of the owner.
        parameters: The nodes of the site parameters, one entry a site; none where plain residuals are wanted.
        plain: Whether the call wants plain residuals.
    """

    node: Node
    path: str
    spec: AnchorSpec
    parameters: tuple[SiteParameters, ...]
    plain: bool = False

    @property
    def sites(self) -> tuple[int, ...]:
        """Number of sites of each stream of the owner."""
        return self.spec.sites

    @property
    def config(self) -> AttnResConfig:
        """The configuration of the rewrite."""
        return self.spec.config

    @property
    def plain_paths(self) -> set[str]:
        """Paths, in this graph, of the owners whose streams stay plain on purpose."""
        own, paths = self.spec.owner, set()
        for name in self.spec.plain:
            if not own:
                paths.add(f"{self.path}.{name}".strip("."))
            elif self.path == own or self.path.endswith("." + own):
                paths.add(f"{self.path.removesuffix(own)}{name}".strip("."))
            elif name.startswith(own + "."):
                # A graph of the owner alone, which names modules relative to it.
                paths.add(name.removeprefix(own + "."))
        return paths

    def owns(self, owner: str, others: Sequence[str]) -> bool:
        """Whether the stream in module ``owner`` is this anchor's, given the paths of the other anchors."""
        nearer = (other for other in others if len(other) > len(self.path))
        return is_inside(owner, self.path) and not any(is_inside(owner, other) for other in nearer)


def anchors_of(module: GraphModule) -> list[Anchor]:
    """The anchors in ``module``, in graph order."""
    read = {torch.ops.attnres.anchor.default: _read, torch.ops.attnres.plain_anchor.default: _read_plain}
    return [read[n.target](n) for n in module.graph.nodes if n.target in read]


def _read_plain(node: Node) -> Anchor:
    return Anchor(node, module_path(node), AnchorSpec.from_json(str(node.args[1])), (), plain=True)


def _read(node: Node) -> Anchor:
    _, nodes, text = node.args
    spec = AnchorSpec.from_json(str(text))
    assert isinstance(nodes, (list, tuple))
    names = ["query", *(["gain"] if spec.config.key_gain else []), *(["gate"] if spec.config.gate else [])]
    each: Any = zip(*[iter(nodes)] * len(names), strict=True)
    parameters = tuple(SiteParameters(**{"gain": None, **dict(zip(names, site, strict=True))}) for site in each)
    return Anchor(node, module_path(node), spec, parameters)
