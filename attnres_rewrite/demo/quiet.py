"""Exporters without the remarks that say nothing of the model."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

# One tells of packages that are not installed and not needed, the other of the versions that it was tested with.
_TALKATIVE = ("torch.onnx", "transformers")


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Within the context, keep warnings of the exporters off the screen; errors stay."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
