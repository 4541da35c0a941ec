"""A rewritten model in transformers' Trainer resumes, reloads, checkpoints activations and generates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, llama, prepared, relative_error, site_parameters, token_ids
from reference_models import reference_llama
from torch import Tensor, nn

import attnres_rewrite as ar

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LAYERS, BLOCKS, STEPS = 2, 2, 6


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


def rewritten(blocks: int = BLOCKS) -> nn.Module:
    model = prepared(llama(LAYERS))
    model.config.use_cache = False
    return ar.rewrite(model, blocks, backend="eager")


def trainer(model: nn.Module, folder: Path, **arguments: Any) -> Any:
    chosen = {"max_steps": STEPS, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2, **arguments}
    settings = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, **chosen
    )
    return transformers.Trainer(model=model, args=settings, train_dataset=Tokens(), eval_dataset=Tokens())


def losses(history: list[dict[str, float]], name: str = "loss") -> list[float]:
    return [entry[name] for entry in history if name in entry]


def test_resuming_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    first = trainer(rewritten(), tmp_path)
    first.train()
    whole = losses(first.state.log_history)
    again = trainer(rewritten(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(whole) == STEPS
    assert losses(again.state.log_history) == whole
    for (name, one), other in zip(first.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert all(query.abs().max() > 1e-3 for query in site_parameters(again.model)[0])

    with pytest.raises(ar.CheckpointError, match=r"blocks \(\(2, 2\),\) there, \(\(4,\),\) here"):
        trainer(rewritten(1), tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    again.model.eval()
    plain = ar.undo(rewritten_copy(again.model))
    expected = reference_llama(plain, token_ids(), *site_parameters(again.model), blocks=BLOCKS)
    assert relative_error(again.model(token_ids()).logits, expected) < 1e-5


def rewritten_copy(model: nn.Module) -> nn.Module:
    copy = rewritten()
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@pytest.mark.slow
def test_the_best_model_comes_back(tmp_path: Path) -> None:
    """The best is here the one with the highest loss, which is not the last one."""
    found = trainer(
        rewritten(),
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    found.train()
    evaluated = losses(found.state.log_history, "eval_loss")
    assert max(evaluated) > evaluated[-1]
    assert found.evaluate()["eval_loss"] == max(evaluated)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_loss(tmp_path: Path, reentrant: bool) -> None:
    plainly = trainer(rewritten(), tmp_path / "a", save_strategy="no")
    plainly.train()
    checkpointed = trainer(
        rewritten(),
        tmp_path / "b",
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    checkpointed.train()
    assert losses(checkpointed.state.log_history) == pytest.approx(losses(plainly.state.log_history), rel=1e-5)


@pytest.mark.slow
def test_generating_in_the_middle_of_training(tmp_path: Path) -> None:
    """As an evaluation that samples text does: with a cache, between two steps of training."""
    texts = []

    class Generates(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
            model.eval()
            texts.append(model.generate(token_ids(1), max_new_tokens=4, do_sample=False, use_cache=True))
            model.train()

    found = trainer(rewritten(), tmp_path, save_strategy="no", max_steps=2, learning_rate=0.1)
    found.add_callback(Generates())
    found.train()
    model = found.model.eval()
    ids = token_ids(1)
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(texts[-1], ids)
    assert not torch.equal(texts[0], texts[1])


def test_its_weight_decay_leaves_the_sites_alone_when_it_is_given_the_groups(tmp_path: Path) -> None:
    """By itself it decays whatever it does not know the name of."""

    def decay_of_sites(**optimizer: Any) -> set[float]:
        model = rewritten()
        if optimizer:
            groups = ar.parameter_groups(model, weight_decay=0.1)
            optimizer = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "lr": 1e-3})}
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True
        )
        made = transformers.Trainer(model=model, args=arguments, **optimizer)
        made.create_optimizer()
        sites = {id(p) for _, p in ar.attnres_parameters(model)}
        return {g["weight_decay"] for g in made.optimizer.param_groups for p in g["params"] if id(p) in sites}

    assert decay_of_sites() == {0.1}
    assert decay_of_sites(groups=True) == {0.0}


def test_compilation_that_is_asked_of_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a rewritten model compiles itself"):
        trainer(rewritten(), tmp_path, torch_compile=True, torch_compile_backend="attnres")
    with pytest.raises(ValueError, match="'NONSENSE' is not a valid DynamoBackend"):
        trainer(rewritten(), tmp_path, torch_compile=True, torch_compile_backend="nonsense")
    compiled = trainer(rewritten(), tmp_path, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(ar.NotRewrittenError, match="leave torch_compile out"):
        compiled.train()
