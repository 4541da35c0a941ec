"""Your own tracer gives an fx.GraphModule; rewrite gives a new one, which is an ordinary module to train."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer

from attnres_rewrite import attnres_parameters, explain, rewrite


class Layer(nn.Module):
    """A pre-norm layer: mixing over tokens by their running sum, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norms[0](x)).cumsum(dim=1)
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, width: int = 32, layers: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class MLPTracer(Tracer):
    """A tracer of your own: it keeps every MLP as one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name.endswith("mlp") or super().is_leaf_module(m, module_qualified_name)


def main() -> None:
    torch.manual_seed(0)
    model, tokens = Model(), torch.randint(256, (2, 16))
    graph_module = GraphModule(model, MLPTracer().trace(model))
    print(explain(graph_module, blocks=3, example_inputs=tokens))
    rewritten = rewrite(graph_module, blocks=3, example_inputs=tokens)

    print(f"zero queries: {(rewritten(tokens) - model(tokens)).abs().max():.1e} from the original")
    nn.functional.cross_entropy(rewritten(tokens).flatten(0, 1), tokens.flatten()).backward()
    reached = [name for name, p in attnres_parameters(rewritten) if p.grad is not None and p.grad.any()]
    print(f"gradients reach {len(reached)} AttnRes parameters: {', '.join(reached[:3])}, ...")


if __name__ == "__main__":
    main()
