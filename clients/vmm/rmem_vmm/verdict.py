"""What the figures say: whether they are as they must be, and the answer in a few sentences.

Owns the judgement, which only compares figures with each other and with the ops tables. Nothing
here was typed in: a new variant is judged by the same rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .argument import Argued
from .fragmentation import Compacted

HOOK = "migrate_folio"


@dataclass(frozen=True)
class Pair:
    """Two variants of one platform: what one's table has more and less, and what that changed."""

    stays: Argued
    moves: Argued
    stays_compacted: Compacted
    moves_compacted: Compacted

    @property
    def gained(self) -> tuple[str, ...]:
        """Return the ops that only the variant that moves has."""
        return tuple(op for op in self.moves.ops if op not in self.stays.ops)

    @property
    def lost(self) -> tuple[str, ...]:
        """Return the ops that only the variant that stays has."""
        return tuple(op for op in self.stays.ops if op not in self.moves.ops)


def contradictions(argued: Sequence[Argued], compacted: Sequence[Compacted]) -> list[str]:
    """Return everything that is not as it must be, as sentences; none is the good case."""
    found = [text for row in argued for text in _row_faults(row)]
    rows = {row.consumer: row for row in argued}
    return found + [text for one in compacted for text in _compaction_faults(one, rows)]


def _row_faults(row: Argued) -> Iterator[str]:
    name = row.consumer
    may_move = HOOK in row.ops or not row.private_memory
    wanted = "moved" if may_move else "unmovable"
    if row.migrate.outcome != wanted:
        yield f"{name}: migrate answered {row.migrate}, not all {wanted}, which its table implies"
    if row.migrate.unmovable and not any(name in who for who in row.migrate.named):
        yield f"{name}: migrate was refused and the refusal names {row.migrate.named}"
    if row.mismatched_pages or not row.checked_pages:
        yield f"{name}: {row.mismatched_pages} of {row.checked_pages} pages did not survive"
    closed = row.steps.get("closed")
    if closed is None or closed.references or closed.pins:
        yield f"{name}: after the file's last reference the page is still held ({closed})"
    missing = [step for step in ("present", "lookup", "lost race", "installed", "released")
               if step not in row.steps]  # fmt: skip
    if missing:
        yield f"{name}: the daemon told nothing of {', '.join(missing)}"


def _compaction_faults(one: Compacted, rows: dict[str, Argued]) -> Iterator[str]:
    stuck = [name for name in one.guests if not _may_move(rows[name])]
    if one.mismatched_pages or one.checked_pages != one.pages:
        yield (
            f"{one.label}: after compaction {one.mismatched_pages} of {one.checked_pages} pages "
            f"checked were wrong, of {one.pages}"
        )
    if one.free_before:
        yield f"{one.label}: {one.free_before} blocks were free before compaction"
    if not stuck and not one.regained:
        yield f"{one.label}: every page may move, and no block was regained"
    if len(stuck) == len(one.guests) and one.moved:
        yield f"{one.label}: {one.moved} pages moved although the table says that none can"


def _may_move(row: Argued) -> bool:
    return HOOK in row.ops or not row.private_memory


def pairs(
    argued: Sequence[Argued], compacted: Sequence[Compacted], preferred: Sequence[str] = ()
) -> list[Pair]:
    """Return variants of one platform that differ in the hook; the smallest difference first.

    Among equals, those come first whose variant that stays is ``preferred``.
    """
    by_label = {one.label: one for one in compacted}
    found = [
        Pair(a, b, by_label[a.consumer], by_label[b.consumer])
        for a in argued
        for b in argued
        if a.platform == b.platform and a.private_memory and b.private_memory
        and HOOK in b.ops and HOOK not in a.ops
    ]  # fmt: skip
    return sorted(
        found, key=lambda p: (len(p.gained) + len(p.lost), p.stays.consumer not in preferred)
    )


def answer(
    argued: Sequence[Argued], compacted: Sequence[Compacted], mixed: Compacted | None
) -> list[str]:
    """Return the answer to the argument, in sentences made from the figures."""
    private = [row for row in argued if row.private_memory]
    moved = [row for row in private if row.migrate.outcome == "moved"]
    stuck = [row for row in private if row.migrate.outcome == "unmovable"]
    wrong = sum(row.mismatched_pages for row in argued) + sum(c.mismatched_pages for c in compacted)
    checked = sum(row.checked_pages for row in argued) + sum(c.checked_pages for c in compacted)
    sentences = [
        f"Of {len(private)} variants with private memory {len(moved)} moved every page "
        f"({', '.join(row.consumer for row in moved)}), and they are exactly those whose table has "
        f"{HOOK}; {len(stuck)} answered {_said(stuck)} and were not even asked. "
        f"{_fate(checked, wrong)}"
    ]
    unpinned = [row for row in stuck if row.steps["released"] == row.steps["present"]]
    if unpinned:
        sentences.append(
            f"A reference is not what decides: {len(unpinned)} of the {len(stuck)} that stay "
            f"({', '.join(row.consumer for row in unpinned)}) hold nothing once a page is mapped, "
            f"and stay all the same, because the hook is NULL."
        )
    best = pairs(argued, compacted)
    if best:
        sentences.append(" ".join(_difference(pair) for pair in _one_per_platform(best)))
    if mixed is not None:
        sentences.append(
            f"Beside others it takes little: {mixed.unmovable} of {mixed.pages} pages without the "
            f"hook, spread over the node, kept {mixed.blocked} of {mixed.blocks} blocks, and "
            f"{mixed.regained} were regained."
        )
    return sentences


def _said(stuck: Sequence[Argued]) -> str:
    """Return how the variants that stay were refused."""
    answers = (row.migrate for row in stuck)
    return " and ".join(sorted({f"{a.reason} ({a.errno})" for a in answers}))


def _fate(checked: int, wrong: int) -> str:
    if wrong:
        return f"{wrong} of {checked} pages that guests checked afterwards were LOST."
    return f"No byte was lost: guests checked {checked} pages afterwards, and all were as written."


def _one_per_platform(found: Sequence[Pair]) -> list[Pair]:
    first: dict[str, Pair] = {}
    for pair in found:
        first.setdefault(pair.moves.platform, pair)
    return list(first.values())


def _difference(pair: Pair) -> str:
    change = [f"+{op}" for op in pair.gained] + [f"−{op}" for op in pair.lost]
    return (
        f"{pair.stays.consumer} → {pair.moves.consumer} ({', '.join(change)}): "
        f"{pair.stays_compacted.regained} → {pair.moves_compacted.regained} of "
        f"{pair.moves_compacted.blocks} blocks regained."
    )
