"""What Inductor and Triton make for an H100, on a machine that has no GPU.

Fake tensors on a CUDA device are traced, Inductor generates Triton code for the properties of the card given here,
Triton compiles it to machine code for that card, and ``cuobjdump``, which Triton brings along, counts its registers.
Nothing runs.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from attnres_rewrite._compat import GPU_FUSION_SIZE, GPU_MEMORY_IN_TRAINING, choices_for_reads

CARD = "NVIDIA H100 80GB HBM3"
_PROPERTIES: dict[str, Any] = {
    "name": CARD,
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 85 * 10**9,
    "warp_size": 32,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 50 << 20,
    "gcnArchName": "",
    "is_integrated": 0,
    "is_multi_gpu_board": 0,
    "uuid": "",
}
H100 = collections.namedtuple("H100", _PROPERTIES)(**_PROPERTIES)

Function = Callable[..., tuple[Tensor, ...]]


class _NoDriver:
    """What Triton asks of the driver to compile for a card that is not there."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"multiprocessor_count": H100.multi_processor_count, "max_shared_mem": 232448}

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return 9, 0


@contextlib.contextmanager
def pretended_h100() -> Iterator[None]:
    """While active, Inductor and Triton believe that there is an H100."""
    from triton.runtime import driver

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_compute_capability": lambda device=None: 90,
        "is_bf16_supported": lambda including_emulation=False: True,
    }
    before = driver.active if torch.cuda.is_available() else None
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            for place in (CudaInterface, CudaInterface.Worker):
                if hasattr(place, name):
                    stack.enter_context(mock.patch.object(place, name, staticmethod(answer)))
        for name, result in {
            "current_device": 0,
            "get_device_properties": H100,
            "get_device_capability": (9, 0),
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=result))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        driver.set_active(_NoDriver())
        try:
            yield
        finally:
            if before is not None:
                driver.set_active(before)


class _Generated(Exception):
    """Raised to stop Inductor when the code is there."""


def generated_code(function: Function, make: Callable[[], Sequence[Tensor]]) -> str:
    """The module that Inductor generates for ``function`` of what ``make`` makes, as the backend asks for it."""
    found: list[str] = []

    def keep(code: str) -> None:
        found.append(code)
        raise _Generated

    with pretended_h100():
        mode = FakeTensorMode()
        # Kept, the metadata of a node tells which operator it was expanded from.
        with mode, torch.device("cuda"), preserve_node_meta():
            inputs = list(make())
            graph = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
        settings: dict[str, Any] = {"force_disable_caches": True, "max_fusion_size": GPU_FUSION_SIZE}
        settings.update(GPU_MEMORY_IN_TRAINING)
        with (
            mock.patch.object(GraphLowering, "save_output_code", keep),
            config.patch(settings),
            tracing(TracingContext(mode)),
            choices_for_reads(),
        ):
            try:
                compile_fx.compile_fx_inner(graph, inputs)
            except Exception:
                if not found:
                    raise
    return found[0]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Triton kernel.

    Attributes:
        name: Inductor's name for it.
        kind: ``"persistent_reduction"``, ``"reduction"`` (looped) or ``"pointwise"``.
        loads: Loads in its source; in a looped reduction those of both passes.
        stores: Stores in its source.
        rows: The size hints, how many rows it runs over and how wide they are.
        source: Its source.
    """

    name: str
    kind: str
    loads: int
    stores: int
    rows: str
    source: str = dataclasses.field(repr=False)

    def resources(self) -> dict[str, int]:
        """Warps of the first configuration that Inductor tries, and registers and bytes spilled by a thread."""
        # Kernels with a launcher of their own do not keep their code.
        with pretended_h100(), config.patch(use_static_cuda_launcher=False):
            tuner = getattr(PyCodeCache.load(self.source), self.name)
            settings = tuner.configs[0]
            compiled = tuner._precompile_config(settings)
        report = _resource_usage(compiled.kernel.asm["cubin"])
        return {"warps": settings.num_warps, **report}


def _resource_usage(binary: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "spilled_bytes": int(found[2])}


def kernels(code: str) -> list[Kernel]:
    """The Triton kernels of a generated module, in the order of their definition."""
    found = []
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.S):
        kind = re.search(r"@triton_heuristics\.(\w+)\(", source)
        hints = re.search(r"size_hints=\{([^}]*)\}", source)
        assert kind is not None
        assert hints is not None
        loads, stores = (len(re.findall(rf"tl\.{what}\(\w+ \+", source)) for what in ("load", "store"))
        found.append(Kernel(name, kind[1], loads, stores, hints[1].replace("'", ""), source))
    return found


def launches(code: str) -> int:
    """How many times the generated module launches a Triton kernel."""
    return len(re.findall(r"^\s+triton_\w+\.run\(", code, re.M))


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to compile, and how many tensors of the size of the stream it must read and write at least."""

    name: str
    function: Function
    make: Callable[[], Sequence[Tensor]]
    reads: int
    writes: int


