"""Every causal language model of the installed transformers: what its tiny configuration needs, and what is found."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MusicgenForCausalLM,
    MusicgenMelodyForCausalLM,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig
from transformers.models.musicgen_melody.configuration_musicgen_melody import MusicgenMelodyDecoderConfig

from zoo.member import Accepted, Inputs, Member, Refused, Unbuildable, breaks, token_ids
from zoo.tiny import WIDTH, nested, tiny_config

# What the table of sizes does not get right. Mostly: sizes that must divide one another, lists with an entry per layer,
# and at least one layer of every kind where layers differ.
_HYBRID = ["linear_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention"] * 2
_LATENT = {"num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_DOTS3 = {
    **_LATENT,
    **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{name}": 32 for name in ("q_lora_rank", "kv_lora_rank")},
    **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16},
}
_QWEN4 = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16},
    **{"indexer_compress_ratio": 4, "hc_lowrank": 16, "hc_count": 2, "ngram_vocab_size_base": 50},
    **{"split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 4},
}
_SIGLIP = {"image_size": 32, "patch_size": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": _LATENT,
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "blt": {
        **{"encoder_hash_byte_group_vocab": 50, "encoder_config": {"hidden_size_global": WIDTH}},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "cohere_compass_text": {"layer_types": _SLIDING, "rope_parameters": dict.fromkeys(_SLIDING, _ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v32": _LATENT,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {
            "pyramid_num_routed": [-1, -1, 4, 4],
            "embed_dim": 64,
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3,
    "emu3": {"vq_config": {"base_channels": 32}},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 128},
    "fuyu": {"text_config": nested("persimmon"), **_SIGLIP},
    "gemma3": {
        "vision_config": nested("siglip_vision_model", **_SIGLIP),
        **{"mm_tokens_per_image": 4, "image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
        "audio_config": {"audio_embed_dim": 64},
    },
    "glm_moe_dsa": _LATENT,
    "got_ocr2": {
        "text_config": nested("qwen2"),
        "vision_config": {"output_channels": 16, "image_size": 64, "mlp_dim": 96, "global_attn_indexes": [1, 3]},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2},
    "inkling2_text": {"num_hidden_layers": 8, "n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "moshi": {
        "audio_encoder_config": nested("mimi"),
        "depth_decoder_config": {"input_size": 64, "audio_vocab_size": 64, "num_codebooks": 2},
        **{"audio_vocab_size": 64, "num_codebooks": 2},
    },
    "moss_transcribe_diarize": {"text_config": nested("qwen3"), "audio_token_id": 120},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        **{"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (32, 32), "num_buckets": 4},
        **{"attn_layers": ["local", "lsh"] * 2, "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4},
    },
    "xlstm": {
        "mode": "train",
        "chunkwise_kernel": "parallel--native_autograd",
        "use_cache": False,
        "return_last_states": False,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "tie_word_embeddings": False},
        **{"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 32},
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}

# Owner and number of branch outputs, of 4 layers each. 4: the branches of a layer are parallel, or there is one.
ACCEPTED: dict[tuple[str, int], str] = {
    ("model", 8): (
        "afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam bitnet cwm deepseek_v2 deepseek_v3 "
        "deepseek_v32 diffllama doge dots1 dots3_note_text emu3 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 "
        "flex_olmo flint gemma gemma2 gemma3_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa "
        "gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium "
        "hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder "
        "jais2 jamba kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4 llama4_text mellum mimo_v2_flash "
        "minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi nanochat "
        "nemotron olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 "
        "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma seed_oss smollm3 "
        "dots3_note solar_open stablelm starcoder2 vaultgemma xglm youtu zaya jetmoe"
    ),
    ("model", 4): "cohere cohere2 cohere2_moe cohere_compass_text nemotron_h phi zamba zamba2",
    ("model.decoder", 8): "bigbird_pegasus blenderbot mbart musicgen musicgen_melody opt pegasus whisper",
    ("transformer", 8): "bloom gpt-sw3 gpt2 gpt_bigcode gpt_neo mpt",
    ("model.language_model", 8): "fuyu gemma3 gemma4_unified got_ocr2 moss_transcribe_diarize",
    ("transformer", 4): "codegen falcon gptj",
    ("backbone", 4): "falcon_mamba mamba mamba2",
    ("biogpt", 8): "biogpt",
    ("cpmant.encoder", 8): "cpmant",
    ("model.language_model", 12): "gemma4",
    ("model", 12): "gemma4_text",
    ("gpt_neox", 4): "gpt_neox",
    ("gpt_neox_japanese", 8): "gpt_neox_japanese",
    ("bert.encoder", 8): "megatron-bert",
    ("model", 6): "mllama",
    ("roberta_prelayernorm.encoder", 8): "roberta-prelayernorm",
    ("rwkv", 8): "rwkv",
    ("roberta.encoder", 8): "xlm-roberta-xl",
}

# What is not as for the others.
DETAILS: dict[str, dict[str, Any]] = {
    # These compute partly in float32, whatever the dtype of their weights.
    **{name: {"tolerance": 1e-5} for name in ("mamba", "mamba2", "falcon_mamba", "hy_v4", "zaya")},
    # It makes a float of its least number, and so fails in float64 itself.
    "xglm": {"dtype": torch.float32},
    # In training a layer is left out where a random number says so.
    **{name: {"untrainable": "Data-dependent branching"} for name in ("musicgen", "musicgen_melody")},
    # Its layer of cross-attention is left out where there is no image.
    "mllama": {"layers": 3},
}

_LAYER_NORM = "hidden_states = self.LayerNorm(hidden_states + input_tensor)"
_SELF_ATTENTION = "hidden_states = self.self_attn_layer_norm(hidden_states"
POST_NORM: dict[str, str] = {
    **dict.fromkeys(
        "bert bert-generation big_bird camembert data2vec-text electra ernie git rembert roberta roc_bert roformer "
        "xlm-roberta".split(),
        _LAYER_NORM,
    ),
    **dict.fromkeys("bart blenderbot-small marian mvp plbart prophetnet trocr".split(), _SELF_ATTENTION),
    "hrm_text": "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)",
    "minimax": "hidden_states * torch.rsqrt(variance + self.variance_epsilon)",
    "openai-gpt": "n = self.ln_1(x + a)",
    "xlm": "tensor = self.layer_norm1[i](tensor)",
    "xlnet": "output = self.layer_norm(attn_out)",
}
REFUSED: dict[str, Refused] = {
    **{name: Refused("post-norm", "post-norm", line) for name, line in POST_NORM.items()},
    "inkling2_text": Refused(
        "attention over depth", "attends over depth already", "attn_output = F.scaled_dot_product_attention("
    ),
    "blt": breaks("Dynamic shape operator", "patch_starts = padded_indices[padded_mask]"),
    "deepseek_v4": Refused("hyper-connections", "hyper-connections", "torch.matmul("),
    "gemma3n_text": Refused(
        "overwritten in place", "overwritten in place", "corrected_predictions[1:] += first_prediction"
    ),
    # Experts chosen by a loop over those that were hit.
    **dict.fromkeys(("dbrx", "longcat_flash"), breaks("Dynamic shape operator", "expert_hit = torch.greater(")),
    # Its adapters sort the samples by language, which depends on the data.
    "xmod": breaks("Dynamic shape operator", "modeling_xmod.py"),
    "ctrl": breaks("graph break", "python_type()"),
    "reformer": breaks("Data-dependent branching", "% least_common_mult_chunk_length"),
    **dict.fromkeys(
        ("qwen4_exp", "qwen4_exp_text"), breaks("Dynamic shape operator", "local_visible_indices = torch.nonzero(")
    ),
}
DRAFTS = "drafts for a larger model, whose keys and values it shares"
UNBUILDABLE: dict[str, Unbuildable] = {
    "xlstm": Unbuildable("runs on whole chunks only, and fails in its own state there", "chunk size"),
    "gemma3n": Unbuildable("needs timm, which needs torchvision", "timm"),
    "gemma4_assistant": Unbuildable(DRAFTS, "hidden_size_per_layer_input must be 0"),
    "gemma4_unified_assistant": Unbuildable(DRAFTS, "set of layer types"),
}


# Of these the mapping names a model whose configuration is that of a part.
PARTS: dict[str, tuple[type[nn.Module], type[PreTrainedConfig]]] = {
    "musicgen": (MusicgenForCausalLM, MusicgenDecoderConfig),
    "musicgen_melody": (MusicgenMelodyForCausalLM, MusicgenMelodyDecoderConfig),
}


def _make(name: str) -> nn.Module:
    if name in PARTS:
        model, config = PARTS[name]
        return model(tiny_config(config))
    # The default experts, grouped_mm, know no float64.
    return AutoModelForCausalLM.from_config(
        tiny_config(name, **OVERRIDES.get(name, {})), experts_implementation="batched_mm"
    )


def _inputs(name: str, batch: int, length: int) -> Inputs:
    # Musicgen takes a row for each of its four codebooks.
    ids = {"input_ids": token_ids(4 * batch if name in PARTS else batch, length)}
    return {**ids, "use_cache": False} if name == "blt" else ids


def _accepted() -> Mapping[str, Accepted]:
    return {
        name: Accepted({owner: branches}, **DETAILS.get(name, {}))
        for (owner, branches), names in ACCEPTED.items()
        for name in names.split()
    }


OUTCOMES: dict[str, Accepted | Refused | Unbuildable] = {**_accepted(), **REFUSED, **UNBUILDABLE}
MEMBERS = [
    Member(name, "causal language model", functools.partial(_make, name), functools.partial(_inputs, name), outcome)
    for name, outcome in sorted(OUTCOMES.items())
]
MISSING = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(OUTCOMES))
