"""The picture of a report: blocks as boxes, their sums as lanes beside them, and reads as lines to their sources.

::

    [ b_0  embed_tokens      ]────●
    [ block 1                ]    │
    [   input_layernorm → .. ]◄───●
    [   post_attention ..    ]◄───●───○     the sum of the block in progress
    [ block 2                ]    │   │
    [   input_layernorm → .. ]◄───●───●     the finished sum b_1
"""

from __future__ import annotations

from collections.abc import Sequence

from attnres_rewrite.report.data import StreamReport
from attnres_rewrite.report.rows import MOST_BLOCKS, Box, Layer, Row, boxes_of, rows_of
from attnres_rewrite.report.svg import LARGE, SMALL, Canvas, width_of

_MARGIN, _PAD, _LINE, _SPACE = 20.0, 12.0, 24.0, 12.0
_LANE, _FIRST_LANE = 40.0, 46.0
# Longer labels are cut; the whole one is shown where the pointer is over it.
_LONGEST = 36


def picture(streams: Sequence[StreamReport]) -> str:
    """The streams, one below the other, as an SVG document."""
    page = Canvas.page("Block Attention Residuals", "\n".join(map(_in_words, streams)))
    width, y = 0.0, _MARGIN
    for stream in streams:
        drawn = _Stream(page, stream, y)
        width, y = max(width, drawn.right), drawn.bottom + _MARGIN
    right, bottom = _legend(page, y, counts=any(len(stream.blocks) > MOST_BLOCKS for stream in streams))
    return page.finished(max(width, right) + _MARGIN, bottom + _MARGIN / 2)


def _in_words(stream: StreamReport) -> str:
    """What the picture of a stream shows, for those who cannot see it."""
    blocks = "; ".join(f"block {n}: {_span(layers)}" for n, layers in enumerate(stream.blocks, start=1))
    fewest, most = min(stream.sources), max(stream.sources)
    return f"{_heading(stream)}. {_facts(stream)}. {blocks}. Every site reads {fewest} to {most} sources."


def _heading(stream: StreamReport) -> str:
    return f"Residual stream of {stream.owner or 'the model'}"


