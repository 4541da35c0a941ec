"""``python -m attnres_rewrite.cli``."""

from attnres_rewrite.cli import main

main()
