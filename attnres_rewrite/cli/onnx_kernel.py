"""What ``attnres build-onnx-kernel`` does."""

import json
from pathlib import Path

from attnres_rewrite.cli.progress import stages


def build_onnx_kernel(out: Path | None, compiler: str | None, *, as_json: bool = False) -> str:
    """Build the kernel, and tell where it is.

    Args:
        out: The file to write, or None for the one that is found again.
        compiler: The C++ compiler, or None for the usual ones.
        as_json: Whether to tell it as JSON.

    Raises:
        OnnxKernelError: It cannot be built.
    """
    from attnres_rewrite.onnx import build_kernel

    with stages() as stage:
        stage("Compiling the kernel")
        library = build_kernel(out, compiler=compiler)
    return json.dumps({"path": str(library)}, indent=1) if as_json else str(library)
