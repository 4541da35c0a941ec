"""Models of libraries other than transformers: diffusers, x-transformers, vit-pytorch and torch itself."""

import ast
import importlib
import importlib.util
import sys
import types
from typing import Any

import diffusers
import torch
import x_transformers as xt
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel
from torch import nn

import attnres_rewrite as ar
from zoo.member import Accepted, Inputs, Member, Refused, Unbuildable, breaks, changed, noise, post_norm, token_ids

Outcome = Accepted | Refused | Unbuildable
WIDTH, LAYERS, VOCAB = 64, 4, 128


def fields(text: str) -> dict[str, Any]:
    """Keyword arguments, written as in a call."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}


def no_stream(reason: str, line: str) -> Refused:
    return Refused(reason, "no residual stream was found", line, ar.NoResidualStreamError)


def over_depth(line: str) -> Refused:
    return Refused("attention over depth", "the model attends over depth already", line)


def hyper_connections(line: str) -> Refused:
    return Refused("hyper-connections", "hyper-connections: several residual streams side by side", line)


def torch_nn(kind: str, norm_first: bool, outcome: Outcome) -> Member:
    """A stack of torch's own layers, of embedded sequences."""
    options = {"batch_first": True, "dropout": 0.0, "norm_first": norm_first}

    def make() -> nn.Module:
        if kind == "Transformer":
            return nn.Transformer(WIDTH, 4, LAYERS, LAYERS, 96, **options)
        layer = getattr(nn, f"{kind}Layer")(WIDTH, 4, 96, **options)
        return getattr(nn, kind)(layer, LAYERS, norm=nn.LayerNorm(WIDTH))

    def inputs(batch: int, length: int) -> Inputs:
        both = noise(batch, length, WIDTH), noise(batch, length - 2, WIDTH)
        return both[:1] if kind == "TransformerEncoder" else both

    return Member(f"torch.nn.{kind} {'pre-norm' if norm_first else 'post-norm'}", "torch.nn", make, inputs, outcome)


TORCH_NN = [
    torch_nn("TransformerEncoder", True, Accepted({"": 8})),
    torch_nn("TransformerDecoder", True, Accepted({"": 12})),
    torch_nn("Transformer", True, Accepted({"encoder": 8, "decoder": 12})),
    # All frames are torch's, so there is no line of the user's to quote.
    torch_nn("TransformerEncoder", False, post_norm("at module 'layers.0.norm1'")),
    torch_nn("TransformerDecoder", False, post_norm("at module 'layers.0.norm1'")),
    torch_nn("Transformer", False, post_norm("at module 'encoder.layers.0.norm1'")),
]


def decoder(name: str, outcome: Outcome, options: str = "", wrapper: str = "") -> Member:
    """A decoder with the options that its name says."""

    def make() -> nn.Module:
        layers = xt.Decoder(dim=WIDTH, depth=LAYERS, heads=4, attn_dim_head=16, **fields(options))
        return xt.TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=layers, **fields(wrapper))

    return Member(
        f"x-transformers {name}", "x-transformers", make, lambda batch, length: (token_ids(batch, length),), outcome
    )


def encoder() -> nn.Module:
    return xt.Encoder(dim=WIDTH, depth=LAYERS, heads=4, attn_dim_head=16)


def encoder_decoder() -> nn.Module:
    sides = {"num_tokens": VOCAB, "depth": LAYERS, "heads": 4, "max_seq_len": 32}
    return xt.XTransformer(dim=WIDTH, **{f"{side}_{k}": v for side in ("enc", "dec") for k, v in sides.items()})


