"""The callbacks: what they log arrives where the framework logs, and what cannot work is said before training."""

import importlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tower, embeddings, llama, randomise_sites, token_ids, transformers
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.huggingface.callback import AttnResCallback

SITES = 4
CHARTS = [f"attnres/total/{name}" for name in ("query_norm", "gain_drift", "weight_entropy", "largest_weight")]


class Recording(transformers.TrainerCallback):
    """A logger of somebody else's."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))

    @property
    def of_attnres(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, logs) for step, logs in self.seen if CHARTS[0] in logs]


class TowerForTrainer(nn.Module):
    """What the Trainer trains: takes keywords, and gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower(2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.tower(x).square().mean()}


def rewritten() -> nn.Module:
    model = ar.rewrite(TowerForTrainer(), 2, example_inputs={"x": embeddings()}, backend="eager")
    return randomise_sites(model)


def trainer_of(model: nn.Module, folder: Path, callbacks: list[Any], **arguments: Any) -> Any:
    trainer = arguments.pop("trainer", {})
    defaults = {"report_to": "none", "max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2}
    args = transformers.TrainingArguments(
        str(folder), **{**defaults, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **arguments}
    )
    data = [{"x": row} for row in embeddings(8)]
    return transformers.Trainer(model, args, train_dataset=data, callbacks=callbacks, **trainer)


def test_what_the_trainer_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, before, after = rewritten(), Recording(), Recording()
    callback = AttnResCallback(every_steps=1, example_inputs={"x": embeddings()})
    trainer = trainer_of(model, tmp_path, [before, callback, after])
    trainer.train()
    assert before.seen == after.seen
    assert [step for step, _ in after.of_attnres] == [1, 2, 3, 4]
    assert after.of_attnres[-1][1] == ar.log_dict(model, embeddings())
    assert len(after.of_attnres[0][1]) == 4 * SITES + 4
    # The queries move, and what is logged with them.
    assert len({logs[CHARTS[0]] for _, logs in after.of_attnres}) == 4
    # The loss is logged when it would be without the callback.
    assert [step for step, logs in after.seen if "loss" in logs] == [2, 4]
    history = [entry for entry in trainer.state.log_history if CHARTS[0] in entry]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    assert history[1]["epoch"] == 0.5
    # There are as many numbers as sites; nobody wants to read them in a console.
    assert "attnres" not in capsys.readouterr().out


def test_tensorboard_gets_it_from_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    model = rewritten()
    trainer_of(model, tmp_path, [AttnResCallback(every_steps=2)], report_to="tensorboard").train()
    events = accumulator.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    for name, value in ar.log_dict(model).items():
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [2, 4]
        assert scalars[-1].value == pytest.approx(value, rel=1e-6)
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [2, 4]


def test_a_decay_of_queries_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = rewritten()
    with caplog.at_level(logging.WARNING, logger="attnres_rewrite"):
        trainer_of(model, tmp_path, [AttnResCallback()], weight_decay=0.1, learning_rate=3e-4, max_steps=1).train()
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("attnres_rewrite")]
    assert message.startswith(f"the optimizer decays {2 * SITES} pseudo-queries and key gains")
    assert "tower.attn_res.0.query" in message
    assert (
        'Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": parameter_groups(model, '
        'weight_decay=0.1), "lr": 0.0003}))'
    ) in message


def test_the_line_of_the_warning_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = rewritten()
    attnres = dict(ar.attnres_parameters(model))
    others = [parameter for name, parameter in model.named_parameters() if name not in attnres]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": list(attnres.values()), "weight_decay": 0.0}]
    optimizer = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "lr": 3e-4})}
    with caplog.at_level(logging.WARNING, logger="attnres_rewrite"):
        trainer = trainer_of(model, tmp_path, [AttnResCallback()], weight_decay=0.1, max_steps=1, trainer=optimizer)
        trainer.train()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [3e-4, 3e-4]
    assert [record for record in caplog.records if record.name.startswith("attnres_rewrite")] == []


def test_a_model_that_the_trainer_would_compile(tmp_path: Path) -> None:
    with pytest.raises(ar.AttnResError, match="Leave out torch_compile"):
        trainer_of(rewritten(), tmp_path, [AttnResCallback()], torch_compile=True)
    # What comes after the Trainer was made is seen when it begins.
    trainer = trainer_of(rewritten(), tmp_path, [], torch_compile=True)
    trainer.add_callback(AttnResCallback())
    with pytest.raises(ar.AttnResError, match="Leave out torch_compile"):
        trainer.train()


def test_a_model_that_was_not_rewritten(tmp_path: Path) -> None:
    trainer = trainer_of(TowerForTrainer(), tmp_path, [AttnResCallback()])
    with pytest.raises(ar.AttnResError, match="AttnResCallback: this TowerForTrainer was not rewritten"):
        trainer.train()
    with pytest.raises(ValueError, match="every_steps must be at least 1, not 0"):
        AttnResCallback(every_steps=0)


