"""AMD SEV-SNP as an rmemd platform: the RMP, the firmware's commands and KVM's way of driving them.

Read ``tables`` first (states and codes as data), then ``rmp`` (the CPU's instructions),
``firmware`` (the commands), ``consumer`` (a VM's hooks) and ``platform`` (the host's half).
"""

from rmemd_snp.platform import SnpPlatform

__all__ = ["SnpPlatform"]
