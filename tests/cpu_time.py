"""Keeps the default tests short: with `--cpu-limit SECONDS` a test that takes more CPU time fails the run.

CPU time, of the process and of those it has waited for, is nearly the same on a busy machine. What a test is the first
to need (a fixture, an import, a program to compile) counts as its own.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

NAME = "CPU seconds"
_seconds: dict[str, float] = {}
_begun = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    item.stash[_begun] = _spent()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    report.user_properties.append((NAME, _spent() - item.stash[_begun]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process that prints, whichever ran the test."""
    if report.when == "teardown":
        _seconds[report.nodeid] = float(str(dict(report.user_properties)[NAME]))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    limit = session.config.getoption("--cpu-limit")
    if limit is not None and any(seconds > limit for seconds in _seconds.values()):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    limit = config.getoption("--cpu-limit")
    over = {name: seconds for name, seconds in _seconds.items() if limit is not None and seconds > limit}
    if over:
        terminalreporter.section(f"over {limit:g} {NAME}: make it cheaper, or mark it slow (CONTRIBUTING.md)", red=True)
    for name, seconds in sorted(over.items(), key=lambda each: -each[1]):
        terminalreporter.line(f"{seconds:6.1f}  {name}")


def _spent() -> float:
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system
