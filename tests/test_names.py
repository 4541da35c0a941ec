"""Inputs, parameters and modules may be called like operators."""

import pytest
import torch
from models import WIDTH, Feed, embeddings, export, prepared, relative_error, site_parameters
from torch import Tensor, nn

import attnres_rewrite as ar

SUM = ar.AttnResConfig(blocks=2, aggregation="sum")
X = embeddings().double()


class Layer(nn.Module):
    """Its feed-forward and its dropout go by names of operators, which a graph that calls modules has."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.detach = Feed(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.detach(self.size(x))


def model_with_input(name: str) -> nn.Module:
    """Four layers on an input of this name, which is the root of the stream."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.view = nn.Parameter(torch.randn(WIDTH))
            self.layers = nn.ModuleList(Layer() for _ in range(4))
            self.norm = nn.LayerNorm(WIDTH)

        def run(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.norm(x) * self.view

    namespace: dict[str, object] = {}
    exec(f"def forward(self, {name}):\n    return self.run({name})", namespace)
    Model.forward = namespace["forward"]
    return prepared(Model()).double()


class CallsModules(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (Feed, nn.Dropout, nn.LayerNorm))


@pytest.mark.parametrize("form", ["program", "graph"])
@pytest.mark.parametrize("name", ["size", "getitem", "dropout", "detach", "linear", "zeros_like", "add"])
@torch.no_grad()
def test_an_input_of_the_name_of_an_operator_is_none(name: str, form: str) -> None:
    model = model_with_input(name)
    expected = model(X)
    if form == "program":
        rewritten = ar.rewrite(export(model, X), config=SUM).module()
    else:
        graph = torch.fx.GraphModule(model, CallsModules().trace(model))
        rewritten = ar.rewrite(graph, config=SUM, example_inputs=X)
    assert len(site_parameters(rewritten)[0]) == 4
    assert relative_error(rewritten(X), expected) < 1e-12
