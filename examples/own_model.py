"""A model of one's own: rewritten, trained on the standard library's source text, saved, and loaded again."""

import argparse
import pathlib
import sysconfig

import torch
from torch import Tensor, nn

import attnres_rewrite


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y, mask = self.norm1(x), nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        x = x + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--backend", default="inductor", help='"eager" compiles nothing and starts at once')
parser.add_argument("--out", default="out/own_model", help="the folder to save to")
options = parser.parse_args()

text = b"".join(p.read_bytes() for p in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20])
data = torch.tensor(list(text))[: len(text) // 65 * 65].view(-1, 65)
model = attnres_rewrite.rewrite(Model(), blocks=2, example_inputs=data[:2, :-1], backend=options.backend)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(options.steps):
    batch = data[torch.randint(len(data), (8,))]
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step:3d}  loss {loss.item():.3f}")
attnres_rewrite.save_pretrained(model, options.out)
loaded = attnres_rewrite.from_pretrained(options.out, Model, backend=options.backend)
print(f"saved and loaded: largest difference {(loaded(batch[:, :-1]) - model(batch[:, :-1])).abs().max():.1e}")
