/* The element types that a handle can have, and the two in which the host path computes. */
#ifndef TRITLSTM_HOST_NUMBERS_H
#define TRITLSTM_HOST_NUMBERS_H

#include <stddef.h>
#include <stdint.h>

/* `count` elements of TRITLSTM_* type `dtype` to floats, or from floats with one rounding to nearest even. */
void host_load_float(int32_t dtype, const void *from, size_t count, float *to);
void host_store_float(int32_t dtype, const float *from, size_t count, void *to);

void host_load_double(int32_t dtype, const void *from, size_t count, double *to);
void host_store_double(int32_t dtype, const double *from, size_t count, void *to);

/* Rounds in place to what `dtype` can hold. */
void host_round_float(int32_t dtype, float *values, size_t count);
void host_round_double(int32_t dtype, double *values, size_t count);

/* Draws uniformly from (-bound, bound) in the type `dtype`: the same numbers as torch.Tensor.uniform_ on a CPU with a
 * generator of that seed (MT19937 of Matsumoto & Nishimura, 1998). */
typedef struct host_random {
    uint32_t state[624];
    int next;
} host_random;

void host_random_seed(host_random *random, uint64_t seed);
void host_random_uniform_float(host_random *random, int32_t dtype, double bound, size_t count, float *to);
void host_random_uniform_double(host_random *random, int32_t dtype, double bound, size_t count, double *to);

#endif
