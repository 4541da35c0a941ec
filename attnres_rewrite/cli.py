"""The command line: ``attnres demo``, ``attnres explain``, ``attnres export`` and ``attnres bench``."""

# No postponed annotations here: typer reads them, and they name things that are imported in functions.
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    import typer
    from torch import Tensor, nn

    from attnres_rewrite import OnnxExport

# For every module that a command needs, the extra that installs it.
EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "transformers": "hf",
    "safetensors": "hf",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}
PROVIDERS = ("cpu", "cuda", "webgpu", "dml")
SCHEDULES = ("auto", "per_read", "two_phase")
# What a message lists of the keys that do not fit.
_KEYS_SHOWN = 6


class CommandError(Exception):
    """A command cannot go on; the message is what the user is told."""


def main() -> None:
    """Run the command line; the entry point ``attnres``."""
    from attnres_rewrite.errors import AttnResError

    try:
        require("typer", "rich")
        make_app()()
    except (AttnResError, CommandError) as error:
        print(f"attnres: {error}", file=sys.stderr)
        sys.exit(1)


def require(*modules: str) -> None:
    """Check that ``modules`` can be imported.

    Raises:
        CommandError: Some cannot; it names them and the extras that install them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(EXTRAS[name] for name in missing))
        which = "the extra that brings it" if len(missing) == 1 else "the extras that bring them"
        raise CommandError(f"{', '.join(missing)} not installed; {which}: pip install 'attnres-rewrite[{extras}]'")


def make_app() -> "typer.Typer":
    """The command line as a typer application."""
    import typer

    app = typer.Typer(
        help="Block Attention Residuals for the transformer you already have.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.command()
    def demo(
        steps: Annotated[int, typer.Option(min=1, help="Training steps of each model.")] = 300,
        blocks: Annotated[str, typer.Option(help='Number of blocks, or "full".')] = "4",
        device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto is the GPU if there is one.")] = "auto",
        out: Annotated[Path, typer.Option(help="Folder for the plots and the ONNX model.")] = Path("attnres-demo"),
        backend: Annotated[str, typer.Option(help="What compiles both models.")] = "inductor",
    ) -> None:
        """Train a small Llama plain and rewritten, compare them, export the rewritten one to ONNX."""
        run_demo(steps=steps, blocks=parse_blocks(blocks), device=device, out=out, backend=backend)

    @app.command()
    def explain(
        model: Annotated[str, typer.Argument(help="A Hugging Face config folder, or module:factory.")],
        blocks: Annotated[str, typer.Option(help='Number of blocks, or "full".')] = "8",
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Show the residual streams of a model and what a rewrite would do; no weights are loaded."""
        with telling_errors(as_json):
            print(explain_model(model, parse_blocks(blocks), as_json=as_json))

    @app.command()
    def export(
        model: Annotated[str, typer.Argument(help="A Hugging Face config folder, or module:factory.")],
        out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write.")],
        blocks: Annotated[
            str, typer.Option(help='Number of blocks, or "full"; a model that comes rewritten keeps its own.')
        ] = "8",
        weights: Annotated[
            Path | None, typer.Option(help="A state_dict: .safetensors, or as torch.save writes it.")
        ] = None,
        use_cache: Annotated[bool, typer.Option("--use-cache", help="With a key-value cache, to generate.")] = False,
        opset: Annotated[int, typer.Option(help="ONNX opset.")] = 23,
        inline: Annotated[bool, typer.Option("--inline", help="Operators in place of calls of a function.")] = False,
        ort_fusions: Annotated[
            str | None, typer.Option(help=f"Fuse for a provider of ONNX Runtime: {', '.join(PROVIDERS)}.")
        ] = None,
        tolerance: Annotated[float | None, typer.Option(help="Largest relative difference accepted.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    ) -> None:
        """Rewrite a model, export it to ONNX and compare it with PyTorch in ONNX Runtime."""
        if ort_fusions is not None and ort_fusions not in PROVIDERS:
            raise CommandError(f"--ort-fusions takes {', '.join(PROVIDERS)}, not {ort_fusions!r}")
        options = {
            "use_cache": use_cache,
            "opset_version": opset,
            "functions": not inline,
            "ort_fusions": ort_fusions,
            "tolerance": tolerance,
        }
        with telling_errors(as_json):
            print(export_model(model, out, parse_blocks(blocks), weights, as_json=as_json, **options))

    @app.command()
    def bench(
        model: Annotated[str, typer.Argument(help="A Hugging Face config folder, or module:factory.")],
        blocks: Annotated[str, typer.Option(help='Number of blocks, or "full".')] = "8",
        batch: Annotated[int | None, typer.Option(min=1, help="Sequences of tokens; else 2, or the example's.")] = None,
        length: Annotated[int | None, typer.Option(min=1, help="Tokens in each; else 256, or the example's.")] = None,
        rounds: Annotated[int, typer.Option(min=1, help="Timed rounds: a step of each form.")] = 20,
        warmup: Annotated[int, typer.Option(min=1, help="Rounds before them; the first compiles.")] = 3,
        seconds: Annotated[float | None, typer.Option(help="Time all rounds, but five, in as long as this.")] = None,
        device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto is the GPU if there is one.")] = "auto",
        dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; else as the model comes.")] = None,
        threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
        schedule: Annotated[str, typer.Option(help=f"How sites are evaluated: {', '.join(SCHEDULES)}.")] = "auto",
        backend: Annotated[str, typer.Option(help="What compiles both forms.")] = "inductor",
        training: Annotated[bool, typer.Option(help="Training steps: forward, loss, backward, AdamW.")] = True,
        inference: Annotated[bool, typer.Option(help="Forwards without gradients.")] = True,
        decode: Annotated[bool, typer.Option(help="One token a sequence, with a filled key-value cache.")] = False,
        cached: Annotated[int | None, typer.Option(min=1, help="Tokens in it; else as many as --length.")] = None,
        alone: Annotated[bool, typer.Option(help="Compile times and memory too, which takes minutes.")] = False,
        json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    ) -> None:
        """Time a model rewritten and compiled against the same model plain and compiled."""
        run_bench(
            model,
            json_file,
            alone=alone,
            blocks=parse_blocks(blocks),
            batch=batch,
            length=length,
            rounds=rounds,
            warmup=warmup,
            seconds=seconds,
            device=device,
            dtype=dtype,
            threads=threads,
            schedule=schedule,
            backend=backend,
            training=training,
            inference=inference,
            decode=decode,
            cached=cached,
        )

    return app


@contextlib.contextmanager
def telling_errors(as_json: bool) -> "Iterator[None]":
    """Print errors of the package as JSON, if that is asked for, and exit with status 1."""
    import typer

    from attnres_rewrite.errors import AttnResError

    try:
        yield
    except AttnResError as error:
        if not as_json:
            raise
        print(json.dumps({"error": type(error).__name__, "message": str(error)}, indent=1))
        raise typer.Exit(1) from error


def parse_blocks(text: str) -> int | Literal["full"]:
    """``"full"`` or a number.

    Raises:
        CommandError: The text is neither.
    """
    if text == "full":
        return "full"
    try:
        return int(text)
    except ValueError:
        raise CommandError(f'--blocks takes a number or "full", not {text!r}') from None


def run_demo(**settings: Any) -> None:
    """Run the demo with a console that shows its progress."""
    require("transformers", "matplotlib", "onnx", "onnxscript", "onnxruntime")
    from rich.console import Console

    from attnres_rewrite import demo

    try:
        demo.run_demo(demo.DemoSettings(**settings), Console())
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error


def run_bench(name: str, json_file: Path | None, *, alone: bool, **settings: Any) -> None:
    """Measure a model named on the command line and print a table; progress goes to standard error.

    Args:
        name: As for :func:`load_model`.
        json_file: Where the results are written too.
        alone: Whether to measure compile times and memory.
        **settings: Those of :class:`attnres_rewrite.bench.BenchSettings`.

    Raises:
        CommandError: There is no such model, or a setting has no such value.
        AttnResError: The model cannot be rewritten, or there are no inputs for it.
    """
    from rich.console import Console

    from attnres_rewrite import AttnResError, bench

    if settings["schedule"] not in SCHEDULES:
        raise CommandError(f"--schedule takes {', '.join(SCHEDULES)}, not {settings['schedule']!r}")
    if json_file is not None and not json_file.parent.is_dir():
        raise CommandError(f"--json {json_file}: the folder {json_file.parent} does not exist")
    progress = Console(stderr=True)
    try:
        wanted = bench.BenchSettings(**settings)
        device = str(wanted.resolve_device())
    except AttnResError:
        raise
    except ValueError as error:
        raise CommandError(str(error)) from error
    result = bench.compare(lambda: load_model(name, device), wanted, progress=progress.print)
    if alone:
        progress.print("Measuring compile times and memory, each form in a process with an empty cache")
        result = dataclasses.replace(result, alone=bench.run_alone(name, wanted))
    Console().print(result.table())
    for note in result.notes():
        print(note)
    if json_file is not None:
        result.save(json_file)


def explain_model(name: str, blocks: int | Literal["full"], *, as_json: bool = False) -> str:
    """The report of :func:`attnres_rewrite.explain` on a model named on the command line.

    Raises:
        CommandError: There is no such model.
    """
    from attnres_rewrite import explain

    model, example_inputs = load_model(name)
    report = explain(model, blocks, example_inputs=example_inputs)
    return json.dumps(report.to_dict(), indent=1) if as_json else str(report)


def export_model(
    name: str,
    out: Path,
    blocks: int | Literal["full"],
    weights: Path | None,
    *,
    as_json: bool = False,
    **options: Any,
) -> str:
    """Export a model named on the command line and tell what was written.

    Args:
        name: As for :func:`load_model`.
        out: The file to write.
        blocks: Number of blocks, for a model that is not rewritten yet.
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

    # The exporters print their progress; what is asked for goes to the output alone.
    with contextlib.redirect_stdout(sys.stderr):
        model, example_inputs = load_model(name, device="cpu")
        if not any(attnres_parameters(model)):
            # Only the export runs the model, so that no kernel is worth compiling; a graph takes no backend.
            backend = "inductor" if isinstance(model, GraphModule) else "eager"
            model = rewrite(model, blocks, example_inputs=example_inputs, backend=backend)
        if weights is not None:
            origin = load_weights(model, weights)
        elif _is_config_folder(name):
            origin = "random, because a configuration has none; --weights FILE exports trained ones"
        else:
            origin = f"as {name} returned them"
        exported = export_onnx(model, out, example_inputs, **options)
    return _as_json(exported, origin) if as_json else _as_text(exported, origin)


def load_weights(model: "nn.Module", path: Path) -> str:
    """Load a state_dict of ``model``, or of ``model`` before it was rewritten, from a file.

    Args:
        model: A rewritten model.
        path: A ``.safetensors`` file, or one that ``torch.save`` wrote.

    Returns:
        What the weights are now, in words.

    Raises:
        CommandError: The file cannot be read, or it does not fit.
    """
    from attnres_rewrite import attnres_parameters

    given = _read_weights(path)
    state = model.state_dict(keep_vars=True)
    attnres = {name for name, _ in attnres_parameters(model)}
    plain = not attnres & set(given)
    # Tied weights are one tensor under several names, and files often have only one of them.
    loaded = {id(state[key]) for key in given if key in state}
    missing = [key for key, value in state.items() if key not in given and id(value) not in loaded]
    missing = [key for key in missing if not (plain and key in attnres)]
    unexpected = [key for key in given if key not in state]
    shapes = [
        f"{key} {list(value.shape)} instead of {list(state[key].shape)}"
        for key, value in given.items()
        if key in state and value.shape != state[key].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = [f"{len(keys)} {kind} ({_listed(keys)})" for kind, keys in kinds.items() if keys]
    if faults:
        raise CommandError(
            f"--weights {path} does not fit the {type(model).__name__}: {'; '.join(faults)}; it takes a whole "
            "state_dict of the rewritten model or of the plain one"
        )
    model.load_state_dict(given, strict=False)
    return f"{path}, of a plain model: pseudo-queries and gains stay as they were" if plain else str(path)


def _read_weights(path: Path) -> "dict[str, Tensor]":
    import torch

    if not path.is_file():
        raise CommandError(f"--weights {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            require("safetensors")
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(
            f"--weights {path} cannot be read ({type(error).__name__}): it takes what torch.save(model.state_dict(), "
            "...) writes, or a file whose name ends in .safetensors"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        held = f"a {type(found).__name__}" + (f" with {_listed(list(found))}" if isinstance(found, Mapping) else "")
        raise CommandError(f"--weights {path} holds {held}, not a state_dict: save model.state_dict() by itself")
    return dict(found)


def _listed(keys: Sequence[object]) -> str:
    return ", ".join(map(str, keys[:_KEYS_SHOWN])) + (", ..." if len(keys) > _KEYS_SHOWN else "")


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


def _is_config_folder(name: str) -> bool:
    return Path(name, "config.json").is_file()


def load_model(name: str, device: str = "meta") -> "tuple[nn.Module, Any]":
    """The model that a configuration folder or ``module:factory`` describes, and its example inputs or ``None``.

    A configuration makes a model on ``device``; on the meta device its size does not matter. A factory returns
    a model, or a model and example inputs for it.

    Raises:
        CommandError: There is no such model.
    """
    if _is_config_folder(name):
        return _from_config(Path(name), device), None
    module_name, colon, factory = name.partition(":")
    if not colon:
        raise CommandError(
            f"{name!r} is neither a folder with a config.json nor module:factory, such as my_package.models:make_model"
        )
    from torch import nn

    sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module_name), factory)()
    except (ImportError, AttributeError) as error:
        raise CommandError(f"{name}: {error}") from error
    finally:
        sys.path.remove("")
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise CommandError(f"{name} returned a {type(model).__name__}, not an nn.Module")
    return model, inputs


def _from_config(folder: Path, device: str) -> "nn.Module":
    require("transformers")
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if device == "meta":
        # An empty cache made on the meta device cannot be traced, and a report has no use for one.
        config.use_cache = False
    names: Sequence[str] = getattr(config, "architectures", None) or ()
    kinds = (getattr(transformers, name, None) for name in names)
    kind = next((kind for kind in kinds if kind is not None), None)
    with torch.device(device):
        made: nn.Module = kind(config) if kind is not None else transformers.AutoModel.from_config(config)
    return made


if __name__ == "__main__":
    main()
