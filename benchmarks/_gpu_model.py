"""A whole Llama on a device: training steps and decoding, plain, rewritten, and with a peer's kernel at every site."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch
from _gpu_timing import Budget, Call, Device, Record
from _peers import GRAPH_PEERS, Form, NotAvailable, reason, stack_and_einsum
from torch import Tensor, nn
from torch._inductor import metrics
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import attnres_rewrite
from attnres_rewrite import AttnResConfig

VOCABULARY = 8192
TARGETS = {"step": 1.02, "decode": 1.01}
PLAIN, OURS, EINSUM = "plain", "attnres_rewrite", "stack and einsum"
# Settings that the default does not choose.
PER_READ, LAYERS_ONCE = "attnres_rewrite, per_read", "attnres_rewrite, layers once"
_SITE = torch.ops.attnres.block_attn_res


def with_form(form: Form, sites: list[int]) -> Callable[..., Any]:
    """An inner backend that calls ``form`` at every site and hands the graph on to Inductor.

    The number of sites of each graph is added to ``sites``.
    """

    def read(sources: Any, query: Tensor, gain: Tensor, *settings: Any) -> Tensor:
        return form(list(sources), query, gain)

    def compile_with_form(module: GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        swapped = 0
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target in (_SITE, _SITE.default):
                node.target = read
                swapped += 1
        module.recompile()
        sites.append(swapped)
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(module, inputs)
        return compiled

    return compile_with_form


def make_model(name: str, device: Device, options: argparse.Namespace, sites: list[int]) -> nn.Module:
    """The model of one variant, its queries random; all variants have the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        use_cache=False,
    )
    with torch.device(device.name):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if name == PLAIN:
        model.compile()
        return model
    settings, inner = AttnResConfig(blocks=options.blocks), None
    if name == LAYERS_ONCE:
        settings = dataclasses.replace(settings, compile_layers="once")
    elif name != OURS:
        # A peer computes one read at a time.
        settings = dataclasses.replace(settings, schedule="per_read")
        if name != PER_READ:
            inner = with_form(stack_and_einsum if name == EINSUM else GRAPH_PEERS[name](), sites)
    example = {"input_ids": torch.zeros(1, 16, dtype=torch.long, device=device.name)}
    more = {} if inner is None else {"backend": inner}
    attnres_rewrite.rewrite(model, config=settings, example_inputs=example, **more)
    torch.manual_seed(1)
    for parameter_name, parameter in attnres_rewrite.attnres_parameters(model):
        if parameter_name.endswith("query"):
            nn.init.normal_(parameter, std=options.width**-0.5)
    return model


def larger(options: argparse.Namespace) -> argparse.Namespace:
    """The settings of a model as wide as one of 7B, in which matrix products take most of a step."""
    if options.quick:
        return options
    return argparse.Namespace(**vars(options) | {"width": 4096, "batch": 1, "length": 4096})


class TrainingStep:
    """Forward, backward and AdamW of one variant, compiled, its first step taken.

    With ``only_compile``, its first backward is all there is.
    """

    def __init__(self, name: str, device: Device, options: argparse.Namespace, *, only_compile: bool = False) -> None:
        self.sites: list[int] = []
        self.model = make_model(name, device, options, self.sites)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True, capturable=device.cuda)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCABULARY, (options.batch, options.length), generator=generator).to(device.name)

        def step() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            if only_compile:
                return loss
            self.optimizer.step()
            return loss.detach()

        metrics.reset()
        losses: list[float] = []
        seconds = device.seconds(lambda: losses.append(step().float().item()))
        self.row: dict[str, Any] = {
            "first_step_s": round(seconds, 1),
            "first_loss": losses[0],
            "query_gradient": _query_gradient(self.model),
            "kernels": metrics.generated_kernel_count,
            "sites_swapped": self.sites,
        }
        if only_compile:
            return
        if device.cuda:
            self.row["peak_MiB"] = _peak_above(step)
        self.call, why = device.captured(step)
        if why:
            self.row["not_captured"] = why


