"""Every private PyTorch API that the package uses, behind names of our own.

Nothing else in the package imports ``torch._dynamo``, ``torch._inductor`` or another private
module, so a new PyTorch release is checked by reading this file.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib.abc
import importlib.util
import inspect
import itertools
import logging
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode
from torch.backends import mha
from torch.fx.passes.fake_tensor_prop import FakeTensorProp as FakeTensorProp
from torch.nn.modules import module as module_hooks
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    # At run time torch imports it at first use; it takes seconds.
    import torch._dynamo


_Hook = TypeVar("_Hook")
_NO_LIMIT = 2**30
_INDUCTORS_TABLE = "torch._inductor.decomposition"
_expansions: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


# What a node of a graph may call: an operator with a schema, and one that runs graphs of its own.
Overload = torch._ops.OpOverload
HigherOrderOperator = torch._ops.HigherOrderOperator
# What every convolution is one of.
Convolution = torch.nn.modules.conv._ConvNd


def schemas_of(target: object) -> tuple[Any, ...]:
    """The schemas of an operator: one of an overload, all of one that Python has yet to choose from; else none."""
    if isinstance(target, torch._ops.OpOverload):
        return (schema_of(target),)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return tuple(schema_of(getattr(target, name)) for name in target.overloads())
    return ()


def schema_of(operator: torch._ops.OpOverload) -> Any:
    """The arguments and returns of an operator, and which of them share memory or are written."""
    return operator._schema


def is_triton_kernel(target: object) -> bool:
    """Whether this is the operator that Dynamo captures the launch of a kernel of the user's as."""
    return isinstance(target, HigherOrderOperator) and target.name() == "triton_kernel_wrapper_mutation"


def written_by_kernel(**given: Any) -> list[str]:
    """The names of the tensors that such a launch writes into, by Triton's code of the kernel.

    Where that cannot be had PyTorch says all of them, and why in a warning.
    """
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors

    launch = {name: value for name, value in given.items() if name != "grid"}
    return get_mutated_tensors(**launch)


def register_inductor_decomposition(op: torch._ops.OpOverload, decomposition: Callable[..., Any]) -> None:
    """Let Inductor expand ``op`` by ``decomposition`` instead of calling it as an opaque kernel.

    Inductor takes seconds to import. Where it is not imported yet, its table gets the expansion when it is, whoever
    imports it: a rewritten program that was loaded from a file is compiled without any other part of this package.
    """
    _expansions[op] = decomposition
    after_import(_INDUCTORS_TABLE, _fill_table)


