"""Bad input gets a typed error that names the cause and the next step, and leaves the model as it was."""

import copy
import gc
import re
import weakref
from collections.abc import Callable

import pytest
import torch
from models import (
    VOCAB,
    WIDTH,
    Block,
    Encoder,
    Mlp,
    Tower,
    bert,
    embeddings,
    export,
    images,
    llama,
    logits,
    mostly_slow,
    prepared,
    randomise_sites,
    relative_error,
    token_ids,
    vit,
)
from torch import Tensor, nn

import attnres_rewrite as ar


class Untouched:
    """What a model is made of, to compare with later."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.members = self.look()

    def look(self) -> list[tuple[object, ...]]:
        modules = [(name, module, sorted(module.__dict__), module.training) for name, module in self._modules()]
        parameters = [(name, id(p), p.requires_grad, p.grad) for name, p in self.model.named_parameters()]
        return [*modules, *parameters, (self.model._compiled_call_impl, torch.get_rng_state().tolist())]

    def _modules(self) -> list[tuple[str, nn.Module]]:
        return list(self.model.named_modules())

    def check(self) -> None:
        assert self.look() == self.members
        assert "forward" not in self.model.__dict__
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(value, state[name]) for name, value in self.state.items())


def refused(model: nn.Module, error: type[Exception], match: str, *args: object, **options: object) -> None:
    """``rewrite`` and ``explain`` raise the error, and nothing has changed."""
    before = Untouched(model)
    with pytest.raises(error, match=match):
        ar.rewrite(model, *args, **options)
    before.check()
    if not options.keys() - {"config", "example_inputs"}:
        with pytest.raises(error, match=match):
            ar.explain(model, *args, **options)
        before.check()


# Models without a stream that can be rewritten


def test_no_residual_stream() -> None:
    refused(
        Mlp(),
        ar.NoResidualStreamError,
        "no chain of adds x = x . f.x. runs over at least two sublayers.*adds no two tensors",
        example_inputs=embeddings(),
    )


class Skip(nn.Module):
    """Adds, but none of them a residual stream; the message lists them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_adds_that_were_considered_are_listed() -> None:
    refused(
        Skip(),
        ar.NoResidualStreamError,
        r"return self.left\(x\) \+ self.right\(x\): neither operand computes from the other",
        example_inputs=embeddings(),
    )


@pytest.mark.parametrize("make", [bert, lambda: Encoder(3, norm_first=False)], ids=["bert", "encoder"])
def test_post_norm_is_refused_with_the_source_line_of_the_norm(make) -> None:
    model = make().eval()
    where = r"\(at module '.*(LayerNorm|norm1)': .*\.py:\d+: .*\)"
    refused(model, ar.UnsupportedResidualError, f"post-norm: .*Use a pre-norm variant of the model {where}", 2)


@pytest.mark.parametrize("blocks", [0, -1, 2.5, True, "eight"])
def test_blocks_that_are_no_count(blocks) -> None:
    match = re.escape(f'blocks must be a positive integer, "full" or "auto", not {blocks!r}')
    refused(llama(3), ar.BlockPartitionError, match, blocks)
    with pytest.raises(ValueError, match=match):
        ar.rewrite(llama(3), blocks)


@pytest.mark.slow
def test_more_blocks_than_layers() -> None:
    refused(llama(3), ar.BlockPartitionError, 'only 3 layers .*choose at most 3, or blocks="full"', 4)
    # The default is 8.
    refused(llama(3), ar.BlockPartitionError, "blocks=8, but the stream has only 3 layers")
    config = ar.AttnResConfig(layers_per_block=4)
    refused(llama(3), ar.BlockPartitionError, "layers_per_block=4, but .* only 3 layers", config=config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("aggregation", "max"),
        ("eps", -1e-6),
        ("eps", float("nan")),
        ("eps", "1e-6"),
        ("schedule", "fast"),
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("scale", "1"),
        ("scale", True),
        ("key_gain", "no"),
        ("key_gain", 1),
        ("streams", (1,)),
    ],
)
def test_configuration_out_of_range(field, value) -> None:
    with pytest.raises(ValueError, match=f"{field} must"):
        ar.AttnResConfig(**{field: value})


