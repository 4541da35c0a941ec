"""What two processes of ``test_distributed.py`` run: ``torchrun distributed_cases.py GROUP FILE`` writes JSON.

Every case is a model made for several processes in one way. It gives the largest relative difference of its gradients
from those of one process with all the data, in float64, or the error that it is refused with.
"""

import datetime
import faulthandler
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import attnres_rewrite as ar

# Wide enough that two layers are several buckets of DistributedDataParallel's least size, a megabyte.
WIDTH, VOCAB = 96, 29
IDS = torch.randint(VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Feed(), Feed()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Model(nn.Module):
    """A pre-norm model whose owner is not its root."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids)).clone()


def plain() -> Model:
    torch.manual_seed(0)
    return Model().double()


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ar.attnres_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise if name.endswith("query") else 1 + 0.3 * noise)
    return model


def rewritten(backend: str = "eager", model: nn.Module | None = None) -> nn.Module:
    return randomised(ar.rewrite(model or plain(), 2, example_inputs=IDS, backend=backend))


def mine() -> Tensor:
    """The half of the batch that is for this process."""
    return IDS[2 * dist.get_rank() :][:2]


def step(model: nn.Module, ids: Tensor) -> None:
    model(ids).square().mean().backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name.replace("_checkpoint_wrapped_module.", "")] = (
            grad.full_tensor() if isinstance(grad, DTensor) else grad
        )
    return found


def compared(model: nn.Module) -> dict[str, Any]:
    """The gradients of ``model`` against those of one process, on every process."""
    reference = rewritten()
    step(reference, IDS)
    expected, actual = gradients(reference), gradients(model)
    assert actual.keys() == expected.keys()
    worst = {n: ((actual[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, worst)
    return {name: max(one[name] for one in everywhere) for name in worst}


# Data parallel


def data_parallel(steps: int = 1, **options: Any) -> dict[str, Any]:
    model = rewritten()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1, **options)
    for _ in range(steps):
        model.zero_grad()
        step(wrapped, mine())
    assert torch._dynamo.config.optimize_ddp
    return compared(model)


def accumulated() -> dict[str, Any]:
    """Two micro-batches, of which the first is not reduced."""
    model = rewritten()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    with wrapped.no_sync():
        step(wrapped, mine()[:1])
    step(wrapped, mine()[1:])
    for parameter in model.parameters():
        parameter.grad /= 2
    return compared(model)


def wrapped_before(backend: str | None = None) -> None:
    model = plain()
    wrapped: Any = DistributedDataParallel(model)
    rewritten(model=wrapped.module)
    if backend is not None:
        wrapped = torch.compile(wrapped, backend=ar.AttnResBackend(backend))
    step(wrapped, mine())


def compiled_around(**config: Any) -> dict[str, Any]:
    model = rewritten()
    wrapped = torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=ar.AttnResBackend("eager"))
    with torch._dynamo.config.patch(**config):
        step(wrapped, mine())
    return compared(model)


# FSDP


def sharded(backend: str = "eager") -> dict[str, Any]:
    model = rewritten(backend)
    fully_shard(model)
    step(model, mine())
    return compared(model)


def sharded_layers(warm: bool = False) -> None:
    model = rewritten()
    if warm:
        step(model, mine())
    for layer in model.body.layers:
        fully_shard(layer)
    fully_shard(model)
    step(model, mine())


def sharded_before(whole: bool) -> None:
    model = plain()
    fully_shard(model)
    rewritten(model=model if whole else model.body)


def fsdp1(original: bool, warm: bool = False) -> None:
    model = rewritten()
    if warm:
        step(model, mine())
        model.zero_grad()
    step(FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu")), mine())


def fsdp1_before() -> None:
    rewritten(model=FullyShardedDataParallel(plain(), device_id=torch.device("cpu")))


def sharded_program() -> dict[str, Any]:
    """As ``examples/fsdp_per_layer.py`` does."""
    program = torch.export.export(plain(), (mine(),))
    model = randomised(torch.export.unflatten(ar.rewrite(program, 2)))
    for name, layer in list(model.body.layers.named_children()):
        setattr(model.body.layers, name, checkpoint_wrapper(layer))
        fully_shard(model.body.layers.get_submodule(name))
    fully_shard(model)
    step(model, mine())
    return compared(model)


# Weights that are gathered in the graph


class Gather(nn.Module):
    def forward(self, parameter: Any) -> Tensor:
        return parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("avg")])


def gathered_in_graph(model: nn.Module) -> nn.Module:
    """Every parameter sharded, and gathered by a property of its module, as torchtitan's SimpleFSDP does."""
    mesh, gather = init_device_mesh("cpu", (2,)), Gather()
    for module in list(model.modules()):
        own = {name: p for name, p in module._parameters.items() if p is not None}
        for name, parameter in own.items():
            module._parameters[name] = nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]))
        if own:
            properties = {n: property(lambda self, n=n: gather(self._parameters[n])) for n in own}
            module.__class__ = type(type(module).__name__, (type(module),), properties)
    return model


