"""Page states, owners and the one table of pKVM's transitions.

Owns the vocabulary of ``mem_protect.c`` and ``TRANSITIONS``: per hypercall the checks, in the
order in which EL2 makes them, and what the page is afterwards. ``hypercalls.El2`` applies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from errno import EAGAIN, EBUSY, ENOENT, EPERM

import numpy as np
from msgspec import Struct

from rmemd.units import I64
from rmemd_pkvm.reasons import EHWPOISON

# enum pkvm_page_state as dense codes; Linux has 0, BIT(0), BIT(1), BIT(0)|BIT(1) and BIT(2)
OWNED, SHARED_OWNED, BORROWED, NOPAGE, POISON = range(5)
STATE_NAMES = ("OWNED", "SHARED_OWNED", "SHARED_BORROWED", "NOPAGE", "POISON")


class Owner(IntEnum):
    """enum pkvm_component_id, whose order is that of the locks."""

    HOST = 0
    HYP = 1
    GUEST = 2


OWNER_NAMES = ("owned by HOST", "owned by HYP", "owned by GUEST")
NO, YES = range(2)
ZERO, SOME, FULL = range(3)
COUNT_NAMES = ("count is 0", "count is not 0", "count is at its maximum")


class Check(Struct, frozen=True):
    """One question about each page of a request.

    Attributes:
        component: what is asked; ``El2`` answers with a code per page.
        errnos: int64 negative errno by code, 0 where the page passes.
        rule: the rule that refuses, of pkvm.md §8.
        names: the codes' names, for messages.
    """

    component: str
    errnos: I64
    rule: int
    names: tuple[str, ...] = STATE_NAMES


class Transition(Struct, frozen=True):
    """A hypercall on pages: checks in EL2's order, then the new states (``None``: unchanged)."""

    checks: tuple[Check, ...]
    host: int | None = None
    hyp: int | None = None
    guest: int | None = None
    owner: Owner | None = None
    pins: int = 0
    shares: int = 0


def _errnos(*passing: int, but: Mapping[int, int] | None = None, otherwise: int = EPERM) -> I64:
    refused = dict.fromkeys(range(len(STATE_NAMES)), otherwise) | dict(but or {})
    return np.array([0 if c in passing else -e for c, e in refused.items()], dtype=np.int64)


def _host(state: int, rule: int = 1, otherwise: int = EPERM) -> Check:
    return Check("host", _errnos(state, otherwise=otherwise), rule)


def _hyp(state: int) -> Check:
    return Check("hyp", _errnos(state), 9)


def _pins(*counts: int) -> Check:
    return Check("pins", _errnos(*counts, otherwise=EBUSY), 9, COUNT_NAMES)


def _leaf(*states: int, rule: int, but: Mapping[int, int] | None = None) -> Check:
    return Check("guest", _errnos(*states, but=but), rule)


# get_valid_guest_pte(): a leaf that has to be there
_VALID = {NOPAGE: ENOENT, POISON: EHWPOISON}
_GUEST_OWNS = Check("owner", _errnos(Owner.GUEST), 14, OWNER_NAMES)
_VM_KNOWN = Check("vm", _errnos(YES, otherwise=EAGAIN), 14, ("VM gone", "VM known"))
_COUNTED = Check("shares", _errnos(SOME, but={FULL: EBUSY}), 1, COUNT_NAMES)

TRANSITIONS = {
    # host and hypervisor
    "host_share_hyp": Transition(
        (_host(OWNED), _hyp(NOPAGE)), host=SHARED_OWNED, hyp=BORROWED
    ),
    "hyp_pin_shared_mem": Transition(
        (_host(SHARED_OWNED), _hyp(BORROWED), _pins(ZERO, SOME)), pins=1
    ),
    "hyp_unpin_shared_mem": Transition(
        (_host(SHARED_OWNED), _hyp(BORROWED), _pins(SOME, FULL)), pins=-1
    ),
    "host_unshare_hyp": Transition(
        (_host(SHARED_OWNED), _hyp(BORROWED), _pins(ZERO)), host=OWNED, hyp=NOPAGE
    ),
    "host_donate_hyp": Transition(
        (_host(OWNED), _hyp(NOPAGE)), host=NOPAGE, hyp=OWNED, owner=Owner.HYP
    ),
    "hyp_donate_host": Transition(
        (_hyp(OWNED), _host(NOPAGE, rule=9), _pins(ZERO)), host=OWNED, hyp=NOPAGE, owner=Owner.HOST
    ),
    # host and a non-protected guest
    "host_share_guest": Transition(
        (_leaf(NOPAGE, rule=7), Check("host", _errnos(OWNED, SHARED_OWNED), 1), _COUNTED),
        host=SHARED_OWNED, guest=BORROWED, shares=1,
    ),
    "host_unshare_guest": Transition(  # the host's state follows the count
        (_leaf(BORROWED, rule=8, but=dict.fromkeys((NOPAGE, POISON), ENOENT)),
         _host(SHARED_OWNED, rule=8)),
        guest=NOPAGE, shares=-1,
    ),
    # host and a protected guest
    "host_donate_guest": Transition(
        (_host(OWNED), _leaf(NOPAGE, rule=2)), host=NOPAGE, guest=OWNED, owner=Owner.GUEST
    ),
    "guest_share_host": Transition(
        (_leaf(OWNED, rule=10, but=_VALID), _host(NOPAGE, rule=10)),
        host=BORROWED, guest=SHARED_OWNED, owner=Owner.HOST,
    ),
    "guest_unshare_host": Transition(
        (_leaf(SHARED_OWNED, rule=10, but=_VALID), _host(BORROWED, rule=10)),
        host=NOPAGE, guest=OWNED, owner=Owner.GUEST,
    ),
    "guest_relinquish_to_host": Transition(
        (_leaf(OWNED, rule=10, but=_VALID),), host=OWNED, guest=NOPAGE, owner=Owner.HOST
    ),
    "host_force_reclaim_page_guest": Transition(
        (_host(NOPAGE, rule=14, otherwise=EAGAIN), _GUEST_OWNS, _VM_KNOWN,
         _leaf(OWNED, rule=14, but=_VALID)),
        host=OWNED, guest=POISON, owner=Owner.HOST,
    ),
    "host_reclaim_page_guest": Transition(
        (_leaf(OWNED, SHARED_OWNED, POISON, rule=16, but={NOPAGE: ENOENT}),),
        host=OWNED, guest=NOPAGE, owner=Owner.HOST,
    ),
    # design of §8 rule 23: no upstream has it. The states are those of the destination.
    "host_move_guest": Transition(
        (_leaf(OWNED, rule=23, but=_VALID), _host(OWNED, rule=23)),
        host=NOPAGE, guest=OWNED, owner=Owner.GUEST,
    ),
}  # fmt: skip
