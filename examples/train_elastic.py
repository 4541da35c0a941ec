"""Train on after a failure: torchrun --nproc-per-node 2 --max-restarts 3 examples/train_elastic.py"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_rewrite import parameter_groups, rewrite


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "unfinished")
    if dist.get_rank() == 0:  # It is whole now. What a failure cuts short never gets this name.
        (folder / "unfinished").rename(folder / f"step-{step}")


def resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    step = max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)
    if step > 0:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / f"step-{step}")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="what compiles the rewritten model")
    parser.add_argument("--out", type=Path, default=Path("attnres-checkpoints"))
    options = parser.parse_args()
    dist.init_process_group()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    fully_shard(rewrite(model, blocks=2, backend=options.backend))
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=3e-3)
    for step in range(resume(model, optimizer, options.out), options.steps):
        # Every process and step has sequences of its own, the same ones after a failure.
        torch.manual_seed(1000 * step + dist.get_rank())
        ids = (torch.randint(256, (4, 1)) + 3 * torch.arange(32)).remainder(256)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step:3d}  loss {loss.item():.6f}", flush=True)
        if (step + 1) % 4 == 0:
            save(model, optimizer, options.out, step + 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
