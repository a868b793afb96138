"""What a planned restart came to (``client.host.upgrade``)."""

from __future__ import annotations

from dataclasses import dataclass

from rmem.v1 import host_pb2


@dataclass(frozen=True)
class Upgraded:
    """A daemon that made way, and its successor.

    Attributes:
        before: the last word of the one that made way.
        after: the first answer of its successor.
        unserved_s: seconds between the two, in which nothing was served.
    """

    before: host_pb2.UpgradeResponse
    after: host_pb2.GetHostResponse
    unserved_s: float