def register_decomposition(
    op: torch._ops.OpOverload, decomposition: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Let PyTorch know ``decomposition`` of ``op``, as whoever expands what it does not implement looks it up.

    ``torch.onnx.export`` is one. With sizes that are not known, fake tensors would from then on run the decomposition
    to learn the shape of a result; ``fake`` says it at once, so it is in the table that is asked first.
    """
    tables = torch._decomp.global_decomposition_table
    tables["post_autograd"][op] = decomposition
    tables["meta"][op] = fake


def _fill_table(table: Any) -> None:
    table.decompositions.update(_expansions)
    # The table that Inductor really uses is a cached copy of this one.
    table.fast_random_decomps.cache_clear()


def after_import(name: str, action: Callable[[Any], object]) -> None:
    """Call ``action`` with the module ``name``: now if it is imported, else right after it is, whoever imports it."""
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _OnImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport(name, action))


class _OnImport(importlib.abc.MetaPathFinder):
    """Does something with a module right after it is imported."""

    def __init__(self, name: str, action: Callable[[Any], object]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_act(module: types.ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def is_checkpoint(node: torch.fx.Node) -> bool:
    """Whether ``node`` is the higher-order operator that activation checkpointing is captured as."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.tag_activation_checkpoint


def invoke_subgraph() -> Any:
    """The operator that calls a graph and is compiled once for all calls; ``None`` where this release has none."""
    return getattr(torch.ops.higher_order, "invoke_subgraph", None)


@contextlib.contextmanager
def calls_write_nothing(*, sure: bool) -> Iterator[None]:
    """Spare :func:`invoke_subgraph` to look, at every call that is differentiated, whether it writes into an operand.

    It traces the graph once more to see it, a tenth of a second for a layer. Who is ``sure`` compiles no call that
    does; otherwise, and in releases without the switch, all are looked at.
    """
    called, switch = invoke_subgraph(), "_supports_training_input_mutation"
    before = getattr(called, switch, None) if sure else None
    if before is not None:
        setattr(called, switch, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(called, switch, before)


def operators_run(
    function: Callable[..., Any], arguments: list[Any]
) -> tuple[tuple[Any, ...], list[tuple[str, bool, set[int]]]]:
    """Run ``function`` on fake arguments, without gradients.

    Returns:
        Its results; and for every ATen operator that ran: its name, whether it drew random numbers, and the storages
        that it wrote into.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[tuple[str, bool, set[int]]] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            arguments = operator._schema.arguments
            given = {a.name: a.default_value for a in arguments if a.has_default_value()}
            given |= {**dict(zip((a.name for a in arguments), args, strict=False)), **(kwargs or {})}
            # Attention that drops nothing has the tag too.
            random = torch.Tag.nondeterministic_seeded in operator.tags and given.get("dropout_p") != 0.0
            written = [given.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
            storages = {s for tensor in tensors_in(written) if (s := storage_of(tensor)) is not None}
            found.append((str(operator), random, storages))
            return operator(*args, **(kwargs or {}))

    # Tensors that operators make of numbers have to be fake too.
    fake = next((tensor.fake_mode for tensor in tensors_in(arguments) if hasattr(tensor, "fake_mode")), None)
    # Without the Python dispatcher a product of matrices with symbolic sizes fails in torch 2.11.
    python = enable_python_dispatcher()
    with torch.no_grad(), fake or contextlib.nullcontext(), python, Recording():  # type: ignore[no-untyped-call]
        results = function(*arguments)
    return tuple(results), found


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


def forget_input_values(node: torch.fx.Node) -> None:
    """Forget the arguments that ``node`` was traced with, after some were added: Inductor would drop those."""
    node.meta.pop("eager_input_vals", None)


def recompute_tag() -> dict[str, Any]:
    """Node metadata that makes the partitioner recompute a node, which belongs to no region, in the backward."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {"recompute": CheckpointPolicy.PREFER_RECOMPUTE}


def reading_region(value: torch.fx.Node) -> int | None:
    """The checkpointed region that reads ``value`` first. If no region reads it, the next one after its own region.

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


# Nodes that Inductor may fuse into one kernel on a GPU. The backward of a read of nine sources has more than the 64 of
# its default; it would be cut into two kernels, each of which reads every source.
GPU_FUSION_SIZE = 512
# What Inductor estimates for the peak of memory has in it what a fused kernel keeps in registers, in one of reads
# several times what it writes. By that it would leave the order of autograd for a worse one, and hold what is free.
GPU_MEMORY: dict[str, Any] = {"reorder_for_peak_memory": False}
# Not in inference: of a small step, freeing and allocating would be a part.
GPU_MEMORY_IN_TRAINING = {**GPU_MEMORY, "allow_buffer_reuse": False}
# Widths up to which a read on a GPU keeps its sources in registers between the two passes over them. Inductor's own
# limit is 1024. Measured on an H100 (docs/performance.md): at 2048 a read of nine sources is 1.5 times as fast so, and
# at 7168, where the registers do not suffice, it is slower.
_WIDTH_IN_REGISTERS = 2048


def choices_for_reads() -> contextlib.AbstractContextManager[Any]:
    """A context in which Inductor generates persistent reductions for reads of up to ``_WIDTH_IN_REGISTERS``.

    And in which it fuses two parts of them only where no matrix product lies between. Two sites have sources in common:
    in the backward, the result of a site would be computed again together with what a later one needs, and be kept
    until it is its turn.
    """
    from torch._inductor.virtualized import V

    own = type(V.choices)
    calls: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    class ChoicesForReads(own):  # type: ignore[misc, valid-type]
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if _is_read(features) and not cooperative_reduction and features.get_reduction_hint().name == "INNER":
                fits: bool = V.graph.sizevars.statically_known_leq(features.reduction_numel, _WIDTH_IN_REGISTERS)
                return fits
            chosen: bool = own.should_use_persistent_reduction(features, cooperative_reduction)
            return chosen

        @staticmethod
        def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            if scheduler not in calls:
                products = [node for node in scheduler.name_to_node.values() if node.is_extern() or node.is_template()]
                # What was found to be dead has no place in the order.
                calls[scheduler] = [node.min_order for node in products if hasattr(node, "min_order")]
            first, second = sorted((node1, node2), key=lambda node: node.min_order)
            apart = any(first.max_order < call < second.min_order for call in calls[scheduler])
            if apart and (_computes_read(first) or _computes_read(second)):
                return False
            fused: bool = own.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)
            return fused

    chosen: contextlib.AbstractContextManager[Any] = V.set_choices_handler(ChoicesForReads())
    return chosen


def _is_read(features: Any) -> bool:
    """Whether a kernel of Inductor's computes a part of an operator of this package."""
    return any(map(_computes_read, features.scheduler_nodes()))


def _computes_read(scheduled: Any) -> bool:
    """Whether what Inductor schedules, a buffer or several fused ones, is a part of an operator of this package."""
    origins = (origin for node in scheduled.get_nodes() if node.node for origin in node.node.origins)
    return any(str(origin.meta.get("original_aten")).startswith("attnres.") for origin in origins)


def inductor_modes() -> list[str]:
    """What ``torch.compile(mode=...)`` takes for Inductor."""
    from torch._inductor import list_mode_options

    return ["default", *(mode for mode in list_mode_options() if mode != "default")]


def uses_cpp_wrapper(options: Any) -> bool:
    """Whether Inductor, with these options, writes C++ in the place of Python around its kernels."""
    import torch._inductor.config as config

    return bool((options or {}).get("cpp_wrapper", config.cpp_wrapper))


def compile_cpp(source: str) -> ctypes.PyDLL:
    """The functions of a C++ source, compiled and cached as Inductor's own kernels are.

    They are called with the lock of the interpreter, and may take what it has for arguments.
    """
    from torch._inductor.codecache import CppCodeCache

    library = CppCodeCache.load(source, extra_flags=("-ftree-loop-vectorize", "-ffp-contract=fast"))
    return ctypes.PyDLL(library._name)


def tensor_data_function() -> int:
    """The address of a C function from a tensor, as Python has it, to its data; Inductor's own kernels use it."""
    guards: Any = torch._C._dynamo.guards
    return int(guards._torchinductor_pyobject_tensor_data_ptr)


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
    from torch._functorch import config as functorch_config

    patches = dict(inductor.list_mode_options(mode)) if mode and mode != "default" else {}
    patches.update(options or {})
    on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)
    if on_gpu:
        patches.setdefault("max_fusion_size", max(inductor.config.max_fusion_size, GPU_FUSION_SIZE))
        trains = torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in inputs)
        patches = (GPU_MEMORY_IN_TRAINING if trains else GPU_MEMORY) | patches
    before = patches.get("joint_custom_post_pass", inductor.config.joint_custom_post_pass)
    patches["joint_custom_post_pass"] = _inductor_pass(joint_pass, before)
    # The cache of compiled autograd graphs does not look at these tags, so it would not tell two models apart of
    # which one is checkpointed.
    tagged = any("ac_graph_id" in node.meta for node in module.graph.nodes)
    cached = functorch_config.patch(enable_autograd_cache=False) if tagged else contextlib.nullcontext()
    choices = choices_for_reads() if on_gpu else contextlib.nullcontext()
    tag = f"{torch.compiler.config.cache_key_tag}attnres-{_expansions_version()}"
    with cached, choices, torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return inductor.compile(module, inputs, options=patches)


