"""The command line: ``attnres demo``, ``explain``, ``export``, ``plot``, ``bench`` and ``build-onnx-kernel``."""

# No postponed annotations here: typer reads them, and they name things that are imported in functions.
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from attnres_rewrite.cli.commands import explain_model, export_model, plot_model, run_bench, run_demo
from attnres_rewrite.cli.onnx_kernel import build_onnx_kernel
from attnres_rewrite.named_models import CommandError, require

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the command line; the entry point ``attnres``."""
    from attnres_rewrite.errors import AttnResError

    try:
        require("typer", "rich")
        make_app()()
    except (AttnResError, CommandError) as error:
        print(f"attnres: {told(error)}", file=sys.stderr)
        sys.exit(1)


def told(error: Exception) -> str:
    """The message of an error of the library, in the words of the command line."""
    from attnres_rewrite.errors import BlockPartitionError

    hint = ". Here that is --blocks, or --layers-per-block" if isinstance(error, BlockPartitionError) else ""
    return f"{error}{hint}"


def make_app() -> "typer.Typer":
    """The command line as a typer application."""
    import typer

    from attnres_rewrite.cli.options import (
        BLOCKS_HELP,
        EXAMPLE,
        EXIT_STATUS,
        Aggregation,
        Aggregations,
        AsJson,
        Backend,
        Blocks,
        Device,
        Dtypes,
        LayersPerBlock,
        Model,
        Providers,
        Schedules,
        Streams,
        examples,
        make_config,
        parse_blocks,
        wrong,
    )

    app = typer.Typer(
        help="Block Attention Residuals (arXiv:2603.15031) for the transformer you already have.",
        epilog=examples(
            f"explain {EXAMPLE} --blocks 4",
            "explain --help",
            then=f"Begin with explain: it says what a rewrite would do, and runs nothing.\n\n{EXIT_STATUS}",
        ),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def tell_version(asked: bool) -> None:
        if asked:
            from attnres_rewrite import __version__

            print(f"attnres {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[bool, typer.Option("--version", callback=tell_version, is_eager=True)] = False,
    ) -> None:
        pass

    @app.command(
        epilog=examples(
            "demo",
            "demo --steps 20 --backend eager --out quick",
            then="Next, a model of your own: attnres explain --help",
        )
    )
    def demo(
        steps: Annotated[int, typer.Option(min=1, help="Training steps of each model.")] = 300,
        blocks: Annotated[str, typer.Option(help='Number of blocks, "full" or "auto".')] = "4",
        device: Device = "auto",
        out: Annotated[Path, typer.Option(help="Folder for the plots and the ONNX model.")] = Path("attnres-demo"),
        backend: Backend = "inductor",
        as_json: AsJson = False,
    ) -> None:
        """Train a small Llama plain and rewritten, compare them, export the rewritten one to ONNX.

        It trains on the source text of Python's standard library, and takes some minutes on two CPU cores.
        """
        with telling_errors(as_json):
            settings = {
                "steps": steps,
                "blocks": parse_blocks(blocks),
                "device": device,
                "out": out,
                "backend": backend,
            }
            run_demo(as_json=as_json, **settings)

    @app.command(
        epilog=examples(
            f"explain {EXAMPLE} --blocks 4",
            f"explain {EXAMPLE} --blocks 4 --graph blocks.svg",
            f"explain {EXAMPLE} --blocks 2,2,4 --json",
            then="Next: attnres bench, which says what it costs, and attnres export, which writes an ONNX file.",
        )
    )
    def explain(
        model: Model,
        blocks: Blocks = "8",
        layers_per_block: LayersPerBlock = None,
        aggregation: Aggregation = Aggregations.mean,
        streams: Streams = None,
        graph: Annotated[
            Path | None,
            typer.Option(help="Draw blocks, reads and sources to this .svg file.", show_default=False),
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Show the residual streams of a model and what a rewrite would do.

        Nothing is changed, and of a Hugging Face model no weights are loaded: its size does not matter.
        """
        if graph is not None and graph.suffix.lower() != ".svg":
            wrong("--graph", f"the picture is an SVG file, whose name ends in .svg, not {str(graph)!r}")
        with telling_errors(as_json):
            config = make_config(blocks, layers_per_block, aggregation, streams)
            print(explain_model(model, config, graph=graph, as_json=as_json))

    @app.command(
        epilog=examples(
            f"export {EXAMPLE} --blocks 4 -o model.onnx",
            f"export {EXAMPLE} --blocks 4 -o model.onnx --use-cache --json",
            then="The file runs in ONNX Runtime, and Netron (netron.app) shows it: every site is a node to expand.",
        )
    )
    def export(
        model: Model,
        out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write.")],
        blocks: Annotated[str, typer.Option(help=f"{BLOCKS_HELP} A model that comes rewritten keeps its own.")] = "8",
        layers_per_block: LayersPerBlock = None,
        aggregation: Aggregation = Aggregations.mean,
        streams: Streams = None,
        weights: Annotated[
            Path | None,
            typer.Option(help="A state_dict: .safetensors, or as torch.save writes it.", show_default=False),
        ] = None,
        use_cache: Annotated[bool, typer.Option("--use-cache", help="With a key-value cache, to generate.")] = False,
        opset: Annotated[int, typer.Option(help="ONNX opset.")] = 23,
        inline: Annotated[bool, typer.Option("--inline", help="Operators in place of calls of a function.")] = False,
        ort_fusions: Annotated[
            Providers | None, typer.Option(help="Fuse for this provider of ONNX Runtime.", show_default=False)
        ] = None,
        tolerance: Annotated[
            float | None, typer.Option(help="Largest relative difference accepted.", show_default="1e-3 in float32")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Rewrite a model, export it to ONNX and compare it with PyTorch in ONNX Runtime.

        The file is written only if the two agree. A folder without a rewritten model's weights gets random ones: give
        trained ones with --weights.
        """
        options = {
            "use_cache": use_cache,
            "opset_version": opset,
            "functions": not inline,
            "ort_fusions": None if ort_fusions is None else str(ort_fusions),
            "tolerance": tolerance,
        }
        with telling_errors(as_json):
            config = make_config(blocks, layers_per_block, aggregation, streams)
            print(export_model(model, out, config, weights, as_json=as_json, **options))

    @app.command(
        epilog=examples(
            f"plot {EXAMPLE} --blocks 4 -o depth.html",
            f"plot {EXAMPLE} --blocks 4 --tokens random --json",
            then="A model that was trained has other weights: give the folder that save_pretrained wrote.",
        )
    )
    def plot(
        model: Model,
        out: Annotated[Path, typer.Option("--out", "-o", help="An image (.png, .svg, .pdf) or a page (.html).")] = Path(
            "depth.png"
        ),
        tokens: Annotated[
            str | None,
            typer.Option(
                help='A file of token ids, a sequence a line, or "random"; else the example\'s inputs.',
                show_default=False,
            ),
        ] = None,
        blocks: Annotated[str, typer.Option(help=f"{BLOCKS_HELP} A model that comes rewritten keeps its own.")] = "8",
        layers_per_block: LayersPerBlock = None,
        streams: Streams = None,
        as_json: AsJson = False,
    ) -> None:
        """Draw how much every read of a model attends to every source."""
        with telling_errors(as_json):
            config = make_config(blocks, layers_per_block, "mean", streams)
            print(plot_model(model, out, config, tokens, as_json=as_json))

    @app.command(
        epilog=examples(
            f"bench {EXAMPLE} --blocks 4 --rounds 5",
            f"bench {EXAMPLE} --blocks 4 --no-training --decode --json",
            then="docs/performance.md says what the figures depend on.",
        )
    )
    def bench(
        model: Model,
        blocks: Blocks = "8",
        layers_per_block: LayersPerBlock = None,
        aggregation: Aggregation = Aggregations.mean,
        streams: Streams = None,
        batch: Annotated[int | None, typer.Option(min=1, help="Sequences of tokens; else 2, or the example's.")] = None,
        length: Annotated[int | None, typer.Option(min=1, help="Tokens in each; else 256, or the example's.")] = None,
        rounds: Annotated[int, typer.Option(min=1, help="Timed rounds: a step of each form.")] = 20,
        warmup: Annotated[int, typer.Option(min=1, help="Rounds before them; the first compiles.")] = 3,
        seconds: Annotated[float | None, typer.Option(help="Time all rounds, but five, in as long as this.")] = None,
        device: Device = "auto",
        dtype: Annotated[Dtypes | None, typer.Option(help="Else as the model comes.", show_default=False)] = None,
        threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
        schedule: Annotated[Schedules, typer.Option(help="How sites are evaluated.")] = Schedules.auto,
        backend: Backend = "inductor",
        training: Annotated[bool, typer.Option(help="Training steps: forward, loss, backward, AdamW.")] = True,
        inference: Annotated[bool, typer.Option(help="Forwards without gradients.")] = True,
        decode: Annotated[bool, typer.Option(help="One token a sequence, with a filled key-value cache.")] = False,
        cached: Annotated[int | None, typer.Option(min=1, help="Tokens in it; else as many as --length.")] = None,
        alone: Annotated[bool, typer.Option(help="Compile times and memory too, which takes minutes.")] = False,
        out: Annotated[
            Path | None, typer.Option("--out", "-o", help="Write the results to this JSON file.", show_default=False)
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Time a model rewritten and compiled against the same model plain and compiled.

        Both take turns in one process: what counts is the ratio of their steps. The machine has to be idle.
        """
        with telling_errors(as_json):
            run_bench(
                model,
                out,
                as_json=as_json,
                alone=alone,
                blocks=parse_blocks(blocks),
                layers_per_block=layers_per_block,
                aggregation=str(aggregation),
                streams=streams,
                batch=batch,
                length=length,
                rounds=rounds,
                warmup=warmup,
                seconds=seconds,
                device=device,
                dtype=None if dtype is None else str(dtype),
                threads=threads,
                schedule=str(schedule),
                backend=backend,
                training=training,
                inference=inference,
                decode=decode,
                cached=cached,
            )

    @app.command(
        "build-onnx-kernel",
        epilog=examples(
            "build-onnx-kernel",
            "build-onnx-kernel --out attnres_kernel.so --json",
            then="Next, in Python: attnres_rewrite.onnx.register(session_options, 'model.onnx').",
        ),
    )
    def build_kernel(
        out: Annotated[
            Path | None,
            typer.Option(
                "--out", "-o", help="The library to write; else one in the user's folder of caches.", show_default=False
            ),
        ] = None,
        compiler: Annotated[
            str | None, typer.Option(help="The C++ compiler.", show_default="$CXX, c++, g++ or clang++")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Compile the kernel that ONNX Runtime can run sites with, in place of the functions in a file.

        It takes some seconds and GCC or Clang, on Linux or macOS. Sessions on the CPU take it by
        attnres_rewrite.onnx.register, or by the name of the library.
        """
        with telling_errors(as_json):
            print(build_onnx_kernel(out, compiler, as_json=as_json))

    return app


@contextlib.contextmanager
def telling_errors(as_json: bool) -> "Iterator[None]":
    """Print errors as JSON too, if that is asked for, and exit with status 1."""
    import typer

    from attnres_rewrite.errors import AttnResError

    try:
        yield
    except (AttnResError, CommandError) as error:
        if not as_json:
            raise
        print(f"attnres: {told(error)}", file=sys.stderr)
        print(json.dumps({"error": type(error).__name__, "message": str(error)}, indent=1))
        raise typer.Exit(1) from error
