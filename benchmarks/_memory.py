"""Memory of a training step, counted and not sampled.

The profiler reports every allocation of PyTorch's CPU allocator, in compiled code too. Counted is what a step
allocates, without the gradients of the parameters, which every form of a model has alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile, record_function

BOUNDARY = "between forward and backward"


def memory_of_step(model: nn.Module, loss_of: Callable[[], Tensor]) -> dict[str, float]:
    """MB that one training step has alive at its peak and between forward and backward.

    Args:
        model: The model, which has run a step before: one that is compiled then is not measured.
        loss_of: Runs the model; its result is differentiated.
    """
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = loss_of()
        with record_function(BOUNDARY):
            pass
        loss.backward()
    gradients = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    events = list(_walk(profiler.profiler.kineto_results.experimental_event_tree()))
    (boundary,) = (event.start_time_ns for event in events if event.name == BOUNDARY)
    changes = sorted((e for e in events if e.tag == _EventType.Allocation), key=lambda e: e.start_time_ns)

    # The last allocation at the address of a gradient is the gradient; earlier ones there are other tensors.
    last = {e.extra_fields.ptr: e for e in changes if e.extra_fields.alloc_size > 0}
    ignored = {id(last[pointer]) for pointer in gradients}
    live: dict[int, int] = {}
    alive = peak = saved = 0
    for event in changes:
        pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0 and id(event) not in ignored:
            live[pointer] = size
            alive += size
        elif size < 0:
            alive -= live.pop(pointer, 0)
        peak = max(peak, alive)
        if event.start_time_ns < boundary:
            saved = alive
    return {"peak_mb": round(peak / 2**20, 3), "saved_mb": round(saved / 2**20, 3)}


def _walk(events: list[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    """All events of a tree."""
    pending = list(events)
    while pending:
        event = pending.pop()
        yield event
        pending.extend(event.children)
