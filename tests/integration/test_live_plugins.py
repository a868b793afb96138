"""Plugins loaded, unloaded and reloaded in an engine, and in a daemon, that runs on."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, run_cli
from guests import Guest, make_engine
from plugin_packages import ROOT, SitePackages

from rmem.v1 import vcpu_pb2
from rmem_client import Client, vcpus
from rmem_client import RmemError as Refused
from rmemd.consumers import discovery
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.errors import (
    NO_SUCH_CONSUMER,
    NO_SUCH_PLUGIN,
    PLUGIN_IN_USE,
    PLUGIN_INVALID,
    PLUGIN_LOADED,
    REASONS,
    SWAP_SCHEMA,
    Reason,
    RmemError,
)
from rmemd.hooks.tables import same_state

MakeDaemon = Callable[..., Daemon]
PAGE = 4096
SAYS = "the frame is taken"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SitePackages]:
    """A directory of plugins that this process imports from, too."""
    made = SitePackages(tmp_path / "site")
    monkeypatch.syspath_prepend(made.directory)
    yield made
    discovery.take_out({path.name for path in made.directory.iterdir()} | {"rmemd_acme"})


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that began before any of the test's plugins was installed."""
    made = make_engine()
    yield made
    made.close()


@pytest.fixture
def first_code() -> Iterator[None]:
    """Put back the plugins that other tests of this process hold on to."""
    names = [n for n in sys.modules if n.startswith("rmemd_")]
    modules, reasons = {name: sys.modules[name] for name in names}, dict(REASONS)
    yield
    for name in [n for n in sys.modules if n.startswith("rmemd_")]:
        del sys.modules[name]
    sys.modules.update(modules)
    REASONS.clear()
    REASONS.update(reasons)


def running(engine: Engine, consumer: str) -> Guest:
    guest = Guest(engine, consumer, npages=16)
    guest.fill(0, 8, seed=7)
    return guest


def everything(engine: Engine) -> tuple[Any, ...]:
    """Return what a failure must leave as it was, whatever it is kept in."""
    registry = engine.core.registry
    return (
        dict(registry.platforms), dict(registry.offers), list(registry.found),
        dict(engine.core.consumers), dict(REASONS),
        {name: module for name, module in sys.modules.items() if name.startswith("rmemd_acme")},
    )  # fmt: skip


def refused(engine: Engine, reason: Reason, act: Callable[[], Any]) -> RmemError:
    """Do what must be refused, and find state, code, reasons and lists as they were."""
    before, state = everything(engine), engine.core.space.snapshot()
    with pytest.raises(RmemError) as caught:
        act()
    assert caught.value.reason is reason, caught.value
    assert same_state(state, engine.core.space.snapshot()) == []
    assert everything(engine) == before
    assert engine.core.registry.changing == ""
    assert check(engine.core) == []
    return caught.value


# --- load -----------------------------------------------------------------------------------------
def test_what_is_installed_while_it_runs_is_loaded(engine: Engine, site: SitePackages) -> None:
    refused(engine, NO_SUCH_CONSUMER, lambda: engine.create_vm("acme"))
    site.from_template("acme")
    (found,) = engine.load_plugins()
    assert (found.name, found.version, found.error) == ("acme", "9.9", "")
    guest = running(engine, "acme")
    assert guest.holds(0, 8, seed=7)
    assert engine.load_plugins() == []
    refused(engine, PLUGIN_LOADED, lambda: engine.load_plugins(["acme"]))


def test_a_directory_whose_time_stands_still_is_read_again(
    engine: Engine, site: SitePackages
) -> None:
    """Importers remember a directory by its time of change, which may be as coarse as seconds."""
    times = site.directory.stat()
    assert engine.load_plugins() == []
    assert importlib.util.find_spec("rmemd_acme") is None
    site.from_template("acme")
    os.utime(site.directory, ns=(times.st_atime_ns, times.st_mtime_ns))
    (found,) = engine.load_plugins()
    assert (found.name, found.error) == ("acme", "")


def test_what_is_not_installed_is_not_loaded(engine: Engine) -> None:
    error = refused(engine, NO_SUCH_PLUGIN, lambda: engine.load_plugins(["nowhere"]))
    assert "nowhere" in error.message


