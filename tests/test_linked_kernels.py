"""What links cost, by Inductor's own account: the same count as in `test_kernels.py`, on a stack of feed-forwards."""

import functools
from collections.abc import Callable

import pytest
import torch
from test_kernels import Loops, counted, moved, own
from torch import Tensor, nn

import attnres_rewrite as ar

pytestmark = pytest.mark.slow

LAYERS, WIDTH, BATCH, LENGTH = 6, 256, 4, 32


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    """Six layers of two sublayers; ``link`` makes what a layer reads of the values before."""

    def __init__(self, link: Callable) -> None:
        super().__init__()
        self.embed, self.norm, self.link = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH), link
        self.feeds = nn.ModuleList(nn.ModuleList([Feed(), Feed()]) for _ in range(LAYERS))
        self.a, self.b = nn.Parameter(torch.ones(LAYERS)), nn.Parameter(torch.ones(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        values = [self.embed(x)]
        for i, (first, second) in enumerate(self.feeds):
            x = self.link(self, i, values)
            x = x + first(x)
            values.append(x + second(x))
        return self.norm(values[-1]).square().mean()


LINKS = {
    "none": lambda m, i, h: h[-1],
    "embedding": lambda m, i, h: m.a[i] * h[-1] + m.b[i] * h[0],
    "skips": lambda m, i, h: h[-1] if i < 3 else h[-1] + m.a[i] * h[6 - i],
}


@functools.cache
def loops_of(link: str, schedule: str | None) -> tuple[list[Loops], list[Loops]]:
    """The loop nests of forward and backward of the model with these links, plain or under a schedule."""

    def step() -> None:
        model, x = Stack(LINKS[link]), torch.randn(BATCH, LENGTH, WIDTH)
        if schedule is None:
            model.compile()
        else:
            ar.rewrite(model, config=ar.AttnResConfig(blocks=3, schedule=schedule), example_inputs=x)  # type: ignore[arg-type]
        model(x).backward()

    return counted(step)


@pytest.mark.parametrize(("link", "values"), [("embedding", 2), ("skips", 7)])
def test_coefficients_cost_no_pass_over_the_sources(link: str, values: int) -> None:
    """36 sources are read, and scaled where they are: what a site moves is what it moves without links.

    Three skips hold on to a partial each, and add it to a block that is a sum of its own from then on.
    """
    plain, linked = (moved(loops_of(name, "per_read")[0]) - moved(loops_of(name, None)[0]) for name in ("none", link))
    assert linked - plain <= values
    assert len(own(loops_of(link, "per_read")[0])) <= len(own(loops_of(link, None)[0]))
