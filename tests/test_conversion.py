"""Weights of models with Attention Residuals of their own: the same outputs when converted, the same bits when back."""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fla_models
import pytest
import torch
from models import Tower, embeddings, mostly_slow, prepared, relative_error
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.forms.settings import Settings

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from _peers import NotAvailable, naive_attnres_of_fla

X = embeddings()
# Large, so that another one gives other numbers.
EPS = 0.5
TOLERANCE = 1e-5  # float32
State = dict[str, Tensor]
# Names of the reads, fields of the configuration, and sublayers in what the size of a block counts.
CONVENTIONS = {
    "fla": ("attn_res", "mlp_res", "res", "attnres_block_size", "norm_eps", 1),
    "kimi": ("self_attention_res", "mlp_res", "output_attn_res", "attn_res_block_size", "rms_norm_eps", 2),
}


@pytest.fixture(scope="module")
def naive() -> Callable[..., Tensor]:
    """The read of flash-linear-attention in plain torch."""
    try:
        return naive_attnres_of_fla()
    except NotAvailable as error:
        pytest.skip(f"{error}: it is in the extra `dev`")


class Reader(nn.Module):
    """A model with its own Attention Residuals, under the names and with the walk of another project.

    Attributes:
        sources: Number of sources of every read but the first, by depth, in the last call.
    """

    def __init__(self, tower: Tower, convention: str, block_size: int, naive: Callable[..., Tensor]) -> None:
        super().__init__()
        *self.names, self.last, _, _, unit = CONVENTIONS[convention]
        self.naive, self.per_block, self.sources = naive, block_size * unit, []
        self.tower = tower
        width = tower.norm.normalized_shape[0]
        for module, names in [*((layer, self.names) for layer in tower.layers), (tower, [self.last])]:
            for name in names:
                module.register_module(f"{name}_proj", nn.Linear(width, 1, bias=False))
                module.register_module(f"{name}_norm", nn.RMSNorm(width, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        tower, complete, running = self.tower, [], self.tower.embed(x)
        self.sources = []
        for number, layer in enumerate(tower.layers):
            for half, (name, sublayer) in enumerate(zip(self.names, (layer.first, layer.second), strict=True)):
                h = running if not complete else self.read(layer, name, [*complete, running])
                if (2 * number + half) % self.per_block == 0:
                    complete, running = [*complete, running], None
                output = sublayer(h)
                running = output if running is None else running + output
        return tower.head(tower.norm(self.read(tower, self.last, [*complete, running])))

    def read(self, module: nn.Module, name: str, sources: list[Tensor]) -> Tensor:
        self.sources.append(len(sources))
        query, gain = (getattr(module, f"{name}_{part}").weight for part in ("proj", "norm"))
        return self.naive(query, sources, gain, rms_eps=EPS)


class Wrapped(nn.Module):
    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.tower = Tower(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x)


def random_reads(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"res_(proj|norm)", name):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if "proj" in name else 1 + 0.3 * noise)
    return model


def reader(convention: str, block_size: int, naive: Callable[..., Tensor], layers: int = 5) -> Reader:
    return random_reads(Reader(prepared(Tower(layers)), convention, block_size, naive))


def fields(convention: str, block_size: int, **others: object) -> dict[str, object]:
    return {CONVENTIONS[convention][3]: block_size, CONVENTIONS[convention][4]: EPS, **others}


def first_read(convention: str, owner: str = "tower") -> list[str]:
    return [f"{owner}.layers.0.{CONVENTIONS[convention][0]}_{part}.weight" for part in ("proj", "norm")]


def require_converted(
    original: nn.Module,
    convention: str,
    config: dict[str, object],
    plain: nn.Module,
    x: Tensor,
    tolerance: float = TOLERANCE,
) -> None:
    """Into ``plain``, which gives the outputs of ``original`` then, and back."""
    state = {key: value.clone() for key, value in original.state_dict().items()}
    weights, attnres = ar.import_state_dict(original.state_dict(), convention, config)
    model = ar.rewrite(plain, config=attnres, example_inputs=x, backend="eager")
    model.load_state_dict(weights)
    expected = outputs(original, x)
    assert relative_error(outputs(model, x), expected) < tolerance

    back, exported = ar.export_state_dict(model.state_dict(), convention)
    assert exported.items() <= config.items()
    owner = next(iter(attnres.streams))
    query, gain = first_read(convention, owner)
    assert not torch.equal(state[query], torch.zeros_like(state[query]))
    state[query], state[gain] = torch.zeros_like(state[query]), torch.ones_like(state[gain])
    require_equal(back, state)
    # So the read of one source has no use for them.
    original.load_state_dict(back)
    assert torch.equal(outputs(original, x), expected)
    # All of them came from the weights, none from the module that they were loaded into.
    require_equal(ar.import_state_dict(back, convention, config)[0], model.state_dict())


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def require_equal(state: State, expected: State) -> None:
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []
    assert [key for key in state if state[key].dtype != expected[key].dtype] == []


@pytest.mark.parametrize(
    ("convention", "block_size", "sources"),
    [
        ("fla", 1, [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        pytest.param("fla", 2, [2, 2, 3, 3, 4, 4, 5, 5, 6, 6], marks=pytest.mark.slow),
        ("fla", 3, [2, 2, 2, 3, 3, 3, 4, 4, 4, 5]),
        pytest.param("fla", 7, [2, 2, 2, 2, 2, 2, 2, 3, 3, 3], marks=pytest.mark.slow),
        pytest.param("fla", 99, [2] * 10, marks=pytest.mark.slow),
        ("kimi", 2, [2, 2, 2, 2, 3, 3, 3, 3, 4, 4]),
    ],
)
def test_a_converted_model_gives_the_same_outputs(naive, convention: str, block_size: int, sources: list[int]) -> None:
    original = reader(convention, block_size, naive)
    config = fields(convention, min(block_size, 10))
    require_converted(original, convention, config, prepared(Wrapped(), seed=5), X)
    assert original.sources == sources
    _, attnres = ar.import_state_dict(original.state_dict(), convention, fields(convention, block_size))
    assert ar.explain(Wrapped(), example_inputs=X, config=attnres).streams[0].sources == tuple(sources)


@pytest.fixture(scope="module")
def transformer(naive: Callable[..., Tensor]) -> Iterator[Callable[[int | None, float], nn.Module]]:
    try:
        with fla_models.transformer(naive) as make:
            yield make
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("block_size", mostly_slow([1, 3, 4], 3))
def test_the_models_of_flash_linear_attention(transformer, block_size: int) -> None:
    original = random_reads(prepared(transformer(block_size, EPS)))
    plain = prepared(transformer(None, EPS), seed=5)
    require_converted(original, "fla", original.config.to_dict(), plain, fla_models.token_ids())


@pytest.mark.slow
def test_93_layers_in_blocks_of_12(naive) -> None:
    original = reader("kimi", 12, naive, layers=93)
    # Roundings grow with depth: a wrong site makes a difference of the order of one.
    require_converted(original, "kimi", fields("kimi", 12), prepared(Wrapped(93), seed=5), X, tolerance=1e-4)


@pytest.mark.parametrize(
    ("convention", "block_size", "blocks"),
    [("kimi", 12, [24] * 7 + [18]), ("fla", 5, [5] * 37 + [1]), ("kimi", 93, [186]), ("fla", 186, [186])],
)
def test_93_layers_by_their_keys(convention: str, block_size: int, blocks: list[int]) -> None:
    state = keys_of(convention, 93)
    config = fields(convention, block_size, num_hidden_layers=93)
    weights, _ = ar.import_state_dict(state, convention, config)
    assert len([key for key in weights if key.endswith(".query")]) == 186
    settings = bytes(weights["model.attn_res._extra_state"].tolist()).decode()
    assert f'"blocks": [{blocks}]' in settings
    # By depth: query i is that of the read before sublayer i + 1.
    attention, mlp, last, *_ = CONVENTIONS[convention]
    for site, read in [(0, f"layers.0.{mlp}"), (1, f"layers.1.{attention}"), (185, last)]:
        assert torch.equal(weights[f"model.attn_res.{site}.query"], state[f"model.{read}_proj.weight"][0])
        assert torch.equal(weights[f"model.attn_res.{site}.gain"], state[f"model.{read}_norm.weight"])
    assert ar.export_state_dict(weights, convention)[1] == fields(convention, block_size)


def keys_of(convention: str, layers: int = 3, width: int = 4, owner: str = "model.") -> State:
    """A checkpoint without a model: one other weight in every layer."""
    attention, mlp, last, *_ = CONVENTIONS[convention]
    reads = [f"layers.{i}.{read}" for i in range(layers) for read in (attention, mlp)] + [last]
    generator = torch.Generator().manual_seed(2)
    state = {f"{owner}layers.{i}.up.weight": torch.randn(2, 2, generator=generator) for i in range(layers)}
    state |= {f"{owner}{read}_proj.weight": torch.randn(1, width, generator=generator) for read in reads}
    return state | {f"{owner}{read}_norm.weight": torch.randn(width, generator=generator) for read in reads}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("owner", ["", "language_model.model."])
def test_weights_stay_what_they_are(convention: str, owner: str) -> None:
    state = {key: value.bfloat16() for key, value in keys_of(convention, owner=owner).items()}
    before = dict(state)
    weights, attnres = ar.import_state_dict(state, convention, fields(convention, 1))
    assert attnres.streams == ((owner.removesuffix("."),) if owner else None)
    imported = dict(weights)
    back, _ = ar.export_state_dict(weights, convention)
    assert (state, weights) == (before, imported)
    dropped = [f"{owner}layers.0.{CONVENTIONS[convention][0]}_{part}.weight" for part in ("proj", "norm")]
    for key in dropped:
        before[key] = torch.full_like(before[key], float("norm" in key))
    require_equal(back, before)


def swapped(weights: State) -> None:
    a, b = "tower.attn_res.3.query", "tower.attn_res.4.query"
    weights[a], weights[b] = weights[b], weights[a]


def without_a_gain(weights: State) -> None:
    weights["tower.attn_res.3.gain"] = torch.ones_like(weights["tower.attn_res.3.gain"])


@pytest.mark.parametrize("damage", [swapped, without_a_gain])
def test_the_comparison_sees_a_wrong_site(naive, damage: Callable[[State], None]) -> None:
    original = reader("fla", 3, naive, layers=3)
    weights, attnres = ar.import_state_dict(original.state_dict(), "fla", fields("fla", 3))
    model = ar.rewrite(prepared(Wrapped(3), seed=5), config=attnres, example_inputs=X, backend="eager")
    damage(weights)
    model.load_state_dict(weights)
    assert relative_error(outputs(model, X), outputs(original, X)) > 100 * TOLERANCE


def test_the_settings_of_the_weights_are_compared() -> None:
    weights, _ = ar.import_state_dict(Reader(Tower(3), "fla", 3, naive=print).state_dict(), "fla", fields("fla", 3))
    for other in ({"sublayers_per_block": 2, "eps": EPS}, {"sublayers_per_block": 3, "eps": 1e-6}):
        model = ar.rewrite(Wrapped(3), config=ar.AttnResConfig(**other), example_inputs=X, backend="eager")
        with pytest.raises(ar.CheckpointError, match="trained with other Attention Residuals than module 'tower' has"):
            model.load_state_dict(weights)


def without(key: str) -> Callable[[State], object]:
    return lambda state: state.pop(key)


def having(key: str, *shape: int) -> Callable[[State], object]:
    return lambda state: state.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("model.layers.1.mlp_res_norm.weight"), r"lack 'model\.layers\.1\.mlp_res_norm\.weight'"),
        (without("model.layers.1.attn_res_proj.weight"), r"lack 'model\.layers\.1\.attn_res_proj\.weight'"),
        (without("model.res_proj.weight"), r"lack 'model\.res_proj\.weight'"),
        (without("model.layers.0.attn_res_proj.weight"), r"lack 'model\.layers\.0\.attn_res_proj\.weight'"),
        # A layer more than has reads.
        (having("model.layers.3.up.weight", 2, 2), r"lack 'model\.layers\.3\.attn_res_proj\.weight'"),
        (having("model.res_norm.weight", 5), r"'model\.res_norm\.weight' has the shape \[5\], not \[4\]"),
        (having("model.layers.2.mlp_res_proj.weight", 4), r"mlp_res_proj\.weight' has the shape \[4\], not \[1, 4\]"),
        (having("model.shared_kv_res_proj.weight", 1, 4), "'model.shared_kv_res_proj.weight' looks like a part of"),
        (having("model.layers.1.attn_res_proj.bias", 1), r"'model\.layers\.1\.attn_res_proj\.bias' looks like"),
        (having("model.attn_res.0.query", 4), r"'model\.attn_res\.0\.query' looks like a part"),
        (having("draft.layers.0.attn_res_proj.weight", 1, 4), r"in several modules, \['draft\.', 'model\.'\]"),
    ],
)
def test_keys_that_are_not_those_of_a_checkpoint(edit: Callable[[State], object], message: str) -> None:
    state = keys_of("fla")
    edit(state)
    with pytest.raises(ar.CheckpointError, match=message):
        ar.import_state_dict(state, "fla", fields("fla", 3))


