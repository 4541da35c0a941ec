"""Prints the table of the zoo after its tests."""

import collections

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--both-modes", action="store_true", help="every member in eval mode and in training, not in turns"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from zoo.members import table

    found, failed = {}, []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "zoo" and report.when == "call":
                    family, kind = value
                    found.setdefault(family, collections.Counter())[kind] += 1
                    failed += [report.nodeid] if outcome == "failed" else []
    if found:
        terminalreporter.section("the zoo")
        terminalreporter.write_line("\n".join(table(found)))
        terminalreporter.write_line(f"{len(failed)} of these do not keep to it" if failed else "all keep to it")
