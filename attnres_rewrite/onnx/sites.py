"""How the sites of an ONNX model are written: each by itself, or with what they can share.

Both start from the calls that the exporter made of the sites, in whichever schedule the program computes them, and turn
these nodes, in their places, into calls of functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attnres_rewrite.onnx.bodies import BlockAttnRes
from attnres_rewrite.onnx.form import ONNX_TYPES, Form
from attnres_rewrite.onnx.shared_bodies import AttendBlocks, MergePartial, ScaleQueries

if TYPE_CHECKING:
    from onnxscript import ir


@dataclasses.dataclass(frozen=True)
class Settings:
    """What sites have in common that share anything; for what is not told here see :class:`Form`.

    Attributes:
        eps: Of their norms.
        scale: Of their logits.
    """

    eps: float
    scale: float
    sum: bool
    gain: bool
    rank: int
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    opset_version: int
    add: bool = False
    gate: bool = False
    value_norm: bool = False

    @property
    def own(self) -> dict[str, Any]:
        """What only a site by itself can have."""
        return {"add": self.add, "gate": self.gate, "value_norm": self.value_norm}

    @property
    def form(self) -> dict[str, Any]:
        """What every form depends on."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("eps", *self.own):
            del given[name]
        scaled = given.pop("scale") != 1.0
        return {**given, "scaled": scaled}


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A site in an ONNX model.

    Attributes:
        node: The node whose one output is the read.
        sources: Its sources.
        parameters: The query and, where there are any, the gain and the gate.
        settings: What it has in common with others.
    """

    node: ir.Node
    sources: tuple[ir.Value, ...]
    parameters: tuple[ir.Value, ...]
    settings: Settings

    @property
    def name(self) -> str:
        """``<owner>.attn_res.<i>``."""
        return str(self.node.name)

    def become(self, form: Form, inputs: Sequence[ir.Value], attributes: Mapping[str, Any]) -> Form:
        """Make the node a call of ``form``."""
        from onnxscript import ir

        self.node.resize_inputs(len(inputs))
        for position, value in enumerate(inputs):
            self.node.replace_input_with(position, value)
        self.node.op_type, self.node.domain = form.name, form.domain
        self.node.attributes.clear()
        self.node.attributes.update((a.name, a) for a in ir.convenience.convert_attributes(attributes))
        return form


def write_whole(site: Site) -> Form:
    """Make ``site`` one node that does everything; returns the form of its function."""
    settings = site.settings
    form = BlockAttnRes(sources=len(site.sources), **settings.form, **settings.own)
    aggregation = "sum" if settings.sum else "add" if settings.add else "mean"
    attributes = {"eps": settings.eps, "scale": settings.scale, "aggregation": aggregation}
    return site.become(form, [*site.sources, *site.parameters], attributes)


def write_shared(sites: Sequence[Site]) -> list[Form]:
    """Make ``sites``, in the order of their nodes, share what they can; returns the forms of the functions."""
    forms: list[Form] = [write_whole(site) for site in sites if any(site.settings.own.values())]
    for root in _trees([site for site in sites if not any(site.settings.own.values())]):
        members = list(root.all_sites())
        forms += [write_whole(members[0])] if len(members) == 1 else _write_tree(root, members)
    return forms


@dataclasses.dataclass(eq=False)
class _Group:
    """The sites over the same complete blocks, and the groups that add blocks to these.

    Attributes:
        before: Number of blocks of the group that this one adds to.
        blocks: All its blocks.
        opener: The first of its sites in the model.
        sites: The sites, the ones without a partial first.
        following: The groups that add blocks to these.
    """

    before: int
    blocks: tuple[ir.Value, ...]
    opener: Site
    sites: list[Site] = dataclasses.field(default_factory=list)
    following: list[_Group] = dataclasses.field(default_factory=list)

    def all_sites(self) -> Iterator[Site]:
        """Those of this group, then those of the following ones."""
        yield from self.sites
        for group in self.following:
            yield from group.all_sites()

    def merges(self, site: Site) -> bool:
        """Whether ``site`` has a partial."""
        return len(site.sources) > len(self.blocks)


def _trees(sites: Sequence[Site]) -> list[_Group]:
    """The groups that follow no other."""
    # A source that another site has between others is complete.
    prefixes = {site.sources[:end] for site in sites for end in range(1, len(site.sources))}
    groups: dict[tuple[Settings, tuple[ir.Value, ...]], _Group] = {}
    roots: list[_Group] = []
    for site in sites:
        blocks = site.sources if site.sources in prefixes else site.sources[:-1]
        if (group := groups.get((site.settings, blocks))) is None:
            shorter = (groups.get((site.settings, blocks[:end])) for end in range(len(blocks) - 1, 0, -1))
            parent = next((found for found in shorter if found is not None), None)
            group = groups[site.settings, blocks] = _Group(len(parent.blocks) if parent else 0, blocks, site)
            (roots if parent is None else parent.following).append(group)
        group.sites.append(site)
    for group in groups.values():
        group.sites.sort(key=group.merges)
    return roots


def _write_tree(root: _Group, sites: Sequence[Site]) -> list[Form]:
    """Write the groups of a tree; ``sites`` are all of theirs, in the order of its columns."""
    settings = root.opener.settings
    form = ScaleQueries(reads=len(sites), **settings.form)
    inputs = [site.parameters[i] for i in range(1 + settings.gain) for site in sites]
    node = _insert(root.opener, form, inputs, {"scale": settings.scale}, f"{_range(root.opener, sites[-1])}.queries")
    columns, *by_site = node.outputs
    ones = [by_site.pop()] if form.takes_ones else []
    for value, site in zip(by_site, sites, strict=True):
        value.name = f"{site.name}.column"
    return [form, *_write_group(root, None, 0, columns, dict(zip(sites, by_site, strict=True)), ones)]


def _write_group(
    group: _Group,
    logits: ir.Value | None,
    begin: int,
    columns: ir.Value,
    by_site: Mapping[Site, ir.Value],
    ones: list[ir.Value],
) -> list[Form]:
    """Write ``group`` after what the one before handed on, and the groups that follow it.

    ``begin`` is the first of its columns.
    """
    sites, settings = group.sites, group.opener.settings
    merging = [site for site in sites if group.merges(site)]
    form = AttendBlocks(
        blocks=len(group.blocks),
        new=len(group.blocks) - group.before,
        reads=len(sites),
        partials=len(merging),
        following=len(group.following),
        **settings.form,
    )
    counts = [len(sites), *(len(list(following.all_sites())) for following in group.following)]
    attributes = {"eps": settings.eps, "sizes": counts, "begin": [begin], "end": [begin + sum(counts)]}
    name = f"{_range(sites[0], sites[-1])}.blocks"
    given = [*([] if logits is None else [logits]), *group.blocks, columns, *ones]
    outputs = iter(_insert(group.opener, form, given, attributes, name).outputs)
    mixed = [*group.blocks * len(sites)] if form.is_alone else [_like(site, next(outputs)) for site in sites]
    forms: list[Form] = [form]
    log_sums = {site: next(outputs) for site in merging}
    for site, m in zip(sites, mixed, strict=True):
        merged = [log_sums[site], site.sources[-1], by_site[site], *ones] if site in log_sums else []
        forms.append(_merge(site, [m, *merged], settings.dtype if form.is_alone else form.wide))
    begin += len(sites)
    for following, count in zip(group.following, counts[1:], strict=True):
        forms += _write_group(following, next(outputs), begin, columns, by_site, ones)
        begin += count
    return forms


def _like(site: Site, mixed: ir.Value) -> ir.Value:
    # ONNX Runtime lets a kernel write a read in place of its mixed blocks where it knows that both are of one size.
    mixed.shape = site.node.outputs[0].shape
    return mixed


def _merge(site: Site, inputs: list[ir.Value], mixed_dtype: torch.dtype) -> Form:
    settings = site.settings
    form = MergePartial(partial=len(inputs) > 1, mixed_dtype=mixed_dtype, **settings.form)
    total = float(len(site.sources)) if settings.sum else 1.0
    return site.become(form, inputs, {"eps": settings.eps, "total": total})


def _range(first: Site, last: Site) -> str:
    return first.name if first is last else f"{first.name}_to_{last.name.rpartition('.')[2]}"


def _insert(before: Site, form: Form, inputs: Sequence[ir.Value], attributes: Mapping[str, Any], name: str) -> ir.Node:
    """A call of ``form`` before the node of ``before``, with outputs named after it."""
    from onnxscript import ir

    outputs = len(form.outputs)
    node = ir.node(form.name, inputs, attributes, domain=form.domain, num_outputs=outputs, name=name)
    for value, output in zip(node.outputs, form.outputs, strict=True):
        value.name, value.type = f"{name}.{output}", ir.TensorType(ir.DataType(ONNX_TYPES[form.wide]))
    assert before.node.graph is not None
    before.node.graph.insert_before(before.node, node)
    return node
