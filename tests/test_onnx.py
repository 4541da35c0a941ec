"""Export to ONNX: what ONNX Runtime computes, and what happens when something is wrong."""

from pathlib import Path

import numpy
import pytest
import torch
from models import WIDTH, Tower, embeddings, gpt2, llama, randomise_sites, token_ids

import attnres_rewrite as ar
from attnres_rewrite import onnx as onnx_module

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, **inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def test_a_live_llama_with_random_queries_equals_pytorch_at_other_sizes(tmp_path: Path) -> None:
    model = randomise_sites(ar.rewrite(llama().eval(), blocks=3, backend="eager"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = ar.export_onnx(model, tmp_path / "model.onnx", {"input_ids": token_ids(2, 7)})

    assert result.sites == 10
    assert result.max_difference < 1e-5
    assert set(result.differences) == {(3, 6), (4, 3), (2, 8)}
    # Sizes that export_onnx did not try itself, compared here and not by it.
    for batch, length in ((1, 1), (5, 12)):
        ids = token_ids(batch, length, seed=batch)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        torch.testing.assert_close(run(result.path, input_ids=ids), expected, rtol=1e-5, atol=1e-5)
    # With plain residuals the answer would be another one, so the comparison could have failed.
    with ar.disabled(model), torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-2)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.use_cache


def test_an_exported_program_is_exported_as_it_is(tmp_path: Path) -> None:
    ids = token_ids(2, 7)
    program = torch.export.export(gpt2().eval(), (), {"input_ids": ids, "use_cache": False}, strict=False)
    program = ar.rewrite(program, blocks=2)
    for name, value in program.state_dict.items():
        if name.endswith(".query"):
            torch.nn.init.normal_(value)
    result = ar.export_onnx(program, tmp_path / "gpt2.onnx")
    expected = program.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(run(result.path, input_ids=ids), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def tower() -> torch.nn.Module:
    return randomise_sites(ar.rewrite(Tower(3).eval(), blocks=2, example_inputs=embeddings(), backend="eager"))


def test_a_model_in_training_is_exported_for_evaluation(tmp_path: Path) -> None:
    model = Tower(2)
    model.norm = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Dropout(0.5), torch.nn.Dropout(0.5))
    ar.rewrite(model.train(), blocks=2, example_inputs=embeddings(), backend="eager")
    model.norm[2].eval()
    result = ar.export_onnx(randomise_sites(model), tmp_path / "model.onnx", embeddings())
    assert model.training
    assert [module.training for module in model.norm] == [True, True, False]
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_aggregation_scale_and_missing_gain(tmp_path: Path, aggregation: str) -> None:
    config = ar.AttnResConfig(blocks=2, aggregation=aggregation, scale=0.5, key_gain=False)  # type: ignore[arg-type]
    model = randomise_sites(ar.rewrite(Tower(3).eval(), config=config, example_inputs=embeddings(), backend="eager"))
    result = ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    x = embeddings(3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, x=x), model(x), rtol=1e-5, atol=1e-5)


def test_a_failed_comparison_leaves_no_file(tmp_path: Path, tower: torch.nn.Module) -> None:
    with pytest.raises(ar.OnnxExportError, match=r"differs from PyTorch by .* no file was written"):
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings(), tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_sees_a_wrong_translation(
    tmp_path: Path, tower: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnres_rewrite import onnx_op

    def without_last_source(sources: list[object], *rest: object) -> object:
        return onnx_op.block_attn_res(sources[:-1], *rest)  # type: ignore[arg-type]

    table = {torch.ops.attnres.block_attn_res.default: without_last_source}
    monkeypatch.setattr(onnx_op, "translation_table", lambda: table)
    with pytest.raises(ar.OnnxExportError, match="differs from PyTorch"):
        ar.export_onnx(tower, tmp_path / "model.onnx", embeddings())


def test_a_folder_that_does_not_exist_is_an_error_before_any_work(tmp_path: Path, tower: torch.nn.Module) -> None:
    with pytest.raises(ar.OnnxExportError, match="does not exist"):
        ar.export_onnx(tower, tmp_path / "nowhere" / "model.onnx", embeddings())


def test_a_plain_model_is_an_error_that_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ar.AttnResError, match="call rewrite"):
        ar.export_onnx(Tower(2), tmp_path / "model.onnx", embeddings())
    program = torch.export.export(Tower(2), (embeddings(),))
    with pytest.raises(ar.AttnResError, match="call rewrite"):
        ar.export_onnx(program, tmp_path / "model.onnx")


def test_a_missing_package_names_the_extra(
    tmp_path: Path, tower: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript.*attnres-rewrite\[onnx\]"):
        onnx_module.export_onnx(tower, tmp_path / "model.onnx", embeddings())


def test_a_model_that_cannot_be_traced_keeps_its_state(tmp_path: Path) -> None:
    class Branching(Tower):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_exporting():
                raise RuntimeError("not for export")
            return super().forward(x)

    model = ar.rewrite(Branching(2), blocks=2, example_inputs=embeddings(), backend="eager")
    expected = model(embeddings())
    with pytest.raises(ar.OnnxExportError, match=r"cannot trace Branching: .*not for export"):
        ar.export_onnx(model, tmp_path / "model.onnx", embeddings())
    assert torch.equal(model(embeddings()), expected)
    assert list(tmp_path.iterdir()) == []
    assert numpy.isfinite(expected.detach().numpy()).all()