def gathered(before: bool) -> dict[str, Any]:
    model = rewritten(model=gathered_in_graph(plain())) if before else gathered_in_graph(rewritten())
    step(model, mine())
    return compared(model)


# Tensor and sequence parallel


def tensor_parallel(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    plan: dict[str, Any] = {"body.embed": RowwiseParallel(input_layouts=Replicate())}
    for name, module in model.named_modules():
        if isinstance(module, Feed):
            plan |= {f"{name}.up": ColwiseParallel(), f"{name}.down": RowwiseParallel()}
    return parallelize_module(model, mesh or init_device_mesh("cpu", (2,)), plan)


def sequence_parallel(model: nn.Module, last: Any = None) -> nn.Module:
    tokens = Shard(1)
    plan: dict[str, Any] = {
        "body.embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
        "body.norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=tokens, output_layouts=Replicate()),
    }
    for name, module in model.named_modules():
        if isinstance(module, Feed):
            plan[f"{name}.norm"] = SequenceParallel()
            plan[f"{name}.up"] = ColwiseParallel(input_layouts=tokens)
            plan[f"{name}.down"] = RowwiseParallel(output_layouts=tokens)
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan | (last or {}))


def parallel(style: Callable[[nn.Module], nn.Module], before: bool, backend: str) -> dict[str, Any]:
    model = rewritten(backend, style(plain())) if before else style(rewritten(backend))
    step(model, IDS)
    return compared(model)


def contradicting() -> None:
    """One layer takes for whole what the others take for sharded."""
    whole = {"input_layouts": Replicate(), "desired_input_layouts": Replicate()}
    odd = {"body.layers.1.first.norm": PrepareModuleInput(**whole, use_local_output=True)}
    rewritten(model=sequence_parallel(plain(), odd))


GROUPS: dict[str, dict[str, Callable[[], dict[str, Any] | None]]] = {
    "data_parallel": {
        "defaults": data_parallel,
        "static graph": lambda: data_parallel(static_graph=True, steps=2),
        "unused parameters": lambda: data_parallel(find_unused_parameters=True),
        "no_sync": accumulated,
        "around splits": lambda: compiled_around(),
        "around whole": lambda: compiled_around(optimize_ddp=False),
        "rewritten inside": wrapped_before,
        "rewritten inside, compiled around": lambda: wrapped_before("eager"),
        "rewritten around": lambda: rewritten(model=DistributedDataParallel(plain())) and None,
    },
    "sharded": {
        "root": sharded,
        "root, aot_eager": lambda: sharded("aot_eager"),
        "program": sharded_program,
        "gathered in the graph": lambda: gathered(before=False),
        "layers": sharded_layers,
        "layers, warm": lambda: sharded_layers(warm=True),
        "rewritten after": lambda: sharded_before(whole=True),
        "part rewritten after": lambda: sharded_before(whole=False),
        "gathered before": lambda: gathered(before=True),
        "FSDP1": lambda: fsdp1(original=False),
        "FSDP1, original parameters": lambda: fsdp1(original=True),
        "FSDP1, warm": lambda: fsdp1(original=True, warm=True),
        "FSDP1 before": fsdp1_before,
    },
    "tensor": {
        "sequence": lambda: parallel(sequence_parallel, False, "eager"),
        "sequence, aot_eager": lambda: parallel(sequence_parallel, False, "aot_eager"),
        "sequence, before": lambda: parallel(sequence_parallel, True, "eager"),
        "tensor": lambda: parallel(tensor_parallel, False, "eager"),
        "tensor, before": lambda: parallel(tensor_parallel, True, "eager"),
        "contradicting": contradicting,
    },
}


def outcome(case: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    torch._dynamo.reset()
    try:
        return {"gradients": case()}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    group, file, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    # Whatever hangs ends, with a traceback.
    faulthandler.dump_traceback_later(seconds, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    outcomes = {}
    for name, case in GROUPS[group].items():
        outcomes[name] = outcome(case)
        dist.barrier()
    if dist.get_rank() == 0:
        file.write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
