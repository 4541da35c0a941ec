"""Streams whose values are linked across layers: linear algebra, part by part."""

from collections.abc import Callable

import pytest
import torch
from linked_models import LINKS, SOURCES, Linked, linked, reference
from models import embeddings, randomise_sites, relative_error, site_parameters

import attnres_rewrite as ar

X = embeddings()
TOLERANCE = 1e-5  # float32


def live(model: Linked, config: ar.AttnResConfig) -> Callable:
    return ar.rewrite(model, config=config, example_inputs=X.to(model.a.dtype), backend="eager")


def exported(model: Linked, config: ar.AttnResConfig) -> torch.export.ExportedProgram:
    return ar.rewrite(torch.export.export(model, (X.to(model.a.dtype),)), config=config)


def graph_module(model: Linked, config: ar.AttnResConfig) -> torch.fx.GraphModule:
    return ar.rewrite(torch.fx.symbolic_trace(model), config=config, example_inputs=X.to(model.a.dtype))


FORMS = {"live": live, "exported": exported, "graph module": graph_module}


def run(form: object) -> torch.Tensor:
    module = form.module() if isinstance(form, torch.export.ExportedProgram) else form
    with torch.no_grad():
        return module(X)


@pytest.mark.parametrize("name", LINKS)
def test_explain_counts_sites_and_sources(name: str) -> None:
    report = ar.explain(linked(name), 3, example_inputs=X)
    (stream,) = report.streams
    assert (stream.branches, len(stream.layers), stream.sources) == (12, 6, SOURCES)
    assert stream.blocks == tuple((f"layers.{i}", f"layers.{i + 1}") for i in (0, 2, 4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
@pytest.mark.parametrize("name", LINKS)
@torch.no_grad()
def test_every_form_agrees_with_the_algebra(name: str, schedule: str, form: str) -> None:
    config = ar.AttnResConfig(blocks=3, schedule=schedule)
    model = linked(name)
    rewritten = randomise_sites(FORMS[form](linked(name), config))
    queries, gains = site_parameters(rewritten)
    trace: list[int] = []
    expected = reference(model, X, queries, gains, 3, trace)
    assert tuple(trace) == SOURCES
    assert relative_error(run(rewritten), expected) < TOLERANCE


@pytest.mark.parametrize("name", LINKS)
@torch.no_grad()
def test_zero_queries_give_the_original(name: str) -> None:
    model = linked(name, torch.float64)
    expected = model(X.double())
    config = ar.AttnResConfig(blocks=3, aggregation="sum")
    assert relative_error(live(model, config)(X.double()), expected) < 1e-12