def test_a_plugin_that_fails_is_quarantined_and_can_be_loaded_once_it_is_mended(
    engine: Engine, site: SitePackages
) -> None:
    site.from_template("acme")
    site.edit("acme", ("def prepare(", "def prepaare("), version="1.0")
    (found,) = engine.load_plugins(["acme"])
    assert "prepaare" in found.error
    assert "acme" not in engine.core.registry.platforms
    site.edit("acme", ("def prepaare(", "def prepare("), (SAYS, "not yours"), version="1.1")
    (found,) = engine.load_plugins()
    assert (found.version, found.error) == ("1.1", "")
    assert [f.version for f in engine.core.registry.found if f.name == "acme"] == ["1.1"]
    assert running(engine, "acme").holds(0, 8, seed=7)


# --- unload ---------------------------------------------------------------------------------------
def test_a_plugin_in_use_stays_and_its_users_are_named(engine: Engine, site: SitePackages) -> None:
    site.from_template("acme")
    engine.load_plugins()
    guests = [running(engine, "acme") for _ in range(2)]
    error = refused(engine, PLUGIN_IN_USE, lambda: engine.unload_plugin("acme"))
    assert error.details.state == ", ".join(f"vm/{guest.vm}" for guest in guests)
    refused(engine, NO_SUCH_PLUGIN, lambda: engine.unload_plugin("nowhere"))
    for guest in guests:
        engine.destroy_vm(guest.vm)
    # the frames are the files', which live on
    owned = engine.core.host.owner.view.copy()
    assert engine.unload_plugin("acme") == ["acme"]
    assert (engine.core.host.owner.view == owned).all()
    assert not [t for t in engine.core.space.tables if t.startswith("platform/acme/")]
    assert "acme" not in {found.name for found in engine.core.registry.found}
    assert "rmemd_acme" not in sys.modules
    assert "ACME_FRAME_TAKEN" not in REASONS
    refused(engine, NO_SUCH_CONSUMER, lambda: engine.create_vm("acme"))
    engine.close_file(guests[0].file)
    assert check(engine.core) == []
    # and it can come again, whatever became of it meanwhile
    site.edit("acme", ("belongs to another guest", "is somebody else's"), version="2.0")
    assert [found.version for found in engine.load_plugins()] == ["2.0"]
    assert running(engine, "acme").holds(0, 8, seed=7)


# --- reload ---------------------------------------------------------------------------------------
def test_a_reload_swaps_every_vm_to_the_new_code_and_the_new_reason(
    engine: Engine, site: SitePackages
) -> None:
    site.from_template("acme")
    engine.load_plugins()
    guests = [running(engine, "acme") for _ in range(3)]
    old = [guest.consumer.made for guest in guests]
    before = REASONS["ACME_FRAME_TAKEN"].cause
    site.edit(
        "acme", ("The frame belongs to another guest.", "Somebody else has the frame."),
        ('STATES = ("none", "mapped", "blocked")', 'STATES = ("nothing", "there", "held")'),
        version="10.0",
    )  # fmt: skip
    done = engine.reload_plugin("acme")
    assert (done.before.version, done.now.version) == ("9.9", "10.0")
    assert [f.version for f in engine.core.registry.found if f.name == "acme"] == ["10.0"]
    assert [swapped.vm for swapped in done.vms] == [guest.vm for guest in guests]
    assert before == "The frame belongs to another guest."
    assert REASONS["ACME_FRAME_TAKEN"].cause == "Somebody else has the frame."
    for guest, made in zip(guests, old, strict=True):
        assert type(guest.consumer.made) is not type(made)
        assert guest.consumer.platform is engine.core.registry.platforms["acme"]
        assert guest.holds(0, 8, seed=7)
        page = engine.page(int(guest.pfns(0)[0]))[1]
        assert page.vendor_state == "there"
    assert check(engine.core) == []
    engine.migrate(guests[0].pfns(0, 8))
    assert guests[0].holds(0, 8, seed=7)
    for guest in guests:
        engine.destroy_vm(guest.vm)
        engine.close_file(guest.file)
    assert check(engine.core) == []


def test_a_dead_vm_is_reloaded_too_so_that_it_can_end(engine: Engine, site: SitePackages) -> None:
    site.from_template("acme")
    engine.load_plugins()
    guest = running(engine, "acme")
    with engine.core.tx("kill") as tx:
        engine.core.kill(tx, guest.vm, "for a test")
    site.edit("acme", (SAYS, "not yours"), version="10.0")
    assert len(engine.reload_plugin("acme").vms) == 1
    engine.destroy_vm(guest.vm)
    assert check(engine.core) == []


