"""Layers that are run past the module that owns them, copies, and libraries that wrap a rewritten module."""

import copy
import functools
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from models import (
    Encoder,
    Feed,
    Tower,
    chain_of,
    embeddings,
    mostly_slow,
    prepared,
    randomise_sites,
    relative_error,
    token_ids,
)
from torch import Tensor, nn
from zoo.handwritten import LayerAttributes

import attnres_rewrite as ar
from attnres_rewrite.capture.dynamo import capture_whole
from attnres_rewrite.capture.inputs import example_call
from attnres_rewrite.forms.layer_guard import remove_guards

X = embeddings()


class Head(nn.Module):
    """A root around the owner."""

    def __init__(self, tower: nn.Module | None = None) -> None:
        super().__init__()
        self.tower = tower or Tower(4)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.tower(x)


class Lists(Tower):
    """The adds are in the owner's own forward, and a layer is a list of sublayers."""

    def __init__(self) -> None:
        super().__init__(0)
        self.layers = nn.ModuleList(nn.ModuleList([Feed(), Feed()]) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for first, second in self.layers:
            x = x + first(x)
            x = x + second(x)
        return self.head(self.norm(x))


def rewritten(model: nn.Module) -> nn.Module:
    return randomise_sites(ar.rewrite(prepared(model), 2, example_inputs=X, backend="eager"))


@pytest.fixture(name="model")
def _model() -> nn.Module:
    return rewritten(Tower(4))


@torch.no_grad()
def outcome(model: nn.Module, run: Callable[[], Tensor]) -> str:
    """``"attnres"``, ``"plain"`` or the error of this package, with ``model`` for the right numbers."""
    attnres, plain = copy.deepcopy(model)(X), ar.undo(copy.deepcopy(model))(X)
    assert relative_error(plain, attnres) > 1e-2
    try:
        result = run()
    except Exception as error:
        names = [type(e).__name__ for e in chain_of(error) if isinstance(e, ar.AttnResError)]
        if not names:
            raise
        return names[0]
    if relative_error(result, attnres) < 1e-5:
        return "attnres"
    assert relative_error(result, plain) < 1e-5, "neither AttnRes nor plain residuals"
    return "plain"


# Past the owner


def by_hand(model: nn.Module, x: Tensor = X) -> Tensor:
    x = model.embed(x)
    for layer in model.layers:
        x = layer(x)
    return model.head(model.norm(x))


def with_layers_compiled(model: nn.Module) -> Tensor:
    for layer in model.layers:
        layer.compile(backend="eager")
    return by_hand(model)


WAYS: dict[str, Callable[[nn.Module], Tensor]] = {
    "loop": by_hand,
    "sequence": lambda model: nn.Sequential(model.embed, *model.layers, model.norm, model.head)(X),
    "class": lambda model: type(model).forward(model, X),
    "compiled loop": lambda model: torch.compile(by_hand, backend="eager")(model),
    "compiled by us": lambda model: torch.compile(by_hand, backend=ar.AttnResBackend("eager"))(model),
    "compiled class": lambda model: torch.compile(type(model).forward, backend="eager")(model, X),
    "compiled layers": with_layers_compiled,
    "copies of the layers": lambda model: nn.Sequential(model.embed, *copy.deepcopy(model.layers), model.head)(X),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("warm", mostly_slow([False, True], False), ids=["cold", "warm"])
def test_layers_run_past_the_owner(model, way, warm) -> None:
    if warm:
        model(X)
    assert outcome(model, lambda: WAYS[way](model)) == "NotRewrittenError"
    assert outcome(model, lambda: model(X)) == "attnres"


@pytest.mark.parametrize("way", ["loop", "sequence", "class", "compiled loop"])
def test_layers_run_past_the_owner_on_purpose(model, way) -> None:
    with ar.disabled(model):
        assert outcome(model, lambda: WAYS[way](model)) == "plain"
    ar.undo(model)
    plain = model(X)
    assert relative_error(WAYS[way](model), plain) < 1e-5


def test_sublayers_whose_adds_are_in_the_owner() -> None:
    model = rewritten(Lists())
    with pytest.raises(ar.NotRewrittenError, match=r"a layer \(Feed\) is run past the module that owns it"):
        Lists.forward(model, X)
    assert outcome(model, lambda: model(X)) == "attnres"


def test_layers_of_torch_itself() -> None:
    model = randomise_sites(ar.rewrite(prepared(Encoder(4)), 2, backend="eager"))
    encoder = model.encoder
    with pytest.raises(ar.NotRewrittenError, match="TransformerEncoderLayer"), torch.no_grad():
        type(encoder).forward(encoder, model.embed(token_ids()))


def test_the_guards_leave_nothing_in_the_graph(model) -> None:
    def graph() -> list[str]:
        torch._dynamo.reset()
        return [f"{node.op} {node.target}" for node in capture_whole(model, example_call(model, X)).graph.nodes]

    guarded = graph()
    remove_guards(model)
    assert guarded == graph()


class Checkpointed(Tower):
    """Every layer is run once more in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return self.head(self.norm(x))


def test_checkpointed_layers_run_again_in_the_backward() -> None:
    """Plain residuals are over by then, or were never wanted in the thread that computes gradients."""
    model = rewritten(Checkpointed(4))
    with ar.disabled(model):
        output = model(X)
    output.square().sum().backward()
    gradients = [layer.first.up.weight.grad.clone() for layer in model.layers]
    plain = ar.undo(copy.deepcopy(model))
    plain.zero_grad()
    plain(X).square().sum().backward()
    for layer, gradient in zip(plain.layers, gradients, strict=True):
        torch.testing.assert_close(layer.first.up.weight.grad, gradient)


# Whose permission


def test_plain_residuals_of_one_model_are_no_permission_for_another(model) -> None:
    other = torch.compile(prepared(Tower(4), seed=3), backend=ar.AttnResBackend("eager"))
    with ar.disabled(model), pytest.raises(ar.NotRewrittenError, match="no AttnRes parameters"):
        other(X)


class TwoTowers(nn.Module):
    """The second one runs only when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Tower(4), Tower(4)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        y = self.first(x)
        return y + self.second(x) if both else y


def test_plain_residuals_are_no_permission_for_a_tower_that_was_left_out() -> None:
    model = rewritten(TwoTowers())
    compiled = torch.compile(lambda x: model(x, both=True), backend=ar.AttnResBackend("eager"))
    for _ in range(2):
        with ar.disabled(model), pytest.raises(ar.NotRewrittenError, match="'second' has a residual stream"):
            compiled(X)
        with pytest.raises(ar.NotRewrittenError, match="'second' has a residual stream"):
            model(X, both=True)
    with ar.disabled(model):
        assert outcome(model, lambda: model(X)) == "plain"


# Copies


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way", mostly_slow([copy.deepcopy, saved_and_loaded, lambda m: pickle.loads(pickle.dumps(m))], copy.deepcopy)
)
@pytest.mark.parametrize("make", [lambda: Tower(4), Head], ids=["owner", "root"])
def test_copies_made_while_disabled_have_attnres_on(way, make) -> None:
    model = rewritten(make())
    with ar.disabled(model):
        twin = way(model)
        assert outcome(model, lambda: model(X)) == "plain"
        assert outcome(model, lambda: twin(X)) == "attnres"
    assert outcome(model, lambda: twin(X)) == "attnres"
    with pytest.raises(ar.NotRewrittenError):
        by_hand(getattr(twin, "tower", twin))


def shallow(model: nn.Module) -> nn.Module:
    twin = copy.copy(model)
    twin._modules = dict(twin._modules)
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("compiled", mostly_slow([False, True], True))
def test_a_shallow_copy_runs_its_own_layers(model, compiled) -> None:
    twin = shallow(model)
    call = torch.compile(lambda x: twin(x), backend=ar.AttnResBackend("eager")) if compiled else twin
    assert outcome(model, lambda: call(X)) == "attnres"
    twin.embed = nn.Identity()
    expected = copy.deepcopy(model)
    expected.embed = nn.Identity()
    assert relative_error(call(X), expected(X)) < 1e-5
    twin.layers = nn.ModuleList(list(model.layers)[:2])
    with pytest.raises(ar.GraphBreakError, match="rewritten with 8 AttnRes sites, but the compiler sees 4"):
        call(X)
    assert outcome(model, lambda: model(X)) == "attnres"


def replica_of(model: nn.Module, factor: float) -> nn.Module:
    """What nn.DataParallel makes for another device; here its parameters are scaled instead of moved."""
    modules = list(model.modules())
    replicas = dict(zip(modules, [module._replicate_for_data_parallel() for module in modules], strict=True))
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * factor)
        replica._buffers = dict(module._buffers)
    return replicas[model]