# Every sublayer is a child of one list of layers, so attention and feed-forward count as a layer each.
SUBLAYERS = Accepted({"attn_layers": 8}, layers=8)
TWO = {"encoder.attn_layers": 8, "decoder.net.attn_layers": 12}
# fmt: off
X_TRANSFORMERS = [
    decoder("plain", SUBLAYERS),
    decoder("RMSNorm", SUBLAYERS, "use_rmsnorm=True"),
    decoder("dynamic tanh", SUBLAYERS, "use_dynamic_tanh=True"),
    decoder("rotary", SUBLAYERS, "rotary_pos_emb=True"),
    decoder("sandwich norm", SUBLAYERS, "sandwich_norm=True"),
    decoder("scale_residual", SUBLAYERS, "scale_residual=True"),
    decoder("scale_residual_constant", SUBLAYERS, "scale_residual_constant=1.2"),
    decoder("depth_scale_residual", SUBLAYERS, "depth_scale_residual=True"),
    decoder("orthogonal residual", SUBLAYERS, "orthog_residual=True"),
    decoder("LayerScale", SUBLAYERS, "use_layerscale=True, layerscale_init_value=0.5"),
    decoder("shifted tokens", SUBLAYERS, "shift_tokens=1"),
    decoder("value residual", SUBLAYERS, "add_value_residual=True"),
    decoder("residual attention", SUBLAYERS, "residual_attn=True"),
    decoder("reinjected input", SUBLAYERS, "reinject_input=True"),
    decoder("integrated layers", over_depth("out = einsum('l b n d, v b n l -> v b n d'"), "integrate_layers=True"),
    # The embedding is the sum of itself and of itself detached, which is no residual add.
    decoder("fraction of the embedding's gradient", SUBLAYERS, "", "emb_frac_gradient=0.5"),
    decoder("macaron", Accepted({"attn_layers": 12}, layers=12), "macaron=True"),
    decoder("only attention", Accepted({"attn_layers": 4}), "only_attn=True"),
    # A linear layer takes in each skip, so behind each there is a new stream.
    decoder("U-Net skips", Accepted({"attn_layers": (4, 2, 2)}, {"attn_layers": (4, 2, 2)}), "unet_skips=True"),
    decoder("post-norm", post_norm("normed = self.ln(x)"), "pre_norm=False"),
    decoder("pre- and post-norm", post_norm("normed = self.ln(x)"), "pre_and_post_norm=True"),
    decoder("gate_residual", no_stream("gated stream", "token_embeds + pos_emb"), "gate_residual=True"),
    decoder(
        "mean and value split", changed("broadcast branch", "return residual + centered_x"), "mv_split_residual=True"
    ),
    decoder("hyper-connections", hyper_connections("x_transformers.py"), "num_residual_streams=2"),
    Member(
        "x-transformers encoder", "x-transformers",
        lambda: xt.TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=encoder()),
        lambda b, n: (token_ids(b, n),), SUBLAYERS
    ),
    Member(
        "x-transformers continuous", "x-transformers",
        lambda: xt.ContinuousTransformerWrapper(dim_in=8, dim_out=8, max_seq_len=32, attn_layers=encoder()),
        lambda b, n: (noise(b, n, 8),), SUBLAYERS
    ),
    Member(
        "x-transformers vision", "x-transformers",
        lambda: xt.ViTransformerWrapper(image_size=16, patch_size=4, num_classes=10, attn_layers=encoder()),
        lambda b, n: (noise(b, 3, 16, 16),), SUBLAYERS
    ),
    Member(
        "x-transformers encoder-decoder", "x-transformers", encoder_decoder,
        lambda b, n: (token_ids(b, n), token_ids(b, n - 2)), Accepted(TWO, layers=TWO)
    ),
]
# fmt: on


def vit_pytorch(module: str) -> types.ModuleType:
    """A module of vit-pytorch.

    Its package imports torchvision, for models that are not used here, so a bare package stands in for it.
    """
    if "vit_pytorch" not in sys.modules:
        spec = importlib.util.find_spec("vit_pytorch")
        assert spec is not None
        bare = types.ModuleType("vit_pytorch")
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["vit_pytorch"] = bare
    return importlib.import_module(f"vit_pytorch.{module}")


VIT = fields("image_size=32, patch_size=8, num_classes=10, dim=64, depth=4, heads=4, mlp_dim=96")


def vit(
    name: str, module: str, outcome: Outcome, options: str = "", without: str = "", shape: tuple[int, ...] = (3, 32, 32)
) -> Member:
    """A vision transformer; its name begins with its class, and it is ``without`` some fields that most have."""
    kept = {key: value for key, value in VIT.items() if key not in without.split()} | fields(options)

    def make() -> nn.Module:
        model: nn.Module = getattr(vit_pytorch(module), name.split()[0])(**kept)
        return model

    return Member(f"vit-pytorch {name}", "vit-pytorch", make, lambda batch, length: (noise(batch, *shape),), outcome)


