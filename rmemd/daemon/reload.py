"""SIGHUP: the configuration read anew, and applied whole or not at all.

Owns the decision. Everything is read and checked first; where a key has changed that may not while
the daemon runs, none is applied, and the log says which. Which may is the key's own metadata.
"""

from __future__ import annotations

from typing import Any

import structlog

from rmemd.daemon.config import Config, keys
from rmemd.daemon.configload import ConfigError, Sources, differences

log = structlog.get_logger("rmemd")


def read_anew(sources: Sources, present: Config) -> Config | None:
    """Return what to apply; None where nothing may be applied or nothing has changed."""
    try:
        wanted = sources.load().config
    except ConfigError as error:
        log.error("config_invalid", problems=[str(problem) for problem in error.problems])
        return None
    changed = differences(present, wanted)
    fixed = {name: pair for name, pair in changed.items() if not _is_reloadable(name)}
    if fixed:
        log.error(
            "reload_refused", needs_restart=_told(fixed), not_applied=sorted(changed.keys() - fixed)
        )
        return None
    log.info("reloaded", changed=_told(changed))
    return wanted


def _is_reloadable(name: str) -> bool:
    """Return whether a key may change; a tenant's limits are [limits]'s."""
    section, _, rest = name.partition(".")
    return keys()[f"{section}.{rest.rpartition('.')[2]}"].reloadable


def _told(changed: dict[str, tuple[Any, Any]]) -> dict[str, str]:
    return {name: f"{_text(old)} -> {_text(new)}" for name, (old, new) in changed.items()}


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
