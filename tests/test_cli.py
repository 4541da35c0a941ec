"""The command line: options, output and one-line errors."""

import importlib.util
import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import attnres_rewrite.demo
from attnres_rewrite import OnnxExport, attnres_parameters, cli, model_names, named_models, rewrite
from attnres_rewrite.cli import progress
from attnres_rewrite.demo import DemoResult, DemoSettings
from attnres_rewrite.demo.results import RunResult


def make_tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(tiny_config(LlamaConfig))


def tiny_config(kind, layers=4, **options):
    return kind(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
        **options,
    )


def make_mlp() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.zeros(2, 4)


def make_rewritten_llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(LlamaConfig, layers=2))
    rewrite(model, blocks=2, backend="eager")
    ids = torch.arange(12).reshape(2, 6)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make_graph() -> tuple[nn.Module, torch.Tensor]:
    return torch.fx.symbolic_trace(make_mlp()[0]), torch.zeros(2, 4)


def make_nothing() -> str:
    return "text"


def make_error() -> nn.Module:
    raise ZeroDivisionError("of its own")


@pytest.fixture
def run():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.make_app(), arguments, catch_exceptions=True)


@pytest.fixture
def folder(tmp_path):
    """A configuration of two layers whose embedding is also its head; its norms have next to no epsilon."""
    from transformers import LlamaConfig

    folder = tmp_path / "model"
    tiny_config(LlamaConfig, layers=2, tie_word_embeddings=True, rms_norm_eps=1e-12).save_pretrained(folder)
    return folder


def in_onnxruntime(path, **given) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in given.items()})[0])


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
    """Exit status and standard error of the entry point, without the frame that typer draws around its errors."""
    monkeypatch.setattr(sys, "argv", ["attnres", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    return caught.value.code, unframed(error) if "╭" in error else error


def unframed(text: str) -> str:
    return " ".join(re.sub("[─-╿]", " ", text).split())


def examples_of(*command: str) -> list[list[str]]:
    """The arguments of the examples in a command's help."""
    shown = CliRunner().invoke(cli.make_app(), [*command, "--help"], terminal_width=200).output
    lines = (line.strip() for line in shown.splitlines())
    return [shlex.split(line)[1:] for line in lines if line.startswith("attnres ")]


@pytest.mark.slow
def test_options_that_say_how_layers_are_grouped(run):
    options = ("--json", "test_cli:make_tiny_llama")
    for arguments, sizes in (
        (("--blocks", "1,3"), [1, 3]),
        (("--layers-per-block", "3"), [3, 1]),
        (("--blocks", "2", "--streams", "model", "--aggregation", "sum"), [2, 2]),
    ):
        result = run("explain", *options, *arguments)
        assert result.exit_code == 0, result.output
        assert [len(block) for block in json.loads(result.output)["streams"][0]["blocks"]] == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--blocks", "2", "--layers-per-block", "2"), "both say how the layers are grouped"),
        (("--blocks", "2", "--streams", "nowhere"), "streams names ['nowhere']"),
        (("--blocks", "9"), "only 4 layers"),
        (("--blocks", "9"), "Here that is --blocks, or --layers-per-block"),
        (("--blocks", "2", "--graph", "no/x.svg"), "--graph no/x.svg: the folder no does not exist"),
    ],
)
def test_options_that_do_not_fit(monkeypatch, capsys, options, message):
    status, error = main(monkeypatch, capsys, "explain", "test_cli:make_tiny_llama", *options)
    assert status == 1
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "x", "--aggregation", "max"), "Invalid value for '--aggregation': "),
        (("explain", "x", "--aggregation", "max"), "'mean', 'sum'"),
        (
            ("explain", "x", "--blocks", "2,x"),
            'a number, "full" or "auto", or the layers in every block (2,2,4,4), not \'2,x\'',
        ),
        (("explain", "x", "--graph", "blocks.png"), "whose name ends in .svg, not 'blocks.png'"),
        (("export", "x", "-o", "x.onnx", "--ort-fusions", "npu"), "'cpu', 'cuda', 'webgpu', 'dml'"),
        (("bench", "x", "--dtype", "int8"), "'float32', 'bfloat16', 'float16'"),
        (("bench", "x", "--schedule", "x"), "'auto', 'per_read', 'two_phase'"),
        (("bench", "x", "--blocks", "many"), 'a number, "full" or "auto"'),
        (("demo", "--blocks", "many"), 'a number, "full" or "auto"'),
        (("explain",), "Missing argument 'MODEL'"),
        (("explian", "x"), "Did you mean 'explain'"),
    ],
)
def test_a_wrong_command_line_has_a_status_of_its_own(monkeypatch, capsys, arguments, message):
    status, error = main(monkeypatch, capsys, *arguments)
    assert status == 2
    assert message in error


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
    assert result.stderr.startswith("attnres: no residual stream was found")
    told = json.loads(result.stdout)
    assert told["error"] == "NoResidualStreamError"
    assert told["message"].startswith("no residual stream was found")