ONE = Accepted({"transformer": 8})
TWO_STAGES = {"patch_transformer": 4, "cls_transformer": 2}
CROSS = (
    "depth=2, sm_dim=32, lg_dim=64, sm_enc_depth=2, sm_enc_heads=4, sm_enc_mlp_dim=64, "
    "lg_enc_depth=2, lg_enc_heads=4, lg_enc_mlp_dim=96, sm_patch_size=8, lg_patch_size=16"
)
VIDEO = "image_patch_size=8, frames=4, frame_patch_size=2"
# fmt: off
VIT_PYTORCH = [
    vit("ViT", "vit", ONE),
    vit("ViT 3d", "vit_3d", ONE, VIDEO, "patch_size", (3, 4, 32, 32)),
    vit("ViT with decorrelation", "vit_with_decorr", ONE),
    vit("ViT with parallel branches", "parallel_vit", ONE, "num_parallel_branches=2"),
    # The merger makes other tokens of the stream's.
    vit(
        "ViT with patch merger", "vit_with_patch_merger", Accepted({"transformer": (4, 4)}, layers=2),
        "patch_merge_layer=2, patch_merge_num_tokens=8"
    ),
    vit(
        "ViT with Keel post-norm", "vit_with_keel_post_ln",
        post_norm("x = post_norm(out + residual * residual_scale)")
    ),
    vit("SimpleViT", "simple_vit", ONE),
    vit("SimpleViT with registers", "simple_vit_with_register_tokens", ONE),
    vit("SimpleViT with query-key norm", "simple_vit_with_qk_norm", ONE),
    vit("SimpleViT with value residual", "simple_vit_with_value_residual", ONE),
    # It adds within the sublayers, which are modules in a list of lists: each counts as a layer.
    vit("SimpleViT with orthogonal residual", "simple_vit_orthog_residual_update", Accepted({"transformer": 8}, 8)),
    vit(
        "SimpleViT with hyper-connections", "simple_vit_with_hyper_connections", hyper_connections("einops"),
        "num_residual_streams=2"
    ),
    vit("SimpleViTAttnResidual", "simple_vit_attn_residual", no_stream("AttnRes already", "x += self.pos_embedding")),
    vit("SimpleUViT", "simple_uvit", Accepted({"transformer": (4, 2, 2)}, {"transformer": (2, 2, 2)})),
    vit("DeepViT", "deepvit", ONE),
    vit("RvT", "rvt", ONE),
    vit("NaViT", "na_vit", ONE),
    vit("CaiT", "cait", Accepted({k: 2 * n for k, n in TWO_STAGES.items()}, TWO_STAGES), "cls_depth=2"),
    vit(
        "XCiT", "xcit",
        Accepted({"xcit_transformer": 12, "cls_transformer": 4}, {"xcit_transformer": 4, "cls_transformer": 2}),
        "cls_depth=2"
    ),
    vit(
        "T2TViT", "t2t",
        Accepted({"to_patch_embedding.3": 2, "transformer": 8}, {"to_patch_embedding.3": 2, "transformer": 4}),
        "t2t_layers=((7, 4), (3, 2))", "patch_size"
    ),
    vit(
        "ViViT", "vivit", Accepted({"spatial_transformer": 8, "temporal_transformer": 8}),
        VIDEO + ", spatial_depth=4, temporal_depth=4", "patch_size depth", (3, 4, 32, 32)
    ),
    vit("PiT", "pit", Accepted({"layers.0": 4, "layers.2": 4}, layers=2), "depth=(2, 2)"),
    vit(
        "LeViT", "levit", Accepted({"backbone.0": 4, "": 5}, layers=2),
        "image_size=64, dim=(32, 48), depth=2, heads=(2, 4), mlp_mult=2, stages=2", "patch_size mlp_dim", (3, 64, 64)
    ),
    vit(
        "MaxViT", "max_vit", changed("permuted stream", "return x.permute(axes)"),
        "dim=16, dim_head=16, depth=(2, 2), window_size=7", "image_size patch_size heads mlp_dim", (3, 56, 56)
    ),
    vit("CrossViT", "cross_vit", post_norm("return self.norm(x)"), CROSS, "patch_size dim heads mlp_dim"),
    vit(
        "CCT", "cct", post_norm("src = self.norm1(src)"),
        "img_size=32, embedding_dim=64, num_layers=4, num_heads=4, mlp_ratio=2.0",
        "patch_size image_size dim depth heads mlp_dim"
    ),
    vit("JumboViT", "jumbo_vit", changed("rearranged stream", "einops/packing.py"), "num_jumbo_cls=1, jumbo_cls_k=4"),
    vit("nViT", "normalized_vit", post_norm("return F.normalize(t, dim = dim, p = 2)")),
    vit(
        "NesT", "nest", Accepted({"layers.0.0": 4, "layers.1.0": 4}, layers=2),
        "patch_size=4, num_hierarchies=2, block_repeats=(2, 2), dim=32", "depth mlp_dim"
    ),
]
# fmt: on


