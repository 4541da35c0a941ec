"""The three kinds of input that a rewrite takes, and keeps: live module, ``ExportedProgram``, ``GraphModule``.

The live form is the largest. :mod:`live` puts it into a module, :mod:`anchor` marks its owner in a traced graph,
:mod:`backend` finds that mark and rewrites the graph, :mod:`live_state` holds what its owners share, and
:mod:`layer_guard` answers for layers that run without their owner.
"""
