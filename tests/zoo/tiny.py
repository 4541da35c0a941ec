"""Tiny configurations: a table of sizes, set wherever a Hugging Face configuration class has such a field."""

import inspect
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, WIDTH, VOCAB = 4, 64, 128

# Every field that sizes a model, and what it is in a tiny one.
_SIZES: dict[int, str] = {
    LAYERS: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers n_routed_experts num_experts num_local_experts moe_num_experts num_attention_heads n_head "
    "n_heads "
    "num_heads encoder_attention_heads decoder_attention_heads num_encoder_attention_heads attention_heads "
    "num_decoder_attention_heads linear_num_value_heads linear_num_heads swa_num_attention_heads index_n_heads "
    "num_mem_blocks",
    WIDTH: "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size input_embedding_size "
    "output_embedding_size ssm_intermediate_size word_embed_proj_dim max_position_embeddings n_positions n_ctx "
    "max_source_positions max_target_positions context_length max_seq_len attention_hidden_size backbone_hidden_size "
    "original_max_position_embeddings",
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size entity_vocab_size",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dense_intermediate_size n_inner "
    "dff dim_ff feed_forward_size d_inner intermediate_size_mlp",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank kv_lora_rank "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size index_head_dim "
    "attention_chunk_size o_lora_rank laurel_rank hidden_size_per_layer_input",
    16: "head_dim v_head_dim dim_head global_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim "
    "linear_head_dim mamba_head_dim mamba_d_head attention_head_dim kv_channels attention_head_size mamba_chunk_size "
    "chunk_size state_size ssm_state_size mamba_d_state sliding_window sliding_window_size",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim",
    2: "num_key_value_heads n_kv_heads num_experts_per_tok moe_topk moe_k num_experts_per_token "
    "linear_num_key_heads mamba_n_groups n_groups swa_num_key_value_heads eos_token_id",
    1: "bos_token_id n_group topk_group n_shared_experts first_k_dense_replace decoder_start_token_id",
    0: "pad_token_id",
}
SIZES = {name: value for value, names in _SIZES.items() for name in names.split()}


def tiny_config(kind: str | type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """The configuration of a small model of 4 layers and width 64.

    Args:
        kind: A model type, or a configuration class.
        **overrides: Fields that the table does not get right for this model; a mapping changes the
            fields of a nested configuration.
    """
    kind = CONFIG_MAPPING[kind] if isinstance(kind, str) else kind
    known = inspect.signature(kind.__init__).parameters
    fields: dict[str, Any] = {name: value for name, value in SIZES.items() if name in known}
    for name, inner in kind.sub_configs.items():
        # An AutoConfig could be of any kind: where one is nested, the overrides give it whole.
        if isinstance(inner, type) and issubclass(inner, PreTrainedConfig) and inner.model_type:
            fields[name] = nested(inner, **overrides.pop(name, {}))
    return kind(**(fields | overrides))


def nested(kind: str | type[PreTrainedConfig], **overrides: Any) -> dict[str, Any]:
    """A tiny configuration as the field of another one."""
    return tiny_config(kind, **overrides).to_dict()
