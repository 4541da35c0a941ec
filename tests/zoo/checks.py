"""What every member of the zoo must show."""

import contextlib
import copy
import dataclasses
from collections.abc import Container, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from models import prepared, randomise_sites, relative_error
from torch import Tensor, nn
from torch.fx import GraphModule

import attnres_rewrite as ar
from attnres_rewrite import _compat, api, pipeline
from attnres_rewrite.capture.inputs import example_call
from attnres_rewrite.pipeline import Analysis
from zoo.member import Accepted, Inputs, Member, Refused, Unbuildable

CONFIG = ar.AttnResConfig(blocks=2, aggregation="sum")
# Rounding, and nothing else, may differ: of the dtype that the checks run in.
MODES = ("eval", "training")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def check(member: Member, modes: Container[str] = MODES) -> None:
    """Make the member and hold it to its expected outcome, if that is to be accepted in these modes."""
    torch.manual_seed(0)
    match member.outcome:
        case Accepted():
            check_accepted(member, member.outcome, modes)
        case Refused():
            check_refused(member, member.outcome)
        case Unbuildable():
            check_unbuildable(member, member.outcome)


def check_unbuildable(member: Member, expected: Unbuildable) -> None:
    with pytest.raises(Exception) as raised, torch.no_grad():  # noqa: PT011
        call(member.make(), member.inputs(2, 9))
    assert not isinstance(raised.value, ar.AttnResError)
    assert expected.says in f"{type(raised.value).__name__}: {raised.value}"


def check_refused(member: Member, expected: Refused) -> None:
    """The typed error with its reason and source line, and the model as it was."""
    model = prepared(member.make())
    keys, inputs = list(model.state_dict()), member.inputs(2, 9)
    with torch.no_grad():
        before = outputs(call(model, inputs))
    with pytest.raises(ar.AttnResError) as raised:
        ar.rewrite(model, config=CONFIG, example_inputs=inputs, backend="eager")
    message = str(raised.value)
    assert type(raised.value) is expected.error, message
    assert expected.says in message, message
    assert expected.line in message, message
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert_equal(outputs(call(model, inputs)), before, 0)


class Recorder:
    """A backend that runs graphs as they are and keeps the number of sources of every site in each that has some."""

    def __init__(self) -> None:
        self.graphs: set[tuple[int, ...]] = set()

    def __call__(self, module: GraphModule, _: list[Any]) -> Any:
        sites = [node for node in module.graph.nodes if node.target is torch.ops.attnres.block_attn_res.default]
        self.graphs |= {tuple(len(node.args[0]) for node in sites)} if sites else set()
        return module.forward


def check_accepted(member: Member, expected: Accepted, modes: Container[str]) -> None:
    original = prepared(member.make(), expected.dtype)
    rewritten, recorder = copy.deepcopy(original), Recorder()
    (first, second), tolerance = expected.sizes, expected.tolerance or TOLERANCE[expected.dtype]
    inputs, resized, same = (in_dtype(member.inputs(*size), expected.dtype) for size in (first, second, first))
    analyses: list[Analysis] = []

    def analyse(*arguments: Any) -> Analysis:
        analyses.append(pipeline.analyse(*arguments))
        return analyses[-1]

    # What rewrite() found, without the time that explain() would take to find it again; and without its rehearsal of
    # the first call, which is made below.
    with mock.patch.object(api, "analyse", analyse), mock.patch.object(api, "_rehearse"):
        streams = tuple(expected.streams) if expected.named else None
        config = dataclasses.replace(CONFIG, streams=streams, leftovers=expected.leftovers)
        assert ar.rewrite(rewritten, config=config, example_inputs=inputs, backend=recorder) is rewritten
    check_structure(analyses[0], expected)
    if "eval" in modes:
        check_evaluation(original, rewritten, recorder, (inputs, resized), tolerance)
    if "training" in modes:
        # One graph of fixed sizes.
        check_training(original, rewritten, same, expected)


def check_evaluation(
    original: nn.Module, rewritten: nn.Module, recorder: Recorder, sizes: tuple[Inputs, Inputs], tolerance: float
) -> None:
    """Without gradients: the same numbers from zero queries and others from random ones, at sizes that change."""
    inputs, resized = sizes
    mark_changing_sizes(inputs, resized)
    with torch.no_grad():
        before = outputs(call(original, inputs))
        assert_equal(outputs(call(rewritten, inputs)), before, tolerance)
        graphs = set(recorder.graphs)
        with random_queries(rewritten):
            changed = [relative_error(a, b) for a, b in zip(outputs(call(rewritten, inputs)), before, strict=True)]
        assert max(changed) > 1e-3, changed
        # The same sites in every graph.
        for given in (resized, inputs):
            assert_equal(outputs(call(rewritten, given)), outputs(call(original, given)), tolerance)
    assert recorder.graphs == graphs


