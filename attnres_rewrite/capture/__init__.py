"""From a user's model and its inputs to graphs.

:mod:`inputs` makes a call of example inputs and leaves no trace of it in the model, :mod:`dynamo` captures the call as
one graph, and :mod:`graph_breaks` says why it is not one, and takes the graphs between the breaks.
"""
