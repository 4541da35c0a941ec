"""The models of `benchmarks/learning.py`: how each begins, how it is compiled, and what optimizes it."""

from __future__ import annotations

from typing import Any

import torch
from _learning import CONTESTANTS, STREAMS, VOCABULARY, Run, Size
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_rewrite import log_dict, parameter_groups, rewrite, training_dynamics

WEIGHT_DECAY, BETAS = 0.1, (0.9, 0.95)
WARM_UP = 0.05


def new_model(contestant: str, size: Size, seed: int, weights: dict[str, Tensor] | None = None) -> LlamaForCausalLM:
    """A model that is not rewritten yet; those of one seed have the same weights, or those given."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 3 // 8 * 8,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 32),
        num_key_value_heads=max(1, size.width // 32),
        max_position_embeddings=size.length,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    if weights is not None:
        model.load_state_dict(weights)
    if contestant in STREAMS:
        from _hyper_connections import use_hyper_connections

        use_hyper_connections(model, STREAMS[contestant])
    return model


def build(
    contestant: str, size: Size, device: torch.device, *, in_one: bool = False
) -> tuple[LlamaForCausalLM, nn.Module]:
    """The model, and what is called to run it.

    With ``in_one`` that is one graph for every contestant. Without, one with several streams is compiled by the layer:
    its graph would take longer to compile than to train.
    """
    model = new_model(contestant, size, 0).to(device)
    chosen = CONTESTANTS[contestant]
    if contestant in STREAMS and not in_one:
        from _hyper_connections import compile_layers

        compile_layers(model, size.backend)
        return model, model
    if chosen is None:
        return model, torch.compile(model, backend=size.backend, dynamic=False)  # type: ignore[return-value]
    example = {"input_ids": torch.zeros(2, size.length, dtype=torch.long, device=device)}
    rewrite(model, example_inputs=example, config=chosen, backend=size.backend, dynamic=False)
    return model, model


def optimizer_of(model: nn.Module, contestant: str) -> torch.optim.Optimizer:
    """AdamW; matrices are decayed, vectors are not, and the sites of a rewritten model are the last group."""
    if CONTESTANTS[contestant] is not None:
        groups = parameter_groups(model, weight_decay=WEIGHT_DECAY)
    else:
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True, capturable=on_cuda)


def learning_rates(run: Run, groups: int) -> Tensor:
    """Those of every step for every parameter group, ``[steps, groups]``; sites learn at a multiple."""
    steps = run.shape.steps
    multiples = [1.0] * groups
    if CONTESTANTS[run.contestant] is not None:
        multiples[-1] = run.attnres_rate
    parts = torch.tensor([rate_at(step, steps) for step in range(steps)])
    return run.rate * parts[:, None] * torch.tensor(multiples)


def rate_at(step: int, steps: int) -> float:
    """The part of the learning rate at ``step``: it rises for a twentieth of the run, and falls to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


def inside(model: nn.Module, contestant: str, batch: Tensor) -> dict[str, Any]:
    """Output magnitudes and gradient norms by depth; depth weights of the sites of a rewritten model."""
    small = {"input_ids": batch[:2], "labels": batch[:2]}
    if contestant in STREAMS:
        return {}
    found = training_dynamics(model, small).to_dict()
    kept = {name: [_short(x) for x in found[name]] for name in ("branch_rms", "output_rms", "gradient_norm")}
    if CONTESTANTS[contestant] is not None:
        values = log_dict(model, {"input_ids": batch[:2]})
        for name in ("weight_entropy", "largest_weight", "query_norm"):
            kept[name] = [_short(value) for key, value in values.items() if key.startswith(f"attnres/{name}/")]
    return kept


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
