"""The command line: options, output and one-line errors."""

import importlib.util
import json
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
from attnres_rewrite import OnnxExport, attnres_parameters, cli, named_models, rewrite
from attnres_rewrite.demo import DemoSettings


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


def make_nothing() -> str:
    return "text"


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
    """Exit status and standard error of the entry point."""
    monkeypatch.setattr(sys, "argv", ["attnres", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


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
        (("--aggregation", "max"), "--aggregation must be one of ('mean', 'sum'), not 'max'"),
        (("--blocks", "2", "--streams", "nowhere"), "streams names ['nowhere']"),
        (("--blocks", "2,x"), "--blocks takes a number or"),
    ],
)
def test_options_that_do_not_fit(monkeypatch, capsys, options, message):
    status, error = main(monkeypatch, capsys, "explain", "test_cli:make_tiny_llama", *options)
    assert status == 1
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
    told = json.loads(result.output)
    assert told["error"] == "NoResidualStreamError"
    assert told["message"].startswith("no residual stream was found")


@pytest.mark.slow
def test_export_a_configuration_with_weights_of_the_plain_model(run, folder, tmp_path):
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    plain = LlamaForCausalLM(AutoConfig.from_pretrained(folder)).eval()
    # As save_pretrained() does, the weights of the head are left to the embedding.
    weights = tmp_path / "plain.safetensors"
    save_file({name: value for name, value in plain.state_dict().items() if name != "lm_head.weight"}, weights)
    out = tmp_path / "model.onnx"

    result = run("export", str(folder), "-o", str(out), "--blocks", "2", "--weights", str(weights))
    assert result.exit_code == 0, result.output
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
        (["explain", "test_cli:make_tiny_llama", "--blocks", "9"], "only 4 layers"),
        (["explain", "test_cli:make_tiny_llama", "--blocks", "many"], '--blocks takes a number or "full"'),
        (["demo", "--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["export", "nowhere", "-o", "x.onnx"], "'nowhere' is neither a folder with a config.json nor module:factory"),
        (["export", "test_cli:make_mlp", "-o", "x.onnx"], "no residual stream"),
        (["export", "test_cli:make_rewritten_llama", "-o", "no/x.onnx"], "the folder no does not exist"),
        (["export", "nowhere", "-o", "x.onnx", "--ort-fusions", "npu"], "takes cpu, cuda, webgpu, dml, not 'npu'"),
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


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "attnres_rewrite.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "explain", "export"):
        assert command in done.stdout


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


@pytest.mark.slow
def test_plot_a_plain_model(run, tmp_path):
    out = tmp_path / "depth.svg"
    result = run("plot", "test_cli:make_tiny_llama", "--out", str(out), "--tokens", "random", "--blocks", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}: 8 reads of 4 sources; the model came plain")
    assert out.read_text().startswith("<?xml")


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
