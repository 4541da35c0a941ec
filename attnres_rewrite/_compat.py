"""Every private PyTorch API that the package uses, behind names of our own.

Nothing else in the package imports ``torch._dynamo``, ``torch._inductor`` or another private
module, so a new PyTorch release is checked by reading this file.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import logging
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._dynamo
import torch.utils._pytree as pytree
from torch._functorch import config as functorch_config
from torch._subclasses import FakeTensorMode
from torch.backends import mha
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


def is_region(node: torch.fx.Node) -> bool:
    """Whether ``node`` is an operator that runs the graph in one of its arguments, as a checkpoint or in a mode.

    ``torch.export`` makes such operators of the parts of a program that run without gradients or under autocast.
    """
    modes = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)
    return is_checkpoint(node) or (node.op == "call_function" and node.target in modes)


def enter_mode(region: torch.fx.Node) -> Callable[[], object]:
    """Write, at the graph's insertion point, what sets the mode of ``region``; returns what writes its end."""
    graph = region.graph
    if region.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        enabled = region.args[0]
        set_grad_enabled(graph, bool(enabled), like=region)
        return lambda: set_grad_enabled(graph, not enabled, like=region)
    if region.target is torch.ops.higher_order.wrap_with_autocast:
        settings = tuple(itertools.takewhile(lambda argument: not isinstance(argument, torch.fx.Node), region.args))
        enter = _mode_node(graph, torch.amp.autocast_mode._enter_autocast, settings, region)
        return functools.partial(_mode_node, graph, torch.amp.autocast_mode._exit_autocast, (enter,), region)
    return lambda: None


def set_grad_enabled(graph: torch.fx.Graph, enabled: bool, *, like: torch.fx.Node) -> None:
    """Write, at the insertion point of ``graph``, that what comes after it records gradients, or that it does not."""
    _mode_node(graph, torch._C._set_grad_enabled, (enabled,), like)


def sets_grad_enabled(node: torch.fx.Node) -> bool | None:
    """Whether gradients are recorded after ``node``; ``None`` if it does not set that."""
    return bool(node.args[0]) if node.target is torch._C._set_grad_enabled else None


def _mode_node(graph: torch.fx.Graph, target: Any, arguments: tuple[Any, ...], like: torch.fx.Node) -> torch.fx.Node:
    node = graph.call_function(target, arguments)
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    if "val" in like.meta:
        # An exported program wants every node to have one.
        node.meta["val"] = None
    return node


def outline_modes(
    module: torch.fx.GraphModule, signature: torch.export.ExportGraphSignature
) -> tuple[torch.fx.GraphModule, torch.export.ExportGraphSignature]:
    """Make regions again of the parts of an exported graph that run in a mode, as ``torch.export`` itself does.

    Only so can the program be saved.
    """
    from torch._export.passes.replace_autocast_with_hop_pass import replace_autocast_with_hop_pass
    from torch._export.passes.replace_set_grad_with_hop_pass import replace_set_grad_with_hop_pass

    first = next((mode for n in module.graph.nodes if (mode := sets_grad_enabled(n)) is not None), False)
    # A part in the mode that is in force around a call becomes no region.
    with torch.set_grad_enabled(not first):
        module, new = replace_set_grad_with_hop_pass(module, signature)
    module, new = replace_autocast_with_hop_pass(module, new)
    assert new is not None
    return module, new


def recompute_tags(region_id: int) -> dict[str, Any]:
    """Node metadata that makes the partitioner recompute a node of checkpointed region ``region_id``."""
    return {**recompute_tag(), "ac_graph_id": region_id}


