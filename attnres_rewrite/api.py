"""The verbs on a whole model: rewrite, explain, disabled, undo, attnres_parameters."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from attnres_rewrite.capture.dynamo import Capture, capture
from attnres_rewrite.capture.inputs import Call, ExampleInputs, as_it_was, example_call, uncompiled
from attnres_rewrite.config import AttnResConfig, Blocks
from attnres_rewrite.errors import CheckpointError, UnsupportedResidualError
from attnres_rewrite.forms.anchor import AnchorSpec
from attnres_rewrite.forms.exported import rewrite_exported
from attnres_rewrite.forms.graph_module import rewrite_graph_module, with_metadata
from attnres_rewrite.forms.layer_guard import layers_of
from attnres_rewrite.forms.live import require_live, require_plain, uninstall
from attnres_rewrite.forms.output_hooks import make_hooks_traceable
from attnres_rewrite.forms.recorded import Recorded, RecordedOwner, check_compile_options
from attnres_rewrite.forms.rehearsal import rewrite_ahead, runs_as_captured, trace_ahead
from attnres_rewrite.huggingface.saving import install_saving, uninstall_saving
from attnres_rewrite.passes.reads_without_norm import tell_reads_without_norm
from attnres_rewrite.pipeline import Analysis, analyse
from attnres_rewrite.report import Report, make_report
from attnres_rewrite.streams import StreamPlan

# By the name that the container has in every form; peft keeps an adapter's copy of it one level deeper.
_SITE_PARAMETER = re.compile(r"(^|\.)attn_res\.(modules_to_save\.[^.]+\.)?\d+\.(query|gain|gate)$")

_logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", bound=nn.Module | ExportedProgram)


def rewrite(
    model: ModelT,
    blocks: Blocks | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    config: AttnResConfig | None = None,
    backend: str | Callable[..., Any] = "inductor",
    **compile_options: Any,
) -> ModelT:
    """Replace the residual streams of ``model`` by Block Attention Residuals (arXiv:2603.15031).

    An ``nn.Module`` is rewritten in place and returned: it gets parameters
    ``<owner>.attn_res.<i>.query`` and ``.gain`` (``[D]``, the dtype and device of the owner), and from
    then on runs through ``torch.compile``. An ``ExportedProgram`` or a ``GraphModule`` is left alone and
    a rewritten one returned.

    Args:
        model: A pre-norm transformer, before training.
        blocks: Number N of blocks of whole layers, ``"full"``, ``"auto"`` (a number for the size of the model, which
            the log and :func:`explain` say with its reason), the number of layers in every block (``[2, 2, 4, 4]``), or
            a mapping from owner name to any of these. Default 8, or what ``config`` says.
        example_inputs: Inputs that the model runs on (a mapping: keyword arguments; a tuple:
            positional; a tensor: one positional argument). Left out, they are made from the model where
            it says what it takes.
        config: Everything else that can be chosen; see :class:`AttnResConfig`.
        backend: What compiles the rewritten graphs of an ``nn.Module``: ``"inductor"``,
            ``"aot_eager"``, ``"eager"``, another backend's name, or a callable.
        **compile_options: Passed on to ``torch.compile`` (``mode``, ``options``, ``dynamic``,
            ``fullgraph``); for an ``nn.Module`` only.

    Returns:
        The rewritten model, of the same kind as ``model``.

    Raises:
        NoResidualStreamError: No residual stream was found.
        UnsupportedResidualError: The residuals are of a kind that is refused, or already rewritten.
        GraphBreakError: A graph break lies between the layers.
        BlockPartitionError: The layers cannot be grouped as asked.
        ExampleInputsError: The example inputs are missing or do not fit.
        TypeError: ``model`` is of another kind. After any error the model is as it was.
    """
    config = resolve_config(blocks, config)
    if isinstance(model, ExportedProgram):
        _refuse_compile_options(backend, compile_options)
        return cast(ModelT, rewrite_exported(model, config))
    if isinstance(model, GraphModule):
        _refuse_compile_options(backend, compile_options)
        return cast(ModelT, rewrite_graph_module(model, config, example_inputs))
    if not isinstance(model, nn.Module):
        raise TypeError(f"rewrite takes an nn.Module, an ExportedProgram or a GraphModule, not {type(model).__name__}")
    with as_it_was(model, after_errors_only=True):
        return cast(ModelT, _rewrite_live(model, config, example_inputs, backend, compile_options))


def resolve_config(blocks: Blocks | None, config: AttnResConfig | None) -> AttnResConfig:
    """The configuration that ``blocks`` and ``config`` mean together; not both may say how layers are grouped."""
    if config is not None and not isinstance(config, AttnResConfig):
        raise TypeError(f"config is an AttnResConfig, not a {type(config).__name__}")
    config = config or AttnResConfig()
    return config if blocks is None else config.with_blocks(blocks)


def _refuse_compile_options(backend: object, options: dict[str, Any]) -> None:
    if backend != "inductor" or options:
        given = [*options, *(["backend"] if backend != "inductor" else [])]
        raise TypeError(f"{', '.join(given)}: only for an nn.Module; a graph is returned and not compiled")


def _rewrite_live(
    model: nn.Module,
    config: AttnResConfig,
    example_inputs: ExampleInputs | None,
    backend: str | Callable[..., Any],
    compile_options: dict[str, Any],
) -> nn.Module:
    check_compile_options(compile_options)
    captured = _capture_module(model, config, example_inputs)
    analysis = analyse(captured.modules, config)
    owners = _owners(model, analysis)
    taken = {name for plans in owners.values() for name in (p.stream.owner for p in plans)}
    plain = tuple(name for name in analysis.found if name not in taken)
    # What breaks within a stream that is left plain by name runs in graphs that do not tell the names of modules.
    anywhere = ("*",) if config.streams is not None and not captured.whole else ()
    record = Recorded(
        tuple(_recorded(owner, plans, config, plain) for owner, plans in owners.items()),
        (*plain, *anywhere),
        scalars=captured.scalars,
        whole=captured.whole,
    )
    ahead = analysis.plans if runs_as_captured(model, captured, owners) else ()
    record.put_into(model, backend, compile_options)
    try:
        _rehearse(model, example_call(model, example_inputs), captured, ahead, config)
    except BaseException:
        uninstall(model)
        raise
    install_saving(model)
    _say_when_it_compiles()
    return model


@functools.cache
def _say_when_it_compiles() -> None:
    """Once in a process."""
    _logger.info(
        "a rewritten model is compiled when it is called, which takes seconds to minutes: at the first training step, "
        "the first evaluation and the first inputs of another size. attnres_rewrite.warm_up(model, [inputs, ...]) does "
        "all of it ahead"
    )


def _rehearse(
    model: nn.Module, call: Call, captured: Capture, ahead: Sequence[StreamPlan], config: AttnResConfig
) -> None:
    """Rewrite a graph of the model's first call ahead of it: the captured one, where that is what will run.

    Args:
        model: The rewritten model.
        call: Its first call.
        captured: What was captured of the call before the rewrite.
        ahead: The plans of the captured graph; none if another one will run.
        config: The configuration of the rewrite.
    """
    sites = rewrite_ahead(captured, ahead, config) if ahead else trace_ahead(model, call, captured)
    tell_reads_without_norm(sites, config)


def analyse_module(model: nn.Module, config: AttnResConfig, example_inputs: ExampleInputs | None) -> Analysis:
    """The plan for an ``nn.Module``, which is captured and not changed."""
    return analyse(_capture_module(model, config, example_inputs).modules, config)


def _capture_module(model: nn.Module, config: AttnResConfig, example_inputs: ExampleInputs | None) -> Capture:
    require_plain(model)
    make_hooks_traceable(model)
    with uncompiled(model):
        return capture(model, example_call(model, example_inputs), config.streams)


def _owners(model: nn.Module, analysis: Analysis) -> dict[str, list[StreamPlan]]:
    """The modules that hold the parameters, with their streams."""
    owners: dict[str, list[StreamPlan]] = {}
    for plan in analysis.plans:
        name = plan.stream.owner
        owner = model.get_submodule(name)
        if isinstance(owner, nn.Sequential):
            raise UnsupportedResidualError(
                "the whole model is an nn.Sequential, whose forward runs every child, so it cannot hold the AttnRes "
                "parameters: put it into a module with a forward of its own"
            )
        if hasattr(owner, "attn_res"):
            raise UnsupportedResidualError(
                f"module {name or '(root)'!r} already has an attribute attn_res: rename it, the parameters go there"
            )
        owners.setdefault(name, []).append(plan)
    return owners


def _recorded(owner: str, plans: list[StreamPlan], config: AttnResConfig, plain: tuple[str, ...]) -> RecordedOwner:
    blocks = tuple(plan.block_sizes for plan in plans)
    settled = dataclasses.replace(config, blocks=1, layers_per_block=None, sublayers_per_block=None, streams=None)
    widths = tuple(plan.stream.width for plan in plans for _ in plan.stream.branches)
    layers = set[str]().union(*(layers_of(plan.stream) for plan in plans))
    return RecordedOwner(AnchorSpec(owner, blocks, settled, plain), widths, tuple(sorted(layers)))


def explain(
    model: nn.Module | ExportedProgram | GraphModule,
    blocks: Blocks | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    config: AttnResConfig | None = None,
) -> Report:
    """What :func:`rewrite` would do to ``model``, which is not changed; ``print`` shows it as a table.

    The arguments and errors are those of :func:`rewrite`.
    """
    config = resolve_config(blocks, config)
    if not isinstance(model, ExportedProgram | nn.Module):
        raise TypeError(f"explain takes an nn.Module, an ExportedProgram or a GraphModule, not {type(model).__name__}")
    parameters = sum(p.numel() for p in model.parameters())
    if isinstance(model, ExportedProgram):
        return make_report(analyse([with_metadata(model.graph_module, None)], config), config, parameters)
    if isinstance(model, GraphModule):
        return make_report(analyse([with_metadata(model, example_inputs)], config), config, parameters)
    with as_it_was(model):
        return make_report(analyse_module(model, config, example_inputs), config, parameters)


def explain_recorded(model: nn.Module, record: Recorded) -> Report:
    """What :func:`explain` answers, of a rewrite that was done: the plain ``model`` grouped as it is recorded.

    Raises:
        CheckpointError: ``model`` has other streams than those that were recorded.
    """
    config = dataclasses.replace(record.owners[0].spec.config, streams=tuple(one.spec.owner for one in record.owners))
    with as_it_was(model):
        analysis = analyse_module(model, config, None)
        sizes = [(one.spec.owner, blocks) for one in record.owners for blocks in one.spec.blocks]
        if [(p.stream.owner, len(p.stream.branches)) for p in analysis.plans] != [(o, sum(b)) for o, b in sizes]:
            raise CheckpointError(
                f"this {type(model).__name__} has other streams than those that are recorded: "
                + ", ".join(f"{owner or '(root)'} of {sum(blocks)} branch outputs" for owner, blocks in sizes)
            )
        plans = tuple(
            dataclasses.replace(plan, block_of=StreamPlan.recorded(plan.stream, blocks).block_of)
            for plan, (_, blocks) in zip(analysis.plans, sizes, strict=True)
        )
        report = make_report(
            dataclasses.replace(analysis, plans=plans), config, sum(p.numel() for p in model.parameters())
        )
    return report


def undo(model: nn.Module) -> nn.Module:
    """Take the rewrite out of ``model`` again, in place: parameters, wrapped forwards, compilation.

    Raises:
        AttnResError: ``model`` is not a rewritten ``nn.Module``.
    """
    require_live(model, "undo")
    uninstall_saving(model)
    uninstall(model)
    return model


def attnres_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every pseudo-query and key gain ``[D]``, for optimizer groups.

    Like the gains of norms they usually get no weight decay. Works on every form that has parameters:
    a rewritten ``nn.Module``, and a rewritten ``GraphModule`` or the module of an ``ExportedProgram``. Where an adapter
    of peft trains the sites (``modules_to_save=["attn_res"]``), these are the adapter's.
    """
    for name, parameter in model.named_parameters():
        if _SITE_PARAMETER.search(name):
            yield name, parameter
