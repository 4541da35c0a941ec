"""What an export has fixed that training would want otherwise: said when the program is rewritten."""

from __future__ import annotations

import logging

from torch.export import ExportedProgram
from torch.fx import Node

from attnres_rewrite.graph.nodes import module_path, op_name

_logger = logging.getLogger(__name__)
# Where the operators say with which probability they drop.
_PROBABILITY = {"dropout": ("p", 1), "native_dropout": ("p", 1), "scaled_dot_product_attention": ("dropout_p", 4)}


def tell_what_export_fixed(program: ExportedProgram) -> None:
    """Warn of a program for training: dropout stays active in it, and activation checkpointing is gone.

    Active dropout is what tells such a program from others. Of checkpointing an export leaves no trace.
    """
    active = [node for node in program.graph.nodes if node.op == "call_function" and _is_active_dropout(node)]
    if active:
        _logger.warning(
            "this ExportedProgram was exported in train mode: dropout is active in %d operators, the first in %r, and "
            ".eval() on what is made of it leaves that so; for inference export the model after model.eval(). The "
            "layers of a model with activation checkpointing are no longer checkpointed: wrap those of "
            "torch.export.unflatten(program) in checkpoint_wrapper (torch.distributed), or rewrite the nn.Module, "
            "which keeps both",
            len(active),
            module_path(active[0]) or "(root)",
        )


def _is_active_dropout(node: Node) -> bool:
    name = op_name(node)
    if name not in _PROBABILITY:
        return False
    trains = name == "scaled_dot_product_attention" or bool(_argument(node, "train", 2, default=True))
    return trains and bool(_argument(node, *_PROBABILITY[name], default=0.0))


def _argument(node: Node, name: str, position: int, *, default: object) -> object:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)
