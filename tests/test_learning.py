"""`benchmarks/learning.py`: a tiny study runs to its end, goes on where it was, and counts what it says it counts."""

import json
import math
import re
import shutil
import statistics
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")


@pytest.fixture
def learning(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import _learning
    import _learning_all
    import _learning_lane
    import _learning_scaling
    import _learning_study
    import _learning_time
    import _learning_trainer
    import learning

    learning.runs, learning.lane, learning.study = _learning, _learning_lane, _learning_study
    learning.trainer, learning.all, learning.timing = _learning_trainer, _learning_all, _learning_time
    learning.laws = _learning_scaling
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
    row = "| mean-2 | 0.002 | 2 | 2.5000 ± 0.7071 | -0.2000 ± 0.4243 | 0.626 | 50%, never |"
    assert row in learning.tables({"quick": found})


@pytest.mark.parametrize(
    ("t", "seeds", "p"), [(12.706, 2, 0.05), (4.303, 3, 0.05), (-2.776, 5, 0.05), (4.604, 5, 0.01)]
)
def test_p_is_that_of_the_tables_of_students_distribution(learning, t, seeds, p):
    """Runs whose differences have such a t; the critical values are those printed in any table."""
    spread = [index - (seeds - 1) / 2 for index in range(seeds)]
    mean = t * statistics.stdev(spread) / math.sqrt(seeds)
    runs = [made_up("plain", 1e-3, seed, [2.0], 2.0) for seed in range(seeds)]
    runs += [made_up("full", 1e-3, seed, [2.0], 2.0 + mean + off) for seed, off in enumerate(spread)]
    assert learning.summary(runs)["full"]["p"] == pytest.approx(p, abs=1e-4)
    assert learning.summary(runs)["plain"]["p"] is None


@pytest.mark.parametrize(
    ("study", "sizes", "learned", "looked_into"),
    [
        ("learning", ["0.4M", "0.4M, retrofit"], 13, 11),
        ("learning_cpu", ["0.06M", "0.1M", "0.1M, retrofit", "0.25M", "0.4M"], 41, 35),
    ],
)
def test_the_tables_of_the_evidence_are_those_of_the_runs(
    learning, capsys, tmp_path, study, sizes, learned, looked_into
):
    of_study = learning.RESULTS.with_name(study)
    kept = shutil.copytree(of_study, tmp_path / study)
    found = learning.report(kept)
    assert found == json.loads((of_study / "summary.json").read_text())
    assert list(found) == sizes
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| [\w]", line)]
    files = [folder / "scaling.json" for folder in (of_study, kept)]
    laws, again = (json.loads(file.read_text()) if file.exists() else {} for file in files)
    assert laws == again
    # Contestants of both stages; what is inside of those that were looked into; exponents.
    assert len(rows) == learned + looked_into + len(laws)
    page = Path(__file__).parents[1].joinpath("docs", "evidence.md").read_text()
    for row in rows:
        assert row in page, row


def test_runs_of_other_texts_are_not_compared(learning, tmp_path):
    for seed, text in enumerate(("one", "other")):
        run = made_up("plain", 1e-3, seed, [2.0], 2.0) | {"text": text}
        (tmp_path / "0.4M").mkdir(exist_ok=True)
        (tmp_path / learning.runs.Run("0.4M", "plain", 1e-3, seed).path).write_text(json.dumps(run))
    with pytest.raises(SystemExit, match=r"runs of 0\.4M \(scratch\) in .* learned different texts"):
        learning.report(tmp_path)


def test_a_machine_with_another_text_is_refused_before_it_trains(learning, monkeypatch, tmp_path):
    path = tmp_path / learning.runs.Run("0.4M", "plain", 1e-3, 0).path
    path.parent.mkdir()
    path.write_text(json.dumps(made_up("plain", 1e-3, 0, [2.0], 2.0) | {"text": "another"}))
    monkeypatch.setattr(sys, "argv", ["learning.py", "all", "--out", str(tmp_path), "--seconds", "0"])
    with pytest.raises(SystemExit, match=r"runs of 0\.4M \(scratch\) in .* learned another text than this machine"):
        learning.main()


@pytest.fixture
def laws_of(learning, capsys, tmp_path):
    """What the report makes of runs whose loss is a power of their compute: ``factor * compute ** -exponent``."""
    exponents = {"plain": (2.0, 0.05), "mean-8": (1.9, 0.06)}

    def laws(texts: dict[str, str]) -> tuple[dict | None, str]:
        for size, text in texts.items():
            compute = learning.laws.compute_of(size, parameters := 10 * learning.SIZES[size].width ** 2) / 1e15
            for name, (factor, exponent) in exponents.items():
                loss = factor * compute**-exponent
                for seed, off in enumerate((-0.01, 0.01)):
                    run = learning.runs.Run(size, name, 1e-3, seed)
                    found = made_up(name, 1e-3, seed, [loss], loss + off) | {"parameters": parameters, "text": text}
                    (tmp_path / size).mkdir(exist_ok=True)
                    (tmp_path / run.path).write_text(json.dumps(found))
        learning.report(tmp_path)
        written = tmp_path / "scaling.json"
        return json.loads(written.read_text()) if written.exists() else None, capsys.readouterr().out

    return laws


def test_three_sizes_give_the_exponent_that_their_losses_have(learning, laws_of):
    found, printed = laws_of(dict.fromkeys(("5M", "0.4M", "1.6M"), "one"))
    assert found.keys() == {"mean-8", "plain"}
    law = found["mean-8"]
    assert law["sizes"] == ["0.4M", "1.6M", "5M"]
    assert (law["factor"], law["exponent"]) == pytest.approx((1.9, 0.06), rel=1e-3)
    assert law["exponent_of_plain"] == found["plain"]["exponent"] == pytest.approx(0.05, rel=1e-3)
    assert law["off"] < 1e-4
    largest = learning.laws.compute_of("5M", 10 * 192**2) / 1e15
    assert law["plain_needs"] == pytest.approx((2.0 / (1.9 * largest**-0.06)) ** (1 / 0.05) / largest, rel=1e-2)
    assert found["plain"]["plain_needs"] == 1.0
    assert law["exponents"] == pytest.approx([0.06, 0.06], rel=1e-2)
    between = ", ".join(map(str, law["exponents"]))
    assert f"| mean-8 | 0.4M, 1.6M, 5M | 0.0600 | 0.0500 | {between} | 0.0% | {law['plain_needs']:.2f}x |" in printed


def test_compute_is_that_of_matrices_and_attention(learning):
    # 1000 steps of 16 x 128 tokens; 8 layers, width 64, an embedding of 256 x 64.
    assert learning.laws.compute_of("0.4M", 422_976) == 2_048_000 * (6 * (422_976 - 16_384) + 12 * 8 * 64 * 128)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"0.4M": "one"}, "Loss against compute: runs of 0.4M. An exponent takes 3 sizes."),
        (dict.fromkeys(("0.4M", "5M"), "one"), "runs of 0.4M, 5M. An exponent takes 3 sizes."),
        ({"0.4M": "one", "1.6M": "one", "5M": "two"}, "learned different texts, so there is no exponent"),
    ],
)
def test_sizes_that_give_no_exponent_say_so(laws_of, texts, said):
    found, printed = laws_of(texts)
    assert found is None
    assert said in printed


