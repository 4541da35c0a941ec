"""Train as a pipeline of two stages a process: torchrun --nproc-per-node 2 examples/pipeline.py"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.pipelining import ScheduleInterleaved1F1B, SplitPoint, pipeline
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_rewrite import parameter_groups, rewrite
from attnres_rewrite.distributed import build_stages


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


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

    micro_batch = {"input_ids": torch.arange(128).reshape(4, 32)}
    # Llama computes its rotary embeddings without gradients, which would be a graph that cannot be split.
    with torch.no_grad():
        program = torch.export.export(plain, (), micro_batch)
    model = torch.export.unflatten(rewrite(program, blocks=4))
    cuts = {f"model.layers.{i}": SplitPoint.BEGINNING for i in (1, 2, 3)}
    stages = build_stages(pipeline(model, (), micro_batch, split_spec=cuts), device)
    schedule = ScheduleInterleaved1F1B(stages, n_microbatches=4, loss_fn=loss_of)

    groups = [group for stage in stages for group in parameter_groups(stage.submod, weight_decay=0.1)]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    for step in range(options.steps):
        # The first stage reads the tokens, the last one the targets. Each token follows from the one before.
        ids = (torch.randint(256, (16, 1)) + 3 * torch.arange(32)).remainder(256).to(device)
        losses: list[torch.Tensor] = []
        schedule.step(input_ids=ids, target=ids, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        if losses:
            print(f"step {step:3d}  loss {torch.stack(losses).mean().item():.3f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
