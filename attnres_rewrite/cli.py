"""The command line: ``attnres demo`` and ``attnres explain``."""

# No postponed annotations here: typer reads them, and they name things that are imported in functions.
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    import typer
    from torch import nn

# For every module that a command needs, the extra that installs it.
EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "transformers": "hf",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}


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
        from attnres_rewrite.errors import AttnResError

        try:
            print(explain_model(model, parse_blocks(blocks), as_json=as_json))
        except AttnResError as error:
            if not as_json:
                raise
            print(json.dumps({"error": type(error).__name__, "message": str(error)}, indent=1))
            raise typer.Exit(1) from error

    return app


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


def explain_model(name: str, blocks: int | Literal["full"], *, as_json: bool = False) -> str:
    """The report of :func:`attnres_rewrite.explain` on a model named on the command line.

    Raises:
        CommandError: There is no such model.
    """
    from attnres_rewrite import explain

    model, example_inputs = load_model(name)
    report = explain(model, blocks, example_inputs=example_inputs)
    return json.dumps(report.to_dict(), indent=1) if as_json else str(report)


def load_model(name: str) -> "tuple[nn.Module, Any]":
    """The model that a configuration folder or ``module:factory`` describes, and its example inputs or ``None``.

    A configuration makes a model on the meta device, so that its size does not matter. A factory returns
    a model, or a model and example inputs for it.

    Raises:
        CommandError: There is no such model.
    """
    if Path(name, "config.json").is_file():
        return _from_config(Path(name)), None
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


def _from_config(folder: Path) -> "nn.Module":
    require("transformers")
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    # An empty cache made on the meta device cannot be traced, and a report has no use for one.
    config.use_cache = False
    names: Sequence[str] = getattr(config, "architectures", None) or ()
    kinds = (getattr(transformers, name, None) for name in names)
    kind = next((kind for kind in kinds if kind is not None), None)
    with torch.device("meta"):
        made: nn.Module = kind(config) if kind is not None else transformers.AutoModel.from_config(config)
    return made


if __name__ == "__main__":
    main()
