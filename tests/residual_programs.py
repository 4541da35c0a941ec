"""Random pre-norm programs with a planted residual stream.

A :class:`Program` describes one, and :class:`Model` is the module that it describes. What an analysis has to find
in that follows from the description alone.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH, LENGTH, WIDTH = 2, 3, 8

# What a user could reasonably write and the analysis does not follow yet. Every name here is that of an option
# below; taking it out of this list puts it into the programs.
NOT_YET: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A way to write ``x + alpha * f``, and which of the two it overwrites."""

    add: Callable[[Tensor, Tensor], Tensor]
    alpha: float = 1.0
    overwrites: str = ""


def _iadd(left: Tensor, right: Tensor) -> Tensor:
    left += right
    return left


SPELLINGS = {
    "x + f": Spelling(lambda x, f: x + f),
    "f + x": Spelling(lambda x, f: f + x),
    "operator.add(x, f)": Spelling(operator.add),
    "torch.add(x, f)": Spelling(torch.add),
    "torch.add(f, x)": Spelling(lambda x, f: torch.add(f, x)),
    "torch.add(input=x, other=f)": Spelling(lambda x, f: torch.add(input=x, other=f)),
    "torch.add(other=x, input=f)": Spelling(lambda x, f: torch.add(other=x, input=f)),
    "torch.add(x, f, alpha=0.5)": Spelling(lambda x, f: torch.add(x, f, alpha=0.5), 0.5),
    "x.add(f)": Spelling(lambda x, f: x.add(f)),
    "f.add(x)": Spelling(lambda x, f: f.add(x)),
    "x.add(other=f, alpha=-0.75)": Spelling(lambda x, f: x.add(other=f, alpha=-0.75), -0.75),
    "x.__add__(f)": Spelling(lambda x, f: x.__add__(f)),
    "f.__radd__(x)": Spelling(lambda x, f: f.__radd__(x)),
    "aten.add(x, f)": Spelling(lambda x, f: torch.ops.aten.add.Tensor(x, f)),
    "sum((x, f))": Spelling(lambda x, f: sum((x, f))),
    "x - f": Spelling(lambda x, f: x - f, -1.0),
    "x += f": Spelling(_iadd, overwrites="x"),
    "f += x": Spelling(lambda x, f: _iadd(f, x), overwrites="f"),
    "operator.iadd(x, f)": Spelling(operator.iadd, overwrites="x"),
    "x.__iadd__(f)": Spelling(lambda x, f: x.__iadd__(f), overwrites="x"),
    "x.add_(f)": Spelling(lambda x, f: x.add_(f), overwrites="x"),
    "f.add_(x)": Spelling(lambda x, f: f.add_(x), overwrites="f"),
    "x.add_(f, alpha=0.25)": Spelling(lambda x, f: x.add_(f, alpha=0.25), 0.25, "x"),
}
# Functions of a tensor, the sizes [B, T], and the narrow and the wide dtype. First those that keep shape and dtype.
KEEPS = {
    "contiguous": lambda x, s, d: x.contiguous(),
    "clone": lambda x, s, d: x.clone(),
    "alias": lambda x, s, d: torch.ops.aten.alias.default(x),
    "to its dtype": lambda x, s, d: x.to(x.dtype),
    "dropout(x, 0)": lambda x, s, d: functional.dropout(x, 0.0),
    "dropout(x, training=False)": lambda x, s, d: functional.dropout(x, 0.1, False),
}
WIDEN, NARROW = "to the wide dtype", "to the narrow dtype"
CASTS = {WIDEN: lambda x, s, d: x.to(d[1]), NARROW: lambda x, s, d: x.to(d[0])}
FLATTEN = {
    "reshape(-1, D)": lambda x, s, d: x.reshape(-1, WIDTH),
    "view(B * T, D)": lambda x, s, d: x.view(s[0] * s[1], WIDTH),
    "flatten(0, 1)": lambda x, s, d: x.flatten(0, 1),
}
UNFLATTEN = {
    "view(B, T, D)": lambda x, s, d: x.view(*s, WIDTH),
    "reshape(B, T, D)": lambda x, s, d: x.reshape(*s, WIDTH),
    "unflatten": lambda x, s, d: x.unflatten(0, s),
}
UNSQUEEZE = {"unsqueeze": lambda x, s, d: x.unsqueeze(0), "x[None]": lambda x, s, d: x[None]}
SQUEEZE = {"squeeze": lambda x, s, d: x.squeeze(0)}
TRANSPARENT = KEEPS | CASTS | FLATTEN | UNFLATTEN | UNSQUEEZE | SQUEEZE

