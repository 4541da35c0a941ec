"""Drift of ONNX Runtime's dynamic int8 quantisation, of a rewritten model against the plain one of the same weights.

For every seed a small Llama is trained plain on the sources of the standard library, as bytes. These variants are then
exported and quantised:

    plain                the trained model
    zero queries         the same weights rewritten, aggregation "sum": the same function
    random queries, 1    likewise, random queries with which the depth logits have a standard deviation of about 1
    random queries, 0.5  likewise, with queries of standard deviation 0.5, hence nearly one source a read
    plain, continued     trained plain for some steps more
    finetuned            the same weights rewritten, aggregation "mean", trained as long on the same batches

The drift of a variant is what its int8 model computes on held-out text against its own float32 model, both in ONNX
Runtime; the extra drift is that of a rewritten variant minus that of its plain one. Every float32 file is compared with
PyTorch first. Each of the three graphs is exported once, and gets the weights of every seed and variant by their names.

    python benchmarks/quantization.py [--seeds 10] [--steps 200] [--further-steps 100] [--width 128] [--blocks 3]
"""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Beside this file is one of the name of a package that is imported below: what is installed comes first.
sys.path.append(sys.path.pop(0))

import onnx
import onnxruntime
import onnxscript
import torch
import transformers
from _environment import environment, write_results
from _plain_onnx import export_plain
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite
from attnres_rewrite import AttnResConfig
from attnres_rewrite.demo.corpus import Corpus, standard_library

RESULTS = Path(__file__).parent / "results" / "quantization.json"
VOCABULARY, HEAD_WIDTH = 256, 32
TOLERANCE = 1e-4  # ONNX Runtime against PyTorch in float32, as in export_onnx
# The default also takes ONNX's Attention for the operator of that name of ONNX Runtime, and the file does not load.
QUANTISED_OPERATORS = ["MatMul", "Gather"]
SITES = ("BlockAttnRes", "AttendBlocks", "MergePartial")
SETTINGS: dict[str, dict[str, Any]] = {"per tensor": {}, "per channel": {"per_channel": True}}

# Each rewritten variant and the plain one that it is compared with.
BASELINES = {
    "zero queries": "plain",
    "random queries, 1": "plain",
    "random queries, 0.5": "plain",
    "finetuned": "plain, continued",
}
METRICS = ("rms", "kl", "disagreement", "loss_increase")

