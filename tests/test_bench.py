"""`attnres bench` and its measuring core: what is compared, and what is said of it.

No test looks at how long anything took.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_cli import main, make_mlp, make_rewritten_llama, tiny_config
from torch import nn
from typer.testing import CliRunner

from attnres_rewrite import (
    AttnResError,
    BlockPartitionError,
    ExampleInputsError,
    NoResidualStreamError,
    UnsupportedResidualError,
    attnres_parameters,
    cli,
    disabled,
)
from attnres_rewrite.bench import (
    FORMS,
    Alone,
    BenchResult,
    BenchSettings,
    FormAlone,
    StepTimes,
    alone,
    compare,
    measure_alone,
    run_alone,
    timing,
)
from attnres_rewrite.bench.forms import make_bench, randomise_queries, timed_passes
from attnres_rewrite.bench.workload import CannotDecode, make_workload

CHEAP = {"blocks": 2, "batch": 2, "length": 6, "rounds": 5, "warmup": 2, "device": "cpu", "backend": "eager"}


@pytest.fixture(autouse=True)
def kept(monkeypatch) -> list[bool]:
    """Calls that would change the allocator of the process in which all tests run."""
    calls: list[bool] = []

    def keep_freed_memory() -> bool:
        calls.append(True)
        return True

    monkeypatch.setattr(timing, "keep_freed_memory", keep_freed_memory)
    return calls


def cheap(**others) -> BenchSettings:
    return BenchSettings(**{**CHEAP, **others})


def make_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(tiny_config(LlamaConfig, layers=2))


class Vision(nn.Module):
    """A model of one tensor of floats, without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


def make_vision() -> tuple[nn.Module, torch.Tensor]:
    return Vision(), torch.ones(3, 5, 8)


