"""What every test starts from: the same random numbers, and nothing that an earlier test compiled."""

import pytest
import torch
import torch._dynamo


@pytest.fixture(autouse=True)
def _fresh_start() -> None:
    # Dynamo keeps compiled code, and notes on code that it gave up on, for the life of the process.
    torch._dynamo.reset()
    torch.manual_seed(0)