@pytest.mark.slow
def test_export_a_configuration_with_weights_of_the_plain_model(run, folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "attnres_rewrite.onnx")
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    plain = LlamaForCausalLM(AutoConfig.from_pretrained(folder)).eval()
    # As save_pretrained() does, the weights of the head are left to the embedding.
    weights = tmp_path / "plain.safetensors"
    save_file({name: value for name, value in plain.state_dict().items() if name != "lm_head.weight"}, weights)
    out = tmp_path / "model.onnx"

    result = run("export", str(folder), "-o", str(out), "--blocks", "2", "--weights", str(weights))
    assert result.exit_code == 0, result.output
    # What the command line shows as stages, and nothing of what the exporters have to say.
    stages = ["Tracing the LlamaForCausalLM and converting it to ONNX", "Comparing ONNX Runtime with PyTorch"]
    assert [one.getMessage() for one in caplog.records if one.name == "attnres_rewrite.onnx.export"] == stages
    assert result.stderr == ""
    path, origin, inputs, outputs, _, *differences = result.stdout.splitlines()
    assert path == f"{out}: 4 sites"
    assert origin == f"weights: {weights}, of a plain model: pseudo-queries and gains stay as they were"
    assert (inputs, outputs) == ("inputs: input_ids", "outputs: logits")
    assert len(differences) == 3
    assert all(float(line.rpartition(": ")[2]) < 1e-5 for line in differences), differences
    # With pseudo-queries of zero it is the plain model.
    ids = torch.randint(64, (3, 9))
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
    torch.testing.assert_close(
        in_onnxruntime(out, input_ids=ids), expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
    )


