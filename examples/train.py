"""Rewrite a Hugging Face Llama before training, then train it as usual on the standard library's source text."""

import argparse
import pathlib
import sysconfig

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_rewrite import explain, parameter_groups, rewrite, verify


def read_bytes(count: int) -> torch.Tensor:
    """The first ``count`` bytes of Python source, int64 ``[n]``."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)[:count]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="what compiles the rewritten model")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    print(explain(model, blocks=3))
    rewrite(model, blocks=3, backend=options.backend)
    # Pseudo-queries start at zero, so the model still computes what it computed before.
    print(verify(model))

    # Pseudo-queries and key gains are vectors, like the gains of norms: no weight decay.
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3)

    text = read_bytes(200_000)
    for step in range(options.steps):
        starts = torch.randint(len(text) - 64, (4, 1))
        batch = text[starts + torch.arange(64)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
