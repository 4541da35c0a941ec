"""Vision transformers of Hugging Face. Stages that change width are separate streams."""

from typing import Any

from torch import nn
from transformers import AutoModel, ResNetConfig

from zoo.member import Accepted, Member, Refused, Unbuildable, changed, noise, post_norm
from zoo.tiny import tiny_config

Outcome = Accepted | Refused | Unbuildable
PATCHES = {"image_size": 16, "patch_size": 4}
WIDTHS = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}


def image(name: str, kind: str, outcome: Outcome, size: int = 16, moe: bool = False, **overrides: Any) -> Member:
    """A model of images of one size."""

    def make() -> nn.Module:
        return AutoModel.from_config(tiny_config(kind, **overrides))

    return Member(name, "vision", make, lambda batch, length: {"pixel_values": noise(batch, 3, size, size)}, outcome)


def video(name: str, kind: str, outcome: Outcome, key: str = "pixel_values", **overrides: Any) -> Member:
    """A model of eight small images in a row."""

    def make() -> nn.Module:
        return AutoModel.from_config(tiny_config(kind, **overrides))

    extra = {"skip_predictor": True} if kind == "vjepa2" else {}
    return Member(name, "vision", make, lambda batch, length: {key: noise(batch, 8, 3, 16, 16), **extra}, outcome)


def stages(owner: str, branches: int = 4) -> Accepted:
    """Two stages of two layers each."""
    return Accepted({f"{owner}.0": branches, f"{owner}.1": branches}, layers=2)


