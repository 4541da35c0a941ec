"""Hugging Face's own lines bring a rewritten model back as one, and fail where this package is not imported."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import (
    VOCAB,
    WIDTH,
    Tower,
    embeddings,
    gpt2,
    llama,
    logits,
    mostly_slow,
    prepared,
    randomise_sites,
    relative_error,
    token_ids,
)
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import attnres_rewrite as ar
from attnres_rewrite import _compat

ROOT = Path(__file__).parents[1]
IDS = token_ids()


def trained(make=llama, **options: object) -> nn.Module:
    return randomise_sites(ar.rewrite(prepared(make(3)), 2, backend="eager", **options))


def same(model: nn.Module, other: nn.Module) -> bool:
    other = eagerly(other)
    return relative_error(logits(other(IDS)), logits(model(IDS))) < 1e-5


def eagerly(model: nn.Module) -> nn.Module:
    """Without Inductor, whose kernels are tested elsewhere."""
    for _, live in ar.forms.live.live_forwards(model):
        live.state.backend.inner = "eager"
    return model


KINDS = [(llama, AutoModelForCausalLM), (llama, LlamaForCausalLM), (gpt2, AutoModelForCausalLM)]


@pytest.mark.parametrize("case", mostly_slow(KINDS, KINDS[0]))
def test_from_pretrained_gives_the_rewritten_model(tmp_path, case) -> None:
    make, kind = case
    config = ar.AttnResConfig(blocks=[1, 2], scale=0.7, aggregation="sum")
    model = randomise_sites(ar.rewrite(prepared(make(3)), config=config, backend="eager"))
    before = copy.deepcopy(model.config.to_dict())
    model.save_pretrained(tmp_path)
    # Transformers itself notes these two.
    own = {"dtype": "float32", "architectures": [type(model).__name__]}
    assert model.config.to_dict() == {**before, **own}
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert same(model, loaded)
    # It looks like any other model, and saves itself as the first did.
    assert (getattr(loaded, "is_quantized", False), hasattr(loaded, "hf_quantizer")) == (False, False)
    assert loaded.config.to_dict().keys() == before.keys()
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    assert ar.verify(loaded, IDS)


def in_another_process(code: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("options", mostly_slow(["", ", attn_implementation='sdpa'"], ", attn_implementation='sdpa'"))
@pytest.mark.parametrize("kind", mostly_slow(["AutoModelForCausalLM", "LlamaForCausalLM"], "LlamaForCausalLM"))
def test_without_the_package_it_fails_by_its_name(tmp_path, kind: str, options: str) -> None:
    trained().save_pretrained(tmp_path)
    done = in_another_process(f"import transformers; transformers.{kind}.from_pretrained({str(tmp_path)!r}{options})")
    assert done.returncode == 1
    assert "pip install attnres-rewrite, and import attnres_rewrite before it is loaded" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_part_of_it_and_a_whole_around_it(tmp_path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "whole")
    base = eagerly(AutoModel.from_pretrained(tmp_path / "whole"))
    expected = model.model(IDS).last_hidden_state
    assert relative_error(base(IDS).last_hidden_state, expected) < 1e-5
    model.model.save_pretrained(tmp_path / "part")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "part")
    assert [name for name, _ in ar.attnres_parameters(whole)] == [name for name, _ in ar.attnres_parameters(model)]
    assert relative_error(eagerly(whole).model(IDS).last_hidden_state, expected) < 1e-5


WAYS = {
    "sharded": ({"max_shard_size": "20KB"}, {}),
    "dtype": ({}, {"dtype": torch.bfloat16}),
    "device_map": ({}, {"device_map": "cpu"}),
    "attention": ({}, {"attn_implementation": "eager"}),
    "memory": ({}, {"low_cpu_mem_usage": True}),
}


@pytest.mark.parametrize("way", mostly_slow(WAYS))
def test_as_users_load(tmp_path, way) -> None:
    saving, loading = WAYS[way]
    model = trained()
    model.save_pretrained(tmp_path, **saving)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in saving)
    loaded = eagerly(AutoModelForCausalLM.from_pretrained(tmp_path, **loading))
    dtype = loading.get("dtype", torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert relative_error(logits(loaded(IDS)).float(), logits(model(IDS))) < (0.1 if dtype == torch.bfloat16 else 1e-5)
    assert loaded.config._attn_implementation == loading.get("attn_implementation", "sdpa")


def test_other_settings_in_the_weights_than_in_the_configuration(tmp_path) -> None:
    trained().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    written["quantization_config"]["record"]["owners"][0]["spec"]["blocks"] = [[3, 3]]
    file.write_text(json.dumps(written))
    with pytest.raises(Exception, match=r"blocks .*there, .*here"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_copy_saves_its_own_weights_and_undo_a_plain_model(tmp_path) -> None:
    model = trained()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "copy")
    assert same(other, AutoModelForCausalLM.from_pretrained(tmp_path / "copy"))
    ar.undo(model)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert not list(ar.attnres_parameters(plain))
    assert relative_error(logits(plain(IDS)), logits(model(IDS))) < 1e-6
    ar.undo(other.model)
    other.save_pretrained(tmp_path / "undone")
    assert "quantization_config" not in json.loads((tmp_path / "undone" / "config.json").read_text())


def test_the_folder_says_how_to_load_it(tmp_path) -> None:
    trained().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import attnres_rewrite" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LlamaConfig)
    with pytest.raises(ValueError, match="pip install attnres-rewrite"):
        AutoModelForCausalLM.from_config(config)


def test_a_save_that_fails_leaves_no_new_folder(tmp_path) -> None:
    model = trained()
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        # Which is read after the configuration has been written.
        with pytest.raises(ValueError, match="much"):
            model.save_pretrained(tmp_path / name, max_shard_size="much")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json", "generation_config.json"]
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.slow
def test_a_push_to_the_hub_says_how_to_load_it(tmp_path, monkeypatch) -> None:
    """Which writes a card of its own. Nothing goes out: what would be uploaded is kept, and loaded."""
    hub = pytest.importorskip("huggingface_hub")
    from transformers.utils import hub as of_transformers

    def keep(model: nn.Module, folder: str, repo: str, **_: object) -> str:
        shutil.copytree(folder, tmp_path / repo)
        return repo

    def no_card(*_: object, **__: object) -> None:
        raise hub.errors.EntryNotFoundError("no card yet")

    monkeypatch.setattr(hub.HfApi, "create_repo", lambda *_, **__: hub.RepoUrl("https://huggingface.co/me/tiny"))
    monkeypatch.setattr(of_transformers.ModelCard, "load", no_card)
    monkeypatch.setattr(LlamaForCausalLM, _compat.UPLOAD, keep)
    model = trained()
    assert model.push_to_hub("me/tiny", tags=["small"]) == "me/tiny"
    card = (tmp_path / "me" / "tiny" / "README.md").read_text()
    for part in ("- small", "automatically generated", "import attnres_rewrite", "pip install attnres-rewrite"):
        assert part in card
    assert same(model, LlamaForCausalLM.from_pretrained(tmp_path / "me" / "tiny"))
    assert _compat.UPLOAD not in ar.undo(model).__dict__


class Own(nn.Module):
    """None of transformers: its configuration is in what makes it."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.tower, self.out = Tower(layers), nn.Linear(VOCAB, WIDTH)
        self.tied = self.out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.tower(x))


