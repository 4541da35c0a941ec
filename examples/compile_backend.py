"""The torch.compile backend: by its name, and as an object around the compiler of your choice."""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from attnres_rewrite import AttnResBackend, disabled, rewrite


def counting_backend(module, inputs):
    """Any callable can be the inner backend; it gets the rewritten graph."""
    sites = [n for n in module.graph.nodes if n.target is torch.ops.attnres.block_attn_res.default]
    print(f"inner backend: {len(module.graph.nodes)} nodes, {len(sites)} of them AttnRes sites")
    return module.forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inner", default="inductor", help="what compiles the rewritten graph")
    options = parser.parse_args()

    torch.manual_seed(0)
    size = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**size, use_cache=False, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(256, (2, 32))

    # One call gives the model its parameters; from here on it also runs without torch.compile of yours.
    rewrite(model, blocks=2)
    # As after some training: with the zero queries of the start AttnRes and plain residuals are the same.
    for site in model.transformer.attn_res:
        torch.nn.init.normal_(site.query, std=0.5)

    with torch.no_grad():
        by_name = torch.compile(model, backend="attnres")(tokens).logits
        backend = AttnResBackend(inner=options.inner)
        by_object = torch.compile(model, backend=backend)(tokens).logits
        counted = torch.compile(model, backend=AttnResBackend(inner=counting_backend))(tokens).logits
        with disabled(model):
            plain = model(tokens).logits

    print(f"by name and by object: largest difference {(by_name - by_object).abs().max():.1e}")
    print(f"by name and uncompiled: largest difference {(by_name - counted).abs().max():.1e}")
    print(f"AttnRes and plain residuals: largest difference {(by_name - plain).abs().max():.1e}")


if __name__ == "__main__":
    main()
