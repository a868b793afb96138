"""From a plugin's object to a frozen table of ops, in which what is absent is ``None``.

Owns the check of names and signatures and the two tables. The object is registered with a
``pluggy.PluginManager`` that has no other meanwhile; the table is compiled once, and calls go
straight to the bound methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from threading import RLock
from types import FunctionType, ModuleType
from typing import Any

import pluggy
from msgspec import Struct

from rmemd.errors import PLUGIN_INVALID
from rmemd.hooks.hooktx import HookTx, HostContext, VmContext
from rmemd.hooks.spec import (
    CONSUMER_MANDATORY,
    CONSUMER_PAIRS,
    PLATFORM_MANDATORY,
    PROJECT,
    ConsumerSpec,
    PlatformSpec,
)
from rmemd.hooks.state import State
from rmemd.hooks.types import (
    AccessAnswer,
    CallAnswer,
    Content,
    GuestCall,
    HostAccess,
    HostAnswer,
    PageStates,
    Pin,
    Populated,
    Runs,
    Variant,
    Why,
)
from rmemd.units import I64, U8, Bools


class NotifierOps(Struct, frozen=True):
    """A consumer's ops as the engine calls them; ``None`` is NULL. See ``ConsumerSpec``."""

    invalidate_start: Callable[[HookTx, Runs, Why], None]
    invalidate_end: Callable[[HookTx, Runs, Why, bool], None]
    prepare: Callable[[HookTx, Runs], None] | None = None
    map: Callable[[HookTx, Runs], None] | None = None
    pin: Callable[[HookTx, Runs], Pin] | None = None
    unpin: Callable[[HookTx, Runs], Bools] | None = None
    migrate_folio: Callable[[HookTx, I64, I64, I64], None] | None = None
    convert: Callable[[HookTx, Runs, bool], Content] | None = None
    populate: Callable[[HookTx, Runs, U8, bool, U8], Populated] | None = None
    finalize: Callable[[HookTx], bytes] | None = None
    enter: Callable[[HookTx, int], None] | None = None
    leave: Callable[[HookTx, int], None] | None = None
    guest_access: Callable[[HookTx, int, Runs, bool], AccessAnswer] | None = None
    guest_call: Callable[[HookTx, int, GuestCall, I64, int], CallAnswer] | None = None
    error: Callable[[HookTx, Runs, bool], str] | None = None
    page_state: Callable[[I64, I64], PageStates] | None = None
    export_state: Callable[[], State] | None = None
    import_state: Callable[[HookTx, State], None] | None = None
    resume: Callable[[Callable[[I64], U8]], str] | None = None

    def implemented(self) -> dict[str, bool]:
        """Return each op's name and whether it is implemented, in the table's order."""
        return {name: getattr(self, name) is not None for name in self.__struct_fields__}


class PlatformOps(Struct, frozen=True):
    """A platform's ops as the engine calls them; ``None`` is NULL. See ``PlatformSpec``."""

    variants: Callable[[], Sequence[Variant]]
    start: Callable[[HostContext], None]
    make_consumer: Callable[[VmContext, HookTx, str, Mapping[str, str]], object]
    destroy_consumer: Callable[[HookTx, object], None]
    host_access: Callable[[HookTx, I64, HostAccess], HostAnswer] | None = None
    free: Callable[[HookTx, I64], Bools] | None = None


def compile_consumer(consumer: object, name: str) -> NotifierOps:
    """Compile a consumer's hooks.

    Raises:
        PluginFault: a hook is misspelt, has another signature, or lacks its pair.
    """
    table = _compile(consumer, ConsumerSpec, name, CONSUMER_MANDATORY)
    for one, other in CONSUMER_PAIRS:
        if (one in table) != (other in table):
            absent = other if one in table else one
            raise PLUGIN_INVALID(
                f"{name}: {one} and {other} go together, and {absent} is missing",
                where=f"{name}.{absent}",
            )
    return NotifierOps(**table)


def compile_platform(platform: object, name: str) -> PlatformOps:
    """Compile a platform's hooks.

    Raises:
        PluginFault: a hook is misspelt, has another signature, or a mandatory one is missing.
    """
    return PlatformOps(**_compile(platform, PlatformSpec, name, PLATFORM_MANDATORY))


# attributes of a function by which it has another signature than its code
_PRETENDING = frozenset(("__wrapped__", "__signature__"))
# the managers have one plugin at a time
_compiling = RLock()


class _Manager(pluggy.PluginManager):
    """Looks for hooks among named attributes only: half of what an object has is Python's own."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        return None if name.startswith("__") else super().parse_hookimpl_opts(plugin, name)

    def parse_hookspec_opts(
        self, module_or_class: ModuleType | type, name: str
    ) -> pluggy.HookspecOpts | None:
        return None if name.startswith("__") else super().parse_hookspec_opts(module_or_class, name)


def _compile(
    plugin: object, spec: type, name: str, mandatory: tuple[str, ...]
) -> dict[str, Callable[..., Any]]:
    with _compiling:
        functions = _hooks_of(plugin, spec, name)
    for op, function in functions.items():
        _check_signature(function, getattr(spec, op), f"{name}.{op}")
    for op in mandatory:
        if op not in functions:
            raise PLUGIN_INVALID(f"{name}: {op} is mandatory and missing", where=f"{name}.{op}")
    return functions


def _hooks_of(plugin: object, spec: type, name: str) -> dict[str, Callable[..., Any]]:
    manager = _manager(spec)
    try:
        manager.register(plugin, name)
        manager.check_pending()
        callers = manager.get_hookcallers(plugin) or []
        return {caller.name: caller.get_hookimpls()[0].function for caller in callers}
    except pluggy.PluginValidationError as error:
        # which would know the misspelt hook from now on
        _manager.cache_clear()
        raise PLUGIN_INVALID(f"{name}: {error}", where=name) from error
    finally:
        if manager.is_registered(plugin):
            manager.unregister(plugin)


@cache
def _manager(spec: type) -> _Manager:
    """Return a manager of a specification's hooks, with which nobody is registered."""
    manager = _Manager(PROJECT)
    manager.add_hookspecs(spec)
    return manager


@cache
def _parameters(spec: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(spec).parameters)


def _parameters_of_method(function: Callable[..., Any]) -> list[str] | None:
    """Return a plain method's parameters, None of anything else; twenty times as fast."""
    plain = getattr(function, "__func__", None)
    if not isinstance(plain, FunctionType) or not _PRETENDING.isdisjoint(vars(plain)):
        return None
    code = plain.__code__
    if not code.co_argcount or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return None
    return list(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])


def _check_signature(function: Callable[..., Any], spec: Callable[..., Any], where: str) -> None:
    expected = _parameters(spec)[1:]
    if _parameters_of_method(function) == expected:
        return
    found = list(inspect.signature(function).parameters)
    if found != expected:
        raise PLUGIN_INVALID(
            f"{where}({', '.join(found)}) does not have the signature "
            f"{where.rpartition('.')[2]}({', '.join(expected)})",
            where=where,
        )
