"""The ``torch.compile`` backend ``"attnres"``: the passes as seen from Dynamo's side."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch.fx import GraphModule

from attnres_rewrite import _compat
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import AttnResError, GraphBreakError, NotRewrittenError, UnsupportedResidualError
from attnres_rewrite.forms.anchor import Anchor, anchors_of
from attnres_rewrite.forms.saved_activations import recompute_results
from attnres_rewrite.forms.wrappers import require_known_sites
from attnres_rewrite.graph.nodes import is_inside, require_tensor, source_line
from attnres_rewrite.ops.attend_blocks_native import takes
from attnres_rewrite.passes import Refusal, RefuseNonSums, Site, SiteParameters
from attnres_rewrite.passes.outline_layers import calls_only_bodies
from attnres_rewrite.pipeline import find_streams, insert, outline
from attnres_rewrite.streams import ResidualStream, StreamPlan

# Rows, tokens of all sequences, up to which the schedule "auto" goes read by read.
_FEW_ROWS = 8
# Branches of a stream, and numbers in it, from which the layers of "auto" are compiled once. With fewer branches there
# is little to share; with fewer numbers calls cost several hundredths of a step (benchmarks/compile_layers.py).
_MANY_BRANCHES, _MANY_NUMBERS = 8, 2**18
# Sources of a read from which Inductor takes minutes for what is written out for every one.
_MANY_SOURCES = 24
# Backends that are known to differentiate and compile the body of a call as they do the graph around it.
_TAKE_BODIES = ("inductor", "aot_eager", "aot_eager_decomp_partition")

_logger = logging.getLogger(__name__)


class AttnResBackend:
    """A ``torch.compile`` backend that inserts Block AttnRes and hands the graph to another backend.

    The parameters and the configuration are those that :func:`attnres_rewrite.rewrite` gave the model;
    they reach the graph through its anchors. ``torch.compile(model, backend="attnres")`` is this class
    with its defaults.

    Args:
        inner: What compiles the rewritten graph: ``"inductor"``, ``"aot_eager"``, ``"eager"``, another
            registered backend, or a callable ``(GraphModule, inputs) -> callable``.
        mode: Inductor's mode, as in ``torch.compile(mode=...)``.
        options: Inductor's options, as in ``torch.compile(options=...)``; for another inner backend,
            passed to it as ``options=``.
        plain_streams: Owner modules whose streams stay plain residuals on purpose; ``"*"`` are those of all
            graphs without AttnRes parameters.
    """

    def __init__(
        self,
        inner: str | Callable[..., Any] = "inductor",
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        plain_streams: tuple[str, ...] = (),
    ) -> None:
        if not (isinstance(inner, str) or callable(inner)):
            raise TypeError(f"inner must be a backend's name or a callable, not {type(inner).__name__}")
        if isinstance(inner, str) and not _compat.is_backend(inner):
            raise ValueError(f"there is no backend {inner!r}: torch.compiler.list_backends() lists them")
        if mode is not None and inner == "inductor" and mode not in (modes := _compat.inductor_modes()):
            raise ValueError(f"there is no mode {mode!r} of Inductor: it has {', '.join(modes)}")
        self.inner, self.mode, self.options, self.plain_streams = inner, mode, options, plain_streams
        self.__name__ = "attnres"

    def __call__(self, module: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        """Rewrite ``module`` and compile it with the inner backend.

        An :class:`AttnResError` is raised when the compiled graph is called and not here, because
        Dynamo would wrap it in an error of its own, or drop it and run the plain model.
        """
        try:
            if (wrapper := _compat.active_data_parallel()) is not None:
                # Where a torch.compile of the user's surrounds the model, nothing has asked before.
                require_known_sites(wrapper)
            settings = options.get("mode", self.mode), options.get("options", self.options)
            scheduled = functools.partial(self._scheduled, *settings)
            self.inserted(rewrite_captured(module, self.plain_streams, scheduled, self.site_parameters))
        except AttnResError as error:
            return _raiser(error)
        # Bodies that write into memory are not made; a region of the user's may.
        with _compat.calls_write_nothing(sure=calls_only_bodies(module)):
            return self._compile(module, inputs, **options)

    def _scheduled(self, mode: str | None, options: Any, anchor: Anchor, plan: StreamPlan) -> AttnResConfig:
        self.planned(anchor, plan)
        config = self.configure(anchor.config)
        if config.compile_layers != "inline":
            reason = self._why_inline(options)
            if reason is None and config.compile_layers == "auto":
                reason = self._why_no_gain(plan, bool(mode and mode != "default") or bool(options))
            _logger.info("layers are compiled %s", "once" if reason is None else f"inline: {reason}")
            config = dataclasses.replace(config, compile_layers="once" if reason is None else "inline")
        # Measured (benchmarks/schedule.py): with many rows two phases are faster, and fewer of the kernels differ,
        # so that there are fewer to compile. With one, the decoding of a token, every loop nest more costs more than
        # the sources that it saves.
        shares = config.schedule == "auto" and not config.value_norm
        # Where a size is dynamic, that of the call that was traced counts.
        if shares and self.inner == "inductor" and _numbers(plan) > _FEW_ROWS * plan.stream.width:
            config = dataclasses.replace(config, schedule="two_phase")
        if self.inner == "inductor":
            _warn_of_long_compilation(plan, config)
        return config

    def _why_inline(self, options: dict[str, Any] | None) -> str | None:
        """What keeps this backend, with these options, from compiling layers once; ``None`` if nothing does."""
        if self.inner not in _TAKE_BODIES:
            return f"the backend {self.inner!r} is not known to take calls of graphs; {', '.join(_TAKE_BODIES)} are"
        if self.inner == "inductor" and _compat.uses_cpp_wrapper(options):
            return "Inductor's cpp_wrapper cannot call a graph"
        if _compat.invoke_subgraph() is None:
            return "this release of torch has no operator that calls a graph"
        return None

    def _why_no_gain(self, plan: StreamPlan, tuned: bool) -> str | None:
        """Why compiling the layers of ``plan`` once may save little or cost a step time; ``None`` if it is a gain."""
        root, branches = require_tensor(plan.stream.root), len(plan.stream.branches)
        if self.inner != "inductor":
            return f"the backend {self.inner!r} compiles no kernels"
        if root.device.type != "cpu":
            return f"on {root.device.type} it has not been tested enough"
        if tuned:
            return "Inductor was given a mode or options, whose gains may depend on it"
        if branches < _MANY_BRANCHES:
            return f"there are {branches} branches, fewer than {_MANY_BRANCHES}"
        if (numbers := _numbers(plan)) < _MANY_NUMBERS:
            return f"the stream has {numbers} numbers, fewer than {_MANY_NUMBERS}, so that calls would cost time"
        return None

    def configure(self, config: AttnResConfig) -> AttnResConfig:
        """The configuration to use for one that an anchor carries; a subclass may change it."""
        return config

    def planned(self, anchor: Anchor, plan: StreamPlan) -> None:
        """Called with every stream of an anchor before its sites are inserted; for a subclass to look at."""

    def site_parameters(self, module: GraphModule, anchor: Anchor) -> Sequence[SiteParameters]:
        """The nodes of the parameters of an anchor's sites; a subclass may put others in their place."""
        return _own_parameters(module, anchor)

    def inserted(self, sites: list[Site]) -> None:
        """Called with the sites of every graph that was rewritten; for a subclass to look at."""

    def _compile(self, module: GraphModule, inputs: list[Any], **given: Any) -> Callable[..., Any]:
        mode = given.get("mode", self.mode)
        options = given.get("options", self.options)
        if self.inner == "inductor":
            compiled: Callable[..., Any] = _compat.inductor_compile(module, inputs, mode, options, recompute_results)
            return compiled
        inner = _compat.lookup_backend(self.inner) if isinstance(self.inner, str) else self.inner
        extra = {key: value for key, value in (("mode", mode), ("options", options)) if value}
        compiled = inner(module, inputs, **extra)
        return compiled


