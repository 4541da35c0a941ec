"""Models as people write them, without a library."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import attnres_rewrite as ar
from zoo.member import Accepted, Inputs, Member, Refused, noise, token_ids

WIDTH, HEADS, LAYERS, VOCAB = 64, 4, 4, 128


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Attention over ``[B, T, D]`` in heads."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = functional.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), CausalSelfAttention()
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class NanoGPT(nn.Module):
    """The layout of nanoGPT: a ``ModuleDict``, tied embeddings, a loss beside the logits."""

    block: type[nn.Module] = NanoBlock

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(32, WIDTH),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(self.block() for _ in range(LAYERS)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = None if targets is None else functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class InPlaceBlock(NanoBlock):
    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.ln_1(x))
        x += self.mlp(self.ln_2(x))
        return x


class InPlaceGPT(NanoGPT):
    """``x += f(x)``, which overwrites the stream."""

    block = InPlaceBlock


class PostNormBlock(NanoBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class PostNormGPT(NanoGPT):
    block = PostNormBlock


class GatedBlock(NanoBlock):
    """A highway layer: a gate says how much of the stream is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        x = x * gate + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GatedGPT(NanoGPT):
    block = GatedBlock


class DropPath(nn.Module):
    """Stochastic depth: in training a sample loses the whole branch, and the others' are scaled up for it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1 - self.rate
        mask = torch.rand(x.shape[0], 1, 1, dtype=x.dtype, device=x.device).add_(keep).floor_()
        return x.div(keep) * mask


class ScaledBlock(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), MLP()
        self.gamma1 = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.gamma2 = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.drop_path(self.gamma1 * self.attn(y, y, y, need_weights=False)[0])
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class ImageEncoder(nn.Module):
    """LayerScale and stochastic depth, with more of it the deeper the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.Sequential(*(ScaledBlock(0.4 * i / LAYERS) for i in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class Functional(nn.Module):
    """No modules inside: one forward over a dictionary of weights."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"embedding": (VOCAB, WIDTH), "final": (WIDTH,)}
        for i in range(LAYERS):
            shapes |= {f"{i}_norm1": (WIDTH,), f"{i}_qkv": (3 * WIDTH, WIDTH), f"{i}_out": (WIDTH, WIDTH)}
            shapes |= {f"{i}_norm2": (WIDTH,), f"{i}_up": (96, WIDTH), f"{i}_down": (WIDTH, 96)}
        self.w = nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()})

    def forward(self, ids: Tensor) -> Tensor:
        w = self.w
        x = functional.embedding(ids, w["embedding"])
        for i in range(LAYERS):
            y = functional.rms_norm(x, (WIDTH,), w[f"{i}_norm1"])
            q, k, v = functional.linear(y, w[f"{i}_qkv"]).chunk(3, dim=-1)
            x = torch.add(x, functional.linear(attend(q, k, v), w[f"{i}_out"]))
            y = functional.rms_norm(x, (WIDTH,), w[f"{i}_norm2"])
            x = torch.add(functional.linear(functional.silu(functional.linear(y, w[f"{i}_up"])), w[f"{i}_down"]), x)
        return functional.linear(functional.rms_norm(x, (WIDTH,), w["final"]), w["embedding"])


class Attributes(nn.Module):
    """Every sublayer is an attribute of its own, and a loop over numbers finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        for i in range(LAYERS):
            setattr(self, f"norm_a{i}", nn.LayerNorm(WIDTH))
            setattr(self, f"qkv{i}", nn.Linear(WIDTH, 3 * WIDTH))
            setattr(self, f"out{i}", nn.Linear(WIDTH, WIDTH))
            setattr(self, f"norm_b{i}", nn.LayerNorm(WIDTH))
            setattr(self, f"mlp{i}", MLP())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in range(LAYERS):
            q, k, v = getattr(self, f"qkv{i}")(getattr(self, f"norm_a{i}")(x)).chunk(3, dim=-1)
            x = x + getattr(self, f"out{i}")(attend(q, k, v))
            x = x + getattr(self, f"mlp{i}")(getattr(self, f"norm_b{i}")(x))
        return self.head(self.norm(x))


class LayerAttributes(nn.Module):
    """Layers as attributes, kept in a plain list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.block1, self.block2, self.block3, self.block4 = (NanoBlock() for _ in range(LAYERS))
        self.blocks = [self.block1, self.block2, self.block3, self.block4]
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ParallelBlock(NanoBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))


class ParallelGPT(NanoGPT):
    """Attention and feed-forward side by side: one branch output a layer."""

    block = ParallelBlock


def ids(batch: int, length: int) -> Inputs:
    return (token_ids(batch, length),)


def image(batch: int, length: int) -> Inputs:
    return (noise(batch, 3, 16, 16),)


BARE = Accepted({"": 8})
GATED = Refused("gated stream", "gated", "x = x * gate + self.attn(self.ln_1(x))", ar.UnsupportedResidualError)
POST_NORM = Refused("post-norm", "post-norm: a norm sits on the residual stream", "self.ln_1(x + self.attn(x))")
MEMBERS = [
    Member("nanoGPT style", "hand-written", NanoGPT, ids, BARE),
    Member("in-place adds", "hand-written", InPlaceGPT, ids, BARE),
    Member("parallel residual", "hand-written", ParallelGPT, ids, Accepted({"": 4})),
    Member("LayerScale and stochastic depth", "hand-written", ImageEncoder, image, BARE),
    Member("functional over a dictionary", "hand-written", Functional, ids, BARE),
    Member("sublayers as attributes", "hand-written", Attributes, ids, BARE),
    Member("layers as attributes", "hand-written", LayerAttributes, ids, BARE),
    Member("gated by hand", "hand-written", GatedGPT, ids, GATED),
    Member("post-norm by hand", "hand-written", PostNormGPT, ids, POST_NORM),
]
