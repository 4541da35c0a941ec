"""Distributed checkpoints: saved by some processes, loaded by others, with the settings compared before anything is."""

import functools
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launched import TESTS, launch
from models import Tower, embeddings, prepared, randomise_sites
from torch import Tensor, nn

import attnres_rewrite as ar

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

dcp = pytest.importorskip("torch.distributed.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

X = embeddings()
# One number of digits in each, so that the settings have the same length, which PyTorch would see too.
CONFIG = ar.AttnResConfig(blocks=[1, 3])
OTHERS = {"blocks": ar.AttnResConfig(blocks=[3, 1]), "eps": ar.AttnResConfig(blocks=[1, 3], eps=1e-5)}


class Wrapped(nn.Module):
    """The owner is not the root."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tower = nn.Linear(X.shape[-1], X.shape[-1]), Tower(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(self.embed(x))


def rewritten(config: ar.AttnResConfig = CONFIG, kind: type[nn.Module] = Wrapped, seed: int = 1) -> nn.Module:
    return randomise_sites(ar.rewrite(prepared(kind()), config=config, example_inputs=X, backend="eager"), seed)


def tower() -> nn.Module:
    return Tower(4)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("attnres_rewrite")]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", [Wrapped, tower])
@pytest.mark.parametrize("nested", [True, False])
def test_other_settings_are_refused_before_anything_is_read(tmp_path: Path, name: str, kind: Any, nested: bool) -> None:
    saved = rewritten(OTHERS[name], kind).state_dict()
    dcp.save({"model": saved} if nested else saved, checkpoint_id=tmp_path)
    model = rewritten(kind=kind, seed=2)
    before = copied(model.state_dict())
    assert saved.keys() == before.keys()
    into = {"model": model.state_dict()} if nested else model.state_dict()
    with pytest.raises(ar.CheckpointError, match=f"{name} .* there, .* here"):
        dcp.load(into, checkpoint_id=tmp_path)
    assert equal(model.state_dict(), before)


def test_the_same_settings_load(tmp_path: Path) -> None:
    saved = rewritten()
    dcp.save({"model": saved.state_dict()}, checkpoint_id=tmp_path)
    model = rewritten(seed=2)
    assert not equal(model.state_dict(), saved.state_dict())
    # In place: load_state_dict need not be called.
    dcp.load({"model": model.state_dict()}, checkpoint_id=tmp_path)
    assert equal(model.state_dict(), saved.state_dict())
    assert torch.equal(model(X), saved(X))


@pytest.mark.parametrize("kind", [Wrapped, tower])
def test_a_plain_model_is_told(tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    dcp.save({"model": rewritten(kind=kind).state_dict(), "step": 3}, checkpoint_id=tmp_path)
    plain = prepared(kind())
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        dcp.load({"model": plain.state_dict()}, checkpoint_id=tmp_path)
    (message,) = warnings_of(caplog)
    owner = "model.tower" if kind is Wrapped else "model"
    assert f"trained with Attention Residuals in module {owner!r}" in message
    assert "Rewrite the model with the same blocks" in message


def test_a_plain_model_that_gets_a_whole_state_dict_is_told(caplog: pytest.LogCaptureFixture) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    plain, weights = prepared(Wrapped()), rewritten().state_dict()
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        set_model_state_dict(plain, weights, options=StateDictOptions(strict=False))
    (message,) = warnings_of(caplog)
    assert "trained with Attention Residuals in module 'tower'" in message


def test_parts_that_are_no_layers_are_read_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = rewritten()
    dcp.save({"model": saved.state_dict(), "step": 3}, checkpoint_id=tmp_path)
    embed = {name: torch.zeros_like(t) for name, t in saved.state_dict().items() if name.startswith("embed.")}
    found = {"model": embed, "step": 0}
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        dcp.load(found, checkpoint_id=tmp_path)
    assert found["step"] == 3
    assert torch.equal(embed["embed.weight"], saved.embed.weight)
    assert not warnings_of(caplog)


def test_weights_of_a_plain_model_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dcp.save({"model": prepared(Wrapped()).state_dict()}, checkpoint_id=tmp_path)
    model = rewritten()
    before = copied(model.state_dict())
    with (
        caplog.at_level(logging.WARNING, "attnres_rewrite"),
        pytest.raises(dcp.CheckpointException, match=r"Missing key in checkpoint state_dict: model.tower.attn_res"),
    ):
        dcp.load({"model": model.state_dict()}, checkpoint_id=tmp_path)
    (message,) = warnings_of(caplog)
    assert "these weights have no queries for module 'model.tower'" in message
    assert equal(model.state_dict(), before)


def test_a_checkpoint_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    model = rewritten()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
    (tmp_path / ".metadata").unlink()
    before = copied(model.state_dict())
    with pytest.raises(dcp.CheckpointException, match="metadata"):
        dcp.load({"model": model.state_dict()}, checkpoint_id=tmp_path)
    assert equal(model.state_dict(), before)


def test_modules_of_a_program_load_what_a_live_model_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dcp.save({"model": (live := rewritten(kind=tower)).state_dict()}, checkpoint_id=tmp_path)
    modules = torch.export.unflatten(ar.rewrite(torch.export.export(prepared(Tower(4)), (X,)), config=CONFIG))
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        dcp.load({"model": modules.state_dict()}, checkpoint_id=tmp_path)
    assert torch.allclose(modules(X), live(X), atol=1e-6)
    (message,) = warnings_of(caplog)
    assert "queries but no settings" in message


@functools.cache
def folder() -> Path:
    """Where two processes, and before them one, have left checkpoints; removed with the interpreter."""
    import distributed_cases

    keep = tempfile.TemporaryDirectory()
    path = Path(keep.name)
    folder.keep = keep  # type: ignore[attr-defined]
    dcp.save({"model": distributed_cases.rewritten().state_dict()}, checkpoint_id=path / "one")
    done = launch(TESTS / "checkpoint_cases.py", "two", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def outcome(group: str, case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder() / f"{group}.json").read_text())[case]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.slow
def test_training_resumes_with_the_same_losses() -> None:
    found = outcome("two", "resumed")
    assert found["loaded"]
    assert found["actual"] == found["expected"]
    # Each process has tokens of its own.
    assert found["expected"][0] != found["expected"][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other blocks", "blocks ((2, 2),) there, ((4,),) here"),
        ("other epsilon", "eps 1e-06 there, 1e-05 here"),
        ("whole, other epsilon", "eps 1e-06 there, 1e-05 here"),
        ("from the first, other epsilon", "eps 1e-06 there, 1e-05 here"),
    ],
)
def test_other_settings_are_refused_by_every_process(case: str, message: str) -> None:
    found = outcome("two", case)
    assert all(text is not None and message in text for text in found["messages"])
    assert found["as it was"] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["whole", "from the first"])
def test_a_whole_state_dict_is_sharded(case: str) -> None:
    assert outcome("two", case)["loaded"]


@pytest.mark.slow
def test_two_processes_load_what_one_saved() -> None:
    assert max(outcome("two", "from one process")["gradients"].values()) < 1e-12


@pytest.mark.slow
def test_one_process_loads_what_two_saved() -> None:
    import distributed_cases

    model = ar.rewrite(distributed_cases.plain(), 2, example_inputs=distributed_cases.IDS, backend="eager")
    dcp.load({"model": model.state_dict()}, checkpoint_id=folder() / "two")
    assert equal(model.state_dict(), torch.load(folder() / "saved.pt"))


@pytest.mark.slow
def test_four_processes_load_what_two_saved() -> None:
    done = launch(TESTS / "checkpoint_cases.py", "four", folder(), processes=4)
    assert done.returncode == 0, done.stdout + done.stderr
    mesh = outcome("four", "two dimensions")
    assert mesh["loaded"]
    assert max(mesh["gradients"].values()) < 1e-12


@pytest.mark.slow
def test_training_goes_on_after_a_failure_with_the_same_losses(tmp_path: Path) -> None:
    example, options = TESTS.parent / "examples" / "train_elastic.py", ["--steps", 9, "--backend", "eager", "--out"]
    done = launch(TESTS / "failing.py", example, *options, tmp_path, restarts=1)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line.split() for line in done.stdout.splitlines()]
    # Killed as the eighth step was saved, when the fourth was the last that is whole.
    assert [int(step) for _, step, _, _ in losses] == [*range(8), *range(4, 9)]
    assert losses[8:12] == losses[4:8]
    assert len({loss for *_, loss in losses}) == 9
    assert {path.name for path in tmp_path.iterdir()} == {"step-4", "step-8"}
