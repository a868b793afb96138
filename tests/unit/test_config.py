"""The configuration: order of sources, every error at once, dump and schema, and its manual."""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmemd.consumers.guard import DEADLINE_SECONDS
from rmemd.daemon import configshow
from rmemd.daemon.app import BINDING_OVERLAP_ERRNO
from rmemd.daemon.config import (
    MEMORY_MAX_BYTES,
    NODE_MIN_BYTES,
    Config,
    Key,
    LimitsSection,
    TenantLimits,
    keys,
    sections,
)
from rmemd.daemon.configload import ConfigError, Loaded, Sources, default_file, differences
from rmemd.daemon.logs import LEVELS
from rmemd.daemon.values import LOOPBACK_TENANT, is_loopback, is_tenant, size_of, size_text
from rmemd.engine.quotas import UNLIMITED, Limits
from rmemd.rpc.doors import INSECURE_TENANT
from rmemd.units import PAGE_SIZE, PMD_PAGES

ROOT = Path(__file__).parents[2]
MANUAL = (ROOT / "docs" / "configuration.md").read_text()
RELOADABLE = {
    "daemon.log_level", "daemon.hook_deadline_seconds", "daemon.check_every_seconds",
    "daemon.watched_transactions",
    "access.admins", "limits.frames", "limits.pinned_pages", "limits.sessions", "limits.fds",
    "limits.watches",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RMEMD_SOCKET_DIR", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))


def load(tmp_path: Path, text: str, *sets: str, **options: tuple[str, object]) -> Loaded:
    file = tmp_path / "rmemd.toml"
    file.write_text(text, encoding="utf-8")
    named = {key.replace("__", "."): value for key, value in options.items()}
    return Sources(file, sets, named).load()


def problems(tmp_path: Path, text: str, *sets: str, **options: tuple[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *sets, **options)
    return [str(problem) for problem in caught.value.problems]


# --- sources -------------------------------------------------------------------------------------
def test_without_anything_it_is_the_defaults() -> None:
    loaded = Sources(Path(os.devnull)).load()
    assert loaded.config == Config()
    assert not loaded.origins


def test_the_order_is_file_environment_set_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '[daemon]\nnodes = 2\nseed = 2\nhost_memory = "1G"\nsocket_dir = "/file"\n'
    loaded = load(tmp_path, text, "daemon.nodes=3", "daemon.seed=3", daemon__seed=("--seed", 4))
    settings = loaded.config.daemon
    assert (settings.host_memory_bytes, settings.nodes, settings.seed) == (1 << 30, 3, 4)
    file = str(tmp_path / "rmemd.toml")
    assert loaded.origins == {
        ("daemon", "host_memory"): file, ("daemon", "nodes"): "--set",
        ("daemon", "seed"): "--seed", ("daemon", "socket_dir"): file,
    }  # fmt: skip
    monkeypatch.setenv("RMEMD_SOCKET_DIR", "/environment")
    loaded = load(tmp_path, text)
    assert loaded.config.daemon.socket_dir == Path("/environment")
    assert loaded.origins["daemon", "socket_dir"] == "$RMEMD_SOCKET_DIR"
    option = load(tmp_path, text, daemon__socket_dir=("--socket-dir", "/option"))
    assert option.config.daemon.socket_dir == Path("/option")


def test_relative_paths_are_relative_to_who_says_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for directory in (tmp_path, tmp_path / "cwd"):
        for name in ("a.pem", "b.key", "c.pem"):
            (directory / name).touch()
    text = '[tcp]\nlisten = "0.0.0.0:1"\ncertificate = "a.pem"\nkey = "b.key"\nclient_ca = "x"\n'
    tcp = load(tmp_path, text, "tcp.client_ca=c.pem").config.tcp
    assert (tcp.certificate, tcp.key) == (tmp_path / "a.pem", tmp_path / "b.key")
    assert tcp.client_ca == tmp_path / "cwd" / "c.pem"


def test_where_it_looks_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_file() == Path("/etc/rmemd/rmemd.toml")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg")
    assert default_file() == Path("/xdg/rmemd/rmemd.toml")
    monkeypatch.setenv("HOME", "/home/somebody")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", ignored)
        assert default_file() == Path("/home/somebody/.config/rmemd/rmemd.toml")


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no file"):
        Sources(tmp_path / "absent.toml").load()


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rmemd.toml"
    file.touch()
    file.chmod(0o646)
    with pytest.raises(ConfigError, match=r"everybody may write \(mode 646\); legal: chmod o-w"):
        Sources(file).load()
    file.chmod(0o644)
    Sources(file).load()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rmemd.toml"
    file.touch()
    os.chown(file, 65534, 65534)
    with pytest.raises(ConfigError, match="a file of uid 65534"):
        Sources(file).load()


# --- errors --------------------------------------------------------------------------------------
def test_all_errors_come_at_once_and_say_everything(tmp_path: Path) -> None:
    text = """
        [daemon]
        noods = 3
        nodes = "two"
        linux_release = 6.18
        [access]
        seed = 4
        admins = ["uid:0", "bob"]
        [limits.tenants."uid:1000"]
        frms = 3
        [limits.tenants.bob]
        frames = 5
        [acces]
        mode = "shared"
    """
    file = tmp_path / "rmemd.toml"
    found = problems(tmp_path, text, "daemon.seed=x", "nonsense")
    legal = ", ".join(one.name for one in keys().values() if one.section == "daemon")
    assert found == [
        f"{file}: daemon.noods: found an unknown key (3 (a whole number)); did you mean "
        f"daemon.nodes?; legal: one of {legal}",
        f'{file}: daemon.nodes: found "two" (a string); legal: a whole number from 1 to 64',
        f'{file}: daemon.linux_release: found 6.18 (a number); legal: one of "6.18", "7.2"',
        f"{file}: access.seed: found an unknown key (4 (a whole number)); did you mean "
        "daemon.seed?; legal: one of mode, admins",
        f'{file}: access.admins: found ["uid:0", "bob"] (a list); legal: a list of "uid:N" and '
        '"spiffe://DOMAIN/PATH"',
        f'{file}: limits.tenants."uid:1000".frms: found an unknown key (3 (a whole number)); did '
        'you mean limits.tenants."uid:1000".frames?; legal: one of frames, pinned_pages, sessions, '
        "fds, watches",
        f'{file}: limits.tenants: found "bob"; legal: tenants: "uid:N" or "spiffe://DOMAIN/PATH"',
        f"{file}: acces: found an unknown section ({{'mode': 'shared'}} (a table)); did you mean "
        f"access?; legal: one of {', '.join(sections())}",
        "--set: daemon.seed: found x; legal: a 64-bit number",
        '--set: found "nonsense"; legal: section.key=value, a tenant in quotes ("")',
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[daemon]\nnodes = 0", "daemon.nodes: found 0"),
        ("[daemon]\nnodes = 65", "daemon.nodes: found 65"),
        ("[daemon]\nnodes = true", "daemon.nodes: found true (a truth value)"),
        ("[daemon]\nseed = 9223372036854775808", "daemon.seed"),
        ("[daemon]\nhook_deadline_seconds = nan", "daemon.hook_deadline_seconds: found nan"),
        ("[daemon]\nhook_deadline_seconds = inf", "daemon.hook_deadline_seconds: found inf"),
        ('[daemon]\nhost_memory = "lots"', 'daemon.host_memory: found "lots"'),
        ("[daemon]\nhost_memory = true", "daemon.host_memory: found true"),
        ('[daemon]\nhost_memory = "1M"', "2M a node at least (1 here), and 16T at most"),
        ('[daemon]\nhost_memory = "17T"', "16T at most"),
        ("[daemon]\nsocket_dir = 3", "daemon.socket_dir: found 3"),
        ('[daemon]\nsocket_dir = "a\\nb"', "daemon.socket_dir"),
        ("daemon = 3", "daemon: found 3 (a whole number); legal: a table: [daemon]"),
        ("nodes = 3", "did you mean daemon.nodes?"),
        ("[limits]\ntenants = 3", "limits.tenants: found 3"),
        ('[limits.tenants]\n"uid:1" = 3', 'limits.tenants."uid:1": found 3'),
        ("[limits]\nfds = -2", "limits.fds: found -2"),
        ('[tcp]\nlisten = "1.2.3.4"', 'tcp.listen: found "1.2.3.4"'),
        ('[tcp]\nlisten = "1.2.3.4:65536"', "tcp.listen"),
        ('[tcp]\ntrust_domain = "a/b"', "tcp.trust_domain"),
        ('[metrics]\nlisten = "0.0.0.0:1"', "a loopback address, unless metrics.public is true"),
        ('[metrics]\nlisten = "box:1"', "a loopback address"),
        ('[tcp]\ninsecure = true\nlisten = "0.0.0.0:1"', "a loopback address where tcp.insecure"),
        ('[tcp]\ncertificate = "absent"', "a file that exists"),
        ('[telemetry]\notlp_endpoint = "box:4317"', "telemetry.otlp_endpoint"),
        ('[telemetry]\notlp_endpoint = "ftp://box:4317"', "telemetry.otlp_endpoint"),
        ('[telemetry]\notlp_endpoint = "http://box"', "telemetry.otlp_endpoint"),
        ("[daemon\n", "found no TOML ("),
        ("[daemon]\nnodes = 1\nnodes = 2", "found no TOML ("),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert says in problem


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rmemd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no TOML"):
        Sources(tmp_path / "rmemd.toml").load()


def test_tls_needs_its_three_files(tmp_path: Path) -> None:
    found = problems(tmp_path, '[tcp]\nlisten = "127.0.0.1:0"')
    assert [re.search(r"tcp\.\w+", problem)[0] for problem in found] == [  # type: ignore[index]
        "tcp.certificate", "tcp.key", "tcp.client_ca",
    ]  # fmt: skip


def test_insecure_and_certificates_are_one_too_many(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    text = '[tcp]\nlisten = "[::1]:0"\ninsecure = true\nkey = "a"'
    (problem,) = problems(tmp_path, text)
    assert "nothing would read it" in problem


@pytest.mark.parametrize(
    ("file", "sets", "usage"),
    [
        ("", ["daemon.nodes=0"], True),
        ("", ["metrics.listen=0.0.0.0:1"], True),
        ("", ["tcp.listen=127.0.0.1:0"], True),
        ("[daemon]\nnodes = 0", [], False),
        ("[daemon]\nnodes = 0", ["daemon.seed=x"], False),
        ('[tcp]\nlisten = "127.0.0.1:0"', [], False),
    ],
)
def test_whose_fault_it_is(tmp_path: Path, file: str, sets: list[str], usage: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, file, *sets)
    assert caught.value.is_usage is usage


def test_set_takes_plain_strings_and_toml(tmp_path: Path) -> None:
    loaded = load(
        tmp_path, "", "daemon.linux_release=7.2", 'daemon.log_level="debug"', "tcp.insecure=true",
        'access.admins=["uid:5"]', 'limits.tenants."uid:5".frames=9', "daemon.host_memory=64M",
    )  # fmt: skip
    config = loaded.config
    assert config.daemon.linux_release == "7.2"
    assert config.daemon.log_level == "debug"
    assert config.daemon.host_memory_bytes == 64 << 20
    assert config.tcp.insecure is True
    assert config.access.admins == ("uid:5",)
    assert config.limits.tenants["uid:5"].frames == 9


def test_a_tenant_s_table_leaves_the_rest_as_it_is_for_all(tmp_path: Path) -> None:
    text = '[limits]\nfds = 7\nframes = 8\n[limits.tenants."spiffe://a.b/c"]\nframes = 9\n'
    limits = load(tmp_path, text).config.limits
    assert limits.of("spiffe://a.b/c") == TenantLimits(frames=9, fds=7)
    assert (limits.of("uid:1").frames, limits.of("uid:1").fds) == (8, 7)


def test_differences_are_by_key() -> None:
    old = Config(limits=LimitsSection(tenants={"uid:1": TenantLimits(frames=3)}))
    new = Config(limits=LimitsSection(fds=4, tenants={"uid:1": TenantLimits(frames=5)}))
    assert differences(old, new) == {
        "limits.fds": (1024, 4), 'limits.tenants."uid:1".frames': (3, 5),
    }  # fmt: skip
    assert not differences(old, old)
    assert differences(old, Config())['limits.tenants."uid:1".frames'] == (3, None)


# --- values --------------------------------------------------------------------------------------
@given(st.integers(0, 1 << 60))
def test_sizes_come_back(size: int) -> None:
    assert size_of(size_text(size)) == size


@pytest.mark.parametrize(
    "text", ["", "G", "1.5G", "-1", "16 G", "\u0661G", "9" * 21, None, 1.5, []]
)
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the readers' contract
        size_of(text)


def test_tenants() -> None:
    for text in (
        LOOPBACK_TENANT,
        "uid:0",
        "uid:4294967294",
        "spiffe://a.b/c",
        "spiffe://rmemd.test/tenant/a_B-1.",
    ):
        assert is_tenant(text), text
    for text in (
        "uid:", "uid:01", "uid:4294967295", "uid:-1", "UID:1", "uid:1 ", "spiffe://", "spiffe://a",
        "spiffe://a/", "spiffe://A/b", "spiffe://a/../b", "spiffe://a/b/.", "spiffe://a/b?c",
        "spiffe://a//b", "http://a/b", "spiffe://a/b\n", "spiffe://a/" + "b" * 2048,
    ):  # fmt: skip
        assert not is_tenant(text), text


def test_loopback() -> None:
    for text in ("127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"):
        assert is_loopback(text), text
    for text in ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "localhost.evil:1", "[::ffff:1.2.3.4]:1"):
        assert not is_loopback(text), text


# --- dump and schema -----------------------------------------------------------------------------
def _texts(key: Key) -> st.SearchStrategy[str]:
    """Strategies for what a key takes, as raw values of TOML."""
    printable = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1)
    tenants = st.one_of(
        st.integers(0, (1 << 32) - 2).map("uid:{}".format),
        st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=9).map(
            "spiffe://a.b/{}".format
        ),
    )
    special: dict[str, st.SearchStrategy[Any]] = {
        "daemon.socket_dir": printable.map("/{}".format),
        "daemon.host_memory": st.integers(NODE_MIN_BYTES * 64, MEMORY_MAX_BYTES),
        "access.admins": st.lists(tenants),
        "tcp.listen": st.just(""),
        "tcp.trust_domain": st.sampled_from(["", "rmemd.test"]),
        "metrics.listen": st.sampled_from(["", "127.0.0.1:0", "[::1]:9"]),
        "telemetry.otlp_endpoint": st.sampled_from(["", "http://a:1", "https://[::1]:2"]),
    }
    if key.spelt in special:
        return special[key.spelt]
    if key.section == "tcp" and key.is_text:
        return st.just("")
    base = get_args(key.hint)[0]
    if base is bool:
        return st.booleans()
    if base is int:
        return st.integers(key.meta.ge, key.meta.le)
    if base is float:
        return st.floats(key.meta.ge, key.meta.le)
    return st.sampled_from(get_args(base))


@st.composite
def _files(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for key in draw(st.lists(st.sampled_from(list(keys().values())), unique_by=id)):
        tables.setdefault(key.section, {})[key.name] = draw(_texts(key))
    limits = [key for key in keys().values() if key.section == "limits"]
    for tenant in draw(st.lists(st.sampled_from(["uid:0", "uid:1000", "spiffe://a.b/c"]))):
        own = {key.name: draw(_texts(key)) for key in draw(st.lists(st.sampled_from(limits)))}
        if own:
            tables.setdefault("limits", {}).setdefault("tenants", {})[tenant] = own
    return tables


def _load_tables(tables: dict[str, dict[str, Any]]) -> Loaded:
    """Load what was drawn through --set, which is parsed as TOML: another way than dump's."""
    sets = []
    for section, table in tables.items():
        for name, value in table.items():
            if name == "tenants":
                for tenant, own in value.items():
                    sets += [f'limits.tenants."{tenant}".{k}={_toml(v)}' for k, v in own.items()]
            else:
                sets.append(f"{section}.{name}={_toml(value)}")
    return Sources(Path(os.devnull), tuple(sets)).load()


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if isinstance(value, (list, bool)) else repr(value)


@given(_files())
def test_what_is_dumped_means_the_same(tables: dict[str, dict[str, Any]]) -> None:
    loaded = _load_tables(tables)
    text = configshow.dump(loaded)
    assert set(tomllib.loads(text)) >= set(sections())
    read, written = os.pipe()
    with os.fdopen(written, "w", encoding="utf-8") as file:
        file.write(text)
    try:
        again = Sources(Path(f"/dev/fd/{read}")).load()
    finally:
        os.close(read)
    assert again.config == loaded.config
    assert configshow.dump(again).count("\n") == text.count("\n")


@pytest.mark.parametrize("path", ["/a\\b", "/a'b", '/a"b', "/a'\"\\u0041", "/ä 𐀀#"])
def test_a_path_is_dumped_as_it_is(tmp_path: Path, path: str) -> None:
    loaded = load(tmp_path, "", daemon__socket_dir=("--socket-dir", path))
    again = load(tmp_path, configshow.dump(loaded)).config.daemon.socket_dir
    assert again == loaded.config.daemon.socket_dir == Path(path)


def test_dump_says_where_each_is_from(tmp_path: Path) -> None:
    text = '[daemon]\nnodes = 2\n[limits.tenants."uid:1"]\nfds = 3\n'
    lines = configshow.dump(load(tmp_path, text, "daemon.log_level=debug")).splitlines()
    assert f"nodes = 2  # {tmp_path / 'rmemd.toml'}" in lines
    assert 'log_level = "debug"  # --set; reloadable' in lines
    assert "seed = 0  # default" in lines
    assert lines[-2:] == [
        '[limits.tenants."uid:1"]', f"fds = 3  # {tmp_path / 'rmemd.toml'}; reloadable",
    ]  # fmt: skip


def test_the_schema_has_every_key_and_what_is_reloadable() -> None:
    schema = json.loads(configshow.schema())
    definitions = schema["$defs"]
    found = {}
    for section, reference in definitions["Config"]["properties"].items():
        definition = definitions[reference["$ref"].rpartition("/")[2]]
        assert definition["additionalProperties"] is False
        for name, prop in definition["properties"].items():
            if name != "tenants":
                found[f"{section}.{name}"] = prop
    assert found.keys() == keys().keys()
    for name, prop in found.items():
        key = keys()[name]
        assert prop["x-reloadable"] is key.reloadable
        assert prop["description"] == key.description
        if "default" in prop:
            assert (
                prop["default"] == tomllib.loads(f"v = {configshow.literal(key, key.default)}")["v"]
            )
    assert "null" not in configshow.schema()


# --- agreement -----------------------------------------------------------------------------------
def test_reloadable_is_what_the_daemon_can_apply() -> None:
    assert {name for name, key in keys().items() if key.reloadable} == RELOADABLE


def test_it_agrees_with_those_it_may_not_import() -> None:
    config = Config()
    assert config.daemon.hook_deadline_seconds == DEADLINE_SECONDS
    assert NODE_MIN_BYTES == PMD_PAGES * PAGE_SIZE
    assert set(get_args(get_args(keys()["daemon.linux_release"].hint)[0])) == set(
        BINDING_OVERLAP_ERRNO
    )
    assert set(get_args(get_args(keys()["daemon.log_level"].hint)[0])) == set(LEVELS)
    assert TenantLimits().frames == UNLIMITED
    assert LOOPBACK_TENANT == INSECURE_TENANT
    assert set(TenantLimits.__struct_fields__) == set(Limits.__struct_fields__)


def _rows() -> Iterator[tuple[str, list[str]]]:
    """Yield ("section.key", cells) of the manual's tables."""
    section = ""
    for line in MANUAL.splitlines():
        heading = re.fullmatch(r"### \[(\w+)\]", line)
        section = heading[1] if heading else section
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[0].startswith("`"):
            yield f"{section}.{cells[0].strip('`')}", cells[1:]


def test_the_manual_has_every_key_and_no_other() -> None:
    rows = dict(_rows())
    assert rows.keys() == keys().keys()
    for name, (default, legal, reloadable, meaning) in rows.items():
        key = keys()[name]
        assert (legal, meaning) == (key.legal, key.description)
        assert reloadable == ("yes" if key.reloadable else "no")
        if default.startswith("`"):
            value = tomllib.loads(f"v = {default.strip('`')}")["v"]
            made = key.read(value) if key.read else value
            assert made == (list(key.default) if made == [] else key.default)


def test_the_manual_s_example_is_valid(tmp_path: Path) -> None:
    example = re.search(r"## A file\n\n```toml\n(.*?)```", MANUAL, re.DOTALL)
    assert example is not None
    for name in ("server.pem", "server.key", "ca.pem"):
        (tmp_path / name).touch()
    config = load(tmp_path, example[1]).config
    assert config.access.mode == "shared"
    assert config.limits.of("spiffe://rmemd.test/tenant/a").frames == 262144


def test_it_is_cheap_to_import() -> None:
    """``rmemd --help`` and ``rmemd config`` wait for neither NumPy nor gRPC."""
    code = (
        "import sys, rmemd.daemon.cli, rmemd.daemon.configload; "
        "print([m for m in ('numpy', 'grpc', 'structlog') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
