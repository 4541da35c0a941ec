"""`benchmarks/learning.py`: a tiny study runs to its end, goes on where it was, and counts what it says it counts."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")


@pytest.fixture
def learning(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import _learning
    import learning

    learning.runs = _learning
    return learning


def made_up(contestant: str, rate: float, seed: int, curve: list[float], test: float | None = None) -> dict:
    ended = curve[-1] if test is not None else None
    return {
        "run": {"size": "quick", "contestant": contestant, "rate": rate, "seed": seed},
        "parameters": 1,
        "curve": [[100 * (i + 1), loss] for i, loss in enumerate(curve)],
        "validation": ended,
        "test": test,
        "looks": [],
    }


def test_every_contestant_is_judged_at_its_own_best_rate_seed_by_seed(learning):
    runs = [
        made_up("plain", 1e-3, 0, [4.0, 3.0, 2.0], 2.5),
        made_up("plain", 2e-3, 0, [9.0], None),
        made_up("plain", 1e-3, 1, [4.0, 3.0, 2.2], 2.9),
        made_up("mean-2", 1e-3, 0, [4.0, 3.0, 2.4], 2.1),
        made_up("mean-2", 2e-3, 0, [3.0, 1.0, 0.5], 2.0),
        made_up("mean-2", 2e-3, 1, [4.0, 3.0, 2.3], 3.0),
    ]
    found = learning.summary(runs)
    assert found["plain"]["rate"] == 1e-3
    assert found["plain"]["rates"] == {"0.001": 2.0, "0.002": None}
    assert found["mean-2"]["rate"] == 2e-3
    assert found["mean-2"]["seeds"] == 2
    assert found["mean-2"]["difference"] == pytest.approx([(2.0 - 2.5 + 3.0 - 2.9) / 2, 0.42426], abs=1e-5)
    # From 3.0 at 100 tokens to 1.0 at 200: 2.0 is reached at 150 of 300. The other seed never comes to 2.2.
    assert found["mean-2"]["tokens_to_plain"] == [0.5, None]
    row = "| mean-2 | 0.002 | 2 | 2.5000 ± 0.7071 | -0.2000 ± 0.4243 | 50%, never |"
    assert row in learning.tables({"quick": found})


def test_the_sweep_goes_on_while_the_best_rate_is_at_an_end(learning, monkeypatch, tmp_path):
    def train(run, text, device, folder, work, *, look, weights):
        found = made_up(run.contestant, run.rate, run.seed, [abs(run.rate - 6e-3)], 1.0)
        (folder / run.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / run.path).write_text(json.dumps(found))
        return found

    monkeypatch.setattr(learning, "train", train)
    study = learning.Study("0.4M", tmp_path, tmp_path, None, float("inf"))
    study.texts["scratch"] = object()
    monkeypatch.setitem(learning.SIZES, "0.4M", learning.runs.Size(2, 32, 2, 32, steps=4, rates=(1e-3, 2e-3)))
    study.sweep("plain")
    assert sorted(study.losses("plain")) == [1e-3, 2e-3, 4e-3, 8e-3]


def test_text_that_is_held_out_is_in_no_training_batch(learning):
    text = learning.runs.read_text()
    parts = [bytes(part.tolist()) for part in (text.train.train, text.validation.validation, text.test.validation)]
    for held_out in parts[1:]:
        files = [file for file in held_out.split(b"\0") if len(file) > 200]
        assert len(files) > 5
        assert not any(file in parts[0] for file in files)
    assert parts[1] != parts[2]


@pytest.mark.slow
def test_a_study_in_small_and_a_run_that_was_interrupted(learning, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["learning.py", "--quick", "--contestants", "plain", "mean-2"])
    monkeypatch.setattr(learning, "ATTNRES_RATES", (1.0, 100.0))
    learning.main()
    printed = capsys.readouterr().out
    assert "**quick, retrofit**" in printed
    assert "| mean-2, sites at 100x | 0.002 | 2 |" in printed

    runs, text = learning.runs, learning.runs.read_text()
    run = runs.Run("quick", "mean-2", 4e-3, 0)
    monkeypatch.setattr(runs, "LOOKS", (0.0, 1.0))
    whole = runs.train(run, text, runs.torch.device("cpu"), tmp_path / "whole", tmp_path, look=True)

    step = runs._step

    def interrupted(call, optimizer, batch, run, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(call, optimizer, batch, run, number)

    monkeypatch.setattr(runs, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.train(run, text, runs.torch.device("cpu"), tmp_path / "again", tmp_path, look=True)
    monkeypatch.setattr(runs, "_step", step)
    again = runs.train(run, text, runs.torch.device("cpu"), tmp_path / "again", tmp_path, look=True)
    for name in ("curve", "test", "looks"):
        assert again[name] == whole[name], name
    assert [look["part"] for look in whole["looks"]] == [0.0, 1.0]
