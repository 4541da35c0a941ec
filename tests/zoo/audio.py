"""Speech and audio encoders of Hugging Face."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AutoModel

import attnres_rewrite as ar
from zoo.member import Accepted, Member, Refused, Unbuildable, noise, post_norm
from zoo.tiny import tiny_config

Outcome = Accepted | Refused | Unbuildable
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAVE = {**CONVOLUTIONS, **POSITIONS}


def sound(
    name: str,
    kind: str,
    outcome: Outcome,
    shape: Callable[[int, int], tuple[int, ...]] = lambda batch, length: (batch, 40 * length),
    key: str = "input_values",
    **overrides: Any,
) -> Member:
    """A model of a waveform or a spectrogram; ``shape`` is that of its input for a batch and a length."""

    def make() -> nn.Module:
        return AutoModel.from_config(tiny_config(kind, **overrides))

    return Member(name, "audio", make, lambda batch, length: {key: noise(*shape(batch, length))}, outcome)


def frames(width: int) -> Callable[[int, int], tuple[int, ...]]:
    """The shape of features of one width, eight frames for every unit of length."""
    return lambda batch, length: (batch, 8 * length, width)


def whisper_like(name: str, kind: str, **overrides: Any) -> Member:
    """Two convolutions, of which one halves the length, and learned positions of a fixed length."""
    return sound(
        name, kind, Accepted({"": 8}), lambda b, n: (b, 16, 128), "input_features", num_mel_bins=16, **overrides
    )


AFTER_POSITIONS = post_norm("hidden_states = self.layer_norm(hidden_states)")
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", **WAVE}
POST = {"do_stable_layer_norm": False, **WAVE}
# The convolution that makes the positions reads the stream, so what it adds is a branch output as well.
WITH_POSITIONS = Accepted({"encoder": 9}, untrainable="Data-dependent branching")
CONFORMER = {"num_mel_bins": 16, "conv_kernel_size": 3, "subsampling_conv_channels": 16}
DEPTHWISE = {"conv_depthwise_kernel_size": 3}
LAYER_END = post_norm("hidden_states = self.final_layer_norm(hidden_states)")
LAYER_OUT = post_norm("hidden_states = self.norm_out(hidden_states)")

# Codes lie between the two, through which no gradient reaches the encoder.
MIMI = Accepted({"encoder.encoder_transformer": 8, "decoder.decoder_transformer": 8}, idle=8, sizes=((1, 2), (2, 1)))
# fmt: off
MEMBERS = [
    sound("wav2vec2 stable", "wav2vec2", WITH_POSITIONS, **STABLE),
    sound("HuBERT stable", "hubert", WITH_POSITIONS, **STABLE),
    sound("WavLM stable", "wavlm", WITH_POSITIONS, **STABLE),
    sound("UniSpeech stable", "unispeech", WITH_POSITIONS, **STABLE),
    sound("UniSpeech-SAT stable", "unispeech-sat", WITH_POSITIONS, **STABLE),
    sound("wav2vec2", "wav2vec2", AFTER_POSITIONS, **POST),
    sound("HuBERT", "hubert", AFTER_POSITIONS, **POST),
    sound("WavLM", "wavlm", AFTER_POSITIONS, **POST),
    sound("UniSpeech", "unispeech", AFTER_POSITIONS, **POST),
    sound("UniSpeech-SAT", "unispeech-sat", AFTER_POSITIONS, **POST),
    sound("Data2Vec-Audio", "data2vec-audio", AFTER_POSITIONS, **WAVE),
    sound("SEW", "sew", AFTER_POSITIONS, **WAVE),
    sound("SEW-D", "sew-d", post_norm("self.LayerNorm(hidden_states + input_tensor)"), **WAVE),
    sound(
        "Wav2Vec2-Conformer", "wav2vec2-conformer", LAYER_END, position_embeddings_type="rotary", **DEPTHWISE, **WAVE
    ),
    sound(
        "Wav2Vec2-BERT", "wav2vec2-bert", LAYER_END, frames(16), "input_features", feature_projection_input_dim=16,
        **DEPTHWISE
    ),
    sound("Parakeet encoder", "parakeet_encoder", LAYER_OUT, frames(16), "input_features", **CONFORMER),
    sound(
        "Nemotron ASR streaming encoder", "nemotron_asr_streaming_encoder", LAYER_OUT, frames(16), "input_features",
        **CONFORMER
    ),
    sound("LASR encoder", "lasr_encoder", LAYER_OUT, frames(16), "input_features", **CONFORMER),
    sound(
        "AST", "audio-spectrogram-transformer", Accepted({"": 8}), lambda b, n: (b, 32, 16), max_length=32,
        num_mel_bins=16, patch_size=4, frequency_stride=4, time_stride=4
    ),
    whisper_like("Qwen2-Audio encoder", "qwen2_audio_encoder"),
    whisper_like("Voxtral encoder", "voxtral_encoder"),
    whisper_like("GLM-ASR encoder", "glmasr_encoder"),
    sound(
        "EnCodec", "encodec", Refused("graph break", "breaks into", "modeling_encodec.py", ar.GraphBreakError),
        lambda batch, length: (batch, 1, 320 * length), num_filters=4, codebook_size=32
    ),
    sound(
        "Mimi", "mimi", MIMI,
        lambda batch, length: (batch, 1, 1920 * length), num_filters=4, upsample_groups=64, codebook_size=32,
        codebook_dim=16, vector_quantization_hidden_dimension=16
    ),
]
# fmt: on
