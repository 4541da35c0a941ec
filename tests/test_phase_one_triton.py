"""Phase one on a GPU: the Triton kernels against the operator in float64."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import relative_error
from torch import Tensor

from attnres_rewrite.ops import attend_blocks, attend_blocks_native

NATIVE = torch.ops.attnres.attend_blocks_native
BACKWARD = torch.ops.attnres.attend_blocks_native_backward
SETTINGS = 1e-6, 0.7
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def given(blocks: int, reads: int, width: int, dtype: torch.dtype, device: str = "cpu") -> list[list[Tensor]]:
    """Blocks, queries, gains, gradients of mixed and of log-sums, and what is added to those of odd blocks."""
    generator = torch.Generator().manual_seed(blocks)

    def random(count: int, *shape: int, of: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device, of) for _ in range(count)]

    # The interpreter takes a second for a few rows.
    rows = 37 if device == "cuda" else 2
    streams, vectors = (3, rows, width), (width,)
    return [
        random(blocks, *streams, of=dtype),
        [q / width**0.5 for q in random(reads, *vectors)],
        random(reads, *vectors),
        random(reads, *streams, of=dtype),
        random(reads, 3, rows, 1),
        random(blocks // 2, *streams, of=dtype),
    ]


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def compare(blocks: int, reads: int, width: int, dtype: torch.dtype, device: str, *, gains: bool = True) -> None:
    """What the operator on ``device`` finds, of the values and of every gradient, against the operator in float64."""
    from attnres_rewrite.ops import attend_blocks_triton

    sources, queries, of_keys, d_mixed, d_log_sums, added = given(blocks, reads, width, dtype, device)
    vectors = (queries, of_keys) if gains else (queries, [])
    assert device == "cpu" or attend_blocks_native.usable(sources, *vectors) is attend_blocks_triton
    flags, wanted = [i % 2 == 1 for i in range(blocks)], [True] * (blocks + sum(map(len, vectors)))
    wanted[0] = blocks == 1
    functions = (attend_blocks_triton.attend, attend_blocks_triton.attend_backward)
    if device == "cpu":
        mixed, log_sums = functions[0](sources, *vectors, *SETTINGS)
        every = iter(added)
        outputs = [torch.empty_like(s) if want else None for s, want in zip(sources, wanted, strict=False)]
        more = [next(every) if flag else None for flag in flags]
        settings = {"want_vectors": True, "eps": SETTINGS[0], "scale": SETTINGS[1]}
        on_vectors = functions[1](sources, *vectors, d_mixed, d_log_sums, more, outputs, **settings)
        found = [*mixed, *log_sums, *(out for out in outputs if out is not None), *on_vectors]
    else:
        found = NATIVE(sources, *vectors, *SETTINGS)
        found += BACKWARD([*d_mixed, *d_log_sums], sources, *vectors, *SETTINGS, wanted, added, flags)
    exact = [wide(part) for part in (sources, *vectors)]
    expected = attend_blocks.forward(*exact, *SETTINGS)
    on_blocks = attend_blocks.backward(wide([*d_mixed, *d_log_sums]), *exact, *SETTINGS, [True] * len(wanted))
    for i, tensor in zip(itertools.compress(range(blocks), flags), added, strict=True):
        on_blocks[i] = on_blocks[i] + tensor.double()
    expected += itertools.compress(on_blocks, wanted)
    for own, right in zip(found, expected, strict=True):
        assert relative_error(own.double(), right) < TOLERANCES[dtype], (blocks, reads, width, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("blocks", "reads", "width", "dtype"),
    [
        (1, 3, 64, torch.float32),
        (9, 3, 1024, torch.bfloat16),
        (8, 4, 4096, torch.bfloat16),
        (5, 3, 7168, torch.bfloat16),
        # More reads than one launch takes.
        (12, 5, 768, torch.float16),
        (4, 3, 5120, torch.float32),
        (20, 2, 130, torch.float32),
    ],
)
def test_on_a_gpu(blocks: int, reads: int, width: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    compare(blocks, reads, width, dtype, "cuda")


@pytest.mark.gpu
def test_without_gains_on_a_gpu() -> None:
    pytest.importorskip("triton")
    compare(3, 2, 96, torch.float32, "cuda", gains=False)


INTERPRETED = """
import contextlib, sys
sys.path.insert(0, "tests")
import torch
from attnres_rewrite.ops import attend_blocks_triton
from test_phase_one_triton import compare
torch.cuda.device = lambda device: contextlib.nullcontext()
for reads in (4, 2):
    attend_blocks_triton._READS = reads
    compare(1, 1, 20, torch.float32, "cpu")
    compare(9, 3, 33, torch.float32, "cpu")
    compare(5, 4, 40, torch.bfloat16, "cpu", gains=False)
# Rows of several tiles and programs of several rows, the last of them not full.
attend_blocks_triton._COLUMNS, attend_blocks_triton._LEAST_ROWS = 128, 4
compare(3, 2, 300, torch.float32, "cpu")
print("equal")
"""


@pytest.mark.slow
def test_without_a_gpu() -> None:
    """Triton's interpreter runs the kernels on NumPy."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip("the interpreter of this Triton needs a NumPy before 2.4")
    assert run.stdout.split() == ["equal"], run.stderr[-2000:]
