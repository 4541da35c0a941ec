"""A model rewritten and compiled against the same model plain and compiled; ``attnres bench`` runs it.

    settings = BenchSettings(blocks=4, length=512, device="cpu")
    result = compare(make_model, settings)  # make_model() returns the plain model
    print(result.times["training"].ratio)

Absolute times are those of a machine and its day. What counts is the ratio of two steps that ran one after the other.
"""

from attnres_rewrite.bench.alone import measure_alone, run_alone
from attnres_rewrite.bench.results import Alone, BenchResult, FormAlone, StepTimes
from attnres_rewrite.bench.settings import FORMS, BenchSettings, Form, Kind
from attnres_rewrite.bench.timing import compare

__all__ = [
    "FORMS",
    "Alone",
    "BenchResult",
    "BenchSettings",
    "Form",
    "FormAlone",
    "Kind",
    "StepTimes",
    "compare",
    "measure_alone",
    "run_alone",
]
