"""Where Hugging Face's models are saved and loaded: a rewritten one comes back as one, or not at all.

:mod:`saving` marks the folder that ``save_pretrained`` writes; transformers calls :mod:`loading` when it reads one.
"""
