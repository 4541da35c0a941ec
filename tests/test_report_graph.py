"""The picture of the blocks: well-formed, and its boxes, reads and marks are those of the report."""

import dataclasses
import itertools
import xml.etree.ElementTree as ET

import pytest
import torch

import attnres_rewrite as ar
from attnres_rewrite.report import Report, SiteReport, StreamReport

SVG = "{http://www.w3.org/2000/svg}"
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama(layers: int = 4) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **LLAMA))


def t5() -> torch.nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8))


def deep(layers: int, blocks: int) -> Report:
    """The report of a model of two sublayers a layer, without the model; ``blocks`` has to divide the layers."""
    names = tuple(f"layers.{i}" for i in range(layers))
    per_block = 2 * layers // blocks
    sites = tuple(
        SiteReport(
            adds=(f"{names[k // 2]}.{'mlp' if k % 2 else 'attn'}",),
            layer=names[k // 2],
            block=k // per_block + 1,
            read_by=(f"reader.{k}",),
            # What came before site k: k + 1 branch outputs.
            sources=(
                *(f"b_{n}" for n in range((k + 1) // per_block + 1)),
                *(("partial",) if (k + 1) % per_block else ()),
            ),
        )
        for k in range(2 * layers)
    )
    grouped = itertools.groupby(sites, lambda site: site.block)
    of_blocks = tuple(tuple(dict.fromkeys(site.layer for site in group)) for _, group in grouped)
    sources = tuple(len(site.sources) for site in sites)
    stream = StreamReport("", 8, 2 * layers, names, of_blocks, sources, 32 * layers, 64, (), sites, "embed", ("norm",))
    return Report((stream,), 1, ())


def drawn(report: Report, folder) -> ET.Element:
    path = folder / "blocks.svg"
    report.graph(path)
    return ET.parse(path).getroot()


def groups(svg: ET.Element, kind: str) -> list[ET.Element]:
    """The groups that have all classes of ``kind``."""
    wanted = set(kind.split())
    return [group for group in svg.iter(f"{SVG}g") if wanted <= set(group.get("class", "").split())]


def texts(element: ET.Element) -> list[str]:
    return [text.text or "" for text in element.iter(f"{SVG}text")]


def title(group: ET.Element) -> str:
    return group.findtext(f"{SVG}title") or ""


@pytest.mark.parametrize(
    ("make", "blocks"), [(llama, 2), (llama, "full"), (llama, [1, 3]), (t5, 2)], ids=["even", "full", "uneven", "two"]
)
def test_boxes_reads_and_marks_are_those_of_the_report(make, blocks, tmp_path) -> None:
    report = ar.explain(make(), blocks)
    svg = drawn(report, tmp_path)

    boxes = [layers for stream in report.streams for layers in stream.blocks]
    assert [title(box).partition(": ")[2] for box in groups(svg, "block")] == [", ".join(names) for names in boxes]
    # A read of one source for every stream, that of the embedding, is no site.
    assert len(groups(svg, "read")) == sum(stream.branches + 1 for stream in report.streams)
    marks = [read.findall(f"{SVG}circle") for read in groups(svg, "read site")]
    assert [len(circles) for circles in marks] == [n for stream in report.streams for n in stream.sources]
    in_progress = [circle for circle in svg.iter(f"{SVG}circle") if circle.get("class") == "source partial"]
    # A block of s branch outputs is in progress at s - 1 of its sites; one mark more is in the legend.
    sizes = [
        sum(s.block == n + 1 for s in stream.sites) for stream in report.streams for n in range(len(stream.blocks))
    ]
    assert len(in_progress) == sum(size - 1 for size in sizes) + 1
    shown = texts(svg)
    for stream in report.streams:
        assert f"Residual stream of {stream.owner}" in shown
        assert set(stream.layers) <= {f"{stream.owner}.{text}" for text in shown}
    sums = [f"b_{n}" for stream in report.streams for n in range(len(stream.blocks) + 1)]
    assert [title(lane) for lane in groups(svg, "sum")] == sums


def test_marks_stand_on_the_lane_of_their_source(tmp_path) -> None:
    """Every source has a lane, which does not begin before the source is there."""
    report = deep(4, 2)
    svg = drawn(report, tmp_path)
    lanes = {title(lane): lane.find(f"{SVG}line") for lane in groups(svg, "sum")}
    assert list(lanes) == ["b_0", "b_1", "b_2"]
    for read, site in zip(groups(svg, "read site"), report.streams[0].sites, strict=True):
        expected = [lanes[f"b_{site.block}" if name == "partial" else name] for name in site.sources]
        circles = read.findall(f"{SVG}circle")
        assert [circle.get("cx") for circle in circles] == [lane.get("x1") for lane in expected]
        assert all(float(c.get("cy")) > float(lane.get("y1")) for c, lane in zip(circles, expected, strict=True))


@pytest.mark.slow
def test_sites_of_a_report_are_those_of_the_rewritten_model() -> None:
    model = llama()
    (stream,) = ar.explain(model, [1, 3]).streams
    ar.rewrite(model, [1, 3], backend="eager")
    weights = ar.depth_attention(model).weights
    assert [len(site.sources) for site in stream.sites] == (~weights.isnan()).sum(1).tolist()
    # Its last column is the block in progress.
    assert ["partial" in site.sources for site in stream.sites] == (~weights[:, -1].isnan()).tolist()
    norms = [f"model.layers.{i}.{norm}_layernorm" for i in range(4) for norm in ("input", "post_attention")]
    assert [site.read_by for site in stream.sites] == [(name,) for name in [*norms[1:], "model.norm"]]
    assert [site.layer for site in stream.sites] == [f"model.layers.{i // 2}" for i in range(8)]
    assert [site.block for site in stream.sites] == [1, 1, 2, 2, 2, 2, 2, 2]
    assert [site.adds for site in stream.sites[:2]] == [("model.layers.0.self_attn",), ("model.layers.0.mlp",)]
    assert (stream.root, stream.root_read_by) == ("model.embed_tokens", ("model.layers.0.input_layernorm",))


@pytest.mark.parametrize(
    ("layers", "blocks", "gaps"),
    [
        (12, 4, []),
        (96, 8, ["10 more layers: 20 reads of"] * 8),
        (96, 192, ["186 reads of"]),
        (93, 93, ["174 reads of"]),
    ],
    ids=["all", "layers", "full", "blocks"],
)
def test_long_runs_are_told_by_their_first_and_last(layers, blocks, gaps, tmp_path) -> None:
    svg = drawn(deep(layers, blocks), tmp_path)
    told = [text for text in texts(svg) if "⋮" in text]
    assert len(told) == len(gaps)
    assert all(gap in text for gap, text in zip(gaps, told, strict=True))
    left_out = sum(int(text.partition(" reads")[0].split()[-1]) for text in told)
    assert len(groups(svg, "read")) == 2 * layers + 1 - left_out
    assert float(svg.get("height")) < 2000
    assert float(svg.get("width")) < 1000
    # However many blocks are not drawn, the marks of a read stand for all of its sources.
    last = groups(svg, "read site")[-1]
    counts = sum(int(text) for text in texts(last))
    assert counts + len(last.findall(f"{SVG}circle")) == blocks + 1


def test_names_are_text_and_escaped(tmp_path) -> None:
    (stream,) = deep(2, 1).streams
    odd = dataclasses.replace(stream, owner='<a & "b">')
    svg = drawn(Report((odd,), 1, ()), tmp_path)
    assert texts(svg)[0] == 'Residual stream of <a & "b">'
    assert svg.get("role") == "img"
    assert svg.findtext(f"{SVG}title") == "Block Attention Residuals"
    assert "2 layers in 1 block, 4 sites" in svg.findtext(f"{SVG}desc")
    assert "prefers-color-scheme: dark" in svg.findtext(f"{SVG}style")


def test_a_file_of_another_kind_is_not_written(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a name that ends in \.svg"):
        deep(2, 1).graph(tmp_path / "blocks.png")
    assert list(tmp_path.iterdir()) == []