def test_weights_of_no_such_model() -> None:
    with pytest.raises(ar.CheckpointError, match=r"no reads named as by fla: .* Some of their keys: embed\.weight"):
        ar.import_state_dict(Tower(2).state_dict(), "fla", fields("fla", 2))
    with pytest.raises(ar.CheckpointError, match=r"lack 'model\.layers\.0\.attn_res_proj\.weight'"):
        ar.import_state_dict(keys_of("kimi"), "fla", fields("fla", 2))
    with pytest.raises(ar.CheckpointError, match=r"no Attention Residuals with their settings: .*keys: embed"):
        ar.export_state_dict(Tower(2).state_dict(), "fla")
    for convert in (lambda: ar.import_state_dict({}, "olmo", {}), lambda: ar.export_state_dict({}, "olmo")):
        with pytest.raises(ValueError, match=r"convention must be one of \('fla', 'kimi'\), not 'olmo'"):
            convert()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_eps": EPS}, "attnres_block_size=None, which is no size"),
        ({"attnres_block_size": 0, "norm_eps": EPS}, "attnres_block_size=0, which is no size"),
        ({"attnres_block_size": 2}, "norm_eps=None, which is no epsilon"),
        ({"attnres_block_size": 2, "norm_eps": EPS, "num_hidden_layers": 2}, "have 3 layers .* num_hidden_layers=2"),
    ],
)
def test_configurations_that_are_not_those_of_the_weights(config: dict[str, object], message: str) -> None:
    with pytest.raises(ar.CheckpointError, match=message):
        ar.import_state_dict(keys_of("fla"), "fla", config)


