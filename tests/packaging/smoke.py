"""What an installed package must do: ``python smoke.py EXTRA``, with that extra and no other, or ``none``.

Run by ``dist_check.sh``, from a folder that does not hold the sources.
"""

import importlib
import importlib.metadata
import importlib.resources
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import attnres_rewrite as ar


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).relu()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


IDS = torch.arange(10).reshape(2, 5)


def make_model() -> Model:
    return Model()


def rewritten() -> nn.Module:
    model = ar.rewrite(Model(), blocks=2, backend="eager")
    for _, parameter in ar.attnres_parameters(model):
        nn.init.normal_(parameter)
    return model


def refused(package: str, extra: str, call: Callable[[], object]) -> None:
    told = ""
    try:
        call()
    except ar.MissingPackageError as error:
        told = str(error)
    assert package in told, f"{extra} is not needed"
    assert f"attnres-rewrite[{extra}]" in told, told


def attnres(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "attnres"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def none() -> None:
    assert "site-packages" in str(ar.__file__), ar.__file__
    assert importlib.metadata.version("attnres-rewrite") == ar.__version__
    assert (importlib.resources.files(ar) / "py.typed").is_file()
    plain = Model()
    model = ar.rewrite(plain, blocks=2, backend="eager")
    assert ar.verify(model, IDS)
    model(IDS).sum().backward()
    assert "attnres" in torch.compiler.list_backends()
    refused("safetensors", "hf", lambda: ar.save_pretrained(model, "folder"))
    refused("onnx", "onnx", lambda: ar.export_onnx(model, "model.onnx", IDS))
    refused("matplotlib", "plot", lambda: ar.depth_attention(model, IDS).plot("depth.png"))
    refused("lightning", "lightning", lambda: importlib.import_module("attnres_rewrite.lightning"))
    refused("transformers", "hf", lambda: importlib.import_module("attnres_rewrite.huggingface.callback"))
    ar.depth_attention(model, IDS).to_html("depth.html")
    assert "causal importance" in Path("depth.html").read_text()
    done = attnres("explain", "smoke:make_model")
    assert done.returncode, done.stdout
    # The last line alone: torch warns on its own of numpy, which it can do without.
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("attnres: typer, rich not installed"), done.stderr
    assert last.endswith("pip install 'attnres-rewrite[cli]'"), done.stderr


def hf() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    model = rewritten()
    ar.save_pretrained(model, "own")
    assert torch.equal(ar.from_pretrained("own", Model, backend="eager")(IDS), model(IDS))
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    ar.rewrite(llama, blocks=2, backend="eager").save_pretrained("llama")
    loaded = AutoModelForCausalLM.from_pretrained("llama")
    assert len(list(ar.attnres_parameters(loaded))) == 8


def onnx() -> None:
    exported = ar.export_onnx(rewritten(), "model.onnx", IDS)
    assert exported.sites == 4
    assert exported.max_difference < 1e-4
    assert Path("model.onnx").stat().st_size > 1000


def plot() -> None:
    ar.depth_attention(rewritten(), IDS).plot("depth.png")
    assert Path("depth.png").read_bytes().startswith(b"\x89PNG")


def lightning() -> None:
    from lightning.pytorch import Callback

    from attnres_rewrite.lightning import AttnResCallback

    assert issubclass(AttnResCallback, Callback)


def cli() -> None:
    done = attnres("explain", "smoke:make_model", "--blocks", "2")
    assert done.returncode == 0, done.stderr
    assert "4 branch outputs, 4 sites" in done.stdout, done.stdout
    assert attnres("explain", "smoke:nothing").returncode != 0


if __name__ == "__main__":
    (extra,) = sys.argv[1:]
    torch.manual_seed(0)
    {"none": none, "hf": hf, "onnx": onnx, "plot": plot, "lightning": lightning, "cli": cli}[extra]()
    print(f"attnres-rewrite {ar.__version__} with {extra}: works")