@pytest.mark.slow
def test_already_rewritten() -> None:
    ids = token_ids()
    model = randomise_sites(ar.rewrite(prepared(llama(3)), 2, backend="eager"))
    expected = logits(model(ids))
    for verb in (ar.rewrite, ar.explain):
        with pytest.raises(
            ar.UnsupportedResidualError, match=r"already has Attention Residuals, in module 'model': undo\(model\)"
        ):
            verb(model, 3)
    assert torch.equal(logits(model(ids)), expected)
    assert logits(ar.rewrite(ar.undo(model), 3, backend="eager")(ids)).shape == expected.shape


def test_already_rewritten_graphs() -> None:
    program = ar.rewrite(export(prepared(llama(3)), token_ids()), 2)
    for form in (program, program.module()):
        for verb in (ar.rewrite, ar.explain):
            with pytest.raises(ar.UnsupportedResidualError, match="already has Attention Residuals"):
                verb(form, 2)


def test_an_attribute_in_the_way() -> None:
    model = llama(3)
    model.model.attn_res = nn.Linear(2, 2)
    before = Untouched(model)
    with pytest.raises(ar.UnsupportedResidualError, match="'model' already has an attribute attn_res: rename it"):
        ar.rewrite(model, 2)
    before.check()


def test_a_model_that_is_nothing_but_a_sequence() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block(), nn.LayerNorm(WIDTH))
    before = Untouched(model)
    with pytest.raises(ar.UnsupportedResidualError, match=r"the whole model is an nn\.Sequential.*put it into a"):
        ar.rewrite(model, 2, example_inputs=embeddings())
    before.check()


# Example inputs


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ([1, 2, 3], "example_inputs is a list: pass a mapping .* a tuple .* or a tensor"),
        (5, "example_inputs is a int: pass a mapping"),
        (torch.randn(2, 9), r"does not run on the example inputs \(float32\[2, 9\]\): .*Long, Int"),
        (torch.zeros(2, 3, 4, 5, dtype=torch.long), r"does not run on the example inputs \(int64\[2, 3, 4, 5\]\)"),
        ({"pixels": token_ids()}, r"does not run on the example inputs \(pixels=int64\[2, 9\]\): "),
        ((token_ids(), "mask"), r"does not run on the example inputs \(int64\[2, 9\], str\)"),
        ((), r"does not run on the example inputs \(\): ValueError: You must specify exactly one of input_ids"),
    ],
    ids=["list", "int", "dtype", "shape", "keyword", "mask", "nothing"],
)
def test_example_inputs_that_do_not_fit(inputs, match) -> None:
    refused(llama(3).eval(), ar.ExampleInputsError, match, 2, example_inputs=inputs)


def test_example_inputs_that_cannot_be_guessed() -> None:
    match = "cannot guess example inputs for Tower, which begins with a Linear: pass example_inputs="
    refused(Tower(3), ar.ExampleInputsError, match, 2)
    model = nn.Module()
    refused(model, ar.ExampleInputsError, "for Module, which has no layer that tells: pass example_inputs=", 2)


def test_example_inputs_that_are_guessed() -> None:
    for model, width in ((llama(3), WIDTH), (vit(3), WIDTH), (Encoder(3), WIDTH)):
        (stream,) = ar.explain(model, 3).streams
        assert (stream.width, len(stream.blocks)) == (width, 3)


@pytest.mark.slow
def test_example_inputs_of_every_kind_are_taken() -> None:
    for inputs in (token_ids(), (token_ids(),), {"input_ids": token_ids()}, {"input_ids": token_ids(1, 3)}):
        assert ar.explain(llama(3), 3, example_inputs=inputs).streams[0].branches == 6


