"""Export of rewritten models to ONNX: a site is one node, and a file is checked before it gets its name."""

from attnres_rewrite.onnx.export import OnnxExport, export_onnx
from attnres_rewrite.onnx.kernel import RegisteredKernel, build_kernel, register

__all__ = ["OnnxExport", "RegisteredKernel", "build_kernel", "export_onnx", "register"]
