"""Every private PyTorch API that the package uses, behind names of our own.

Nothing else in the package imports ``torch._dynamo``, ``torch._inductor`` or another private
module, so a new PyTorch release is checked by reading this file.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch.fx.passes.fake_tensor_prop import FakeTensorProp as FakeTensorProp


def register_inductor_decomposition(op: torch._ops.OpOverload, decomposition: Callable[..., Any]) -> None:
    """Let Inductor expand ``op`` by ``decomposition`` instead of calling it as an opaque kernel."""
    from torch._inductor import decomposition as table

    table.decompositions[op] = decomposition
    # The table that Inductor really uses is a cached copy of this one.
    table.fast_random_decomps.cache_clear()


def is_checkpoint(node: torch.fx.Node) -> bool:
    """Whether ``node`` is the higher-order operator that activation checkpointing is captured as."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.tag_activation_checkpoint


def recompute_tags(region_id: int) -> dict[str, Any]:
    """Node metadata that makes the partitioner recompute a node of checkpointed region ``region_id``."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": region_id}


def lookup_backend(name: str) -> Callable[..., Any]:
    """The ``torch.compile`` backend registered under ``name``."""
    from torch._dynamo.backends.registry import lookup_backend as lookup

    return lookup(name)


def register_backend(name: str, backend: Callable[..., Any]) -> None:
    """Make ``torch.compile(backend=name)`` find ``backend``, unless an entry point already does."""
    from importlib.metadata import entry_points

    if name in entry_points(group="torch_dynamo_backends").names:
        return
    from torch._dynamo.backends import registry

    if name not in registry.list_backends(exclude_tags=None):
        registry.register_backend(compiler_fn=backend, name=name)


def inductor_compile(module: torch.fx.GraphModule, inputs: list[Any], mode: str | None, options: Any) -> Any:
    """Compile ``module`` with Inductor under ``torch.compile``'s ``mode`` and ``options``."""
    import torch._inductor as inductor

    patches = dict(inductor.list_mode_options(mode)) if mode and mode != "default" else {}
    patches.update(options or {})
    return inductor.compile(module, inputs, options=patches or None)


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python function under a code object of its own.

    Dynamo caches compiled graphs, and counts recompilations, per code object. A copy keeps the caches
    of different models apart.
    """
    copy = types.FunctionType(
        function.__code__.replace(),  # type: ignore[attr-defined]
        function.__globals__,  # type: ignore[attr-defined]
        function.__name__,  # type: ignore[attr-defined]
        function.__defaults__,  # type: ignore[attr-defined]
        function.__closure__,  # type: ignore[attr-defined]
    )
    copy.__kwdefaults__ = function.__kwdefaults__  # type: ignore[attr-defined]
    return copy


def compile_disabled() -> bool:
    """Whether ``torch.compile`` is switched off for this process."""
    return bool(torch._dynamo.config.disable)


def last_graph_break() -> str:
    """Dynamo's own words on the most recent graph break; empty if there was none."""
    reasons = torch._dynamo.utils.counters["graph_break"]
    return next(reversed(reasons), "") if reasons else ""


def graph_break_types() -> tuple[type[BaseException], ...]:
    """What Dynamo raises when it cannot capture a call as one graph."""
    return (torch._dynamo.exc.Unsupported,)


def isolated_compile_options() -> dict[str, Any]:
    """Options of ``torch.compile`` that give one call a cache of its own, where this release has them."""
    has = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if has else {}
