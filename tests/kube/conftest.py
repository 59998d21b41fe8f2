"""A test that fails on a Kubernetes says how its pods are."""

from collections.abc import Generator

import pytest

from kube import cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the state of all namespaces to the report of a failure."""
    report = yield
    if report.failed and report.when == "call":
        report.sections += [("Kubernetes", each.state()) for each in cluster.in_use]
    return report
