"""The whole suite in two lanes: pytest and a fork of it, each with a file of tests at a time.

Most tests keep one core busy, or wait. Where few files are asked for there is one lane, and everything is as usual.
"""

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pytest

FEWEST_FILES = 6  # that a second lane is worth
FORK = multiprocessing.get_context("fork")


class Sender:
    """A plugin of the second lane: what happens to each test goes to the first one."""

    def __init__(self, config: pytest.Config, reports: Any) -> None:
        self.config, self.reports = config, reports

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.put(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """A hook of pytest's: run the tests; None leaves it to pytest."""
    groups = [list(items) for _, items in groupby(session.items, lambda item: item.path)]
    if len(groups) < FEWEST_FILES or session.config.option.collectonly or session.testsfailed or os.name != "posix":
        return None
    groups.sort(key=lambda items: -items[0].path.stat().st_size)  # so that both lanes end at about the same time
    session.config._tmp_path_factory.getbasetemp()  # one for both
    counter, numbers = os.pipe()
    os.write(numbers, bytes(range(len(groups))))
    os.close(numbers)

    def take() -> list[pytest.Item]:
        """The next file's tests, if there is one; each number is read by one lane."""
        number = os.read(counter, 1)
        return groups[number[0]] if number else []

    reports = FORK.Queue()
    other = FORK.Process(target=second_lane, args=(session, take, reports))
    other.start()
    try:
        for _ in lane(session, take):
            tell(session, reports, other, wait=False)
        tell(session, reports, other, wait=True)
    finally:
        other.kill()
        other.join()
        os.close(counter)
    return True


def lane(session: pytest.Session, take: Callable[[], list[pytest.Item]]) -> Iterator[None]:
    """Run files of tests until none is left; pauses after each test."""
    items = take()
    while items:
        following = take()
        for item, nextitem in zip(items, [*items[1:], *(following[:1] or [None])]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            yield
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        items = following


def second_lane(session: pytest.Session, take: Callable[[], list[pytest.Item]], reports: Any) -> None:
    """In the fork: run tests, and send what happens in place of printing it. What is captured goes to its own files."""
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(Sender(session.config, reports))
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    capture.suspend_global_capture()
    try:
        for _ in lane(session, take):
            if not multiprocessing.parent_process().is_alive():
                break
    except (session.Failed, session.Interrupted):
        pass  # the first lane stops for the same report


def tell(session: pytest.Session, reports: Any, other: Any, wait: bool) -> None:
    """Report the second lane's tests as if they had run here: those that have ended, or all."""
    hook = session.config.hook
    while wait or not reports.empty():
        try:
            data = reports.get(timeout=0.1)
        except queue.Empty:
            if other.exitcode is None or not reports.empty():
                continue
            if other.exitcode:
                pytest.exit(f"the second lane died with exit code {other.exitcode}", 3)
            return
        hook.pytest_runtest_logreport(report=hook.pytest_report_from_serializable(config=session.config, data=data))