SCALES = {
    "number": (None, lambda x, c: 0.5 * x),
    "number, method": (None, lambda x, c: x.mul(1.25)),
    "division": (None, lambda x, c: x / 0.75),
    "parameter": ((1,), lambda x, c: x * c),
    "scalar parameter": ((), lambda x, c: torch.mul(x, c)),
    "channels": ((WIDTH,), lambda x, c: c * x),
}
# What links a value of the stream with an earlier one, by a number or a parameter of the shape given.
LINKS = {
    "mixed in": ((), lambda x, y, c: c * x + 0.5 * y),
    "added": (None, lambda x, y, c: x + y),
    "weighted": ((WIDTH,), lambda x, y, c: x + c * y),
    "taken off": ((1,), lambda x, y, c: x - c * y),
    "negated": (None, lambda x, y, c: -(0.25 * y - x)),
    "averaged": (None, lambda x, y, c: (y + x) / 2),
}
LEAF_BODIES = ("feed", "attention", "experts", "accumulated", "low rank", "gated", "shifted", "modulated")
NESTED_BODIES = ("nested", "nested, bare", "nested on the stream")
EMBEDDINGS = ("position", "position, sliced", "position, expand_as(x)", "position, to(x)", "kind", "norm")
LAYOUTS = ("list", "attributes", "sequential", "sublayers", "owner", "list of lists")


@dataclasses.dataclass(frozen=True, repr=False)
class Sublayer:
    """One residual connection."""

    bodies: tuple[str, ...] = ("feed",)  # What the branch sums: two make a parallel residual x + (a + b).
    norm: str = "layer"
    inner: tuple[str, ...] = ()  # Spellings of the adds of a nested chain, one a link.
    gain: bool = False  # On the branch output, by channel.
    spelling: str = "x + f"
    behind: int = 0  # How many values of the stream ago the branch reads: 1 for the b of x + a(x) + b(x).
    scale: str | None = None  # Of the stream.
    scale_first: bool = False  # Before the branch reads it, and not after.
    side: tuple[str, ...] = ()  # Transparent operations on the stream's operand of the add alone.
    cast_source: bool = False  # What the branch reads, to the narrow dtype.
    cast: bool = False  # The branch output to the wide dtype.
    after: tuple[str, ...] = ()  # Transparent operations on the new value.
    extra: str | None = None  # A further read of it: "value" returns it, "head" what a head makes of it.
    # What makes this no plain residual: on the stream a "norm", a "gate", a "projection", or, over "depth", a mix with
    # the value before by weights that compute from both.
    spoil: str | None = None

    def __repr__(self) -> str:
        fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return f"Sublayer({', '.join(f'{f.name}={value!r}' for f, value in fields if value != f.default)})"


