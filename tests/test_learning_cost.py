"""`benchmarks/learning_cost.py`: everything runs in small, what is known is skipped, and the table is the file's."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import _learning_cost
    import learning_cost

    learning_cost.figures = _learning_cost
    return learning_cost


@pytest.fixture
def measured(cost, monkeypatch, tmp_path):
    """The script, run with these arguments and made-up figures: what it would have measured."""
    asked = []

    def measure(size, contestant, part, rounds):
        asked.append((size, contestant, part))
        moved, parameters = {"plain": (27.0, 400_000), "mean-8": (32.5, 402_000)}[contestant]
        step = {"plain_ms": 2.0, "ms": 3.0, "ratio": 1.5, "ratio_p10": 1.25, "ratio_p90": 1.75, "rounds": 24}
        return {"parameters": parameters} | {
            "moved": {"tensors": {"forward": moved, "forward+backward": 2 * moved}},
            "times": {"steps": {"training": step}, "skipped": {"decode": "not this one"}},
        }[part]

    def run(*arguments: str) -> list[tuple[str, str, str]]:
        asked.clear()
        argv = ["learning_cost.py", "--sizes", "0.4M", "--out", str(tmp_path / "cost.json"), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        cost.main()
        return list(asked)

    monkeypatch.setattr(cost, "measure", measure)
    monkeypatch.setattr(cost, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return run


def test_parts_that_the_file_has_are_skipped_until_the_programs_change(cost, measured, monkeypatch, tmp_path):
    assert measured("--contestants", "mean-8", "--parts", "moved") == [("0.4M", "mean-8", "moved")]
    both = ["--contestants", "plain", "mean-8"]
    assert measured(*both) == [("0.4M", "plain", "moved"), ("0.4M", "plain", "times"), ("0.4M", "mean-8", "times")]
    assert measured(*both) == []
    environment = cost.environment()
    monkeypatch.setattr(cost, "environment", lambda: environment | {"sources": "others"})
    assert measured(*both, "--parts", "times") == [("0.4M", "plain", "times"), ("0.4M", "mean-8", "times")]
    entries = json.loads((tmp_path / "cost.json").read_text())["sizes"]["0.4M"]
    assert {part: entries["mean-8"][part]["sources"] for part in cost.PARTS} == {
        "moved": environment["sources"],
        "times": "others",
    }


def test_the_residual_of_a_model_is_what_the_plain_one_does_not_move(cost, measured, capsys, tmp_path):
    measured("--contestants", "mean-8", "plain")
    (tmp_path / "summary.json").write_text(json.dumps({"0.4M": {"mean-8": {"difference": [-0.0409, 0.02]}}}))
    capsys.readouterr()
    measured("--table")
    printed = capsys.readouterr().out
    assert "| mean-8 | +0.5% | 1.50 (1.25 to 1.75) | – | – | 8.5 | 17.0 | -0.041 |" in printed
    assert "| plain | +0.0% | 1.50 (1.25 to 1.75) | – | – | 3.0 | 6.0 | – |" in printed
    skipped = json.loads((tmp_path / "cost.json").read_text())["sizes"]["0.4M"]["plain"]["times"]["skipped"]
    assert skipped == {"decode": "not this one"}


def test_the_table_of_the_evidence_is_that_of_the_file(cost):
    page = Path(__file__).parents[1].joinpath("docs", "evidence.md").read_text()
    learned = json.loads((cost.RESULTS / "summary.json").read_text())
    for size, entries in cost.read(cost.RESULTS / "cost.json")["sizes"].items():
        for row in cost.table(entries, learned.get(size, {})).splitlines():
            assert row in page, row


@pytest.mark.slow
def test_every_kind_of_step_is_timed_in_small(cost, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["learning_cost.py", "--quick"])
    cost.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| mean-2 |"))
    parameters, *times, forward, both, loss = row.split(" | ")[1:]
    assert parameters.startswith("+")
    assert all(float(figure.split()[0]) > 0 for figure in times)
    assert (forward, both, loss) == ("–", "–", "– |")


@pytest.mark.slow
def test_a_step_of_every_kind_does_what_it_says(cost):
    figures, size = cost.figures, cost.SIZES["quick"]
    plain, other = (figures.Form.make(name, size) for name in ("plain", "mean-2"))
    whole = other.prefill()().logits
    assert whole.shape == (size.batch, size.length, 256)
    # The queries are no zeros: the rewritten model is another function.
    assert (whole - plain.prefill()().logits).abs().max() > 1e-3
    # The last token of a batch: every step finds the cache as the first did.
    decode = plain.decode(plain)
    first, again = decode().logits, decode().logits
    assert first.shape == (size.batch, 1, 256)
    assert torch.equal(first, again)
    before = [weight.clone() for weight in other.model.parameters()]
    other.training()()
    assert all(torch.equal(*pair) for pair in zip(before, other.model.parameters(), strict=True))


@pytest.mark.slow
def test_kernels_that_do_nothing_move_what_compiled_ones_do(cost, monkeypatch):
    size = dataclasses.replace(cost.SIZES["quick"], layers=1, backend="inductor")
    counted = cost.figures.moved_tensors("plain", size)
    monkeypatch.setattr(cost.figures, "_kernels_that_do_nothing", contextlib.nullcontext)
    assert cost.figures.moved_tensors("plain", size) == counted
    assert 3 < counted["tensors"]["forward"] < counted["tensors"]["forward+backward"] / 2