def test_a_model_of_ones_own(tmp_path) -> None:
    x = embeddings()
    config = ar.AttnResConfig(blocks=[1, 3], aggregation="sum")
    model = randomise_sites(ar.rewrite(prepared(Own()), config=config, example_inputs=x, backend="eager"))
    ar.save_pretrained(model, tmp_path / "folder")
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {"model.safetensors", "attnres.json"}
    for make in (Own, Own()):
        loaded = ar.from_pretrained(tmp_path / "folder", make, backend="eager")
        assert relative_error(loaded.eval()(x), model(x)) == 0
    assert ar.verify(loaded, x)
    with pytest.raises(ar.UnsupportedResidualError, match="already has Attention Residuals, in module 'tower'"):
        ar.from_pretrained(tmp_path / "folder", loaded)
    # After an error the module is plain again, with the weights that it had.
    wrong = Own()
    wrong.more = nn.Linear(2, 2)
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(ar.CheckpointError, match=r"do not fit this Own: make it as it was(.|\n)*Missing key"):
        ar.from_pretrained(tmp_path / "folder", wrong)
    torch.testing.assert_close(wrong.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ar.CheckpointError, match=r"holds the weights of a Own: give it, or what makes it"):
        ar.from_pretrained(tmp_path / "folder")
    with pytest.raises(ar.CheckpointError, match="recorded for module 'tower', which this Tower does not have"):
        ar.from_pretrained(tmp_path / "folder", Tower(4))
    # Too few layers are seen from the names alone; one that has them but runs fewer, in the first call.
    with pytest.raises(ar.CheckpointError, match=r"recorded for module 'tower\.layers\.2"):
        ar.from_pretrained(tmp_path / "folder", lambda: Own(2))
    with pytest.raises(ar.CheckpointError, match="there is no folder 'nowhere'"):
        ar.from_pretrained("nowhere", Own)
    with pytest.raises(TypeError, match="max_shard_size"):
        ar.save_pretrained(model, tmp_path / "folder", max_shard_size="1GB")
    with pytest.raises(ar.AttnResError, match="save_pretrained: this Own was not rewritten in place"):
        ar.save_pretrained(Own(), tmp_path / "folder")


