/* rmemd's optional compiled helper: loops over lists that Python would make call by call.
 *
 * libcrypto is opened by name when the helper is loaded, so that neither its headers nor its
 * version matter to the build. Its functions used here are the same from OpenSSL 1.1 on.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096

static struct {
    void *(*new)(void);
    void (*free)(void *context);
    const void *(*aes_128_xts)(void);
    const void *(*aes_256_xts)(void);
    int (*init)(void *context, const void *cipher, void *engine, const unsigned char *key,
                const unsigned char *iv, int encrypt);
    int (*update)(void *context, unsigned char *out, int *out_bytes, const unsigned char *in,
                  int in_bytes);
} crypto;

/* Find libcrypto's functions; 0, or -1 where the library or one of them is not there. */
int helper_open(const char *library)
{
    static const struct { const char *name; void **function; } wanted[] = {
        {"EVP_CIPHER_CTX_new", (void **)&crypto.new},
        {"EVP_CIPHER_CTX_free", (void **)&crypto.free},
        {"EVP_aes_128_xts", (void **)&crypto.aes_128_xts},
        {"EVP_aes_256_xts", (void **)&crypto.aes_256_xts},
        {"EVP_CipherInit_ex", (void **)&crypto.init},
        {"EVP_CipherUpdate", (void **)&crypto.update},
    };
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);

    if (!handle)
        return -1;
    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
        if (!(*wanted[i].function = dlsym(handle, wanted[i].name)))
            return -1;
    return 0;
}

/* AES-XTS over pages, each a data unit numbered by its pfn; 0, or -1 as libcrypto refuses. */
int helper_xts(int encrypt, const uint8_t *key, size_t key_bytes, const int64_t *pfns,
               size_t npages, const uint8_t *in, uint8_t *out)
{
    const void *cipher = key_bytes == 64 ? crypto.aes_256_xts() : crypto.aes_128_xts();
    void *context = crypto.new();
    int good = context && crypto.init(context, cipher, NULL, key, NULL, encrypt);

    for (size_t i = 0; good && i < npages; i++) {
        uint8_t tweak[16] = {0};
        int done = 0;

        for (int byte = 0; byte < 8; byte++)
            tweak[byte] = (uint8_t)((uint64_t)pfns[i] >> 8 * byte);
        good = crypto.init(context, NULL, NULL, NULL, tweak, -1) &&
               crypto.update(context, out + i * PAGE, &done, in + i * PAGE, PAGE) && done == PAGE;
    }
    crypto.free(context);
    return good ? 0 : -1;
}

/* Allocate or punch ranges in order; how many were done, and the errno of the one that was not. */
size_t helper_fallocate(int fd, int mode, const int64_t *offsets, const int64_t *lengths,
                        size_t nranges, int *error)
{
    *error = 0;
    for (size_t i = 0; i < nranges; i++)
        if (fallocate(fd, mode, offsets[i], lengths[i])) {
            *error = errno;
            return i;
        }
    return nranges;
}
