"""``dataclass`` as ``dataclasses`` has it, whose work is done when a class is first used.

Owns the putting off. The methods of a dataclass are made from text, each by the compiler, and those
of the daemon's hundred would be a tenth of its time to readiness; most belong to calls that come
later, or never. ``dataclasses`` itself completes a class, before its first object is made and
before its fields are asked for, of the class or of one that inherits from it.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

# a class is completed by one thread, and its bases before it
_lock = threading.RLock()
# asked for by fields(), replace(), asdict() and is_dataclass(), and of bases
_NOTED = ("__dataclass_params__", "__dataclass_fields__")
_OF_THE_CLASS = ("__dict__", "__weakref__")
_NOT_COPIED = (*_OF_THE_CLASS, *_NOTED, "__init__")


class _Completion:
    """What is still to be done of a class, in the place of what ``dataclasses`` notes there."""

    def __init__(self, cls: Any, options: dict[str, Any]) -> None:
        self._cls = cls
        self._options = options
        self._is_done = False

    def install(self) -> None:
        """Have whoever uses the class complete it."""
        completed = self

        def __init__(self: object, *args: object, **kwargs: object) -> None:  # noqa: N807
            completed.complete()
            completed._cls.__init__(self, *args, **kwargs)

        self._cls.__init__ = __init__
        for name in _NOTED:
            setattr(self._cls, name, self)

    def __get__(self, instance: object, owner: type) -> Any:
        self.complete()
        return self._cls.__dataclass_fields__

    def complete(self) -> None:
        """Make the class what its decorator says."""
        with _lock:
            if not self._is_done:
                self._adopt(self._twin())
                self._is_done = True

    def _twin(self) -> Any:
        """Return the same class, complete; ours stays whole while other threads may use it."""
        cls = self._cls
        body = {name: one for name, one in vars(cls).items() if name not in _NOT_COPIED}
        return dataclasses.dataclass(**self._options)(type(cls)(cls.__name__, cls.__bases__, body))

    def _adopt(self, twin: Any) -> None:
        """Take over what the twin has got, with what lets objects be made last."""
        cls, has = self._cls, dict(vars(twin))
        for name in ("__setattr__", "__delattr__"):
            # these tell objects of their class from heirs'
            for cell in getattr(has.get(name), "__closure__", None) or ():
                if cell.cell_contents is twin:
                    cell.cell_contents = cls
        for name, one in list(vars(cls).items()):
            if isinstance(one, dataclasses.Field) and name not in has:
                delattr(cls, name)
        last = {name: has.pop(name) for name in (*_NOTED, "__init__")}
        for name, one in {**has, **last}.items():
            if vars(cls).get(name, cls) is not one and name not in _OF_THE_CLASS:
                setattr(cls, name, one)


if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls=None, /, **options):
        """Return the class, to be completed; ``options`` as ``dataclasses.dataclass`` has them.

        What is wrong with a class, as a default that is mutable, is raised when it is first used.
        One that has ``__init__``, or wants slots, is completed at once.
        """
        if cls is None:
            return lambda cls: dataclass(cls, **options)
        if options.keys() & {"init", "slots"} or "__init__" in vars(cls):
            return dataclasses.dataclass(**options)(cls)
        _Completion(cls, options).install()
        return cls
