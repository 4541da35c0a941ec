"""The command line: options, output and one-line errors."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import attnres_rewrite.demo
from attnres_rewrite import cli
from attnres_rewrite.demo import DemoSettings


def make_tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(tiny_config(LlamaConfig))


def tiny_config(kind):
    return kind(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    )


def make_mlp() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.zeros(2, 4)


def make_nothing() -> str:
    return "text"


@pytest.fixture
def run():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.make_app(), arguments, catch_exceptions=True)


@pytest.fixture
def settings_of(monkeypatch, run):
    """The settings with which the demo is run for some arguments."""

    def get(*arguments):
        seen: list[DemoSettings] = []
        monkeypatch.setattr(attnres_rewrite.demo, "run_demo", lambda settings, console: seen.append(settings))
        result = run("demo", *arguments)
        assert result.exit_code == 0, result.output
        (settings,) = seen
        return settings

    return get


def main(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit status and standard error of the entry point."""
    monkeypatch.setattr(sys, "argv", ["attnres", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


def test_demo_defaults_are_those_of_the_settings(settings_of):
    assert settings_of() == DemoSettings()


def test_demo_options_reach_the_settings(settings_of):
    settings = settings_of("--steps", "7", "--blocks", "full", "--device", "cpu", "--out", "some/where")
    assert settings == DemoSettings(steps=7, blocks="full", device="cpu", out=Path("some/where"))
    assert settings_of("--blocks", "2").blocks == 2


def test_explain_a_factory(run):
    result = run("explain", "test_cli:make_tiny_llama", "--blocks", "2")
    assert result.exit_code == 0, result.output
    assert "stream of model: width 16, 4 layers, 8 branch outputs, 8 sites" in result.output


def test_explain_a_configuration_folder_as_json(run, tmp_path):
    from transformers import LlamaConfig

    tiny_config(LlamaConfig).save_pretrained(tmp_path)
    result = run("explain", str(tmp_path), "--blocks", "4", "--json")
    assert result.exit_code == 0, result.output
    (stream,) = json.loads(result.output)["streams"]
    assert (stream["owner"], stream["width"], stream["branches"], len(stream["blocks"])) == ("model", 16, 8, 4)


def test_a_refusal_as_json(run):
    result = run("explain", "test_cli:make_mlp", "--json")
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert told["error"] == "NoResidualStreamError"
    assert told["message"].startswith("no residual stream was found")


def test_a_configuration_makes_no_weights(tmp_path):
    from transformers import LlamaConfig

    tiny_config(LlamaConfig).save_pretrained(tmp_path)
    model, inputs = cli.load_model(str(tmp_path))
    assert inputs is None
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "nowhere"], "'nowhere' is neither a folder with a config.json nor module:factory"),
        (["explain", "test_cli:missing"], "has no attribute 'missing'"),
        (["explain", "no_such_module:make"], "No module named 'no_such_module'"),
        (["explain", "test_cli:make_nothing"], "returned a str, not an nn.Module"),
        (["explain", "test_cli:make_mlp"], "no residual stream"),
        (["explain", "test_cli:make_tiny_llama", "--blocks", "9"], "only 4 layers"),
        (["explain", "test_cli:make_tiny_llama", "--blocks", "many"], '--blocks takes a number or "full"'),
        (["demo", "--device", "nonsense"], "device 'nonsense' cannot be used"),
    ],
)
def test_errors_are_told_in_one_go_without_a_traceback(monkeypatch, capsys, arguments, message):
    status, error = main(monkeypatch, capsys, *arguments)
    assert status == 1
    assert error.startswith("attnres: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("missing", "arguments", "line"),
    [
        (
            ["typer"],
            ["--help"],
            "attnres: typer not installed; the extra that brings it: pip install 'attnres-rewrite[cli]'\n",
        ),
        (
            ["matplotlib", "onnxscript", "onnxruntime"],
            ["demo"],
            "attnres: matplotlib, onnxscript, onnxruntime not installed; the extras that bring them: "
            "pip install 'attnres-rewrite[plot,onnx]'\n",
        ),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(monkeypatch, capsys, missing, arguments, line):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    assert main(monkeypatch, capsys, *arguments) == (1, line)


def test_the_extras_are_those_of_the_project():
    import tomllib

    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    for module, extra in cli.EXTRAS.items():
        assert any(entry.startswith(module) for entry in project["optional-dependencies"][extra]), module


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "attnres_rewrite.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in done.stdout
    assert "explain" in done.stdout
