"""``python -m attnres_rewrite.bench MODEL FORM SETTINGS``: the process that :func:`run_alone` starts."""

import sys
from typing import cast

from attnres_rewrite.bench.alone import main
from attnres_rewrite.bench.settings import Form

if __name__ == "__main__":
    name, form, settings = sys.argv[1:]
    main(name, cast(Form, form), settings)
