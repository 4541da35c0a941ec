"""What two processes of ``test_engines.py`` run, ``torchrun engine_cases.py FOLDER``: libraries, precision, memory."""

import datetime
import faulthandler
import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_cases as base
import torch
import torch.distributed as dist
import transformers
from models import llama, prepared, token_ids
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import attnres_rewrite as ar

FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
SECONDS = 240
IDS = token_ids(4)


def small() -> nn.Module:
    """A Llama in float64, with a random head and layers."""
    model = prepared(llama(2), torch.float64)
    model.config.use_cache = False
    return model


@functools.cache
def reference() -> tuple[nn.Module, Tensor]:
    """A rewritten Llama with the gradients of one process, and its logits."""
    model = base.randomised(ar.rewrite(small(), 2, backend="eager"))
    return model, step(model, IDS)


def step(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    logits.double().square().mean().backward()
    return logits.detach()


def differences(model: nn.Module, reference: nn.Module, *, whole: bool = False) -> dict[str, float]:
    """Relative differences of all gradients; with ``whole`` of those that are no shards alone."""
    expected = dict(reference.named_parameters())
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        other = expected[name.replace("_checkpoint_wrapped_module.", "")].grad
        assert other is not None
        if whole and grad.shape != other.shape:
            continue
        found[name] = ((grad.double() - other.double()).norm() / other.double().norm()).item()
    return found


def by_transformers(before: bool) -> dict[str, Any]:
    """Sharded by ``from_pretrained(tp_plan="auto")``, of a folder that is plain or rewritten."""
    alone, expected = reference()
    folder = FOLDER / ("rewritten" if before else "plain")
    if dist.get_rank() == 0:
        (alone if before else small()).save_pretrained(folder)
    dist.barrier()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
    if not before:
        ar.rewrite(model, 2, backend="eager")
        base.randomised(model)
    logits = step(model, IDS)
    shapes = {name: p.shape for name, p in alone.named_parameters()}
    sharded = [name for name, p in model.named_parameters() if p.shape != shapes[name]]
    dtensors = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    return {
        "sharded": len(sharded) + len(dtensors),
        "logits": ((logits - expected).norm() / expected.norm()).item(),
        "gradients": differences(model, alone, whole=True),
    }


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A batch of all processes: however it is dealt, a step has all of it."""

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index], "labels": IDS[index]}


def by_trainer() -> dict[str, Any]:
    """Weights after three steps of ``Trainer``, against those of one process with the whole batch."""
    model = base.randomised(ar.rewrite(small(), 2, backend="eager"))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = {"max_steps": 3, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(FOLDER / "trainer"), use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=2, **chosen, **quiet
    )
    assert arguments.world_size == 2
    transformers.Trainer(model=model, args=arguments, train_dataset=Tokens()).train()
    alone, _ = reference()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        alone(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    expected = dict(alone.named_parameters())
    return {
        "moved": {name: (p - start[name]).norm().item() for name, p in expected.items()},
        "apart": {name: (p - expected[name]).norm().item() for name, p in model.named_parameters()},
    }


def in_bfloat16(model: nn.Module, mesh: DeviceMesh, ids: Tensor) -> nn.Module:
    fully_shard(model.float(), mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    base.step(model, ids)
    return model


def mixed_precision() -> dict[str, Any]:
    """Weights of bfloat16 in the forward: two processes and one, and the plain model, all against float64."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("all", "alone"))

    def rewritten() -> nn.Module:
        model = base.rewritten()
        with torch.no_grad():
            for name, parameter in ar.attnres_parameters(model):
                # Logits of size one: large ones make much of the rounding of what is read.
                parameter.mul_(0.1 if name.endswith("query") else 1)
        return model

    exact, plain = rewritten(), base.plain()
    for model in (exact, plain):
        base.step(model, base.IDS)
    return {
        "all": differences(in_bfloat16(rewritten(), mesh["all"], base.mine()), exact),
        "alone": differences(in_bfloat16(rewritten(), mesh["alone"], base.IDS), exact),
        "plain": differences(in_bfloat16(base.plain(), mesh["alone"], base.IDS), plain),
    }


def checkpointed() -> dict[str, Any]:
    """The activations of every layer are computed again, under weights that are sharded."""
    model = base.plain()
    for name, layer in list(model.body.layers.named_children()):
        setattr(model.body.layers, name, checkpoint_wrapper(layer))
    ar.rewrite(model, 2, example_inputs=base.IDS, backend="aot_eager")
    fully_shard(base.randomised(model))
    base.step(model, base.mine())
    return {"gradients": base.compared(model)}


def memory() -> dict[str, Any]:
    """Numbers that a process holds after a step: weights, gradients and the state of the optimizer."""

    def held(model: nn.Module) -> int:
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        base.step(model, base.mine())
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, DTensor)]
        tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *states]
        assert len(tensors) == 4 * len(list(model.parameters()))
        return sum(t.to_local().numel() for t in tensors)

    model = base.rewritten()
    sites = sum(p.numel() for _, p in ar.attnres_parameters(model))
    return {"plain": held(base.plain()), "rewritten": held(model), "sites": sites}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "mixed precision": mixed_precision,
    "checkpointed": checkpointed,
    "memory": memory,
    "transformers, before": lambda: by_transformers(before=False),
    "transformers, after": lambda: by_transformers(before=True),
    # The last one: it trains the reference.
    "Trainer": by_trainer,
}


def main() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    outcomes = {}
    for name, case in CASES.items():
        torch._dynamo.reset()
        try:
            outcomes[name] = case()
        except Exception:
            outcomes[name] = {"error": traceback.format_exc()}
        dist.barrier()
    if dist.get_rank() == 0:
        (FOLDER / "outcomes.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
