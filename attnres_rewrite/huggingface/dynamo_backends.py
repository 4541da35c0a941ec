"""``torch_compile_backend="attnres"`` of ``Trainer``, and ``Accelerator(dynamo_backend="attnres")``."""

from __future__ import annotations

from typing import Any

from attnres_rewrite import _compat


def explain_missing_backend(module: Any) -> None:
    """Let accelerate, whose ``accelerate.utils.dataclasses`` is ``module``, say why it does not know this backend.

    It has a list of the backends that there are. One that is not on it is an error with no word on what to do.
    """

    def missing(_: type, value: object) -> None:
        if str(value).lower() == "attnres":
            raise ValueError(
                'accelerate has no backend "attnres", and needs none: a rewritten model compiles itself when it is '
                "called. Leave torch_compile, torch_compile_backend and dynamo_backend out, and name its compiler in "
                'rewrite(model, blocks=8, backend="inductor")'
            )

    _compat.set_missing(module.DynamoBackend, missing)
