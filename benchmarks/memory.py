"""Activation memory of a training step: plain, Block and Full Attention Residuals, compiled and naive.

A Llama-architecture model in every form; "naive" is the paper's listing, which stacks the sources, at every site of the
same rewritten graph, run eagerly. Bytes are counted and not sampled (`_memory.py`). "saved" is what is still alive
between forward and backward.

    python benchmarks/memory.py [--layers 24] [--width 512] [--length 256] [--batch 2] [--blocks 8] [--forms ...]

A form that is left out keeps the figures that the file has of it, with their commit, if they are of the same settings.
"full, compiled" has to be asked for: compiling 48 reads of up to 49 sources takes many minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results
from _memory import memory_of_step
from _peers import EPS, stack_and_einsum
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite
from attnres_rewrite.bench.forms import randomise_queries

RESULTS = Path(__file__).parent / "results" / "memory.json"
VOCABULARY, HEAD_WIDTH = 8192, 64
SLOWEST = "full, compiled"


@dataclasses.dataclass(frozen=True)
class Form:
    """How a model runs; ``blocks`` is how it is rewritten (``None``: not at all), "few" the number of the options."""

    blocks: str | None
    how: str
    schedule: str = "auto"


FORMS = {
    "plain, compiled": Form(None, "compiled"),
    "block, compiled": Form("few", "compiled"),
    "block, compiled, read by read": Form("few", "compiled", "per_read"),
    "full, compiled": Form("full", "compiled"),
    "plain, eager": Form(None, "eager"),
    "block, eager": Form("few", "eager"),
    "full, eager": Form("full", "eager"),
    "block, naive eager": Form("few", "naive"),
    "full, naive eager": Form("full", "naive"),
}


def naive(module: fx.GraphModule, _: list[Any]) -> fx.GraphModule:
    """A backend that runs the graph as it is, with the paper's listing in the place of the operator."""
    sites = [node for node in module.graph.nodes if node.target is torch.ops.attnres.block_attn_res.default]
    assert sites
    for node in sites:
        sources, query, gain, eps, scale, is_sum = node.args
        assert (eps, scale, is_sum) == (EPS, 1.0, False)
        node.target, node.args = stack_and_einsum, (sources, query, gain)
    module.recompile()
    return module


def make_model(form: Form, options: argparse.Namespace) -> nn.Module:
    """The model with seeded weights, those of the sites included, ready to train."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // HEAD_WIDTH,
        num_key_value_heads=options.width // HEAD_WIDTH,
        rms_norm_eps=EPS,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config).train()
    if form.blocks is not None:
        backend: Any = {"compiled": "inductor", "eager": "eager", "naive": naive}[form.how]
        blocks = "full" if form.blocks == "full" else options.blocks
        settings = attnres_rewrite.AttnResConfig(blocks=blocks, schedule=form.schedule)
        attnres_rewrite.rewrite(model, config=settings, backend=backend)
        randomise_queries(model)
    elif form.how == "compiled":
        model.compile()
    return model


def measure(form: Form, options: argparse.Namespace) -> dict[str, Any]:
    """Memory of a step of one form, and its loss."""
    torch.compiler.reset()
    model = make_model(form, options)
    ids = torch.randint(VOCABULARY, (options.batch, options.length), generator=torch.Generator().manual_seed(1))

    def loss_of() -> Tensor:
        logits = model(input_ids=ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss = loss_of()
    loss.backward()
    return {**memory_of_step(model, loss_of), "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[name for name in FORMS if name != SLOWEST])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "forms")}
    results: dict[str, Any] = {"environment": environment(), "settings": settings, "forms": {}}
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if before["settings"] == settings and before["environment"]["torch"] == torch.__version__:
            results["forms"] = before["forms"]
    for name in options.forms:
        found = results["forms"][name] = {"commit": results["environment"]["commit"], **measure(FORMS[name], options)}
        plain = results["forms"].get("plain, compiled")
        ratio = f"  times plain, compiled: {found['peak_mb'] / plain['peak_mb']:.3f}" if plain else ""
        print(f"{name:30s} peak {found['peak_mb']:9.1f} MB  saved {found['saved_mb']:9.1f} MB{ratio}", flush=True)
        write_results(options.out, results)


if __name__ == "__main__":
    main()
