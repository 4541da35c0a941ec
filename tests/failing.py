"""Runs an example of which a process is killed in the middle of its second save: ``torchrun failing.py EXAMPLE ...``.

The data are written then, and what says that they are whole is not.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter


def killed_at(call: int, method: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(call))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    return counted


if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "0"):
    FileSystemWriter.finish = killed_at(1, FileSystemWriter.finish)  # type: ignore[method-assign]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