class Tokens(Vision):
    """The same over tokens that it embeds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(self.embedding(ids))


class TestSettings:
    def test_round_trip(self):
        settings = cheap(dtype="bfloat16", seconds=1.5, decode=True)
        assert BenchSettings.from_json(settings.to_json()) == settings

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rounds": 0}, "rounds must be at least 1, not 0"),
            ({"length": -1}, "length must be at least 1, not -1"),
            ({"warmup": 0}, "warmup must be at least 1, not 0: the first round compiles"),
            ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, not 'float8'"),
            ({"backend": "nonsense"}, "there is no backend 'nonsense'"),
            ({"schedule": "sometimes"}, "schedule must be one of"),
            ({"training": False, "inference": False}, "nothing to measure"),
            ({"blocks": 0}, "blocks must be a positive integer"),
        ],
    )
    def test_values_outside_their_range_are_told(self, fields, message):
        with pytest.raises(ValueError, match=message):
            BenchSettings(**fields)

    def test_a_device_that_is_not_there(self):
        with pytest.raises(ValueError, match="device 'nonsense' cannot be used"):
            BenchSettings(device="nonsense").resolve_device()

    def test_kinds(self):
        assert BenchSettings().kinds == ("training", "inference")
        assert BenchSettings(training=False, decode=True).kinds == ("inference", "decode")

    def test_schedule_and_blocks_reach_the_configuration(self):
        config = BenchSettings(blocks="full", schedule="per_read").config()
        assert (config.blocks, config.schedule) == ("full", "per_read")


class TestWorkload:
    def test_tokens_of_the_size_asked_for(self):
        model = make_llama()
        workload = make_workload(model, None, cheap(batch=3, length=7))
        assert workload.sizes == {"0": [3, 7]} or workload.sizes == {"input_ids": [3, 7]}
        assert workload.labels.shape == (3, 7)
        assert workload.labels.max() < 64
        # The cache that the model would make, and nobody reads, is no part of the step.
        assert workload.call.kwargs["use_cache"] is False
        assert "use_cache" not in workload.example_inputs

    def test_sizes_that_nobody_chose(self):
        settings = cheap(batch=None, length=None)
        (size,) = make_workload(make_llama(), None, settings).sizes.values()
        assert size == [2, 256]
        from transformers import GPT2Config, GPT2LMHeadModel

        few = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=9))
        (size,) = make_workload(few, None, settings).sizes.values()
        assert size == [2, 9]

    def test_example_inputs_keep_their_size_and_masks_are_of_ones(self):
        given = {"input_ids": torch.arange(8).reshape(1, 8), "attention_mask": torch.zeros(1, 8, dtype=torch.long)}
        given["attention_mask"][0, 4:] = 1
        model = make_llama()
        kept = make_workload(model, given, cheap(batch=None, length=None))
        assert torch.equal(kept.example_inputs["attention_mask"], given["attention_mask"])
        resized = make_workload(model, given, cheap(batch=4, length=None))
        assert resized.sizes == {"input_ids": [4, 8], "attention_mask": [4, 8]}
        assert resized.example_inputs["attention_mask"].all()

    def test_a_model_without_labels_has_another_loss(self):
        workload = make_workload(Tokens(), torch.zeros(2, 3, dtype=torch.long), cheap())
        assert workload.labels is None
        assert workload.sizes == {"0": [2, 6]}
        assert workload.call.args[0].max() < 11

    def test_floats_take_the_dtype_of_the_model(self):
        model, inputs = make_vision()
        settings = cheap(batch=None, length=None, dtype="bfloat16")
        workload = make_workload(model.bfloat16(), inputs, settings)
        assert workload.call.args[0].dtype == torch.bfloat16

    def test_a_size_for_inputs_without_tokens_is_refused(self):
        model, inputs = make_vision()
        with pytest.raises(ExampleInputsError, match=r"batch=2 and length=6 are for models of tokens.*Vision hold no"):
            make_workload(model, inputs, cheap())

    def test_more_tokens_than_positions_are_told(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        few = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=4))
        with pytest.raises(ExampleInputsError, match=r"GPT2LMHeadModel does not run on inputs of sizes \[2, 6\]"):
            make_workload(few, None, cheap())


class TestForms:
    def test_both_forms_are_one_model_but_for_the_queries(self):
        bench = make_bench(make_llama, cheap(), FORMS)
        plain, rewritten = (bench.models[form].eval() for form in FORMS)
        added = dict(attnres_parameters(rewritten))
        assert plain is not rewritten
        assert not any(attnres_parameters(plain))
        assert bench.blocks == (2,)
        assert len(added) == 2 * 4
        shared = {name: p for name, p in rewritten.named_parameters() if name not in added}
        for name, parameter in plain.named_parameters():
            assert torch.equal(parameter, shared.pop(name))
        assert not shared
        call = bench.workload.call
        with torch.no_grad():
            expected, found = call.run(plain).logits, call.run(rewritten).logits
            with disabled(rewritten):
                switched_off = call.run(rewritten).logits
        torch.testing.assert_close(switched_off, expected)
        assert not torch.allclose(found, expected, rtol=1e-3)

    def test_queries_are_random_and_gains_are_not(self):
        model, _ = make_rewritten_llama()
        randomise_queries(model)
        for name, parameter in attnres_parameters(model):
            assert (parameter == 1).all() if name.endswith("gain") else (parameter != 0).all()

    def test_a_step_of_training_changes_every_parameter_of_both_forms(self):
        bench = make_bench(make_llama, cheap(), FORMS)
        for form, step in bench.steps("training").items():
            model = bench.models[form]
            assert model.training
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            step()
            assert all(p.grad is None for p in model.parameters())
            # Not all rows of the embedding are read.
            assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]

    def test_every_step_of_decoding_sees_the_same_cache(self):
        bench = make_bench(make_llama, cheap(cached=4), FORMS)
        for form, step in bench.steps("decode").items():
            assert not bench.models[form].training
            first, second = step(), step()
            assert first.logits.shape == (2, 1, 64)
            assert not first.logits.requires_grad
            assert torch.equal(first.logits, second.logits)
            assert second.past_key_values.get_seq_length() == 5

    def test_decoding_goes_on_where_the_prompt_ended(self):
        bench = make_bench(make_llama, cheap(cached=4), ("plain",))
        found = bench.steps("decode")["plain"]().logits
        # The same random numbers as those that the prompt is made of.
        torch.manual_seed(0)
        tokens = torch.randint(64, (2, 5))
        with torch.no_grad():
            torch.testing.assert_close(found[:, -1], bench.plain.forward(input_ids=tokens).logits[:, -1])

    @pytest.mark.parametrize(
        ("make", "reason"), [(make_vision, "the forward of Vision takes no input_ids, past_key_values, use_cache")]
    )
    def test_a_model_that_cannot_decode_says_why(self, make, reason):
        bench = make_bench(make, cheap(batch=None, length=None), ("plain",))
        with pytest.raises(CannotDecode, match=reason):
            bench.steps("decode")

    def test_passes_are_timed_once_a_graph(self):
        from attnres_rewrite.forms import backend

        original = backend.rewrite_captured
        bench = make_bench(make_llama, cheap(), ("rewritten",))
        (step,) = bench.steps("inference").values()
        with timed_passes() as seconds:
            step()
            step()
        assert len(seconds) == 1
        assert seconds[0] > 0
        assert backend.rewrite_captured is original

    @pytest.mark.parametrize(
        ("make", "settings", "error"),
        [
            (make_mlp, {"batch": None, "length": None}, NoResidualStreamError),
            (make_rewritten_llama, {}, UnsupportedResidualError),
            (make_llama, {"blocks": 9}, BlockPartitionError),
        ],
    )
    def test_models_that_are_refused(self, make, settings, error):
        with pytest.raises(error):
            make_bench(make, cheap(**settings), FORMS)


class TestTiming:
    def test_forms_take_turns_and_the_first_one_changes(self):
        order = []
        steps = {form: (lambda form=form: order.append(form[0])) for form in FORMS}
        times = timing.interleave(steps, torch.device("cpu"), rounds=4)
        assert "".join(order) == "prrpprrp"
        assert len(times.plain) == len(times.rewritten) == 4
        assert times.recompiled == 0

    @pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (1e9, 12), (None, 12)])
    def test_the_time_that_there_is_decides_how_many_rounds(self, seconds, rounds):
        steps = dict.fromkeys(FORMS, lambda: None)
        assert len(timing.interleave(steps, torch.device("cpu"), rounds=12, seconds=seconds).ratios) == rounds

    def test_what_is_compiled_in_timed_rounds_is_counted(self):
        sizes = iter(range(1, 9))
        double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
        steps = {"plain": lambda: double(torch.ones(next(sizes))), "rewritten": lambda: None}
        assert timing.interleave(steps, torch.device("cpu"), rounds=3).recompiled == 3

    def test_threads_are_those_asked_for_and_then_those_of_before(self):
        before = torch.get_num_threads()
        with timing.cpu_threads(before + 1):
            assert torch.get_num_threads() == before + 1
        assert torch.get_num_threads() == before

    def test_the_figures_that_stand_for_all_rounds(self):
        times = StepTimes(plain=(1.0,) * 11, rewritten=tuple(1 + i / 10 for i in range(11)))
        assert times.plain_ms == 1000
        assert times.rewritten_ms == times.ratio * 1000 == 1500
        assert times.spread == pytest.approx((1.1, 1.9))
        # A round that was slow for both is none in which the ratio is another.
        times = StepTimes(plain=(1.0, 10.0, 2.0), rewritten=(1.5, 15.0, 3.0), recompiled=2)
        assert times.ratio == 1.5
        assert times.spread == (1.5, 1.5)
        told = times.to_dict()
        assert (told["ratio_of_medians"], told["rounds"], told["recompiled"]) == (1.5, 3, 2)
        assert StepTimes((2.0,), (3.0,)).spread == (1.5, 1.5)


class TestCompare:
    @pytest.mark.slow
    def test_a_language_model(self, kept):
        told = []
        # Every kind of step compiles a graph of each form, all of one function; none may be left to run as written.
        with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            result = compare(make_llama, cheap(decode=True, cached=4, threads=1), progress=told.append)
        assert result.model == "LlamaForCausalLM"
        assert list(result.times) == ["training", "inference", "decode"]
        assert all(len(times.ratios) == 5 and times.recompiled == 0 for times in result.times.values())
        assert (result.skipped, result.cached, result.alone, result.device) == ({}, 4, None, "cpu")
        assert result.parameters["rewritten"] - result.parameters["plain"] == 4 * 2 * 16
        assert result.environment["threads"] == 1
        assert result.environment["freed_memory_kept"]
        assert kept == [True]
        assert len(told) == 4
        assert json.loads(json.dumps(result.to_dict()))["times"]["decode"]["rounds"] == 5

    def test_a_model_without_tokens_decodes_nothing_and_says_so(self):
        result = compare(make_vision, cheap(batch=None, length=None, decode=True, seconds=0.0, rounds=99))
        assert list(result.times) == ["training", "inference"]
        assert result.sizes == {"0": [3, 5, 8]}
        assert result.notes() == [
            "no decode steps: the forward of Vision takes no input_ids, past_key_values, use_cache"
        ]
        assert [len(times.ratios) for times in result.times.values()] == [5, 5]

    @pytest.mark.slow
    def test_with_inductor(self):
        result = compare(make_llama, cheap(backend="inductor", training=False, decode=True, dtype="bfloat16"))
        assert list(result.times) == ["inference", "decode"]
        assert not any(times.recompiled for times in result.times.values())


class TestAlone:
    @pytest.mark.parametrize("form", FORMS)
    def test_a_form_in_this_process(self, form):
        found = measure_alone(make_llama, form, cheap(decode=True))
        assert list(found.kinds) == ["training", "inference"]
        assert (found.rewrite_s > 0) == (form == "rewritten")
        for figures in found.kinds.values():
            assert (figures.passes_s > 0) == (form == "rewritten")
        assert FormAlone.from_dict(json.loads(json.dumps(_plain_data(found)))) == found

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux measures the resident set for a stretch of time")
    def test_peak_memory_is_what_a_step_needs_for_a_moment(self):
        size = 64
        before, peak = alone.peak_memory(lambda: torch.ones(size * 2**18).sum(), torch.device("cpu"))
        if before is None:
            pytest.skip("this kernel does not let a process reset its high-water mark")
        assert before > 50
        assert size * 0.9 < peak < size * 1.5

    @pytest.mark.slow
    def test_processes_of_their_own(self, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
        found = run_alone("test_bench:make_llama", cheap(training=False))
        assert tuple(found) == FORMS
        assert found["rewritten"].kinds["inference"].passes_s > 0

    @pytest.mark.slow
    def test_a_process_that_fails_is_told_with_its_last_line(self):
        with pytest.raises(
            AttnResError, match=r"plain form of nowhere in a process of its own failed.*nowhere.*neither"
        ):
            run_alone("nowhere", cheap())


def _plain_data(found: FormAlone) -> dict[str, object]:
    return {"rewrite_s": found.rewrite_s, "kinds": {kind: vars(figures) for kind, figures in found.kinds.items()}}


def example_result(**others) -> BenchResult:
    fields = {
        "model": "LlamaForCausalLM",
        "parameters": {"plain": 1000, "rewritten": 1100},
        "sizes": {"input_ids": [2, 6]},
        "cached": 4,
        "device": "cpu",
        "settings": cheap(),
        "times": {"training": StepTimes((0.010,) * 3, (0.012,) * 3), "decode": StepTimes((0.001,), (0.002,), 1)},
        "skipped": {"inference": "a reason"},
        "environment": {},
    }
    return BenchResult(**{**fields, **others})


def text_of(result: BenchResult) -> str:
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.table())
    return console.export_text()


class TestResult:
    def test_the_title_has_the_number_of_blocks_that_was_chosen(self):
        result = example_result(settings=cheap(blocks="auto"), blocks=(3, 8))
        assert result.title() == "LlamaForCausalLM, input_ids [2, 6], 3 and 8 blocks, on cpu"

    def test_the_table(self):
        text = text_of(example_result())
        assert "LlamaForCausalLM, input_ids [2, 6], 2 blocks, on cpu" in text
        rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
        assert rows == [
            ["training: step (ms)", "10.00", "12.00", "1.200", "1.200 to 1.200"],
            ["decode (4 cached): step (ms)", "1.00", "2.00", "2.000", "2.000 to 2.000"],
            ["parameters", "1,000", "1,100", "1.100", ""],
        ]

    def test_the_table_with_what_was_measured_alone(self):
        plain = FormAlone(0.0, {"training": Alone(10.0, 0.0, 500.0, 100.0)})
        rewritten = FormAlone(2.0, {"training": Alone(20.0, 0.1, 510.0, 120.0)})
        text = text_of(example_result(alone={"plain": plain, "rewritten": rewritten}))
        for words in (
            ["training: compile, cold (s)", "10.0", "20.0", "2.000"],
            ["training: share of our passes", "0.50%"],
            ["training: peak memory (MiB)", "100.0", "120.0", "1.200"],
            ["rewrite() (s)", "2.0"],
        ):
            (line,) = [line for line in text.splitlines() if words[0] in line]
            assert [cell.strip() for cell in line.strip("│").split("│") if cell.strip()] == words

    def test_notes(self):
        assert example_result().notes() == [
            "no inference steps: a reason",
            "decode steps: 1 graphs were compiled while they were timed; give more warm-up rounds",
        ]


class TestCommand:
    OPTIONS = ("--blocks", "2", "--length", "6", "--rounds", "2", "--warmup", "1", "--device", "cpu")

    @pytest.fixture
    def run(self):
        runner = CliRunner()
        return lambda *arguments: runner.invoke(cli.make_app(), ["bench", *arguments])

    def test_a_factory(self, run, tmp_path):
        path = tmp_path / "bench.json"
        options = (*self.OPTIONS, "--backend", "eager", "--no-inference", "--schedule", "per_read")
        result = run("test_bench:make_llama", *options, "--out", str(path))
        assert result.exit_code == 0, result.output
        for words in ("LlamaForCausalLM", "training: step (ms)", "parameters", "ratio"):
            assert words in result.stdout
        assert "compile" not in result.stdout
        assert "inference" not in result.stdout
        # Progress is not in the way of who reads the table.
        assert "timing training steps" in result.stderr
        assert "timing" not in result.stdout
        told = json.loads(path.read_text())
        assert told["settings"]["schedule"] == "per_read"
        assert told["environment"]["torch"] == torch.__version__
        assert told["times"]["training"]["rounds"] == 2

    def test_a_configuration_folder_that_decodes(self, run, tmp_path):
        from transformers import LlamaConfig

        tiny_config(LlamaConfig, layers=2).save_pretrained(tmp_path)
        options = (*self.OPTIONS, "--backend", "eager", "--no-training", "--no-inference", "--decode", "--cached", "3")
        result = run(str(tmp_path), *options)
        assert result.exit_code == 0, result.output
        assert "decode (3 cached): step (ms)" in result.stdout

    def test_json_is_the_output_alone(self, run, monkeypatch):
        def compare(make_model, settings, *, progress):
            progress("timing")
            print("a library's own words")
            return example_result()

        monkeypatch.setattr("attnres_rewrite.bench.compare", compare)
        result = run("test_bench:make_llama", *self.OPTIONS, "--json")
        assert json.loads(result.stdout) == json.loads(json.dumps(example_result().to_dict()))
        assert "timing" in result.stderr

    def test_alone_is_asked_for(self, run, monkeypatch):
        figures = {form: FormAlone(1.0, {"training": Alone(1.0, 0.1, None, None)}) for form in FORMS}
        asked = []
        monkeypatch.setattr("attnres_rewrite.bench.run_alone", lambda name, _: asked.append(name) or figures)
        options = (*self.OPTIONS, "--backend", "eager", "--no-inference")
        result = run("test_bench:make_llama", *options, "--alone")
        assert asked == ["test_bench:make_llama"]
        assert "training: compile, cold (s)" in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "'nowhere' is neither a folder with a config.json nor module:factory"),
            (["test_cli:make_mlp"], "no residual stream"),
            (["test_bench:make_vision", "--length", "4"], "are for models of tokens"),
            (["test_bench:make_llama", "--blocks", "9"], "only 2 layers"),
            (["test_bench:make_llama", "--blocks", "0"], "blocks must be a positive integer"),
            (["test_bench:make_llama", "--device", "nonsense"], "device 'nonsense' cannot be used"),
            (["test_bench:make_llama", "--out", "no/x.json"], "--out no/x.json: the folder no does not exist"),
            (["test_bench:make_llama", "--no-training", "--no-inference"], "nothing to measure"),
            (["test_cli:make_rewritten_llama"], "already has Attention Residuals"),
        ],
    )
    def test_errors_are_told_in_one_go_without_a_traceback(self, monkeypatch, capsys, arguments, message):
        status, error = main(monkeypatch, capsys, "bench", *arguments)
        assert status == 1
        assert "attnres: " in error
        assert message in error
        assert "Traceback" not in error