@functools.cache
def _expansions_version() -> str:
    """What the caches on disk, which know an operator by its name alone, tell its expansions apart by."""
    folder = Path(__file__).parent / "ops"
    sources = b"".join(path.read_bytes() for path in (*sorted(folder.glob("*.py")), Path(__file__)))
    return hashlib.sha256(sources).hexdigest()[:16]


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


def compiled_function(function: Any) -> Callable[..., Any] | None:
    """What ``torch.compile`` made ``function`` from, or ``None`` if that did not make it."""
    original: Callable[..., Any] | None = getattr(function, "_torchdynamo_orig_callable", None)
    return original


def compiled_call(module: torch.nn.Module) -> Any:
    """What ``module.compile()`` made, which a call of ``module`` runs; ``None`` if it is not compiled."""
    return module._compiled_call_impl


def set_compiled_call(module: torch.nn.Module, call: Any) -> None:
    """Let a call of ``module``, which need not be complete, run ``call``; with ``None`` its hooks and its forward."""
    module.__dict__["_compiled_call_impl"] = call


def compile_call(module: torch.nn.Module, **options: Any) -> Callable[..., Any]:
    """What ``module.compile(**options)`` lets a call of ``module`` run, with a cache of its own."""
    call: Callable[..., Any] = torch.compile(module._call_impl, **options, **isolated_compile_options())
    return call


