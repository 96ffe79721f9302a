"""What all tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `--numprocesses auto`: one more than there are cores, as a third of a test's time is
    waiting; few enough that each gets a core soon."""
    return min(4, len(os.sched_getaffinity(0)) + 1)


@pytest.fixture(scope="session", autouse=True)
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads what another run has learned, nor leaves anything in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.delenv("STATE_DIRECTORY", raising=False)
        yield


@pytest.fixture(autouse=True)
def untraced_if_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Coverage makes a test that does nothing but calculate take three times as long. What the
    marked ones run through, quicker ones run through as well."""
    tracer = None if request.node.get_closest_marker("untraced") is None else sys.gettrace()
    if tracer is None:
        yield
        return
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)
