"""The architecture zoo: which models are rewritten, which are refused and why, as data, and what each must show."""
