"""Scripts that several processes run."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(
    script: str | Path, *arguments: object, processes: int = 2, restarts: int = 0, seconds: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` by torchrun on CPUs, with the package and the tests to import from."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Port 0: whichever is free.
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--max-restarts", str(restarts)]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *where, str(script)]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        # What gloo finds in a store that outlives a restart are the addresses of processes that are gone.
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
