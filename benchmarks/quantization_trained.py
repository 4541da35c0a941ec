"""Drift of dynamic int8 of the models that `benchmarks/learning.py` trained on a GPU, each against its own float32.

Their last weights, of one seed, are in ``WORK/weights``, where ``learning.py all --pack`` left them. Every one is
exported, quantised and compared as in ``quantization.py``, on text of the standard library that is held out here.

    python benchmarks/quantization_trained.py WORK [--size 0.4M] [--sequences 64]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

# Beside this file is one of the name of a package that is imported below: what is installed comes first.
sys.path.append(sys.path.pop(0))
sys.path.append(str(Path(__file__).resolve().parent.parent))

import onnxruntime
import torch
from _environment import environment, write_results
from _learning import CONTESTANTS, SIZES, Text, read_text
from _learning_model import new_model
from _plain_onnx import export_plain
from quantization import measure
from torch import Tensor

import attnres_rewrite

RESULTS = Path(__file__).parent / "results" / "quantization_trained.json"


def measure_one(path: Path, size: str, text: Text, sequences: int) -> dict[str, Any]:
    """The loss and the drifts of the weights in ``path``."""
    contestant, shape = path.name.partition("_")[0], SIZES[size]
    model = new_model(contestant, shape, 0).eval()
    chosen = CONTESTANTS[contestant]
    inputs = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    if chosen is not None:
        attnres_rewrite.rewrite(model, config=chosen, example_inputs=inputs, backend="aot_eager")
    weights: dict[str, Tensor] = {name: value.float() for name, value in torch.load(path).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    (ids,) = text.test.validation_batches(1, sequences, shape.length)
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.onnx"
        if chosen is None:
            export_plain(model, inputs, template, use_cache=False)
        else:
            attnres_rewrite.export_onnx(model, template, inputs)
        found = measure(template, {n: v.detach().clone() for n, v in model.state_dict().items()}, model, ids)
    found.pop("operators")
    return found


def table(models: dict[str, Any]) -> str:
    """The drifts per tensor as Markdown, in the units of the head."""
    lines = [
        "| model | float32 loss, nats/byte | RMS error, % | KL, 1e-4 nats/byte | other top byte, % "
        "| loss increase, 1e-3 nats/byte |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in models.items():
        drift = found["drift"]["per tensor"]
        lines.append(
            f"| {name.replace('_', ' ')} | {found['loss']:.3f} | {100 * drift['rms']:.2f} | {1e4 * drift['kl']:.1f} "
            f"| {100 * drift['disagreement']:.2f} | {1e3 * drift['loss_increase']:+.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="0.4M")
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)  # Quantisation recommends a preparation that changes nothing here.
    folder = options.work / "weights" / options.size
    results: dict[str, Any] = {"sequences": options.sequences, "models": {}}
    for stage in ("scratch", "retrofit"):
        text = read_text(stage)
        for path in sorted((folder if stage == "scratch" else folder / stage).glob("*.pt")):
            name = f"{stage}, {path.stem}"
            results["models"][name] = measure_one(path, options.size, text, options.sequences)
            results["environment"] = environment() | {"onnxruntime": onnxruntime.__version__}
            write_results(options.out, results)
    print(table(results["models"]))


if __name__ == "__main__":
    main()
