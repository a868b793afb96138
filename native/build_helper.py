"""The cffi builder of ``rmemd_helper``: compiles helper.c, which needs no headers but libc's."""

from pathlib import Path

from cffi import FFI

ffi = FFI()
ffi.cdef("""
int helper_open(const char *library);
int helper_xts(int encrypt, const uint8_t *key, size_t key_bytes, const int64_t *pfns,
               size_t npages, const uint8_t *in, uint8_t *out);
size_t helper_fallocate(int fd, int mode, const int64_t *offsets, const int64_t *lengths,
                        size_t nranges, int *error);
""")
ffi.set_source("rmemd_helper", (Path(__file__).parent / "helper.c").read_text(), libraries=["dl"])
