"""Time of the passes against the depth of the graph.

Two graphs of 10 to 2,000 layers. "llama" is Hugging Face's Llama in Dynamo's dialect: three layers are captured, and
the middle one is repeated, which gives node for node what a deep capture gives (checked at the smallest depth) without
the hours of tracing. "nested" is a transformer, traced by torch.fx, whose branches hold residual sums of their own.
Both have tiny widths: the passes see shapes, not data.

The passes are timed one by one, postconditions included, over the whole pipeline (``analyse`` and ``insert``). The
exponent is the slope of log time against log depth by least squares; "tail" fits the sizes from 300 layers on,
where constant costs no longer flatter it.

    python benchmarks/scaling.py [--layers 10 30 100 300 1000 2000] [--blocks 8] [--profile 1000]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import cProfile
import gc
import pstats
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite
from attnres_rewrite.capture.dynamo import capture_whole
from attnres_rewrite.capture.inputs import example_call
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.forms.graph_module import with_metadata
from attnres_rewrite.graph.nodes import GraphBuilder, indices, module_stack, op_name, require_tensor
from attnres_rewrite.passes import SiteParameters
from attnres_rewrite.passes.base import Pass
from attnres_rewrite.pipeline import analyse, insert
from attnres_rewrite.streams import StreamPlan

RESULTS = Path(__file__).parent / "results" / "scaling.json"
WIDTH, VOCABULARY, LENGTH = 16, 32, 6
TAIL = 300
IDS = torch.arange(LENGTH).reshape(1, LENGTH)


# The Llama, deepened


def captured_llama(layers: int) -> GraphModule:
    """What Dynamo captures of a tiny Llama."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    return capture_whole(model, example_call(model, IDS))


def deepened(module: GraphModule, layers: int) -> GraphModule:
    """A copy of ``module``, which has three layers, with the middle one repeated to make ``layers``."""
    groups = {i: [n for n in module.graph.nodes if _layer_of(n) == i] for i in range(3)}
    index = indices(module.graph)
    (entry,) = {n for node in groups[1] for n in node.all_input_nodes if n in set(groups[0])}
    (end,) = {n for node in groups[2] for n in node.all_input_nodes if n in set(groups[1])}
    own = [n for n in module.graph.nodes if n.op == "placeholder" and n.users and set(n.users) <= set(groups[1])]
    first_computed = next(n for n in module.graph.nodes if n.op != "placeholder")
    start_of_last = min(groups[2], key=index.__getitem__)

    graph, copies = Graph(), {}

    def copy(node: Node, layer: int | None = None) -> None:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if layer is not None:
            _rename(copies[node], layer)

    repeated: dict[int, dict[Node, Node]] = {}
    for node in module.graph.nodes:
        if node is first_computed:
            for layer in range(2, layers - 1):
                repeated[layer] = {p: graph.node_copy(p) for p in own}
                for placeholder in repeated[layer].values():
                    placeholder.target = placeholder.name
        if node is start_of_last:
            for layer in range(2, layers - 1):
                copies.update(repeated[layer])
                copies[entry] = copies[end]
                for part in groups[1]:
                    copy(part, layer)
        copy(node, layers - 1 if node in set(groups[2]) else None)
    return GraphModule(module, graph)


def _layer_of(node: Node) -> int | None:
    found = re.search(r"\.layers\.(\d+)", "".join(module_stack(node)[-1:]))
    return int(found[1]) if found and node.op != "placeholder" else None


def _rename(node: Node, layer: int) -> None:
    node.meta["nn_module_stack"] = {
        key: (re.sub(r"(\.layers\.)\d+", rf"\g<1>{layer}", path), kind)
        for key, (path, kind) in node.meta["nn_module_stack"].items()
    }


def fingerprint(module: GraphModule) -> list[tuple[Any, ...]]:
    """Every computed node: its operator, its modules, and which computed nodes it reads, by position."""
    computed = {n: i for i, n in enumerate(n for n in module.graph.nodes if n.op != "placeholder")}
    return [
        (op_name(n), module_stack(n), [computed.get(source) for source in n.all_input_nodes])
        for n in computed
        if n.op != "output"
    ]