@pytest.mark.slow
def test_export_a_rewritten_model_with_a_cache_as_json(run, tmp_path):
    model, inputs = make_rewritten_llama()
    for name, parameter in attnres_parameters(model):
        if name.endswith("query"):
            nn.init.normal_(parameter)
    weights, out = tmp_path / "trained.pt", tmp_path / "model.onnx"
    torch.save(model.state_dict(), weights)

    # Its two blocks stay: two layers cannot be eight.
    result = run(
        "export", "test_cli:make_rewritten_llama", "-o", str(out), "--weights", str(weights), "--use-cache", "--json"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["path"], told["weights"], told["sites"]) == (str(out), str(weights), 4)
    caches = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert set(told["inputs"]) == {
        "input_ids",
        "position_ids",
        "attention_mask",
        *(f"past_key_values.{cache}" for cache in caches),
    }
    assert told["outputs"] == ["logits", *(f"present.{cache}" for cache in caches)]
    assert len(told["differences"]) == 3
    assert told["max_difference"] == max(tried["difference"] for tried in told["differences"]) < 1e-5
    ids = inputs["input_ids"]
    empty = {f"past_key_values.{cache}": torch.zeros(2, 2, 0, 8) for cache in caches}
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    logits = in_onnxruntime(out, **inputs, position_ids=positions, **empty)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.slow
def test_an_export_that_fails_leaves_no_file(run, folder, tmp_path):
    out = tmp_path / "model.onnx"
    result = run("export", str(folder), "-o", str(out), "--blocks", "2", "--tolerance", "0", "--inline", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["error"] == "OnnxExportError"
    assert "(tolerance 0.0e+00)" in told["message"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("given", [{}, {"--use-cache": True, "--opset": 21, "--inline": True, "--ort-fusions": "cpu"}])
def test_options_reach_the_export(run, folder, tmp_path, monkeypatch, given):
    seen = {}

    def export_onnx(model, path, example_inputs, **options):
        seen.update(options)
        return OnnxExport(path, 1e-7, {(3, 7): 1e-7}, 4, ("input_ids",), ("logits",))

    monkeypatch.setattr(attnres_rewrite, "export_onnx", export_onnx)
    arguments = [part for name, value in given.items() for part in ([name] if value is True else [name, str(value)])]
    result = run("export", str(folder), "-o", str(tmp_path / "model.onnx"), "--blocks", "2", *arguments)
    assert result.exit_code == 0, result.output
    assert "weights: random, because a configuration has none; --weights FILE exports trained ones" in result.stdout
    assert "  sizes (3, 7): 1.0e-07" in result.stdout
    assert seen == {
        "use_cache": "--use-cache" in given,
        "opset_version": given.get("--opset", 23),
        "functions": "--inline" not in given,
        "ort_fusions": given.get("--ort-fusions"),
        "tolerance": None,
    }


def faulty(state, fault):
    """What a file holds that does not fit a model with ``state``."""
    match fault:
        case "missing":
            return {name: value for name, value in state.items() if name != "model.norm.weight"}
        case "one site missing":
            return {name: value for name, value in state.items() if name != "model.attn_res.1.query"}
        case "unexpected":
            return {**state, "model.layers.2.mlp.up_proj.weight": torch.zeros(1)}
        case "shape":
            return {**state, "model.norm.weight": torch.zeros(8)}
        case "nested":
            return {"model": state, "step": 3}
    return [1, 2]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "does not fit the LlamaForCausalLM: 1 missing (model.norm.weight); it takes a whole state_dict"),
        ("one site missing", "1 missing (model.attn_res.1.query);"),
        ("unexpected", "1 unexpected (model.layers.2.mlp.up_proj.weight);"),
        ("shape", "1 of another shape (model.norm.weight [8] instead of [16]);"),
        ("nested", "holds a dict with model, step, not a state_dict"),
        ("list", "holds a list, not a state_dict"),
    ],
)
def test_weights_that_do_not_fit_are_told_by_name(tmp_path, fault, message):
    model, _ = make_rewritten_llama()
    path = tmp_path / "weights.pt"
    torch.save(faulty(model.state_dict(), fault), path)
    before = model.model.norm.weight.clone()
    with pytest.raises(cli.CommandError) as caught:
        named_models.load_weights(model, path)
    assert str(caught.value).startswith(f"--weights {path} ")
    assert message in str(caught.value)
    assert torch.equal(model.model.norm.weight, before)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_holds_no_weights_is_told(monkeypatch, capsys, tmp_path, name):
    path, out = tmp_path / name, tmp_path / "model.onnx"
    arguments = ["export", "test_cli:make_rewritten_llama", "-o", str(out), "--weights", str(path)]
    assert main(monkeypatch, capsys, *arguments) == (1, f"attnres: --weights {path}: there is no such file\n")
    path.write_text("words")
    status, error = main(monkeypatch, capsys, *arguments)
    assert status == 1
    assert error.startswith(f"attnres: --weights {path} cannot be read (")
    assert "a file whose name ends in .safetensors" in error
    assert list(tmp_path.iterdir()) == [path]


def test_a_configuration_makes_no_weights(tmp_path):
    from transformers import LlamaConfig

    tiny_config(LlamaConfig).save_pretrained(tmp_path)
    model, inputs = named_models.load_model(str(tmp_path))
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
        (["explain", "test_cli:tiny_config"], "a factory is called without arguments, and tiny_config() missing 1"),
        (["explain", "test_cli:Path"], "Path returned a "),
        (["explain", "test_cli:__name__"], "is a value of type str, not a function"),
        (["explain", "someone/a-model"], "hf download someone/a-model config.json"),
        (["explain", "tests"], "the folder tests has no config.json"),
        (["demo", "--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["export", "nowhere", "-o", "x.onnx"], "'nowhere' is neither a folder with a config.json nor module:factory"),
        (["export", "test_cli:make_mlp", "-o", "x.onnx"], "no residual stream"),
        (["export", "test_cli:make_rewritten_llama", "-o", "no/x.onnx"], "the folder no does not exist"),
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
    for module, extra in named_models.EXTRAS.items():
        assert any(entry.startswith(module) for entry in project["optional-dependencies"][extra]), module


def as_a_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "attnres_rewrite.cli", *arguments], capture_output=True, text=True)


