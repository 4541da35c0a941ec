"""Models in the style of well-known training code: litgpt, gpt-fast, torchtitan and OLMo."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.handwritten import LAYERS, VOCAB, WIDTH, attend
from zoo.member import Accepted, Inputs, Member, token_ids


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self._norm(x.float()).type_as(x) * self.weight if x.dtype == torch.bfloat16 else self._norm(x) * self.weight
        )


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, 96, bias=False) for _ in range(2))
        self.w2 = nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class FusedQKV(nn.Module):
    """One projection for queries, keys and values, with rotary position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv, self.wo = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.wqkv(x).split([WIDTH] * 3, dim=-1)

        def rotate(t: Tensor) -> Tensor:
            half = t.shape[-1] // 2
            return t * cos + torch.cat((-t[..., half:], t[..., :half]), dim=-1) * sin

        return self.wo(attend(rotate(q), rotate(k), v))


class LitBlock(nn.Module):
    """litgpt: attention and MLP in line or side by side, with the norms that the configuration asks for."""

    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.Identity() if parallel else nn.LayerNorm(WIDTH)
        self.post_attention_norm, self.post_mlp_norm = nn.Identity(), nn.Identity()
        self.attn, self.mlp, self.parallel = FusedQKV(), SwiGLU(), parallel

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_normed = self.norm_1(x)
        attention_output = self.post_attention_norm(self.attn(x_normed, cos, sin))
        if self.parallel:
            return self.mlp(self.norm_2(x_normed)) + attention_output + x
        x = attention_output + x
        return self.post_mlp_norm(self.mlp(self.norm_2(x))) + x


class FastBlock(nn.Module):
    """gpt-fast: ``h = x + attention``, ``out = h + feed_forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = FusedQKV(), SwiGLU()
        self.ffn_norm, self.attention_norm = RMSNorm(), RMSNorm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), cos, sin)
        out = h + self.feed_forward(self.ffn_norm(h))
        return out


class OlmoBlock(nn.Module):
    """OLMo 2: the norm comes after the sublayer and before the add."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = FusedQKV(), SwiGLU()
        self.attention_norm, self.feed_forward_norm = RMSNorm(), RMSNorm()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = x + self.dropout(self.attention_norm(self.attention(x, cos, sin)))
        return h + self.dropout(self.feed_forward_norm(self.feed_forward(h)))


class Rotary(nn.Module):
    """A model whose positions come from a table that its buffers hold."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(32.0), 10000 ** (-torch.arange(0, WIDTH, 2) / WIDTH)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def table(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]


class LitGPT(Rotary):
    """litgpt keeps its layers in a ``ModuleDict``, scales the embedding, and caps the logits."""

    def __init__(self, parallel: bool = False) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "h": nn.ModuleList(LitBlock(parallel) for _ in range(LAYERS)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )

    def forward(self, idx: Tensor) -> Tensor:
        cos, sin = self.table(idx)
        x = self.transformer.wte(idx) * WIDTH**0.5
        for block in self.transformer.h:
            x = block(x, cos, sin)
        logits = self.lm_head(self.transformer.ln_f(x))
        return torch.tanh(logits / 30.0) * 30.0


class GPTFast(Rotary):
    """gpt-fast: a list of layers, a loop with their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(FastBlock() for _ in range(LAYERS))
        self.norm, self.output = RMSNorm(), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        cos, sin = self.table(idx)
        x = self.tok_embeddings(idx)
        for _, layer in enumerate(self.layers):
            x = layer(x, cos, sin)
        return self.output(self.norm(x))


class TorchTitan(Rotary):
    """torchtitan: layers in a ``ModuleDict`` by number, of which a stage of a pipeline has some, and no head maybe."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings: nn.Module | None = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleDict({str(i): FastBlock() for i in range(LAYERS)})
        self.norm: nn.Module | None = nn.RMSNorm(WIDTH)
        self.output: nn.Module | None = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = self.table(tokens)
        h = self.tok_embeddings(tokens) if self.tok_embeddings else tokens
        for layer in self.layers.values():
            h = layer(h, cos, sin)
        h = self.norm(h) if self.norm else h
        return self.output(h) if self.output else h


class OLMo(Rotary):
    """OLMo: blocks by number, and a head that is a module of its own with the last norm in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleDict({str(i): OlmoBlock() for i in range(LAYERS)})
        self.lm_head = nn.Sequential(RMSNorm(), nn.Linear(WIDTH, VOCAB, bias=False))

    def forward(self, input_ids: Tensor) -> Tensor:
        cos, sin = self.table(input_ids)
        h = self.embeddings(input_ids)
        for block in self.blocks.values():
            h = block(h, cos, sin)
        return self.lm_head(h)


def ids(batch: int, length: int) -> Inputs:
    return (token_ids(batch, length),)


STYLES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "litgpt style": (LitGPT, 8),
    "litgpt style, parallel": (lambda: LitGPT(parallel=True), 4),
    "gpt-fast style": (GPTFast, 8),
    "torchtitan style": (TorchTitan, 8),
    "OLMo style": (OLMo, 8),
}
MEMBERS = [
    Member(name, "hand-written", make, ids, Accepted({"": branches})) for name, (make, branches) in STYLES.items()
]
