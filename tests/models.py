"""Tiny models for the tests, and the few helpers that every test of a whole model needs."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH = 61, 32


def mostly_slow(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Parameters of a test of which all but ``fast`` are for ``make test-slow``."""
    return [pytest.param(value, marks=() if value in fast else pytest.mark.slow) for value in values]


def llama(layers: int = 5, **overrides: object) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **overrides,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(layers: int = 5, **overrides: object) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=layers, n_head=4, **overrides
    )
    return transformers.GPT2LMHeadModel(config)


def gpt_neox(layers: int = 5, **overrides: object) -> nn.Module:
    """Parallel residuals: one branch output a layer."""
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=layers,
        # Rotary embedding covers a quarter of a head, in pairs: heads of 16, not of 4.
        num_attention_heads=2,
        max_position_embeddings=32,
        **overrides,
    )
    return transformers.GPTNeoXForCausalLM(config)


def opt(layers: int = 5, **overrides: object) -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=WIDTH,
        **overrides,
    )
    return transformers.OPTForCausalLM(config)


def vit(layers: int = 5, **overrides: object) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=7,
        **overrides,
    )
    return transformers.ViTForImageClassification(config)


def bert(layers: int = 3) -> nn.Module:
    """Post-norm, so refused."""
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return transformers.BertModel(config)


class Encoder(nn.Module):
    """torch's own pre-norm encoder, with an embedding before and a head after."""

    def __init__(self, layers: int = 5, norm_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 40, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)))


class Mlp(nn.Module):
    """No residual stream at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


class Feed(nn.Module):
    """A pre-norm sublayer, without its residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh())


class Block(nn.Module):
    """Two sublayers with their residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Feed(), Feed()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class Tower(nn.Module):
    """The smallest pre-norm model: blocks without attention, and a norm and head after them.

    It takes embeddings ``[B, T, D]``, so any tracer can follow it; ``breaks_before`` puts a graph break
    before that layer, or before the head.
    """

    def __init__(self, layers: int = 5, breaks_before: int | str | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.breaks_before = breaks_before

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, layer in enumerate(self.layers):
            if self.breaks_before == i:
                torch._dynamo.graph_break()
            x = layer(x)
        if self.breaks_before == "head":
            torch._dynamo.graph_break()
        return self.head(self.norm(x))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of the supported architectures.

    Attributes:
        make: Builds a tiny one with a number of layers.
        owner: The module that holds its stream.
        sites_per_layer: Branch outputs, so sites, that a layer has.
        inputs: Example inputs for a batch and a sequence length.
    """

    make: Callable[..., nn.Module]
    owner: str
    sites_per_layer: int
    inputs: Callable[[int, int], Tensor]


def token_ids(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def images(batch: int = 2, length: int = 0, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def embeddings(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


ARCHITECTURES = {
    "llama": Architecture(llama, "model", 2, token_ids),
    "gpt2": Architecture(gpt2, "transformer", 2, token_ids),
    "gpt-neox": Architecture(gpt_neox, "gpt_neox", 1, token_ids),
    "opt": Architecture(opt, "model.decoder", 2, token_ids),
    "vit": Architecture(vit, "vit", 2, images),
    "encoder": Architecture(Encoder, "encoder", 2, token_ids),
}


def prepared(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """``model`` in eval mode, with seeded weights that are large enough for every layer to matter."""
    model = model.to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            # Norms and biases stay near where they start; matrices get unit gain.
            scale = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(0.1 * noise + parameter if parameter.dim() < 2 else scale * noise)
    return model


def randomise_sites(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random pseudo-queries and gains, so that plain residuals give other numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in ar.attnres_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.copy_(noise if name.endswith("query") else 1 + 0.3 * noise)
    return model


def site_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and gains in depth order."""
    named = list(ar.attnres_parameters(model))
    queries = [parameter.detach() for name, parameter in named if name.endswith("query")]
    return queries, [parameter.detach() for name, parameter in named if name.endswith("gain")]


def export(model: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    """The plain export of ``model``, by the first argument of its forward and without a KV cache."""
    if hasattr(model, "config"):
        model.config.use_cache = False
    return torch.export.export(model, inputs)


def logits(output: object) -> Tensor:
    """The logits of a Hugging Face output, or the output itself where it is a tensor."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    assert isinstance(found, Tensor), type(output)
    return found


@contextlib.contextmanager
def activations_kept(model: nn.Module) -> Iterator[dict[int, int]]:
    """Within the context: bytes, by address, that autograd keeps for the backward pass beside the parameters."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception with everything that it came from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def names_of(prefix: str, sites: int, parts: Sequence[str] = ("query", "gain")) -> list[str]:
    """The names of the parameters that a stream gets."""
    return [f"{prefix}.{i}.{part}".lstrip(".") for i in range(sites) for part in parts]