BARE, ENCODER = Accepted({"": 8}), Accepted({"encoder": 8})
# Its first stage is one of convolutions; each of the others has a transformer.
MOBILE = {
    "encoder.layer.1": 2,
    "encoder.layer.2.transformer": 2,
    "encoder.layer.3.transformer": 4,
    "encoder.layer.4.transformer": 3,
}
BACKBONE = ResNetConfig(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16, out_features=["stage2"])
# fmt: off
MEMBERS = [
    image("ViT", "vit", BARE, **PATCHES),
    image("DeiT", "deit", BARE, **PATCHES),
    image("BEiT", "beit", BARE, **PATCHES),
    image("BEiT with LayerScale off", "beit", BARE, layer_scale_init_value=0.0, **PATCHES),
    image("Data2Vec-Vision", "data2vec-vision", ENCODER, **PATCHES),
    image("DINOv2", "dinov2", ENCODER, **PATCHES),
    image("DINOv2 with registers", "dinov2_with_registers", ENCODER, **PATCHES),
    image("DINOv2 SwiGLU", "dinov2", ENCODER, use_swiglu_ffn=True, **PATCHES),
    image("DINOv3", "dinov3_vit", Accepted({"model": 8}), **PATCHES),
    image("SigLIP vision", "siglip_vision_model", ENCODER, **PATCHES),
    image("CLIP vision", "clip_vision_model", ENCODER, **PATCHES),
    image("AIMv2 vision", "aimv2_vision_model", Accepted({"encoder": 8}, tolerance=1e-5), **PATCHES),
    image("MLCD", "mlcd_vision_model", ENCODER, **PATCHES),
    image("I-JEPA", "ijepa", BARE, **PATCHES),
    image("ViTMSN", "vit_msn", BARE, **PATCHES),
    Member(
        "ViTMAE", "vision", lambda: AutoModel.from_config(tiny_config("vit_mae", **PATCHES)),
        lambda b, n: {"pixel_values": noise(b, 3, 16, 16), "noise": noise(b, 16)}, BARE
    ),
    image(
        "ViTDet", "vitdet", changed("permuted stream", "hidden_states = hidden_states.permute(0, 2, 3, 1)"),
        pretrain_image_size=16, **PATCHES
    ),
    image("Pixio", "pixio", Accepted({"": 8}, tolerance=1e-8), **PATCHES),
    image("Swin", "swin", stages("encoder.layers"), size=32, image_size=32, patch_size=4, window_size=2, **WIDTHS),
    image(
        "Swinv2", "swinv2", stages("encoder.layers"), size=32, image_size=32, patch_size=4, window_size=2, **WIDTHS
    ),
    image(
        "Swin2SR", "swin2sr", Accepted({"encoder": 2}, layers=2), image_size=16, embed_dim=16, depths=(2, 2),
        num_heads=(2, 2), window_size=4
    ),
    image(
        "Donut-Swin", "donut-swin", stages("encoder.layers"), size=32, image_size=32, patch_size=4, window_size=2,
        **WIDTHS
    ),
    image(
        "Hiera", "hiera", Accepted({"encoder.stages.0": 4, "encoder.stages.1": 3, "encoder.stages.2": 3}, layers=2),
        size=32, image_size=(32, 32), patch_size=(7, 7), embed_dim=16, depths=(2, 2, 2), num_heads=(1, 2, 4),
        masked_unit_size=(4, 4), query_stride=(2, 2), num_query_pool=2, masked_unit_attention=(True, False, False)
    ),
    image(
        "PVT", "pvt", Accepted({"encoder": (4, 4)}, layers=2), size=32, image_size=32, hidden_sizes=(16, 32),
        depths=(2, 2), num_attention_heads=(1, 2), num_encoder_blocks=2, sequence_reduction_ratios=(2, 1),
        patch_sizes=(4, 2), strides=(4, 2), mlp_ratios=(2, 2)
    ),
    image(
        "PVTv2", "pvt_v2", stages("encoder.layers"), size=32, image_size=32, hidden_sizes=(16, 32), depths=(2, 2),
        num_attention_heads=(1, 2), num_encoder_blocks=2, sr_ratios=(2, 1), patch_sizes=(7, 3), strides=(4, 2),
        mlp_ratios=(2, 2)
    ),
    image(
        "SegFormer", "segformer", stages("stages"), size=32, hidden_sizes=(16, 32), depths=(2, 2),
        num_attention_heads=(1, 2), num_encoder_blocks=2, sr_ratios=(2, 1), patch_sizes=(7, 3), strides=(4, 2),
        mlp_ratios=(2, 2)
    ),
    image(
        "GLPN", "glpn", Accepted({"encoder": (4, 4)}, layers=2), size=32, hidden_sizes=(16, 32), depths=(2, 2),
        num_attention_heads=(1, 2), num_encoder_blocks=2, sr_ratios=(2, 1), patch_sizes=(7, 3), strides=(4, 2),
        mlp_ratios=(2, 2)
    ),
    image(
        "ConvNeXt", "convnext", stages("encoder.stages", 2), size=32, hidden_sizes=(16, 32), depths=(2, 2),
        num_stages=2
    ),
    image(
        "ConvNeXtV2", "convnextv2", stages("encoder.stages", 2), size=32, hidden_sizes=(16, 32), depths=(2, 2),
        num_stages=2
    ),
    image(
        "DINOv3 ConvNeXt", "dinov3_convnext", stages("model.stages", 2), size=32, hidden_sizes=[16, 32],
        depths=[2, 2]
    ),
    image(
        "PoolFormer", "poolformer", Accepted({"encoder": (4, 4)}, layers=2), size=32, hidden_sizes=(16, 32),
        depths=(2, 2), num_encoder_blocks=2, patch_sizes=(7, 3), strides=(4, 2), padding=(2, 1), mlp_ratio=2.0
    ),
    image(
        "FocalNet", "focalnet", stages("encoder.stages"), size=32, image_size=32, patch_size=4, embed_dim=16,
        hidden_sizes=(16, 32), depths=(2, 2), focal_levels=(2, 2), focal_windows=(3, 3)
    ),
    image(
        "CvT", "cvt", stages("encoder.stages"), size=32, embed_dim=(16, 32), num_heads=(1, 2), depth=(2, 2),
        num_stages=2, patch_sizes=(7, 3), patch_stride=(4, 2), patch_padding=(2, 1), mlp_ratio=(2.0, 2.0),
        attention_drop_rate=(0.0, 0.0), drop_rate=(0.0, 0.0), drop_path_rate=(0.0, 0.0), qkv_bias=(True, True),
        cls_token=(False, True), qkv_projection_method=("dw_bn", "dw_bn"), kernel_qkv=(3, 3), padding_kv=(1, 1),
        stride_kv=(2, 2), padding_q=(1, 1), stride_q=(1, 1)
    ),
    image(
        "LeViT", "levit",
        Accepted({"encoder.stages.0": 4, "encoder": (5, 5)}, layers={"encoder.stages.0": 4, "encoder": (2, 2)}),
        size=64, image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 2], depths=[2, 2, 2],
        key_dim=[8, 8, 8]
    ),
    image(
        "MobileViT", "mobilevit",
        Accepted({k: n if k.endswith(".1") else 2 * n for k, n in MOBILE.items()}, layers=MOBILE),
        size=64, image_size=64, patch_size=2, hidden_sizes=(16, 24, 32),
        neck_hidden_sizes=(16, 16, 24, 32, 48, 48, 64)
    ),
    image(
        "SAM vision", "sam_vision_model", Accepted({"vision_encoder": 8}), size=32, image_size=32, patch_size=4,
        global_attn_indexes=(1, 3), window_size=2, output_channels=16
    ),
    image(
        "SAM-HQ vision", "sam_hq_vision_model", Accepted({"vision_encoder": 8}), size=32, image_size=32, patch_size=4,
        global_attn_indexes=(1, 3), window_size=2, output_channels=16
    ),
    image(
        "SAM 3 ViT", "sam3_vit_model", BARE, size=32, image_size=32, patch_size=4, pretrain_image_size=32,
        global_attn_indexes=[1, 3], window_size=2
    ),
    image("YOLOS", "yolos", ENCODER, size=32, image_size=(32, 32), patch_size=4, num_detection_tokens=5),
    image(
        "DPT", "dpt", ENCODER, size=32, image_size=32, patch_size=4, is_hybrid=False,
        backbone_out_indices=(0, 1, 2, 3), neck_hidden_sizes=(16, 16, 16, 16)
    ),
    image(
        "DETR", "detr", post_norm("self.self_attn_layer_norm(hidden_states)"), size=32, use_timm_backbone=False,
        backbone=None, backbone_config=BACKBONE
    ),
    image(
        "Conditional DETR", "conditional_detr", post_norm("self.self_attn_layer_norm(hidden_states)"), size=32,
        use_timm_backbone=False, backbone=None, backbone_config=BACKBONE
    ),
    image(
        "Table Transformer", "table-transformer",
        Accepted({"encoder": 8, "decoder": 12}, untrainable="Data-dependent branching"), size=32,
        use_timm_backbone=False, backbone=None, backbone_config=BACKBONE
    ),
    image(
        "BiT", "bit", stages("encoder.stages", 2), size=32, hidden_sizes=[128, 256], depths=[3, 3], embedding_size=32
    ),
    image(
        "ResNet", "resnet", changed("post-activation", "hidden_state = self.activation(hidden_state)"), size=32,
        hidden_sizes=(16, 32), depths=(2, 2), embedding_size=16
    ),
    image(
        "RegNet", "regnet", changed("post-activation", "hidden_state = self.activation(hidden_state)"), size=32,
        hidden_sizes=(16, 32), depths=(3, 3), embedding_size=16, groups_width=8
    ),
    image(
        "SwiftFormer", "swiftformer", Accepted({"encoder.network.0": 4, "encoder.network.2": 4}, layers=2), size=64,
        image_size=64, embed_dims=(16, 32), depths=(2, 2), downsamples=(True, True)
    ),
    image("DINAT", "dinat", Unbuildable("needs natten", "requires the natten library"), size=32, **WIDTHS),
    image("RADIO", "radio", ENCODER),
    image("Sapiens 2", "sapiens2", Accepted({"model": 8}), **PATCHES),
    image("TIPSv2 vision", "tipsv2_vision_model", ENCODER, **PATCHES),
    image("Pixtral vision", "pixtral", Accepted({"transformer": 8}), **PATCHES),
    image("InternVL vision", "internvl_vision", ENCODER, image_size=(16, 16), patch_size=(4, 4)),
    image("MGP-STR", "mgp-str", Accepted({"mgp_str.encoder": 8}), size=16, image_size=(16, 16), patch_size=4),
    video(
        "VideoMAE", "videomae", ENCODER, num_frames=8, tubelet_size=2, decoder_hidden_size=64,
        decoder_intermediate_size=96, **PATCHES
    ),
    video("ViViT", "vivit", BARE, num_frames=8, tubelet_size=(2, 4, 4), image_size=16),
    video(
        "TimeSformer", "timesformer", changed("rearranged stream", "torch.cat((init_cls_token, hidden_states), 1)"),
        num_frames=8, **PATCHES
    ),
    video(
        "V-JEPA 2", "vjepa2", Accepted({"encoder": 8}), key="pixel_values_videos", crop_size=16, patch_size=4,
        frames_per_clip=8, pred_hidden_size=64, pred_num_hidden_layers=2, pred_num_attention_heads=4
    ),
]
# fmt: on