@contextlib.contextmanager
def random_queries(model: nn.Module) -> Iterator[None]:
    """Within the context the sites have random queries and gains; then they are zero and one again."""
    randomise_sites(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in ar.attnres_parameters(model):
                parameter.fill_(1.0 if name.endswith("gain") else 0.0)


def check_structure(analysis: Analysis, expected: Accepted) -> None:
    """Owners, streams, branch outputs and layers, exactly."""
    found: dict[str, list[tuple[int, int]]] = {}
    for plan in analysis.plans:
        found.setdefault(plan.stream.owner, []).append((len(plan.stream.branches), len(plan.layers)))
    wanted = {}
    for owner, branches in expected.streams.items():
        counts = branches if isinstance(branches, tuple) else (branches,)
        layers = expected.layers if isinstance(expected.layers, int) else expected.layers[owner]
        wanted[owner] = list(zip(counts, layers if isinstance(layers, tuple) else (layers,) * len(counts), strict=True))
    assert found == wanted


def check_training(original: nn.Module, rewritten: nn.Module, inputs: Inputs, expected: Accepted) -> None:
    """In training mode: the same numbers from zero queries, and gradients of every site from random ones."""
    original.train(), rewritten.train()
    if expected.untrainable:
        with pytest.raises(ar.GraphBreakError) as raised:
            call(rewritten, inputs)
        assert expected.untrainable in str(raised.value)
        return
    before = outputs(call(original, inputs))
    after = outputs(call(rewritten, inputs))
    tolerance = expected.tolerance or TOLERANCE[expected.dtype]
    assert_equal([t.detach() for t in after], [t.detach() for t in before], tolerance)
    with random_queries(rewritten):
        loss = sum((tensor * tensor.detach().cos()).sum() for tensor in outputs(call(rewritten, inputs)))
        loss.backward()
    sites = ar.attnres_parameters(rewritten)
    without = [name for name, p in sites if p.grad is None or not p.grad.abs().max() > 0]
    per_site = 2 if CONFIG.key_gain else 1
    assert len(without) == per_site * expected.idle, f"no gradient reaches {without}"


def check_compiled_once(member: Member) -> None:
    """With random queries: outputs and gradients of a training step do not depend on ``compile_layers``."""
    expected = member.outcome
    assert isinstance(expected, Accepted)
    torch.manual_seed(0)
    original, steps = prepared(member.make(), expected.dtype), []
    inputs = in_dtype(member.inputs(*expected.sizes[0]), expected.dtype)
    for how, backend in (("inline", "eager"), ("once", "aot_eager")):
        torch._dynamo.reset()
        model = copy.deepcopy(original)
        settings = {"schedule": "two_phase", "compile_layers": how, "leftovers": expected.leftovers}
        streams = tuple(expected.streams) if expected.named else None
        config = dataclasses.replace(CONFIG, aggregation="mean", streams=streams, **settings)
        ar.rewrite(model, config=config, example_inputs=inputs, backend=backend)
        torch.manual_seed(2)
        randomise_sites(model).train()
        found = outputs(call(model, inputs))
        sum((tensor * tensor.detach().cos()).sum() for tensor in found).backward()
        steps.append(([tensor.detach() for tensor in found], dict(model.named_parameters())))
    (before, plain), (after, once) = steps
    tolerance = expected.tolerance or TOLERANCE[expected.dtype]
    assert_equal(after, before, tolerance)
    gradients = {name: p.grad for name, p in plain.items() if p.grad is not None}
    assert gradients.keys() == {name for name, p in once.items() if p.grad is not None} != set()
    # What is zero in one, up to rounding, need not be in the other.
    least = tolerance * max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        error = (once[name].grad - gradient).norm()
        assert error <= 100 * tolerance * gradient.norm() + least, (name, float(error))


def mark_changing_sizes(inputs: Inputs, resized: Inputs) -> None:
    """Let Dynamo know which sizes will change, which it would else learn by a graph more for every member."""
    for tensor, other in zip(_compat.tensors_in(inputs), _compat.tensors_in(resized), strict=True):
        for dim in range(tensor.dim()):
            if tensor.size(dim) != other.size(dim):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Inputs whose float tensors have the dtype of the model."""
    cast: Inputs = _compat.map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    return cast


def call(model: nn.Module, inputs: Inputs) -> Any:
    # The same dropout, and whatever else is drawn at random, in every call.
    torch.manual_seed(1)
    return example_call(model, inputs).run(model)


def outputs(output: object) -> list[Tensor]:
    """Every float tensor in an output; a key-value cache is none."""
    found = [tensor for tensor in _compat.tensors_in(output) if tensor.is_floating_point()]
    assert found, type(output)
    return found


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    errors = [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
    assert max(errors) <= tolerance, errors
