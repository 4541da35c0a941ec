"""The page of the depth weights: what is in the file, and what a browser makes of it."""

import base64
import dataclasses
import html
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnres_rewrite as ar
from attnres_rewrite.inspection.depth import DepthStream

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[1]
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions"
).split()


def made_up(batch: int = 2, length: int = 3) -> ar.DepthAttention:
    """Four reads of a stream of two blocks of a layer each, with random weights."""
    nan, columns = float("nan"), [[0, 3], [0, 1], [0, 1, 3], [0, 1, 2]]
    by_token = torch.full((4, 4, batch, length), nan)
    generator = torch.Generator().manual_seed(0)
    for row, own in zip(by_token, columns, strict=True):
        row[own] = torch.randn(len(own), batch, length, generator=generator).mul(2).softmax(0)
    return ar.DepthAttention(
        sites=["model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp", "model.norm"],
        sources=["b_0", "b_1", "b_2", "partial"],
        weights=by_token.flatten(2).mean(2),
        token_weights=by_token,
        block_of=[1, 2, 2, 3],
        stream_of=[0] * 4,
        streams=[DepthStream("model", [["model.layers.0"], ["model.layers.1"]])],
    )


def data_in(page: str) -> dict[str, object]:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def decoded(text: str, *shape: int) -> Tensor:
    raw = base64.b64decode(text)
    return torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw)).reshape(shape)


def test_the_file_has_the_weights_and_needs_nothing_else(tmp_path: Path) -> None:
    depth = made_up()
    depth.to_html(tmp_path / "depth.html")
    page = (tmp_path / "depth.html").read_text("utf-8")
    data = data_in(page)
    assert torch.equal(decoded(data["mean"], 4, 4).nan_to_num(-1), depth.weights.nan_to_num(-1))
    by_token = decoded(data["by_token"], 6, 4, 4).permute(1, 2, 0).reshape(4, 4, 2, 3)
    assert torch.equal(by_token.nan_to_num(-1), depth.token_weights.nan_to_num(-1))
    assert data["sites"] == ["layers.0.mlp", "layers.1.self_attn", "layers.1.mlp", "norm"]
    assert data["groups"] == [["block 1", 1], ["block 2", 2], ["last", 1]]
    assert "{{" not in page
    # Nothing to fetch: no address, no element or rule that has one, and the browser is told to refuse any.
    assert not re.search(r"https?:|//[a-z]|<link|<img|@import|url\(|\bsrc=|fetch\(|import\(|XMLHttp", page)
    assert "default-src 'none'" in page
    assert "not causal importance" in page


def test_names_of_tokens_stay_text(tmp_path: Path) -> None:
    names = ["</script><script>alert(1)</script>", "<!--", "caf\u00e9 \ud800", '"']
    made_up().to_html(tmp_path / "depth.html", tokens=names)
    page = (tmp_path / "depth.html").read_text("utf-8")
    assert data_in(page)["tokens"] == {"shape": [2, 3], "shown": 6, "names": names}
    assert page.count("</script>") == 2
    assert "alert(1)</" not in page


def test_a_page_of_fewer_tokens(tmp_path: Path) -> None:
    depth = made_up()
    depth.to_html(tmp_path / "depth.html", tokens=list("abc"), max_tokens=2)
    data = data_in((tmp_path / "depth.html").read_text())
    assert data["tokens"] == {"shape": [2, 3], "shown": 2, "names": ["a", "b"]}
    assert torch.equal(
        decoded(data["by_token"], 2, 4, 4)[1].nan_to_num(-1), depth.token_weights[:, :, 0, 1].nan_to_num(-1)
    )
    for arguments, message in (({"tokens": list("abcdefg")}, "7 names, but there are 6"), ({"max_tokens": -1}, "-1")):
        with pytest.raises(ValueError, match=message):
            depth.to_html(tmp_path / "other.html", **arguments)
    assert not (tmp_path / "other.html").exists()


def test_the_template_is_in_the_wheel_that_is_built() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    patterns = re.findall(r'"([^"]+)"', text.partition("[tool.setuptools.package-data]")[2].partition("\n[")[0])
    found = {path for pattern in patterns for path in (ROOT / "attnres_rewrite").glob(pattern)}
    others = {
        path for path in (ROOT / "attnres_rewrite").rglob("*") if path.suffix in (".html", ".typed", ".js", ".css")
    }
    assert others <= found


