"""Export of rewritten models to ONNX: a site is one node, and a file is checked before it gets its name."""

from attnres_rewrite.onnx.export import OnnxExport, export_onnx

__all__ = ["OnnxExport", "export_onnx"]
