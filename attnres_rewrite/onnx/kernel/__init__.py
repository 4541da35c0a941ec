"""Sites as operators of ONNX Runtime: a library in C++, built on demand, and how a session gets it.

``whole_site.h`` is the kernel of sites by themselves, ``shared_sites.h`` has those of sites that share, and
``kernel.h`` what these have in common. ``rows.h`` and ``phases.h`` are the arithmetic, ``lanes.h`` the vectors that it
is made of, and ``runtime.h`` the way to ONNX Runtime, which ``block_attn_res.cc`` gives the operators. In
``third_party`` is the header of its C interface, with its licence.
"""

from attnres_rewrite.onnx.kernel.build import build_kernel
from attnres_rewrite.onnx.kernel.registration import RegisteredKernel, register

__all__ = ["RegisteredKernel", "build_kernel", "register"]
