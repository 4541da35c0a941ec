"""depth_attention: the weights are those that the sites use."""

import json
from pathlib import Path

import pytest
import torch
from models import Tower, embeddings, llama, randomise_sites, token_ids

import attnres_rewrite as ar


@pytest.mark.slow
def test_zero_queries_weigh_all_sources_equally() -> None:
    model = ar.rewrite(llama(5), blocks=3, backend="eager")
    depth = ar.depth_attention(model, token_ids())
    assert depth.sources == ["b_0", "b_1", "b_2", "b_3", "partial"]
    assert depth.weights.shape == (10, 5)
    counts = (~depth.weights.isnan()).sum(1)
    assert counts.tolist() == [2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    torch.testing.assert_close(depth.weights.nanmean(1), 1 / counts)
    assert depth.sites[0] == "model.layers.0.post_attention_layernorm"
    assert depth.sites[1] == "model.layers.1.input_layernorm"
    assert depth.sites[-1] == "model.norm"


def test_random_queries_give_the_softmax_of_the_equation() -> None:
    model = randomise_sites(ar.rewrite(Tower(2), blocks=1, example_inputs=embeddings(), backend="eager"))
    x = embeddings()
    depth = ar.depth_attention(model, x)
    torch.testing.assert_close(depth.weights.nansum(1), torch.ones(4))

    # The first site by hand: it attends over the root and the first branch output.
    root = model.embed(x)
    site = model.attn_res[0]
    sources = torch.stack([root, model.layers[0].first(root)])
    keys = sources * torch.rsqrt(sources.square().mean(-1, keepdim=True) + 1e-6) * site.gain
    alpha = torch.einsum("d,nbtd->nbt", site.query, keys).softmax(0)
    torch.testing.assert_close(depth.weights[0, [0, -1]], alpha.mean((1, 2)).detach())


def test_full_attnres_has_no_partial() -> None:
    model = ar.rewrite(Tower(2), blocks="full", example_inputs=embeddings(), backend="eager")
    depth = ar.depth_attention(model, embeddings())
    assert depth.sources == ["b_0", "b_1", "b_2", "b_3", "b_4"]
    assert (~depth.weights.isnan()).sum(1).tolist() == [2, 3, 4, 5]


def test_plot_and_save(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = ar.rewrite(Tower(2), blocks=2, example_inputs=embeddings(), backend="eager")
    depth = ar.depth_attention(model, embeddings())
    depth.plot(tmp_path / "depth.png")
    depth.save(tmp_path / "depth.json")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "depth.json").read_text())
    assert saved["sites"] == depth.sites
    assert saved["weights"][0] == [0.5, None, None, 0.5]


def test_a_plain_model_is_an_error() -> None:
    with pytest.raises(ar.AttnResError, match="depth_attention: this Tower was not rewritten"):
        ar.depth_attention(Tower(2), embeddings())
