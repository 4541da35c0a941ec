"""The parameters of the sites of one owner, under the names that they have in every form."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnres_rewrite import _compat
from attnres_rewrite.errors import NotRewrittenError
from attnres_rewrite.forms.anchor import AnchorSpec, not_rewritten_message
from attnres_rewrite.forms.settings import EXTRA_STATE, Settings, warn_of_missing

if TYPE_CHECKING:
    from attnres_rewrite.forms.live import LiveForward
    from attnres_rewrite.forms.live_state import LiveState


class AttnResSite(nn.Module):
    """The parameters of one site: pseudo-query ``[D]``, zero at first, key gain ``[D]``, one, and gate ``[1]``, zero.

    Args:
        width: D, the width of the stream.
        gain: Whether there is a key gain.
        gate: Whether there is a gate.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        width: int,
        *,
        gain: bool = True,
        gate: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        self.gain = nn.Parameter(torch.ones(width, device=device, dtype=dtype)) if gain else None
        self.gate = nn.Parameter(torch.zeros(1, device=device, dtype=dtype)) if gate else None

    def extra_repr(self) -> str:
        """The width, for ``print(model)``."""
        gate = ", gate=True" if self.gate is not None else ""
        return f"width={self.query.numel()}, gain={self.gain is not None}{gate}"


class AttnResSites(nn.Module):
    """All sites of one owner, in depth order, with the token of its anchor. Its parent is the owner.

    No ``nn.ModuleList``, of which peft cannot keep a trained copy (``modules_to_save=["attn_res"]``).

    Args:
        sites: The sites.
        state: That of the rewritten model.
        owner: Name of the owner, for messages.

    Attributes:
        live: The forward of the owner, also where a library has put one of its own before it.
    """

    token: Tensor
    live: LiveForward

    def __init__(self, sites: Sequence[AttnResSite], state: LiveState, owner: str, live: LiveForward) -> None:
        super().__init__()
        for index, site in enumerate(sites):
            self.add_module(str(index), site)
        self.state, self.owner, self.live = state, owner, live
        device = sites[0].query.device
        self.register_buffer("token", torch.zeros(1, device=device), persistent=False)

    def __iter__(self) -> Iterator[AttnResSite]:
        return iter(self.children())  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(list(self.children()))

    def __getitem__(self, index: int) -> AttnResSite:
        return list(self)[index]

    @property
    def itself(self) -> AttnResSites:
        """The container whose parameters are in use, asked of whatever a library has put in its place."""
        return self

    def flat(self) -> list[Tensor]:
        """Query, gain and gate of every site, in the order in which the anchor takes them."""
        return [p for site in self for p in (site.query, site.gain, site.gate) if p is not None]

    @property
    def settings(self) -> Settings:
        """What the sites compute, but for their parameters."""
        return Settings.of(AnchorSpec.from_json(self.live.spec))

    def get_extra_state(self) -> Tensor:
        """The settings, which are saved with the parameters."""
        return self.settings.to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Compare the settings of parameters that are loaded; raises :class:`CheckpointError` if they are others."""
        self.settings.require(Settings.from_tensor(state), self.owner)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Where an adapter of peft has trained parameters, these ones wait behind it.
        wanted = self.state.enabled and self.live.sites is self
        warn_of_missing(state_dict, prefix, self.settings, self.owner, wanted=wanted)
        if any(key.startswith(prefix) for key in state_dict):
            # What version 0.1 saved lacks no more than this, of which the user was warned.
            state_dict = {f"{prefix}{EXTRA_STATE}": self.get_extra_state(), **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> AttnResSites:
        """With the owner, a part of its copy; alone, as peft copies what an adapter trains, other numbers for it."""
        if id(self.live.attnres_owner) not in memo:
            memo[id(self.live)], memo[id(self.state)] = self.live, self.state
        new = memo[id(self)] = type(self).__new__(type(self))
        state: dict[str, Any] = {name: value for name, value in self.__dict__.items() if name != "_compiled_call_impl"}
        new.__dict__.update(copy.deepcopy(state, memo))
        return new

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of every module, but not for ``torch.fx.symbolic_trace``.

        It asks for the names of the root's modules and then runs the forward of the root's class, past
        the live forward, so that this is where it can be stopped.
        """
        if self.state.enabled and _compat.is_symbolically_tracing():
            raise NotRewrittenError(not_rewritten_message(self.owner))
        named: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **kwargs)
        return named