@pytest.mark.slow
def test_a_folder_of_transformers(tmp_path) -> None:
    model = trained()
    ar.save_pretrained(model, tmp_path / "rewritten", max_shard_size="20KB")
    loaded = ar.from_pretrained(tmp_path / "rewritten", backend="eager")
    assert type(loaded) is LlamaForCausalLM
    assert relative_error(logits(loaded(IDS)), logits(model(IDS))) < 1e-6
    llama(2).save_pretrained(tmp_path / "plain")
    with pytest.raises(ar.CheckpointError, match="holds a plain LlamaForCausalLM: load it"):
        ar.from_pretrained(tmp_path / "plain")
    with pytest.raises(ar.CheckpointError, match=r"neither attnres\.json nor config\.json"):
        ar.from_pretrained(tmp_path)


def on_the_command_line(*arguments: str) -> str:
    from attnres_rewrite import cli

    command = [sys.executable, "-m", "attnres_rewrite.cli", *arguments]
    assert cli
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.slow
def test_the_command_line_takes_such_a_folder(tmp_path) -> None:
    pytest.importorskip("typer")
    config = ar.AttnResConfig(blocks=[1, 2])
    model = randomise_sites(ar.rewrite(prepared(llama(3)), config=config, backend="eager"))
    model.save_pretrained(tmp_path)
    told = json.loads(on_the_command_line("explain", str(tmp_path), "--json"))
    assert told == json.loads(json.dumps(ar.explain(prepared(llama(3)), config=config).to_dict()))


@pytest.mark.slow
def test_it_exports_such_a_folder(tmp_path) -> None:
    pytest.importorskip("typer")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = trained()
    model.save_pretrained(tmp_path / "folder")
    file = tmp_path / "model.onnx"
    told = json.loads(on_the_command_line("export", str(tmp_path / "folder"), "--out", str(file), "--json"))
    assert told["weights"] == f"those in {tmp_path / 'folder'}"
    session = onnxruntime.InferenceSession(file)
    given = {value.name: IDS.numpy() if value.name == "input_ids" else None for value in session.get_inputs()}
    given = {name: torch.ones_like(IDS).numpy() if value is None else value for name, value in given.items()}
    found = torch.from_numpy(session.run(["logits"], given)[0])
    assert relative_error(found, logits(model(IDS))) < 1e-4


def trainer(model: nn.Module, folder: Path, steps: int) -> object:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in token_ids(8, 9, seed=3)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, seed=1
    )
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.slow
def test_trainer_resumes_and_refuses_other_blocks(tmp_path) -> None:
    def fresh(blocks: int) -> nn.Module:
        torch.manual_seed(0)
        return ar.rewrite(llama(3), blocks, backend="eager")

    whole = trainer(fresh(2), tmp_path / "whole", 4)
    whole.train()
    resumed = trainer(fresh(2), tmp_path / "whole", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    state, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert any(value.abs().max() > 0 for key, value in state.items() if key.endswith("query"))
    with pytest.raises(ar.CheckpointError, match="blocks"):
        trainer(fresh(3), tmp_path / "other", 4).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    # A checkpoint of Trainer is a folder like any other.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert same(whole.model.eval(), loaded)
