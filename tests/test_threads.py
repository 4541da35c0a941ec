"""What one thread does with a rewritten model changes nothing for another thread, first calls included."""

import collections
import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from models import Tower, embeddings, mostly_slow, prepared, randomise_sites, relative_error
from torch import nn

import attnres_rewrite as ar

X = embeddings()


class Head(nn.Module):
    """A root around the owner; with ``breaks`` the graph breaks between them."""

    def __init__(self, tower: nn.Module, breaks: bool = False) -> None:
        super().__init__()
        self.tower, self.breaks = tower, breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tower(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x * 2


MODELS: dict[str, Callable[[], nn.Module]] = {
    "owner": lambda: Tower(3),
    "root": lambda: Head(Tower(3)),
    "broken": lambda: Head(Tower(3), breaks=True),
}


def rewritten(name: str) -> nn.Module:
    return randomise_sites(ar.rewrite(prepared(MODELS[name]()), 2, example_inputs=X, backend="eager"))


@torch.no_grad()
def references(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    attnres, plain = copy.deepcopy(model)(X), ar.undo(copy.deepcopy(model))(X)
    assert relative_error(plain, attnres) > 1e-2
    return attnres, plain


class Server(threading.Thread):
    """Calls the model until it is told to stop, and counts what comes."""

    def __init__(self, model: nn.Module, expected: torch.Tensor) -> None:
        super().__init__()
        self.model, self.expected = model, expected
        self.stop, self.seen = threading.Event(), collections.Counter[str]()

    def run(self) -> None:
        with torch.no_grad():
            while not self.stop.is_set():
                try:
                    error = relative_error(self.model(X), self.expected)
                    self.seen["right" if error < 1e-5 else "wrong"] += 1
                except Exception as error:
                    self.seen[f"{type(error).__name__}: {error}"] += 1


@contextlib.contextmanager
def served(model: nn.Module, expected: torch.Tensor, threads: int = 2) -> Iterator[None]:
    """Within the context two threads call ``model``; all that they get is ``expected``."""
    servers = [Server(model, expected) for _ in range(threads)]
    for server in servers:
        server.start()
    try:
        while not all(server.seen for server in servers):
            time.sleep(0.01)
        yield
        before = [server.seen["right"] for server in servers]
        while any(s.seen["right"] == b and len(s.seen) == 1 for s, b in zip(servers, before, strict=True)):
            time.sleep(0.01)
    finally:
        for server in servers:
            server.stop.set()
        for server in servers:
            server.join()
    assert [set(server.seen) for server in servers] == [{"right"}] * threads


@pytest.mark.parametrize("name", mostly_slow(MODELS, "owner"))
def test_plain_residuals_in_one_thread_alone(name) -> None:
    model = rewritten(name)
    attnres, plain = references(model)
    with served(model, attnres), ar.disabled(model), torch.no_grad():
        for _ in range(5):
            assert relative_error(model(X), plain) < 1e-5
            time.sleep(0.02)


@pytest.mark.parametrize("name", mostly_slow(MODELS, "root"))
@pytest.mark.parametrize("verb", mostly_slow([ar.verify, ar.depth_attention], ar.verify))
def test_a_model_that_is_looked_into_goes_on_serving(name, verb) -> None:
    model = rewritten(name)
    attnres, _ = references(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with served(model, attnres):
        verb(model, X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", mostly_slow(MODELS, "root"))
def test_first_calls_from_several_threads(name) -> None:
    model = rewritten(name)
    attnres, _ = references(model)
    with served(model, attnres, threads=4):
        pass


def test_a_compiled_function_asks_in_the_thread_that_calls_it() -> None:
    model = rewritten("root")
    attnres, plain = references(model)
    compiled = torch.compile(lambda x: model(x), backend=ar.AttnResBackend("eager"))
    with torch.no_grad():
        assert relative_error(compiled(X), attnres) < 1e-5
    with served(compiled, attnres), ar.disabled(model), torch.no_grad():
        for _ in range(5):
            assert relative_error(compiled(X), plain) < 1e-5


def test_threads_that_disable_in_turn() -> None:
    """Each has its own wish, also where both began within the other's context."""
    model = rewritten("owner")
    attnres, plain = references(model)
    with ar.disabled(model), served(model, attnres), torch.no_grad():
        with ar.disabled(model):
            assert relative_error(model(X), plain) < 1e-5
        assert relative_error(model(X), plain) < 1e-5
    with torch.no_grad():
        assert relative_error(model(X), attnres) < 1e-5
