"""What a rewritten model is asked.

:mod:`verification` compares it with its original, which :mod:`wide` computes. :mod:`depth` has its depth weights:
:mod:`depth_recording` records them while the model runs, :mod:`readers` names the modules that read, :mod:`depth_plot`
and :mod:`depth_page` show them. :mod:`statistics` has numbers to log, and :mod:`dynamics` output magnitudes and
gradient norms by depth, which :mod:`sublayers` records.
"""