HEADS = fields("num_attention_heads=4, attention_head_dim=16")
FOUR = fields("num_layers=4, in_channels=4") | HEADS
LATENT, PROMPT = {"hidden_states": (4, 8, 8)}, {"encoder_hidden_states": (7, 32)}
POOLED, GRID = {"pooled_projections": (16,)}, {"img_shapes": lambda batch: [(1, 4, 4)] * batch}


def denoiser(
    name: str, kind: str | type[nn.Module], outcome: Outcome, shapes: dict[str, Any], options: str, **common: Any
) -> Member:
    """A model of noisy latents; a tuple is the shape of an input but for the batch, a function makes it for a batch."""

    def of_batch(value: Any, batch: int) -> Any:
        if isinstance(value, tuple):
            return noise(batch, *value)
        return value(batch) if callable(value) else value

    def inputs(batch: int, length: int) -> Inputs:
        given = {key: of_batch(value, batch) for key, value in shapes.items()}
        return {"timestep": torch.full((batch,), 5), "return_dict": False, **given}

    def make() -> nn.Module:
        made: type[nn.Module] = getattr(diffusers, kind) if isinstance(kind, str) else kind
        return made(**{**common, **fields(options)})

    return Member(f"diffusers {name}", "diffusers", make, inputs, outcome)


