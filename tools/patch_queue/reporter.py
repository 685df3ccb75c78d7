# Copyright (c) 2026, the megatron-core gptoss authors.
"""A pytest plugin: run the tests that a file lists, and append each result as a JSON line.

Ids on the command line would end the run if one file cannot be imported.
"""

import json
import os
import re

LIST, REPORT = "PATCH_QUEUE_TESTS", "PATCH_QUEUE_REPORT"


def pytest_collection_modifyitems(config, items):
    """Keep the listed tests, or all; an id without [parameters] selects all of them."""
    if LIST not in os.environ:
        return
    with open(os.environ[LIST], encoding="utf-8") as file:
        chosen = set(file.read().split())
    keep = [i for i in items if {i.nodeid, i.nodeid.partition("[")[0]} & chosen]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep


def pytest_runtest_logreport(report):
    """One line for each test: after its call, or after a setup that did not pass."""
    if report.when == "call" or not report.passed and report.when == "setup":
        _write(report.nodeid, report.outcome, report)


def pytest_collectreport(report):
    """A file that cannot be imported."""
    if report.failed:
        _write(report.nodeid, "failed", report)


def _write(nodeid, outcome, report) -> None:
    line = {"test": nodeid, "outcome": outcome, "reason": _reason(report)}
    with open(os.environ[REPORT], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _reason(report) -> str:
    """The exception of the test itself or, where ranks ran it, of the rank that raised."""
    if report.passed:
        return ""
    if report.skipped:
        return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
    text = report.longreprtext
    raised = re.findall(r"^(?:E +)?((?:\w+\.)*\w*(?:Error|Exception)\b:? ?.*)$", text, flags=re.M)
    telling = [
        line
        for line in raised
        if line.rstrip(": ") not in ("AssertionError", "Error") and "while importing" not in line
    ]
    lines = re.findall(r"^E +(\S.*)$", text, flags=re.M)
    return (telling or lines or text.strip().splitlines() or [""])[0]
