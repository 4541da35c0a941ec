"""Models too large for this machine: on the meta device they are explained and rewritten without their weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import llama, prepared, randomise_sites, relative_error, site_parameters, token_ids
from reference_models import reference_llama

import attnres_rewrite as ar

ROOT = Path(__file__).parent.parent
GIB = 2**30
SIZES = {
    "13B": {
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
    "70B": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
# In a process of its own, whose peak of memory is that of this model alone.
SCRIPT = """
import json, resource, sys, time
import torch, transformers
import attnres_rewrite as ar

config = transformers.LlamaConfig(**json.loads(sys.argv[1]))
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, start = peak(), time.perf_counter()
report = ar.explain(model, 8)
explained = time.perf_counter()
weights = sum(p.numel() for p in model.parameters())
ar.rewrite(model, 8)
(stream,) = report.streams
added = [p for _, p in ar.attnres_parameters(model)]
print(json.dumps({
    "owner": stream.owner,
    "sites": len(stream.sources),
    "blocks": [len(block) for block in stream.blocks],
    "sizes": [len(stream.layers), stream.width],
    "names": [name for name, _ in ar.attnres_parameters(model)],
    "added": sum(p.numel() for p in added),
    "promised": report.added,
    "devices": sorted({p.device.type for p in (*model.parameters(), *model.buffers())}),
    "weights": weights,
    "bytes": peak() - before,
    "seconds": [explained - start, time.perf_counter() - explained],
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_large_models_need_no_memory_for_their_weights(size) -> None:
    config = SIZES[size]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(config)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    sites = 2 * layers
    assert (found["owner"], found["sites"], found["sizes"]) == ("model", sites, [layers, width])
    assert found["blocks"] == [layers // 8] * 8
    assert found["names"] == [f"model.attn_res.{i}.{part}" for i in range(sites) for part in ("query", "gain")]
    assert found["added"] == found["promised"] == 2 * sites * width
    assert found["devices"] == ["meta"]
    assert found["weights"] > {"13B": 13.0e9, "70B": 68.9e9}[size]
    assert found["bytes"] < 4 * GIB


@pytest.mark.slow
@torch.no_grad()
def test_a_model_rewritten_on_meta_gets_its_weights_later() -> None:
    """The usual order for a model that many machines share: rewrite, allocate, load."""
    source = randomise_sites(ar.rewrite(prepared(llama(3)), 2, backend="eager"))
    with torch.device("meta"):
        model = llama(3)
    ar.rewrite(model.eval(), 2, backend="eager")
    rotary = source.model.rotary_emb.inv_freq.clone()
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    # Not in the state dict, so not in a checkpoint either.
    model.model.rotary_emb.inv_freq.copy_(rotary)
    ids = token_ids()
    expected = reference_llama(source, ids, *site_parameters(source), blocks=2)
    assert relative_error(model(ids).logits, expected) < 1e-5
