"""`generate()` of a rewritten Hugging Face model: the KV cache changes the cost and not the tokens.

The reference is a model that recomputes everything at every step, without a cache: for Llama and GPT-2 the
hand-written one, run by the same `generate()`, so that sampling and beam search draw and score alike.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from models import VOCAB, WIDTH, gpt2, llama, mostly_slow, prepared, randomise_sites, site_parameters, token_ids
from reference_models import reference_gpt2, reference_llama
from torch import Tensor, nn

import attnres_rewrite as ar

transformers = pytest.importorskip("transformers")

LAYERS, BLOCKS, NEW_TOKENS = 2, 2, 8
# Without the token that pads, which generate() would mask.
PROMPT = token_ids(2, 5).clamp_min(1)
MODES = {
    "greedy": {},
    # The default keeps the 50 most likely tokens only; here every token may be drawn.
    "sampling": {"do_sample": True, "top_k": 0},
    "cooler sampling": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "beam search": {"num_beams": 3},
}


@pytest.fixture(autouse=True)
def _fresh_start() -> None:
    """Instead of the one for all tests: here they share what was compiled, as requests to one server do."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _room_for_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    # All ways to generate together make more graphs of one function than the default allows.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


class Recomputing:
    """Makes `generate()` of a plain model run a hand-written forward, of all tokens at every step."""

    @staticmethod
    def of(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> nn.Module:
        def recompute(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> object:
            return transformers.modeling_outputs.CausalLMOutput(logits=forward(input_ids))

        model.__class__ = type(f"Recomputing{type(model).__name__}", (type(model),), {"forward": recompute})
        return model


def pair(
    make: Callable[..., nn.Module], reference: Callable[..., Tensor], **options: object
) -> tuple[nn.Module, nn.Module]:
    """A rewritten model with random queries, and the hand-written one of the same weights."""
    model = prepared(make(LAYERS))
    plain = copy.deepcopy(model)
    randomise_sites(ar.rewrite(model, BLOCKS, backend="eager", **options))
    queries, gains = site_parameters(model)
    return model, Recomputing.of(plain, lambda ids: reference(plain, ids, queries, gains, blocks=BLOCKS))


@pytest.fixture(scope="module")
def llamas() -> tuple[nn.Module, nn.Module]:
    # Symbolic sizes from the start, so that fewer graphs are made; GPT-2 below goes the usual way.
    return pair(llama, reference_llama, dynamic=True)


def generate(model: nn.Module, ids: Tensor = PROMPT, **options: object) -> Tensor:
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    torch.manual_seed(4)
    return model.generate(ids, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options})


@pytest.mark.parametrize("mode", mostly_slow(MODES, "greedy"))
def test_every_mode_equals_recomputing(llamas, mode) -> None:
    model, recomputing = llamas
    tokens = generate(model, **MODES[mode])
    assert tokens.shape == (2, PROMPT.shape[1] + NEW_TOKENS)
    assert torch.equal(tokens, generate(recomputing, use_cache=False, **MODES[mode]))


def test_the_modes_differ_and_the_queries_show(llamas) -> None:
    """Else the tests above would compare little."""
    model, recomputing = llamas
    tokens = {mode: generate(recomputing, use_cache=False, **MODES[mode]) for mode in MODES}
    assert len({str(found.tolist()) for found in tokens.values()}) == len(MODES)
    with ar.disabled(model):
        plain = {mode: generate(model, **options) for mode, options in MODES.items()}
    assert not any(torch.equal(tokens[mode], plain[mode]) for mode in MODES)


@pytest.mark.parametrize("mode", mostly_slow(["greedy", "beam search"]))
def test_static_cache(llamas, mode) -> None:
    """A buffer of fixed size, so every step has the same shapes."""
    model, recomputing = llamas
    tokens = generate(model, cache_implementation="static", **MODES[mode])
    assert torch.equal(tokens, generate(recomputing, use_cache=False, **MODES[mode]))


def test_static_cache_that_generate_compiles_itself(llamas) -> None:
    """As it does on a GPU; here told to. It would compile the call with a backend that knows no sites."""
    model, recomputing = llamas
    config = transformers.CompileConfig(backend="inductor", mode=None)
    config._compile_all_devices = True
    tokens = generate(model, cache_implementation="static", compile_config=config)
    assert torch.equal(tokens, generate(recomputing, use_cache=False))
    assert "_compiled_call" not in model.__dict__
    plain = ar.undo(copy.deepcopy(model))
    assert "get_compiled_call" not in plain.__dict__


@pytest.mark.slow
def test_other_prompts_follow_on_what_was_compiled(llamas) -> None:
    model, recomputing = llamas
    for batch, length in ((3, 7), (2, 9)):
        ids = token_ids(batch, length, seed=length).clamp_min(1)
        assert torch.equal(generate(model, ids), generate(recomputing, ids, use_cache=False))


@pytest.mark.slow
def test_left_padded_batches(llamas) -> None:
    """Padding goes in by the attention mask; the tokens of each row are those it gets alone."""
    model, recomputing = llamas
    short, long = PROMPT[:1, :3], PROMPT[1:]
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.long), short), -1)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    both = generate(model, torch.cat((padded, long)), attention_mask=mask)
    alone = [generate(recomputing, row, use_cache=False) for row in (short, long)]
    assert torch.equal(both[0, 5:], alone[0][0, 3:])
    assert torch.equal(both[1], alone[1][0])


