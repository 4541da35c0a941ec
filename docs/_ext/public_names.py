"""Writes the entries of the reference page: every public name, by group, from its docstring."""

from __future__ import annotations

import inspect
import operator
import re
from typing import Any

from docutils import nodes

import attnres_rewrite
import attnres_rewrite.distributed
from attnres_rewrite.report import StreamReport

PAGE = "reference"
# Which section a name is in. Whatever is public and in none of them comes last, and a test asks for its section.
GROUPS = {
    "Rewrite a model": ["rewrite", "AttnResConfig", "explain", "Report", "undo", "disabled"],
    "Train it": [
        "parameter_groups",
        "muon_groups",
        "load_plain_optimizer_state",
        "attnres_parameters",
        "warm_up",
        "log_dict",
    ],
    "Look into it": [
        "verify",
        "Verification",
        "depth_attention",
        "DepthAttention",
        "training_dynamics",
        "TrainingDynamics",
    ],
    "Save and load it": ["save_pretrained", "from_pretrained", "import_state_dict", "export_state_dict"],
    "Compile and export it": ["AttnResBackend", "export_onnx", "OnnxExport", "decompositions"],
    "Errors": [
        "AttnResError",
        "NoResidualStreamError",
        "UnsupportedResidualError",
        "GraphBreakError",
        "NotRewrittenError",
        "BlockPartitionError",
        "ExampleInputsError",
        "CheckpointError",
        "MeshError",
        "OnnxExportError",
        "OnnxKernelError",
        "MissingPackageError",
    ],
}

# What is public in a module of the package, by the section that it is in too.
IN_MODULES = {
    "Compile and export it": ["onnx.register", "onnx.RegisteredKernel", "onnx.build_kernel"],
    "Train it on several processes": [
        "distributed.build_stages",
        "distributed.plan",
        "distributed.Plan",
        "distributed.ModelSize",
    ],
}

# What a public name consists of, and is documented after it.
PARTS = {"Report": StreamReport}


def ungrouped() -> list[str]:
    """Public names that no group has."""
    grouped = {name for names in GROUPS.values() for name in names}
    return [name for name in attnres_rewrite.__all__ if name not in grouped]


def sections() -> str:
    """The sections of the page, in Markdown."""
    groups = {**GROUPS, "Others": ungrouped()}
    groups["Train it on several processes"] = []
    entries = {title: [*names, *IN_MODULES.get(title, [])] for title, names in groups.items()}
    return "\n".join(f"## {title}\n\n{''.join(map(_entries, names))}" for title, names in entries.items() if names)


def _entries(name: str) -> str:
    text = _entry(f"attnres_rewrite.{name}", operator.attrgetter(name)(attnres_rewrite))
    part = PARTS.get(name)
    return text + (_entry(f"{part.__module__}.{part.__qualname__}", part) if part else "")


def _entry(path: str, value: Any) -> str:
    directive, option = "autoclass", ":members:"
    if inspect.isfunction(value):
        directive, option = "autofunction", ""
    elif issubclass(value, BaseException):
        directive, option = "autoexception", ":show-inheritance:"
    return f"```{{eval-rst}}\n.. {directive}:: {path}\n   {option}\n```\n\n"


def _write(app: Any, page: str, source: list[str]) -> None:
    if page == PAGE:
        source[0] += "\n" + sections()


class _Properties:
    """Keeps napoleon from taking what stands before a colon in the first sentence of a property for its type."""

    def __init__(self, app: Any) -> None:
        self.lines: list[str] = []
        app.connect("autodoc-process-docstring", self.keep, priority=1)
        app.connect("autodoc-process-docstring", self.restore, priority=999)

    def keep(self, app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
        self.lines = list(lines)

    def restore(self, app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
        if what == "property":
            lines[:] = self.lines


def _drop_tildes(app: Any, doctree: nodes.document) -> None:
    """Sphinx marks names to be shortened by a tilde, and leaves that in types that have a ``Literal`` in them."""
    if app.env.docname == PAGE:
        for text in list(doctree.findall(nodes.Text)):
            text.parent.replace(text, nodes.Text(re.sub(r"~(\w+\.)+", "", text)))


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _write)
    app.connect("doctree-read", _drop_tildes)
    _Properties(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
