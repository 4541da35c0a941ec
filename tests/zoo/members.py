"""All members of the zoo, and how many there are of each kind."""

import collections

from zoo import (
    audio,
    causal_lm,
    depth,
    encoder_decoder,
    encoders,
    handwritten,
    libraries,
    linked,
    multimodal,
    styles,
    vision,
)
from zoo.member import Accepted, Member, Refused, Unbuildable

FAMILIES = (
    causal_lm,
    encoders,
    encoder_decoder,
    vision,
    audio,
    multimodal,
    libraries,
    handwritten,
    linked,
    styles,
    depth,
)
MEMBERS: list[Member] = [member for family in FAMILIES for member in family.MEMBERS]

Totals = dict[str, collections.Counter[str]]


def kind_of(member: Member) -> str:
    """What a member is counted as: accepted, or refused or unbuildable with the reason."""
    match member.outcome:
        case Accepted():
            return "accepted"
        case Refused(reason=reason):
            return f"refused: {reason}"
        case Unbuildable(reason=reason):
            return f"unbuildable: {reason}"


def totals(members: list[Member]) -> Totals:
    """For every family, the number of members of each kind."""
    found: Totals = {}
    for member in members:
        found.setdefault(member.family, collections.Counter())[kind_of(member)] += 1
    return found


def table(found: Totals) -> list[str]:
    """The lines of the table that ``make zoo`` prints."""
    lines = [f"{'family':24}{'members':>8}{'accepted':>10}{'refused':>9}{'unbuildable':>13}"]
    whole: collections.Counter[str] = collections.Counter()
    for family, counts in [*found.items(), ("in all", whole)]:
        by_outcome: collections.Counter[str] = collections.Counter()
        for kind, count in counts.items():
            by_outcome[kind.split(":")[0]] += count
        row = [by_outcome[outcome] for outcome in ("accepted", "refused", "unbuildable")]
        lines.append(f"{family:24}{sum(row):8}{row[0]:10}{row[1]:9}{row[2]:13}")
        if family != "in all":
            whole.update(counts)
    reasons = [(kind, count) for kind, count in whole.most_common() if kind != "accepted"]
    return [*lines, "", *(f"{count:5}  {kind}" for kind, count in reasons)]
