"""What the processes of ``test_pipeline.py`` run: ``torchrun pipeline_cases.py GROUP FILE`` writes JSON.

Every case trains one step of a rewritten model as a pipeline. It gives the largest relative difference of its loss and
gradients from those of one process, in float64, and the bytes that were sent; or the error that it is refused with.
"""

import datetime
import faulthandler
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_cases as cases
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    SplitPoint,
    pipeline,
    schedules,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

import attnres_rewrite as ar
from attnres_rewrite.distributed import build_stages

MICRO_BATCHES = 4
TARGET = torch.randn(4, 8, cases.VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


@functools.cache
def program(layers: int, config: ar.AttnResConfig) -> torch.export.ExportedProgram:
    model = cases.plain()
    model.body.layers = nn.ModuleList(cases.Layer() for _ in range(layers)).double()
    return ar.rewrite(torch.export.export(model, (cases.IDS[:1],)), config=config)


@functools.cache
def llama() -> torch.export.ExportedProgram:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=cases.VOCAB, num_hidden_layers=4, use_cache=False, **sizes))
    with torch.no_grad():
        exported = torch.export.export(model.double(), (), {"input_ids": cases.IDS[:1]})
    return ar.rewrite(exported, 4)


class Sent:
    """The bytes of every transition, as the stages say them, and of all that is really sent."""

    def __init__(self, stages: list[Any]) -> None:
        self.forward: dict[str, int] = {}
        self.backward: dict[str, int] = {}
        self.total = 0
        for stage in stages:
            stage.get_fwd_send_ops = self.counted(stage.get_fwd_send_ops, self.forward, stage.stage_index + 1)
            stage.get_bwd_send_ops = self.counted(stage.get_bwd_send_ops, self.backward, stage.stage_index)

    def counted(self, method: Callable[[int], Any], count: dict[str, int], transition: int) -> Callable[[int], Any]:
        def run(chunk: int) -> Any:
            ops = method(chunk)
            count[str(transition)] = count.get(str(transition), 0) + sum(op.tensor.nbytes for op in ops)
            return ops

        return run

    def step(self, run: Callable[[], Any]) -> None:
        send = schedules._batch_p2p

        def counting(ops: list[Any], desc: str | None = None) -> Any:
            self.total += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
            return send(ops, desc)

        schedules._batch_p2p = counting
        try:
            run()
        finally:
            schedules._batch_p2p = send

    def everywhere(self) -> dict[str, Any]:
        found = gathered((self.forward, self.backward, self.total))
        forward: dict[str, int] = {}
        backward: dict[str, int] = {}
        for one, other, _ in found:
            forward |= {k: v for k, v in one.items() if v}
            backward |= {k: v for k, v in other.items() if v}
        return {"forward": forward, "backward": backward, "total": sum(total for *_, total in found)}


def gathered(value: Any) -> list[Any]:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


