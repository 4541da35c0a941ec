"""Models whose layers are linked by more than the residual connection, as people train them: all of it is linear."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.handwritten import HEADS, VOCAB, WIDTH, attend, ids
from zoo.member import Accepted, Member

HEAD = WIDTH // HEADS


def norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.size(-1),))


def rotary(x: Tensor) -> Tensor:
    """``[B, T, H, head]``, halves paired."""
    time = torch.arange(x.size(1), device=x.device, dtype=x.dtype)
    angle = time[:, None] * 100.0 ** -torch.linspace(0, 1, HEAD // 2, device=x.device, dtype=x.dtype)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


class ValueAttention(nn.Module):
    """Attention whose values may have an embedding added, gated by a few channels of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.c_q, self.c_k, self.c_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.c_proj, self.ve_gate = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(12, HEADS, bias=False)

    def forward(self, x: Tensor, ve: Tensor | None) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (HEADS, HEAD)) for linear in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :12]))
            v = v + gate.unsqueeze(-1) * ve.unflatten(-1, (HEADS, HEAD))
        q, k = norm(rotary(q)), norm(rotary(k))
        return self.c_proj(attend(q.flatten(2), k.flatten(2), v.flatten(2)))


class SquaredReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(WIDTH, 96, bias=False), nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.relu(self.c_fc(x)).square())


class NanochatBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = ValueAttention(), SquaredReLU()

    def forward(self, x: Tensor, ve: Tensor | None) -> Tensor:
        x = x + self.attn(norm(x), ve)
        x = x + self.mlp(norm(x))
        return x


class Nanochat(nn.Module):
    """The layout of nanochat: the embedding mixed in before every layer, gated value embeddings in every other one,
    neighbouring tokens smeared before the first, and a middle value taken off after the last."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.h = nn.ModuleList(NanochatBlock() for _ in range(layers))
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(VOCAB, WIDTH) for i in range(1, layers, 2)})
        self.resid_lambdas = nn.Parameter(1.0 + 0.1 * torch.arange(layers))
        self.x0_lambdas = nn.Parameter(0.1 + 0.05 * torch.arange(layers))
        self.smear_gate, self.smear_lambda = nn.Linear(24, 1, bias=False), nn.Parameter(torch.tensor(0.5))
        self.backout_lambda = nn.Parameter(torch.tensor(0.2))

    def forward(self, idx: Tensor) -> Tensor:
        x = norm(self.wte(idx))
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[:, 1:, :24]))
        x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
        x0, x_backout = x, None
        for i, block in enumerate(self.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            x = block(x, self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None)
            if i == len(self.h) // 2:
                x_backout = x
        x = norm(x - self.backout_lambda * x_backout)
        return 15 * torch.tanh(self.lm_head(x) / 15)


class SpeedrunBlock(nn.Module):
    """A layer that mixes the embeddings in itself."""

    def __init__(self, embeddings: int, attention: bool) -> None:
        super().__init__()
        self.attn = ValueAttention() if attention else None
        self.mlp = SquaredReLU()
        self.lambdas = nn.Parameter(torch.tensor([0.9, *[0.2] * embeddings]))

    def forward(self, x: Tensor, ve: Tensor | None, *embeddings: Tensor) -> Tensor:
        x = self.lambdas[0] * x
        for i, embedding in enumerate(embeddings, start=1):
            x = x + self.lambdas[i] * embedding
        if self.attn is not None:
            x = x + self.attn(norm(x), ve)
        return x + self.mlp(norm(x))


class Speedrun(nn.Module):
    """The layout of modded-nanogpt: U-net skips with learned weights, value embeddings, the embedding mixed in."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.value_embeds = nn.ModuleList(nn.Embedding(VOCAB, WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(SpeedrunBlock(1, attention=True) for _ in range(layers))
        self.skip_weights = nn.Parameter(0.5 + 0.1 * torch.arange(layers // 2))

    def forward(self, ids: Tensor) -> Tensor:
        x = x0 = norm(self.embed(ids))
        ve = [embed(ids) for embed in self.value_embeds]
        skips, n = [], len(self.skip_weights)
        for i, block in enumerate(self.blocks):
            if i >= n:
                x = x + self.skip_weights[i - n] * skips.pop()
            x = block(x, ve[i % 2] if i % n < 2 else None, x0)
            if i < n:
                skips.append(x)
        return self.lm_head(norm(x)).tanh()


class SpeedrunMedium(nn.Module):
    """Its medium track: two embeddings mixed in before every layer, skips over a map, a layer without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.skips = {9: 6, 10: 4, 11: 2}
        self.embed1, self.embed2 = nn.Embedding(VOCAB, WIDTH), nn.Embedding(VOCAB, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.blocks = nn.ModuleList(SpeedrunBlock(2, attention=i != 7) for i in range(16))
        self.skip_weights = nn.Parameter(0.5 + 0.05 * torch.arange(len(self.blocks)))

    def forward(self, ids: Tensor) -> Tensor:
        x00, x01 = norm(self.embed1(ids)), norm(self.embed2(ids))
        x, kept = x00, []
        for i, block in enumerate(self.blocks):
            if i in self.skips:
                x = x + self.skip_weights[self.skips[i]] * kept[self.skips[i]]
            x = block(x, None, x00, x01)
            kept.append(x)
        return self.lm_head(norm(x))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = ValueAttention(), SquaredReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), None)
        return x + self.mlp(self.ln_2(x))


class DenseFormer(nn.Module):
    """The layout of DenseFormer: every layer's output is averaged, with learned weights, with all values before it."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.h, self.ln_f = nn.ModuleList(DenseBlock() for _ in range(layers)), nn.LayerNorm(WIDTH)
        generator = torch.Generator().manual_seed(0)
        weights = (torch.rand(i + 2, generator=generator) * 0.6 - 0.1 for i in range(layers))
        self.alphas = nn.ParameterList(nn.Parameter(w) for w in weights)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx)
        all_x = [x]
        for block, alphas in zip(self.h, self.alphas, strict=True):
            all_x.append(block(x))
            x = torch.tensordot(alphas, torch.stack(all_x), dims=1)
        return self.lm_head(self.ln_f(x))


SIX = Accepted({"": 12}, layers=6)

MEMBERS = [
    Member("nanochat style", "linked", Nanochat, ids, SIX),
    Member("modded-nanogpt style", "linked", Speedrun, ids, SIX),
    Member("modded-nanogpt style, medium track", "linked", SpeedrunMedium, ids, Accepted({"": 31}, layers=16)),
    Member("DenseFormer style", "linked", DenseFormer, ids, SIX),
]
