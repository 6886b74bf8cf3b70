/* The inner loops of the host path, in float and double, compiled once for each instruction set.
 *
 * Rows of gates are [4][HX]: the gates i, f, g, o of all units one after another, HX being H rounded up to a multiple
 * of HOST_UNITS, so that no loop over units has a remainder. Weights that a product reads by panels are packed: panel p
 * holds the columns p * width ... of B, [k][width], HOST_PANEL bytes a row, zeros beyond the last column. */
#ifndef TRITLSTM_HOST_KERNELS_H
#define TRITLSTM_HOST_KERNELS_H

#include <stddef.h>

enum { HOST_PANEL = 128 }; /* bytes: two AVX-512, four AVX2, eight SSE or NEON registers */
enum { HOST_UNITS = 16 };  /* the floats of the longest vector */

#define HOST_KERNEL_TYPES(real)                                                                                      \
    /* C[m, n] = A[m, k] B[k, n], or that added to C. A's element (i, j) is a[i * a_row + j * a_col]. */             \
    typedef struct product_##real {                                                                                  \
        size_t m, n, k;                                                                                              \
        const real *a;                                                                                               \
        size_t a_row, a_col;                                                                                         \
        const real *b;                                                                                               \
        size_t b_row; /* elements from a row of B to the next; 0: B is packed */                                     \
        real *c;                                                                                                     \
        size_t c_row;                                                                                                \
        int add;                                                                                                     \
    } product_##real;                                                                                                \
    typedef struct kernels_##real {                                                                                  \
        const char *name;                                                                                            \
        void (*product)(const product_##real *p);                                                                    \
        /* One sequence, one step: gates [4][units] before activation, replaced by what they are after it; c [units] \
         * replaced by the new cell; h [units] written. */                                                           \
        void (*cell)(size_t units, real *gates, real *c, real *h);                                                   \
        /* The way back: grad_c [units] of this step's cell in, of the previous one's out; grad_gates [4][units] of   \
         * the gates before activation written. c and c_before are the cells after and before the step. */           \
        void (*cell_backward)(size_t units, const real *gates, const real *c, const real *c_before,                  \
                              const real *grad_h, real *grad_c, real *grad_gates);                                   \
        /* h [units] = o * tanh(c), as `cell` computes it. */                                                        \
        void (*show)(size_t units, const real *gates, const real *c, real *h);                                       \
    } kernels_##real;

HOST_KERNEL_TYPES(float)
HOST_KERNEL_TYPES(double)

/* The fastest that this processor runs. */
const kernels_float *host_kernels_float(void);
const kernels_double *host_kernels_double(void);

#endif