def test_step_times_are_compared_round_by_round(learning, monkeypatch):
    class Trainer:
        def __init__(self, contestant, *_):
            self.lanes, self.added = [self], {}
            self.seconds = iter({"plain": [1.0, 2.0, 4.0], "mean-2": [1.5, 2.0, 8.0]}[contestant])

        def compile(self):
            pass

        def begin(self, values):
            pass

    monkeypatch.setattr(learning.timing, "Trainer", Trainer)
    monkeypatch.setattr(learning.timing, "_seconds", lambda lane: next(lane.seconds))
    found = learning.timing.step_times("quick", ["plain", "mean-2"], learning.runs.torch.device("cpu"), rounds=3)
    assert found["steps"] == {
        "plain": {"seconds": 2.0, "ratio": [1.0, 1.0, 1.0]},
        "mean-2": {"seconds": 2.0, "ratio": [1.0, 1.5, 2.0]},
    }


@pytest.mark.slow
def test_a_step_that_is_timed_trains(learning):
    trainer = learning.trainer.Trainer("plain", learning.runs.SIZES["quick"], learning.runs.torch.device("cpu"))
    trainer.compile()
    lane = trainer.lanes[0]
    lane.begin(trainer.added)
    before = [weight.clone() for weight in lane.weights]
    assert learning.timing._seconds(lane) > 0
    assert not any(learning.runs.torch.equal(*pair) for pair in zip(before, lane.weights, strict=True))


