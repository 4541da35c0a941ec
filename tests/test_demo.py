"""The demo, on a model that is small enough to finish at once, and its parts."""

import json
import math

import onnxruntime
import pytest
import torch
from rich.console import Console

from attnres_rewrite.demo import DemoResult, DemoSettings, run_demo
from attnres_rewrite.demo.corpus import Corpus, standard_library
from attnres_rewrite.demo.results import smooth
from attnres_rewrite.demo.training import Learner, build_model, make_learners, make_optimizer, train

TINY = DemoSettings(
    steps=3,
    blocks=2,
    device="cpu",
    backend="eager",
    layers=3,
    width=32,
    heads=2,
    hidden=48,
    batch=2,
    length=24,
    validation_batches=2,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "made" / "by_the_demo"
    console = Console(record=True, width=120, force_terminal=False)
    settings = DemoSettings(**{**TINY.to_dict(), "out": folder})
    return run_demo(settings, console), folder, console.export_text()


@pytest.mark.slow
def test_demo_writes_its_four_files_and_nothing_else(demo):
    _, folder, _ = demo
    names = {path.name for path in folder.iterdir()}
    assert names == {"loss.png", "depth_attention.png", "model.onnx", "results.json"}
    for name in ("loss.png", "depth_attention.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.slow
def test_demo_prints_one_table_with_every_figure(demo):
    result, _, text = demo
    for run in (result.plain, result.rewritten):
        assert f"{run.validation[-1][1]:.4f}" in text
        assert f"{run.tokens_per_second:,.0f}" in text
        assert f"{run.parameters:,}" in text
    assert f"{result.step_time_ratio:.3f}" in text
    assert f"{result.onnx_difference:.1e}" in text
    assert text.count("┏") == 1


@pytest.mark.slow
def test_demo_adds_two_vectors_a_site(demo):
    result, _, _ = demo
    sites = 2 * TINY.layers
    assert result.rewritten.parameters - result.plain.parameters == sites * 2 * TINY.width


@pytest.mark.slow
def test_demo_onnx_model_runs_on_other_sizes_and_agrees(demo):
    result, folder, _ = demo
    assert result.onnx_difference < 1e-4
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = torch.randint(256, (5, 7)).numpy()
    assert session.run(None, {"input_ids": tokens})[0].shape == (5, 7, 256)


@pytest.mark.slow
def test_demo_results_file_holds_what_was_measured(demo):
    result, folder, _ = demo
    saved = json.loads((folder / "results.json").read_text())
    assert saved["step_time_ratio"] == result.step_time_ratio
    assert saved["rewritten"]["losses"] == list(result.rewritten.losses)
    assert saved["settings"]["blocks"] == TINY.blocks
    assert "out" not in saved["settings"]


@pytest.mark.slow
def test_both_models_start_from_the_same_function(demo):
    result, _, _ = demo
    # Zero queries: AttnRes with "mean" is the plain model up to the eps of the norms, here 1e-6.
    assert result.plain.losses[0] == pytest.approx(result.rewritten.losses[0], rel=1e-3)
    assert result.plain.losses[1:] != result.rewritten.losses[1:]
    assert all(math.isfinite(loss) for loss in result.rewritten.losses)


def test_same_seed_same_losses(corpus):
    settings = DemoSettings(**{**TINY.to_dict(), "steps": 2})

    def losses() -> list[float]:
        learner = Learner(build_model(settings, CPU), settings)
        train([learner], corpus, settings, CPU, lambda step: None)
        return learner.losses

    assert losses() == losses()


def test_lock_step_gives_both_models_the_same_batches(corpus):
    seen = {"plain": [], "rewritten": []}
    learners = make_learners(TINY, CPU)
    for name, learner in zip(seen, learners, strict=True):
        step = learner.step
        learner.step = lambda batch, name=name, step=step: (seen[name].append(batch), step(batch))
    train(learners, corpus, TINY, CPU, lambda step: None)
    assert len(seen["plain"]) == TINY.steps
    assert all(one is other for one, other in zip(*seen.values(), strict=True))
    assert [step for step, _ in learners[0].validation] == [0, 1, 2, 3]


def test_only_matrices_decay():
    _, rewritten = make_learners(TINY, CPU)
    decayed, others = make_optimizer(rewritten.model, TINY).param_groups
    assert decayed["weight_decay"] == TINY.weight_decay
    assert others["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2}
    # Query and gain of 6 sites, two norms a layer and the last norm.
    assert len(others["params"]) == 2 * 6 + 2 * 3 + 1


def test_corpus_splits_by_file_and_in_a_fixed_order(tmp_path):
    for i in range(45):
        (tmp_path / f"m{i:02d}.py").write_bytes(f"x = {i:02d}\n".encode())
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_bytes(b"left out\n")
    corpus = standard_library(tmp_path)
    assert corpus.files == 45
    assert bytes(corpus.validation.tolist()) == b"x = 19\n\0x = 39\n\0"
    train_text = bytes(corpus.train.tolist())
    assert train_text.startswith(b"x = 00\n\0x = 01\n\0")
    assert train_text.count(b"\0") == 43
    assert b"x = 19" not in train_text
    assert b"left out" not in train_text


def test_corpus_of_this_machine_is_source_text(corpus):
    assert len(corpus.train) > 1_000_000
    assert 0.01 < len(corpus.validation) / len(corpus.train) < 0.2
    assert b"def __init__(self" in bytes(corpus.validation.tolist())


def test_no_sources_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is the standard library zipped"):
        standard_library(tmp_path)


def test_batches_are_windows_of_the_text(corpus):
    batches = corpus.training_batches(3, 16, seed=1)
    again = corpus.training_batches(3, 16, seed=1)
    first, second = next(batches), next(batches)
    assert first.shape == (3, 16)
    assert first.dtype == torch.int64
    assert torch.equal(first, next(again))
    assert not torch.equal(first, second)
    assert bytes(first[0].tolist()) in bytes(corpus.train.tolist())
    held_out = corpus.validation_batches(4, 3, 16)
    assert [batch.shape for batch in held_out] == [(3, 16)] * 4
    assert torch.equal(held_out[0][0], corpus.validation[:16].long())
    assert torch.equal(held_out[-1][-1], corpus.validation[-16:].long())


@pytest.mark.parametrize("field", ["steps", "layers", "batch", "length"])
def test_settings_refuse_what_cannot_be(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
        DemoSettings(**{field: 0})


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match="device 'nonsense' cannot be used: ") as caught:
        DemoSettings(device="nonsense").resolve_device()
    assert "\n" not in str(caught.value)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert DemoSettings().resolve_device().type == expected


def test_default_model_is_of_the_promised_size():
    with torch.device("meta"):
        model = build_model(DemoSettings(), torch.device("meta"))
    assert len(model.model.layers) == 8
    assert model.config.vocab_size == 256
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 8e6


def test_smoothing():
    assert smooth([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]


@pytest.mark.slow
def test_ratio_is_of_the_median_steps(demo):
    result: DemoResult = demo[0]
    assert result.step_time_ratio == result.rewritten.step_seconds / result.plain.step_seconds
    tokens = TINY.batch * TINY.length
    assert result.plain.tokens_per_second == pytest.approx(tokens / result.plain.step_seconds)


@pytest.mark.gpu
def test_demo_uses_the_gpu_by_default(tmp_path):
    settings = DemoSettings(**{**TINY.to_dict(), "device": "auto", "out": tmp_path})
    result = run_demo(settings, Console(quiet=True))
    assert result.device.startswith("cuda")
    assert result.onnx_difference < 1e-4