# The nested model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query_key_value, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.local, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, and inside the branch a residual chain of two steps."""
        heads = self.query_key_value(self.norm(x)).view(1, LENGTH, 3, 2, WIDTH // 2)
        q, k, v = heads.transpose(1, 3).unbind(2)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).reshape(1, LENGTH, WIDTH))
        y = y + self.local(y.tanh())
        return y + self.wide(y.tanh())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """A gated MLP plus a shared expert: two sums of branches, neither a stream."""
        y = self.norm(x)
        routed = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return routed + self.shared(y) + self.shared(routed)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.experts = Attention(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.experts(x)


class Nested(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


# The measurement


@contextlib.contextmanager
def timed_passes() -> Iterator[collections.Counter[str]]:
    """Seconds that every pass takes within the context, with its checks."""
    seconds: collections.Counter[str] = collections.Counter()
    original = Pass.__call__

    def call(self: Pass, *inputs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(self, *inputs)
        finally:
            seconds[type(self).__name__] += time.perf_counter() - start

    Pass.__call__ = call  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Pass.__call__ = original  # type: ignore[method-assign]


def parameters_of(module: GraphModule, plan: StreamPlan) -> list[SiteParameters]:
    """Placeholders for the parameters of every site, as the anchor of a live model brings them."""
    build, root = GraphBuilder(module), require_tensor(plan.stream.root)
    found = []
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        for i in range(len(plan.stream.branches)):
            query, gain = (module.graph.placeholder(f"site_{i}_{part}") for part in ("query", "gain"))
            for node in (query, gain):
                node.meta[build._value_key] = root.new_empty(plan.stream.width)
            found.append(SiteParameters(query, gain))
    return found


def run_pipeline(module: GraphModule, config: AttnResConfig) -> dict[str, float]:
    """Seconds per pass and in total over a copy of ``module``."""
    module = with_metadata(module, None)
    gc.collect()
    with timed_passes() as seconds:
        start = time.perf_counter()
        [plan] = analyse([module], config).plans
        analysed = time.perf_counter()
        made = parameters_of(module, plan)
        begun = time.perf_counter()
        insert(module, plan, made, config)
        total = time.perf_counter() - begun + analysed - start
    return {**seconds, "total": total}


def exponent(seconds: dict[int, float], smallest: int = 0) -> float | None:
    """Slope of log seconds against log layers, by least squares."""
    points = [(layers, taken) for layers, taken in seconds.items() if layers >= smallest]
    if len(points) < 2:
        return None
    x, y = (torch.tensor(column, dtype=torch.float64).log() for column in zip(*points, strict=True))
    x = x - x.mean()
    return round(float((x @ (y - y.mean())) / (x @ x)), 3)


def measure(graph_of: Callable[[int], GraphModule], options: argparse.Namespace) -> dict[str, Any]:
    """Median times of every pass at every depth, and the exponents."""
    config = AttnResConfig(blocks=options.blocks)
    rows: dict[int, dict[str, float]] = {}
    nodes: dict[int, int] = {}
    runs: dict[int, int] = {}
    for layers in options.layers:
        module = graph_of(layers)
        nodes[layers] = len(module.graph.nodes)
        found = repeated(lambda module=module: run_pipeline(module, config), max(3, min(15, 300 // layers)))
        runs[layers] = len(found)
        rows[layers] = {name: statistics.median(run[name] for run in found) for name in found[0]}
        print(f"  {layers:5d} layers, {nodes[layers]:6d} nodes: {rows[layers]['total']:8.3f} s", flush=True)
    by_pass = {name: {layers: row[name] for layers, row in rows.items()} for name in rows[options.layers[0]]}
    return {
        "nodes": nodes,
        "runs": runs,
        "seconds": {name: {n: round(s, 5) for n, s in times.items()} for name, times in by_pass.items()},
        "exponent": {name: exponent(times) for name, times in by_pass.items()},
        "tail_exponent": {name: exponent(times, TAIL) for name, times in by_pass.items()},
    }


def repeated(run: Callable[[], dict[str, float]], times: int) -> list[dict[str, float]]:
    """What ``times`` calls of ``run`` return, or as many as fit into a minute; at least one."""
    found, end = [], time.perf_counter() + 60
    while not found or (len(found) < times and time.perf_counter() < end):
        found.append(run())
    return found


def wait(rewrite: Callable[[], object]) -> float:
    """Median seconds of a whole call of ``rewrite``."""

    def run() -> dict[str, float]:
        gc.collect()
        start = time.perf_counter()
        rewrite()
        return {"s": time.perf_counter() - start}

    return round(statistics.median(found["s"] for found in repeated(run, 3)), 2)


def profile(module: GraphModule, blocks: int) -> None:
    """Print where the pipeline spends its time."""
    profiler = cProfile.Profile()
    profiler.runcall(run_pipeline, module, AttnResConfig(blocks=blocks))
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(25)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 30, 100, 300, 1000, 2000])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument(
        "--waited-layers", type=int, default=1000, help="depth at which whole rewrite() calls are timed"
    )
    parser.add_argument("--profile", type=int, help="profile the pipeline at this depth instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    short = captured_llama(3)
    smallest = min(options.layers)
    assert fingerprint(deepened(short, smallest)) == fingerprint(captured_llama(smallest)), "the repeated graph differs"
    graphs: dict[str, Callable[[int], GraphModule]] = {
        "llama": lambda layers: deepened(short, layers),
        "nested": lambda layers: with_metadata(symbolic_trace(Nested(layers)), IDS),
    }
    if options.profile:
        for graph_of in graphs.values():
            profile(graph_of(options.profile), options.blocks)
        return
    results: dict[str, Any] = {
        "environment": environment(),
        "settings": {k: v for k, v in vars(options).items() if k not in ("profile", "out")},
        "passes": {},
    }
    for name, graph_of in graphs.items():
        print(name)
        results["passes"][name] = measure(graph_of, options)
        for key, value in results["passes"][name]["exponent"].items():
            print(f"  {key:18s} exponent {value}, tail {results['passes'][name]['tail_exponent'][key]}")
    deep, traced = deepened(short, options.waited_layers), symbolic_trace(Nested(options.waited_layers))
    results["rewrite_s"] = {
        "llama, graph with metadata": wait(lambda: attnres_rewrite.rewrite(deep, options.blocks)),
        "nested, graph without metadata": wait(
            lambda: attnres_rewrite.rewrite(traced, options.blocks, example_inputs=IDS)
        ),
    }
    print(f"rewrite() of {options.waited_layers} layers: {results['rewrite_s']}")
    write_results(options.out, results)


if __name__ == "__main__":
    main()