def attnres_backend(module: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """The backend registered as ``"attnres"``: :class:`AttnResBackend` over Inductor."""
    return AttnResBackend()(module, inputs, **options)


def _own_parameters(module: GraphModule, anchor: Anchor) -> Sequence[SiteParameters]:
    return anchor.parameters


def rewrite_captured(
    module: GraphModule,
    plain_streams: tuple[str, ...] = (),
    configure: Callable[[Anchor, StreamPlan], AttnResConfig] = lambda anchor, _: anchor.config,
    parameters_of: Callable[[GraphModule, Anchor], Sequence[SiteParameters]] = _own_parameters,
) -> list[Site]:
    """Rewrite, in place, the streams of the anchors in a graph that Dynamo captured.

    Args:
        module: The graph.
        plain_streams: Owners whose streams stay plain on purpose, as in :class:`AttnResBackend`.
        configure: The configuration to use for a stream of an anchor; else the one that the anchor carries.
        parameters_of: The nodes of the site parameters, for an anchor.

    Returns:
        The sites inserted; none for a graph that has nothing to do with a residual stream.

    Raises:
        GraphBreakError: The graph holds only a part of an anchored stream.
        NotRewrittenError: The graph has a residual stream, but its model was never rewritten.
    """
    anchors = anchors_of(module)
    if not anchors:
        _refuse_plain_streams(module, plain_streams)
        return []
    plain = set().union(plain_streams, *(anchor.plain_paths for anchor in anchors))
    analysis = find_streams(module)
    _refuse_changed(anchors, RefuseNonSums()(module, analysis))
    streams = [stream for stream in analysis.streams if stream.owner not in plain]
    _refuse_unowned(anchors, streams)
    rewritten: list[tuple[AttnResConfig, ResidualStream, list[Site]]] = []
    for anchor in anchors:
        if anchor.plain:
            module.graph.erase_node(anchor.node)
            continue
        _refuse_repeated(anchor, anchors)
        others = [other.path for other in anchors if other is not anchor]
        plans = _plans(anchor, [s for s in streams if anchor.owns(s.owner, others)])
        parameters = iter(parameters_of(module, anchor))
        for plan in plans:
            own = list(itertools.islice(parameters, len(plan.stream.branches)))
            config = configure(anchor, plan)
            rewritten.append((config, plan.stream, insert(module, plan, own, config)))
        module.graph.erase_node(anchor.node)
    module.recompile()
    return _outlined(module, rewritten)


def _outlined(module: GraphModule, rewritten: Sequence[tuple[AttnResConfig, ResidualStream, list[Site]]]) -> list[Site]:
    """The sites of streams, whose layers become calls where the configuration asks for it."""
    sites = list(itertools.chain.from_iterable(own for _, _, own in rewritten))
    once = [(stream, own) for config, stream, own in rewritten if config.compile_layers == "once"]
    return list(map(outline(module, once), sites)) if once else sites


def _warn_of_long_compilation(plan: StreamPlan, config: AttnResConfig) -> None:
    root = require_tensor(plan.stream.root)
    in_one = config.compile_layers == "once" and config.schedule == "two_phase" and takes([root])
    if max(plan.sources) <= _MANY_SOURCES or in_one:
        return
    _logger.warning(
        "the reads of module %r have up to %d sources, %d in all, and Inductor writes out every one: the first call "
        "may take many minutes (49 sources took over ten on two cores). Fewer blocks are faster to compile "
        '(rewrite(model, blocks=8)), and so is AttnResConfig(compile_layers="once") with a batch of float tensors on a '
        'CPU; rewrite(model, backend="aot_eager") compiles nothing',
        plan.stream.owner or "(root)",
        max(plan.sources),
        sum(plan.sources),
    )


def _numbers(plan: StreamPlan) -> int:
    """Elements of the stream, in the call that was traced."""
    elements = require_tensor(plan.stream.root).numel()
    return elements if isinstance(elements, int) else _compat.size_hint(elements)


def _refuse_repeated(anchor: Anchor, anchors: list[Anchor]) -> None:
    if [other.path for other in anchors].count(anchor.path) > 1:
        raise UnsupportedResidualError(
            f"module {anchor.spec.owner or '(root)'!r}, which holds a residual stream, runs "
            "more than once in one call, so its reads are not one per site. Rewrite a model that runs it once"
        )


def _refuse_changed(anchors: list[Anchor], refusals: Sequence[Refusal]) -> None:
    """Raise where something in the stream of an anchor would have been refused when the model was rewritten."""
    # That there is no stream at all is what a graph looks like that breaks.
    of_streams = [refusal for refusal in refusals if isinstance(refusal.error, UnsupportedResidualError)]
    for refusal, anchor in itertools.product(of_streams, anchors):
        if not anchor.plain and is_inside(refusal.module, anchor.path):
            raise UnsupportedResidualError(
                f"the residual stream of module {anchor.spec.owner or '(root)'!r} is not what it was when the model "
                "was rewritten: a hook was added since, or the model is called in another mode (with a dropout that is "
                f"active, for example) or with other inputs. Now: {refusal.error}"
            )


def _refuse_unowned(anchors: list[Anchor], streams: list[ResidualStream]) -> None:
    for stream in streams:
        if not any(anchor.owns(stream.owner, ()) for anchor in anchors):
            raise NotRewrittenError(
                f"module {stream.owner or '(root)'!r} has a residual stream, at "
                f"{source_line(stream.branches[0].value)}, that was not seen when the model was rewritten: pass "
                "example_inputs with which every part of the model runs, or name the streams to rewrite in "
                "AttnResConfig(streams=...)"
            )


def _plans(anchor: Anchor, streams: list[ResidualStream]) -> list[StreamPlan]:
    found = tuple(len(stream.branches) for stream in streams)
    if len(found) > len(anchor.sites):
        first, second = streams[0].branches[-1].value, streams[1].root
        raise UnsupportedResidualError(
            f"the residual stream of module {anchor.spec.owner or '(root)'!r} is not what it was when the model was "
            f"rewritten: it is in {len(found)} pieces, of {', '.join(map(str, found))} branch outputs instead of "
            f"{', '.join(map(str, anchor.sites))}. The first ends at {source_line(first)}, the second begins at "
            f"{source_line(second)}. What lies between changes the stream: a hook that was added since, or a part of "
            "the model that is active now, such as dropout, and was not then"
        )
    if any(now > then for now, then in zip(found, anchor.sites, strict=False)):
        raise UnsupportedResidualError(
            f"the residual stream of module {anchor.spec.owner or '(root)'!r} is not what it was when the model was "
            f"rewritten: it is read {sum(found)} times instead of {sum(anchor.sites)}. Either a hook was added since, "
            f"or a part of the model that reads or changes the stream is active now and was not then. It is read "
            f"{_reads(streams)}"
        )
    if found != anchor.sites:
        last = f"; the last add seen is at {source_line(streams[-1].branches[-1].value)}" if streams else ""
        broken = _compat.last_graph_break()
        raise GraphBreakError(
            f"module {anchor.spec.owner or '(root)'!r} was rewritten with {sum(anchor.sites)} AttnRes sites, but the "
            f"compiler sees {sum(found)} of them in one graph{last}. No part of the stream may run alone. Usual "
            "causes: a graph break between layers, torch.compile on single layers (compile the whole model instead), "
            "or a torch.compile of your own around DistributedDataParallel, which splits graphs (leave it out, the "
            "model compiles itself, or set torch._dynamo.config.optimize_ddp = False before it is first called)."
            + _told_by(broken)
        )
    return [StreamPlan.recorded(s, sizes) for s, sizes in zip(streams, anchor.spec.blocks, strict=True)]


def _told_by(broken: str) -> str:
    """What Dynamo's last graph break says of the cause; empty if there was none."""
    if "AlignDevicesHook" in broken:
        return (
            " Here it is accelerate, whose hooks (cpu_offload, disk_offload, a device_map over several devices) move "
            "weights before every layer, where no compiler follows: load the model on one device, or shard it by FSDP2"
        )
    return f" Dynamo's last graph break: {broken}" if broken else ""


def _reads(streams: Sequence[ResidualStream]) -> str:
    """Where the values of streams that are read come from; each line of code once."""
    lines = (source_line(branch.value) for stream in streams for branch in stream.branches)
    return "; ".join(f"at {line}" for line in dict.fromkeys(lines))


def _refuse_plain_streams(module: GraphModule, plain_streams: tuple[str, ...]) -> None:
    if "*" in plain_streams:
        return
    for stream in find_streams(module).streams:
        if any(stream.owner == name or stream.owner.endswith("." + name) for name in plain_streams):
            continue
        where = source_line(stream.branches[0].value)
        raise NotRewrittenError(
            f"this graph has a residual stream of {len(stream.branches)} branch outputs, the first at {where}, "
            'but no AttnRes parameters. Call rewrite(model, blocks=8) before torch.compile(model, backend="attnres"); '
            "if the model is rewritten already, a graph break separates these layers from the start of its forward"
        )


def _raiser(error: AttnResError) -> Callable[..., NoReturn]:
    def fail(*_: Any) -> NoReturn:
        raise type(error)(*error.args)

    return fail