# Graph breaks


class Broken(Tower):
    """A tower with a graph break at the place that ``where`` names."""

    def __init__(self, where: str, layers: int = 3) -> None:
        super().__init__(layers)
        self.where = where
        self.counter = nn.BatchNorm1d(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.counter(self.embed(x))
        self.break_at("before the layers")
        for i, layer in enumerate(self.layers):
            x = layer(x)
            self.break_at(f"after layer {i}")
        self.break_at("after the layers")
        return self.head(self.norm(x))

    def break_at(self, place: str) -> None:
        if place == self.where:
            torch._dynamo.graph_break()


class Around(nn.Module):
    """A model around another one, with graph breaks on both sides of it."""

    def __init__(self, inner: nn.Module, breaks: bool = True) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(VOCAB, VOCAB)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.breaks:
            torch._dynamo.graph_break()
        x = self.inner(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.after(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["after layer 0", "after layer 1"])
def test_graph_break_between_layers(where, training) -> None:
    """The model is run for real around the break; its batch statistics and random state stay all the same."""
    refused(
        Broken(where).train(training),
        ar.GraphBreakError,
        r"the forward of Broken breaks into \d graphs, and not one of them holds a whole residual stream.*"
        r"Remove the graph break: .*torch\._dynamo\.graph_break\(\)",
        2,
        example_inputs=embeddings(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["the root", "a module"])
@pytest.mark.parametrize("where", ["before the layers", "after the layers"])
def test_graph_break_beside_the_layers_but_in_the_same_forward(where, inside) -> None:
    model = Broken(where) if inside == "the root" else Around(Broken(where), breaks=False)
    owner = r"'\(root\)'" if inside == "the root" else "'inner'"
    match = f"a graph break lies in the forward of module {owner}, which runs the layers.*move what causes it out"
    refused(model, ar.GraphBreakError, match, 2, example_inputs=embeddings())


@pytest.mark.parametrize("depth", [1, 2])
def test_graph_breaks_outside_the_owner_are_fine(depth) -> None:
    model = Around(Tower(3))
    for _ in range(depth - 1):
        model = Around(model)
    original = prepared(model, torch.float64)
    x = embeddings().double()
    rewritten = copy.deepcopy(original)
    config = ar.AttnResConfig(blocks=2, aggregation="sum")
    ar.rewrite(rewritten, config=config, example_inputs=x, backend="eager")
    owner = ".".join(["inner"] * depth)
    assert next(ar.attnres_parameters(rewritten))[0] == f"{owner}.attn_res.0.query"
    assert relative_error(rewritten(x), original(x)) < 1e-9
    randomise_sites(rewritten)
    assert relative_error(rewritten(x), original(x)) > 1e-2


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("verb", mostly_slow(["explain", "rewrite", "refuse", "verify"], "rewrite"))
def test_many_models_of_one_class_one_after_the_other(verb, breaks) -> None:
    """Dynamo keeps caches, and counts, for the code that they share; their weights must not hang on these."""
    x, alive = embeddings(), []
    # Dynamo's limit of recompilations is eight.
    count = 9 if breaks and verb == "explain" else 2
    for number in range(count):
        model = Around(Tower(2), breaks)
        alive.append(weakref.ref(model.inner.layers[0].first.up.weight))
        if verb == "explain":
            assert ar.explain(model, 2, example_inputs=x).streams[0].branches == 4, number
        elif verb == "refuse":
            with pytest.raises(ar.BlockPartitionError):
                ar.rewrite(model, 3, example_inputs=x)
        else:
            ar.rewrite(model, 2, example_inputs=x, backend="eager")
            assert verb == "rewrite" or ar.verify(model, x)
        del model
        gc.collect()
    assert [reference() for reference in alive] == [None] * count


def test_graph_break_that_appears_only_later() -> None:
    """Not in the mode that was captured: then it is an error when it happens, and never plain residuals."""
    model = Broken("nowhere").eval()
    ar.rewrite(model, 2, example_inputs=embeddings(), backend="eager")
    model(embeddings())
    model.where = "after layer 0"
    with pytest.raises(
        ar.GraphBreakError, match=r"with 6 AttnRes sites, .* sees 0 of them.*torch\._dynamo\.graph_break"
    ):
        model(embeddings())
    with ar.disabled(model):
        model(embeddings())


# A stream that is another one later


class Dropping(Tower):
    """Dropout on the stream itself; it does nothing in eval."""

    def __init__(self) -> None:
        super().__init__(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = self.dropout(layer(x))
        return self.head(self.norm(x))


def test_dropout_on_the_stream_once_it_drops() -> None:
    model = ar.rewrite(Dropping().eval(), 2, example_inputs=embeddings(), backend="eager")
    model(embeddings())
    with pytest.raises(ar.UnsupportedResidualError, match=r"is not what it was when the model was rewritten.*dropout"):
        model.train()(embeddings())
    model.eval()(embeddings())


def test_a_hook_that_changes_the_stream_added_later() -> None:
    model = ar.rewrite(Tower(3), 2, example_inputs=embeddings(), backend="eager")
    direction = torch.ones(WIDTH) / WIDTH**0.5
    hook = model.layers[1].register_forward_hook(lambda m, a, out: out - (out @ direction).unsqueeze(-1) * direction)
    with pytest.raises(ar.UnsupportedResidualError, match=r"a hook was added since.*at module 'layers.1': .*direction"):
        model(embeddings())
    hook.remove()
    model(embeddings())


# What the user had compiled


def compiled_method(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("compiles", [compiled_method, compiled_forward])
@pytest.mark.parametrize("inside", [False, True], ids=["owner", "root"])
def test_what_the_user_compiled_comes_back(compiles, inside) -> None:
    x = embeddings()
    model = prepared(Around(Tower(3), breaks=False) if inside else Tower(3))
    reference = copy.deepcopy(model)
    compiles(model)
    call, forward = model._compiled_call_impl, model.__dict__.get("forward")
    with pytest.raises(ar.BlockPartitionError):
        ar.rewrite(model, 4, example_inputs=x)
    assert (model._compiled_call_impl, model.__dict__.get("forward")) == (call, forward)
    ar.explain(model, 2, example_inputs=x)
    assert (model._compiled_call_impl, model.__dict__.get("forward")) == (call, forward)
    randomise_sites(ar.rewrite(model, 2, example_inputs=x, backend="eager"))
    assert relative_error(model(x), reference(x)) > 1e-2
    assert relative_error(model.forward(x), reference(x)) > 1e-2
    ar.undo(model)
    assert (model._compiled_call_impl, model.__dict__.get("forward")) == (call, forward)
    assert relative_error(model(x), reference(x)) < 1e-5


class Counting(Broken):
    """Counts its calls in every way that a module can."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.calls, self.shapes, self.kinds = 0, [], {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(tuple(x.shape))
        self.kinds[str(x.dtype)] = self.calls
        return super().forward(x)


@pytest.mark.parametrize("where", ["nowhere", "after layer 0"])
def test_python_counters_after_an_error(where) -> None:
    model = Counting(where).train()
    refused(model, ar.AttnResError, "", 9, example_inputs=embeddings())
    assert (model.calls, model.shapes, model.kinds) == (0, [], {})
    assert int(model.counter.num_batches_tracked) == 0


def test_explaining_a_graph_module_leaves_its_submodules_alone() -> None:
    module = traced_tower().train()
    module.norm.eval()
    ar.explain(module, 2, example_inputs=embeddings())
    ar.rewrite(module, 2, example_inputs=embeddings())
    assert not module.norm.training
    assert module.layers.training


# Graph modules


def traced_tower() -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(Tower(3))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (None, r"carry no shapes \(meta\['val'\] or meta\['example_value'\]\): pass example_inputs"),
        (
            torch.randn(2, 9, WIDTH + 1),
            r"does not run on the example inputs: at node embed .*module 'embed'.*mat1 and mat2|at node embed",
        ),
        ({"y": embeddings()}, r"takes \['x'\], not \['y'\]"),
        ((embeddings(), embeddings()), r"takes \['x'\], not 2 positional arguments"),
        ({}, r"takes \['x'\], and 'x' is missing"),
        ([embeddings()], "example_inputs is a list"),
    ],
    ids=["none", "hidden size", "keyword", "too many", "missing", "list"],
)
def test_graph_module_without_metadata(inputs, match) -> None:
    module = traced_tower()
    graph = str(module.graph)
    refused(module, ar.ExampleInputsError, match, 2, example_inputs=inputs)
    assert str(module.graph) == graph
    assert not any("val" in node.meta for node in module.graph.nodes)


def test_graph_module_arguments_by_keyword_and_default() -> None:
    class Scaled(Tower):
        def forward(self, x: Tensor, scale: float = 0.5, shift: Tensor | None = None) -> Tensor:
            return super().forward(x * scale + shift)

    module = torch.fx.symbolic_trace(prepared(Scaled(3)))
    x = embeddings()
    rewritten = ar.rewrite(module, 2, example_inputs={"x": x, "shift": torch.ones(WIDTH)})
    assert len(list(ar.attnres_parameters(rewritten))) == 12
    assert rewritten(x, shift=torch.ones(WIDTH)).shape == (2, 9, VOCAB)


# Arguments


@pytest.mark.parametrize("value", [None, "gpt2", llama, 5])
def test_what_is_no_model(value) -> None:
    with pytest.raises(
        TypeError, match=f"takes an nn.Module, an ExportedProgram or a GraphModule, not {type(value).__name__}"
    ):
        ar.rewrite(value)
    with pytest.raises(TypeError, match=f"explain takes an nn.Module, .*, not {type(value).__name__}"):
        ar.explain(value)


@pytest.mark.slow
def test_unknown_options() -> None:
    model = llama(3)
    before = Untouched(model)
    with pytest.raises(TypeError, match=r"unknown options \['full_graph'\]; known: \['dynamic', 'fullgraph', 'mode'"):
        ar.rewrite(model, 2, full_graph=True)
    for backend in (3, None):
        with pytest.raises(TypeError, match="inner must be a backend's name or a callable, not"):
            ar.rewrite(model, 2, backend=backend)
    with pytest.raises(ValueError, match=r"no mode .reduce_overhead. of Inductor: it has default, .*reduce-overhead"):
        ar.rewrite(model, 2, mode="reduce_overhead")
    with pytest.raises(TypeError, match="config is an AttnResConfig, not a dict"):
        ar.rewrite(model, config={"blocks": 2})
    with pytest.raises(ValueError, match=r"no backend 'indcutor': torch\.compiler\.list_backends\(\)"):
        ar.rewrite(model, 2, backend="indcutor")
    before.check()


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"mode": "max-autotune"}, {"dynamic": True}], ids=str)
def test_compile_options_for_a_graph(options) -> None:
    module = traced_tower()
    for form in (module, torch.export.export(Tower(3), (embeddings(),))):
        with pytest.raises(TypeError, match=f"{next(iter(options))}: only for an nn.Module"):
            ar.rewrite(form, 2, **options)


VERBS: list[Callable[[object], object]] = [lambda m: ar.disabled(m).__enter__(), ar.undo]


@pytest.mark.parametrize("verb", VERBS, ids=["disabled", "undo"])
def test_verbs_for_a_rewritten_model_on_another(verb) -> None:
    model = llama(3)
    before = Untouched(model)
    with pytest.raises(ar.AttnResError, match=r"was not rewritten in place; call rewrite\(model, blocks=8\) first"):
        verb(model)
    before.check()
    with pytest.raises(TypeError, match=r"takes a rewritten nn\.Module, not Tensor"):
        verb(images())
