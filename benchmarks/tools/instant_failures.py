"""A pytest plugin: each failure in full at once, as a run that is killed prints no summary."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n=== {report.nodeid}, {report.when}\n{report.longreprtext}\n", flush=True)
