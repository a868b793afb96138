"""A deferred dataclass is the one that ``dataclasses`` makes, whatever is first asked of it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import threading
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from rmemd import deferred

FIELDS = {
    "plain": "{name}: int",
    "default": "{name}: int = 3",
    "factory": "{name}: list[int] = field(default_factory=list)",
    "hidden": "{name}: int = field(default=4, repr=False, compare=False)",
    "keyword": "{name}: int = field(default=5, kw_only=True)",
    "constant": "{name}: ClassVar[int] = 6",
    "initial": "{name}: InitVar[int] = 7",
}
BODIES = {
    "none": "pass",
    "hash": "def __hash__(self): return 5",
    "equal": "def __eq__(self, other): return True",
    "shown": "def __repr__(self): return super().__repr__()[:3]",
    "after": "def __post_init__(self, *given): object.__setattr__(self, 'after', given)",
    "lazy": "@functools.cached_property\n    def lazy(self): return 8",
    "own": "def __init__(self, given): object.__setattr__(self, 'given', given)",
}
OPTIONS = st.fixed_dictionaries(
    {}, optional={"eq": st.booleans(), "repr": st.booleans(), "slots": st.just(True)}
)
CLASSES = st.tuples(
    st.lists(st.sampled_from(sorted(FIELDS)), max_size=4), st.sampled_from(sorted(BODIES))
)


def said(act: Callable[[], Any]) -> object:
    """Return what an act gives or raises, in words that do not tell two runs apart."""
    try:
        given = act()
    except Exception as error:
        return type(error).__name__, str(error)
    return given.partition(" object at ")[0] if isinstance(given, str) else given


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "made": lambda cls: repr(cls(1, 2)),
    "too little": lambda cls: repr(cls()),
    "too much": lambda cls: cls(1, 2, 3, 4, 5, 6, 7, 8, 9),
    "fields": lambda cls: [(f.name, f.type, f.kw_only, f.init) for f in dataclasses.fields(cls)],
    "is one": dataclasses.is_dataclass,
    "parameters": lambda cls: repr(cls.__dataclass_params__).replace("init=False", "init=True"),
    "equal": lambda cls: (cls(1, 2) == cls(1, 2), cls(1, 2) == cls(2, 1), cls(1, 2) == 3),
    "hash": lambda cls: hash(cls(1, 2)) == hash(cls(1, 2)),
    "write": lambda cls: setattr(cls(1, 2), "a", 9),
    "write another": lambda cls: setattr(cls(1, 2), "zz", 9),
    "delete": lambda cls: delattr(cls(1, 2), "a"),
    "of a plain heir": lambda cls: setattr(type("Heir", (cls,), {})(1, 2), "zz", 9),
    "replaced": lambda cls: repr(dataclasses.replace(cls(1, 2), a=7)),
    "as data": lambda cls: (dataclasses.asdict(cls(1, 2)), dataclasses.astuple(cls(1, 2))),
    "copied": lambda cls: repr(copy.copy(cls(1, 2))),
    "lazy": lambda cls: cls(1, 2).lazy,
    "after": lambda cls: cls(1, 2).after,
    "signature, once used": lambda cls: (said(lambda: cls(1)), str(inspect.signature(cls)))[1],
    "match": lambda cls: (said(lambda: cls(1)), getattr(cls, "__match_args__", None))[1],
    "class attributes, once used": lambda cls: (
        said(lambda: cls(1)), sorted(name for name in vars(cls) if name != "__slotnames__")
    )[1],
}  # fmt: skip


def text_of(fields: list[str], body: str, heir: bool) -> str:
    """Return a class of some fields; "a", "b"... or from "d" on those of an heir."""
    names = "defg" if heir else "abcd"
    lines = [FIELDS[kind].format(name=name) for kind, name in zip(fields, names, strict=False)]
    base = "(Base)" if heir else ""
    lines.append(BODIES[body])
    return f"class {'Heir' if heir else 'Base'}{base}:\n    " + "\n    ".join(lines)


def made(decorator: Any, classes: list[str], options: dict[str, bool]) -> dict[str, Any]:
    """Make the classes with a decorator; both namespaces say that they are this module."""
    space = {
        "field": dataclasses.field, "__name__": __name__, "functools": __import__("functools"),
        "ClassVar": __import__("typing").ClassVar, "InitVar": dataclasses.InitVar,
    }  # fmt: skip
    for text in classes:
        exec(compile(text, "<made>", "exec"), space)
        name = text.split()[1].partition("(")[0].rstrip(":")
        space[name] = decorator(**options)(space[name])
    return space


def _used(space: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in reversed(names):
        dataclasses.fields(space[name])


@given(
    st.lists(CLASSES, min_size=1, max_size=2),
    OPTIONS,
    st.booleans(),
    st.lists(st.sampled_from(sorted(QUESTIONS)), min_size=1, max_size=8),
)
def test_what_is_asked_in_any_order_is_answered_the_same(
    specs: list[tuple[list[str], str]], options: dict[str, bool], frozen: bool, asked: list[str]
) -> None:
    texts = [text_of(fields, body, heir=bool(n)) for n, (fields, body) in enumerate(specs)]
    options = {**options, "frozen": frozen}
    names = ("Heir", "Base") if len(specs) > 1 else ("Base",)
    plain: dict[str, Any] = {}
    late: dict[str, Any] = {}
    mistake = said(lambda: plain.update(made(dataclasses.dataclass, texts, options)))
    if mistake is not None:
        # told when the class is used, unless it is completed at once
        assert mistake == said(lambda: _used(made(deferred.dataclass, texts, options), names))
        return
    late.update(made(deferred.dataclass, texts, options))
    for name in names:
        for question in asked:
            ask = QUESTIONS[question]
            assert said(lambda: ask(late[name])) == said(lambda: ask(plain[name])), question  # noqa: B023


def test_threads_that_make_the_first_objects_at_once_all_get_them() -> None:
    for _ in range(50):

        @deferred.dataclass(frozen=True)
        class Point:
            x: int
            y: int = 2

        start = threading.Barrier(8)
        got: list[Point] = []

        def make(cls: type[Point] = Point, start: Any = start, got: Any = got) -> None:
            start.wait()
            got.append(cls(1))

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [Point(1, 2)] * 8


def test_a_class_is_left_alone_until_it_is_used() -> None:
    @deferred.dataclass(frozen=True)
    class Unused:
        x: int

    assert "__eq__" not in vars(Unused)
    assert Unused(1) == Unused(1)
    assert "__eq__" in vars(Unused)
