"""Reading ``torch.fx`` graphs, in the dialects of Dynamo and of ``torch.export`` alike.

:mod:`nodes` answers what one node is and computes from, :mod:`memory` what shares memory with it or writes to it,
:mod:`extent` which nodes belong to a residual stream, and :mod:`weights` how much these compute.
"""
