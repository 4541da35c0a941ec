"""Reads of other forms than the paper's: added to the plain stream, behind a gate, of normalised values."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from models import (
    Tower,
    embeddings,
    export,
    llama,
    logits,
    mostly_slow,
    prepared,
    randomise_sites,
    relative_error,
    site_parameters,
    token_ids,
)
from reference_models import block_attn_res as listing
from reference_models import reference_llama
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.errors import CheckpointError

EPS, SCALE, WIDTH = 1e-5, 0.7, 8
FORMS = [
    {"aggregation": "add"},
    {"aggregation": "mean", "gate": True},
    {"aggregation": "sum", "gate": True},
    {"aggregation": "add", "gate": True},
    {"aggregation": "mean", "value_norm": True, "scale": "rsqrt_dim", "key_gain": False},
    {"aggregation": "add", "gate": True, "value_norm": True},
]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


def made(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_equal_with_gradients(found: Callable[[], Tensor], expected: Callable[[], Tensor], leaves: list[Tensor]):
    """Results, gradients, and gradients that can be differentiated again."""
    out, reference = found(), expected()
    torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = torch.autograd.grad(reference, leaves, weight)
    for create_graph in (False, True):
        grads = torch.autograd.grad(found(), leaves, weight, create_graph=create_graph)
        for grad, exact in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("total", ["mean", "sum"])
def test_every_form_is_the_listing_with_its_coefficients(count: int, total: str) -> None:
    for has_gain, has_gate, base, value_norm in itertools.product((False, True), (False, True), (0.0, 1.0), (0, 1)):
        if base and total == "sum":
            continue
        sources, query = [made(2, 3, WIDTH) for _ in range(count)], made(WIDTH)
        gain, gate = made(WIDTH) if has_gain else None, made(1) if has_gate else None
        form = {"value_norm": bool(value_norm), "gate": gate}

        def by_operator(sources=sources, query=query, gain=gain, gate=gate, base=base, norm=bool(value_norm)) -> Tensor:
            return torch.ops.attnres.block_attn_res(sources, query, gain, EPS, SCALE, total == "sum", gate, base, norm)

        def by_hand(sources=sources, query=query, gain=gain, base=base, form=form) -> Tensor:
            aggregation = "add" if base else total
            return listing(sources, query, gain, aggregation=aggregation, eps=EPS, scale=SCALE, **form)

        leaves = [*sources, query, *(x for x in (gain, gate) if x is not None)]
        assert_equal_with_gradients(by_operator, by_hand, leaves)


@pytest.mark.parametrize("has_partial", [False, True])
@pytest.mark.parametrize("total", ["mean", "sum"])
def test_two_phases_are_the_listing_with_its_coefficients(total: str, has_partial: bool) -> None:
    for has_gain, has_gate, base in itertools.product((False, True), (False, True), (0.0, 1.0)):
        if (base and total == "sum") or not (base or has_gate):
            continue
        blocks, query, rest = [made(2, 3, WIDTH) for _ in range(3)], made(WIDTH), [made(2, 3, WIDTH)] * has_partial
        gain, gate = made(WIDTH) if has_gain else None, made(1) if has_gate else None

        def in_two_phases(blocks=blocks, query=query, rest=rest, gain=gain, gate=gate, base=base) -> Tensor:
            gains = [] if gain is None else [gain]
            mixed, log_sum = torch.ops.attnres.attend_blocks(blocks, [query], gains, EPS, SCALE)
            settings = (EPS, SCALE, float(len(blocks) + len(rest)) if total == "sum" else 1.0)
            partial = rest[0] if rest else None
            return torch.ops.attnres.merge_partial(
                mixed, log_sum, partial, query, gain, *settings, sum(blocks[1:], blocks[0]), gate, base
            )

        def by_hand(blocks=blocks, query=query, rest=rest, gain=gain, gate=gate, base=base) -> Tensor:
            form = {"aggregation": "add" if base else total, "eps": EPS, "scale": SCALE, "gate": gate}
            return listing([*blocks, *rest], query, gain, **form)

        leaves = [*blocks, *rest, query, *(x for x in (gain, gate) if x is not None)]
        assert_equal_with_gradients(in_two_phases, by_hand, leaves)


def test_torch_checks_the_operators_with_their_last_arguments() -> None:
    sources, vectors, gate = [made(2, 3, WIDTH) for _ in range(3)], [made(WIDTH), made(WIDTH)], made(1)
    torch.library.opcheck(torch.ops.attnres.block_attn_res, (sources, *vectors, EPS, SCALE, False, gate, 1.0, True))
    log_sum = made(2, 3, 1)
    settings = (EPS, SCALE, 1.0, sources[2], gate, 1.0)
    torch.library.opcheck(torch.ops.attnres.merge_partial, (*sources[:1], log_sum, sources[1], *vectors, *settings))


@pytest.mark.parametrize("gate", [torch.zeros(2), torch.zeros(()), torch.zeros(1, dtype=torch.long)])
def test_a_gate_of_another_shape_or_dtype_is_refused(gate: Tensor) -> None:
    with pytest.raises((ValueError, TypeError), match="gate"):
        torch.ops.attnres.block_attn_res([torch.ones(2, 4)], torch.ones(4), None, EPS, 1.0, False, gate)


def test_normalised_values_are_those_of_inkling2() -> None:
    inkling2 = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    read = inkling2.Inkling2BlockAttentionResidual(type("Config", (), {"hidden_size": WIDTH})())
    sources, query = [torch.randn(2, 3, WIDTH) for _ in range(4)], torch.randn(WIDTH)
    read.query.data.copy_(query)
    (expected,) = read(torch.stack(sources[:-1], -2), sources[-1])
    settings = (None, read.norm.eps, WIDTH**-0.5, False, None, 0.0, True)
    torch.testing.assert_close(torch.ops.attnres.block_attn_res(sources, query, *settings), expected)


def expected(plain: nn.Module, rewritten: nn.Module, form: dict[str, object]) -> Tensor:
    queries, gains = site_parameters(rewritten)
    named = ar.attnres_parameters(rewritten)
    gates = [parameter.detach() for name, parameter in named if name.endswith("gate")] or None
    options = {name: value for name, value in form.items() if name in ("aggregation", "value_norm")}
    scale = plain.config.hidden_size**-0.5 if "scale" in form else 1.0
    return reference_llama(plain, token_ids(), queries, gains or None, blocks=2, gates=gates, scale=scale, **options)


@pytest.fixture(scope="module")
def program() -> tuple[nn.Module, torch.export.ExportedProgram]:
    model = prepared(llama(4), torch.float64)
    return model, export(model, token_ids())


@every_form
@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
@torch.no_grad()
def test_exported_models_equal_the_hand_written_one(program, form, schedule) -> None:
    plain, exported = program
    if form.get("value_norm") and schedule == "two_phase":
        pytest.skip("value_norm is read by read")
    rewritten = ar.rewrite(exported, config=ar.AttnResConfig(blocks=2, schedule=schedule, **form))
    module = randomise_sites(rewritten.module())
    out = logits(module(token_ids()))
    assert relative_error(out, expected(plain, module, form)) < 1e-12
    assert relative_error(out, logits(plain(token_ids()))) > 1e-2
    shares = any("merge_partial" in str(node.target) for node in rewritten.graph.nodes)
    assert shares == (schedule == "two_phase")


@pytest.mark.parametrize("form", [FORMS[3], pytest.param(FORMS[4], marks=pytest.mark.slow)], ids=str)
def test_live_models_equal_the_hand_written_one_and_train_their_gates(form) -> None:
    plain = prepared(llama(4), torch.float64)
    model = ar.rewrite(copy.deepcopy(plain), config=ar.AttnResConfig(blocks=2, **form), backend="eager")
    if form.get("gate"):
        with torch.no_grad():
            for name, parameter in ar.attnres_parameters(model):
                parameter.copy_(torch.randn_like(parameter) if name.endswith("query") else parameter)
            assert torch.equal(logits(model(token_ids())), logits(plain(token_ids())))
    randomise_sites(model)
    loss = logits(model(token_ids())).square().mean()
    assert relative_error(logits(model(token_ids())).detach(), expected(plain, model, form).detach()) < 1e-12
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for _, parameter in ar.attnres_parameters(model))
    assert ar.verify(model, token_ids()).passed


def test_a_gate_is_trained_with_the_sites_and_not_decayed() -> None:
    model = ar.rewrite(llama(2), config=ar.AttnResConfig(blocks=2, gate=True), example_inputs=token_ids())
    *_, sites = ar.parameter_groups(model, weight_decay=0.1)
    assert sites["weight_decay"] == 0.0
    assert sum(parameter.shape == (1,) for parameter in sites["params"]) == 4


def test_weights_of_another_form_are_refused_and_those_without_one_are_as_they_were(program) -> None:
    graph = program[1].module()

    def rewritten(**form: object) -> nn.Module:
        return ar.rewrite(graph, config=ar.AttnResConfig(blocks=2, **form))

    paper = rewritten()
    state = paper.state_dict()
    settings = bytes(state["model.attn_res._extra_state"].tolist())
    assert b"gate" not in settings
    assert b'"format": 1' in settings
    gated = rewritten(gate=True)
    assert b'"format": 2' in bytes(gated.state_dict()["model.attn_res._extra_state"].tolist())
    with pytest.raises(CheckpointError, match="gate False there, True here"):
        gated.load_state_dict(state, strict=False)
    with pytest.raises(CheckpointError, match="value_norm"):
        paper.load_state_dict(rewritten(value_norm=True).state_dict())
    rewritten(gate=True).load_state_dict(gated.state_dict())


def test_forms_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="read by read"):
        ar.AttnResConfig(value_norm=True, schedule="two_phase")
    with pytest.raises(ValueError, match="rsqrt_dim"):
        ar.AttnResConfig(scale="sqrt")
    with pytest.raises(ValueError, match="gate must be True or False"):
        ar.AttnResConfig(gate=1)
    assert ar.AttnResConfig.from_json(ar.AttnResConfig(scale="rsqrt_dim", gate=True).to_json()).gate


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
def test_inductor_computes_the_same_with_gradients(schedule: str) -> None:
    """Gate and plain stream at once; float32."""
    config = ar.AttnResConfig(blocks=2, aggregation="add", gate=True, schedule=schedule)
    models = [
        randomise_sites(ar.rewrite(prepared(llama(2)), config=config, example_inputs=token_ids(), backend=backend))
        for backend in ("eager", "inductor")
    ]
    grads = []
    for model in models:
        logits(model(token_ids())).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert relative_error(grads[1][name], grad) < 2e-4, name


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        [(form, s) for form in FORMS for s in ("per_read", "two_phase") if s == "per_read" or "value_norm" not in form],
        (FORMS[3], "two_phase"),
        (FORMS[5], "per_read"),
    ),
    ids=str,
)
def test_exported_to_onnx(program, case, tmp_path) -> None:
    """``export_onnx`` compares with PyTorch by itself, here with random gates."""
    form, schedule = case
    onnx = pytest.importorskip("onnx")
    _, exported = program
    rewritten = ar.rewrite(exported, config=ar.AttnResConfig(blocks=2, schedule=schedule, **form))
    for name, parameter in rewritten.state_dict.items():
        if name.rpartition(".")[2] in ("query", "gain", "gate"):
            torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(len(name)))
    # The norms of a Llama are in float32.
    result = ar.export_onnx(rewritten, tmp_path / "model.onnx", (token_ids(),), tolerance=1e-5)
    assert result.max_difference < 1e-5
    sites = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "BlockAttnRes"]
    assert len(sites) == 8
    if form.get("gate"):
        assert [node.input[-1] for node in sites] == [f"model.attn_res.{i}.gate" for i in range(8)]


@pytest.mark.parametrize(("opset_version", "dtype"), [(18, torch.float32), (23, torch.float16)])
def test_normalised_values_in_onnx(opset_version, dtype, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    config = ar.AttnResConfig(blocks=2, aggregation="add", gate=True, value_norm=True)
    model = ar.rewrite(prepared(Tower(2), dtype), config=config, example_inputs=embeddings().to(dtype), backend="eager")
    randomise_sites(model)
    path = tmp_path / "model.onnx"
    assert ar.export_onnx(model, path, (embeddings().to(dtype),), opset_version=opset_version).max_difference < 2e-2
