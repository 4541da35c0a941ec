"""What a rewritten model is asked.

:mod:`verification` compares it with its original, :mod:`depth` has its depth weights, :mod:`statistics` numbers to log,
and :mod:`dynamics` output magnitudes and gradient norms by depth, which :mod:`sublayers` records.
"""
