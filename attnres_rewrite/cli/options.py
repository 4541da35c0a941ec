"""The options that several commands have, and the words of their help."""

# No postponed annotations here: typer reads them.
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from attnres_rewrite.model_names import completions

if TYPE_CHECKING:
    from attnres_rewrite import AttnResConfig

BACKENDS = ("inductor", "aot_eager", "eager")
EXIT_STATUS = "Exit status: 0, done; 1, an error, which is told on standard error; 2, the command line is wrong."
# A model that every installation has.
EXAMPLE = "attnres_rewrite.demo:llama"


class Aggregations(StrEnum):
    """Values of ``--aggregation``."""

    mean = "mean"
    sum = "sum"
    add = "add"


class Schedules(StrEnum):
    """Values of ``--schedule``."""

    auto = "auto"
    per_read = "per_read"
    two_phase = "two_phase"


class Dtypes(StrEnum):
    """Values of ``--dtype``."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Providers(StrEnum):
    """Values of ``--ort-fusions``."""

    cpu = "cpu"
    cuda = "cuda"
    webgpu = "webgpu"
    dml = "dml"


def complete_model(incomplete: str) -> list[str]:
    """What the shell offers for MODEL."""
    return completions(incomplete)


def complete_backend(incomplete: str) -> list[str]:
    """What the shell offers for ``--backend``; others that are installed can be typed."""
    return [name for name in BACKENDS if name.startswith(incomplete)]


MODEL_HELP = (
    "A folder with the config.json of a Hugging Face model, or module:factory, where factory is a function without "
    "arguments that returns a model, or a model and example inputs for it."
)
BLOCKS_HELP = 'Number of blocks, "full", "auto" (for the model\'s size), or the layers in every block, such as 2,2,4,4.'

Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", autocompletion=complete_model)]
Blocks = Annotated[str, typer.Option(help=BLOCKS_HELP)]
LayersPerBlock = Annotated[
    int | None, typer.Option(min=1, help="Instead of --blocks: groups of this many layers.", show_default=False)
]
Aggregation = Annotated[
    Aggregations, typer.Option(help="mean is the paper's; sum starts as the plain model everywhere.")
]
Streams = Annotated[
    list[str] | None,
    typer.Option(help="Rewrite the stream of this module alone; may be given again.", show_default=False),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto is the GPU if there is one.")]
Backend = Annotated[str, typer.Option(help="What compiles both models.", autocompletion=complete_backend)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]


def examples(*commands: str, then: str) -> str:
    """The end of a command's help: commands that run as they are written, and what comes next."""
    # The help joins lines, but not paragraphs.
    return "\n\n".join(["Examples:", *(f"  attnres {command}" for command in commands), then])


def wrong(option: str, message: str) -> NoReturn:
    """Exit with status 2: ``option`` has no such value."""
    raise typer.BadParameter(message, param_hint=f"'{option}'")


def parse_blocks(text: str) -> "int | Literal['full', 'auto'] | tuple[int, ...]":
    """``"full"``, ``"auto"``, a number, or numbers with commas between them; exits with status 2 for all else."""
    if text == "full":
        return "full"
    if text == "auto":
        return "auto"
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        wrong("--blocks", f'a number, "full" or "auto", or the layers in every block (2,2,4,4), not {text!r}')
    return sizes[0] if len(sizes) == 1 else sizes


def make_config(
    blocks: str, layers_per_block: int | None, aggregation: str, streams: Sequence[str] | None
) -> "AttnResConfig":
    """The configuration that the options of a command mean.

    Raises:
        BlockPartitionError: The options say twice how layers are grouped.
    """
    from attnres_rewrite import AttnResConfig

    chosen: Any = {"layers_per_block": layers_per_block, "aggregation": str(aggregation), "streams": streams or None}
    return AttnResConfig(parse_blocks(blocks), **chosen)
