"""The command line: ``attnres demo``, ``explain``, ``export``, ``plot`` and ``bench``."""

# No postponed annotations here: typer reads them, and they name things that are imported in functions.
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from attnres_rewrite.cli.commands import SCHEDULES, explain_model, export_model, plot_model, run_bench, run_demo
from attnres_rewrite.named_models import CommandError, require

if TYPE_CHECKING:
    import typer

    from attnres_rewrite import AttnResConfig

PROVIDERS = ("cpu", "cuda", "webgpu", "dml")


def main() -> None:
    """Run the command line; the entry point ``attnres``."""
    from attnres_rewrite.errors import AttnResError

    try:
        require("typer", "rich")
        make_app()()
    except (AttnResError, CommandError) as error:
        print(f"attnres: {error}", file=sys.stderr)
        sys.exit(1)


def make_app() -> "typer.Typer":
    """The command line as a typer application."""
    import typer

    blocks_help = 'Number of blocks, "full", or the layers in every block, such as 2,2,4,4.'
    Blocks = Annotated[str, typer.Option(help=blocks_help)]
    LayersPerBlock = Annotated[int | None, typer.Option(help="Instead of --blocks: groups of this many layers.")]
    Aggregation = Annotated[str, typer.Option(help="mean (the paper's) or sum (starts as the plain model everywhere).")]
    Streams = Annotated[list[str] | None, typer.Option(help="Owner of a stream to rewrite, once for each; else all.")]
    Model = Annotated[str, typer.Argument(help="A Hugging Face config folder, or module:factory.")]

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
        model: Model,
        blocks: Blocks = "8",
        layers_per_block: LayersPerBlock = None,
        aggregation: Aggregation = "mean",
        streams: Streams = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Show the residual streams of a model and what a rewrite would do; no weights are loaded."""
        with telling_errors(as_json):
            config = make_config(blocks, layers_per_block, aggregation, streams)
            print(explain_model(model, config, as_json=as_json))

    @app.command()
    def export(
        model: Model,
        out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write.")],
        blocks: Annotated[str, typer.Option(help=f"{blocks_help} A model that comes rewritten keeps its own.")] = "8",
        layers_per_block: LayersPerBlock = None,
        aggregation: Aggregation = "mean",
        streams: Streams = None,
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
            config = make_config(blocks, layers_per_block, aggregation, streams)
            print(export_model(model, out, config, weights, as_json=as_json, **options))

    @app.command()
    def plot(
        model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or module:factory.")],
        out: Annotated[Path, typer.Option("--out", "-o", help="An image (.png, .svg, .pdf) or a page (.html).")] = Path(
            "depth.png"
        ),
        tokens: Annotated[
            str | None,
            typer.Option(help='A file of token ids, a sequence a line, or "random"; else the example\'s inputs.'),
        ] = None,
        blocks: Annotated[str, typer.Option(help=f"{blocks_help} A model that comes rewritten keeps its own.")] = "8",
        layers_per_block: LayersPerBlock = None,
        streams: Streams = None,
    ) -> None:
        """Draw how much every read of a model attends to every source."""
        print(plot_model(model, out, make_config(blocks, layers_per_block, "mean", streams), tokens))

    @app.command()
    def bench(
        model: Model,
        blocks: Blocks = "8",
        layers_per_block: LayersPerBlock = None,
        aggregation: Aggregation = "mean",
        streams: Streams = None,
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
            layers_per_block=layers_per_block,
            aggregation=aggregation,
            streams=streams,
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


def parse_blocks(text: str) -> "int | Literal['full'] | tuple[int, ...]":
    """``"full"``, a number, or numbers with commas between them.

    Raises:
        CommandError: The text is none of these.
    """
    if text == "full":
        return "full"
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise CommandError(
            f'--blocks takes a number or "full", or the layers in every block (2,2,4,4), not {text!r}'
        ) from None
    return sizes[0] if len(sizes) == 1 else sizes


def make_config(
    blocks: str, layers_per_block: int | None, aggregation: str, streams: Sequence[str] | None
) -> "AttnResConfig":
    """The configuration that the options of a command mean.

    Raises:
        CommandError: An option has no such value.
        BlockPartitionError: The options say twice how layers are grouped.
    """
    from attnres_rewrite import AttnResConfig, AttnResError

    chosen: Any = {"layers_per_block": layers_per_block, "aggregation": aggregation, "streams": streams or None}
    try:
        return AttnResConfig(parse_blocks(blocks), **chosen)
    except AttnResError:
        raise
    except ValueError as error:
        raise CommandError(f"--{error}") from error