def scaled(model: nn.Module, factor: float = 2.0) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Tower(4), Head], ids=["owner", "root"])
@torch.no_grad()
def test_replicas_run_their_own_weights(make) -> None:
    model = rewritten(make())
    expected = scaled(copy.deepcopy(model))(X)
    assert relative_error(model(X), expected) > 1e-2
    assert relative_error(replica_of(model, 2.0)(X), expected) < 1e-5
    assert outcome(model, lambda: model(X)) == "attnres"


# Libraries that wrap the forward afterwards


def wrapped_as_accelerate_does(model: nn.Module) -> nn.Module:
    """Mixed precision: a function around the function of the bound method, bound anew."""
    original = model.forward.__func__

    @functools.wraps(original)
    def forward(*args: object, **kwargs: object) -> object:
        return original(*args, **kwargs)

    model.forward = forward.__get__(model)
    return model


def with_a_hook_of_accelerate(model: nn.Module) -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    return hooks.add_hook_to_module(model, hooks.ModelHook())


@pytest.mark.parametrize("part", ["around", "owner"])
@torch.no_grad()
def test_undo_by_what_is_around_the_root_or_within_it(part: str) -> None:
    model = rewritten(Head())
    plain = ar.undo(copy.deepcopy(model))(X)
    assert not torch.equal(model(X), plain)
    ar.undo(nn.Sequential(model) if part == "around" else model.tower)
    assert torch.equal(model(X), plain)


