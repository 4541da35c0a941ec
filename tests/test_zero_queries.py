"""A freshly rewritten model computes what it computed before: outputs and gradients, in float64."""

import copy

import pytest
import torch
from models import ARCHITECTURES, logits, mostly_slow, prepared, relative_error
from torch import Tensor, nn

import attnres_rewrite as ar

LAYERS = 3
TOLERANCE = 1e-9


def without_eps(model: nn.Module) -> nn.Module:
    """Every norm with eps 0, so that it does not see the factor 1/n of ``aggregation="mean"``.

    Llama's norm rounds to float32 inside, whatever the model's dtype, and rounds x and x/n differently; it
    is replaced by torch's RMS norm, which is the same formula in the dtype of its input.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.0
        elif type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, eps=0.0, dtype=module.weight.dtype)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def outputs_and_gradients(model: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = logits(model(inputs))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    (output * weights).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_unchanged(original: nn.Module, rewritten: nn.Module, inputs: Tensor) -> None:
    expected, gradients = outputs_and_gradients(original, inputs)
    actual, with_sites = outputs_and_gradients(rewritten, inputs)
    assert relative_error(actual, expected) < TOLERANCE
    # The bias of the attention keys has gradient 0, of which only rounding noise is computed: errors of
    # anything that small are measured against the gradient as a whole.
    floor = 1e-6 * torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert gradients.keys() == {name for name in with_sites if "attn_res" not in name}
    errors = {
        name: ((with_sites[name] - gradient).norm() / gradient.norm().clamp_min(floor)).item()
        for name, gradient in gradients.items()
    }
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("name", mostly_slow(ARCHITECTURES, "llama", "encoder"))
def test_rewritten_equals_original(name: str, aggregation: str) -> None:
    architecture = ARCHITECTURES[name]
    original = prepared(architecture.make(LAYERS), torch.float64)
    if aggregation == "mean":
        original = without_eps(original)
    rewritten = copy.deepcopy(original)
    config = ar.AttnResConfig(blocks=2, aggregation=aggregation)
    inputs = architecture.inputs(2, 9).to(torch.float64 if name == "vit" else None)
    assert ar.rewrite(rewritten, config=config, example_inputs=inputs, backend="eager") is rewritten

    sites = [parameter for key, parameter in ar.attnres_parameters(rewritten) if key.endswith("query")]
    assert len(sites) == LAYERS * architecture.sites_per_layer
    assert all(parameter.dtype == torch.float64 and not parameter.any() for parameter in sites)
    assert_unchanged(original, rewritten, inputs)
    # A query that is not zero must show, or the test above would pass for a model that was never rewritten.
    with torch.no_grad():
        sites[-1].normal_()
        assert relative_error(logits(rewritten(inputs)), logits(original(inputs))) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("blocks", mostly_slow([1, "full"], "full"))
def test_any_partition_equals_the_original_through_aot_autograd(blocks: int | str) -> None:
    architecture = ARCHITECTURES["llama"]
    original = prepared(architecture.make(LAYERS), torch.float64)
    rewritten = copy.deepcopy(original)
    config = ar.AttnResConfig(blocks=blocks, aggregation="sum")
    ar.rewrite(rewritten, config=config, backend="aot_eager")
    assert_unchanged(original, rewritten, architecture.inputs(2, 9))


def test_mean_with_an_eps_differs_by_no_more_than_the_eps() -> None:
    """With eps the norm sees the factor 1/n: the error is about n^2 * eps / rms^2, and no rounding error."""
    architecture = ARCHITECTURES["gpt2"]
    original = prepared(architecture.make(LAYERS), torch.float64)
    rewritten = copy.deepcopy(original)
    ar.rewrite(rewritten, 2, backend="eager")
    inputs = architecture.inputs(2, 9)
    with torch.no_grad():
        error = relative_error(logits(rewritten(inputs)), logits(original(inputs)))
    assert TOLERANCE < error < 1e-3


def test_training_mode_with_dropout_draws_the_same_masks() -> None:
    architecture = ARCHITECTURES["gpt2"]
    original = prepared(architecture.make(LAYERS), torch.float64).train()
    rewritten = copy.deepcopy(original)
    config = ar.AttnResConfig(blocks=2, aggregation="sum")
    ar.rewrite(rewritten, config=config, backend="eager")
    inputs = architecture.inputs(2, 9)
    outputs = []
    for model in (original, rewritten):
        torch.manual_seed(5)
        outputs.append(logits(model(inputs)).detach())
    assert relative_error(outputs[1], outputs[0]) < TOLERANCE
    torch.manual_seed(6)
    assert relative_error(logits(original(inputs)), outputs[0]) > 1e-2


@torch.no_grad()
def test_the_fused_encoder_layer_is_taken_apart() -> None:
    """In eval mode without gradients torch runs such a layer as one operator, which would hide its adds."""
    architecture = ARCHITECTURES["encoder"]
    original = prepared(architecture.make(LAYERS), torch.float64)
    rewritten = copy.deepcopy(original)
    config = ar.AttnResConfig(blocks=2, aggregation="sum")
    ar.rewrite(rewritten, config=config, backend="eager")
    inputs = architecture.inputs(2, 9)
    assert relative_error(rewritten(inputs), original(inputs)) < TOLERANCE
    assert torch.backends.mha.get_fastpath_enabled()
