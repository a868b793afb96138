"""Which methods of the engine are operations, and how a call of one becomes a line and a call.

Owns the table. What only asks is not recorded: it changes nothing, and nothing depends on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.migrate import Report
from rmemd.trace.values import Digests, argument, asked, is_payload

OPERATIONS = (
    "create_vm", "destroy_vm", "set_memory_region", "set_attributes", "populate", "finalize",
    "pre_fault", "swap_consumer", "load_plugins", "unload_plugin", "reload_plugin", "create_vcpu",
    "set_programme", "run_vcpu", "read_guest", "write_guest", "create_file", "close_file",
    "fallocate", "convert_file", "read_shared", "write_shared", "set_policy", "pin", "unpin",
    "get_pages", "put_pages", "register_userfault", "unregister_userfault", "userfault_copy",
    "userfault_zeropage", "userfault_continue", "userfault_wake", "open_session", "close_session",
    "revoke", "read_physical", "write_physical", "copy_physical", "poison", "migrate", "compact",
    "offline", "online",
)  # fmt: skip
# operations that are no sequence of steps: they take the lock once, by themselves
AT_ONCE = ("shared_descriptor", "add_fault_rule", "remove_fault_rule")
# what a call brings that is not said in its line: whom to ask whether to stop, or whether it may be
# at all, and a report to fill in
NOT_SAID = frozenset(("self", "cancelled", "check", "report", "who"))


@cache
def signature(method: str) -> inspect.Signature:
    """Return the signature of an engine's method, ``self`` included."""
    return inspect.signature(getattr(Engine, method))


def plain_arguments(given: Mapping[str, Any], digests: Digests) -> dict[str, Any]:
    """Return the arguments of a call as plain values, by name."""
    return {
        name: argument(name, value, digests)
        for name, value in given.items()
        if name not in NOT_SAID
    }


def call_of(
    method: str,
    args: Mapping[str, Any],
    cancelled: Callable[[], bool],
    check: Callable[[Core], None],
) -> Callable[[Engine], Any]:
    """Return the call that a line describes."""
    given = {name: asked(name, value) for name, value in args.items()}
    own = {"cancelled": cancelled, "check": check, "report": Report(cancelled=cancelled)}
    given |= {name: own[name] for name in own if name in signature(method).parameters}
    return lambda engine: getattr(engine, method)(**given)


def text_of(method: str, args: Mapping[str, Any]) -> str:
    """Return a call as people read it."""
    said = (f"{name}={_argument(name, value)}" for name, value in args.items())
    return f"{method}({', '.join(said)})"


def _argument(name: str, value: Any) -> str:
    if name != "pfns":
        return short(value)
    shown = [f"{first:#x}+{count:#x}" for first, count in value[:_SHOWN]]
    return ", ".join([*shown, *["…"][: len(value) > _SHOWN]])


_SHOWN = 4


def short(value: Any) -> str:
    """Return a plain value as people read it: long ones are cut."""
    if is_payload(value):
        return f"<{value['length']} bytes>"
    if isinstance(value, list):
        shown = ", ".join(short(one) for one in value[:_SHOWN])
        return f"[{shown}{', …' if len(value) > _SHOWN else ''}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {short(one)}" for key, one in value.items()) + "}"
    if isinstance(value, int) and not isinstance(value, bool) and value > 4095:
        return f"{value:#x}"
    return str(value)
