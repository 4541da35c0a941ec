"""Transformer encoders of Hugging Face, for text, proteins, forms and time series."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from zoo.member import Accepted, Inputs, Member, Refused, Unbuildable, breaks, changed, noise, post_norm, token_ids
from zoo.tiny import tiny_config

Outcome = Accepted | Refused | Unbuildable


def encoder(
    name: str, kind: str, outcome: Outcome, inputs: Callable[[int, int], Inputs], moe: bool = False, **overrides: Any
) -> Member:
    def make() -> nn.Module:
        keywords = {"experts_implementation": "batched_mm"} if moe else {}
        return AutoModel.from_config(tiny_config(kind, **overrides), **keywords)

    return Member(name, "encoder", make, inputs, outcome)


def text(name: str, kind: str, outcome: Outcome, stretch: int = 1, **overrides: Any) -> Member:
    """An encoder of token ids, ``stretch`` for every unit of length."""
    return encoder(name, kind, outcome, lambda b, n: {"input_ids": token_ids(b, stretch * n)}, **overrides)


def pages(name: str, kind: str, outcome: Outcome, **overrides: Any) -> Member:
    """An encoder of token ids, each with its place on a page."""
    return encoder(
        name,
        kind,
        outcome,
        lambda b, n: {"input_ids": token_ids(b, n), "bbox": torch.arange(4).expand(b, n, 4).contiguous()},
        **overrides,
    )


def series(name: str, kind: str, outcome: Outcome, **overrides: Any) -> Member:
    """An encoder of a number of variables over time."""
    return encoder(name, kind, outcome, lambda b, n: {"past_values": noise(b, 32, 3)}, **overrides)


BERT_NORM = "hidden_states = self.LayerNorm(hidden_states + input_tensor)"
TWO_A_LAYER = Accepted({"encoder": 8})
BARE = Accepted({"": 8})

MEMBERS = [
    text("BERT", "bert", post_norm(BERT_NORM)),
    text("RoBERTa", "roberta", post_norm(BERT_NORM)),
    text("XLM-RoBERTa", "xlm-roberta", post_norm(BERT_NORM)),
    text("CamemBERT", "camembert", post_norm(BERT_NORM)),
    text("ELECTRA", "electra", post_norm(BERT_NORM)),
    text("ERNIE", "ernie", post_norm(BERT_NORM)),
    text("ConvBERT", "convbert", post_norm(BERT_NORM)),
    text("RemBERT", "rembert", post_norm(BERT_NORM)),
    text("RoFormer", "roformer", post_norm(BERT_NORM)),
    text("Nystromformer", "nystromformer", post_norm(BERT_NORM), segment_means_seq_len=9, num_landmarks=9),
    text("Data2Vec-Text", "data2vec-text", post_norm(BERT_NORM)),
    text("BigBird", "big_bird", post_norm(BERT_NORM), attention_type="original_full"),
    text("CANINE", "canine", post_norm(BERT_NORM)),
    text("Splinter", "splinter", post_norm(BERT_NORM)),
    text("RoCBert", "roc_bert", post_norm(BERT_NORM)),
    text("LUKE", "luke", post_norm(BERT_NORM)),
    text("BertGeneration", "bert-generation", post_norm(BERT_NORM)),
    text("TAPAS", "tapas", post_norm(BERT_NORM)),
    text("MarkupLM", "markuplm", post_norm(BERT_NORM)),
    pages("LayoutLM", "layoutlm", post_norm(BERT_NORM)),
    pages("LayoutLMv3", "layoutlmv3", post_norm(BERT_NORM), visual_embed=False, coordinate_size=12, shape_size=8),
    pages("LiLT", "lilt", post_norm(BERT_NORM), hidden_size=96),
    text(
        "Longformer",
        "longformer",
        breaks("Tensor.item()", "modeling_longformer.py"),
        stretch=4,
        attention_window=4,
    ),
    text("FNet", "fnet", post_norm("self.LayerNorm(")),
    text("SqueezeBERT", "squeezebert", post_norm("x = nn.LayerNorm.forward(self, x)")),
    text("ALBERT", "albert", post_norm("self.LayerNorm(")),
    text("DistilBERT", "distilbert", post_norm("self.sa_layer_norm("), hidden_dim=96),
    text("MPNet", "mpnet", post_norm("self.LayerNorm(")),
    # The norms of these two are written by hand, so that what is said is less specific.
    text("DeBERTa", "deberta", changed("post-norm", "y = self.weight * hidden_states + self.bias")),
    text("DeBERTa-v2", "deberta-v2", post_norm("self.LayerNorm(")),
    text("I-BERT", "ibert", changed("post-norm", "x = x * self.weight + self.bias")),
    text("NomicBERT", "nomic_bert", post_norm("self.post_attention_layernorm(hidden_states)")),
    text("Jina-Embeddings-v3", "jina_embeddings_v3", post_norm("self.post_attention_layernorm(hidden_states)")),
    text("XLM", "xlm", post_norm("tensor = self.layer_norm1[i](tensor)")),
    text("XLNet", "xlnet", post_norm("output = self.layer_norm(attn_out)")),
    text("FlauBERT", "flaubert", post_norm("tensor = self.layer_norm1[i](tensor)")),
    text(
        "Funnel",
        "funnel",
        post_norm("self.layer_norm(query + attn_out)"),
        architectures=["FunnelModel"],
        block_sizes=(2, 2),
        d_head=16,
    ),
    # Its adapters sort the samples by language, which depends on the data.
    text("X-MOD", "xmod", breaks("breaks into", "modeling_xmod.py"), languages=("en",), default_language="en"),
    text(
        "YOSO",
        "yoso",
        breaks("duplicate tensor input", "YosoCumulation.apply("),
    ),
    # Attention and feed-forward have a stream each, and a backward pass of their own that undoes the adds.
    text(
        "Reformer",
        "reformer",
        Refused("reversible", "coupled streams", "attn_output = prev_attn_output + attn_output"),
        attn_layers=["local"] * 4,
        axial_pos_embds=False,
        is_decoder=False,
    ),
    text(
        "FlauBERT pre-norm",
        "flaubert",
        Unbuildable("broken in transformers 5.23", "'EncoderDecoderCache' object is not subscriptable"),
        pre_norm=True,
    ),
    text("MRA", "mra", breaks("requires_grad_()", "modeling_mra.py")),
    text("RoBERTa-PreLayerNorm", "roberta-prelayernorm", TWO_A_LAYER),
    text("XLM-RoBERTa-XL", "xlm-roberta-xl", TWO_A_LAYER),
    text("Megatron-BERT", "megatron-bert", TWO_A_LAYER),
    text("ModernBERT", "modernbert", BARE),
    text("EuroBERT", "eurobert", BARE),
    text("UltraBERT", "ultrabert", BARE),
    text("OpenAI privacy filter", "openai_privacy_filter", BARE, moe=True),
    text("ESM-2", "esm", TWO_A_LAYER, position_embedding_type="rotary"),
    text("ESM-1b", "esm", TWO_A_LAYER, position_embedding_type="absolute", emb_layer_norm_before=True),
    text("ESM-C", "esmc", BARE, num_key_value_heads=4),
    # Its norms are scales and biases, so that the bottlenecks' inner chains are nested in one branch a layer.
    text("MobileBERT", "mobilebert", Accepted({"encoder": 4}), intra_bottleneck_size=32),
    encoder(
        "Perceiver",
        "perceiver",
        Accepted({"encoder": 10}, layers=5),
        lambda b, n: {"inputs": noise(b, n, 64)},
        d_latents=64,
        num_latents=8,
        num_self_attends_per_block=4,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    ),
    series(
        "PatchTST", "patchtst", TWO_A_LAYER, context_length=32, patch_length=8, patch_stride=8, num_input_channels=3
    ),
    series(
        "PatchTST post-norm",
        "patchtst",
        post_norm("output = self.batchnorm(output)"),
        context_length=32,
        patch_length=8,
        patch_stride=8,
        num_input_channels=3,
        pre_norm=False,
    ),
    series(
        "PatchTSMixer",
        "patchtsmixer",
        Accepted({"encoder.mlp_mixer_encoder": 8}),
        context_length=32,
        patch_length=8,
        patch_stride=8,
        num_input_channels=3,
    ),
    series(
        "PatchTSMixer mixed channels",
        "patchtsmixer",
        Accepted({"encoder.mlp_mixer_encoder": 12}),
        context_length=32,
        patch_length=8,
        patch_stride=8,
        num_input_channels=3,
        mode="mix_channel",
    ),
    encoder(
        "TimesFM",
        "timesfm",
        Accepted({"": 8}, dtype=torch.float32),
        lambda b, n: {
            "past_values": noise(b, 32),
            "past_values_padding": torch.zeros(b, 32, dtype=torch.long),
            "freq": torch.zeros(b, 1, dtype=torch.long),
        },
        patch_length=8,
        context_length=32,
        horizon_length=8,
    ),
    encoder(
        "TimesFM 2.5",
        "timesfm2_5",
        BARE,
        lambda b, n: {"past_values": noise(b, 32), "past_values_padding": torch.zeros(b, 32, dtype=torch.long)},
        patch_length=8,
        context_length=32,
        horizon_length=8,
    ),
]
