/* SPDX-License-Identifier: MIT */
#include "host_numbers.h"
#include "tritlstm.h"

#include <string.h>

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float from_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | rest << 13);
    if (rest >= 0x0400) return float_of(sign | ((rest << 13) + (112u << 23)));
    return float_of(sign | bits_of((float)rest / 16777216.0f)); /* subnormal: a multiple of 2^-24 */
}

static uint16_t to_half(float value)
{
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (rest >= 0x47800000) return (uint16_t)(sign | 0x7C00); /* 65536 and more */
    if (rest < 0x38800000) /* subnormal: beside 0.5 a float's last bit is 2^-24 */
        return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | (rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13);
}

static uint16_t to_brain(float value)
{
    uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void host_load_float(int32_t dtype, const void *from, size_t count, float *to)
{
    const uint16_t *words = from;
    const double *wide = from;
    if (dtype == TRITLSTM_FLOAT32) memcpy(to, from, count * sizeof *to);
    else if (dtype == TRITLSTM_FLOAT64)
        for (size_t k = 0; k < count; k++) to[k] = (float)wide[k];
    else if (dtype == TRITLSTM_FLOAT16)
        for (size_t k = 0; k < count; k++) to[k] = from_half(words[k]);
    else
        for (size_t k = 0; k < count; k++) to[k] = float_of((uint32_t)words[k] << 16);
}

void host_store_float(int32_t dtype, const float *from, size_t count, void *to)
{
    uint16_t *words = to;
    double *wide = to;
    if (dtype == TRITLSTM_FLOAT32) memcpy(to, from, count * sizeof *from);
    else if (dtype == TRITLSTM_FLOAT64)
        for (size_t k = 0; k < count; k++) wide[k] = from[k];
    else if (dtype == TRITLSTM_FLOAT16)
        for (size_t k = 0; k < count; k++) words[k] = to_half(from[k]);
    else
        for (size_t k = 0; k < count; k++) words[k] = to_brain(from[k]);
}

void host_round_float(int32_t dtype, float *values, size_t count)
{
    if (dtype == TRITLSTM_FLOAT16)
        for (size_t k = 0; k < count; k++) values[k] = from_half(to_half(values[k]));
    else if (dtype == TRITLSTM_BFLOAT16)
        for (size_t k = 0; k < count; k++) values[k] = float_of((uint32_t)to_brain(values[k]) << 16);
}

void host_load_double(int32_t dtype, const void *from, size_t count, double *to)
{
    const uint16_t *words = from;
    const float *single = from;
    if (dtype == TRITLSTM_FLOAT64) memcpy(to, from, count * sizeof *to);
    else if (dtype == TRITLSTM_FLOAT32)
        for (size_t k = 0; k < count; k++) to[k] = single[k];
    else if (dtype == TRITLSTM_FLOAT16)
        for (size_t k = 0; k < count; k++) to[k] = from_half(words[k]);
    else
        for (size_t k = 0; k < count; k++) to[k] = float_of((uint32_t)words[k] << 16);
}

/* Doubles belong to handles of float64 alone. */
void host_store_double(int32_t dtype, const double *from, size_t count, void *to)
{
    (void)dtype;
    memcpy(to, from, count * sizeof *from);
}

void host_round_double(int32_t dtype, double *values, size_t count) { (void)dtype, (void)values, (void)count; }

/* ---- random numbers ---------------------------------------------------------------------------------- */

enum { STATE = 624, MIDDLE = 397 };

void host_random_seed(host_random *random, uint64_t seed)
{
    random->state[0] = (uint32_t)seed;
    for (uint32_t k = 1; k < STATE; k++)
        random->state[k] = 1812433253u * (random->state[k - 1] ^ random->state[k - 1] >> 30) + k;
    random->next = STATE;
}

static uint32_t draw(host_random *random)
{
    uint32_t *state = random->state, y;
    if (random->next == STATE) {
        for (int k = 0; k < STATE; k++) {
            y = (state[k] & 0x80000000u) | (state[(k + 1) % STATE] & 0x7FFFFFFFu);
            state[k] = state[(k + MIDDLE) % STATE] ^ y >> 1 ^ (y & 1 ? 0x9908B0DFu : 0);
        }
        random->next = 0;
    }
    y = state[random->next++];
    y ^= y >> 11;
    y ^= y << 7 & 0x9D2C5680u;
    y ^= y << 15 & 0xEFC60000u;
    return y ^ y >> 18;
}

/* A word's lower 24 or 53 bits k as bound (2 k / 2^bits - 1), rounded once: the factor in brackets is exact. The 16-bit
 * types take floats and round them, and where that gives the upper bound, which is excluded, the lower one. */
void host_random_uniform_float(host_random *random, int32_t dtype, double bound, size_t count, float *to)
{
    float end = (float)bound, rounded = end;
    host_round_float(dtype, &rounded, 1);
    for (size_t k = 0; k < count; k++)
        to[k] = (float)(end * (((draw(random) & 0xFFFFFF) - 8388608.0) / 8388608.0)); /* in double, exact */
    host_round_float(dtype, to, count);
    for (size_t k = 0; k < count; k++)
        if (dtype != TRITLSTM_FLOAT32 && to[k] >= rounded) to[k] = -rounded;
}

void host_random_uniform_double(host_random *random, int32_t dtype, double bound, size_t count, double *to)
{
    (void)dtype;
    for (size_t k = 0; k < count; k++) {
        uint64_t high = draw(random), word = (high << 32 | draw(random)) & ((1ull << 53) - 1);
        to[k] = bound * (((double)word - 4503599627370496.0) / 4503599627370496.0);
    }
}
