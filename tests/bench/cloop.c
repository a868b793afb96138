/* The floor of encryption: AES-256-XTS over pages by a plain loop over libcrypto's EVP. */
#include <stddef.h>
#include <stdint.h>

typedef struct evp_cipher_ctx_st EVP_CIPHER_CTX;
typedef struct evp_cipher_st EVP_CIPHER;
typedef struct engine_st ENGINE;
EVP_CIPHER_CTX *EVP_CIPHER_CTX_new(void);
void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *);
const EVP_CIPHER *EVP_aes_256_xts(void);
int EVP_EncryptInit_ex(EVP_CIPHER_CTX *, const EVP_CIPHER *, ENGINE *, const unsigned char *,
                       const unsigned char *);
int EVP_EncryptUpdate(EVP_CIPHER_CTX *, unsigned char *, int *, const unsigned char *, int);

void c_loop(const unsigned char *key, const int64_t *pfns, size_t npages, const unsigned char *in,
            unsigned char *out)
{
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();

    EVP_EncryptInit_ex(context, EVP_aes_256_xts(), NULL, key, NULL);
    for (size_t i = 0; i < npages; i++) {
        int64_t tweak[2] = {pfns[i], 0};
        int done;

        EVP_EncryptInit_ex(context, NULL, NULL, NULL, (const unsigned char *)tweak);
        EVP_EncryptUpdate(context, out + 4096 * i, &done, in + 4096 * i, 4096);
    }
    EVP_CIPHER_CTX_free(context);
}
