"""Sites as one operator of ONNX Runtime: a library in C++, built on demand, and how a session gets it.

``block_attn_res.cc`` is the operator, ``rows.h`` the arithmetic, ``lanes.h`` the vectors that it is made of, and
``runtime.h`` the way to ONNX Runtime. In ``third_party`` is the header of its C interface, with its licence.
"""

from attnres_rewrite.onnx.kernel.build import build_kernel
from attnres_rewrite.onnx.kernel.registration import RegisteredKernel, register

__all__ = ["RegisteredKernel", "build_kernel", "register"]
