"""What the processes of ``test_distributed_checkpoints.py`` run: ``torchrun checkpoint_cases.py GROUP FOLDER``."""

import datetime
import faulthandler
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_cases as base
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import attnres_rewrite as ar

FOLDER = Path(sys.argv[2]) if __name__ == "__main__" else Path()
SECONDS = 240
WHOLE = StateDictOptions(full_state_dict=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def sharded(blocks: int = 2, **config: Any) -> nn.Module:
    """A model that is no trained one: its sites are random, but others."""
    model = ar.rewrite(
        base.plain(), config=ar.AttnResConfig(blocks=blocks, **config), example_inputs=base.IDS, backend="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    fully_shard(model)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(ar.parameter_groups(model, weight_decay=0.1), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The losses of this process, every step on tokens of its own."""
    losses = []
    for step in steps:
        loss = model(base.mine().roll(step, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def full(model: nn.Module) -> dict[str, Tensor]:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def resumed() -> dict[str, Any]:
    """Train, save, train on; then load into a fresh model, and train on there."""
    model = base.rewritten()
    fully_shard(model)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=FOLDER / "two")
    saved = full(model)
    if dist.get_rank() == 0:
        torch.save(saved, FOLDER / "saved.pt")
    expected = train(model, optimizer, range(3, 6))

    model = sharded()
    optimizer = optimizer_of(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load(found := {"model": weights, "optimizer": state}, checkpoint_id=FOLDER / "two")
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    loaded = same(full(model), saved)
    actual = train(model, optimizer, range(3, 6))
    return {"loaded": loaded, "expected": everywhere(expected), "actual": everywhere(actual)}


def refused(load: Callable[[nn.Module], object], **config: Any) -> dict[str, Any]:
    """The error of a load into a model of other settings, and whether the model is as it was."""
    model = sharded(**config)
    before, message = full(model), None
    try:
        load(model)
    except ar.CheckpointError as error:
        message = str(error)
    return {"messages": everywhere(message), "as it was": everywhere(same(full(model), before))}


def read(model: nn.Module) -> None:
    dcp.load({"model": get_model_state_dict(model)}, checkpoint_id=FOLDER / "two")


def hand_over(model: nn.Module, options: StateDictOptions) -> None:
    first = dist.get_rank() == 0 or not options.broadcast_from_rank0
    set_model_state_dict(model, torch.load(FOLDER / "saved.pt") if first else {}, options=options)


def handed_over(options: StateDictOptions) -> dict[str, Any]:
    model = sharded()
    hand_over(model, options)
    return {"loaded": same(full(model), torch.load(FOLDER / "saved.pt"))}


def from_one_process() -> dict[str, Any]:
    """What a process alone has saved is loaded into a sharded model, and computes what it computed there."""
    model = sharded()
    read_from = {"model": get_model_state_dict(model)}
    dcp.load(read_from, checkpoint_id=FOLDER / "one")
    set_model_state_dict(model, read_from["model"])
    base.step(model, base.mine())
    return {"gradients": base.compared(model)}


def two_dimensions() -> dict[str, Any]:
    """Sharded over two processes, and every layer parallel over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = base.rewritten()
    base.tensor_parallel(model, mesh["tensor"])
    fully_shard(model, mesh=mesh["data"])
    base.step(model, base.IDS[2 * mesh.get_local_rank("data") :][:2])
    found = {"gradients": base.compared(model)}
    weights = get_model_state_dict(model)
    dcp.load({"model": weights}, checkpoint_id=FOLDER / "two")
    set_model_state_dict(model, weights)
    return found | {"loaded": same(full(model), torch.load(FOLDER / "saved.pt"))}


GROUPS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "two": {
        "resumed": resumed,
        "other blocks": lambda: refused(read, blocks=1),
        "other epsilon": lambda: refused(read, eps=1e-5),
        "whole, other epsilon": lambda: refused(lambda model: hand_over(model, WHOLE), eps=1e-5),
        "from the first, other epsilon": lambda: refused(lambda model: hand_over(model, FROM_FIRST), eps=1e-5),
        "whole": lambda: handed_over(WHOLE),
        "from the first": lambda: handed_over(FROM_FIRST),
        "from one process": from_one_process,
    },
    "four": {"two dimensions": two_dimensions},
}


def main() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    outcomes = {}
    for name, case in GROUPS[sys.argv[1]].items():
        torch._dynamo.reset()
        try:
            outcomes[name] = case()
        except Exception:
            outcomes[name] = {"error": traceback.format_exc()}
        dist.barrier()
    if dist.get_rank() == 0:
        (FOLDER / f"{sys.argv[1]}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
