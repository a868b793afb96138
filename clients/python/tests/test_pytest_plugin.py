"""The fixtures as a user's own test files meet them: each run is a pytest of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest_plugins = "pytester"

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_of_the_readme_passes(pytester: pytest.Pytester) -> None:
    example = README.split("```python\n")[1].split("```")[0]
    pytester.makepyfile(example)
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=example.count("def test_"))
    assert "replaced" not in result.stdout.str()


def test_nothing_is_left_for_the_next_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from rmem.v1 import host_pb2

        PIDS = set()

        @pytest.mark.parametrize("n", range(3))
        def test_it(rmemd, rmemd_daemon, n):
            PIDS.add(rmemd_daemon.process.pid)
            assert len(PIDS) == rmemd_daemon.starts == 1
            assert not rmemd.vms.list().vms
            assert not rmemd.files.list().files
            assert not rmemd.host.list_faults().rules
            host = rmemd.host.get()
            assert host.free_pages == host.nframes == 4096
            assert len(host.nodes) == 2
            assert host.seed == 7

            for consumer in ("gup", "tdx-today", "snp-move", "pkvm-today"):
                vm = rmemd.vms.create(consumer)
                file = rmemd.files.create(vm, 1 << 20)
                rmemd.vms.set_memory_region(vm, 0, gpa=0, size_bytes=1 << 20, file=file)
                rmemd.files.allocate(file, 0, 1 << 16)
            plain = rmemd.files.create(rmemd.vms.create("gup"), 1 << 20)
            rmemd.files.allocate(plain, 0, 1 << 16)
            for page in range(4):
                rmemd.files.pin(plain, page << 12, 8 << 12, purpose="DMA", holder="a device")
            rmemd.host.offline(4000, 16)
            rmemd.host.add_fault("map", "raise", nth=100)
            host = rmemd.host.get()
            assert host.counts[host_pb2.FRAME_USE_OFFLINE - 1].npages == 16
            assert host.free_pages <= 4096 - 16 - 16
            if n == 1:
                rmemd.close()
        """
    )
    pytester.makeini(
        """
        [pytest]
        addopts = --strict-config
        filterwarnings = error
        rmemd_host_memory = 16M
        rmemd_nodes = 2
        rmemd_seed = 7
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=3)
    assert "replaced" not in result.stdout.str()


def test_a_daemon_that_cannot_be_as_new_is_replaced(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_poison(rmemd):
            rmemd.host.poison(pfn=5)

        def test_after_poison(rmemd, rmemd_daemon):
            assert rmemd_daemon.starts == 2
            assert rmemd.host.get().free_pages == rmemd.host.get().nframes

        def test_leak(rmemd):
            vm = rmemd.vms.create("tdx-2022")
            file = rmemd.files.create(vm, 1 << 20)
            rmemd.vms.set_memory_region(vm, 0, gpa=0, size_bytes=1 << 20, file=file)
            rmemd.vcpus.create(vm, 0)
            rmemd.vms.finalize(vm)
            rmemd.vms.prefault(vm, 0, 4096)
            rmemd.host.add_fault("TDH_MEM_PAGE_REMOVE", "TDX_OPERAND_BUSY", times=2)
            rmemd.vms.convert(vm, 0, 4096, private=False)

        def test_after_leak(rmemd, rmemd_daemon):
            assert rmemd_daemon.starts == 3
            assert rmemd.host.accounting().leaked_pages == 0

        def test_kill(rmemd, rmemd_daemon):
            rmemd_daemon.kill()

        def test_after_kill(rmemd, rmemd_daemon):
            assert rmemd_daemon.starts == 4
            assert rmemd.host.get().mock

        def test_kill_without_reset(rmemd_daemon):
            rmemd_daemon.kill()

        def test_after_that(rmemd):
            assert False, "to see the report"
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=7, failed=1)
    result.stdout.fnmatch_lines_random(
        [
            "*rmemd: daemon replaced by a fresh one*",
            "*::test_poison: frames are not back: 1 poisoned",
            "*::test_leak: frames are not back: 1 leaked",
            "*::test_kill: it ended during this test, with exit code -9",
            "*::test_after_that: it had ended before this test",
        ]
    )


def test_a_failing_report_has_the_log_of_its_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from rmem_client import RmemError

        def test_that_passes(rmemd):
            with pytest.raises(RmemError):
                rmemd.vms.get(11111)

        def test_that_fails(rmemd):
            rmemd.vms.get(22222)

        def test_without_a_daemon():
            assert False
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*rmemd log call*", '*"VmService/GetVm"*22222*'])
    assert "11111" not in result.stdout.str()
    assert result.stdout.str().count("rmemd log") == 1


def test_without_a_daemon_it_says_what_to_do(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeconftest("import sys; sys.executable = '/nowhere/bin/python'")
    monkeypatch.setenv("PATH", "/nowhere/else")
    pytester.makepyfile("def test_it(rmemd): ...")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "no rmemd to run: *beside /nowhere/bin/python, nor on PATH.",
            "Install the package `rmemd`*",
        ]
    )
    assert "Traceback" not in result.stdout.str()


def test_a_daemon_that_does_not_start_says_why(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(rmemd): ...")
    result = pytester.runpytest_subprocess("-o", "rmemd_host_memory=1K")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["rmemd did not start: *--host-memory=1K*", "*2M a node at least*"])


def test_runs_that_use_no_fixture_import_no_grpc(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it(pytestconfig):
            for name in ("rmem", "rmemd", "rmemd-daemon"):
                assert pytestconfig.pluginmanager.has_plugin(name)
            found = {"grpc", "numpy", "google.protobuf", "structlog"} & sys.modules.keys()
            assert not found
        """
    )
    # hypothesis brings numpy along
    pytester.runpytest_subprocess("-p", "no:hypothesispytest").assert_outcomes(passed=1)


def test_an_engine_and_a_daemon_in_process(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import threading
        import pytest
        from rmem_client import Client

        @pytest.mark.parametrize("n", range(2))
        def test_engine(rmemd_engine, n):
            assert rmemd_engine.revision == 1
            assert rmemd_engine.create_vm("tdx-today").info.vm == 1

        @pytest.mark.parametrize("n", range(2))
        def test_daemon(rmemd_in_process, n):
            socket_dir = rmemd_in_process.settings.socket_dir
            with Client(socket_dir) as client:
                assert client.vms.create("tdx-today") == 1
                assert len(rmemd_in_process.engine.core.vms.all()) == 1

        def test_nothing_is_left():
            for thread in threading.enumerate():
                if thread.name.startswith("rpc"):  # idle workers are told to end, and not awaited
                    thread.join(20)
                    assert not thread.is_alive()
        """
    )
    pytester.makeini("[pytest]\nfilterwarnings = error\naddopts = --strict-config")
    pytester.runpytest_subprocess().assert_outcomes(passed=5)


def test_its_start_beside_that_of_its_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    from rmem_client.daemon_process import DaemonProcess

    daemon = DaemonProcess(["--host-memory=64M"])
    ready, bare = [], []
    for _ in range(3):
        daemon.start()
        ready.append(daemon.start_seconds * 1e3)
        daemon.process.terminate()
        assert daemon.process.wait(30) == 0
        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", "import grpc, numpy"], check=True)
        bare.append((time.monotonic() - begun) * 1e3)
    daemon.remove()
    a, b = statistics.median(ready), statistics.median(bare)
    with capsys.disabled():
        print(f"\nrmemd ready in {a:.0f} ms, {a / b:.2f} of `import grpc, numpy` ({b:.0f} ms)")