State = dict[str, Tensor]


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """An untrained model; its weights are those of the global seed."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // HEAD_WIDTH,
        num_key_value_heads=options.width // HEAD_WIDTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def next_byte_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, corpus: Corpus, steps: int, seed: int, options: argparse.Namespace) -> None:
    """``steps`` of AdamW; the same batches for the same seed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    for ids in itertools.islice(corpus.training_batches(options.batch, options.length, seed), steps):
        next_byte_loss(model(input_ids=ids).logits, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def with_queries(plain: State, rewritten: nn.Module, std: float, seed: int) -> State:
    """The weights ``plain`` with neutral gains and normal queries, for ``rewritten``."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(plain)
    for name, value in attnres_rewrite.attnres_parameters(rewritten):
        is_query = name.endswith("query")
        state[name] = torch.randn(value.shape, generator=generator) * std if is_query else torch.ones(value.shape)
    return state


def fill(template: Path, state: Mapping[str, Tensor], path: Path) -> None:
    """Write ``template`` with the weights ``state`` to ``path``."""
    model = onnx.load(template)
    # The settings of a rewrite are no numbers of the graph.
    remaining = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    for initializer in model.graph.initializer:
        value = remaining.pop(initializer.name.removesuffix(".transposed"), None)
        if value is not None:
            value = value.t() if initializer.name.endswith(".transposed") else value
            assert tuple(value.shape) == tuple(initializer.dims), initializer.name
            initializer.CopyFrom(numpy_helper.from_array(value.contiguous().numpy(), initializer.name))
    assert not remaining, f"not in {template.name}: {sorted(remaining)}"
    onnx.save(model, path)


def counts(path: Path) -> dict[str, int]:
    """How often the operators that matter here are in the main graph and in the functions of a file."""
    model = onnx.load(path)
    names = ("MatMul", "MatMulInteger", "DynamicQuantizeLinear", "Attention", *SITES)
    found = collections.Counter(node.op_type for node in model.graph.node)
    inside = collections.Counter(node.op_type for function in model.functions for node in function.node)
    return {**{name: found[name] for name in names}, "MatMulInteger in functions": inside["MatMulInteger"]}


def run(path: Path, ids: Tensor) -> Tensor:
    """The logits in ONNX Runtime."""
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0])


def drift(quantised: Tensor, reference: Tensor, ids: Tensor) -> dict[str, float]:
    """How far the int8 logits ``quantised`` are from the float32 ones, both ``[B, T, V]``.

    ``rms`` is relative to the RMS of the reference, ``kl`` is KL(float32 || int8) in nats a byte, ``disagreement`` the
    share of positions whose likeliest byte changes, ``loss_increase`` in nats a byte.
    """
    q, p = quantised.double(), reference.double()
    log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
    return {
        "rms": float((q - p).norm() / p.norm()),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "disagreement": float((q.argmax(-1) != p.argmax(-1)).double().mean()),
        "loss_increase": float(next_byte_loss(q, ids) - next_byte_loss(p, ids)),
    }


def measure(template: Path, state: State, model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Loss and drift of the weights ``state``, which ``model`` is given too, in every setting."""
    model.load_state_dict(state)
    full, small = template.with_name("float.onnx"), template.with_name("int8.onnx")
    fill(template, state, full)
    reference = run(full, ids)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    difference = float((reference - expected).abs().max() / expected.abs().max())
    assert difference < TOLERANCE, f"ONNX Runtime differs from PyTorch by {difference:.1e}"
    found: dict[str, Any] = {"loss": float(next_byte_loss(reference, ids)), "against_pytorch": difference, "drift": {}}
    for name, setting in SETTINGS.items():
        quantize_dynamic(full, small, weight_type=QuantType.QInt8, op_types_to_quantize=QUANTISED_OPERATORS, **setting)
        before, after = counts(full), counts(small)
        assert (after["MatMulInteger"], after["MatMul"]) == (before["MatMul"], 0), "not every MatMul is quantised"
        assert all(after[name] == before[name] for name in SITES), "a site was changed"
        assert after["MatMulInteger in functions"] == 0, "a site computes in int8"
        found["drift"][name] = drift(run(small, ids), reference, ids)
        found["operators"] = {"float32": before, "int8": after}
    return found


class Study:
    """The models and the exported graphs, made once; a seed only changes their weights."""

    def __init__(self, corpus: Corpus, folder: Path, options: argparse.Namespace) -> None:
        self.corpus, self.folder, self.options = corpus, folder, options
        (self.held_out,) = corpus.validation_batches(1, options.sequences, options.length)
        self.plain = make_model(options)
        self.rewritten = {
            aggregation: attnres_rewrite.rewrite(
                copy.deepcopy(self.plain),
                config=AttnResConfig(blocks=options.blocks, aggregation=aggregation),
                backend="aot_eager",
            )
            for aggregation in ("sum", "mean")
        }

    def template(self, name: str) -> Path:
        """The exported graph of "plain", "sum" or "mean", from the weights that the model has when first asked.

        They should be trained: the exporter makes one of equal weights, and all norms are equal at first.
        """
        path = self.folder / f"{name}.onnx"
        if not path.exists():
            inputs = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
            if name == "plain":
                export_plain(copy.deepcopy(self.plain), inputs, path, use_cache=False)
            else:
                attnres_rewrite.export_onnx(self.rewritten[name], path, inputs)
        return path

    def measure_plain(self, state: State) -> dict[str, Any]:
        self.plain.load_state_dict(state)
        return measure(self.template("plain"), state, self.plain, self.held_out)

    def measure_rewritten(self, aggregation: str, state: State) -> dict[str, Any]:
        model = self.rewritten[aggregation]
        model.load_state_dict(state)
        return measure(self.template(aggregation), state, model, self.held_out)

    def measure_seed(self, seed: int) -> dict[str, Any]:
        """Train, and measure every variant."""
        options, plain, mean = self.options, self.plain, self.rewritten["mean"]
        torch.manual_seed(seed)
        plain.load_state_dict(make_model(options).state_dict())
        train(plain, self.corpus, options.steps, 2 * seed, options)
        weights = snapshot(plain)
        found = {"plain": self.measure_plain(weights)}
        stds = {"zero queries": 0.0, "random queries, 1": options.width**-0.5, "random queries, 0.5": 0.5}
        for name, std in stds.items():
            found[name] = self.measure_rewritten("sum", with_queries(weights, mean, std, seed))

        train(plain, self.corpus, options.further_steps, 2 * seed + 1, options)
        found["plain, continued"] = self.measure_plain(snapshot(plain))
        mean.load_state_dict(with_queries(weights, mean, 0.0, seed))
        train(mean, self.corpus, options.further_steps, 2 * seed + 1, options)
        queries = [value.detach() for name, value in attnres_rewrite.attnres_parameters(mean) if name.endswith("query")]
        found["finetuned"] = self.measure_rewritten("mean", snapshot(mean))
        found["finetuned"]["query_rms"] = float(torch.stack(queries).square().mean().sqrt())
        return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range over the seeds: losses, drifts, and the extra drifts of the rewritten variants."""
    summary: dict[str, Any] = {"loss": {name: spread([seed[name]["loss"] for seed in seeds]) for name in seeds[0]}}
    for setting in SETTINGS:
        summary[setting] = {"drift": {}, "extra": {}}
        for metric in METRICS:
            drifts = {name: [seed[name]["drift"][setting][metric] for seed in seeds] for name in seeds[0]}
            for name, values in drifts.items():
                summary[setting]["drift"].setdefault(name, {})[metric] = spread(values)
            for name, baseline in BASELINES.items():
                pairs = list(zip(drifts[name], drifts[baseline], strict=True))
                extra: dict[str, Any] = spread([a - b for a, b in pairs])
                extra["seeds_with_more"] = sum(a > b for a, b in pairs)
                if metric in ("rms", "kl"):
                    extra["ratio"] = spread([a / b for a, b in pairs])
                summary[setting]["extra"].setdefault(name, {})[metric] = extra
    return summary


def print_summary(summary: dict[str, Any]) -> None:
    for setting in SETTINGS:
        print(f"\n{setting}: median over the seeds [minimum, maximum]")
        for name, drifts in summary[setting]["drift"].items():
            print(f"  {name:20s} loss {summary['loss'][name]['median']:.3f}", end="")
            for metric in METRICS:
                print(f"  {metric} {drifts[metric]['median']:.5f}", end="")
            print()
        for name, extras in summary[setting]["extra"].items():
            for metric, extra in extras.items():
                print(f"  extra, {name:20s} {metric:13s} {extra['median']:+.2e}", end="")
                print(f" [{extra['min']:+.2e}, {extra['max']:+.2e}], more in {extra['seeds_with_more']}", end="")
                ratio = extra.get("ratio")
                print(f", ratio {ratio['median']:.4f} [{ratio['min']:.4f}, {ratio['max']:.4f}]" if ratio else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--further-steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=16, help="held-out sequences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger().setLevel(logging.ERROR)  # Quantisation recommends a preparation that changes nothing here.
    start = time.perf_counter()
    versions = {module.__name__: module.__version__ for module in (transformers, onnx, onnxruntime, onnxscript)}
    results: dict[str, Any] = {
        "environment": environment() | versions,
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "seeds": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        study = Study(standard_library(), Path(folder), options)
        for seed in range(options.seeds):
            found = study.measure_seed(seed)
            results["seeds"].append(found)
            # The operators are the same for every seed.
            operators = {name: variant.pop("operators") for name, variant in found.items()}
            results["operators"] = operators
            results["seconds"] = round(time.perf_counter() - start)
            results["summary"] = summarise(results["seeds"])
            write_results(options.out, results)
            losses = ", ".join(f"{name} {variant['loss']:.3f}" for name, variant in found.items())
            print(f"seed {seed}, {results['seconds']} s: {losses}", flush=True)
    print_summary(results["summary"])


if __name__ == "__main__":
    main()
