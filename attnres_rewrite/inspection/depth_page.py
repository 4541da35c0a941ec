"""Writes the depth weights as one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from importlib import resources
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from attnres_rewrite.inspection.depth import DepthAttention

# Where the data goes in depth_page.html, in a script element of type application/json.
_PLACE = "{{ data }}"


def write_page(depth: DepthAttention, path: str | PathLike[str], tokens: Sequence[str], max_tokens: int) -> None:
    """Write the page, as :meth:`DepthAttention.to_html` says.

    Args:
        depth: The weights.
        path: The file to write.
        tokens: Names of the first tokens.
        max_tokens: How many tokens the page has at most.

    Raises:
        ValueError: There are more names than tokens, or ``max_tokens`` is negative.
    """
    count = depth.token_weights[0, 0].numel()
    if len(tokens) > count:
        raise ValueError(f"tokens has {len(tokens)} names, but there are {count} tokens")
    if max_tokens < 0:
        raise ValueError(f"max_tokens must not be negative, not {max_tokens}")
    data = page_data(depth, tokens, max_tokens)
    # Names must not end the script element that they are in.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("depth_page.html").read_text(encoding="utf-8")
    before, after = template.split(_PLACE)
    with open(path, "w", encoding="utf-8") as file:
        file.write(before + text + after)


def page_data(depth: DepthAttention, tokens: Sequence[str] = (), max_tokens: int = 512) -> dict[str, Any]:
    """What the page shows, as plain data for JSON.

    The weights are base64 of little-endian float32, NaN where a site has none: ``mean`` of ``[sites, sources]``,
    ``by_token`` of ``[tokens, sites, sources]``, so that a token is one piece.
    """
    by_token = depth.token_weights.flatten(2)[..., :max_tokens].permute(2, 0, 1)
    return {
        "sites": depth.labels,
        "sources": depth.sources,
        "groups": depth.groups,
        "stream_of": depth.stream_of,
        "streams": [{"owner": stream.owner, "blocks": stream.blocks} for stream in depth.streams],
        "tokens": {
            "shape": list(depth.token_weights.shape[2:]),
            "shown": by_token.shape[0],
            "names": list(tokens[:max_tokens]),
        },
        "mean": _encoded(depth.weights),
        "by_token": _encoded(by_token),
    }


def _encoded(weights: Tensor) -> str:
    values = weights.flatten().tolist()
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")