def test_the_module_runs_as_a_program():
    done = as_a_program("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("demo", "explain", "export", "plot", "bench", "Exit status: 0"):
        assert words in done.stdout


@pytest.mark.slow
def test_the_program_has_the_status_that_its_help_names():
    refused = as_a_program("explain", "no_module:make", "--json")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"] == "CommandError"
    assert refused.stderr == "attnres: no_module:make: No module named 'no_module'\n"
    wrong = as_a_program("explain", "x", "--aggregation", "max")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    done = as_a_program("explain", "attnres_rewrite.demo:llama", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["streams"][0]["sites"]) == 16


def test_a_number_of_blocks_that_is_chosen_is_explained(run):
    result = run("explain", "test_cli:make_tiny_llama", "--blocks", "auto")
    assert result.exit_code == 0, result.output
    (reason,) = [line for line in result.output.splitlines() if "what the layers take in inference" in line]
    assert reason.startswith("  2 blocks, at about ")
    (stream,) = json.loads(run("explain", "test_cli:make_tiny_llama", "--blocks", "auto", "--json").stdout)["streams"]
    assert (len(stream["blocks"]), stream["why"]) == (2, reason.strip())


def test_a_picture_of_the_blocks(run, tmp_path):
    path = tmp_path / "blocks.svg"
    result = run("explain", "test_cli:make_tiny_llama", "--blocks", "2", "--json", "--graph", str(path))
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["streams"][0]["blocks"]) == 2
    assert result.stderr == f"attnres: the blocks are drawn in {path}\n"
    assert path.read_text().startswith("<svg")


COMMANDS = ("explain", "export", "plot", "bench", "build-onnx-kernel", "demo")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_examples_of_the_help_are_understood(run, monkeypatch, command):
    ran = []
    names = ("explain_model", "export_model", "plot_model", "run_bench", "build_onnx_kernel", "run_demo")
    for name in names:
        monkeypatch.setattr(cli, name, lambda *_, name=name, **__: ran.append(name) or "")
    found = examples_of(*filter(None, [command]))
    assert len(found) >= 2
    for arguments in found:
        assert not command or arguments[0] == command
        assert run(*arguments).exit_code == 0
    assert len(ran) >= (1 if not command else 2)


@pytest.mark.slow
def test_the_examples_of_explain_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in examples_of("explain"):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["blocks.svg"]


def test_the_version(run):
    assert run("--version").stdout == f"attnres {attnres_rewrite.__version__}\n"


def test_the_demo_as_json(run, monkeypatch):
    ran = RunResult(5, (1.0, 0.5), ((2, 0.5),), 0.1, 10.0)
    result = DemoResult(ran, ran, 1e-7, "cpu", {"steps": 2})

    def demo(_, console):
        console.print("progress")
        print("a library's own words")
        return result

    monkeypatch.setattr(attnres_rewrite.demo, "run_demo", demo)
    done = run("demo", "--json")
    assert json.loads(done.stdout) == json.loads(json.dumps(result.to_dict()))
    assert "progress" in done.stderr


def test_stages_are_shown_on_a_terminal_alone(capsys, monkeypatch):
    def show():
        with progress.stages() as stage:
            stage("Making [it]")
            logging.getLogger("attnres_rewrite.onnx.export").info("Comparing %s", "both")
        return capsys.readouterr()

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert show() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out, error = show()
    assert out == ""
    assert "Making [it]" in error
    assert "Comparing both" in error
    # The logger is as it was.
    logger = logging.getLogger("attnres_rewrite.onnx")
    assert (logger.level, logger.handlers) == (logging.NOTSET, [])