_SETTINGS = (1e-6, 1.0)


def _norm(value: Tensor, gain: Tensor) -> Tensor:
    wide = value.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(value.dtype) * gain


def cases(n: int, width: int, rows: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
    """A read of ``n`` sources, and phase two."""
    ops = torch.ops.attnres

    def streams(count: int) -> list[Tensor]:
        return [torch.empty(*rows, width, dtype=dtype) for _ in range(count)]

    def vectors(count: int) -> list[Tensor]:
        return [torch.empty(width, dtype=dtype) for _ in range(count)]

    def scalars(count: int) -> list[Tensor]:
        return [torch.empty(*rows[:-1], rows[-1], 1, dtype=torch.float32) for _ in range(count)]

    def read(query: Tensor, gain: Tensor, norm: Tensor, branch: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        partial = sources[-1] + branch
        site = ops.block_attn_res([*sources[:-1], partial], query, gain, *_SETTINGS, False)
        return partial, _norm(site, norm)

    def read_backward(query: Tensor, gain: Tensor, grad: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        wanted = [True] * (n + 2)
        return tuple(ops.block_attn_res_backward(grad, list(sources), query, gain, *_SETTINGS, False, wanted))

    def merge(query: Tensor, gain: Tensor, norm: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        mixed, partial, branch, log_sum = given
        partial = partial + branch
        return partial, _norm(ops.merge_partial(mixed, log_sum, partial, query, gain, *_SETTINGS, 1.0), norm)

    def merge_backward(query: Tensor, gain: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        grad, mixed, partial, log_sum = given
        fixed = (*_SETTINGS, 1.0, [True] * 5)
        return tuple(ops.merge_partial_backward(grad, mixed, log_sum, partial, query, gain, *fixed))

    return [
        Case("read, with the add before and the norm after", read, lambda: vectors(3) + streams(n + 1), n + 1, 2),
        Case("read, backward", read_backward, lambda: vectors(2) + streams(n + 1), n + 1, n + 1),
        Case("phase two, likewise", merge, lambda: vectors(3) + streams(3) + scalars(1), 3, 2),
        Case("phase two, backward", merge_backward, lambda: vectors(2) + streams(3) + scalars(1), 3, 3),
    ]


def phase_one(n: int, reads: int, width: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Registers, bytes spilled and barriers of the package's Triton kernels for ``reads`` reads of ``n`` blocks."""
    from triton.runtime.jit import MockTensor

    from attnres_rewrite.ops import attend_blocks_triton

    kernels, rows, settings = attend_blocks_triton.kernels, 8192, (1e-6, 1.0)
    table = MockTensor(torch.float32)
    blocks = attend_blocks_triton._counted([MockTensor(dtype)] * n)
    each, scalars, tables = blocks[:1] * reads, (table,) * reads, (table,) * 5
    fixed: dict[str, Any] = {"COUNT": len(blocks), "READS": reads, "grid": (1,)}
    row = {"D": 512 // dtype.itemsize, "num_warps": 1}
    tile = attend_blocks_triton._tile(width)
    with pretended_h100():
        found = {
            name: kernels.score.warmup(
                blocks, table, each, scalars, *tables, n, width, *settings, BACKWARD=backward, **row, **fixed
            )
            for name, backward in (("score", False), ("score, backward", True))
        }
        found["mix"] = kernels.mix.warmup(
            blocks, table, table, each, scalars, n, rows, width, R=attend_blocks_triton._ROWS, **tile, **fixed
        )
        flags = 1, 2**n - 1
        found["differentiate"] = kernels.differentiate.warmup(
            blocks, table, each, *tables, blocks, blocks, table, n, reads, *flags, rows, 32, width, settings[1],
            WANT_QUERIES=True, **tile, **fixed,
        )  # fmt: skip
    return {
        name: {**_resource_usage(kernel.asm["cubin"]), "barriers": kernel.asm["ptx"].count("bar.sync")}
        for name, kernel in found.items()
    }
