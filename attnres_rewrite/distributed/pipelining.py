"""Stages of a pipeline that send a block sum to a process once (paper, section 4: cross-stage caching).

They are stages of ``torch.distributed.pipelining``, for its schedules. What is added is what a process keeps: of every
micro-batch the values that its later stages need, and the gradients that these stages have for them.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import Pipe, PipelineStage

from attnres_rewrite.distributed.routes import Routes, routes_of
from attnres_rewrite.errors import ExampleInputsError, UnsupportedResidualError

_logger = logging.getLogger(__name__)


def build_stages(
    pipe: Pipe, device: torch.device | str, group: dist.ProcessGroup | None = None, *, cached: bool = True
) -> list[PipelineStage]:
    """The stages that this process runs, of a pipeline of a rewritten program.

    With ``P`` processes, process ``r`` runs the stages ``r``, ``r + P``, ``r + 2P`` and so on. Between stages cross the
    sums of the finished blocks, the running sum of the block in progress, and whatever else a later stage needs. A
    process keeps what it has seen of a micro-batch, so that every block sum is sent to it once, and one gradient of it,
    accumulated over its stages, comes back (arXiv:2603.15031, section 4). Where every process runs one stage, there is
    nothing to keep.

    The stages are for ``ScheduleGPipe`` and ``Schedule1F1B``, which take one, and for ``ScheduleInterleaved1F1B`` and
    others that take all stages of a process. ``pipe.build_stage`` of PyTorch has no backward for what more than one
    later stage reads, as block sums are.

    Args:
        pipe: What ``torch.distributed.pipelining.pipeline`` makes of ``torch.export.unflatten(program)`` and one
            micro-batch.
        device: Where the stages of this process run; their weights are moved there.
        group: The processes of the pipeline; ``None`` for all.
        cached: Whether a process keeps what it has seen. Without it, each stage gets from the one before all that it,
            or a stage after it, needs.

    Returns:
        The stages of this process, in order.

    Raises:
        UnsupportedResidualError: Something else than a tensor would cross between stages, or something that has no
            gradient and this version of PyTorch cannot send it; or a read is computed in two stages.
    """
    processes = dist.get_world_size(group)
    routes = routes_of(pipe, processes if cached and processes > 1 else None)
    _require_sendable(routes)
    _require_own_sites(pipe)
    kept = _Kept()
    return [
        CachingStage(routes, stage, torch.device(device), group, kept)
        for stage in range(dist.get_rank(group), pipe.num_stages, processes)
    ]


def _require_own_sites(pipe: Pipe) -> None:
    """``pipeline`` makes two parameters of one that two stages use, each with a part of its gradient."""
    shared = sorted({name for users in pipe.replicated_params for name in users.values()})
    if sites := [name for name in shared if "attn_res" in name.split(".")]:
        raise UnsupportedResidualError(
            f"{sites[0]!r} is used in two stages, as are {len(sites) - 1} others: with schedule='two_phase' the reads "
            "of a block begin together. Rewrite the program with AttnResConfig(schedule='per_read')"
        )
    if shared:
        _logger.warning("each of these is two parameters now, in two stages, with a gradient each: %s", shared)


def _require_sendable(routes: Routes) -> None:
    """Before PyTorch 2.13 every value that crosses needs a gradient."""
    if "input_grads" in inspect.signature(PipelineStage).parameters:
        return
    if without := [name for name in routes.values if not routes.examples[name].requires_grad]:
        raise UnsupportedResidualError(
            f"{without} cross between stages and have no gradient, which the pipelines of PyTorch {torch.__version__} "
            "cannot send: PyTorch 2.13 can"
        )


class _Kept:
    """What a process keeps of its micro-batches for its later stages, by micro-batch and name."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], Tensor] = {}
        self.gradients: dict[tuple[int, str], Tensor] = {}

    def add_gradient(self, key: tuple[int, str], gradient: Tensor) -> None:
        """Out of place: the tensor may be another's."""
        known = self.gradients.get(key)
        self.gradients[key] = gradient if known is None else known + gradient

    def clear(self) -> None:
        self.values.clear()
        self.gradients.clear()


