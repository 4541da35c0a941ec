"""What the commands do: each takes plain values and gives what is to be printed."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_rewrite.cli.progress import stages
from attnres_rewrite.named_models import (
    CommandError,
    is_config_folder,
    load_model,
    load_weights,
    read_token_ids,
    require,
)

if TYPE_CHECKING:
    from attnres_rewrite import AttnResConfig, OnnxExport

PICTURES = (".png", ".svg", ".pdf")


def run_demo(*, as_json: bool = False, **settings: Any) -> None:
    """Run the demo with a console that shows its progress; as JSON, that is on standard error."""
    require("transformers", "matplotlib", "onnx", "onnxscript", "onnxruntime")
    from rich.console import Console

    from attnres_rewrite import demo

    # Whatever else prints, the output has the JSON alone.
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with quiet:
            result = demo.run_demo(demo.DemoSettings(**settings), Console(stderr=as_json))
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))


def run_bench(name: str, out: Path | None, *, alone: bool, as_json: bool = False, **settings: Any) -> None:
    """Measure a model named on the command line and print a table; progress goes to standard error.

    Args:
        name: As for :func:`load_model`.
        out: A file that the results are written to.
        alone: Whether to measure compile times and memory.
        as_json: Whether to print the results as JSON.
        **settings: Those of :class:`attnres_rewrite.bench.BenchSettings`.

    Raises:
        CommandError: There is no such model, or a setting has no such value.
        AttnResError: The model cannot be rewritten, or there are no inputs for it.
    """
    from rich.console import Console

    from attnres_rewrite import AttnResError, bench

    _require_folder("--out", out)
    progress = Console(stderr=True)
    try:
        wanted = bench.BenchSettings(**settings)
        device = str(wanted.resolve_device())
    except AttnResError:
        raise
    except ValueError as error:
        raise CommandError(str(error)) from error
    with contextlib.redirect_stdout(sys.stderr):
        result = bench.compare(lambda: load_model(name, device), wanted, progress=progress.print)
    if alone:
        progress.print("Measuring compile times and memory, each form in a process with an empty cache")
        result = dataclasses.replace(result, alone=bench.run_alone(name, wanted))
    if out is not None:
        result.save(out)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
        return
    Console().print(result.table())
    for note in result.notes():
        print(note)


def explain_model(name: str, config: "AttnResConfig", *, graph: Path | None = None, as_json: bool = False) -> str:
    """The report of :func:`attnres_rewrite.explain` on a model named on the command line.

    Args:
        name: As for :func:`load_model`.
        config: How a model is rewritten that is not yet.
        graph: A file that the blocks are drawn to.
        as_json: Whether to tell it as JSON.

    Raises:
        CommandError: There is no such model, or ``graph`` cannot be written.
    """
    from attnres_rewrite import explain
    from attnres_rewrite.api import explain_recorded
    from attnres_rewrite.huggingface.saving import read_record

    _require_folder("--graph", graph)
    with stages() as stage, contextlib.redirect_stdout(sys.stderr):
        stage(f"Making the model of {name}")
        model, example_inputs = load_model(name)
        stage(f"Tracing the {type(model).__name__} and finding its residual streams")
        record = read_record(Path(name)) if is_config_folder(name) else None
        if record is not None:
            report = explain_recorded(model, record)
        else:
            report = explain(model, config=config, example_inputs=example_inputs)
    if graph is not None:
        try:
            report.graph(graph)
        except (ValueError, OSError) as error:
            raise CommandError(f"--graph {graph}: {error}") from error
        print(f"attnres: the blocks are drawn in {graph}", file=sys.stderr)
    return json.dumps(report.to_dict(), indent=1) if as_json else str(report)


def export_model(
    name: str,
    out: Path,
    config: "AttnResConfig",
    weights: Path | None,
    *,
    as_json: bool = False,
    **options: Any,
) -> str:
    """Export a model named on the command line and tell what was written.

    Args:
        name: As for :func:`load_model`.
        out: The file to write.
        config: How a model is rewritten that is not yet.
        weights: A file for :func:`load_weights`.
        as_json: Whether to tell it as JSON.
        **options: Those of :func:`attnres_rewrite.export_onnx`.

    Raises:
        CommandError: There is no such model, or the weights do not fit it.
        AttnResError: The model cannot be rewritten or exported; no file is written.
    """
    require("onnx", "onnxscript", "onnxruntime")
    from torch.fx import GraphModule

    from attnres_rewrite import attnres_parameters, export_onnx, rewrite
    from attnres_rewrite.demo.quiet import quiet_exporter
    from attnres_rewrite.huggingface.saving import read_record

    # The exporters print their progress; what is asked for goes to the output alone.
    with stages() as stage, contextlib.redirect_stdout(sys.stderr):
        stage(f"Making the model of {name}")
        model, example_inputs = load_model(name, device="cpu")
        if not any(attnres_parameters(model)):
            # Only the export runs the model, so that no kernel is worth compiling; a graph takes no backend.
            backend = "inductor" if isinstance(model, GraphModule) else "eager"
            stage(f"Rewriting the {type(model).__name__}")
            model = rewrite(model, config=config, example_inputs=example_inputs, backend=backend)
        if weights is not None:
            stage(f"Loading the weights in {weights}")
            origin = load_weights(model, weights)
        elif is_config_folder(name) and read_record(Path(name)) is not None:
            origin = f"those in {name}"
        elif is_config_folder(name):
            origin = "random, because a configuration has none; --weights FILE exports trained ones"
        else:
            origin = f"as {name} returned them"
        stage("Exporting to ONNX")
        with quiet_exporter():
            exported = export_onnx(model, out, example_inputs, **options)
    return _as_json(exported, origin) if as_json else _as_text(exported, origin)


def _require_folder(option: str, path: Path | None) -> None:
    """Check that ``path`` can be a file, before what is written to it takes minutes."""
    if path is not None and not path.parent.is_dir():
        raise CommandError(f"{option} {path}: the folder {path.parent} does not exist")


def _as_json(exported: "OnnxExport", weights: str) -> str:
    differences = [{"sizes": sizes, "difference": value} for sizes, value in exported.differences.items()]
    told = {"path": str(exported.path), "weights": weights, "differences": differences}
    return json.dumps({**dataclasses.asdict(exported), **told}, indent=1)


def _as_text(exported: "OnnxExport", weights: str) -> str:
    lines = [
        f"{exported.path}: {exported.sites} sites",
        f"weights: {weights}",
        f"inputs: {', '.join(exported.inputs)}",
        f"outputs: {', '.join(exported.outputs)}",
        "largest difference between ONNX Runtime and PyTorch, relative to the largest output:",
    ]
    return "\n".join([*lines, *(f"  sizes {sizes}: {value:.1e}" for sizes, value in exported.differences.items())])


def plot_model(
    name: str, out: Path, config: "AttnResConfig", tokens: str | None = None, *, as_json: bool = False
) -> str:
    """Write the depth weights of a model named on the command line, and tell what was written.

    Args:
        name: As for :func:`load_model`.
        out: The file to write: a page if its name ends in ``.html``, else an image.
        config: How a model is rewritten that is not yet.
        tokens: As for :func:`read_token_ids`; else the model runs on its example inputs.
        as_json: Whether to tell the weights too, as JSON.

    Raises:
        CommandError: There is no such model, no such kind of file, or no such tokens.
        AttnResError: The model cannot be rewritten, or there are no inputs for it.
    """
    if out.suffix not in (".html", *PICTURES):
        raise CommandError(f"--out takes a name that ends in .html, {', '.join(PICTURES)}, not {str(out)!r}")
    _require_folder("--out", out)
    require(*(("matplotlib",) if out.suffix in PICTURES else ()))
    from torch.fx import GraphModule

    from attnres_rewrite import attnres_parameters, depth_attention, rewrite

    names = None
    with stages() as stage, contextlib.redirect_stdout(sys.stderr):
        stage(f"Loading {name}")
        model, inputs = load_model(name, device="cpu")
        if isinstance(model, GraphModule):
            raise CommandError(f"{name} returned a GraphModule, whose sites are not recorded: return the nn.Module")
        if tokens is not None:
            ids, inputs = read_token_ids(model, tokens)
            names = [f"id {number}" for number in ids.flatten().tolist()]
        stage("Tracing it")
        if fresh := not any(attnres_parameters(model)):
            rewrite(model, config=config, example_inputs=inputs, backend="eager")
        depth = depth_attention(model.eval(), inputs)
    if out.suffix in PICTURES:
        depth.plot(out)
    else:
        depth.to_html(out, tokens=names)
    if as_json:
        return json.dumps({"path": str(out), "fresh": fresh, **depth.to_dict()}, indent=1)
    told = f"{out}: {len(depth.sites)} reads of {len(depth.sources)} sources"
    return f"{told}; the model came plain, so all of its queries are zero, and its weights equal" if fresh else told
