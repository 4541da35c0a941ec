"""What is being done, in a line on the terminal."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

# Where the library logs the stages of an export.
_STAGES = "attnres_rewrite.onnx"


class _Shown(logging.Handler):
    """Shows what is logged."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        self.show(record.getMessage())


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A line on standard error with the stage and the time that passed; it is gone afterwards.

    Where standard error is no terminal, nothing is shown.

    Yields:
        To be called with the stage, as it begins. Stages that the library logs are shown too.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(stage: str) -> None:
            # A compiler that runs may leave no time to refresh later.
            progress.update(task, description=stage, refresh=True)

        logger, handler = logging.getLogger(_STAGES), _Shown(show)
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield show
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
