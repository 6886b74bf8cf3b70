/* SPDX-License-Identifier: MIT */
#include "host_engine.h"
#include "host_kernels.h"
#include "host_numbers.h"

#include <limits.h>
#include <math.h>
#include <string.h>

#ifdef TRITLSTM_CBLAS
/* The two functions of the CBLAS that are used, and its constants; every implementation has the same. */
enum { CBLAS_ROW_MAJOR = 101, CBLAS_NO_TRANS = 111, CBLAS_TRANS = 112 };
enum { CBLAS_ROWS = 4 }; /* for fewer rows a product is bound by reading the weights, which ours reads in order */
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc);
void cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha, const double *a, int lda,
                 const double *b, int ldb, double beta, double *c, int ldc);
const char *const host_products = "large ones by the CBLAS of the build";
#else
const char *const host_products = "own loops";
#endif

#define PAIR(a, b) PAIR_(a, b)
#define PAIR_(a, b) a##_##b
#define TYPED(what) PAIR(what, REAL)
#define NAME(what) PAIR(walk_##what, REAL)

#define REAL float
#define GEMM cblas_sgemm
#include "host_walk_template.h"
#undef REAL
#undef GEMM

#define REAL double
#define GEMM cblas_dgemm
#include "host_walk_template.h"
#undef REAL
#undef GEMM

host_walk host_walk_of(const host_network *n)
{
    if (n->real == sizeof(double))
        return (host_walk){walk_pack_network_double, walk_forward_double, walk_backward_double, walk_load_double,
                           walk_store_double,        walk_draw_double,    ((const kernels_double *)n->kernels)->name};
    return (host_walk){walk_pack_network_float, walk_forward_float, walk_backward_float, walk_load_float,
                       walk_store_float,        walk_draw_float,    ((const kernels_float *)n->kernels)->name};
}