BAD = {
    "does not compile": (("class AcmePlatform:", "class AcmePlatform"), PLUGIN_INVALID, "Syntax"),
    "raises": (("VARIANT = ", "VARIANT = 1 / 0 and "), PLUGIN_INVALID, "ZeroDivisionError"),
    "misspelt": (("def prepare(", "def prepaare("), PLUGIN_INVALID, "prepaare"),
    "no platform": (("class AcmePlatform:", "class Other:"), PLUGIN_INVALID, "AcmePlatform"),
    "another schema": (('SCHEMA = ("acme", 1)', 'SCHEMA = ("acme", 2)'), SWAP_SCHEMA, "version 2"),
    "another table": (('dense("owners", "u4")', 'dense("owners", "u8")'), SWAP_SCHEMA, "owners"),
    "without a table": (('dense("owners", "u4")', 'dense("other", "u4")'), SWAP_SCHEMA, "owners"),
    "without the variant": (('VARIANT = "acme"', 'VARIANT = "acme2"'), NO_SUCH_CONSUMER, "acme"),
    "a stolen name": (('VARIANT = "acme"', 'VARIANT = "null"'), PLUGIN_INVALID, "another plugin"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_reload_that_fails_leaves_the_old_one_at_work(
    engine: Engine, site: SitePackages, what: str
) -> None:
    change, reason, says = BAD[what]
    site.from_template("acme")
    engine.load_plugins()
    guests = [running(engine, "acme") for _ in range(2)]
    text = ("The frame belongs to another guest.", "It is not yours.")
    site.edit("acme", change, text, version="10.0")
    error = refused(engine, reason, lambda: engine.reload_plugin("acme"))
    assert says in error.message
    assert REASONS["ACME_FRAME_TAKEN"].cause == text[0]
    for guest in guests:
        assert guest.holds(0, 8, seed=7)
        guest.fill(8, 4, seed=8)
        engine.migrate(guest.pfns(0, 4))
        assert guest.holds(0, 8, seed=7)
    # mended, it is reloaded, and not the copy that failed
    site.edit("acme", (change[1], change[0]), version="10.1")
    assert engine.reload_plugin("acme").now.version == "10.1"
    assert REASONS["ACME_FRAME_TAKEN"].cause == text[1]
    assert all(guest.holds(0, 8, seed=7) for guest in guests)


def test_one_vm_that_cannot_be_swapped_keeps_all_of_them(
    engine: Engine, site: SitePackages
) -> None:
    site.from_template("acme")
    engine.load_plugins()
    first, second = running(engine, "acme"), running(engine, "acme")
    # the new code cannot take over the second VM, after it has taken over the first
    refuses = f"assert self.vm != {second.vm}\n        import_tables(tx"
    site.edit("acme", ("import_tables(tx", refuses), version="10.0")
    refused(engine, REASONS["PLUGIN_RAISED"], lambda: engine.reload_plugin("acme"))
    assert first.holds(0, 8, seed=7)
    assert second.holds(0, 8, seed=7)


def test_what_is_uninstalled_cannot_be_reloaded(engine: Engine, site: SitePackages) -> None:
    site.from_template("acme")
    engine.load_plugins()
    guest = running(engine, "acme")
    site.remove("acme")
    error = refused(engine, NO_SUCH_PLUGIN, lambda: engine.reload_plugin("acme"))
    assert "no longer installed" in error.message
    assert guest.holds(0, 8, seed=7)


def test_reloads_swaps_and_guests_get_along(engine: Engine, site: SitePackages) -> None:
    """Everybody at once: each reload and swap is whole, and no guest loses a byte."""
    site.from_template("acme")
    engine.load_plugins()
    guests = [running(engine, "acme") for _ in range(3)]
    failed: list[BaseException] = []
    over = threading.Event()

    def going(act: Callable[[], Any], times: int) -> threading.Thread:
        def body() -> None:
            try:
                for _ in range(times):
                    act()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        return thread

    def come_and_go() -> None:
        guest = running(engine, "acme")
        assert guest.holds(0, 8, seed=7)
        engine.destroy_vm(guest.vm)
        engine.close_file(guest.file)

    def check_itself() -> None:
        while not over.is_set():
            assert guests[0].holds(0, 8, seed=7)

    runner = going(check_itself, 1)
    others = [
        going(lambda: engine.reload_plugin("acme"), 6),
        going(lambda: engine.reload_plugin("acme"), 6),
        going(lambda: engine.swap_consumer(guests[1].vm), 20),
        going(lambda: engine.migrate(guests[2].pfns(0, 8)), 20),
        going(come_and_go, 8),
    ]
    for thread in others:
        thread.join(60)
    over.set()
    runner.join(60)
    assert failed == []
    assert not any(thread.is_alive() for thread in (runner, *others))
    assert all(guest.holds(0, 8, seed=7) for guest in guests)
    assert check(engine.core) == []
    assert engine.core.registry.changing == ""


@pytest.mark.parametrize("name", ["tdx", "snp", "pkvm", "gup", "null"])
@pytest.mark.usefixtures("first_code")
def test_every_plugin_of_ours_can_be_reloaded_under_its_guests(engine: Engine, name: str) -> None:
    offers = engine.core.registry.offers
    guests = [running(engine, c) for c in sorted(offers) if offers[c].platform == name]
    table = {c: offer.ops.implemented() for c, offer in offers.items()}
    done = engine.reload_plugin(name)
    assert [swapped.vm for swapped in done.vms] == [guest.vm for guest in guests]
    now = engine.core.registry.offers
    assert table == {c: offer.ops.implemented() for c, offer in now.items()}
    for guest in guests:
        assert guest.holds(0, 8, seed=7)
        guest.fill(8, 4, seed=8)
        engine.destroy_vm(guest.vm)
        engine.close_file(guest.file)
    assert check(engine.core) == []


@pytest.mark.usefixtures("first_code")
def test_a_measurement_under_way_does_not_survive_a_reload(engine: Engine) -> None:
    """It goes on in contexts that no plain data can hold, so the reload is refused, by name."""
    guest = Guest(engine, "tdx-today", npages=4, finalized=False)
    guest.populate(0, b"\1" * PAGE)
    with pytest.raises(RmemError, match=rf"TDX_MEASUREMENT_LOST: vm/{guest.vm}"):
        engine.reload_plugin("tdx")
    guest.populate(1, b"\2" * PAGE)
    assert engine.finalize(guest.vm)


# --- paths that come while it runs ----------------------------------------------------------------
def test_a_path_file_that_came_since_the_start_is_read_once(
    engine: Engine, site: SitePackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable install is a .pth file, which the interpreter reads when it starts."""
    elsewhere, packages = tmp_path / "elsewhere", tmp_path / "packages"
    elsewhere.mkdir()
    packages.mkdir()
    monkeypatch.setattr("site.getsitepackages", lambda: [str(packages)])
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    monkeypatch.delenv("SEEN", raising=False)
    site.from_template("acme")
    (site.directory / "rmemd_acme").rename(elsewhere / "rmemd_acme")
    (info,) = site.directory.glob("*.dist-info")
    info.rename(packages / info.name)
    counted = "import os; os.environ['SEEN'] = os.environ.get('SEEN', '') + 'x'"
    (packages / "acme.pth").write_text(f"{elsewhere}\n{counted}\n")
    for _ in range(3):
        discovery.installed()
    assert os.environ["SEEN"] == "x"
    (found,) = engine.load_plugins()
    assert (found.name, found.error) == ("acme", "")
    discovery.take_out({"rmemd_acme"})


# --- a real daemon --------------------------------------------------------------------------------
@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment of its own, on top of this one; daemons start from it."""
    home = tmp_path / "venv"
    venv.EnvBuilder(symlinks=True, with_pip=False).create(home)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "base.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    )
    for name, module in (("rmemd", "rmemd.daemon.cli"), ("rmemctl", "rmemctl.main")):
        script = home / "bin" / name
        script.write_text(f"#!{home}/bin/python\nfrom {module} import main\nmain()\n")
        script.chmod(0o755)
    monkeypatch.setattr("daemons.BIN", home / "bin")
    return home


def pip_install(environment: Path, *args: str) -> None:
    """Install a plugin into the environment, from its directory and nowhere else."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"),
         "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation",
         "--no-index", *args],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def project_from_template(directory: Path, name: str) -> Path:
    """Copy plugins/template and rename it, as its README says; return the source."""
    shutil.copytree(
        ROOT / "plugins" / "template", directory,
        ignore=shutil.ignore_patterns("__pycache__", "tests", ".*"),
    )  # fmt: skip
    (directory / "rmemd_template").rename(directory / f"rmemd_{name}")
    source = directory / f"rmemd_{name}" / "__init__.py"
    for path in (directory / "pyproject.toml", source):
        text = path.read_text().replace("template", name).replace("Template", name.title())
        path.write_text(text.replace("TEMPLATE", name.upper()))
    return source


def ctl(daemon: Daemon, *args: str, code: int = 0) -> str:
    """Run rmemctl; it must exit with ``code``."""
    done = run_cli(daemon, *args)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def guest_of(client: Client, consumer: str) -> int:
    """Make a VM that wrote words to 8 private pages."""
    vm = client.vms.create(consumer)
    file = client.files.create(vm, 16 * PAGE)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=16 * PAGE, file=file)
    client.vcpus.create(vm, 0)
    client.vcpus.set_programme(vm, 0, [vcpus.write(0, 8 * PAGE, seed=3, private=True)])
    assert client.vcpus.run(vm, 0).exit_reason == vcpu_pb2.EXIT_REASON_HLT
    return vm


def holds(client: Client, vm: int) -> bool:
    """Return whether the guest finds its words."""
    client.vcpus.set_programme(vm, 0, [vcpus.check(0, 8 * PAGE, seed=3, private=True)])
    exited = client.vcpus.run(vm, 0)
    return exited.exit_reason == vcpu_pb2.EXIT_REASON_HLT and not exited.mismatched_pages


def test_a_consumer_made_from_the_template_comes_to_a_running_daemon(
    daemons: MakeDaemon, environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = daemons()
    client = daemon.client()
    before = guest_of(client, "null")
    assert "acme" not in ctl(daemon, "consumers", "list")
    source = project_from_template(tmp_path / "acme", "acme")
    pip_install(environment, "-e", str(tmp_path / "acme"))
    loaded = json.loads(ctl(daemon, "-o", "json", "consumers", "load"))
    assert [plugin["name"] for plugin in loaded["plugins"]] == ["acme"]
    assert [consumer["name"] for consumer in loaded["consumers"]] == ["acme"]
    vm = guest_of(client, "acme")
    assert holds(client, vm)
    # it keeps the contract
    kit = "from rmemd.testing.conformance import check_consumer; check_consumer('acme').require()"
    done = subprocess.run(
        [environment / "bin" / "python", "-c", kit], capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\na consumer from the template: {len(source.read_text().splitlines())} lines")
    # new code of the editable install
    text = source.read_text().replace("The frame belongs to another guest.", "Not your frame.")
    source.write_text(text)
    ctl(daemon, "consumers", "reload", "acme")
    assert "Not your frame." in ctl(daemon, "explain", "ACME_FRAME_TAKEN")
    assert holds(client, vm)
    # and another version, as a wheel
    project = tmp_path / "acme" / "pyproject.toml"
    project.write_text(project.read_text().replace('version = "0.1.0"', 'version = "0.2.0"'))
    pip_install(environment, str(tmp_path / "acme"))
    said = ctl(daemon, "consumers", "reload", "acme")
    assert "0.1.0 -> 0.2.0" in said
    assert f"vm/{vm}" in said
    assert holds(client, vm)
    swapped = client.vms.swap_consumer(vm)
    assert (swapped.consumer, swapped.state_kind) == ("acme", "acme")
    assert swapped.pause_us > 0
    refused = ctl(daemon, "consumers", "unload", "acme", code=19)
    assert "PLUGIN_IN_USE" in refused
    assert f"vm/{vm}" in refused
    client.vms.destroy(vm)
    assert "acme" in ctl(daemon, "consumers", "unload", "acme")
    assert "acme" not in ctl(daemon, "consumers", "list")
    assert holds(client, before)


def test_a_swap_over_the_wire(daemon: Daemon) -> None:
    client = daemon.client()
    vm = client.vms.create("tdx-today")
    said = ctl(daemon, "vm", "swap-consumer", f"vm/{vm}", "tdx-2022", "-c", "sept_ve_disable=0")
    for words in ("tdx-2022, was tdx-today", "pin unpin", "tdx version 1"):
        assert words in said
    assert client.vms.get(vm).consumer == "tdx-2022"
    assert dict(client.vms.get(vm).config) == {"sept_ve_disable": "0"}
    with pytest.raises(Refused) as caught:
        client.vms.swap_consumer(vm, "snp-move")
    assert caught.value.reason == "SWAP_FOREIGN"
    for call in (client.consumers.reload, client.consumers.unload, client.consumers.load):
        with pytest.raises(Refused) as caught:
            call("nowhere")
        assert caught.value.reason == "NO_SUCH_PLUGIN"
