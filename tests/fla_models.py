"""The models of flash-linear-attention without triton: its layers and its walk, with stand-ins for its kernels."""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH, VOCAB = 16, 31


class Attention(nn.Module):
    """Mixes tokens, causally; the one of the library needs a GPU."""

    def __init__(self, hidden_size: int, **others: object) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: Tensor, past_key_values: object = None, **others: object
    ) -> tuple[Tensor, None, object]:
        return self.proj(hidden_states).cumsum(1).tanh(), None, past_key_values


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, **others: object) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, **others: object) -> Tensor:
        return self.proj(x).tanh()


def stand_in(name: str, folder: Path | None = None, **attributes: object) -> types.ModuleType:
    """A module with ``attributes``; with ``folder`` a package whose own ``__init__`` does not run."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    module.__path__ = [] if folder is None else [str(folder)]
    return module


@contextlib.contextmanager
def transformer(naive: Callable[..., Tensor]) -> Iterator[Callable[[int | None, float], nn.Module]]:
    """Within the context: what makes its ``TransformerForCausalLM`` of five layers, from block size and epsilon.

    Args:
        naive: The library's read in plain torch, which the fused one stands for.

    Raises:
        ModuleNotFoundError: They are not installed. The tests do not require them: where there is triton, whatever
            imports fla would import all of them too, and they put themselves into the tables of transformers.
    """
    folders = [Path(entry) / "fla" for entry in sys.path]
    fla = next((folder for folder in folders if (folder / "models" / "transformer").is_dir()), None)
    if fla is None:
        raise ModuleNotFoundError(
            "flash-linear-attention is not installed: pip install --no-deps flash-linear-attention"
        )
    stand_ins = [
        stand_in("fla", fla),
        stand_in("fla.layers"),
        stand_in("fla.layers.attn", Attention=Attention),
        stand_in("fla.models", fla / "models"),
        # Its own __init__ tells transformers of the model.
        stand_in("fla.models.transformer", fla / "models" / "transformer"),
        stand_in(
            "fla.modules",
            GatedMLP=Mlp,
            RMSNorm=nn.RMSNorm,
            FusedCrossEntropyLoss=None,
            FusedLinearCrossEntropyLoss=None,
        ),
        stand_in("fla.modules.l2warp", l2_warp=None),
        stand_in("fla.ops"),
        stand_in("fla.ops.attnres", fused_attnres=naive),
    ]
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "fla"}
    sys.modules.update({module.__name__: module for module in stand_ins})
    try:
        configuration = importlib.import_module("fla.models.transformer.configuration_transformer")
        modeling = importlib.import_module("fla.models.transformer.modeling_transformer")

        def make(block_size: int | None, eps: float) -> nn.Module:
            config = configuration.TransformerConfig(
                hidden_size=WIDTH,
                vocab_size=VOCAB,
                num_hidden_layers=5,
                norm_eps=eps,
                fuse_norm=False,
                use_cache=False,
            )
            # Its constructor refuses odd sizes but 1, which its layers can walk.
            config.attnres_block_size = block_size
            return modeling.TransformerForCausalLM(config).eval()

        yield make
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
            del sys.modules[name]
        sys.modules.update(before)


def token_ids() -> Tensor:
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