@dataclasses.dataclass(frozen=True)
class Link:
    """Before layer ``to``, or before the last norm, the value after ``to`` layers is linked with an earlier one."""

    to: int
    origin: int  # The number of layers that the earlier value has behind it.
    kind: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Embedding, layers, final norm."""

    layers: tuple[tuple[Sublayer, ...], ...]
    layout: str = "list"  # Where the layers live and the adds run.
    wrapped: bool = False  # The model that holds the layers is a child of another.
    embeddings: tuple[str, ...] = ()  # What is added to the embedding before the stream begins.
    flat: bool = False  # The stream is [B * T, D].
    wide: bool = False  # The stream has another dtype than the weights.
    final_norm: bool = True  # Else the last value is returned as it is.
    blocks: int | str | tuple[int] = 1  # A number, "full", or (layers of a block,).
    links: tuple[Link, ...] = ()

    def link_to(self, layer: int) -> Link | None:
        return next((link for link in self.links if link.to == layer), None)


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Body(nn.Module):
    """A sublayer without norm and residual connection, with adds inside that are no residual stream."""

    def __init__(self, kind: str, inner: Sequence[str]) -> None:
        super().__init__()
        self.kind, self.inner = kind, tuple(inner)
        self.a, self.b, self.c, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.links = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in inner)
        self.frequencies = nn.Parameter(torch.rand(WIDTH))

    def rotary(self, q: Tensor) -> Tensor:
        angles = torch.arange(q.shape[-2])[:, None] * self.frequencies
        left, right = q.chunk(2, -1)
        return q * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    def attention(self, n: Tensor) -> Tensor:
        q, k = self.rotary(self.a(n)), self.rotary(self.b(n))
        return self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ self.c(n))

    def experts(self, n: Tensor, weight: Tensor) -> Tensor:
        return weight[..., :1] * self.a(n) + weight[..., 1:2] * self.b(n) + self.c(n)

    def accumulated(self, n: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for i, expert in enumerate((self.a, self.b, self.c)):
            total += weight[..., i : i + 1] * expert(n)
        return total

    def forward(self, n: Tensor, x: Tensor) -> Tensor:
        if self.kind == "attention":
            return self.attention(n)
        if self.kind == "experts":
            return self.experts(n, self.out(n).softmax(-1))
        if self.kind == "accumulated":
            return self.accumulated(n, self.out(n).softmax(-1), x)
        if self.kind == "low rank":
            return self.a(n) + 0.5 * self.c(self.b(n))
        if self.kind == "gated":
            return functional.silu(self.a(n)) * self.b(n) + self.c(n)
        if self.kind == "shifted":
            return self.out(n + self.a.bias * (n.roll(1, -2) - n))
        if self.kind == "modulated":
            return self.out(n * (1 + self.a(n)) + self.b(n))
        if self.kind == "feed":
            return self.out(self.a(n).tanh())
        h = x if self.kind == "nested on the stream" else n
        for link, spelling in zip(self.links, self.inner, strict=True):
            h = SPELLINGS[spelling].add(h, link(h))
        return h if self.kind == "nested, bare" else self.out(h)


class Branch(nn.Module):
    """What one sublayer adds to the stream."""

    def __init__(self, sub: Sublayer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if sub.norm == "layer" else RmsNorm()
        self.bodies = nn.ModuleList(Body(kind, sub.inner) for kind in sub.bodies)
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5) if sub.gain else None

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        f = self.bodies[0](n, x)
        for body in self.bodies[1:]:
            f = f + body(n, x)
        return f if self.gain is None else self.gain * f


class Connection(nn.Module):
    """A sublayer with its residual connection, which runs in this module or, by ``connect``, in its caller."""

    def __init__(self, sub: Sublayer, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.sub, self.dtypes, self.branch = sub, dtypes, Branch(sub)
        shape = SCALES[sub.scale][0] if sub.scale else None
        self.scale = nn.Parameter(torch.rand(shape) + 0.5) if shape is not None else None
        self.norm = nn.LayerNorm(WIDTH) if sub.spoil == "norm" else None
        self.gate = nn.Linear(WIDTH, WIDTH) if sub.spoil in ("gate", "depth") else None
        self.projection = nn.Linear(WIDTH, WIDTH) if sub.spoil == "projection" else None

    def rescale(self, x: Tensor) -> Tensor:
        return SCALES[self.sub.scale][1](x, self.scale)

    def connect(self, x: Tensor, older: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The value of the stream before, scaled where the branch reads it so, and the one after."""
        sub = self.sub
        x = self.rescale(x) if sub.scale and sub.scale_first else x
        source = x if older is None else older
        f = self.branch(source.to(self.dtypes[0]) if sub.cast_source else source)
        side = x * torch.sigmoid(self.gate(x)) if sub.spoil == "gate" else x
        side = self.rescale(side) if sub.scale and not sub.scale_first else side
        for name in sub.side:
            side = TRANSPARENT[name](side, sizes, self.dtypes)
        new = SPELLINGS[sub.spelling].add(side, f.to(self.dtypes[1]) if sub.cast else f)
        new = self.norm(new) if sub.spoil == "norm" else new
        new = new + torch.sigmoid(self.gate(new)) * side if sub.spoil == "depth" else new
        new = self.projection(new) if sub.spoil == "projection" else new
        for name in sub.after:
            new = TRANSPARENT[name](new, sizes, self.dtypes)
        return x, new

    forward = connect