def test_factories_raise_with_their_own_lines(monkeypatch, capsys):
    status, error = main(monkeypatch, capsys, "explain", "test_cli:make_error")
    assert status == 1
    assert error.startswith("attnres: test_cli:make_error raised ZeroDivisionError: of its own\n")
    assert "in make_error" in error
    assert "cli/commands.py" not in error


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-type"}'])
def test_a_configuration_that_cannot_be_read(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "config.json").write_text(text)
    status, error = main(monkeypatch, capsys, "explain", str(tmp_path))
    assert status == 1
    assert error.startswith(f"attnres: transformers cannot read {tmp_path / 'config.json'}: ")
    assert len(error.splitlines()) == 1


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two models, one of them in a folder of its own, and a file with factories."""
    for name in ("llama-tiny", "zoo/bert", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    factories = (
        "def make_llama(layers=2): return layers",
        "def make_bert(): return 1",
        "def needs(x): return x",
        "def needs_too(*, x): return x",
        "def nothing(): pass",
        "def _hidden(): return 1",
    )
    (tmp_path / "models.py").write_text("\n".join(factories))
    (tmp_path / "broken.py").write_text("def")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("incomplete", "offered"),
    [
        ("", ["llama-tiny", "zoo/", "models:make_llama", "models:make_bert"]),
        ("l", ["llama-tiny"]),
        ("zoo/", ["zoo/bert"]),
        (".h", [".hidden"]),
        ("models:make_b", ["models:make_bert"]),
        ("nowhere/", []),
        ("nowhere:", []),
    ],
)
def test_models_that_the_shell_offers(here, incomplete, offered):
    assert model_names.completions(incomplete) == offered


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("lama-tiny", ["llama-tiny"]),
        ("zoo/bart", ["zoo/bert"]),
        ("modles:make_llama", ["models:make_llama"]),
        ("models:make_lama", ["models:make_llama"]),
        ("make_bert", ["models:make_bert"]),
        ("models", ["models:make_llama", "models:make_bert"]),
        ("something else", []),
    ],
)
def test_names_near_an_unknown_one(here, monkeypatch, capsys, name, found):
    assert model_names.near(name)[: len(found)] == found
    monkeypatch.delitem(sys.modules, "models", raising=False)
    status, error = main(monkeypatch, capsys, "explain", name)
    assert status == 1
    assert ("Did you mean" in error) == bool(found)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("attnres explain ", ["llama-tiny", "zoo/", "models:make_llama", "models:make_bert"]),
        ("attnres bench x --schedule ", ["auto", "per_read", "two_phase"]),
        ("attnres explain x --aggregation s", ["sum"]),
        ("attnres bench x --dtype f", ["float32", "float16"]),
        ("attnres bench x --backend a", ["aot_eager"]),
        ("attnres ex", ["explain", "export"]),
    ],
)
def test_the_shell_completes(here, words, offered):
    environ = {"_ATTNRES_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(cli.make_app(), [], prog_name="attnres", env=environ)
    assert result.stdout.split() == offered


# attnres plot


@pytest.mark.slow
def test_plot_a_saved_model(run, tmp_path):
    """With its own blocks and its own queries, on the tokens of a file."""
    import attnres_rewrite as ar

    model, _ = make_rewritten_llama()
    with torch.no_grad():
        for name, parameter in attnres_parameters(model):
            parameter.normal_(std=2.0 if name.endswith("query") else 1.0)
    ar.save_pretrained(model, tmp_path / "saved")
    (tmp_path / "tokens.txt").write_text("1 2 3\n\n4, 5, 6\n")
    out = tmp_path / "depth.html"
    result = run("plot", str(tmp_path / "saved"), "--out", str(out), "--tokens", str(tmp_path / "tokens.txt"))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: 4 reads of 4 sources\n"
    depth = ar.depth_attention(model.eval(), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    depth.to_html(tmp_path / "expected.html", tokens=[f"id {n}" for n in range(1, 7)])
    assert out.read_text() == (tmp_path / "expected.html").read_text()
    tokens = str(tmp_path / "tokens.txt")
    told = run("plot", str(tmp_path / "saved"), "--out", str(out), "--tokens", tokens, "--json").stdout
    assert json.loads(told) == {"path": str(out), "fresh": False, **depth.to_dict()}


@pytest.mark.slow
def test_plot_a_plain_model(run, tmp_path):
    out = tmp_path / "depth.svg"
    result = run("plot", "test_cli:make_tiny_llama", "--out", str(out), "--tokens", "random", "--blocks", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}: 8 reads of 4 sources; the model came plain")
    assert out.read_text().startswith("<?xml")


def test_a_graph_has_no_plot(monkeypatch, capsys, tmp_path):
    code, error = main(monkeypatch, capsys, "plot", "test_cli:make_graph", "--out", str(tmp_path / "depth.html"))
    assert code == 1
    assert "test_cli:make_graph returned a GraphModule, whose sites are not recorded: return the nn.Module" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "depth.doc"), "--out takes a name that ends in .html, .png, .svg, .pdf, not 'depth.doc'"),
        (("--out", "nowhere/depth.png"), "the folder nowhere does not exist"),
        (("--tokens", "nowhere.txt"), '--tokens nowhere.txt: there is no such file; "random" takes random tokens'),
        (("--tokens", "uneven.txt"), "--tokens uneven.txt: its lines are sequences, and need one length: [1, 2]"),
        (("--tokens", "words.txt"), "--tokens words.txt holds something else than token ids"),
        (("--tokens", "large.txt"), "--tokens large.txt: ids are from 0 to 63 in this LlamaForCausalLM"),
    ],
)
def test_plots_that_cannot_be(monkeypatch, capsys, tmp_path, options, message):
    for name, text in (("uneven", "1\n2 3"), ("words", "one"), ("large", "1 64")):
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    code, error = main(monkeypatch, capsys, "plot", "test_cli:make_tiny_llama", *options)
    assert code == 1
    assert message in error
    assert not list(tmp_path.glob("depth*"))
