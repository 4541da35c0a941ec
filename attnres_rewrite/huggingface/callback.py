"""A callback for the Trainer of transformers: it logs how the Attention Residuals train, and looks at the settings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import ExampleInputs
from attnres_rewrite.errors import AttnResError, MissingPackageError
from attnres_rewrite.forms.live import live_forwards, require_live
from attnres_rewrite.inspection.statistics import decayed_parameters, log_dict

try:
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback
except ImportError as error:
    raise MissingPackageError("AttnResCallback", "transformers", "hf") from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_log = logging.getLogger(__name__)
_DECAYED = (
    "the optimizer decays %d pseudo-queries and key gains of this model, %s among them, as the Trainer does with all "
    "that is no bias and not of a norm. It pulls the queries to zero, which is equal depth weights. To avoid that: "
    'Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": parameter_groups(model, weight_decay=%s), '
    '"lr": %s})), with attnres_rewrite.parameter_groups'
)


class AttnResCallback(TrainerCallback):  # type: ignore[misc]
    """Logs :func:`attnres_rewrite.log_dict` of the model that a ``transformers.Trainer`` trains.

    ``Trainer(model, args, callbacks=[AttnResCallback()])``. The numbers go to whatever the Trainer reports to
    (TensorBoard, Weights & Biases and so on, as ``train/attnres/...``) and to every other callback that has an
    ``on_log``, and are an entry of ``trainer.state.log_history``. They are not printed: there are some for every site.

    Before training it raises for settings that cannot work, and warns of a weight decay of queries and gains.

    Args:
        every_steps: How many optimizer steps lie between two entries; ``logging_steps`` makes no difference.
        example_inputs: A small batch for the depth weights, as for :func:`attnres_rewrite.log_dict`.

    Raises:
        ValueError: ``every_steps`` is less than one.
    """

    def __init__(self, every_steps: int = 100, example_inputs: ExampleInputs | None = None) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, not {every_steps}")
        self.every_steps, self.example_inputs = every_steps, example_inputs
        self._warned = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Raise :class:`AttnResError` for a rewritten model that the Trainer would compile."""
        if args.torch_compile and any(live_forwards(model)):
            raise AttnResError(
                f"TrainingArguments(torch_compile=True): this {type(model).__name__} is rewritten and compiles itself, "
                "with a backend that the Trainer would replace by its own. Leave out torch_compile, "
                "torch_compile_backend and torch_compile_mode: what compiles the model is said in "
                "rewrite(model, backend=..., mode=...)"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Raise :class:`AttnResError` for a model that is not rewritten; warn of queries and gains that decay."""
        require_live(model, "AttnResCallback")
        # Once more, for a model that was rewritten after the Trainer was made, and for a callback that was added.
        self.on_init_end(args, state, control, model)
        if self.example_inputs is not None:
            # Inputs that do not fit are an error now, and not after a hundred steps.
            log_dict(model, self.example_inputs)
        if optimizer is not None and (names := decayed_parameters(model, optimizer)):
            _log.warning(_DECAYED, len(names), names[0], args.weight_decay, args.learning_rate)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **others: Any
    ) -> None:
        """Log, after every ``every_steps`` steps. In every process: a sharded parameter needs them all."""
        if state.global_step % self.every_steps:
            return
        values = log_dict(model, self.example_inputs)
        state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
        # Not by control.should_log, which logs the loss: the loggers come before this callback in the Trainer's list,
        # so that what is added to the loss's entry here would be too late for them.
        callbacks = _compat.callbacks_beside(self)
        if not callbacks and not self._warned:
            self._warned = True
            _log.warning(
                "AttnResCallback: no Trainer of transformers is calling, so that its loggers are not to be found: the "
                "numbers are in state.log_history alone"
            )
        for callback in callbacks:
            if callback is not self and not isinstance(callback, PrinterCallback | ProgressCallback):
                callback.on_log(args, state, control, logs=dict(values), model=model, **others)