def test_the_sweep_goes_on_while_the_best_rate_is_at_an_end(learning, monkeypatch, tmp_path):
    class Trainer:
        at_once = 3

        def train(self, runs, text, **settings):
            trained.append(len(runs))
            return [
                learning.trainer.Trained(made_up("plain", r.rate, r.seed, [abs(r.rate - 6e-3)], 1.0), {}) for r in runs
            ]

    trained = []
    study = learning.Study("0.4M", tmp_path, tmp_path, learning.runs.torch.device("cpu"), float("inf"))
    study.texts["scratch"], study.trainers["plain"] = object(), Trainer()
    monkeypatch.setitem(
        learning.SIZES, "0.4M", learning.runs.Size(2, 32, 2, 32, steps=4, rates=(5e-4, 1e-3, 2e-3, 3e-3))
    )
    study.sweep("plain")
    assert sorted(study.losses("plain")) == [5e-4, 1e-3, 2e-3, 3e-3, 6e-3, 12e-3]
    # Four that are wanted, no more than three at once; then one after the other.
    assert trained == [2, 2, 1, 1]


def test_text_that_is_held_out_is_in_no_training_batch(learning):
    text = learning.runs.read_text()
    parts = [bytes(part.tolist()) for part in (text.train.train, text.validation.validation, text.test.validation)]
    for held_out in parts[1:]:
        files = [file for file in held_out.split(b"\0") if len(file) > 200]
        assert len(files) > 5
        assert not any(file in parts[0] for file in files)
    assert parts[1] != parts[2]


@pytest.mark.slow
def test_a_study_in_small(learning, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["learning.py", "--quick", "--contestants", "plain", "mean-2"])
    monkeypatch.setattr(learning.study, "ATTNRES_RATES", (1.0, 100.0))
    learning.main()
    printed = capsys.readouterr().out
    assert "**quick, retrofit**" in printed
    assert "| mean-2, sites at 100x | 0.002 | 2 |" in printed


class Replay:
    def __init__(self, call):
        self.replay = call


@pytest.mark.slow
@pytest.mark.parametrize("with_graphs", [False, True])
def test_runs_side_by_side_are_those_that_run_alone(learning, with_graphs):
    runs, text = learning.runs, learning.runs.read_text()
    size, cpu = runs.SIZES["quick"], runs.torch.device("cpu")
    trainer = learning.trainer.Trainer("mean-2", size, cpu)
    trainer.compile(3)
    if with_graphs:
        # What a captured step does, without a GPU: the loss is where it was captured, gradients stay in place.
        for lane in trainer.lanes:
            backward = Replay(lambda lane=lane: lane.loss.copy_(lane._backward()))
            lane.graphs = backward, Replay(lane._update)
        assert trainer.compare() == 0
        trainer.lanes[1].weights = trainer.lanes[0].weights
        assert trainer.compare() > 1e-4
        trainer.lanes[1].weights = [w.clone() for w in trainer.lanes[0].weights]
    asked = [
        runs.Run("quick", "mean-2", 4e-3, 0),
        runs.Run("quick", "mean-2", 4e-3, 1),
        runs.Run("quick", "mean-2", 4e-3, 0, attnres_rate=100.0),
    ]
    together = [trained.result for trained in trainer.train(asked, text)]
    fresh = learning.trainer.Trainer("mean-2", size, cpu)
    for run, found in zip(asked[::-1], together[::-1], strict=True):
        alone = fresh.train([run], text)[0].result
        assert (alone["curve"], alone["test"]) == (found["curve"], found["test"])
    assert len({found["test"] for found in together}) == 3