def trained(
    exported: torch.export.ExportedProgram, layers: str, schedule: Callable[..., Any], stages: int, **options: Any
) -> dict[str, Any]:
    """A step of a pipeline of ``stages`` of the same number of layers, the second time, against one process."""
    model = cases.randomised(torch.export.unflatten(exported))
    keywords = {"input_ids": cases.IDS} if exported.example_inputs[1] else {}
    arguments = () if keywords else (cases.IDS,)
    expected: dict[str, Any] = {"loss": torch.zeros((), dtype=torch.float64)}
    for part in range(MICRO_BATCHES):
        output = model(*(a[part:][:1] for a in arguments), **{k: a[part:][:1] for k, a in keywords.items()})
        loss = loss_of(output if isinstance(output, Tensor) else output.logits, TARGET[part:][:1]) / MICRO_BATCHES
        loss.backward()
        expected["loss"] += loss.detach()
    expected |= {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    number = len(model.get_submodule(layers)._modules)
    split = {f"{layers}.{i}": SplitPoint.BEGINNING for i in range(number // stages, number, number // stages)}
    example = {k: a[:1] for k, a in keywords.items()}
    pipe = pipeline(model, tuple(a[:1] for a in arguments), example, split_spec=split)
    mine = mine_of(pipe, **options)
    sent = Sent(mine)
    run = schedule(mine if issubclass(schedule, PipelineScheduleMulti) else mine[0], MICRO_BATCHES, loss_of)
    losses: list[Tensor] = []
    inputs = (arguments, keywords) if dist.get_rank() == 0 else ((), {})
    run.step(*inputs[0], **inputs[1], target=TARGET, losses=losses)
    for stage in mine:
        stage.submod.zero_grad()
    losses.clear()
    sent.forward.clear(), sent.backward.clear()
    sent.step(lambda: run.step(*inputs[0], **inputs[1], target=TARGET, losses=losses))

    found = {name: p.grad for stage in mine for name, p in stage.submod.named_parameters()}
    if losses:
        found["loss"] = torch.stack(losses).mean()
    # A kept value must not outlive its step.
    left = [len(part) for stage in mine if (kept := getattr(stage, "_kept", None)) for part in vars(kept).values()]
    worst = {n: ((value - expected[n]).norm() / expected[n].norm()).item() for n, value in found.items()}
    merged = {name: value for one in gathered(worst) for name, value in one.items()}
    assert merged.keys() == expected.keys()
    return {"gradients": merged, "left": max(map(max, gathered(left or [0]))), **sent.everywhere()}


def mine_of(pipe: Any, own: bool = False, **options: Any) -> list[Any]:
    """The stages of this process, as PyTorch builds them or as we do; in a group of their own, after what failed."""
    group = dist.new_group()
    if own:
        ranks = range(dist.get_rank(), pipe.num_stages, dist.get_world_size())
        return [pipe.build_stage(stage, torch.device("cpu"), group) for stage in ranks]
    return build_stages(pipe, "cpu", group, **options)


def tower(layers: int, schedule: Callable[..., Any], stages: int, blocks: Any = None, **options: Any) -> dict[str, Any]:
    config = ar.AttnResConfig(blocks=blocks or layers, schedule=options.pop("reads", "auto"))
    return trained(program(layers, config), "body.layers", schedule, stages, **options)


def looped(a_process: int, **options: Any) -> Callable[[], dict[str, Any]]:
    """As many stages as layers and as blocks."""
    number = a_process * dist.get_world_size()
    return lambda: tower(number, ScheduleInterleaved1F1B, number, **options)


def groups() -> dict[str, dict[str, Callable[[], Any]]]:
    return {
        "two": {
            "GPipe, PyTorch's stages": lambda: tower(4, ScheduleGPipe, 2, own=True),
            "1F1B, PyTorch's stages": lambda: tower(4, Schedule1F1B, 2, own=True),
            "four of PyTorch's stages": lambda: tower(4, ScheduleInterleaved1F1B, 4, own=True),
            "GPipe": lambda: tower(4, ScheduleGPipe, 2),
            "1F1B": lambda: tower(4, Schedule1F1B, 2),
            "2 a process": looped(2),
            "2 a process, resent": looped(2, cached=False),
            "3 a process": looped(3),
            "3 a process, resent": looped(3, cached=False),
            "cuts within blocks": looped(2, blocks=3),
            "two phases": looped(2, reads="two_phase"),
            "every sublayer a block": looped(2, blocks="full"),
            "breadth first": lambda: tower(4, ScheduleLoopedBFS, 4),
            "zero bubbles": lambda: tower(4, ScheduleInterleavedZeroBubble, 4),
            "zero bubbles, resent": lambda: tower(4, ScheduleInterleavedZeroBubble, 4, cached=False),
            "Llama": lambda: trained(llama(), "model.layers", ScheduleInterleaved1F1B, 4),
        },
        "four": {
            "1F1B": lambda: tower(4, Schedule1F1B, 4),
            "2 a process": looped(2),
            "2 a process, resent": looped(2, cached=False),
        },
    }


def outcome(case: Callable[[], Any]) -> dict[str, Any]:
    try:
        return case()
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        return {"error": type(first).__name__, "message": str(first), "raised": repr(error)[:2000]}


def main() -> None:
    group, file, seconds = sys.argv[1:]
    faulthandler.dump_traceback_later(int(seconds), exit=True)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    only = file.split(":")[1:]
    found = {name: outcome(case) for name, case in groups()[group].items() if not only or name in only}
    if dist.get_rank() == 0:
        Path(file.split(":")[0]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
