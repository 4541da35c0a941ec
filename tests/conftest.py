"""What every test starts from: the same random numbers, and nothing that an earlier test compiled."""

import gc
import logging
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo

# Pytest puts its handlers on a logger that does not propagate, and while this one has any, torch writes out every graph
# and every guard for it. One that propagates is left alone.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def _fresh_start() -> None:
    # Dynamo keeps compiled code, and notes on code that it gave up on, for the life of the process.
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_collection() -> Iterator[None]:
    """Garbage is collected between tests only: Dynamo's tracing, which is most of the time, makes a lot of it."""
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.collect()
