"""What a pass is: a precondition, a call, a postcondition, and a line in the log."""

from __future__ import annotations

import abc
import dataclasses
import logging
import time
from typing import Any

from torch.fx import GraphModule

from attnres_rewrite.errors import AttnResError


class PostconditionError(AssertionError):
    """A pass did not do what it promises: a bug in this package, never in the user's model."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Something that must not be rewritten.

    Attributes:
        module: Path of the module where it was found.
        error: What to tell the user.
    """

    module: str
    error: AttnResError


def require_order(module: GraphModule) -> None:
    """Raise :class:`PostconditionError` unless the graph is in topological order."""
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise PostconditionError(str(error)) from error


class Pass(abc.ABC):
    """One step of the pipeline, over one graph module.

    A subclass implements :meth:`call`, and :meth:`requires` and :meth:`ensures` where it has something
    to demand or to promise. Calling the pass runs the three in turn and logs the time and what was done,
    which ``TORCH_LOGS="+attnres_rewrite.passes"`` shows.
    """

    def __call__(self, module: GraphModule, *inputs: Any) -> Any:
        """Check the precondition, run, check the postcondition, log."""
        self.requires(module, *inputs)
        start = time.perf_counter()
        result = self.call(module, *inputs)
        milliseconds = (time.perf_counter() - start) * 1e3
        self.ensures(module, result, *inputs)
        logger = logging.getLogger(type(self).__module__)
        logger.debug("%s: %s in %.1f ms", type(self).__name__, self.summary(result), milliseconds)
        return result

    def requires(self, module: GraphModule, *inputs: Any) -> None:  # noqa: B027
        """Raise a typed error if ``module`` is not something this pass can work on."""

    @abc.abstractmethod
    def call(self, module: GraphModule, *inputs: Any) -> Any:
        """Do the work; an analysis returns what it found, a transformation how many places it changed."""

    def ensures(self, module: GraphModule, result: Any, *inputs: Any) -> None:  # noqa: B027
        """Raise :class:`PostconditionError` if the result is not what this pass promises."""

    def summary(self, result: Any) -> str:
        """What the log says of the result."""
        return f"{result} changed" if isinstance(result, int) else "done"
