"""Train on several processes: torchrun --nproc-per-node 2 examples/train_distributed.py [--shard]"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_rewrite import attnres_parameters, parameter_groups, rewrite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="what compiles the rewritten model")
    parser.add_argument("--shard", action="store_true", help="shard the weights too: FSDP2 in place of DDP")
    options = parser.parse_args()

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dist.init_process_group()
    if device.type != "cpu":
        torch.accelerator.set_device_index(dist.get_node_local_rank())
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, **sizes)).to(device)

    # Rewrite first, then wrap: a wrapper takes the parameters that there are.
    rewrite(model, blocks=2, backend=options.backend)
    wrapped = fully_shard(model) if options.shard else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=3e-3)

    torch.manual_seed(1 + dist.get_rank())
    for step in range(options.steps):
        # Every process has sequences of its own, of which each token follows from the one before.
        ids = (torch.randint(256, (4, 1)) + 3 * torch.arange(32)).remainder(256).to(device)
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    queries = torch.cat([p.full_tensor() if options.shard else p for n, p in attnres_parameters(model) if "query" in n])
    total = queries.detach().square().sum().reshape(1)
    totals = [torch.empty_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(totals, total)
    if dist.get_rank() == 0:
        print(f"queries: norm {total.sqrt().item():.4f}, {(max(totals) - min(totals)).item():.1e} between processes")
    dist.barrier()
    # DDP would end the process group if it outlived it, and wait for its threads with the interpreter's lock in hand.
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
