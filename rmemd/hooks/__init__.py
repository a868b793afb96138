"""The public plugin API: everything that a vendor back end imports from rmemd.

Version 1. Start with ``rmemd.hooks.spec``; the hook reference says when each hook runs, what it
may answer and what leaving it out means.
"""

from rmemd.hooks.hooktx import HookTx, HostContext, VmContext
from rmemd.hooks.spec import ENTRY_POINTS, HOOKS_VERSION, hookimpl
from rmemd.hooks.state import (
    RecordsState,
    SparseState,
    State,
    TableState,
    export_tables,
    import_tables,
)
from rmemd.hooks.tables import Dense, Records, Space, Sparse, TableSpec
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import (
    HOST_VIEWS,
    AccessAnswer,
    AccessCode,
    Agent,
    CallAction,
    CallAnswer,
    Content,
    GuestCall,
    GuestException,
    HostAccess,
    HostAnswer,
    HostView,
    PageKind,
    PageStates,
    Pin,
    Populated,
    Runs,
    Variant,
    Why,
)

__all__ = [
    "ENTRY_POINTS", "HOOKS_VERSION", "HOST_VIEWS", "AccessAnswer", "AccessCode", "Agent",
    "CallAction", "CallAnswer", "Content", "Dense", "GuestCall", "GuestException",
    "HookTx", "HostAccess", "HostAnswer", "HostContext", "HostView", "PageKind", "PageStates",
    "Pin", "Populated", "Records", "RecordsState", "Runs", "Space", "Sparse", "SparseState",
    "State", "TableSpec", "TableState", "Tx", "Variant", "VmContext", "Why", "export_tables",
    "hookimpl", "import_tables",
]  # fmt: skip
