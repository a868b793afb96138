"""The consumers that the specification knows, from outside.

Owns what each declares of itself (its ops table, its content rules); nothing else of a consumer
is the generic layer's. Sources: DESIGN.md §5, restrictedmem.md §1 and §2, tdx.md §6 and §9, pkvm.md
§7.
"""

from __future__ import annotations

from dataclasses import replace

from .objects import Traits

_SOFTWARE = Traits("sw-protected", "gup", calls="exit")
# a page that a TD lost reads zeros once it is accepted again (tdx.md §9 rule 8)
_TDX = Traits(
    "tdx-today", "tdx", measured=True, plain=False, calls="exit", to_private="zero",
    to_shared="zero", unmapped="zero",
)  # fmt: skip
_TDX_2022 = replace(_TDX, consumer="tdx-2022", pins=True)
_TDX_RELOCATE = replace(_TDX, consumer="tdx-relocate", movable=True)

KINDS: dict[str, Traits] = {
    "gup": Traits("gup", "gup", private_memory=False),
    "sw-attributes": _SOFTWARE,
    "sw-in-place": replace(_SOFTWARE, in_place=True),
    "null": Traits("null", "null", dies_of_poison=True),
    "tdx-today": _TDX,
    "tdx-2022": _TDX_2022,
    "tdx-relocate": _TDX_RELOCATE,
    "relocate-in-place": replace(_TDX_RELOCATE, in_place=True),
    "tdx-2022-in-place": replace(_TDX_2022, in_place=True),
}
