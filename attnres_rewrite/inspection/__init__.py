"""What a rewritten model is asked: :mod:`verification` compares it with its original, :mod:`depth` has its weights."""
