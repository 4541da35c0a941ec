"""The read of another project, and the walk over blocks of released models, against rewritten models."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from linked_models import SOURCES, linked, reference
from models import Tower, embeddings, prepared, randomise_sites, relative_error, site_parameters
from torch import Tensor

import attnres_rewrite as ar

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from _peers import EPS, NotAvailable, naive_attnres

X = embeddings()
TOLERANCE = 1e-5  # float32
Read = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def naive() -> Read:
    """The read of flash-linear-attention in plain torch."""
    try:
        return naive_attnres()
    except NotAvailable as error:
        pytest.skip(f"{error}: it is in the extra `dev`")


@pytest.mark.parametrize("sources", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_agrees_with_flash_linear_attention(naive: Read, sources: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sources)
    query, gain, *values = (torch.randn(n, 32, generator=generator) for n in (1, 1, *[12] * sources))
    values = [(3 * value).to(dtype).requires_grad_() for value in values]
    query, gain = (p[0].to(dtype).requires_grad_() for p in (query, gain))
    inputs = [query, gain, *values]
    ours, theirs = (f(values, query, gain) for f in (op, naive))
    assert relative_error(ours.detach(), theirs.detach()) < (1e-6 if dtype == torch.float32 else 2**-8)
    gradients = (torch.autograd.grad((out * out.detach().cos()).sum(), inputs) for out in (ours, theirs))
    for actual, expected in zip(*gradients, strict=True):
        # The gradient of the query of one source is zero, up to rounding.
        assert (actual - expected).norm() <= (1e-5 if dtype == torch.float32 else 2**-6) * expected.norm().clamp(min=1)


def op(values: Sequence[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    return torch.ops.attnres.block_attn_res(list(values), query, gain, EPS, 1.0, False)


def walk(model: Tower, per_block: int, queries: list[Tensor], gains: list[Tensor], read: Read) -> Tensor:
    """A forward as released models have it: blocks of ``per_block`` layers, and one running sum.

    Before the first read of a block the sum of the block before is sealed, the embedding as the first of them. The very
    first read, of the embedding alone, is skipped. One read more comes before the last norm.
    """
    sealed: list[Tensor] = []
    running: Tensor | None = model.embed(X)
    sites = zip(queries, gains, strict=True)
    for number, layer in enumerate(model.layers):
        for sublayer in (layer.first, layer.second):
            if sublayer is layer.first and number % per_block == 0:
                sealed, running = [*sealed, running], None
            sources = sealed if running is None else [*sealed, running]
            f = sublayer(sources[0] if len(sources) == 1 else read(sources, *next(sites)))
            running = f if running is None else running + f
    last = read([*sealed, running], *next(sites))
    assert next(sites, None) is None
    return model.head(model.norm(last))


@pytest.mark.parametrize("per_block", [1, 2, 3, 5])
@torch.no_grad()
def test_a_rewritten_model_agrees_with_the_walk_of_released_models(naive: Read, per_block: int) -> None:
    model = prepared(Tower(5))
    plain = prepared(Tower(5))
    plain.load_state_dict(model.state_dict())
    ar.rewrite(model, config=ar.AttnResConfig(layers_per_block=per_block), example_inputs=X, backend="eager")
    queries, gains = site_parameters(randomise_sites(model))
    assert relative_error(model(X), walk(plain, per_block, queries, gains, naive)) < TOLERANCE


@pytest.mark.parametrize("name", ["the embedding mixed in", "U-net skips"])
@torch.no_grad()
def test_a_linked_model_agrees_with_the_read_of_flash_linear_attention(naive: Read, name: str) -> None:
    model = randomise_sites(ar.rewrite(linked(name), 3, example_inputs=X, backend="eager"))
    trace: list[int] = []
    expected = reference(linked(name), X, *site_parameters(model), 3, trace, naive)
    assert tuple(trace) == SOURCES
    assert relative_error(model(X), expected) < TOLERANCE
