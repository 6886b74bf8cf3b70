/* A decoder of raw deflate data (RFC 1951). */
#ifndef TRITLSTM_CUDA_INFLATE_H
#define TRITLSTM_CUDA_INFLATE_H

#include <stddef.h>
#include <stdint.h>

/* 0 if `in` is one whole deflate stream of exactly `room` bytes; otherwise -1, and `out` is undefined. */
int tritlstm_inflate(const uint8_t *in, size_t length, uint8_t *out, size_t room);

#endif