def _facts(stream: StreamReport) -> str:
    counts = [_count(len(stream.layers), "layer") + f" in {_count(len(stream.blocks), 'block')}"]
    counts += [_count(len(stream.sites), "site"), f"width {stream.width:,}", f"{stream.parameters:,} parameters added"]
    return ", ".join(counts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _legend(page: Canvas, y: float, *, counts: bool) -> tuple[float, float]:
    """What the marks mean, from ``y`` on; returns where it ends, on the right and below."""
    legend, x = page.group("legend", "What the marks mean"), _MARGIN + 17
    marks = (
        ("source", "reads b_0 (the embedding) or b_n (the sum of block n)" + "; a number: so many of them" * counts),
        ("source partial", "reads the sum of the block in progress"),
        ("plus", "adds the output of a sublayer to the block"),
    )
    for kind, text in marks:
        _plus(legend, _MARGIN + 5, y) if kind == "plus" else legend.dot(kind, _MARGIN + 5, y, 4)
        legend.text("small muted", x, y, text)
        y += 18
    return x + max(width_of(text, SMALL) for _, text in marks), y


def _plus(canvas: Canvas, x: float, y: float) -> None:
    canvas.line("plus", x - 4, y, x + 4, y)
    canvas.line("plus", x, y - 4, x, y + 4)


class _Stream:
    """One stream, drawn below ``y``.

    Attributes:
        right: Where it ends on the right.
        bottom: Where it ends.
    """

    def __init__(self, page: Canvas, stream: StreamReport, y: float) -> None:
        self.page, self.stream = page, stream
        self.boxes, self.y = boxes_of(stream), y
        self.last = rows_of(stream)[-1]
        self._measure()
        self._heading()
        # For every lane, where the sum begins and where it is finished.
        self.begun, self.ended = {0: self.y + _LINE / 2}, {0: self.y + _LINE / 2}
        self._embedding()
        for number, box in enumerate(self.boxes, start=1):
            self._block(number, box)
        self._last_read()
        self.bottom = self.y
        self._lanes()
        for row, at in self.reads:
            self._read(row, at)

    def _measure(self) -> None:
        layers = [(box, layer) for box in self.boxes for layer in box.layers]
        rows = [(row, layer) for box, layer in layers if _is_drawn(box, layer) for row in layer.rows]
        self.read_width = max(width_of(self._label(row.read_by, layer), mono=True) for row, layer in rows)
        adds_width = max(width_of(self._label(row.adds, layer), mono=True) for row, layer in rows)
        alone = [self._label((self.stream.root,), None), self._label(self.last.read_by, None)]
        inside = [self.read_width + 38 + adds_width, *(width_of(label, mono=True) + 40 for label in alone)]
        inside += [width_of(self._box_title(box), mono=True) + 70 for box in self.boxes]
        self.box_right = _MARGIN + 2 * _PAD + _SPACE + max(inside)
        lanes = 1 + len(self.boxes)
        self.right = max(
            self.lane_x(lanes - 1) + _LANE,
            _MARGIN + max(width_of(_heading(self.stream), LARGE), width_of(_facts(self.stream))),
        )
        # For the number of every block, the lane of its sum; the sums of blocks that are not drawn share one.
        self.lane_of = {0: 0, **{n: lane for lane, box in enumerate(self.boxes, start=1) for n in box.blocks}}
        self.reads: list[tuple[Row, float]] = []

    def lane_x(self, lane: int) -> float:
        return self.box_right + _FIRST_LANE + lane * _LANE

    def _label(self, names: Sequence[str], layer: Layer | None) -> str:
        """The modules ``names``, as they are called within the layer or the owner."""
        outer = [*(layer.names[:1] if layer is not None else ()), self.stream.owner]
        return _cut(", ".join(_within(name, outer) for name in names))

    def _heading(self) -> None:
        self.page.text("title", _MARGIN, self.y, _heading(self.stream))
        self.page.text("muted", _MARGIN, self.y + 20, _facts(self.stream))
        self.y += 20 + _LINE

    def _frame(self, kind: str, title: str, height: float, **data: object) -> Canvas:
        """A box at the current height, with what is inside of it as a group."""
        group = self.page.group(kind, title, **data)
        group.box(f"box {kind}", _MARGIN, self.y, self.box_right - _MARGIN, height)
        return group

    def _embedding(self) -> None:
        frame = self._frame("embedding", f"b_0: {self.stream.root}", _LINE)
        at = self.y + _LINE / 2
        frame.text("strong", _MARGIN + _PAD, at, "b_0")
        frame.text("mono muted", _MARGIN + _PAD + 32, at, self._label((self.stream.root,), None))
        frame.line("lane", self.box_right, at, self.lane_x(0), at)
        self.y += _LINE + _SPACE

    def _block(self, lane: int, box: Box) -> None:
        top, one = self.y, len(box.blocks) == 1
        names = tuple(dict.fromkeys(name for layer in box.layers for name in layer.names))
        title = f"block {box.blocks[0]}" if one else f"blocks {box.blocks[0]} … {box.blocks[-1]}"
        numbers = f"{box.blocks[0]}" if one else f"{box.blocks[0]}-{box.blocks[-1]}"
        kind = "block" if one else "gap"
        group = self._frame(kind, f"{title}: {', '.join(names)}", self._height(box), number=numbers)
        at = self.y + _LINE / 2 + 2
        group.text("strong", _MARGIN + _PAD, at, title)
        group.text("mono muted", _MARGIN + _PAD + 1.1 * width_of(title) + 12, at, self._box_title(box))
        self.y += _LINE + 4
        if one:
            for layer in box.layers:
                self._layer(group, lane, layer, titled=len(box.layers) > 1)
        else:
            self._gap(group, box.layers[0], "")
            self.begun[lane] = top + _LINE / 2
        self.y = top + self._height(box)
        self.ended[lane] = self.y
        self.y += _SPACE

    def _box_title(self, box: Box) -> str:
        names = [name for layer in box.layers for name in layer.names]
        return _cut(_span([_within(name, [self.stream.owner]) for name in dict.fromkeys(names)]))

    def _height(self, box: Box) -> float:
        lines = sum((len(layer.rows) + (len(box.layers) > 1)) if _is_drawn(box, layer) else 1 for layer in box.layers)
        return (lines + 1) * _LINE + _SPACE

    def _layer(self, group: Canvas, lane: int, layer: Layer, *, titled: bool) -> None:
        if len(layer.names) > 1:
            self._gap(group, layer, f"{len(layer.names)} more layers: ")
            return
        if titled:
            group.text("mono muted", _MARGIN + _PAD, self.y + _LINE / 2, self._label(layer.names, None))
            self.y += _LINE
        for row in layer.rows:
            self._row(group, lane, row, layer)

    def _gap(self, group: Canvas, layer: Layer, what: str) -> None:
        counts = sorted({len(row.sources) for row in layer.rows})
        sources = f"{counts[0]} to {counts[-1]} sources" if len(counts) > 1 else _count(counts[0], "source")
        reads = f"{what}{_count(len(layer.rows), 'read')} of {sources}"
        group.text("muted", _MARGIN + _PAD, self.y + _LINE / 2, f"⋮  {reads}")
        self.y += _LINE

    def _row(self, group: Canvas, lane: int, row: Row, layer: Layer) -> None:
        at, x = self.y + _LINE / 2, _MARGIN + _PAD + _SPACE
        group.text("mono", x, at, self._label(row.read_by, layer))
        if row.adds:
            group.text("muted", x + self.read_width + 10, at, "→")
            group.text("mono muted", x + self.read_width + 32, at, self._label(row.adds, layer))
            _plus(group, self.lane_x(lane), at + _LINE / 2)
        self.begun.setdefault(lane, at + _LINE / 2)
        self.reads.append((row, at))
        self.y += _LINE

    def _last_read(self) -> None:
        frame = self._frame("after", "the read after the last block", _LINE)
        at = self.y + _LINE / 2
        frame.text("mono", _MARGIN + _PAD, at, self._label(self.last.read_by, None))
        self.reads.append((self.last, at))
        self.y += _LINE + _SPACE

    def _lanes(self) -> None:
        for lane, begun in self.begun.items():
            x, ended = self.lane_x(lane), self.ended[lane]
            numbers = [number for number, of in self.lane_of.items() if of == lane]
            label = _span([f"b_{number}" for number in numbers])
            group = self.page.group("sum", label)
            if begun < ended:
                group.line("lane in-progress", x, begun, x, ended)
            group.line("lane", x, ended, x, self.bottom - _SPACE - _LINE / 2)
            group.text("strong", x + 6, ended + (_SPACE / 2 if lane else -_SPACE), label)

    def _read(self, row: Row, at: float) -> None:
        """The line from a read to its sources."""
        block = self.stream.sites[row.site].block if row.site is not None else 0
        lanes: dict[tuple[int, str], int] = {}
        for source in row.sources:
            number = block if source == "partial" else int(source.removeprefix("b_"))
            key = self.lane_of[number], "source partial" if source == "partial" else "source"
            lanes[key] = lanes.get(key, 0) + 1
        what = "no site: it" if row.site is None else f"site {row.site}:"
        title = f"{what} {', '.join(row.read_by)} reads {', '.join(row.sources)}"
        data = {} if row.site is None else {"site": row.site}
        group = self.page.group("read" if row.site is None else "read site", title, **data)
        group.line("read-line", self.box_right + 4, at, self.lane_x(max(lane for lane, _ in lanes)), at)
        group.arrow_head("read-end", self.box_right + 1, at)
        for (lane, kind), count in lanes.items():
            if count == 1:
                group.dot(kind, self.lane_x(lane), at, 4)
            else:
                group.box(kind, self.lane_x(lane) - 12, at - 7, 24, 14, radius=7)
                group.text("count", self.lane_x(lane), at, str(count), anchor="middle")


def _is_drawn(box: Box, layer: Layer) -> bool:
    return len(box.blocks) == 1 and len(layer.names) == 1


def _within(name: str, modules: Sequence[str]) -> str:
    """What the module ``name`` is called within the first of ``modules`` that it is in."""
    return next((name.removeprefix(f"{outer}.") for outer in modules if name.startswith(f"{outer}.")), name)