def recompute_tag() -> dict[str, Any]:
    """Node metadata that makes the partitioner recompute a node, which belongs to no region, in the backward."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {"recompute": CheckpointPolicy.PREFER_RECOMPUTE}


def reading_region(value: torch.fx.Node) -> int | None:
    """The checkpointed region in which ``value`` is read first; the one after its own if it is read in none.

    What one region computes and another reads, the partitioner saves. So a node that is cheap to compute
    from values that are saved in any case belongs to the region that reads it.
    """
    readers = [user.meta["ac_graph_id"] for user in value.users if "ac_graph_id" in user.meta]
    own = value.meta.get("ac_graph_id")
    return min(readers) if readers else own + 1 if own is not None else None


def move_to_region(node: torch.fx.Node, region_id: int | None) -> None:
    """Let the partitioner recompute ``node`` with the checkpointed region ``region_id``, or with none."""
    if region_id is not None:
        node.meta.update(recompute_tags(region_id))


def lookup_backend(name: str) -> Callable[..., Any]:
    """The ``torch.compile`` backend registered under ``name``."""
    from torch._dynamo.backends.registry import lookup_backend as lookup

    return lookup(name)


def is_backend(name: str) -> bool:
    """Whether ``torch.compile`` knows a backend of this name."""
    from torch._dynamo.backends.registry import list_backends

    return name in list_backends(exclude_tags=None)


def register_backend(name: str, backend: Callable[..., Any]) -> None:
    """Make ``torch.compile(backend=name)`` find ``backend``, unless an entry point already does."""
    from importlib.metadata import entry_points

    if name in entry_points(group="torch_dynamo_backends").names:
        return
    from torch._dynamo.backends import registry

    if name not in registry.list_backends(exclude_tags=None):
        registry.register_backend(compiler_fn=backend, name=name)


def inductor_compile(
    module: torch.fx.GraphModule,
    inputs: list[Any],
    mode: str | None,
    options: Any,
    joint_pass: Callable[[torch.fx.Graph], None],
) -> Any:
    """Compile ``module`` with Inductor under ``torch.compile``'s ``mode`` and ``options``.

    ``joint_pass`` is run over the graph of forward and backward before it is partitioned into the two.
    """
    import torch._inductor as inductor

    patches = dict(inductor.list_mode_options(mode)) if mode and mode != "default" else {}
    patches.update(options or {})
    before = patches.get("joint_custom_post_pass", inductor.config.joint_custom_post_pass)
    patches["joint_custom_post_pass"] = _inductor_pass(joint_pass, before)
    # The cache of compiled autograd graphs does not look at these tags, so it would not tell two models apart of
    # which one is checkpointed.
    tagged = any("ac_graph_id" in node.meta for node in module.graph.nodes)
    with functorch_config.patch(enable_autograd_cache=False) if tagged else contextlib.nullcontext():
        return inductor.compile(module, inputs, options=patches)


def _inductor_pass(function: Callable[[torch.fx.Graph], None], before: Any) -> Any:
    """``function`` as a pass of Inductor, after those that are set already."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    others = () if before is None else tuple(before) if isinstance(before, (list, tuple)) else (before,)

    class JointPass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for other in others:
                other(graph)
            function(graph)

        def uuid(self) -> Any:
            # None keeps the graph out of the caches on disk, which is what a pass without a name gets anywhere.
            names = [getattr(other, "uuid", lambda: None)() for other in others]
            mine = get_hash_for_files((inspect.getfile(function), __file__))
            return None if None in names else (*names, mine)

    return JointPass()


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python function under a code object of its own.

    Dynamo caches compiled graphs, and counts recompilations, per code object. A copy keeps the caches
    of different models apart.
    """
    new = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def unfused(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` with the fused kernel of ``nn.TransformerEncoderLayer`` off.

    Without gradients such a layer is one operator, inside which no residual add can be seen. The flag is
    assigned and not set by its function because this is also run by Dynamo, which cannot trace that.
    """
    before = mha._is_fastpath_enabled
    mha._is_fastpath_enabled = False
    try:
        return function(*args, **kwargs)
    finally:
        mha._is_fastpath_enabled = before


