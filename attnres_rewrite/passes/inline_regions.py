"""Pass 1: the bodies of regions, of checkpoints and of modes, become part of one flat graph."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.passes.base import Pass, PostconditionError


class InlineRegions(Pass):
    """Inline every region that merely runs its body, so that a stream that runs through regions is one chain.

    ::

        x ─► tag_activation_checkpoint(wrap_body_0, x, ...) ─► getitem
                                       │
                                       └ x ─► norm ─► f ─► (+)

    becomes the body's nodes in place. What the region says of its body is kept. Each node of a checkpoint is tagged as
    the higher-order operator would have tagged it (prefer to recompute; one region id), so the partitioner saves the
    same activations. A part of an exported program that runs without gradients, or under autocast, gets nodes around it
    that set the mode, as the graph had them before export made a region of it. Retired when regions come as tags on a
    flat graph.
    """

    def call(self, module: GraphModule) -> int:
        """Inline all regions of ``module`` in place; returns how many there were."""
        count = 0
        while regions := [n for n in module.graph.nodes if _compat.is_region(n)]:
            for region in regions:
                count += 1
                _inline(module, region, region_id=count)
        if count:
            module.delete_all_unused_submodules()
            module.graph.lint()
            module.recompile()
        return count

    def ensures(self, module: GraphModule, result: int) -> None:
        """No region is left."""
        if any(_compat.is_region(n) for n in module.graph.nodes):
            raise PostconditionError("a region is left in the graph")


def _inline(module: GraphModule, region: Node, region_id: int) -> None:
    # What stands before the body sets a mode; a checkpoint has nothing there.
    position = next(i for i, argument in enumerate(region.args) if isinstance(argument, Node))
    body_attribute, *arguments = region.args[position:]
    assert isinstance(body_attribute, Node), "the body is an attribute of the graph module"
    body = module.get_submodule(str(body_attribute.target))
    assert isinstance(body, GraphModule)
    copies: dict[Node, Node] = {}
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    for placeholder, argument in zip(placeholders, arguments, strict=True):
        assert isinstance(argument, Node)
        copies[placeholder] = argument
    tags = _compat.recompute_tags(region_id) if _compat.is_checkpoint(region) else {}
    with module.graph.inserting_before(region):
        leave = _compat.enter_mode(region)
        outputs = module.graph.graph_copy(body.graph, copies)
        leave()
    for original, copy in copies.items():
        if original.op == "get_attr":
            _adopt_attribute(module, body, copy, region_id)
        if original.op != "placeholder":
            copy.meta.update(tags)
    for user in list(region.users):
        # Tracers always unpack the tuple that a region returns.
        value = outputs[user.args[1]]  # type: ignore[index]
        assert isinstance(value, Node)
        user.replace_all_uses_with(value)
        module.graph.erase_node(user)
    module.graph.erase_node(region)
    if not body_attribute.users:
        module.graph.erase_node(body_attribute)


def _adopt_attribute(module: GraphModule, body: GraphModule, copy: Node, region_id: int) -> None:
    name = f"region_{region_id}_{copy.name}"
    value = body
    for part in str(copy.target).split("."):
        value = getattr(value, part)
    setattr(module, name, value)
    copy.target = name