def exported_fields(convention: str, **settings: object) -> dict[str, object]:
    """The fields of a model of three layers with other settings than the usual ones."""
    weights, _ = ar.import_state_dict(keys_of("fla"), "fla", fields("fla", 6))
    key = "model.attn_res._extra_state"
    weights[key] = dataclasses.replace(Settings.from_tensor(weights[key]), **settings).to_tensor()
    return ar.export_state_dict(weights, convention)[1]


@pytest.mark.parametrize(
    ("convention", "sizes", "block_size"),
    [("kimi", (4, 2), 2), ("fla", (4, 2), 4), ("fla", (5, 1), 5), ("kimi", (6,), 3), ("kimi", (2, 2, 2), 1)],
)
def test_the_size_of_a_block_is_counted_as_by_the_other_project(
    convention: str, sizes: tuple[int, ...], block_size: int
) -> None:
    assert exported_fields(convention, blocks=(sizes,)) == fields(convention, block_size)


@pytest.mark.parametrize(
    ("convention", "settings", "message"),
    [
        ("fla", {"blocks": ((2, 4),)}, r"blocks of \[2, 4\] branch outputs, and fla has blocks of one size"),
        (
            "fla",
            {"blocks": ((2, 1, 2, 1),)},
            r"blocks of \[2, 1, 2, 1\] branch outputs, and fla has blocks of one size",
        ),
        ("kimi", {"blocks": ((3, 3),)}, r"blocks of \[3, 3\] branch outputs, .* a multiple of 2"),
        ("fla", {"aggregation": "sum"}, "aggregation='sum', and fla knows 'mean' only"),
        ("kimi", {"scale": 0.5}, r"scale=0\.5, and kimi knows 1\.0 only"),
        ("fla", {"key_gain": False}, "key_gain=False, and fla knows True only"),
        # Parallel residuals, and two streams in one module.
        ("fla", {"blocks": ((3,),)}, r"\[3\] branch outputs in 3 layers, and fla has one stream with two in every"),
        ("fla", {"blocks": ((6,), (6,))}, r"\[6, 6\] branch outputs in 3 layers, and fla has one stream"),
    ],
)
def test_what_the_other_project_does_not_have(convention: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ar.CheckpointError, match=message):
        exported_fields(convention, **settings)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("attn_res.3.query"), r"lack 'attn_res\.3\.query'"),
        (without("attn_res.5.gain"), r"lack 'attn_res\.5\.gain'"),
        (without("attn_res._extra_state"), "no Attention Residuals with their settings"),
        (having("attn_res.6.query", 32), r"'attn_res\.6\.query' looks like a part of"),
        (having("attn_res.2.gain", 31), r"'attn_res\.2\.gain' has the shape \[31\], not \[32\]"),
        (having("res_proj.weight", 1, 32), r"'res_proj\.weight' looks like a part of"),
    ],
)
def test_weights_of_ours_that_are_not_whole(edit: Callable[[State], object], message: str) -> None:
    state = ar.import_state_dict(keys_of("fla", width=32, owner=""), "fla", fields("fla", 2))[0]
    edit(state)
    with pytest.raises(ar.CheckpointError, match=message):
        ar.export_state_dict(state, "fla")


def test_a_configuration_that_is_no_mapping() -> None:
    with pytest.raises(TypeError, match=r"such as that of config\.json or config\.to_dict\(\), not object"):
        ar.import_state_dict({}, "fla", object())


@pytest.mark.slow
def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "conversion.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    shown = [line.split("  # ")[1] for line in code.splitlines() if line.startswith("print")]
    assert capsys.readouterr().out.splitlines() == shown
