"""Gather weights layer by layer (FSDP2): torchrun --nproc-per-node 2 examples/fsdp_per_layer.py"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_rewrite import parameter_groups, rewrite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dist.init_process_group()
    if device.type != "cpu":
        torch.accelerator.set_device_index(dist.get_node_local_rank())
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, use_cache=False, **sizes))

    # A live model is one graph, where no hook runs between two layers. An unflattened program has its modules back.
    length = torch.export.Dim("length", min=2, max=512)
    shapes = {"input_ids": {0: torch.export.Dim("batch", min=1, max=64), 1: length}}
    program = torch.export.export(plain, (), {"input_ids": torch.arange(64).reshape(4, 16)}, dynamic_shapes=shapes)
    model = torch.export.unflatten(rewrite(program, blocks=2)).to(device)
    for name, layer in list(model.model.layers.named_children()):
        # What a layer keeps for its backward must not be the gathered weights.
        setattr(model.model.layers, name, checkpoint_wrapper(layer))
        fully_shard(model.model.layers.get_submodule(name))
    fully_shard(model)

    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=3e-3)
    torch.manual_seed(1 + dist.get_rank())
    for step in range(options.steps):
        # Every process has sequences of its own, of which each token follows from the one before.
        ids = (torch.randint(256, (4, 1)) + 3 * torch.arange(32)).remainder(256).to(device)
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
