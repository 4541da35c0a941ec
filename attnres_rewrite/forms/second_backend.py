"""A backend beside the model's own, for the calls that look at a model, and what it has compiled of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import GraphModule

from attnres_rewrite.capture.inputs import compiled

Backend = Callable[[GraphModule, list[Any]], Callable[..., Any]]


class SecondBackend:
    """What one backend has compiled of a rewritten model.

    The model is an argument of what is compiled, so nothing here keeps it alive.

    Args:
        backend: Rewrites the graphs that it is given, as :class:`AttnResBackend` does.
        scalars: Whether the model is one graph only if ``tensor.item()`` is taken into it.

    Attributes:
        backend: The backend.
        of_owner: What it compiled of every owner by itself, by the ``id`` of the owner's live forward.
        of_model: The call of a model that is one graph; takes the model, then the arguments.
    """

    def __init__(self, backend: Backend, *, scalars: bool = False) -> None:
        self.backend = backend
        self.of_owner: dict[int, Callable[..., Any]] = {}
        self.of_model = compiled(_call, backend, scalars=scalars)

    def on(self, model: nn.Module) -> Callable[..., Any]:
        """The call of ``model`` as one graph."""
        return functools.partial(self.of_model, model)


def _call(model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)
