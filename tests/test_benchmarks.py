"""The bookkeeping of `benchmarks/end_to_end.py`: what was interrupted goes on, and no figure is lost or mixed up.

Nothing is measured here: the figures are made up.
"""

import json
import sys
from pathlib import Path

import pytest

from attnres_rewrite.bench import BenchResult, StepTimes

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GRID_OF_TWO = ["--grid", "--layers", "6", "--width", "256", "--length", "128", "512"]


@pytest.fixture
def end_to_end(monkeypatch, tmp_path):
    """The script as a module, with the commit to say and a list of what it would have measured."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import end_to_end

    class Script:
        commit: str | None = "one"
        measured: list[tuple[int, tuple[str, ...]]]
        cannot: tuple[str, ...] = ()
        ratio = 1.0
        out = tmp_path / "end_to_end.json"

        def run(self, *arguments: str) -> list[tuple[int, tuple[str, ...]]]:
            self.measured = []
            monkeypatch.setattr(sys, "argv", ["end_to_end.py", *arguments, "--out", str(self.out)])
            end_to_end.main()
            return self.measured

        @property
        def sizes(self) -> list[dict]:
            return json.loads(self.out.read_text())["sizes"]

        def measure(self, size, settings, *, alone):
            kinds = tuple(kind for kind in end_to_end.KINDS if getattr(settings, kind))
            self.measured.append((size["length"], kinds))
            times = {kind: StepTimes((1.0,), (self.ratio,)) for kind in kinds if kind not in self.cannot}
            skipped = {kind: "not this one" for kind in kinds if kind in self.cannot}
            forms = {"plain": 1, "rewritten": 2}
            cached = 5 if "decode" in times else None
            return BenchResult("Model", forms, {}, cached, "cpu", settings, times, skipped, environment={})

    script = Script()
    monkeypatch.setattr(end_to_end, "environment", lambda: {"commit": script.commit})
    monkeypatch.setattr(end_to_end, "measure_apart", script.measure)
    return script


def test_kinds_of_step_measured_apart_are_kept_together(end_to_end):
    assert end_to_end.run(*GRID_OF_TWO, "--kinds", "decode") == [(128, ("decode",)), (512, ("decode",))]
    assert end_to_end.run(*GRID_OF_TWO, "--kinds", "training") == [(128, ("training",)), (512, ("training",))]
    assert [set(size["times"]) for size in end_to_end.sizes] == [{"training", "decode"}] * 2
    assert [size["cached"] for size in end_to_end.sizes] == [5, 5]


def test_what_was_interrupted_goes_on_where_it_was(end_to_end):
    end_to_end.run(*GRID_OF_TWO[:-1], "--kinds", "training")
    assert end_to_end.run(*GRID_OF_TWO) == [(128, ("inference", "decode")), (512, ("training", "inference", "decode"))]
    assert end_to_end.run(*GRID_OF_TWO) == []


@pytest.mark.parametrize("commit", ["two", "one-dirty", None])
def test_another_tree_is_measured_again(end_to_end, commit):
    end_to_end.run(*GRID_OF_TWO, "--kinds", "training")
    end_to_end.commit, end_to_end.ratio = commit, 2.0
    assert len(end_to_end.run(*GRID_OF_TWO, "--kinds", "training")) == 2
    assert [size["times"]["training"]["ratio"] for size in end_to_end.sizes] == [2.0, 2.0]
    assert [size["times"]["training"]["commit"] for size in end_to_end.sizes] == [commit, commit]


def test_a_step_that_could_not_run_says_so_until_it_can(end_to_end):
    end_to_end.cannot = ("decode",)
    end_to_end.run(*GRID_OF_TWO, "--kinds", "decode")
    end_to_end.run(*GRID_OF_TWO, "--kinds", "training")
    assert [(set(size["times"]), set(size["skipped"])) for size in end_to_end.sizes] == [({"training"}, {"decode"})] * 2
    end_to_end.cannot = ()
    assert end_to_end.run(*GRID_OF_TWO) == [(length, ("inference", "decode")) for length in (128, 512)]
    assert [size["skipped"] for size in end_to_end.sizes] == [{}, {}]
