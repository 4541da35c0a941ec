"""Every example runs as a script and shows what it says."""

import csv
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.pipelining import PipelineStage

import attnres_rewrite

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def difference(text: str, pattern: str) -> float:
    match = re.search(pattern, text)
    assert match, text
    return float(match[1])


@pytest.mark.slow
def test_train():
    text = run("train.py", "--steps", "12", "--backend", "eager")
    assert "12 branch outputs, 12 sites" in text
    assert "verification passed" in text
    losses = [float(loss) for loss in re.findall(r"step +\d+  loss ([\d.]+)", text)]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5


def run_on_two(name: str, *arguments: str) -> list[float]:
    """The losses that the first of two processes prints, and how far the queries are apart, where it prints that."""
    launch = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, EXAMPLES / name, *arguments]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        # On a busy machine gloo may end a process whose neighbour has left already, after all its work.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return [float(a or b) for a, b in re.findall(r"loss ([\d.]+)|, ([\d.e+-]+) between", done.stdout)]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--shard"]], ids=["ddp", "fsdp"])
def test_train_distributed(arguments):
    *losses, apart = run_on_two("train_distributed.py", "--steps", "15", "--backend", "eager", *arguments)
    assert len(losses) == 15
    assert losses[-1] < losses[0] - 0.5
    assert apart == 0


@pytest.mark.slow
def test_fsdp_per_layer():
    losses = run_on_two("fsdp_per_layer.py", "--steps", "15")
    assert len(losses) == 15
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
@pytest.mark.skipif(
    "input_grads" not in inspect.signature(PipelineStage).parameters,
    reason="the pipelines of this PyTorch send nothing that has no gradient, as a mask",
)
def test_pipeline():
    losses = run_on_two("pipeline.py", "--steps", "15")
    assert len(losses) == 15
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_train_lightning(tmp_path):
    pytest.importorskip("lightning.pytorch")
    text = run("train_lightning.py", "--steps", "8", "--backend", "eager", "--out", str(tmp_path))
    assert re.search(r"^8 steps, loss \d", text, flags=re.MULTILINE), text
    (log,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(log.open()))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    norms = {
        int(row["step"]): float(row["attnres/total/query_norm"]) for row in rows if row["attnres/total/query_norm"]
    }
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    assert list(norms) == [2, 4, 6, 8]
    assert 0 < norms[2] < norms[8]


@pytest.mark.slow
def test_own_model(tmp_path):
    text = run("own_model.py", "--steps", "12", "--backend", "eager", "--out", str(tmp_path))
    losses = [float(loss) for loss in re.findall(r"step +\d+  loss ([\d.]+)", text)]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert difference(text, r"saved and loaded: largest difference (\S+)") == 0


@pytest.mark.slow
def test_retrofit():
    text = run("retrofit.py", "--steps", "12", "--backend", "eager")
    assert "verification passed" in text
    before = difference(text, r"trained plain: loss (\S+)")
    plain, rewritten = (difference(text, rf"gone on {which}: loss (\S+)") for which in ("plain", "rewritten"))
    assert plain < before - 0.2
    assert rewritten < before - 0.2
    # The same weights and windows, and another model.
    assert 0 < abs(rewritten - plain) < 0.2


@pytest.mark.slow
def test_compile_backend():
    text = run("compile_backend.py", "--inner", "eager")
    assert re.search(r"inner backend: \d+ nodes, 4 of them AttnRes sites", text), text
    # Logits are of size one, and inductor reorders float32 sums.
    assert difference(text, r"by object: largest difference (\S+)") < 1e-5
    assert difference(text, r"uncompiled: largest difference (\S+)") < 1e-5
    assert difference(text, r"plain residuals: largest difference (\S+)") > 0.1


@pytest.mark.slow
def test_export_onnx():
    text = run("export_onnx.py")
    assert difference(text, r"largest relative difference (\S+)") < 1e-4
    assert "logits [3, 24, 256]" in text
    assert difference(text, r"256\], (\S+) from PyTorch") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_onnx_generate(kind):
    text = run("onnx_generate.py", kind)
    runs = re.findall(r"^(.+): (\d+) tokens a second: (\[.*\])$", text, flags=re.MULTILINE)
    assert [by for by, *_ in runs] == ["PyTorch, first run", "ONNX Runtime, first run", "PyTorch", "ONNX Runtime"], text
    expected, *others = (json.loads(tokens) for *_, tokens in runs)
    assert len(expected) == 64
    assert others == [expected] * 3
    # Not one token that follows itself for ever.
    assert len(set(expected)) > 8
    assert text.endswith("the same tokens\n")


@pytest.mark.slow
def test_graph_module():
    text = run("graph_module.py")
    assert "6 layers, 12 branch outputs, 12 sites" in text
    assert difference(text, r"zero queries: (\S+) from") < 1e-3
    # A gain has no gradient while its query is zero.
    assert "gradients reach 12 AttnRes parameters" in text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_stay_short(path):
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.slow
def test_the_code_in_the_readme_runs(tmp_path, monkeypatch):
    readme = EXAMPLES.parent.joinpath("README.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (3, 40, 256)


def test_the_readme_names_everything_public():
    readme = EXAMPLES.parent.joinpath("README.md").read_text()
    errors = {name for name in attnres_rewrite.__all__ if name.endswith("Error")}
    results = {"DepthAttention", "OnnxExport", "Report", "TrainingDynamics", "Verification"}
    for name in set(attnres_rewrite.__all__) - errors - results:
        assert f"`{name}(" in readme, name


def test_every_link_in_the_readme_leads_somewhere():
    readme = EXAMPLES.parent.joinpath("README.md").read_text()
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", readme) if not target.startswith("http")]
    assert len(targets) > 5
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (EXAMPLES.parent / path).exists(), target
        headings = re.findall(r"^#+ (.*)$", (EXAMPLES.parent / path).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], target


def test_every_example_is_tested():
    tested = set(re.findall(r'run(?:_on_two)?\("(\w+\.py)"', Path(__file__).read_text()))
    # test_distributed_checkpoints.py
    tested.add("train_elastic.py")
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}
