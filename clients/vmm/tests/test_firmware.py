from __future__ import annotations

from pathlib import Path

import pytest

from rmem_vmm import firmware
from rmem_vmm.firmware import PAGE_BYTES, FirmwareError

NOWHERE = ("/nonexistent/OVMF_CODE*.fd", "/nonexistent/OVMF.fd")


def test_built_image_when_the_system_has_none() -> None:
    one, other = firmware.load(None, NOWHERE), firmware.load(None, NOWHERE)
    assert one == other
    assert one.built
    assert "built here" in one.origin
    assert len(one.image) == firmware.BUILT_BYTES
    assert one.image.startswith(b"rmem_vmm flat firmware image")
    assert one.image[-firmware.RESET_OFFSET :].startswith(firmware.RESET_STUB)
    pages = [one.image[at : at + PAGE_BYTES] for at in range(0, len(one.image), PAGE_BYTES)]
    assert len(set(pages)) == one.npages


def test_ovmf_of_the_system_is_preferred(tmp_path: Path) -> None:
    (tmp_path / "OVMF_CODE_4M.fd").write_bytes(b"\xea" * PAGE_BYTES)
    found = firmware.load(None, (*NOWHERE, f"{tmp_path}/OVMF_CODE*.fd"))
    assert not found.built
    assert "OVMF_CODE_4M.fd" in found.origin
    assert found.image == b"\xea" * PAGE_BYTES


def test_named_file_is_padded_at_its_front(small: Path) -> None:
    loaded = firmware.load(small)
    assert loaded.npages == 3
    assert loaded.image.endswith(small.read_bytes())
    assert loaded.origin == str(small)


@pytest.mark.parametrize("name", ["absent.fd", "."])
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FirmwareError, match="firmware"):
        firmware.load(tmp_path / name)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.fd").touch()
    with pytest.raises(FirmwareError, match="has 0 bytes"):
        firmware.load(tmp_path / "empty.fd")