# In a browser


def in_browser(page: Path, folder: Path, fragment: str = "", script: str = "") -> str:
    """The document after its scripts, and ``script`` behind them, have run."""
    assert CHROMIUM is not None
    if script:
        # The page's own policy allows scripts within it.
        page = page.with_name("scripted.html")
        page.write_text((page.with_name("depth.html")).read_text() + f"<script>{script}</script>")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder}", "--dump-dom", f"{page.as_uri()}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def cells_in(document: str) -> list[list[str]]:
    body = document.partition("<tbody>")[2].partition("</tbody>")[0]
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)]


def expected(weights: Tensor) -> list[list[str]]:
    return [["" if value != value else f"{value:.2f}" for value in row] for row in weights.tolist()]


def text_of(document: str, pattern: str) -> str:
    (inner,) = re.findall(pattern, document, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "|", inner))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH")
    made_up().to_html(tmp_path / "depth.html", tokens=["The", "</b>cat"])
    return tmp_path / "depth.html"


@pytest.mark.slow
def test_a_browser_shows_the_mean_and_then_a_token(page: Path, tmp_path: Path) -> None:
    depth = made_up()
    document = in_browser(page, tmp_path / "a")
    assert cells_in(document) == expected(depth.weights)
    assert text_of(document, r"<output[^>]*>(.*?)</output>") == "mean over all tokens"
    names = re.findall(r'<th class="site">([^<]*)</th>', document)
    assert names == depth.labels
    assert re.findall(r'<th class="block" rowspan="(\d)"><span>([^<]*)<', document) == [
        ("1", "block 1"),
        ("2", "block 2"),
        ("1", "last"),
    ]
    document = in_browser(page, tmp_path / "a", "#token=1&theme=dark")
    assert cells_in(document) == expected(depth.token_weights[:, :, 0, 1])
    assert text_of(document, r"<output[^>]*>(.*?)</output>") == 'sequence 0, token 1: "</b>cat"'
    assert 'data-theme="dark"' in document


@pytest.mark.slow
def test_the_slider_the_switch_and_what_hovering_shows(page: Path, tmp_path: Path) -> None:
    depth = made_up()
    script = """
    slider.value = 5;
    slider.dispatchEvent(new Event("input"));
    document.getElementById("theme").click();
    document.querySelector('td[data-site="2"][data-source="1"]').dispatchEvent(
      new MouseEvent("mousemove", { bubbles: true, clientX: 9, clientY: 9 }));
    """
    document = in_browser(page, tmp_path / "a", "#theme=light", script)
    weights = depth.token_weights[:, :, 1, 1]
    assert cells_in(document) == expected(weights)
    assert text_of(document, r"<output[^>]*>(.*?)</output>") == "sequence 1, token 1"
    assert 'data-theme="dark"' in document
    shown = [part for part in text_of(document, r'<div id="tip"[^>]*>(.*?)</div></div>').split("|") if part]
    assert shown == [
        f"{weights[2, 1]:.4f}",
        "layers.1.mlp reads b_1",
        "model.layers.0",
        f"mean over all tokens {depth.weights[2, 1]:.4f}",
    ]


@pytest.mark.slow
def test_many_sources_have_colours_up_to_the_largest(page: Path, tmp_path: Path) -> None:
    depth = made_up()
    wide = dataclasses.replace(
        depth,
        sources=[*(f"b_{n}" for n in range(30)), "partial"],
        weights=torch.cat([depth.weights[:, :3], torch.full((4, 27), float("nan")), depth.weights[:, 3:]], 1),
        token_weights=torch.cat(
            [depth.token_weights[:, :3], torch.full((4, 27, 2, 3), float("nan")), depth.token_weights[:, 3:]], 1
        ),
    )
    wide.to_html(page)
    document = in_browser(page, tmp_path / "a")
    assert cells_in(document) == expected(wide.weights)
    largest = depth.weights.nan_to_num().max().item()
    assert text_of(document, r'<span id="top">(.*?)</span>') == f"{largest:.2f}"
    shares = [float(share) for share in re.findall(r"--w: ([\d.]+)", document)]
    given = [value / largest for value in depth.weights.flatten().tolist() if value == value]
    assert shares == pytest.approx(given, abs=1e-4)