UNET = (
    "sample_size=16, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=8, attention_head_dim=16, "
    "down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D')"
)
HUNYUAN = (
    "num_attention_heads=4, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=64, "
    "num_layers=8, mlp_ratio=2.0, cross_attention_dim=32, cross_attention_dim_t5=24, pooled_projection_dim=16, "
    "text_len=7, text_len_t5=5, use_style_cond_and_image_meta_size=False"
)
HUNYUAN_INPUTS = (
    LATENT
    | PROMPT
    | {
        "timestep": lambda batch: torch.full((batch,), 5.0),
        "text_embedding_mask": lambda batch: torch.ones(batch, 7, dtype=torch.long),
        "encoder_hidden_states_t5": (5, 24),
        "text_embedding_mask_t5": lambda batch: torch.ones(batch, 5, dtype=torch.long),
        "image_rotary_emb": lambda batch: (noise(16, 16), noise(16, 16)),
    }
)
# fmt: off
DIFFUSERS = [
    denoiser(
        "DiT", "DiTTransformer2DModel", Accepted({"": 8}), LATENT | {"class_labels": torch.tensor([1])},
        "sample_size=8, norm_num_groups=2", **FOUR
    ),
    denoiser(
        "PixArt", "PixArtTransformer2DModel", Accepted({"": 12}), LATENT | PROMPT,
        "sample_size=8, cross_attention_dim=64, caption_channels=32, norm_num_groups=2", **FOUR
    ),
    # The text's stream ends before the last block's feed-forward.
    denoiser(
        "Stable Diffusion 3", "SD3Transformer2DModel", Accepted({"": (8, 6)}, {"": (4, 3)}), LATENT | PROMPT | POOLED,
        "sample_size=8, patch_size=2, joint_attention_dim=32, caption_projection_dim=64, "
        "pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8",
        **FOUR
    ),
    # Behind the blocks of two streams come blocks of both in one sequence, each of which joins and parts them.
    denoiser(
        "Flux", "FluxTransformer2DModel",
        changed("rearranged stream", "torch.cat([encoder_hidden_states, hidden_states], dim=1)"),
        {"hidden_states": (16, 4), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)} | PROMPT | POOLED,
        "patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=32, "
        "pooled_projection_dim=16, axes_dims_rope=(4, 6, 6)",
        **HEADS
    ),
    # Attention is added for the feed-forward's input alone: one branch output a layer.
    denoiser(
        "AuraFlow", "AuraFlowTransformer2DModel",
        changed("rearranged stream", "torch.cat([encoder_hidden_states, hidden_states], dim=1)"), LATENT | PROMPT,
        "sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, "
        "joint_attention_dim=32, caption_projection_dim=64, out_channels=4, pos_embed_max_size=16",
        **HEADS
    ),
    denoiser(
        "Sana", "SanaTransformer2DModel", Accepted({"": 12}), LATENT | PROMPT,
        "out_channels=4, num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, "
        "caption_channels=32, sample_size=8, patch_size=1",
        **FOUR
    ),
    denoiser(
        "Wan", "WanTransformer3DModel", Accepted({"": 12}, tolerance=1e-5), {"hidden_states": (4, 2, 8, 8)} | PROMPT,
        "patch_size=(1, 2, 2), out_channels=4, text_dim=32, freq_dim=32, ffn_dim=96, rope_max_seq_len=32", **FOUR
    ),
    denoiser(
        "LTX", "LTXVideoTransformer3DModel", Accepted({"": 12}),
        {"hidden_states": (16, 4), "encoder_attention_mask": lambda batch: torch.ones(batch, 7)} | PROMPT
        | fields("num_frames=1, height=4, width=4"),
        "out_channels=4, cross_attention_dim=64, caption_channels=32", **FOUR
    ),
    denoiser(
        "Mochi", "MochiTransformer3DModel", breaks("Dynamic shape operator", "transformer_mochi.py"),
        {"hidden_states": (4, 2, 8, 8), "encoder_attention_mask": (7,)} | PROMPT,
        "patch_size=2, pooled_projection_dim=16, text_embed_dim=32, time_embed_dim=16, max_sequence_length=16",
        **FOUR
    ),
    # What the last block makes of the text is not used.
    denoiser(
        "Qwen-Image", "QwenImageTransformer2DModel", Accepted({"": (8, 7)}, idle=1),
        {"hidden_states": (16, 16), "encoder_hidden_states_mask": lambda batch: torch.ones(batch, 7)} | PROMPT | GRID,
        "patch_size=2, in_channels=16, out_channels=4, num_layers=4, joint_attention_dim=32, "
        "axes_dims_rope=(4, 6, 6)",
        **HEADS
    ),
    # What is behind a skip is a stream anew, in the attention of one block a single add.
    denoiser(
        "UNet", "UNet2DModel",
        Refused("cut by projections", "a sublayer would stay plain", "output_tensor = (input_tensor + hidden_states)"),
        {"sample": (3, 16, 16)}, UNET
    ),
    # Residual blocks that keep the width: two of the first level, those of the second and of the middle.
    denoiser(
        "UNet, in part", "UNet2DModel", Accepted({"down_blocks.0": 2, "": 6}, layers=2, leftovers="plain"),
        {"sample": (3, 16, 16)}, UNET
    ),
    denoiser(
        "Hunyuan-DiT", "HunyuanDiT2DModel",
        Refused("cut by projections", "a layer would be cut off", "cat = torch.cat([hidden_states, skip], dim=-1)"),
        HUNYUAN_INPUTS, HUNYUAN
    ),
    denoiser(
        "Hunyuan-DiT, in part", "HunyuanDiT2DModel", Accepted({"": 15}, layers=5, named=True, leftovers="plain"),
        HUNYUAN_INPUTS, HUNYUAN
    ),
    denoiser(
        "U-ViT", UTransformer2DModel, post_norm("hidden_states = self.norm"),
        {"hidden_states": (16, 64)} | fields("timestep=None, hidden_states_is_embedding=True, unpatchify=False"),
        "num_layers=8, in_channels=4, out_channels=4, sample_size=8, patch_size=2, norm_num_groups=2", **HEADS
    ),
]
# fmt: on

MEMBERS = [*TORCH_NN, *X_TRANSFORMERS, *VIT_PYTORCH, *DIFFUSERS]
