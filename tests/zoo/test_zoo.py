"""Every member of the zoo keeps to its expected outcome; ``make zoo`` runs all, ``make test`` a few of each kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zoo.causal_lm import MISSING
from zoo.checks import MODES, check, check_compiled_once
from zoo.member import Accepted, Member
from zoo.members import MEMBERS, kind_of, table, totals

# A few; the rest is marked, and left to `make zoo`.
REPRESENTATIVE = {
    "causal language model-mixtral",
    "encoder-ModernBERT",
    "audio-wav2vec2",
    "multimodal-CLIP",
    "x-transformers-x-transformers scale_residual",
    "torch.nn-torch.nn.TransformerDecoder pre-norm",
    "hand-written-sublayers as attributes",
    "hand-written-gated by hand",
}


def cases() -> Iterator[object]:
    for member in MEMBERS:
        name = f"{member.family}-{member.name}"
        yield pytest.param(member, id=name, marks=() if name in REPRESENTATIVE else pytest.mark.zoo)


@pytest.mark.parametrize("member", cases())
def test_member(member: Member, record_property, request: pytest.FixtureRequest) -> None:
    """By turns a member runs in eval mode at changing sizes, or in training; tracing is most of what either takes."""
    record_property("zoo", (member.family, kind_of(member)))
    torch._dynamo.reset()
    both = request.config.getoption("--both-modes", default=False)
    check(member, MODES if both else {MODES[MEMBERS.index(member) % 2]})


# One in every forty, from all families, and four that write into tensors of their own, are complex or count their
# calls. AOTAutograd cannot run PatchTSMixer in training, in either form: on a CPU the backward of its dropout has other
# strides than is assumed.
_TRAINED = [m for m in MEMBERS if isinstance(m.outcome, Accepted) and not m.outcome.untrainable]
_FOUND = ("codegen", "deepseek_v2", "deepseek_v3", "hunyuan_v1_moe")
_COMPILED = [m for i, m in enumerate(_TRAINED) if i % 40 == 0 or m.name in _FOUND if m.name != "PatchTSMixer"]


@pytest.mark.zoo
@pytest.mark.parametrize("member", _COMPILED, ids=lambda member: f"{member.family}-{member.name}")
def test_layers_compiled_once(member: Member) -> None:
    """In training, the numbers of layers that are calls of one graph are those of layers that are not."""
    check_compiled_once(member)


def test_every_causal_language_model_of_transformers_is_listed() -> None:
    assert not MISSING


def test_names_are_unique() -> None:
    names = [(member.family, member.name) for member in MEMBERS]
    assert len(names) == len(set(names))
    assert {f"{family}-{name}" for family, name in names} >= REPRESENTATIVE


def test_the_readme_quotes_the_totals() -> None:
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    assert "\n".join(table(totals(MEMBERS))) in readme
