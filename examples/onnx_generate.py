"""Generate in ONNX Runtime with a key-value cache: ``python examples/onnx_generate.py [llama|qwen3|gpt2]``."""

import sys
import tempfile
import time

import numpy as np
import onnxruntime
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attnres_rewrite import attnres_parameters, export_onnx, rewrite

# Tiny; with a start so wide that the likeliest token is clear, and no token that ends the text.
SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
START = {"initializer_range": 0.2, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}


def greedy(session: onnxruntime.InferenceSession, tokens: np.ndarray, count: int) -> np.ndarray:
    """``tokens`` ``[B, T]`` and ``count`` more, each the likeliest one after those before it."""
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    new, cache = tokens, {}
    for name, value in inputs.items():
        if name.startswith("past_key_values."):  # [B, heads, 0, head size]: nothing is cached yet
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            cache[name] = np.zeros((len(tokens), int(value.shape[1]), 0, int(value.shape[3])), dtype)
    for _ in range(count):
        positions = np.arange(tokens.shape[1])[None, -new.shape[1] :].repeat(len(tokens), axis=0)
        feed = {"input_ids": new, "position_ids": positions, "attention_mask": np.ones_like(tokens), **cache}
        results = dict(zip(outputs, session.run(outputs, {name: feed[name] for name in inputs}), strict=True))
        new = results["logits"][:, -1:].argmax(axis=-1)
        tokens = np.concatenate([tokens, new], axis=1)
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
    return tokens


def main(kind: str = "llama") -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **HEADS, **START)).eval()
    rewrite(model, blocks=2, backend="eager")
    for _, parameter in attnres_parameters(model):
        torch.nn.init.normal_(parameter, std=0.5)  # as after some training; the pseudo-queries start at zero
    prompt = torch.randint(256, (1, 12))
    with tempfile.TemporaryDirectory() as folder:
        exported = export_onnx(model, f"{folder}/model.onnx", {"input_ids": prompt.repeat(2, 1)}, use_cache=True)
        session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    options, texts = {"max_new_tokens": 64, "do_sample": False}, []
    for by in ("PyTorch, first run", "ONNX Runtime, first run", "PyTorch", "ONNX Runtime"):
        start = time.perf_counter()
        made = model.generate(prompt, **options) if "PyTorch" in by else greedy(session, prompt.numpy(), 64)
        texts.append(made[0, 12:].tolist())
        print(f"{by}: {64 / (time.perf_counter() - start):.0f} tokens a second: {texts[-1]}")
    print("the same tokens" if texts[2] == texts[3] else "DIFFERENT tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