def test_weights_of_another_model_are_gone_on_from(learning):
    runs = learning.runs
    trainer = learning.trainer.Trainer("plain", runs.SIZES["quick"], runs.torch.device("cpu"))
    first = {name: p + 1 for name, p in trainer.model.named_parameters()}
    run = runs.Run("quick", "plain", 0.0, 0, "retrofit")
    (trained,) = trainer.train([run], runs.read_text(), weights=first)
    assert trained.result["size"]["steps"] == 2
    for name, weight in trained.weights.items():
        assert runs.torch.equal(weight, first[name]), name


def test_processes_are_started_in_order_and_what_they_wrote_is_packed(learning, tmp_path):
    jobs = learning.all.in_order("0.4M", "5M-short", ["mhc-4", *learning.all.ORDER[:8]])
    assert [job[:2] for job in jobs[5:10]] == [
        ("0.4M", "full"),
        ("5M-short", "plain"),
        ("5M-short", "mean-8"),
        ("5M-short", "add-8"),
        ("0.4M", "mean-8-gate"),
    ]
    assert {job[2] for job in jobs if job[0] == "5M-short"} == {"scratch"}
    ran = {("0.4M", name) for name in learning.all.ORDER[:5]}
    jobs = learning.all.in_order("0.4M", "5M-short", learning.all.ORDER, ran)
    # The plain model, which others go on from, is the first of those that have runs.
    missing = [*learning.all.ORDER[5:], "plain"]
    assert [job[1] for job in jobs if job[0] == "0.4M"][:7] == missing
    assert [job[1] for job in jobs if job[0] == "5M-short"] == list(learning.all.ORDER)
    (tmp_path / "runs" / "0.4M").mkdir(parents=True)
    (tmp_path / "runs" / "0.4M" / "run.json").write_text("{}")
    (tmp_path / "runs" / "0.4M" / "run.json.part").write_text("{")
    for _ in range(2):
        learning.all.pack_folder(tmp_path / "runs", tmp_path / "runs" / "packed.tar.gz")
    with tarfile.open(tmp_path / "runs" / "packed.tar.gz") as archive:
        assert archive.getnames() == ["runs/0.4M/run.json"]


@pytest.mark.slow
def test_an_interrupted_run_goes_on(learning, monkeypatch, tmp_path):
    runs, text = learning.runs, learning.runs.read_text()
    run = runs.Run("quick", "mean-2", 4e-3, 0)
    monkeypatch.setattr(learning.trainer, "LOOKS", (0.0, 1.0))
    trainer = learning.trainer.Trainer("mean-2", runs.SIZES["quick"], runs.torch.device("cpu"))
    (whole,) = trainer.train([run], text, work=tmp_path, look=True)

    step, done = learning.lane.Lane.step, []

    def interrupted(lane, batch, rates):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(step(lane, batch, rates))

    monkeypatch.setattr(learning.lane.Lane, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train([run], text, work=tmp_path, look=True)
    steps = []
    monkeypatch.setattr(learning.lane.Lane, "step", lambda lane, *inputs: steps.append(step(lane, *inputs)))
    (again,) = trainer.train([run], text, work=tmp_path, look=True)
    assert len(steps) == 2
    for name in ("curve", "test", "looks"):
        assert again.result[name] == whole.result[name], name
    assert [look["part"] for look in whole.result["looks"]] == [0.0, 1.0]
    assert not list(tmp_path.rglob("*.pt"))
