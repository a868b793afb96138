"""Make the sync half of rmem_client from its asyncio half, so that there is one source of both.

**The rule, for whoever adds a method:** edit ``rmem_client/aio/<module>.py`` (``async def``,
``await self._connection.call(...)``), then run ``make client`` and commit both files. Never edit a
module that says "Generated" in its first line. What neither awaits nor holds a connection (types,
constants, builders of requests) lies in ``rmem_client/`` itself, once, and both halves import it:
``from ..errors import RmemError``. ``connection.py`` and ``watch.py`` really differ: they exist
twice, by hand, and show the same names.

In such a source:

- write ``reply = await call(...)`` and ``return reply.x`` instead of ``(await call(...)).x``, which
  would leave its parentheses behind;
- ``yield from`` is not allowed in an async generator: loop;
- a stub takes the connection's channel, ``XServiceStub(connection.channel)``, in both halves.

The work is done token by token, as httpcore does it: ``async`` and ``await`` go, a few names change
(``NAMES``), imports from the parent become imports from beside, and in docstrings and comments the
examples follow (``TEXT``). ruff formats what comes out. ``--check`` writes nothing and fails if a
committed module is not what would be written.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parent / "rmem_client"
# the two halves really differ in these, and the package's front page is written for each
BY_HAND = frozenset({"__init__.py", "connection.py", "watch.py"})

NAMES = {
    "AsyncIterator": "Iterator",
    "AsyncGenerator": "Generator",
    "AsyncIterable": "Iterable",
    "StopAsyncIteration": "StopIteration",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
    "aclosing": "closing",
}
# in the examples of docstrings and comments; prose says "await" nowhere
TEXT = [
    (re.compile(r"\basync (?=with |for |def )"), ""),
    (re.compile(r"\bawait (?=\w+[.(])"), ""),
    (re.compile(r"\baio\.(?=Client\b)"), ""),
    (re.compile(r"``rmem_client\.aio"), "``rmem_client"),
    (re.compile(r"\bimport aio$", re.MULTILINE), "import Client"),
]
HEADER = "# Generated from aio/{name} by ../unasync.py: edit that one, then `make client`.\n"


def sources() -> list[Path]:
    """Return the modules that the sync half is made from."""
    return sorted(path for path in (PACKAGE / "aio").glob("*.py") if path.name not in BY_HAND)


def target(source: Path) -> Path:
    """Return the module that is made from one."""
    return PACKAGE / source.name


def generate(source: Path) -> str:
    """Return the sync module for a source, formatted."""
    with source.open("rb") as opened:
        tokens = list(tokenize.tokenize(opened.readline))
    text = HEADER.format(name=source.name) + _without_async(tokens)
    # the order of imports, and the loops that an async generator must have and this one need not
    fixes = ("check", "--select=I,UP028", "--fix-only", "--unsafe-fixes", "--quiet")
    text = _ruff(text, target(source), *fixes)
    return _ruff(text, target(source), "format", "--quiet")


def _without_async(tokens: list[tokenize.TokenInfo]) -> str:
    """Copy tokens with the space that stood before each, leaving out what only asyncio has."""
    out = io.StringIO()
    row, column = 1, 0
    gap, previous = "", ""
    for token in tokens[1:]:  # the first names the encoding
        start_row, start_column = token.start
        if start_row > row:
            row, column = start_row, 0
        gap += " " * (start_column - column)
        row, column = token.end
        if token.type in {tokenize.NEWLINE, tokenize.NL}:
            row, column = row + 1, 0
        if token.type == tokenize.NAME and token.string in {"async", "await"}:
            column += 1  # the space before it is the next token's, its own goes
            continue
        # from ..errors: a parent's module lies beside the sync half
        if not token.string == previous == ".":
            out.write(gap + _text(token))
            gap = ""
        previous = token.string
    return out.getvalue()


def _text(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        return NAMES.get(token.string, token.string)
    if token.type in {tokenize.STRING, tokenize.COMMENT}:
        text = token.string
        for pattern, replacement in TEXT:
            text = pattern.sub(replacement, text)
        return text
    return token.string


def _ruff(text: str, path: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", str(path), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Write every sync module, or with --check say which differ."""
    parser = argparse.ArgumentParser(
        description="make rmem_client's sync half from its asyncio half"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    check = parser.parse_args().check
    stale = []
    for source in sources():
        text, path = generate(source), target(source)
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if not check:
                path.write_text(text)
    if stale:
        print(f"{'not up to date' if check else 'written'}: {', '.join(stale)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