def compile_disabled() -> bool:
    """Whether ``torch.compile`` is switched off for this process."""
    stance: Any = torch._dynamo.eval_frame._stance
    return bool(torch._dynamo.config.disable) or stance.stance == "force_eager"


def graphs_compiled() -> int:
    """How many graphs Dynamo has captured in this process since its counters were reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def last_graph_break() -> str:
    """Dynamo's own words on the most recent graph break; empty if there was none."""
    reasons = torch._dynamo.utils.counters["graph_break"]
    return next(reversed(reasons), "") if reasons else ""


def graph_break_types() -> tuple[type[BaseException], ...]:
    """What Dynamo raises when it cannot capture a call as one graph."""
    return (torch._dynamo.exc.Unsupported,)


def refusing_graph_breaks(refuse: bool) -> Any:
    """A context in which, where ``refuse`` says so, Dynamo raises at a graph break as it traces."""
    return torch._dynamo.error_on_graph_break(refuse)


def capturing_scalars(capture: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which, where ``capture`` says so, Dynamo takes ``tensor.item()`` into the graph and goes on."""
    return torch._dynamo.config.patch(capture_scalar_outputs=True) if capture else contextlib.nullcontext()


def ignore_logged_warnings() -> None:
    """Let Dynamo leave out ``logger.warning_once``, which transformers adds and calls in the forward of its models."""
    warn_once = getattr(logging.Logger, "warning_once", None)
    if warn_once is not None:
        config = torch._dynamo.config
        config.ignore_logging_functions = {*config.ignore_logging_functions, warn_once}


def isolated_compile_options() -> dict[str, Any]:
    """Options of ``torch.compile`` that give one call a cache of its own, where this release has them."""
    has = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if has else {}


def fake_mode() -> FakeTensorMode:
    """A mode in which operators compute shapes alone, also on real parameters."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in a nest of containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> int | None:
    """What tells the storage of a tensor from others; ``None`` where it has none of its own, as a sparse one."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """``tree`` with ``function`` applied to every tensor in it."""
    return pytree.tree_map_only(torch.Tensor, function, tree)


def size_hint(size: torch.SymInt) -> int:
    """What a symbolic size was when it was traced."""
    return int(size.node.hint)


def size_at(size: int | torch.SymInt, known: Mapping[str, int]) -> int:
    """What ``size`` is where the symbols have the values in ``known``; the others have those of the trace."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    values = {symbol: known[str(symbol)] for symbol in expression.free_symbols if str(symbol) in known}
    return int(expression.subs(values)) if len(values) == len(expression.free_symbols) else size_hint(size)


def bounds(values: Any) -> tuple[int, float]:
    """Smallest and largest value of a range constraint of an exported program."""
    upper = values.upper
    return int(values.lower), float("inf") if str(upper) in ("int_oo", "oo") else int(upper)


def keyword_order(in_spec: Any) -> list[str]:
    """The keywords of the call that a program was exported with, in order."""
    _, kwargs = pytree.tree_unflatten([torch.empty(0)] * in_spec.num_leaves, in_spec)
    return list(kwargs)


def output_names(out_spec: Any) -> list[str]:
    """A name for every output of a program: the keys of mappings, and positions elsewhere, joined by dots."""
    tree = pytree.tree_unflatten([torch.empty(0)] * out_spec.num_leaves, out_spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    return [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths]


def is_jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` is running the code that asks."""
    return bool(torch._C._get_tracing_state())


def is_symbolically_tracing() -> bool:
    """Whether ``torch.fx`` (``symbolic_trace``, ``make_fx``) is tracing the code that asks."""
    from torch.fx._symbolic_trace import is_fx_symbolic_tracing

    return bool(is_fx_symbolic_tracing())


def copy_graph(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy of ``graph`` with its code generation, so with the calling convention of an exported program."""
    with warnings.catch_warnings():
        # Copying a pytree specification trips over a deprecation inside PyTorch itself.
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(graph)
