"""`generate()` of a rewritten Hugging Face model: the KV cache changes the cost and not the tokens."""

import copy

import pytest
import torch
from models import gpt2, llama, prepared, randomise_sites, site_parameters, token_ids
from reference_models import reference_llama
from torch import Tensor, nn

import attnres_rewrite as ar

NEW_TOKENS = 8
# Without the token that pads, which generate() would mask.
PROMPT = token_ids(2, 5).clamp_min(1)


def generate(model: nn.Module, **options: object) -> Tensor:
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    return model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


@torch.no_grad()
def greedy_without_cache(model: nn.Module) -> Tensor:
    ids = PROMPT
    for _ in range(NEW_TOKENS):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat((ids, best[:, None]), -1)
    return ids


@pytest.mark.parametrize("make", [llama, gpt2])
def test_cached_generation_equals_recomputing(make) -> None:
    model = randomise_sites(ar.rewrite(prepared(make(3)), 2, backend="eager"))
    tokens = generate(model)
    assert tokens.shape == (2, PROMPT.shape[1] + NEW_TOKENS)
    assert torch.equal(tokens, greedy_without_cache(model))
    with ar.disabled(model):
        plain = generate(model)
    assert not torch.equal(tokens, plain), "random queries change the tokens"
    # A second prompt length and what was compiled before: still the same tokens.
    assert torch.equal(generate(model), tokens)


def test_generated_tokens_are_those_of_the_hand_written_model() -> None:
    plain = prepared(llama(3))
    model = copy.deepcopy(plain)
    randomise_sites(ar.rewrite(model, 2, backend="eager"))
    queries, gains = site_parameters(model)
    ids = PROMPT
    for _ in range(NEW_TOKENS):
        best = reference_llama(plain, ids, queries, gains, blocks=2)[:, -1].argmax(-1)
        ids = torch.cat((ids, best[:, None]), -1)
    assert torch.equal(generate(model), ids)


def test_zero_queries_with_sum_generate_what_the_original_generates() -> None:
    original = prepared(llama(3))
    expected = generate(original)
    rewritten = ar.rewrite(original, config=ar.AttnResConfig(blocks=2, aggregation="sum"), backend="eager")
    assert torch.equal(generate(rewritten), expected)
    assert len(expected.unique()) > 3, "a model that repeats one token proves little"


def test_decoding_step_by_step_gives_the_logits_of_one_pass() -> None:
    model = randomise_sites(ar.rewrite(prepared(llama(3)), 2, backend="eager"))
    ids = token_ids(2, 7)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, steps = None, []
        for position in range(ids.shape[1]):
            output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_left_padded_batches() -> None:
    """Padding goes in by the attention mask; the tokens of each row are those it gets alone."""
    model = randomise_sites(ar.rewrite(prepared(llama(3)), 2, backend="eager"))
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    options = {"max_new_tokens": 4, "do_sample": False}
    short, long = PROMPT[:1, :3], PROMPT[1:]
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.long), short), -1)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    both = model.generate(torch.cat((padded, long)), attention_mask=mask, **options)
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **options) for row in (short, long)]
    assert torch.equal(both[0, 5:], alone[0][0, 3:])
    assert torch.equal(both[1], alone[1][0])