WRAPPERS = [wrapped_as_accelerate_does, with_a_hook_of_accelerate]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", mostly_slow(WRAPPERS, *WRAPPERS[:1]))
def test_a_wrapped_owner_is_still_a_rewritten_model(model, wrap) -> None:
    reference = copy.deepcopy(model)
    wrapped = wrap(model)
    assert outcome(reference, lambda: wrapped(X)) == "attnres"
    with ar.disabled(wrapped):
        assert outcome(reference, lambda: wrapped(X)) == "plain"
    assert ar.verify(wrapped, X).sites == 8
    with pytest.raises(ar.UnsupportedResidualError, match="already has Attention Residuals"):
        ar.rewrite(wrapped, 2, example_inputs=X)
    ar.undo(wrapped)
    assert outcome(reference, lambda: wrapped(X)) == "plain"
    assert not list(ar.attnres_parameters(wrapped))
    with pytest.raises(ar.AttnResError, match="was not rewritten in place"):
        ar.undo(wrapped)
    ar.rewrite(wrapped, 2, example_inputs=X, backend="eager")
    wrapped.load_state_dict(reference.state_dict())
    assert outcome(reference, lambda: wrapped(X)) == "attnres"


@pytest.mark.parametrize("wrap", WRAPPERS)
@torch.no_grad()
def test_a_deep_copy_of_a_wrapped_owner_runs_its_own_weights(model, wrap) -> None:
    average = torch.optim.swa_utils.AveragedModel(wrap(model)).module
    expected = scaled(copy.deepcopy(model))(X)
    assert relative_error(scaled(average)(X), expected) < 1e-5
    assert relative_error(model(X), expected) > 1e-2


def test_mixed_precision_of_accelerate_and_back(model) -> None:
    accelerate = pytest.importorskip("accelerate")
    # A Trainer of another test may have settled it for the process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    reference = copy.deepcopy(model)
    prepared_model = accelerator.prepare(model)
    assert 1e-5 < relative_error(prepared_model(X), reference(X)) < 0.1
    back = accelerator.unwrap_model(prepared_model, keep_fp32_wrapper=False)
    assert outcome(reference, lambda: back(X)) == "attnres"


def test_layers_in_a_list_of_python_ask_too() -> None:
    """Dynamo names them by the list, of which a model knows nothing."""
    model = ar.rewrite(LayerAttributes(), 2, example_inputs=torch.arange(12).reshape(2, 6), backend="eager")
    with pytest.raises(ar.NotRewrittenError, match="is run past the module that owns it"):
        model.blocks[1](torch.randn(2, 6, 64))


def test_hooks_of_accelerate_that_move_weights_are_named() -> None:
    """Offloaded to the CPU, every layer's weights come and go in a hook that no compiler follows."""
    model = randomise_sites(ar.rewrite(prepared(Tower(2)), 2, example_inputs=embeddings(), backend="eager"))
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ar.AttnResError, match=r"accelerate, whose hooks \(cpu_offload, disk_offload, a device_map"):
        model(embeddings())
