"""Encoder-decoder transformers of Hugging Face: two streams each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from zoo.member import Accepted, Inputs, Member, Refused, Unbuildable, breaks, noise, post_norm, token_ids
from zoo.tiny import tiny_config

Outcome = Accepted | Refused | Unbuildable


def text(name: str, kind: str, outcome: Outcome, stretch: int = 1, moe: bool = False, **overrides: Any) -> Member:
    """A model of token ids to token ids; ``stretch`` of them are read for every unit of length."""

    def make() -> nn.Module:
        keywords = {"experts_implementation": "batched_mm"} if moe else {}
        return AutoModel.from_config(tiny_config(kind, use_cache=False, **overrides), **keywords)

    def inputs(batch: int, length: int) -> Inputs:
        ids = token_ids(batch, stretch * length)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": token_ids(batch, length - 2),
        }

    return Member(name, "encoder-decoder", make, inputs, outcome)


def speech(
    name: str, kind: str, outcome: Outcome, key: str, shape: Callable[[int, int], tuple[int, ...]], **overrides: Any
) -> Member:
    """A model of sound to token ids; ``shape`` is that of its features for a batch and a length."""

    def inputs(batch: int, length: int) -> Inputs:
        return {key: noise(*shape(batch, length)), "decoder_input_ids": token_ids(batch, length - 2)}

    def make() -> nn.Module:
        return AutoModel.from_config(tiny_config(kind, use_cache=False, **overrides))

    return Member(name, "encoder-decoder", make, inputs, outcome)


def series(name: str, kind: str, outcome: Outcome, **overrides: Any) -> Member:
    """A model of 16 past values, and 8 more for the one lag, to 8 future ones."""
    fields = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1], "num_time_features": 1, **overrides}

    def inputs(batch: int, length: int) -> Inputs:
        return {
            "past_values": noise(batch, 17),
            "past_time_features": noise(batch, 17, 1),
            "past_observed_mask": torch.ones(batch, 17),
            "future_values": noise(batch, 8),
            "future_time_features": noise(batch, 8, 1),
        }

    def make() -> nn.Module:
        return AutoModel.from_config(tiny_config(kind, use_cache=False, **fields))

    return Member(name, "encoder-decoder", make, inputs, outcome)


def pages(batch: int, length: int) -> Inputs:
    return {
        "input_ids": token_ids(batch, length),
        "attention_mask": torch.ones(batch, length),
        "bbox": torch.full((batch, length, 4), 0.5),
        "decoder_input_ids": token_ids(batch, length - 2),
    }


# A decoder layer attends to itself, attends to the encoder, and feeds forward.
TWO = Accepted({"encoder": 8, "decoder": 12})
# In training a layer is left out where a random number says so.
DROPS_LAYERS = "Data-dependent branching"
SEAMLESS = Accepted({"text_encoder": 8, "text_decoder": 12}, untrainable=DROPS_LAYERS)
LAYER_DROP = Accepted({"encoder": 8, "decoder": 12}, untrainable=DROPS_LAYERS)
BART_NORM = post_norm("hidden_states = self.self_attn_layer_norm(hidden_states)")
WINDOWS = {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}

# fmt: off
MEMBERS = [
    text("T5", "t5", TWO, d_kv=16),
    text("T5 v1.1", "t5", TWO, d_kv=16, feed_forward_proj="gated-gelu"),
    text("mT5", "mt5", TWO, d_kv=16),
    text("UMT5", "umt5", TWO, d_kv=16),
    text("LongT5", "longt5", TWO, d_kv=16, local_radius=4),
    text(
        "LongT5 global", "longt5", TWO, d_kv=16, local_radius=4, global_block_size=4,
        encoder_attention_type="transient-global"
    ),
    text(
        "SwitchTransformers", "switch_transformers", breaks("breaks into", "modeling_switch_transformers.py"),
        moe=True, d_kv=16
    ),
    text("mBART", "mbart", TWO),
    text("Pegasus", "pegasus", TWO),
    # The tokens that attend globally are a stream of their own, of whose last layer nothing is used.
    text(
        "PegasusX", "pegasus_x",
        Accepted({"encoder": (8, 7), "decoder": 12}, idle=1), block_size=4,
        num_global_tokens=4
    ),
    text("BigBird-Pegasus", "bigbird_pegasus", TWO, attention_type="original_full"),
    text("M2M100", "m2m_100", LAYER_DROP),
    text("NLLB-MoE", "nllb-moe", breaks("aten.nonzero.default", "modeling_nllb_moe.py"), moe=True),
    text("NLLB-MoE, dense", "nllb-moe", LAYER_DROP, encoder_sparse_step=0, decoder_sparse_step=0),
    text("Blenderbot", "blenderbot", TWO),
    text("BlenderbotSmall", "blenderbot-small", BART_NORM),
    text("BART", "bart", BART_NORM),
    text("Marian", "marian", BART_NORM),
    text("PLBart", "plbart", BART_NORM),
    text("MVP", "mvp", BART_NORM),
    text(
        "FSMT", "fsmt", breaks("Data-dependent branching", "modeling_fsmt.py"), src_vocab_size=128, tgt_vocab_size=128,
        langs=("en", "de")
    ),
    text("ProphetNet", "prophetnet", post_norm("self.self_attn_layer_norm(attention_output + hidden_states)")),
    text("LED", "led", breaks("Tensor.item()", "modeling_led.py"), stretch=4, **WINDOWS),
    text("T5Gemma", "t5gemma", TWO),
    # One attention of the decoder serves both itself and the encoder.
    text("T5Gemma 2", "t5gemma2", Accepted({"encoder.text_model": 8, "decoder": 8})),
    text("SeamlessM4T", "seamless_m4t", SEAMLESS),
    text("SeamlessM4T v2", "seamless_m4t_v2", SEAMLESS),
    Member(
        "UDOP", "encoder-decoder", lambda: AutoModel.from_config(tiny_config("udop", d_kv=16, use_cache=False)),
        pages, TWO
    ),
    speech("Whisper", "whisper", TWO, "input_features", lambda b, n: (b, 80, 128)),
    speech("Speech2Text", "speech_to_text", TWO, "input_features", lambda b, n: (b, 8 * n, 80), conv_channels=32),
    speech(
        "Moonshine", "moonshine", TWO, "input_values", lambda b, n: (b, 400 * n), encoder_num_hidden_layers=4,
        decoder_num_hidden_layers=4, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
        encoder_num_key_value_heads=4, decoder_num_key_value_heads=4
    ),
    series("Time series transformer", "time_series_transformer", BART_NORM),
    series("Informer", "informer", BART_NORM),
    series("Autoformer", "autoformer", BART_NORM),
]
# fmt: on
