"""Models of Hugging Face with more than one kind of input: one stream per tower."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.vision_utils import get_vision_position_ids

from zoo.member import Accepted, Inputs, Member, Refused, Unbuildable, breaks, noise, post_norm, token_ids
from zoo.tiny import nested, tiny_config

Outcome = Accepted | Refused | Unbuildable
IMAGE = 100
PATCHES = {"image_size": 16, "patch_size": 8}


def two_towers(name: str, kind: str, outcome: Outcome, size: int = 16, **overrides: Any) -> Member:
    """Token ids and an image, each for a tower of its own."""

    def inputs(batch: int, length: int) -> Inputs:
        return {"input_ids": token_ids(batch, length), "pixel_values": noise(batch, 3, size, size)}

    return Member(name, "multimodal", lambda: AutoModel.from_config(tiny_config(kind, **overrides)), inputs, outcome)


def image_in_text(
    name: str,
    kind: str,
    outcome: Outcome,
    pixels: tuple[int, ...] = (3, 16, 16),
    extra: Callable[[int, torch.Tensor], Inputs] = lambda batch, ids: {},
    **overrides: Any,
) -> Member:
    """Token ids of which four stand for an image, whose ``pixels`` they are replaced by."""

    def make() -> nn.Module:
        return AutoModelForImageTextToText.from_config(tiny_config(kind, **overrides))

    def inputs(batch: int, length: int) -> Inputs:
        ids = token_ids(batch, length)
        ids[:, 1:5] = IMAGE
        return {"input_ids": ids, "pixel_values": noise(batch, *pixels), "use_cache": False, **extra(batch, ids)}

    return Member(name, "multimodal", make, inputs, outcome)


def qwen(name: str, kind: str, outcome: Outcome, **vision: Any) -> Member:
    """Images as a list of patches, which a grid puts in place."""
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "depth": 4, "num_heads": 4, **vision}

    def make() -> nn.Module:
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        text = {"rope_parameters": rope, "num_key_value_heads": 2}
        return AutoModelForImageTextToText.from_config(
            tiny_config(kind, text_config=text, vision_config=sizes, image_token_id=IMAGE, **TOKENS)
        )

    def inputs(batch: int, length: int) -> Inputs:
        ids = token_ids(batch, length)
        ids[:, 1:5] = IMAGE
        grid = torch.tensor([[1, 4, 4]] * batch)
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": noise(16 * batch, 96),
            "image_grid_thw": grid,
            "use_cache": False,
        }

    return Member(name, "multimodal", make, inputs, outcome)


def qwen_tower(name: str, kind: str, outcome: Outcome, **vision: Any) -> Member:
    """The vision tower as a model of its own, with eager attention, and given what it makes from the grid."""
    whole = qwen(name, kind, outcome, **vision)

    def make() -> nn.Module:
        tower = whole.make().model.visual
        tower.set_attn_implementation("eager")
        return tower

    def inputs(batch: int, length: int) -> Inputs:
        given = whole.inputs(batch, length)
        grid = given["image_grid_thw"]
        position_ids = get_vision_position_ids(grid, 2)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * 16
        return {
            **{"hidden_states": given["pixel_values"], "grid_thw": grid},
            **{"position_ids": position_ids, "cu_seqlens": cu_seqlens},
        }

    return dataclasses.replace(whole, make=make, inputs=inputs)


TOWERS = Accepted({"vision_model.encoder": 8, "text_model.encoder": 8})
IMAGE_IN_TEXT = Accepted({"model.vision_tower.encoder": 8, "model.language_model": 8})
# The vision tower makes lists of the sizes of the images, in every layer.
LISTS_SIZES = breaks("Data dependent operator", "zip(grid_thw.tolist(), ")
# The towers are in graphs of their own: which images are padding is looked up between them.
LANGUAGE_ALONE = Accepted({"model.language_model": 8}, named=True)
QWEN2 = {"embed_dim": 64, "hidden_size": 64}
QWEN2_5 = {"hidden_size": 64, "out_hidden_size": 64, "fullatt_block_indexes": [1, 3], "window_size": 16}
QWEN3 = {
    **{"hidden_size": 64, "out_hidden_size": 64},
    **{"deepstack_visual_indexes": [1, 2], "num_position_embeddings": 16},
}
PADDING_IMAGES = Accepted({"model.vision_model.encoder": 8, "model.text_model": 8})
TOKENS = {"video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}

# fmt: off
MEMBERS = [
    two_towers("CLIP", "clip", TOWERS, vision_config=PATCHES),
    two_towers("SigLIP", "siglip", TOWERS, vision_config=PATCHES),
    two_towers("CLIPSeg", "clipseg", TOWERS, vision_config=PATCHES),
    two_towers("MetaCLIP 2", "metaclip_2", TOWERS, vision_config=PATCHES),
    two_towers(
        "AIMv2", "aimv2", Accepted({"vision_model.encoder": 8, "text_model.encoder": 8}, tolerance=1e-5),
        vision_config=PATCHES
    ),
    two_towers("OWL-ViT", "owlvit", TOWERS, vision_config=PATCHES),
    two_towers("OWLv2", "owlv2", TOWERS, vision_config=PATCHES),
    two_towers(
        "AltCLIP", "altclip", post_norm("self.LayerNorm(hidden_states + input_tensor)"), vision_config=PATCHES
    ),
    two_towers(
        "Chinese-CLIP", "chinese_clip", post_norm("self.LayerNorm(hidden_states + input_tensor)"),
        vision_config=PATCHES
    ),
    two_towers("BLIP", "blip", post_norm("self.LayerNorm(hidden_states + input_tensor)"), vision_config=PATCHES),
    two_towers(
        "BridgeTower", "bridgetower", post_norm("self.LayerNorm(hidden_states + input_tensor)"),
        vision_config=PATCHES
    ),
    two_towers(
        "GroupViT", "groupvit",
        Refused("rearranged stream", "changed between its adds by something that is no scale", "torch.cat([x"),
        vision_config=PATCHES
    ),
    two_towers(
        "FLAVA", "flava",
        Accepted({"image_model.encoder": 8, "text_model.encoder": 8, "multimodal_model.encoder": 8}),
        image_config=PATCHES
    ),
    two_towers("ViLT", "vilt", Accepted({"encoder": 8}), **PATCHES),
    image_in_text(
        "LLaVA", "llava", IMAGE_IN_TEXT, vision_feature_layer=-1, image_token_index=IMAGE,
        text_config=nested("llama"), vision_config=nested("clip_vision_model", **PATCHES)
    ),
    # Without token types its plain model gives other numbers under torch.compile than without.
    image_in_text(
        "PaliGemma", "paligemma", IMAGE_IN_TEXT, image_token_index=IMAGE, projection_dim=64,
        extra=lambda b, ids: {"token_type_ids": (ids != IMAGE).long()},
        text_config=nested("gemma"), vision_config=nested("siglip_vision_model", **PATCHES)
    ),
    image_in_text(
        "InternVL", "internvl", IMAGE_IN_TEXT, image_token_id=IMAGE, text_config=nested("qwen2"),
        vision_config=nested("internvl_vision", image_size=(16, 16), patch_size=(4, 4))
    ),
    image_in_text(
        "Gemma 3", "gemma3", IMAGE_IN_TEXT, image_token_id=IMAGE, mm_tokens_per_image=4,
        extra=lambda b, ids: {"token_type_ids": (ids == IMAGE).long()}, text_config=nested("gemma3_text"),
        vision_config=nested("siglip_vision_model", **PATCHES)
    ),
    image_in_text(
        "Idefics3", "idefics3", PADDING_IMAGES, (1, 3, 16, 16),
        image_token_id=IMAGE, scale_factor=2, text_config=nested("llama"),
        vision_config=nested("idefics3_vision", image_size=16, patch_size=4)
    ),
    image_in_text(
        "SmolVLM", "smolvlm", PADDING_IMAGES, (1, 3, 16, 16),
        image_token_id=IMAGE, scale_factor=2, text_config=nested("llama"),
        vision_config=nested("smolvlm_vision", image_size=16, patch_size=4)
    ),
    image_in_text(
        "Aya Vision", "aya_vision", Accepted({"model.vision_tower.encoder": 8, "model.language_model": 4}),
        image_token_id=IMAGE, downsample_factor=2, text_config=nested("cohere2"),
        vision_config=nested("siglip_vision_model", image_size=16, patch_size=4)
    ),
    image_in_text(
        "Mistral 3", "mistral3", breaks("Tensor.item()", "embed[..., : (size[0] // self.patch_size)"),
        extra=lambda b, ids: {"image_sizes": torch.tensor([[16, 16]] * b)}, image_token_index=IMAGE,
        spatial_merge_size=2, vision_feature_layer=-1, text_config=nested("mistral"),
        vision_config=nested("pixtral", image_size=16, patch_size=4)
    ),
    image_in_text("GIT", "git", post_norm("self.LayerNorm(hidden_states + input_tensor)"), vision_config=PATCHES),
    image_in_text(
        "BLIP-2", "blip-2", post_norm("self.LayerNorm(hidden_states + input_tensor)"), image_token_id=IMAGE,
        num_query_tokens=4, text_config=nested("opt"), vision_config={**PATCHES},
        qformer_config={"encoder_hidden_size": 64}
    ),
    qwen("Qwen2-VL", "qwen2_vl", LISTS_SIZES, **QWEN2),
    qwen("Qwen2.5-VL", "qwen2_5_vl", LISTS_SIZES, **QWEN2_5),
    qwen(
        "Qwen3-VL", "qwen3_vl",
        breaks("Dynamic shape operator", "heights = torch.repeat_interleave(grid_thw[:, 1], counts)"), **QWEN3
    ),
    qwen("Qwen2-VL, its tower plain", "qwen2_vl", LANGUAGE_ALONE, **QWEN2),
    qwen_tower("Qwen2-VL tower", "qwen2_vl", Accepted({"": 8}), **QWEN2),
]
# fmt: on
