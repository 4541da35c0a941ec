"""The live form and the backend on every device that there is, in float32 and bfloat16.

``make test-gpu`` runs the CUDA half; the CPU half keeps the tests themselves true on machines without one.
"""

import pytest
import torch
from models import llama, mostly_slow, prepared, randomise_sites, relative_error, token_ids

import attnres_rewrite as ar

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
# Inductor on the CPU is covered by the tests of random queries; here it would only cost time.
BACKENDS = [
    pytest.param("eager", "cpu", id="eager-cpu"),
    pytest.param("aot_eager", "cpu", id="aot_eager-cpu", marks=pytest.mark.slow),
    *(pytest.param(backend, *CUDA.values, marks=CUDA.marks, id=f"{backend}-cuda") for backend in ("eager", "inductor")),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def expected(device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of the sites in float64."""
    model = randomise_sites(ar.rewrite(prepared(llama(3), torch.float64).to(device), blocks=2, backend="eager"))
    logits = model(token_ids().to(device)).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in ar.attnres_parameters(model) if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(
    "dtype", mostly_slow([torch.float32, torch.bfloat16], torch.bfloat16), ids=["float32", "bfloat16"]
)
def test_logits_and_gradients_equal_float64(backend: str, device: str, dtype: torch.dtype) -> None:
    logits, gradients = expected(device)
    torch._dynamo.reset()
    model = randomise_sites(ar.rewrite(prepared(llama(3), torch.float64).to(device), blocks=2, backend=backend)).to(
        dtype
    )
    actual = model(token_ids().to(device)).logits
    assert actual.dtype == dtype
    assert actual.device.type == device
    assert relative_error(actual.double(), logits) < TOLERANCE[dtype]
    actual.float().square().mean().backward()
    assert len(gradients) == 12
    if dtype == torch.float32:
        for name, parameter in ar.attnres_parameters(model):
            assert relative_error(parameter.grad.double(), gradients[name]) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_the_backend_by_object_and_autocast(backend: str, device: str) -> None:
    model = randomise_sites(ar.rewrite(prepared(llama(3)).to(device), blocks=2, backend="eager"))
    ids = token_ids().to(device)
    reference = model(ids).logits
    compiled = torch.compile(model, backend=ar.AttnResBackend(backend))
    assert relative_error(compiled(ids).logits, reference) < TOLERANCE[torch.float32]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert relative_error(compiled(ids).logits.float(), reference) < TOLERANCE[torch.bfloat16]
    with ar.disabled(model):
        assert relative_error(compiled(ids).logits, reference) > 1e-2
