/* The host path's networks, and where everything lies in their memory, workspace and reserve.
 *
 * REAL is float, or double for handles of float64. HX is H rounded up to a multiple of HOST_UNITS. */
#ifndef TRITLSTM_HOST_ENGINE_H
#define TRITLSTM_HOST_ENGINE_H

#include "aot_engine.h"

/* The weights of one layer and direction, arrays of REAL. */
typedef struct host_place {
    void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;    /* as given, PyTorch's layout; NULL where there are none */
    void *packed_ih, *packed_hh, *packed_hr;   /* for x w_ih^T [D, 4HX], h w_hh^T [R, 4HX], h w_hr^T [H, R] */
    void *bias;                                /* b_ih + b_hh [4HX] */
} host_place;

typedef struct host_network {
    tritlstm_options options;
    uint64_t identity;
    size_t item;                     /* bytes of an element of the caller's arrays */
    size_t real;                     /* bytes of a REAL */
    size_t D, H, HX, R, L, P;        /* as in tritlstm.h */
    size_t per_place;                /* weights a layer and direction */
    const void *kernels;             /* kernels_float or kernels_double */
    host_place *places;              /* [L * P] */
    void *memory;
} host_network;

typedef struct host_state {
    const host_network *network;
    size_t batch;
    void *h; /* [L, B, R] */
    void *c; /* [L, B, HX] */
} host_state;

/* Memory handed out piece by piece. Without a base it only counts; `used` is SIZE_MAX once that overflowed. */
typedef struct host_arena {
    unsigned char *base;
    size_t used;
} host_arena;

/* [a, b, c] elements on a 64-byte boundary of the arena. */
void *host_take(host_arena *arena, size_t a, size_t b, size_t c, size_t item);

/* What forward leaves for backward. */
typedef struct host_reserve {
    void *mark;      /* HOST_MARK_BYTES */
    void *h;         /* [L, T, B, P * R], every layer's output */
    void *gates;     /* [L * P, T, B, 4HX], after activation */
    void *cells;     /* [L * P, T, B, HX] */
} host_reserve;

enum { HOST_MARK_BYTES = 64 };

typedef struct host_forward_scratch {
    size_t steps;    /* whose input products are made at once */
    void *x;         /* [steps, B, D] */
    void *gates;     /* [steps, B, 4HX]; NULL in training, where the reserve has them */
    void *outs[2];   /* [T, B, P * R], the outputs of two layers in turn; NULL in training */
    void *h, *c;     /* [B, R], [B, HX]: the state of the layer and direction at work */
    void *shown;     /* [B, HX]: o * tanh(c) */
    void *projected; /* [B, R] */
} host_forward_scratch;

typedef struct host_backward_scratch {
    void *x;             /* [T, B, D], zero behind the end of a sequence */
    void *grads[2];      /* [T, B, max(P * R, D)]: of a layer's output and input in turn */
    void *grad_gates;    /* [T, B, 4HX] */
    void *h0, *c0;       /* [B, R], [B, HX] */
    void *grad_h;        /* [B, R]: of the h that the step before made, by later steps */
    void *grad_h_next;   /* [B, R] */
    void *grad_c;        /* [B, HX] */
    void *grad_shown;    /* [B, HX]: of o * tanh(c) */
    void *first;         /* [B, 4HX]: grad_gates of the first step of each sequence */
    void *packed_hh;     /* w_hh for grad_gates w_hh: [4HX, R] */
    void *packed_hr;     /* w_hr for grad_h w_hr: [R, H] */
    void *grad_h_all;    /* [T, B, R], only with a projection */
    void *shown_all;     /* [T, B, HX], only with a projection */
    void *grad_weight;   /* the largest weight */
} host_backward_scratch;

void host_reserve_parts(const host_network *n, size_t T, size_t B, host_arena *arena, host_reserve *r);
void host_forward_parts(const host_network *n, size_t T, size_t B, int training, host_arena *arena,
                        host_forward_scratch *s);
void host_backward_parts(const host_network *n, size_t T, size_t B, host_arena *arena, host_backward_scratch *s);

/* ---- host_walk.c: the arithmetic, in float and in double ------------------------------------------------ */

/* What to run forward. Either h0 ... c_n in the caller's dtype, or the state of a stream. */
typedef struct host_run {
    size_t T, B;
    const int32_t *lengths;
    const void *x, *h0, *c0;
    void *out, *h_n, *c_n;
    const host_state *state;
    const host_reserve *reserve; /* NULL: inference */
} host_run;

typedef struct host_walk {
    /* Fills what follows from the weights as given. */
    void (*pack)(const host_network *n);
    void (*forward)(const host_network *n, const host_run *run, const host_forward_scratch *s);
    void (*backward)(const host_network *n, const tritlstm_backward_args *a, const host_reserve *r,
                     const host_backward_scratch *s);
    /* Conversions; a row of `from` or `to` in REAL may be longer than `width`. */
    void (*load)(const host_network *n, int32_t dtype, const void *from, size_t rows, size_t width, void *to,
                 size_t to_row);
    void (*store)(const host_network *n, const void *from, size_t from_row, size_t rows, size_t width, void *to);
    void (*draw)(const host_network *n);
    const char *instructions;
} host_walk;

host_walk host_walk_of(const host_network *n);

/* Of which CBLAS the large products are, for tritlstm_explain. */
extern const char *const host_products;

#endif
