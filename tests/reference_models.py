"""Hand-written eager transformers with Block Attention Residuals, to hold the compiler pass against.

They follow the listing of arXiv:2603.15031 (Figure 2) and share nothing with the library: the weights are
read off a Hugging Face model, whose `forward` is never called. Each takes one pseudo-query `[D]` (and one key
gain `[D]`) per site in depth order; without queries it computes plain residuals.

Evaluation only (no dropout), a causal mask and no padding. Norms and rotary angles are rounded to float32
where the Hugging Face code rounds them, so that float64 models can be compared far beyond float32's digits.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Branch = Callable[[Tensor], Tensor]


def partition_layers(num_layers: int, blocks: int | None = None, layers_per_block: int | None = None) -> list[int]:
    """Sizes, in layers, of the contiguous blocks: `blocks` groups, or groups of `layers_per_block`."""
    if (blocks is None) == (layers_per_block is None):
        raise ValueError("give either blocks or layers_per_block")
    if layers_per_block is not None:
        whole, rest = divmod(num_layers, layers_per_block)
        return [layers_per_block] * whole + [rest] * (rest > 0)
    if not 1 <= blocks <= num_layers:
        raise ValueError(f"{num_layers} layers do not make {blocks} blocks")
    small, larger = divmod(num_layers, blocks)
    return [small + 1] * larger + [small] * (blocks - larger)


def block_attn_res(
    sources: Sequence[Tensor],
    query: Tensor,
    gain: Tensor | None = None,
    *,
    aggregation: str = "mean",
    eps: float = 1e-6,
    scale: float = 1.0,
    value_norm: bool = False,
    gate: Tensor | None = None,
) -> Tensor:
    """Attention of one pseudo-query `[D]` over the depth of the sources `[..., D]`."""
    if aggregation not in ("mean", "sum", "add"):
        raise ValueError(f"aggregation={aggregation!r}")
    dtype = sources[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    v = torch.stack(list(sources)).to(wide)
    k = normed = v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps)
    if gain is not None:
        k = k * gain.to(wide)
    logits = scale * torch.einsum("d,n...d->n...", query.to(wide), k)
    h = torch.einsum("n...,n...d->...d", logits.softmax(0), normed if value_norm else v)
    h = {"mean": h, "sum": h * len(sources), "add": v.sum(0) + h}[aggregation]
    return (h if gate is None else (1 - gate) * v.sum(0) + gate * h).to(dtype)


def run_stream(
    root: Tensor,
    layers: Sequence[Sequence[Branch]],
    queries: Sequence[Tensor] | None = None,
    gains: Sequence[Tensor] | None = None,
    *,
    blocks: int | str | None = None,
    layers_per_block: int | None = None,
    aggregation: str = "mean",
    eps: float = 1e-6,
    scale: float = 1.0,
    value_norm: bool = False,
    gates: Sequence[Tensor] | None = None,
    trace: list[list[Tensor]] | None = None,
) -> Tensor:
    """Run the branches of each layer on a residual stream; the result is what the last norm reads.

    As in the listing, `committed` starts empty and a finished partial sum is committed *after* the read that
    opens the next block: that read has the same sources either way, and the embedding is counted once. The
    first read, of the embedding alone, is the identity and has no site. `blocks` is a number or "full";
    `trace` receives the source list of every site.
    """
    if queries is None:
        x = root
        for branches in layers:
            for branch in branches:
                x = x + branch(x)
        return x

    num_sites = sum(len(branches) for branches in layers)
    if len(queries) != num_sites or (gains is not None and len(gains) != num_sites):
        given = "no" if gains is None else len(gains)
        raise ValueError(f"{num_sites} sites, but {len(queries)} queries and {given} gains")
    if blocks == "full":
        openings = {(i, j) for i, branches in enumerate(layers) for j in range(len(branches))}
    else:
        sizes = partition_layers(len(layers), blocks, layers_per_block)
        openings = {(sum(sizes[:n]), 0) for n in range(len(sizes))}

    options = {"aggregation": aggregation, "eps": eps, "scale": scale, "value_norm": value_norm}

    def read(sources: list[Tensor], depth: int) -> Tensor:
        if depth == 0:
            return root
        if trace is not None:
            trace.append(sources)
        gain = None if gains is None else gains[depth - 1]
        gate = None if gates is None else gates[depth - 1]
        return block_attn_res(sources, queries[depth - 1], gain, gate=gate, **options)

    committed: list[Tensor] = []
    partial: Tensor | None = root
    depth = 0
    for i, branches in enumerate(layers):
        for j, branch in enumerate(branches):
            h = read([*committed, partial], depth)
            if (i, j) in openings:
                committed.append(partial)
                partial = None
            output = branch(h)
            partial = output if partial is None else partial + output
            depth += 1
    return read([*committed, partial], depth)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's norm: in float32 whatever the input's dtype is."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    output = x @ layer.weight.T
    return output if layer.bias is None else output + layer.bias


def conv1d(x: Tensor, layer: nn.Module) -> Tensor:
    """GPT-2's linear layer, which keeps its weight as `[in, out]`."""
    return x @ layer.weight + layer.bias


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def rotate(x: Tensor, theta: float, dims: int) -> Tensor:
    """Rotary embedding of the first `dims` of `[B, H, T, head_dim]`, halves paired, angles in float32."""
    frequency = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device=x.device) / dims)
    angle = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """`[B, T, H * head_dim]` to `[B, H, T, head_dim]`."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries `[B, H, T, head_dim]` over keys of as many heads or a divisor, to `[B, T, H * head_dim]`."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v).transpose(1, 2).flatten(2)


def reference_llama(
    hf_model: nn.Module,
    input_ids: Tensor,
    queries: Sequence[Tensor] | None = None,
    gains: Sequence[Tensor] | None = None,
    **attn_res: object,
) -> Tensor:
    """Logits `[B, T, V]` of a `LlamaForCausalLM`'s weights; two sites a layer; options as in `run_stream`."""
    model, config = hf_model.model, hf_model.config
    rope, eps = config.rope_parameters, config.rms_norm_eps
    assert (config.hidden_act, rope["rope_type"]) == ("silu", "default")

    def attention(layer: nn.Module, x: Tensor) -> Tensor:
        weights, head_dim = layer.self_attn, layer.self_attn.head_dim
        x = rms_norm(x, layer.input_layernorm.weight, eps)
        q = rotate(split_heads(linear(x, weights.q_proj), head_dim), rope["rope_theta"], head_dim)
        k = rotate(split_heads(linear(x, weights.k_proj), head_dim), rope["rope_theta"], head_dim)
        v = split_heads(linear(x, weights.v_proj), head_dim)
        return linear(causal_attention(q, k, v), weights.o_proj)

    def mlp(layer: nn.Module, x: Tensor) -> Tensor:
        x = rms_norm(x, layer.post_attention_layernorm.weight, eps)
        gate = linear(x, layer.mlp.gate_proj)
        return linear(gate * torch.sigmoid(gate) * linear(x, layer.mlp.up_proj), layer.mlp.down_proj)

    layers = [(_bind(attention, layer), _bind(mlp, layer)) for layer in model.layers]
    x = run_stream(model.embed_tokens.weight[input_ids], layers, queries, gains, **attn_res)
    return linear(rms_norm(x, model.norm.weight, eps), hf_model.lm_head)