def test_every_step_has_the_logits_of_recomputing(llamas) -> None:
    model, recomputing = llamas
    options = {"return_dict_in_generate": True, "output_logits": True}
    cached = generate(model, **options).logits
    recomputed = generate(recomputing, use_cache=False, **options).logits
    assert len(cached) == NEW_TOKENS
    torch.testing.assert_close(torch.stack(cached), torch.stack(recomputed), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_zero_queries_generate_what_the_original_generates(llamas) -> None:
    model, _ = llamas
    sites = [parameter for _, parameter in ar.attnres_parameters(model)]
    before = [parameter.clone() for parameter in sites]
    for name, parameter in ar.attnres_parameters(model):
        parameter.fill_(0.0 if name.endswith("query") else 1.0)
    tokens = generate(model)
    for parameter, value in zip(sites, before, strict=True):
        parameter.copy_(value)
    assert torch.equal(tokens, generate(prepared(llama(LAYERS))))
    assert not torch.equal(tokens, generate(model))
    assert len(tokens.unique()) > 3, "a model that repeats one token proves little"


@pytest.mark.slow
def test_learned_positions() -> None:
    """GPT-2 finds the position of a token by the length of the cache."""
    model, recomputing = pair(gpt2, reference_gpt2)
    for mode in ("greedy", "sampling"):
        tokens = generate(model, **MODES[mode])
        assert torch.equal(tokens, generate(recomputing, use_cache=False, **MODES[mode]))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=40,
        num_layers=LAYERS,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.slow
def test_encoder_decoder() -> None:
    """`generate()` calls the encoder on its own, once, and then the decoder with its two caches."""
    model = prepared(t5())
    modes = {mode: MODES[mode] for mode in ("greedy", "sampling")}
    plain = {mode: generate(model, **options) for mode, options in modes.items()}
    inputs = {"input_ids": PROMPT, "decoder_input_ids": PROMPT, "use_cache": False}
    blocks = {"encoder": 1, "decoder": 2}
    randomise_sites(ar.rewrite(model, blocks, example_inputs=inputs, backend="eager"))
    tokens = {mode: generate(model, **options) for mode, options in modes.items()}
    for mode, options in modes.items():
        assert torch.equal(tokens[mode], generate(model, use_cache=False, **options))
        assert not torch.equal(tokens[mode], plain[mode])
    # The sites of the encoder count too, although the decoder does not hold them.
    with torch.no_grad():
        for name, parameter in ar.attnres_parameters(model):
            if name.startswith("encoder"):
                parameter.fill_(0.0)
    assert not torch.equal(generate(model, **MODES["sampling"]), tokens["sampling"])