def call_uncompiled(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The hooks and the forward of ``module``, past what :func:`compiled_call` gives."""
    return module._call_impl(*args, **kwargs)


# What ``push_to_hub`` of a model of transformers uploads a folder with.
UPLOAD = "_upload_modified_files"
# The method by which ``nn.DataParallel`` makes a copy for another device: a shallow one.
REPLICATE = "_replicate_for_data_parallel"


def pre_hooks(module: torch.nn.Module, kind: type[_Hook]) -> list[_Hook]:
    """The forward pre-hooks of ``module`` that are a ``kind``."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kind)]


def remove_pre_hooks(module: torch.nn.Module, kind: type) -> None:
    """Take the forward pre-hooks that are a ``kind`` off ``module``, whose handles a copy does not have."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, kind)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def remove_load_hooks(module: torch.nn.Module, kind: type) -> None:
    """Take the pre-hooks of ``load_state_dict`` that are a ``kind`` off ``module``."""
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, wrapped in hooks.items() if isinstance(getattr(wrapped, "hook", None), kind)]:
        del hooks[key]


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing; up to torch 2.12 Dynamo takes the public function for true in any trace."""
    return torch.compiler._is_exporting_flag


def callbacks_beside(callback: object) -> list[Any]:
    """All callbacks of the Trainer of transformers that is calling ``callback``; none if something else calls it.

    The loggers are among them. Transformers gives a callback no way to these, but what calls them all is on the stack.
    """
    module, frame = sys.modules.get("transformers.trainer_callback"), inspect.currentframe()
    while frame is not None and module is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, module.CallbackHandler) and any(one is callback for one in handler.callbacks):
            return list(handler.callbacks)
        frame = frame.f_back
    return []


def forget_attention(config: Any, name: str) -> None:
    """Let transformers choose the attention implementation of a model, where its configuration says ``name``."""
    if config._attn_implementation == name:
        config._attn_implementation = None


def set_missing(enumeration: Any, missing: Callable[[type, object], None]) -> None:
    """Let ``missing`` be asked for a value that no member of ``enumeration`` has."""
    enumeration._missing_ = classmethod(missing)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether something runs before or after the forward of ``module``, or its backward."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind, None) for kind in kinds)


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


def active_dispatch_modes() -> list[Any]:
    """The ``TorchDispatchMode`` objects, such as that of ``FlopCounterMode``, which watch what this thread computes."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return list(_get_current_dispatch_mode_stack())


@contextlib.contextmanager
def without_dispatch_modes() -> Iterator[None]:
    """A context in which they do not. Dynamo compiles nothing while they do, and cannot trace their module tracker."""
    from torch.utils._python_dispatch import _disable_current_modes
    from torch.utils.module_tracker import ModuleTracker

    taken = []
    for hooks in (module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), ModuleTracker):
                taken.append((hooks, key, hooks.pop(key)))
    try:
        with _disable_current_modes():
            yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook


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


def _is_tracing_within(function: Callable[..., Any]) -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    code, frame = function.__code__, inspect.currentframe()
    while frame is not None:
        # Dynamo has no public way to tell what it is inlining; its translators are on the stack as it traces.
        if frame.f_code.co_varnames[:1] == ("self",):
            translator = frame.f_locals.get("self")
            if isinstance(translator, InstructionTranslatorBase) and translator.f_code is code:
                return True
        frame = frame.f_back
    return False


def is_tracing_within(function: Callable[..., Any]) -> bool:
    """Whether Dynamo is tracing what ``function``, a Python function, has called; asked when it traces, a constant."""
    return _is_tracing_within(function)


# What torch.compiler.assume_constant_result does, which imports Dynamo for it.
is_tracing_within._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_in_backward() -> bool:
    """Whether autograd is computing gradients in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def tracing_settings(scalars: bool, *, whole: bool = False) -> contextlib.AbstractContextManager[Any]:
    """A context for a call that may be traced: Dynamo leaves out what transformers logs in the forward of its models.

    Args:
        scalars: Whether Dynamo takes ``tensor.item()`` into the graph, and goes on.
        whole: Whether Dynamo leaves a graph whole that it would split at the buckets of ``DistributedDataParallel``.
    """
    config, changes = torch._dynamo.config, dict[str, Any]()
    if scalars:
        changes["capture_scalar_outputs"] = True
    # Its other modes do not split.
    if whole and config.optimize_ddp in (True, "ddp_optimizer"):
        changes["optimize_ddp"] = False
    # ``logger.warning_once``, which transformers adds to the class.
    warn_once = getattr(logging.Logger, "warning_once", None)
    if warn_once is not None and warn_once not in config.ignore_logging_functions:
        functions = {*config.ignore_logging_functions, warn_once}
        changes["ignore_logging_functions"] = _Unlogged.fromkeys(functions) if _logs_functions() else functions
    return config.patch(**changes) if changes else contextlib.nullcontext()