def reference_gpt2(
    hf_model: nn.Module,
    input_ids: Tensor,
    queries: Sequence[Tensor] | None = None,
    gains: Sequence[Tensor] | None = None,
    **attn_res: object,
) -> Tensor:
    """Logits `[B, T, V]` of a `GPT2LMHeadModel`'s weights; two sites a layer; options as in `run_stream`."""
    model, config = hf_model.transformer, hf_model.config
    assert (config.activation_function, config.scale_attn_weights) == ("gelu_new", True)
    assert not config.scale_attn_by_inverse_layer_idx
    head_dim = config.n_embd // config.n_head

    def attention(layer: nn.Module, x: Tensor) -> Tensor:
        q, k, v = conv1d(layer_norm(x, layer.ln_1), layer.attn.c_attn).chunk(3, -1)
        heads = causal_attention(split_heads(q, head_dim), split_heads(k, head_dim), split_heads(v, head_dim))
        return conv1d(heads, layer.attn.c_proj)

    def mlp(layer: nn.Module, x: Tensor) -> Tensor:
        return conv1d(gelu_tanh(conv1d(layer_norm(x, layer.ln_2), layer.mlp.c_fc)), layer.mlp.c_proj)

    layers = [(_bind(attention, layer), _bind(mlp, layer)) for layer in model.h]
    root = model.wte.weight[input_ids] + model.wpe.weight[: input_ids.shape[-1]]
    x = run_stream(root, layers, queries, gains, **attn_res)
    return linear(layer_norm(x, model.ln_f), hf_model.lm_head)


def reference_gpt_neox(
    hf_model: nn.Module,
    input_ids: Tensor,
    queries: Sequence[Tensor] | None = None,
    gains: Sequence[Tensor] | None = None,
    **attn_res: object,
) -> Tensor:
    """Logits `[B, T, V]` of a `GPTNeoXForCausalLM`'s weights; options as in `run_stream`.

    With parallel residuals (the default) attention and MLP read the same value and their sum is the layer's
    one branch output: one site a layer. Without, two.
    """
    model, config = hf_model.gpt_neox, hf_model.config
    rope, head_dim = config.rope_parameters, config.hidden_size // config.num_attention_heads
    assert (config.hidden_act, rope["rope_type"]) == ("gelu", "default")
    rotary_dims = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    assert rotary_dims % 2 == 0, f"no pairs in {rotary_dims} rotary dimensions"

    def attention(layer: nn.Module, x: Tensor) -> Tensor:
        qkv = linear(layer_norm(x, layer.input_layernorm), layer.attention.query_key_value)
        q, k, v = split_heads(qkv, 3 * head_dim).chunk(3, -1)
        q, k = rotate(q, rope["rope_theta"], rotary_dims), rotate(k, rope["rope_theta"], rotary_dims)
        return linear(causal_attention(q, k, v), layer.attention.dense)

    def mlp(layer: nn.Module, x: Tensor) -> Tensor:
        x = layer_norm(x, layer.post_attention_layernorm)
        return linear(gelu_erf(linear(x, layer.mlp.dense_h_to_4h)), layer.mlp.dense_4h_to_h)

    def both(layer: nn.Module, x: Tensor) -> Tensor:
        return attention(layer, x) + mlp(layer, x)

    sublayers = (both,) if config.use_parallel_residual else (attention, mlp)
    layers = [[_bind(sublayer, layer) for sublayer in sublayers] for layer in model.layers]
    x = run_stream(model.embed_in.weight[input_ids], layers, queries, gains, **attn_res)
    return linear(layer_norm(x, model.final_layer_norm), hf_model.lm_head)


def _bind(sublayer: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module) -> Branch:
    return lambda x: sublayer(layer, x)
