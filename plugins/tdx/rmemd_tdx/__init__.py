"""Intel TDX guests: secure EPT, PAMT, TLB tracking, MRTD, and the three answers to migration."""

from rmemd_tdx.platform import TdxPlatform

__all__ = ["TdxPlatform"]
