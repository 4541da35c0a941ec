"""Engines around the engines: transformers' plans, its Trainer, mixed precision and checkpointing on two processes."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from launched import TESTS, launch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)
pytestmark = pytest.mark.slow


@functools.cache
def outcomes() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        done = launch(TESTS / "engine_cases.py", folder)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads((Path(folder) / "outcomes.json").read_text())
        return found


def outcome(case: str) -> dict[str, Any]:
    found: dict[str, Any] = outcomes()[case]
    assert "error" not in found, found["error"]
    return found


def site_names(values: dict[str, float]) -> list[str]:
    return [name for name in values if ".attn_res." in name]


@pytest.mark.parametrize("case", ["transformers, before", "transformers, after"])
def test_a_plan_of_transformers(case: str) -> None:
    """Sharded by ``tp_plan="auto"`` as it is loaded, and rewritten then, or rewritten before it was saved."""
    found = outcome(case)
    assert found["sharded"] > 0
    # The norms of Llama compute in float32.
    assert found["logits"] < 1e-6
    assert len(site_names(found["gradients"])) == 8
    assert max(found["gradients"].values()) < 1e-5


def test_trainer_on_two_processes() -> None:
    found = outcome("Trainer")
    assert len(site_names(found["moved"])) == 8
    assert found["moved"].keys() == found["apart"].keys()
    for name, moved in found["moved"].items():
        # The loss is float32.
        assert found["apart"][name] < 1e-5 * moved, name


def test_mixed_precision_of_fsdp() -> None:
    """Two processes err by as much as one does with the same policy, and as a plain model does: by rounding."""
    found = outcome("mixed precision")
    assert len(site_names(found["all"])) == 8
    for name, error in found["all"].items():
        assert error < 1.5 * found["alone"][name] + 1e-3, name
    assert max(found["alone"].values()) < 2 * max(found["plain"].values())


def test_activation_checkpointing_under_fsdp() -> None:
    found = outcome("checkpointed")["gradients"]
    assert len(site_names(found)) == 8
    assert max(found.values()) < 1e-12


def test_a_process_holds_its_share_of_the_sites() -> None:
    """Weights, gradients and two moments: half of what there is, as of the plain model."""
    found = outcome("memory")
    assert found["rewritten"] - found["plain"] == 4 * found["sites"] / 2
