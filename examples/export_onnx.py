"""Export a rewritten model to ONNX and run it in ONNX Runtime on another batch size and sequence length."""

import pathlib
import tempfile

import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_rewrite import attnres_parameters, export_onnx, rewrite


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    rewrite(model, blocks=2, backend="eager")
    # As after some training; the pseudo-queries start at zero.
    for name, parameter in attnres_parameters(model):
        if name.endswith("query"):
            torch.nn.init.normal_(parameter, std=0.5)

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.onnx")
        # Batch and sequence are dynamic by default; the result is compared with PyTorch on other sizes.
        exported = export_onnx(model, path, {"input_ids": torch.randint(256, (2, 16))})
        print(f"on other sizes: largest relative difference {exported.max_difference:.1e}")

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        tokens = torch.randint(256, (3, 24))
        (logits, *_) = session.run(None, {"input_ids": tokens.numpy()})
        with torch.no_grad():
            expected = model(input_ids=tokens).logits
        print(f"logits {list(logits.shape)}, {(torch.from_numpy(logits) - expected).abs().max():.1e} from PyTorch")


if __name__ == "__main__":
    main()