class _Unlogged(dict[Any, None]):
    """Keys that JSON does not see, in the place of a set; torch 2.11 writes the settings of a compilation as JSON."""

    def items(self) -> Any:
        """None."""
        return {}.items()


@functools.cache
def _logs_functions() -> bool:
    """Whether this release fails to log its settings while functions are among them; it logs an error if it does."""
    with torch._dynamo.config.patch(ignore_logging_functions={print}):
        try:
            torch._dynamo.utils._get_dynamo_config_for_logging()
        except TypeError:
            return True
    return False


def without_recompile_limit() -> Any:
    """A context in which Dynamo goes on compiling code that it has compiled many times, for other models."""
    return torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT)


def isolated_compile_options() -> dict[str, Any]:
    """Options of ``torch.compile`` that give one call a cache of its own, where this release has them."""
    has = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if has else {}


def fake_mode() -> FakeTensorMode:
    """A mode in which operators compute shapes alone, also on real parameters."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def leaves(tree: Any) -> list[Any]:
    """What is in nested lists, tuples and dictionaries, in order."""
    return list(pytree.tree_leaves(tree))


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in a nest of containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether ``tensor``, fake or not, is no tensor of tensors, as a ``DTensor`` is."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return not is_traceable_wrapper_subclass(tensor)


def storage_of(tensor: torch.Tensor) -> int | None:
    """What tells the storage of a tensor from others; ``None`` where it has none of its own, as a sparse one."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """``tree`` with ``function`` applied to every tensor in it."""
    return pytree.tree_map_only(torch.Tensor, function, tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``function`` applied to everything in it that is no container."""
    return pytree.tree_map(function, tree)


def has_body(tree: Any) -> bool:
    """Whether there is a module in ``tree``: the arguments are those of a higher-order operator, which runs it."""
    return any(isinstance(leaf, torch.nn.Module) for leaf in pytree.tree_leaves(tree))


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
    """A name for every output of a program, as :func:`leaf_names` gives them."""
    return leaf_names(pytree.tree_unflatten([torch.empty(0)] * out_spec.num_leaves, out_spec))


def leaf_names(tree: Any) -> list[str]:
    """A name for everything in ``tree``: the keys of mappings, and positions elsewhere, joined by dots."""
    try:
        paths, _ = pytree.tree_flatten_with_path(tree)
    except ValueError:
        # A class in it was registered without names, as diffusers registers its outputs.
        if not isinstance(tree, Mapping):
            return [str(i) for i in range(len(pytree.tree_leaves(tree)))]
        named = [(str(key), name) for key, value in tree.items() for name in leaf_names(value)]
        return [".".join(filter(None, names)) for names in named]
    return [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths]


def named_tensors(tree: Any) -> dict[str, torch.Tensor]:
    """The tensors in ``tree`` under the names that :func:`leaf_names` gives them, in order."""
    pairs = zip(leaf_names(tree), pytree.tree_leaves(tree), strict=True)
    return {name: leaf for name, leaf in pairs if isinstance(leaf, torch.Tensor)}


def forget_window_size(layer: Any) -> None:
    """Take the tensor off a cache's ``layer`` in which transformers keeps the size of its window beside a number."""
    vars(layer).pop("_sliding_window_tensor", None)


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