class CachingStage(PipelineStage):
    """A stage whose process keeps what it has seen.

    ``submod`` is the stage as ``pipeline`` made it, with the names of the model's parameters.

    A kept value enters a later stage as a leaf of its own. The schedules run the backward of the later stage first, so
    the gradient of the leaf is there when the stage that the value came with runs its backward. What that stage
    received gets it on top of the gradient that it sends; what it computed, on top of the one that it was sent.
    """

    def __init__(
        self, routes: Routes, stage: int, device: torch.device, group: dist.ProcessGroup | None, kept: _Kept
    ) -> None:
        self._call = routes.calls[stage]
        self._incoming, self._outgoing = routes.incoming(stage), routes.outgoing(stage)
        self._taken = {name: routes.examples[name].requires_grad for name in routes.taken(stage)}
        self._newly_kept = routes.kept(stage)
        self._done_with = [name for name in self._taken if routes.is_last_to_take(stage, name)]
        self._kept = kept
        self._chunk = 0
        self._leaves: dict[int, dict[str, Tensor]] = {}
        super().__init__(
            self._call.module.to(device),
            stage,
            len(routes.calls),
            device,
            input_args=tuple(routes.examples[name] for name in self._incoming),
            output_args=tuple(routes.examples[name] for name in self._outgoing),
            group=group,
        )

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """See ``PipelineStage``; keyword arguments are for the first stage, which sends what others need of them."""
        self._chunk = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage on what it received and what its process keeps, and give what the next one has not seen."""
        values: dict[str, Tensor] = dict(zip(self._incoming, args, strict=not self.is_first))
        if self.is_first and (values := values | kwargs).keys() != set(self._incoming):
            raise ExampleInputsError(f"the first stage is called with {[*values]}, and takes {[*self._incoming]}")
        values |= self._leaves_of(self._chunk)
        values |= self._call(values, super().forward_maybe_with_nosync)
        for name in self._newly_kept:
            self._kept.values[self._chunk, name] = values[name].detach()
        # What is sent has to be contiguous.
        outputs = tuple(values[name].contiguous() for name in self._outgoing)
        return outputs[0] if self.is_last and len(outputs) == 1 else outputs

    def _leaves_of(self, chunk: int) -> dict[str, Tensor]:
        """What the stage takes of the values that its process keeps."""
        leaves = {
            name: self._kept.values[chunk, name].detach().requires_grad_(has_gradient and self.has_backward)
            for name, has_gradient in self._taken.items()
        }
        for name in self._done_with:
            del self._kept.values[chunk, name]
        if self.has_backward:
            self._leaves[chunk] = leaves
        return leaves

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """See ``PipelineStage``; what the gradients of kept values are added to is in the class's docstring."""
        leaves = self._leaves.pop(bwd_chunk_id, {})
        if not full_backward and self.has_backward:
            # A backward for the inputs alone computes the gradients of those that are named.
            outputs, inputs = self.fwd_cache[bwd_chunk_id]
            self.fwd_cache[bwd_chunk_id] = (
                outputs,
                [*inputs, *(leaf for leaf in leaves.values() if leaf.requires_grad)],
            )
        later = {
            name: self._kept.gradients.pop((bwd_chunk_id, name))
            for name in self._newly_kept
            if (bwd_chunk_id, name) in self._kept.gradients
        }
        if self.has_backward and not self.is_last:
            for name, info in zip(self._outgoing, self.grad_recv_info[bwd_chunk_id], strict=True):
                if name in later and name not in self._incoming:
                    info.buffer.add_(later[name])
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if not self.has_backward:
            return
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                self._kept.add_gradient((bwd_chunk_id, name), leaf.grad)
        if not self.is_first:
            self.bwd_cache[bwd_chunk_id] = tuple(
                _sum(gradient, later.get(name))
                for name, gradient in zip(self._incoming, self.bwd_cache[bwd_chunk_id], strict=False)
            )

    def clear_runtime_states(self) -> None:
        """See ``PipelineStage``."""
        super().clear_runtime_states()
        self._kept.clear()
        self._leaves.clear()


def _sum(gradient: Tensor | None, later: Tensor | None) -> Tensor | None:
    """Two gradients of one value, of which either may be missing, as one that can be sent."""
    present = [one for one in (gradient, later) if one is not None]
    return sum(present[1:], present[0]).contiguous() if present else None
