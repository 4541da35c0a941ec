"""A callback for Lightning's Trainer: it logs how the Attention Residuals of a rewritten model train."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from attnres_rewrite.capture.inputs import ExampleInputs
from attnres_rewrite.errors import MissingPackageError
from attnres_rewrite.forms.anchor import AnchorSpec
from attnres_rewrite.forms.live import live_forwards, require_live
from attnres_rewrite.inspection.statistics import decayed_parameters, log_dict

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_log = logging.getLogger(__name__)


def _callback_class() -> Any:
    """The ``Callback`` of ``lightning.pytorch``, or that of ``pytorch_lightning`` where only this one is in use.

    The two packages have the same classes twice.
    """
    try:
        if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
            raise ImportError
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise MissingPackageError("AttnResCallback", "lightning", "lightning") from error
    return Callback


class AttnResCallback(_callback_class()):  # type: ignore[misc]
    """Logs :func:`attnres_rewrite.log_dict` of the rewritten model that a Lightning ``Trainer`` trains.

    ``Trainer(callbacks=[AttnResCallback()])``. The numbers go to every logger of the Trainer, at the number of
    optimizer steps taken so far. What was rewritten is the LightningModule or one module in it.

    Before training it warns of a weight decay of queries and gains.

    Args:
        every_steps: How many optimizer steps lie between two entries; ``log_every_n_steps`` makes no difference.
        example_inputs: A small batch for the depth weights, as for :func:`attnres_rewrite.log_dict`: what the rewritten
            model itself takes.

    Raises:
        ValueError: ``every_steps`` is less than one.
    """

    def __init__(self, every_steps: int = 100, example_inputs: ExampleInputs | None = None) -> None:
        super().__init__()
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, not {every_steps}")
        self.every_steps, self.example_inputs = every_steps, example_inputs
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise :class:`AttnResError` for a model that is not rewritten; warn of what would go wrong in silence."""
        require_live(pl_module, "AttnResCallback")
        self._last_step = trainer.global_step
        if self.example_inputs is not None:
            # Inputs that do not fit are an error now, and not after a hundred steps.
            log_dict(_rewritten_in(pl_module), self.example_inputs)
        if not trainer.loggers:
            _log.warning("AttnResCallback: this Trainer has no logger, so that the numbers go nowhere")
        for optimizer in trainer.optimizers:
            if names := decayed_parameters(pl_module, optimizer):
                _log.warning(
                    "an optimizer decays %d pseudo-queries and key gains of this model, %s among them. It pulls the "
                    "queries to zero, which is equal depth weights. To avoid that: torch.optim.AdamW("
                    "parameter_groups(model, weight_decay=0.1), lr=...), with attnres_rewrite.parameter_groups",
                    len(names),
                    names[0],
                )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log, after every ``every_steps`` steps. In every process: a sharded parameter needs them all."""
        step, last = trainer.global_step, self._last_step
        self._last_step = step
        # A batch whose gradients are accumulated is no step, and one of several optimizers is as many steps.
        if step // self.every_steps == last // self.every_steps:
            return
        values = log_dict(_rewritten_in(pl_module), self.example_inputs)
        # Past pl_module.log_dict, which keeps to log_every_n_steps and drops what comes at other steps.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)


def _rewritten_in(module: nn.Module) -> nn.Module:
    """The module within ``module`` that was rewritten, if it is one; a LightningModule need not have a forward."""
    roots = set()
    for name, live in live_forwards(module):
        owner = AnchorSpec.from_json(live.spec).owner
        if not f".{name}".endswith(f".{owner}" if owner else ""):
            # Something wraps a part of the model that was rewritten.
            return module
        roots.add(name[: len(name) - len(owner)].rstrip("."))
    return module.get_submodule(roots.pop()) if len(roots) == 1 else module