class Layer(nn.Module):
    """Some sublayers; ``run`` leaves the adds to its caller's forward."""

    def __init__(self, subs: Sequence[Sublayer], layout: str, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.layout, self.connections = layout, nn.ModuleList(Connection(sub, dtypes) for sub in subs)

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        sizes, values, extras = (x.shape[0], x.shape[1]), [x], []
        for connection in self.connections:
            sub = connection.sub
            step = connection if self.layout == "sublayers" else connection.connect
            values[-1], new = step(values[-1], values[-1 - sub.behind] if sub.behind else None, sizes)
            values.append(new)
            if sub.extra:
                extras.append(new if sub.extra == "value" else auxiliary_head(new))
        return values[-1], *extras

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.run(x)[0] if self.layout == "sequential" else self.run(x)


def auxiliary_head(x: Tensor) -> Tensor:
    return functional.layer_norm(x, (WIDTH,)).square().mean(-1)


class Embedding(nn.Module):
    """Input ``[B, T, D]`` to the root of the stream, by sums none of which is a residual connection."""

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds, self.linear, self.norm = tuple(kinds), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.table = nn.Embedding(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        for kind in self.kinds:
            sliced = self.table.weight[: x.shape[1]]
            if kind == "position":
                x = x + self.table(torch.arange(x.shape[1], device=x.device).expand(x.shape[0], x.shape[1]))
            elif kind == "position, sliced":
                x = x + sliced.expand(x.shape)
            elif kind == "position, expand_as(x)":
                x = x + sliced.expand_as(x)
            elif kind == "position, to(x)":
                x = x + sliced.expand(x.shape).to(x)
            elif kind == "kind":
                x = x + self.table(torch.zeros_like(x[..., 0], dtype=torch.long))
            else:
                x = self.norm(x)
        return x


class Model(nn.Module):
    """The module that holds the layers; with narrow weights and, where the program says so, wide sums."""

    def __init__(self, program: Program, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.program, self.dtypes = program, dtypes
        self.embed, self.norm = Embedding(program.embeddings), nn.LayerNorm(WIDTH)
        layers = [Layer(subs, program.layout, dtypes) for subs in program.layers]
        if program.layout == "attributes":
            for i, layer in enumerate(layers):
                setattr(self, f"layer_{i}", layer)
        else:
            self.layers = nn.Sequential(*layers) if program.layout == "sequential" else nn.ModuleList(layers)
        shapes = [LINKS[link.kind][0] or () for link in program.links]
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(shape) + 0.5) for shape in shapes)
        self.to(dtypes[0])

    def all_layers(self) -> list[Layer]:
        if self.program.layout == "attributes":
            return [getattr(self, f"layer_{i}") for i in range(len(self.program.layers))]
        return list(self.layers)

    def linked(self, layer: int, x: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """What is read by a layer, or by the last norm, of tensors or of whatever has their arithmetic."""
        link = self.program.link_to(layer)
        if link is None:
            return x
        weight = self.weights[self.program.links.index(link)]
        return LINKS[link.kind][1](x, kept[link.origin], weight)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        program, extras = self.program, []
        x = self.embed(inputs)
        x = x.flatten(0, 1) if program.flat else x
        x = x.to(self.dtypes[1]) if program.wide else x
        if program.layout == "sequential":
            x = self.layers(x)
        else:
            kept = []
            for i, layer in enumerate(self.all_layers()):
                # A copy: the layer may add in place.
                kept.append(x.clone() if program.links else x)
                x = self.linked(i, x, kept)
                x, *more = layer.run(x) if program.layout in ("owner", "list of lists") else layer(x)
                extras += more
            x = self.linked(len(kept), x, kept)
        return self.norm(x.to(self.dtypes[0])) if program.final_norm else x, *extras


class Wrapper(nn.Module):
    """A model that holds the model with the layers."""

    def __init__(self, body: Model) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return self.body(inputs)
