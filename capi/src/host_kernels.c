/* The host path's inner loops for every instruction set, and which of them this processor runs.
 *
 * Written with the vector types of GCC and Clang rather than left to the vectoriser: what is fast is then fast with -O2 of
 * any of their versions. On an unknown processor the vectors have 16 bytes, which is SSE2 on x86-64 and NEON on AArch64.
 * TRITLSTM_HOST_LEVEL leaves out what is above it: 0 these vectors, 1 AVX2, 2 AVX-512.
 *
 * SPDX-License-Identifier: MIT */
#include "host_kernels.h"

#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define JOIN(a, b, c) JOIN_(a, b, c)
#define JOIN_(a, b, c) a##_##b##_##c
#define PAIR(a, b) PAIR_(a, b)
#define PAIR_(a, b) a##_##b
#define NAME(what) JOIN(what, REAL, SET)
#define TYPED(what) PAIR(what, REAL)

#ifndef TRITLSTM_HOST_LEVEL
#define TRITLSTM_HOST_LEVEL 2
#endif
#if defined(__x86_64__) && TRITLSTM_HOST_LEVEL > 0
#define SEVERAL_SETS
#endif

/* With GCC the pragma holds for the functions that follow; with Clang an attribute does. */
#ifdef SEVERAL_SETS

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx2,fma")
#endif
#define SET avx512
#define VECTOR 64
#define ROWS 8
#define INSTRUCTIONS "AVX-512"
#include "host_kernels_types.h"
#undef SET
#undef VECTOR
#undef ROWS
#undef INSTRUCTIONS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define SET avx2
#define VECTOR 32
#define ROWS 3
#define INSTRUCTIONS "AVX2"
#include "host_kernels_types.h"
#undef SET
#undef VECTOR
#undef ROWS
#undef INSTRUCTIONS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#define SET any
#define VECTOR 16
#ifdef __aarch64__
#define ROWS 3
#else
#define ROWS 1
#endif
#define INSTRUCTIONS "16-byte vectors"
#include "host_kernels_types.h"

#ifdef SEVERAL_SETS

static int level(void)
{
    if (TRITLSTM_HOST_LEVEL > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

const kernels_float *host_kernels_float(void)
{
    static const kernels_float *const tables[] = {&table_float_any, &table_float_avx2, &table_float_avx512};
    return tables[level()];
}

const kernels_double *host_kernels_double(void)
{
    static const kernels_double *const tables[] = {&table_double_any, &table_double_avx2, &table_double_avx512};
    return tables[level()];
}

#else

const kernels_float *host_kernels_float(void) { return &table_float_any; }
const kernels_double *host_kernels_double(void) { return &table_double_any; }

#endif