def test_inputs_that_do_not_fit_are_an_error_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(rewritten(), tmp_path, [AttnResCallback(example_inputs=[embeddings()])])
    with pytest.raises(ar.ExampleInputsError, match="example_inputs is a list"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_called_by_something_else_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """The history of the run has the numbers even so."""
    model, state = rewritten(), transformers.TrainerState(global_step=1, epoch=0.5)
    callback = AttnResCallback(every_steps=1)
    with caplog.at_level(logging.WARNING, logger="attnres_rewrite"):
        for _ in range(2):
            callback.on_step_end(None, state, transformers.TrainerControl(), model=model)
    assert [entry["step"] for entry in state.log_history] == [1, 1]
    assert [record.getMessage()[:40] for record in caplog.records] == ["AttnResCallback: no Trainer of transform"]


@pytest.mark.slow
def test_a_model_of_transformers_in_mixed_precision(tmp_path: Path) -> None:
    ids = token_ids(8)
    model, recording = ar.rewrite(llama(2), 2, backend="eager"), Recording()
    args = transformers.TrainingArguments(
        str(tmp_path), report_to="none", max_steps=2, bf16=True, use_cpu=True, save_strategy="no", weight_decay=0.1
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    callback = AttnResCallback(every_steps=1, example_inputs={"input_ids": ids[:2]})
    transformers.Trainer(model, args, train_dataset=data, callbacks=[callback, recording]).train()
    (_, first), (_, second) = recording.of_attnres
    assert set(CHARTS) < first.keys() == second.keys()
    assert second[CHARTS[0]] > first[CHARTS[0]] > 0


# Lightning


def fit(model: nn.Module, folder: Path, callback: Any, decay: float = 0.0, **arguments: Any) -> Any:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        """The rewritten model is in it, and it has no forward."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss = self.inner(batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=decay)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", callbacks=[callback], default_root_dir=folder, **quiet, **arguments
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(embeddings(16), batch_size=2))
    return trainer


def lightning_callback(**arguments: Any) -> Any:
    pytest.importorskip("lightning.pytorch")
    from attnres_rewrite.lightning import AttnResCallback

    return AttnResCallback(**arguments)


def test_tensorboard_gets_it_from_lightning(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback = lightning_callback(every_steps=2, example_inputs={"x": embeddings()})
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    model, logger = rewritten(), loggers.TensorBoardLogger(tmp_path)
    # Of two batches one step is made, and the loss is logged at none of them.
    fit(model, tmp_path, callback, logger=logger, accumulate_grad_batches=2, log_every_n_steps=50)
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    expected = ar.log_dict(model, embeddings())
    assert len(expected) == 4 * SITES + 4
    for name, value in expected.items():
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [2, 4]
        assert scalars[-1].value == pytest.approx(value, rel=1e-5)


def test_what_lightning_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="attnres_rewrite"):
        fit(rewritten(), tmp_path, lightning_callback(), decay=0.1, logger=False)
    first, second = (r.getMessage() for r in caplog.records if r.name == "attnres_rewrite.lightning")
    assert "this Trainer has no logger" in first
    assert f"decays {2 * SITES} pseudo-queries and key gains of this model, inner.tower.attn_res.0.query" in second
    assert "parameter_groups(model, weight_decay=0.1)" in second
    with pytest.raises(ar.AttnResError, match="AttnResCallback: this Module was not rewritten"):
        fit(TowerForTrainer(), tmp_path, lightning_callback(), logger=False)
    with pytest.raises(ar.ExampleInputsError, match="example_inputs is a list"):
        fit(rewritten(), tmp_path, lightning_callback(example_inputs=[embeddings()]), logger=False)
    with pytest.raises(ValueError, match="every_steps must be at least 1, not 0"):
        lightning_callback(every_steps=0)


@pytest.mark.slow
def test_the_callback_is_of_the_package_in_use() -> None:
    """The two packages have the same classes twice, and one Trainer does not know the other's."""
    pytest.importorskip("lightning.pytorch")
    code = "from attnres_rewrite.lightning import AttnResCallback; print(AttnResCallback.__mro__[1].__module__)"
    for before, package in (("", "lightning.pytorch"), ("import pytorch_lightning; ", "pytorch_lightning")):
        command = [sys.executable, "-W", "ignore", "-c", before + code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [f"{package}.callbacks.callback"]


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        ("attnres_rewrite.huggingface.callback", "transformers: pip install 'attnres-rewrite[hf]'"),
        ("attnres_rewrite.lightning", "lightning: pip install 'attnres-rewrite[lightning]'"),
    ],
)
def test_a_missing_package_is_named(module: str, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    for package in ("transformers", "lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ar.MissingPackageError) as raised:
        importlib.import_module(module)
    assert str(raised.value) == f"AttnResCallback needs {needed}"