def active_data_parallel() -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` whose forward is running, if one is."""
    active: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return active


def parameters_known_to(wrapper: DistributedDataParallel) -> set[int]:
    """The ids of the parameters that ``wrapper`` reduces the gradients of, or was told to leave alone."""
    ignored = {id(p) for name, p in wrapper.module.named_parameters() if name in wrapper.parameters_to_ignore}
    return ignored | {id(p) for p in wrapper._module_parameters}


def is_managed_by_fsdp(module: torch.nn.Module) -> bool:
    """Whether ``fully_shard``, ``replicate`` or ``FullyShardedDataParallel`` manages the parameters of ``module``."""
    # Nobody has composed anything who has not imported it.
    composable: Any = sys.modules.get("torch.distributed._composable_state")
    if composable is None:
        return False
    return bool(module.__dict__.get("_is_fsdp_managed_module")) or composable._get_module_state(module) is not None


def is_flattened_by_fsdp(module: torch.nn.Module) -> bool:
    """Whether ``FullyShardedDataParallel`` has made one flat parameter of those of ``module``."""
    if not module.__dict__.get("_is_fsdp_managed_module", False):
        return False
    first = next(module.parameters(), None)
    # While it runs, its modules have views of the flat parameter in place of parameters, or none at all.
    return not isinstance(first, torch.nn.Parameter) or bool(getattr(first, "_fsdp_flattened", False))


def split_by_pipelining() -> tuple[torch.nn.Module, Mapping[str, bool]] | None:
    """The module that ``pipeline`` of ``torch.distributed.pipelining`` is tracing, and the modules it is cut at.

    With each whether the cut is before the module, not after it. What marks the places says nothing where it does not
    find a call, but what traces is on the stack. The marks of an earlier ``pipeline`` are still there, and cut.
    """
    package, frame = sys.modules.get("torch.distributed.pipelining"), inspect.currentframe()
    code = package.pipeline.__code__ if package is not None else None
    while frame is not None and code is not None:
        if frame.f_code is code:
            module: torch.nn.Module = frame.f_locals["module"]
            before = sys.modules["torch.distributed.pipelining._IR"]._split_before_forward
            marked = {n: part for n, part in module.named_modules() if "_orig_forward" in vars(part)}
            return (module, {name: part.forward.__func__ is before for name, part in marked.items()})
        frame = frame.f_back
    return None


def watch_checkpoint_plans(module: Any, check: Callable[..., object], kind: type[Exception]) -> None:
    """Let ``check`` look at every load of a distributed checkpoint when it is planned, before anything is read.

    Args:
        module: ``torch.distributed.checkpoint.state_dict_loader``.
        check: Takes what is to be loaded, flat, what the checkpoint has, and what reads one tensor of it by its name.
            Called by every process on its own; what one of them raises ends the load in all.
        kind: What ``check`` raises. It is raised as it is, in place of PyTorch's collection of all errors.
    """
    load = module._load_state_dict
    signature = inspect.signature(load)

    @functools.wraps(load)
    def watched(*args: Any, **kwargs: Any) -> None:
        from torch.distributed.checkpoint._nested_dict import flatten_state_dict
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        call = signature.bind(*args, **kwargs)
        reader = call.arguments["storage_reader"]
        planner: Any = call.arguments.get("planner") or DefaultLoadPlanner()
        call.arguments["planner"] = planner
        set_up = planner.set_up_planner

        def set_up_checked(state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
            saved = metadata.state_dict_metadata if metadata is not None else {}

            def read(name: str) -> torch.Tensor:
                found = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype, device="cpu")}
                load(found, reader, no_dist=True)
                return found[name]

            check(flatten_state_dict(state_dict)[0], saved, read)
            set_up(state_dict, metadata, is_coordinator)

        planner.set_up_planner = set_up_checked
        try:
            load(*call.args, **call.kwargs)
        except CheckpointException as error:
            for failure, _ in error.failures.values():
                if isinstance(failure, kind):
                    raise failure from error
            raise
        finally:
            del planner.set_up_planner

    module._load_state_dict = watched


def watch_state_dict_setters(module: Any, check: Callable[[torch.nn.Module, Mapping[str, Any]], object]) -> None:
    """Let ``check`` look at every ``state_dict`` that is set through ``module`` before anything of it is copied.

    Args:
        module: ``torch.distributed.checkpoint.state_dict``.
        check: Takes the model and the ``state_dict``. What it raises where the weights are is raised in every process.
    """
    setter = module._load_model_state_dict

    @functools.wraps(setter)
    def watched(model: torch.nn.Module, state_dict: dict[str, Any], info: Any) -> Any:
        error: list[Any] = [None]
        try:
            check(model, state_dict)
        except Exception as found:
            error = [found]
        if info.handle_model and info.broadcast_from_rank0:
            torch.distributed.broadcast_object_list(error, src=0)
        if error[0] is not None:
            raise error[0]
        return setter(model, state_dict, info)

    module._load_model_state_dict = watched


def unwrapped_names(model: torch.nn.Module, key: str) -> set[str]:
    """The names of what ``model`` has under ``key``, without those of wrappers, as checkpoints have them."""
    state_dict: Any = sys.modules["torch.distributed.checkpoint.state_dict"]
    names: set[str] = state_dict._get_fqns(model, key)
    return names