def _peak_above(step: Call) -> float:
    """MiB that a step needs at its peak above what lives between steps (parameters, gradients, moments)."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def measure_steps(
    key: str,
    names: list[str],
    steps: dict[str, TrainingStep],
    device: Device,
    record: Record,
    budget: Budget,
    rounds: int,
    options: argparse.Namespace,
) -> None:
    """Each variant against plain, the two taking turns; a row per variant, written as soon as it is there.

    The table is under ``key``; ``steps`` holds plain from one call to the next.
    """
    try:
        table = record[key]
    except KeyError:
        record[key] = table = {"target_times_plain": TARGETS["step"], "variants": {}, "skipped": {}}
    needed = 35 if device.cuda else 1
    for name in names:
        try:
            budget.need(needed)
            if PLAIN not in steps:
                steps[PLAIN] = TrainingStep(PLAIN, device, options)
                table["variants"][PLAIN] = steps[PLAIN].row
                record.write()
            other = TrainingStep(name, device, options)
            _check_variant(name, other, table["variants"].get(OURS))
            found = device.medians({PLAIN: steps[PLAIN].call, name: other.call}, rounds, cold=False)
            ratio = found[name] / found[PLAIN]
            other.row |= {"plain_ms": round(found[PLAIN] * 1e3, 3), "ms": round(found[name] * 1e3, 3)}
            table["variants"][name] = other.row | {"times_plain": round(ratio, 4)}
            print(
                f"  {key} {name:28s} {other.row['ms']:9.2f} ms, plain {other.row['plain_ms']:9.2f} ms: {ratio:.3f} "
                f"(target {TARGETS['step']}), peak {other.row.get('peak_MiB')} MiB, "
                f"plain {steps[PLAIN].row.get('peak_MiB')} MiB",
                flush=True,
            )
        except Exception as error:
            table["skipped"][name] = reason(error)
            print(f"  {key} {name:28s} skipped: {table['skipped'][name]}", flush=True)
        record.write()
        other = None  # the model of one variant is gone before the next is made
        gc.collect()


def _check_variant(name: str, step: TrainingStep, ours: dict[str, Any] | None) -> None:
    """Refuse a variant that computes something else: all have the same weights, so the same first step.

    The loss of an untrained model says little, the gradient that arrives at the queries more.
    """
    if step.sites and not any(step.sites):
        raise NotAvailable("no site of the graph was swapped")
    if ours is None:
        return
    for what, tolerance in (("first_loss", 1e-3), ("query_gradient", 0.1)):
        given, right = step.row[what], ours[what]
        if not abs(given - right) <= tolerance * abs(right):
            raise ValueError(f"wrong result: {what} is {given:.6g} instead of {right:.6g}")


def _query_gradient(model: nn.Module) -> float:
    """Norm of the gradient of all queries together."""
    squares = [p.grad.float().square().sum() for name, p in model.named_parameters() if name.endswith(".query")]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


class Decoding:
    """One token after ``prompt`` others, in a static cache, compiled."""

    def __init__(self, name: str, device: Device, options: argparse.Namespace) -> None:
        prompt, room = (16, 64) if options.quick else (512, 1024)
        model = make_model(name, device, options, [])
        model.eval()
        config, heads = model.config, options.width // 64
        self.cache = StaticCache(config=config, max_cache_len=room)
        self.cache.early_initialization(1, heads, 64, torch.bfloat16, torch.device(device.name))
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.prompt = prompt
        position = torch.tensor([prompt], device=device.name)
        kwargs: dict[str, Any] = {
            "input_ids": torch.ones(1, 1, dtype=torch.long, device=device.name),
            "position_ids": position[None],
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if "cache_position" in inspect.signature(type(model).forward).parameters:
            kwargs["cache_position"] = position

        @torch.no_grad()
        def decode() -> Tensor:
            logits: Tensor = model(**kwargs).logits
            return logits

        def first() -> None:
            self.rewind()
            decode()

        self.compile_s = round(device.seconds(first), 1)
        self.rewind()
        self.call, self.not_captured = device.captured(decode)

    def rewind(self) -> None:
        """Let the cache hold the prompt alone again: newer caches count what was put into them, on the device."""
        for layer in self.cache.layers:
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                layer.cumulative_length.fill_(self.prompt)


def measure_decoding(
    names: list[str], device: Device, record: Record, budget: Budget, options: argparse.Namespace
) -> None:
    """Latency of one token of each variant against plain."""
    record["decode"] = table = {"target_times_plain": TARGETS["decode"], "variants": {}, "skipped": {}}
    budget.need(40 if device.cuda else 1)
    plain = Decoding(PLAIN, device, options)
    for name in names:
        try:
            budget.need(30 if device.cuda else 1)
            other = Decoding(name, device, options)
            # Fewer calls between two rewinds than the cache has room for.
            plain.rewind()
            other.rewind()
            rounds = 10 if options.quick else 200
            found = device.medians({PLAIN: plain.call, name: other.call}, rounds, cold=False)
        except Exception as error:
            table["skipped"][name] = reason(error)
            print(f"  decode {name:26s} skipped: {table['skipped'][name]}", flush=True)
            record.write()
            continue
        ratio = found[name] / found[PLAIN]
        table["variants"][name] = {
            "us": round(found[name] * 1e6, 1),
            "plain_us": round(found[PLAIN] * 1e6, 1),
            "times_plain": round(ratio, 4),
            "compile_s": other.compile_s,
            "not_captured": other.not_captured or plain.not_captured,
        }
        record.write()
        row = table["variants"][name]
        print(f"  decode {name:26s} {row['us']:9.1f} us, plain {row['plain_us']:9.1f} us: {ratio:.3f}", flush=True)
