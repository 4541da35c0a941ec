"""What a site keeps in memory on a GPU, counted in the code that Inductor makes for one, as in `test_gpu_code.py`."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton, which compiles for a GPU that is not there (pip install triton)")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS, SOURCES = 4096, 5
SETTINGS = (1e-6, 1.0, False)


@pytest.fixture
def gpu_code(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return pytest.importorskip("_gpu_code")


def allocated(code: str, width: int) -> list[str]:
    """The dtypes of the tensors as large as the stream that generated code allocates, and ``"mm"`` for products."""
    wide = rf"empty_strided_cuda\(\((?:1, )?{ROWS}, {width}\), .*torch\.(\w+)\)"
    found = (
        re.search(rf"{wide}|extern_kernels\.(mm)\(", line) for line in code[code.index("def call(") :].splitlines()
    )
    return [match[1] or match[2] for match in found if match]


def streams(count: int, width: int) -> list[Any]:
    import torch

    return [torch.empty(1, ROWS, width, dtype=torch.bfloat16) for _ in range(count)]


@pytest.mark.parametrize("width", [1024, 4096])
@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
def test_gradients_of_sources_are_kept_in_their_dtype(
    gpu_code: Any, monkeypatch: pytest.MonkeyPatch, schedule: str, width: int
) -> None:
    import torch

    from attnres_rewrite.ops import attend_blocks_native

    # What Inductor makes of phase one where the package's own kernels do not take the blocks.
    monkeypatch.setattr(attend_blocks_native, "takes", lambda blocks: False)
    ops = torch.ops.attnres

    def backward(query: Any, gain: Any, weight: Any, grad: Any, *sources: Any) -> Any:
        def of_read(grad: Any) -> list[Any]:
            if schedule == "per_read":
                wanted = [True] * SOURCES + [False] * 2
                return list(ops.block_attn_res_backward(grad, list(sources), query, gain, *SETTINGS, wanted))
            wanted = [True] * SOURCES + [False] * 2
            on_log_sum = grad[..., :1].float()
            return list(
                ops.attend_blocks_backward([grad, on_log_sum], list(sources), [query], [gain], *SETTINGS[:2], wanted)
            )

        late = of_read(grad)
        early = of_read((late[-1][0] @ weight)[None])
        return tuple(one + other for one, other in zip(late, early, strict=True))

    def make() -> list[Any]:
        vectors = [torch.empty(width, dtype=torch.bfloat16) for _ in range(2)]
        return [*vectors, torch.empty(width, width, dtype=torch.bfloat16), *streams(1 + SOURCES, width)]

    found = allocated(gpu_code.generated_code(backward, make), width)
    # Those of the late read, of which the product takes one; what the product gives; and the sums, some in place.
    assert found.index("mm") == SOURCES + 1
    assert set(found) == {"bfloat16", "mm"}


def test_a_result_is_not_computed_again_before_its_turn(gpu_code: Any) -> None:
    import torch

    width = 1024

    def results(query: Any, weight: Any, *sources: Any) -> Any:
        first, second = (
            torch.ops.attnres.block_attn_res(list(sources), one, None, *SETTINGS) for one in (query, query * 2)
        )
        return first[0] @ weight, second

    def make() -> list[Any]:
        weight = torch.empty(width, width, dtype=torch.bfloat16)
        return [torch.empty(width, dtype=torch.bfloat16), weight, *streams(SOURCES, width)]

    def in_turn(query: Any, weight: Any, *sources: Any) -> Any:
        first = torch.ops.attnres.block_attn_res(list(sources), query, None, *SETTINGS)
        product = first[0] @ weight
        return product, torch.ops.attnres.block_attn_res(list(sources), query * 2, None, *SETTINGS)

    # One kernel may compute both results where nothing lies between.
    assert allocated(gpu_code.generated_code(results, make), width).index("mm") == 3
    assert allocated(gpu_code.generated_code(in_turn, make), width).index("mm") == 2
