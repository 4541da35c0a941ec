"""What a read becomes on an H100, as `benchmarks/_gpu_code.py` finds it without one.

Counted in the Triton code: a load of a source is one in a persistent reduction, two in a looped one.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton, which compiles for a GPU that is not there (pip install triton)")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS = (1, 8192)
READ, READ_BACKWARD, MERGE, MERGE_BACKWARD = range(4)


@pytest.fixture
def gpu_code(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return pytest.importorskip("_gpu_code")


def generated(gpu_code: Any, which: int, sources: int, width: int) -> tuple[Any, str, list[Any]]:
    import torch

    case = gpu_code.cases(sources, width, ROWS, torch.bfloat16)[which]
    code = gpu_code.generated_code(case.function, case.make)
    return case, code, gpu_code.kernels(code)


@pytest.mark.parametrize("width", [1024, 2048])
@pytest.mark.parametrize(("which", "vectors"), [(READ, 3), (MERGE, 4)])
def test_a_forward_is_one_kernel_that_loads_every_source_once(gpu_code, which, vectors, width):
    case, code, found = generated(gpu_code, which, 9, width)
    assert gpu_code.launches(code) == 1
    assert found[0].kind == "persistent_reduction"
    # The vectors are queries, gains and the norm's weight; merging loads one log-sum too.
    assert found[0].loads == case.reads + vectors
    assert found[0].stores == case.writes


@pytest.mark.parametrize("width", [1024, 2048])
def test_a_backward_loads_every_source_once(gpu_code, width):
    case, code, (first, *sums) = generated(gpu_code, READ_BACKWARD, 9, width)
    assert first.kind == "persistent_reduction"
    assert (first.loads, first.stores) == (case.reads + 2, case.writes)
    # The gradient of the query is a sum over rows, in two steps.
    assert gpu_code.launches(code) == 3
    assert [kernel.loads for kernel in sums] == [1, 3]


@pytest.mark.parametrize("width", [1024, 7168])
def test_phase_one_waits_for_no_other_warp_and_spills_nothing(gpu_code, width):
    import torch

    found = gpu_code.phase_one(8, 4, width, torch.bfloat16)
    assert {kernel["spilled_bytes"] for kernel in found.values()} == {0}
    # What differentiates shares out the queries, once.
    assert [found[name]["barriers"] for name in ("score", "score, backward", "mix")] == [0, 0, 0]


@pytest.mark.parametrize("which", [READ, READ_BACKWARD])
def test_nothing_is_spilled_at_any_width(gpu_code, which):
    for width in (1024, 2048, 7168):
        _, _, (first, *_) = generated(gpu_code, which, 9, width)
        assert first.resources()["spilled_bytes"] == 0, width


def test_other_reductions_are_left_to_inductor(gpu_code):
    import torch

    def norm(value: torch.Tensor) -> tuple[torch.Tensor]:
        return (value * torch.rsqrt(value.square().mean(-1, keepdim=True) + 1e-6),)

    code = gpu_code.generated_code(norm, lambda: [torch.empty(*ROWS, 2048)])
    assert [kernel.kind for kernel in gpu_code.kernels(code)] == ["reduction"]
