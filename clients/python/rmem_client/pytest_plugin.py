"""Fixtures for tests against a real daemon: ``rmemd`` and ``rmemd_daemon``.

Installed with this library and loaded by pytest itself. The daemon runs out of process, one per
test session (and per worker of pytest-xdist), and is started when a test first asks for it.
Options go into pytest's configuration: ``rmemd_host_memory``, ``rmemd_nodes``, ``rmemd_seed``.
Nothing of gRPC is imported before a fixture is used.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

from .daemon_process import DaemonFailed, DaemonProcess, NotInstalled

if TYPE_CHECKING:
    from .client import Client

_DAEMON = pytest.StashKey[DaemonProcess]()
# how much the daemon had logged, and in which of its lives, when the test began
_LOG_START = pytest.StashKey[tuple[int, int]]()
_USES_DAEMON = pytest.StashKey[bool]()
_REPLACED = "rmemd_replaced"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare what the configuration may say."""
    whose = "of the daemon of the rmemd fixtures"
    parser.addini("rmemd_host_memory", f"mock host memory {whose}", default="64M")
    parser.addini("rmemd_nodes", f"number of NUMA nodes {whose}", default="1")
    parser.addini("rmemd_seed", f"seed {whose}", default="0")


@pytest.fixture(scope="session")
def rmemd_daemon(pytestconfig: pytest.Config) -> Iterator[DaemonProcess]:
    """A daemon, started once; its ``socket_dir`` is what a Client, rmemctl or a VMM takes.

    Nothing resets it: that is what ``rmemd`` does, after each test that asks for it.
    """
    options = [
        f"--host-memory={pytestconfig.getini('rmemd_host_memory')}",
        f"--nodes={pytestconfig.getini('rmemd_nodes')}",
        f"--seed={pytestconfig.getini('rmemd_seed')}",
    ]
    try:
        daemon = DaemonProcess(options)
    except NotInstalled as error:
        pytest.fail(str(error), pytrace=False)
    try:
        daemon.start()
    except DaemonFailed as error:
        daemon.remove()
        pytest.fail(str(error), pytrace=False)
    pytestconfig.stash[_DAEMON] = daemon
    yield daemon
    del pytestconfig.stash[_DAEMON]
    try:
        daemon.stop()
    except DaemonFailed as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def rmemd(rmemd_daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A Client of a daemon on which nobody holds anything.

    After the test everything is given back: fault rules, VMs, files, pins, offlined frames. A
    daemon that cannot be as new (frames leaked or poisoned, or it died) is replaced, and the
    report says so. Handles and revisions go on counting from test to test.
    """
    from .client import Client
    from .reset import reset

    request.node.stash[_USES_DAEMON] = True
    if not rmemd_daemon.running:  # a test without this fixture ended it
        _replace(rmemd_daemon, request.node, "setup", "it had ended before this test")
    with Client(rmemd_daemon.socket_dir, token="") as client:
        yield client
    if not rmemd_daemon.running:
        why = f"it ended during this test, with exit code {rmemd_daemon.process.returncode}"
    else:
        # the test may have closed its own
        with Client(rmemd_daemon.socket_dir, token="") as client:
            why = reset(client)
    if why:
        _replace(rmemd_daemon, request.node, "teardown", why)


def _replace(daemon: DaemonProcess, item: pytest.Item, when: str, why: str) -> None:
    daemon.restart()
    item.user_properties.append((_REPLACED, why))
    item.add_report_section(when, "rmemd", f"The daemon was replaced by a fresh one: {why}\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Remember where in the daemon's log the test begins."""
    daemon = item.config.stash.get(_DAEMON, None)
    if daemon is not None:
        item.stash[_LOG_START] = daemon.starts, daemon.log_size()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach what the daemon logged during the test to a failing report."""
    report = yield
    daemon = item.config.stash.get(_DAEMON, None)
    if daemon is None or not report.failed:
        return report
    if item.stash.get(_USES_DAEMON, False) or "rmemd_daemon" in getattr(item, "fixturenames", ()):
        life, start = item.stash.get(_LOG_START, (0, 0))
        log = daemon.log(start if life == daemon.starts else 0)
        report.sections.append((f"rmemd log {report.when}", log or "(nothing was logged)\n"))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests cost a daemon, for those that passed, too."""
    told = {
        (report.nodeid, why)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
        for name, why in report.user_properties
        if name == _REPLACED
    }
    if told:
        terminalreporter.section("rmemd: daemon replaced by a fresh one")
        for nodeid, why in sorted(told):
            terminalreporter.line(f"{nodeid}: {why}")
