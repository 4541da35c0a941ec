"""Activation memory of a training step with activation checkpointing, plain against rewritten.

Two models: Hugging Face's Llama with ``gradient_checkpointing_enable``, and a transformer that calls
``torch.utils.checkpoint`` by hand for every layer. Each runs plain and rewritten (random queries), with and without
checkpoints, compiled by Inductor; the plain one also eagerly. What counts is the peak of the checkpointed rewritten
model over that of the checkpointed plain one, both compiled.

Bytes are counted and not sampled (`_memory.py`). "saved" is what is still alive between forward and backward. Losses
and gradients with checkpoints must be those without.

    python benchmarks/checkpointing.py [--layers 12] [--width 256] [--length 256] [--batch 4] [--blocks 8]
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results
from _memory import memory_of_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite

RESULTS = Path(__file__).parent / "results" / "checkpointing.json"
VOCABULARY, HEAD_WIDTH = 512, 64
TOLERANCE = 1e-4  # float32, and sums in another order


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, HEAD_WIDTH))
        q, k, v = heads.transpose(1, 3).unbind(2)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


class ByHand(nn.Module):
    """Every layer is checkpointed by the model's own forward."""

    def __init__(self, layers: int, width: int, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.head(self.norm(x))


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a model runs."""

    rewritten: bool
    checkpointed: bool
    compiled: bool = True

    def __str__(self) -> str:
        parts = ("attnres" if self.rewritten else "plain", "compiled" if self.compiled else "eager")
        return ", ".join((*parts, "checkpointed") if self.checkpointed else parts)


VARIANTS = [
    Variant(rewritten, checkpointed, compiled)
    for rewritten, compiled in ((False, False), (False, True), (True, True))
    for checkpointed in (False, True)
]


def make_model(kind: str, variant: Variant, options: argparse.Namespace) -> nn.Module:
    """The model with seeded weights, those of the sites included, ready to train."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=options.width,
            intermediate_size=options.width * 8 // 3,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // HEAD_WIDTH,
            num_key_value_heads=options.width // HEAD_WIDTH,
            # With a cache beside checkpoints transformers warns, which breaks the graph.
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
        if variant.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model = ByHand(options.layers, options.width, variant.checkpointed)
    model.train()
    if variant.rewritten:
        attnres_rewrite.rewrite(model, options.blocks)
        for name, parameter in attnres_rewrite.attnres_parameters(model):
            if name.endswith("query"):
                nn.init.normal_(parameter, std=options.width**-0.5)
    elif variant.compiled:
        model.compile()
    return model


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The language-modelling loss; the logits go out of scope here, as in a training loop."""
    output = model(input_ids=ids)
    logits = output if isinstance(output, Tensor) else output.logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def numbers_of_step(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Largest relative difference of the losses and of any parameter's gradient, in norm."""
    assert found[1].keys() == expected[1].keys()
    pairs = [(found[0], expected[0]), *((found[1][name], gradient) for name, gradient in expected[1].items())]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Memory of every variant, the ratios to the plain model, and how far the numbers are apart."""
    ids = torch.randint(VOCABULARY, (options.batch, options.length), generator=torch.Generator().manual_seed(1))
    memory: dict[Variant, dict[str, float]] = {}
    numbers = {}
    for variant in VARIANTS:
        torch.compiler.reset()
        model = make_model(kind, variant, options)
        numbers[variant] = numbers_of_step(model, ids)  # Compiled before it is measured.
        memory[variant] = memory_of_step(model, lambda model=model: loss_of(model, ids))
        print(f"  {variant!s:33s} peak {memory[variant]['peak_mb']:8.2f} MB", end="")
        print(f"  saved {memory[variant]['saved_mb']:8.2f} MB", flush=True)
    differences = {}
    for variant in VARIANTS:
        if variant.checkpointed:
            differences[str(variant)] = difference(
                numbers[variant], numbers[dataclasses.replace(variant, checkpointed=False)]
            )
    assert max(differences.values()) < TOLERANCE, f"checkpoints change the numbers: {differences}"
    ratios = {}
    for checkpointed in (False, True):
        plain, rewritten = (memory[Variant(form, checkpointed)] for form in (False, True))
        ratios["checkpointed" if checkpointed else "uncheckpointed"] = {
            key.removesuffix("_mb"): round(rewritten[key] / plain[key], 3) for key in plain
        }
    return {
        "memory": {str(variant): found for variant, found in memory.items()},
        "ratio": ratios,
        "checkpointed_against_uncheckpointed": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=["llama", "by hand"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "environment": environment(),
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "models": {},
    }
    for kind in options.models:
        print(kind)
        results["models"][kind] = measure(kind, options)
        for name, ratio in results["models"][kind]["ratio"].items():
            print(f"  {name}: attnres over plain, peak {ratio['peak']:.3f}, saved {ratio['saved']:.3f}")
        write_results(options.out, results)


if __name__ == "__main__":
    main()
