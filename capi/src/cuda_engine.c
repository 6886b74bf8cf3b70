/* Handles on a CUDA device: what tritlstm/functional.py and tritlstm/layer.py do, as launches on the caller's stream.
 *
 * Inside, a layer has the next larger hidden size that kernels are built for, and every width is a multiple of 8; what lies
 * beyond the caller's sizes is zero and stays zero. Cell states are fp32 here. Names: H that built size, W the width of h as
 * the layer passes it on (H, or proj_size rounded up), rows = T * B, "packed" rows of 4H: the gates of a unit side by side.
 *
 * SPDX-License-Identifier: MIT */
#include "cuda_engine.h"
#include "cuda_driver.h"
#include "host_numbers.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { W_IH, W_HH, B_IH, B_HH, W_HR, KINDS };
enum { PART = 256, EIGHT = 8, REPORT_WORDS = 4, COUNTER_WORDS = 32, PART_BYTES = 8 };

/* The weights of one layer and direction on the device. */
typedef struct place {
    cuda_pointer given[KINDS]; /* as the caller knows them, dense; 0: there is none */
    cuda_pointer w_ih;         /* [4H packed, width of the input] */
    cuda_pointer w_hh;         /* [4H gate by gate, H]; with a projection w_hh w_hr */
    cuda_pointer w_hh_rows;    /* [4H packed, W] */
    cuda_pointer w_hr;         /* [W, H]; 0 without a projection */
    cuda_pointer bias;         /* [4H packed] fp32, b_ih + b_hh */
} place;

typedef struct network {
    tritlstm_options o;
    cuda_device *device;
    size_t item;
    int64_t D, H, W, P, R; /* D: input_size rounded up; R: the caller's width of h */
    place *places;         /* [num_layers * P] */
    cuda_pointer memory;
    cuda_pointer folded; /* [4H, H], for packing with a projection */
    int32_t *report;     /* the kernels' record of a time-out: code, block, group, step */
    cuda_pointer report_on_device;
    const tritlstm_cuda_kernel *plain[KERNELS][VARIANTS];
    tritlstm_cuda_family family; /* the device's, narrowed to the recurrent kernels of this size and dtype */
    tritlstm_cuda_limits limits;
} network;

typedef struct state {
    const network *n;
    int64_t B;
    cuda_pointer memory;
    size_t bytes;      /* of h and c */
    cuda_pointer h;    /* [L, B, W] */
    cuda_pointer c;    /* [L, B, H] fp32 */
    cuda_pointer ones; /* [B] int32 */
    cuda_pointer h_dense, c_dense; /* [L, B, R], [L, B, hidden_size], on their way to and from ordinary memory */
} state;

static const network *network_of(uint64_t id) { return (const network *)(uintptr_t)id; }
static state *state_of(uint64_t id) { return (state *)(uintptr_t)id; }
static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Width of the input of a layer, as it lies in memory here, and as the caller knows it. */
static int64_t input_width(const network *n, int64_t layer) { return layer ? n->P * n->W : n->D; }
static int64_t given_width(const network *n, int64_t layer) { return layer ? n->P * n->R : n->o.input_size; }

/* Rows and columns of a weight; 0 rows: there is none. */
static void weight_extents(const network *n, int64_t layer, int kind, int64_t *rows, int64_t *columns)
{
    const tritlstm_options *o = &n->o;
    *rows = kind == W_HR ? o->proj_size : (kind == B_IH || kind == B_HH) && !o->bias ? 0 : 4 * o->hidden_size;
    *columns = kind == W_IH ? given_width(n, layer) : kind == W_HH ? n->R : kind == W_HR ? o->hidden_size : 1;
}

/* ---- launches: after a failure nothing more is launched -------------------------------------------------- */

typedef struct job {
    const network *n;
    cuda_stream stream;
    int status;
} job;

static cuda_arguments *give(cuda_arguments *a, int name, uint64_t value)
{
    a->value[name] = value;
    a->given[name] = 1;
    return a;
}

/* As an int32; sizes and strides beyond are refused. */
static void give_size(job *j, cuda_arguments *a, int name, int64_t value)
{
    if (!j->status && (value < 0 || value > INT32_MAX))
        j->status = tritlstm_aot_fail(TRITLSTM_ERROR_OVERFLOW,
                                      "a size or stride of %" PRId64 " elements is too large for a kernel: it must be below "
                                      "2^31", value);
    give(a, name, (uint64_t)value);
}

static void launch(job *j, const tritlstm_cuda_kernel *kernel, int64_t x, int64_t y, const cuda_arguments *a)
{
    if (!j->status && x > INT32_MAX)
        j->status = tritlstm_aot_fail(TRITLSTM_ERROR_OVERFLOW, "a grid of %" PRId64 " blocks is too large", x);
    if (!j->status) j->status = cuda_launch(j->n->device, kernel, x, y, a, j->stream);
}

static void fill(job *j, cuda_pointer to, uint32_t word, size_t bytes)
{
    if (!j->status && bytes) j->status = cuda_fill(to, word, bytes / 4, j->stream);
}

/* A [rows, columns] matrix whose rows lie `stride` elements apart. */
typedef struct matrix {
    cuda_pointer at;
    int64_t rows, columns, stride;
} matrix;

static matrix dense(cuda_pointer at, int64_t rows, int64_t columns) { return (matrix){at, rows, columns, columns}; }

/* c = op(a) op(b) + bias, or added to c. bias: 0, or fp32. */
static void multiply(job *j, int order, matrix a, matrix b, cuda_pointer bias, matrix c, int accumulate)
{
    const tritlstm_cuda_kernel *small = j->n->plain[KERNEL_product][order];
    const tritlstm_cuda_kernel *large = j->n->plain[KERNEL_product][order + PRODUCT_LARGE], *kernel = small;
    cuda_arguments g = {0};
    int64_t K = order == PRODUCT_TN ? a.rows : a.columns;
    if (large && divide_up(c.rows, large->rows) * divide_up(c.columns, large->columns) >= j->n->device->limits.sms)
        kernel = large;
    give(&g, PARAMETER_a_ptr, a.at);
    give(&g, PARAMETER_b_ptr, b.at);
    give(&g, PARAMETER_bias_ptr, bias ? bias : c.at);
    give(&g, PARAMETER_c_ptr, c.at);
    give_size(j, &g, PARAMETER_M, c.rows);
    give_size(j, &g, PARAMETER_N, c.columns);
    give_size(j, &g, PARAMETER_K, K);
    give_size(j, &g, PARAMETER_a_stride, a.stride);
    give_size(j, &g, PARAMETER_b_stride, b.stride);
    give_size(j, &g, PARAMETER_c_stride, c.stride);
    give(&g, PARAMETER_biased, bias != 0);
    give(&g, PARAMETER_accumulate, accumulate != 0);
    launch(j, kernel, divide_up(c.rows, kernel->rows) * divide_up(c.columns, kernel->columns), 1, &g);
}

/* [n[0], n[1], n[2]] elements with strides in elements, the last one 1. */
typedef struct block {
    cuda_pointer at;
    int64_t stride0, stride1;
} block;

static void rearrange(job *j, int variant, block from, block to, const int64_t n[3], const int64_t valid[3],
                      int accumulate)
{
    if (j->n->item == 4) variant = REARRANGE_SAME; /* everything is fp32 */
    const tritlstm_cuda_kernel *kernel = j->n->plain[KERNEL_rearrange][variant];
    cuda_arguments g = {0};
    give(&g, PARAMETER_source_ptr, from.at);
    give(&g, PARAMETER_target_ptr, to.at);
    for (int k = 0; k < 3; k++) {
        give_size(j, &g, PARAMETER_n0 + k, n[k]);
        give_size(j, &g, PARAMETER_valid0 + k, valid[k]);
    }
    give_size(j, &g, PARAMETER_source_stride0, from.stride0);
    give_size(j, &g, PARAMETER_source_stride1, from.stride1);
    give_size(j, &g, PARAMETER_target_stride0, to.stride0);
    give_size(j, &g, PARAMETER_target_stride1, to.stride1);
    give(&g, PARAMETER_accumulate, accumulate != 0);
    launch(j, kernel, divide_up(n[0] * n[1], kernel->rows), divide_up(n[2], kernel->columns), &g);
}

/* [rows, width] between dense rows of two widths, zero beyond the narrower. */
static void resize(job *j, int variant, cuda_pointer from, int64_t from_width, cuda_pointer to, int64_t to_width,
                   int64_t rows)
{
    int64_t n[3] = {1, rows, to_width}, valid[3] = {1, rows, least(from_width, to_width)};
    rearrange(j, variant, (block){from, 0, from_width}, (block){to, 0, to_width}, n, valid, 0);
}

/* One of the kernels over the rows of sequences. */
static void by_rows(job *j, int kind, cuda_arguments *g, int64_t rows, int64_t width)
{
    const tritlstm_cuda_kernel *kernel = j->n->plain[kind][0];
    give_size(j, g, PARAMETER_W, width);
    launch(j, kernel, divide_up(rows, kernel->rows), divide_up(width, kernel->columns), g);
}

/* ---- weights ----------------------------------------------------------------------------------------- */

static void pack(job *j, int64_t index)
{
    const network *n = j->n;
    const place *p = &n->places[index];
    int64_t h = n->o.hidden_size, H = n->H, W = n->W, layer = index / n->P;
    int64_t width = input_width(n, layer), given = given_width(n, layer), parts = layer ? n->P : 1;
    for (int64_t q = 0; q < parts; q++) {
        int64_t from = given / parts, to = width / parts, extents[3] = {H, 4, to}, valid[3] = {h, 4, from};
        rearrange(j, REARRANGE_SAME, (block){p->given[W_IH] + (size_t)(q * from) * n->item, given, h * given},
                  (block){p->w_ih + (size_t)(q * to) * n->item, 4 * width, width}, extents, valid, 0);
    }
    int64_t rows[3] = {H, 4, W}, rows_valid[3] = {h, 4, n->R};
    rearrange(j, REARRANGE_SAME, (block){p->given[W_HH], n->R, h * n->R}, (block){p->w_hh_rows, 4 * W, W}, rows,
              rows_valid, 0);
    int64_t gates[3] = {4, H, H}, gates_valid[3] = {4, h, h};
    if (n->o.proj_size) {
        int64_t hr[3] = {1, W, H}, hr_valid[3] = {1, n->R, h};
        rearrange(j, REARRANGE_SAME, (block){p->given[W_HR], 0, h}, (block){p->w_hr, 0, H}, hr, hr_valid, 0);
        multiply(j, PRODUCT_NN, dense(p->w_hh_rows, 4 * H, W), dense(p->w_hr, W, H), 0, dense(n->folded, 4 * H, H), 0);
        rearrange(j, REARRANGE_SAME, (block){n->folded, H, 4 * H}, (block){p->w_hh, H * H, H}, gates, gates, 0);
    } else {
        rearrange(j, REARRANGE_SAME, (block){p->given[W_HH], h * h, h}, (block){p->w_hh, H * H, H}, gates, gates_valid, 0);
    }
    int64_t biases[3] = {H, 4, 1}, biases_valid[3] = {h, 4, 1};
    if (!n->o.bias) fill(j, p->bias, 0, (size_t)(4 * H) * 4);
    for (int kind = B_IH; n->o.bias && kind <= B_HH; kind++)
        rearrange(j, REARRANGE_TO_FP32, (block){p->given[kind], 1, h}, (block){p->bias, 4, 1}, biases, biases_valid,
                  kind == B_HH);
}

static void pack_all(job *j)
{
    for (int64_t k = 0; k < j->n->o.num_layers * j->n->P; k++) pack(j, k);
}

/* Calls `each` for every weight in the order of tritlstm_weight_info. */
typedef int each_weight(const network *n, int64_t index, cuda_pointer weight, size_t elements, void *context);

static int for_weights(const network *n, each_weight *each, void *context)
{
    int64_t index = 0;
    for (int64_t k = 0; k < n->o.num_layers * n->P; k++)
        for (int kind = 0; kind < KINDS; kind++) {
            int64_t rows, columns;
            weight_extents(n, k / n->P, kind, &rows, &columns);
            if (!rows) continue;
            int status = each(n, index++, n->places[k].given[kind], (size_t)(rows * columns), context);
            if (status) return status;
        }
    return TRITLSTM_OK;
}

typedef struct initial {
    const void *const *weights;
    const int32_t *dtypes;
    host_random random;
} initial;

static int initial_weight(const network *n, int64_t index, cuda_pointer weight, size_t elements, void *context)
{
    initial *from = context;
    const tritlstm_options *o = &n->o;
    const void *source = from->weights ? from->weights[index] : NULL;
    if (source && (!from->dtypes || from->dtypes[index] == o->dtype))
        return cuda_copy_in(weight, source, elements * n->item, NULL);
    float *numbers = calloc(elements, 2 * sizeof *numbers), *stored = numbers + elements;
    if (!numbers)
        return tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "out of memory for a weight of %zu elements", elements);
    if (source) host_load_float(from->dtypes[index], source, elements, numbers);
    else if (o->initial_weights == TRITLSTM_WEIGHTS_UNIFORM)
        host_random_uniform_float(&from->random, o->dtype, 1 / __builtin_sqrt((double)o->hidden_size), elements, numbers);
    host_store_float(o->dtype, numbers, elements, stored);
    int status = cuda_copy_in(weight, stored, elements * n->item, NULL);
    if (!status) status = cuda_wait(NULL);
    free(numbers);
    return status;
}

typedef struct weight_copy {
    void *const *out;
    const void *const *in;
    int32_t device;
    cuda_stream stream;
} weight_copy;

static int copy_weight(const network *n, int64_t index, cuda_pointer weight, size_t elements, void *context)
{
    const weight_copy *c = context;
    size_t bytes = elements * n->item;
    void *to = c->out ? c->out[index] : NULL;
    const void *from = c->in ? c->in[index] : NULL;
    if (to)
        return c->device == TRITLSTM_CUDA ? cuda_copy((uintptr_t)to, weight, bytes, c->stream)
                                          : cuda_copy_out(to, weight, bytes, c->stream);
    if (from)
        return c->device == TRITLSTM_CUDA ? cuda_copy(weight, (uintptr_t)from, bytes, c->stream)
                                          : cuda_copy_in(weight, from, bytes, c->stream);
    return TRITLSTM_OK;
}

/* ---- memory that is handed out part by part -------------------------------------------------------------- */

typedef struct arena {
    cuda_pointer base;
    size_t used;
    int overflow;
} arena;

static cuda_pointer part(arena *a, int64_t x, int64_t y, int64_t z, size_t item)
{
    size_t bytes = item, end;
    a->overflow |= __builtin_mul_overflow(bytes, (size_t)x, &bytes) || __builtin_mul_overflow(bytes, (size_t)y, &bytes) ||
                   __builtin_mul_overflow(bytes, (size_t)z, &bytes) || bytes > PTRDIFF_MAX - 2 * PART ||
                   __builtin_add_overflow(a->used, (bytes + PART - 1) / PART * PART, &end) || end > PTRDIFF_MAX;
    if (a->overflow) return 0;
    cuda_pointer at = a->base + a->used;
    a->used = end;
    return at;
}

/* ---- create ------------------------------------------------------------------------------------------ */

static void lay_out_weights(network *n, arena *a)
{
    for (int64_t k = 0; k < n->o.num_layers * n->P; k++) {
        place *p = &n->places[k];
        int64_t layer = k / n->P;
        for (int kind = 0; kind < KINDS; kind++) {
            int64_t rows, columns;
            weight_extents(n, layer, kind, &rows, &columns);
            p->given[kind] = rows ? part(a, rows, columns, 1, n->item) : 0;
        }
        p->w_ih = part(a, 4 * n->H, input_width(n, layer), 1, n->item);
        p->w_hh = part(a, 4 * n->H, n->H, 1, n->item);
        p->w_hh_rows = part(a, 4 * n->H, n->W, 1, n->item);
        p->w_hr = n->o.proj_size ? part(a, n->W, n->H, 1, n->item) : 0;
        p->bias = part(a, 4 * n->H, 1, 1, 4);
    }
    n->folded = n->o.proj_size ? part(a, 4 * n->H, n->H, 1, n->item) : 0;
}

static int unsupported_size(const network *n)
{
    const tritlstm_cuda_family *family = n->device->limits.family;
    int most = 0;
    for (int size = tritlstm_cuda_hidden(family, n->o.dtype, 1); size;
         size = tritlstm_cuda_hidden(family, n->o.dtype, size + 1))
        most = size;
    if (!most)
        return tritlstm_aot_fail(TRITLSTM_ERROR_UNSUPPORTED, "dtype is %d, for which this library has no kernels%s",
                                 (int)n->o.dtype, n->o.dtype == TRITLSTM_FLOAT64 ? " on CUDA devices: use "
                                                                                   "libtritlstm_python" : "");
    return tritlstm_aot_fail(TRITLSTM_ERROR_UNSUPPORTED,
                             "hidden_size is %" PRId64 ", but this library has kernels up to %d: use libtritlstm_python, or "
                             "build this one with --images H%" PRId64, n->o.hidden_size, most, round_up(n->o.hidden_size, 8));
}

/* Loads whatever a call may launch, so that calls can be captured into a graph. */
static int load_kernels(network *n)
{
    const tritlstm_cuda_limits *limits = &n->device->limits;
    int status = TRITLSTM_OK;
    unsigned fits = 0;
    n->family = *limits->family;
    n->family.count = 0;
    n->limits = *limits;
    n->limits.family = &n->family;
    for (int k = limits->family->first; !status && k < limits->family->first + limits->family->count; k++) {
        const tritlstm_cuda_kernel *kernel = &tritlstm_kernels[k];
        if (kernel->dtype && kernel->dtype != n->o.dtype) continue;
        if (kernel->hidden && kernel->hidden != n->H) continue;
        if (kernel->hidden) { /* they follow each other in the table */
            if (!n->family.count) n->family.first = k;
            n->family.count = k + 1 - n->family.first;
        }
        if (!tritlstm_cuda_fits(kernel, limits)) continue;
        if (!kernel->hidden) n->plain[kernel->kind][kernel->variant] = kernel;
        else fits |= 1u << (kernel->kind * 2 + kernel->variant);
        status = cuda_load(n->device, kernel);
    }
    unsigned wanted = 1u << (KERNEL_recurrent_forward * 2) | 1u << (KERNEL_recurrent_forward * 2 + 1) |
                      1u << (KERNEL_recurrent_backward * 2 + 1);
    if (!status && (fits & wanted) != wanted)
        status = tritlstm_aot_fail(TRITLSTM_ERROR_UNSUPPORTED,
                                   "no kernel for hidden_size %" PRId64 " fits %s (%d multiprocessors, %" PRId64
                                   " bytes of shared memory a block)", n->o.hidden_size, n->device->name, limits->sms,
                                   limits->shared);
    return status;
}

static int engine_destroy(uint64_t id)
{
    network *n = (network *)(uintptr_t)id;
    if (n->device) {
        if (cuda_enter(n->device) == TRITLSTM_OK) {
            if (n->memory) cuda_free(n->memory);
            if (n->report) cuda_free_host(n->report);
            cuda_leave(n->device, TRITLSTM_OK);
        }
        cuda_device_close(n->device);
    }
    free(n->places);
    free(n);
    return TRITLSTM_OK;
}

static int fill_network(network *n, const void *const *weights, const int32_t *dtypes)
{
    arena a = {0, 0, 0};
    initial from = {weights, dtypes, {{0}, 0}};
    job j = {n, NULL, TRITLSTM_OK};
    int status = load_kernels(n);
    if (status) return status;
    lay_out_weights(n, &a);
    if (a.overflow) return tritlstm_aot_fail(TRITLSTM_ERROR_OVERFLOW, "the weights are too large");
    if ((status = cuda_allocate(a.used, &n->memory)) ||
        (status = cuda_allocate_host(REPORT_WORDS * sizeof *n->report, (void **)&n->report, &n->report_on_device)))
        return status;
    lay_out_weights(n, &(arena){n->memory, 0, 0});
    host_random_seed(&from.random, n->o.seed);
    if ((status = for_weights(n, initial_weight, &from))) return status;
    pack_all(&j);
    return j.status ? j.status : cuda_wait(NULL);
}

static int engine_create(const tritlstm_options *options, const void *const *weights, const int32_t *dtypes, uint64_t *id)
{
    network *n = calloc(1, sizeof *n);
    if (!n) return tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    n->o = *options;
    n->P = options->bidirectional ? 2 : 1;
    n->R = options->proj_size ? options->proj_size : options->hidden_size;
    n->item = options->dtype == TRITLSTM_FLOAT32 ? 4 : 2;
    n->places = calloc((size_t)(options->num_layers * n->P), sizeof *n->places);
    int status = n->places ? cuda_device_open(options->device_index, &n->device)
                           : tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    if (!status) {
        n->H = tritlstm_cuda_hidden(n->device->limits.family, options->dtype, options->hidden_size);
        n->W = options->proj_size ? round_up(options->proj_size, EIGHT) : n->H;
        n->D = round_up(options->input_size, EIGHT);
        status = n->H ? cuda_enter(n->device) : unsupported_size(n);
        if (!status) status = cuda_leave(n->device, fill_network(n, weights, dtypes));
    }
    if (status) engine_destroy((uint64_t)(uintptr_t)n);
    else *id = (uint64_t)(uintptr_t)n;
    return status;
}

static int engine_get_weights(uint64_t id, void *const *weights, int32_t device, void *stream)
{
    const network *n = network_of(id);
    weight_copy c = {weights, NULL, device, stream};
    int status = cuda_enter(n->device);
    if (status) return status;
    status = for_weights(n, copy_weight, &c);
    if (!status && device == TRITLSTM_CPU) status = cuda_wait(stream);
    return cuda_leave(n->device, status);
}

static int engine_set_weights(uint64_t id, const void *const *weights, int32_t device, void *stream)
{
    const network *n = network_of(id);
    weight_copy c = {NULL, weights, device, stream};
    job j = {n, stream, cuda_enter(n->device)};
    if (j.status) return j.status;
    j.status = for_weights(n, copy_weight, &c);
    pack_all(&j);
    if (!j.status && device == TRITLSTM_CPU) j.status = cuda_wait(stream);
    return cuda_leave(n->device, j.status);
}

/* ---- where everything lies in workspace and reserve ------------------------------------------------------ */

/* What forward leaves for backward; [L * P] parts are equally far apart. */
typedef struct reserve {
    cuda_pointer gates; /* [L * P, rows, 4H] activated */
    cuda_pointer cells; /* [L * P, rows, H] fp32 */
    cuda_pointer h;     /* [L * P, rows, H]: of the layer without its projection */
    cuda_pointer h_n;   /* [L * P, B, H], only with a projection */
    cuda_pointer outs;  /* [L, rows, P * W]; 0 where that is h */
} reserve;

typedef struct scratch {
    cuda_pointer lengths;    /* [B] int32 */
    cuda_pointer counter;    /* [tiles, COUNTER_WORDS] int32 */
    cuda_pointer x;          /* [rows, D] */
    cuda_pointer h0, h_n;    /* [B, W], [B, H] */
    cuda_pointer c0, c_n;    /* [B, H] fp32 */
    cuda_pointer zeros;      /* [B, H] */
    cuda_pointer gate0;      /* [B, 4H]: forward with a projection; of the first step in backward */
    cuda_pointer projected;  /* [B, W] */
    /* forward for inference */
    cuda_pointer gates;      /* [rows, 4H] */
    cuda_pointer h;          /* [rows, H]; 0 where outs are it */
    cuda_pointer outs[2];    /* [rows, P * W], of two layers in turn */
    /* backward */
    cuda_pointer grads[2];   /* [rows, the wider of P * W and D], of two layers in turn */
    cuda_pointer grad_m;     /* [rows, H], only with a projection */
    cuda_pointer grad_gates; /* [rows, 4H] */
    cuda_pointer parts;      /* partial sums that the blocks of a team hand each other, PART_BYTES each */
    size_t parts_bytes;      /* 0: there are no teams */
    cuda_pointer previous;   /* [rows, H] */
    cuda_pointer sums;       /* [4H] fp32 */
    cuda_pointer grad_w;     /* [4H, the widest input] */
    cuda_pointer grad_w_hh;  /* [4H, W], only with a projection */
    cuda_pointer grad_w_hr;  /* [W, H], only with a projection */
    cuda_pointer grad_h_n;   /* [B, W] */
    cuda_pointer grad_m_n;   /* [B, H], only with a projection */
    cuda_pointer grad_h0;    /* [B, W] */
} scratch;

static const tritlstm_cuda_kernel *choose(const network *n, int kind, int save, int64_t T, int64_t B)
{
    return tritlstm_cuda_choose(&n->limits, kind, n->o.dtype, save, (int)n->H, B, T == 1);
}

/* Whether what a layer passes on is not what its one direction's recurrence writes. */
static int separate_outs(const network *n) { return n->P > 1 || n->o.proj_size; }

static void lay_out_reserve(const network *n, int64_t T, int64_t B, arena *a, reserve *r)
{
    int64_t places = n->o.num_layers * n->P, rows = T * B;
    r->gates = part(a, places, rows, 4 * n->H, n->item);
    r->cells = part(a, places, rows, n->H, 4);
    r->h = part(a, places, rows, n->H, n->item);
    r->h_n = n->o.proj_size ? part(a, places, B, n->H, n->item) : 0;
    r->outs = separate_outs(n) ? part(a, n->o.num_layers, rows, n->P * n->W, n->item) : 0;
}

static void lay_out_common(const network *n, int64_t T, int64_t B, arena *a, scratch *s)
{
    s->lengths = part(a, B, 1, 1, 4);
    s->counter = part(a, B, COUNTER_WORDS, 1, 4);
    s->x = part(a, T * B, n->D, 1, n->item);
    s->h0 = part(a, B, n->W, 1, n->item);
    s->h_n = part(a, B, n->H, 1, n->item);
    s->c0 = part(a, B, n->H, 1, 4);
    s->c_n = part(a, B, n->H, 1, 4);
    s->zeros = part(a, B, n->H, 1, n->item);
    s->gate0 = part(a, B, 4 * n->H, 1, n->item);
    s->projected = n->o.proj_size ? part(a, B, n->W, 1, n->item) : 0;
}

static void lay_out_forward(const network *n, int64_t T, int64_t B, int training, arena *a, scratch *s)
{
    int64_t rows = T * B;
    lay_out_common(n, T, B, a, s);
    if (training) return;
    s->gates = part(a, rows, 4 * n->H, 1, n->item);
    s->h = separate_outs(n) ? part(a, rows, n->H, 1, n->item) : 0;
    for (int k = 0; k < 2 && k < n->o.num_layers; k++) s->outs[k] = part(a, rows, n->P * n->W, 1, n->item);
}

static void lay_out_backward(const network *n, int64_t T, int64_t B, arena *a, scratch *s)
{
    int64_t rows = T * B, widest = n->P * n->W > n->D ? n->P * n->W : n->D;
    int proj = n->o.proj_size != 0;
    lay_out_common(n, T, B, a, s);
    for (int k = 0; k < 2; k++) s->grads[k] = part(a, rows, widest, 1, n->item);
    s->grad_m = proj ? part(a, rows, n->H, 1, n->item) : 0;
    s->grad_gates = part(a, rows, 4 * n->H, 1, n->item);
    const tritlstm_cuda_kernel *k = choose(n, KERNEL_recurrent_backward, 1, T, B);
    int64_t tiles = tritlstm_cuda_groups(k, n->limits.sms, B) * tritlstm_tagged_slots * k->n_blocks * k->parts;
    cuda_pointer end = a->base + a->used;
    s->parts = k->parts > 1 ? part(a, tiles, k->rows, k->columns, PART_BYTES) : end;
    s->parts_bytes = (size_t)(a->base + a->used - end);
    s->previous = part(a, rows, n->H, 1, n->item);
    s->sums = part(a, 4 * n->H, 1, 1, 4);
    s->grad_w = part(a, 4 * n->H, widest > n->H ? widest : n->H, 1, n->item);
    s->grad_w_hh = proj ? part(a, 4 * n->H, n->W, 1, n->item) : 0;
    s->grad_w_hr = proj ? part(a, n->W, n->H, 1, n->item) : 0;
    s->grad_h_n = part(a, B, n->W, 1, n->item);
    s->grad_m_n = proj ? part(a, B, n->H, 1, n->item) : 0;
    s->grad_h0 = part(a, B, n->W, 1, n->item);
}

static int too_large(int64_t T, int64_t B)
{
    return tritlstm_aot_fail(TRITLSTM_ERROR_OVERFLOW,
                             "%" PRId64 " steps x %" PRId64 " batch are too large: their product must be below 2^31, and what "
                             "they need must fit the address space", T, B);
}

static int engine_sizes(uint64_t id, int64_t T, int64_t B, int32_t training, size_t *workspace, size_t *reserve_bytes)
{
    const network *n = network_of(id);
    arena forward = {0, 0, 0}, backward = {0, 0, 0}, kept = {0, 0, 0};
    scratch s;
    reserve r;
    int64_t rows;
    if (__builtin_mul_overflow(T, B, &rows) || rows > INT32_MAX) return too_large(T, B);
    lay_out_forward(n, T, B, training, &forward, &s);
    if (training) {
        lay_out_backward(n, T, B, &backward, &s);
        lay_out_reserve(n, T, B, &kept, &r);
    }
    if (forward.overflow || backward.overflow || kept.overflow) return too_large(T, B);
    *workspace = forward.used > backward.used ? forward.used : backward.used;
    *reserve_bytes = kept.used;
    return TRITLSTM_OK;
}

static int check_room(const network *n, int64_t T, int64_t B, int training, size_t workspace_bytes, size_t reserve_bytes)
{
    size_t workspace, kept;
    int status = engine_sizes((uint64_t)(uintptr_t)n, T, B, training, &workspace, &kept);
    if (status) return status;
    if (workspace_bytes < workspace)
        return tritlstm_aot_fail(TRITLSTM_ERROR_BUFFER, "workspace_bytes is %zu, but %zu are needed: ask tritlstm_sizes",
                                 workspace_bytes, workspace);
    if (reserve_bytes < kept)
        return tritlstm_aot_fail(TRITLSTM_ERROR_BUFFER, "reserve_bytes is %zu, but %zu are needed: ask tritlstm_sizes",
                                 reserve_bytes, kept);
    return TRITLSTM_OK;
}

/* What a kernel that gave up waiting has reported, once. */
static int check_report(const network *n)
{
    if (!__atomic_exchange_n(&n->report[0], 0, __ATOMIC_ACQ_REL)) return TRITLSTM_OK;
    return tritlstm_aot_fail(TRITLSTM_ERROR_DEVICE,
                             "an LSTM kernel gave up waiting at step %d (block %d of group %d) in this call or an earlier one: "
                             "another thread block of the same launch did not deliver its part, and the results of that launch "
                             "are NaN. A debugger or a preempted device can cause this; run it again",
                             (int)n->report[3], (int)n->report[1], (int)n->report[2]);
}

/* ---- the walk over layers and directions ----------------------------------------------------------------- */

/* One call. */
typedef struct call {
    job j;
    int64_t T, B, rows;
    int training;
    scratch s;
    reserve r;
    cuda_pointer x; /* [rows, D] */
} call;

static cuda_pointer nth(cuda_pointer base, int64_t index, int64_t x, int64_t y, size_t item)
{
    return base + (size_t)index * (size_t)x * (size_t)y * item;
}

/* An array of the caller's, [T, B, width], or [B, T, width] with batch_first: from column `column` on. */
static block time_major(const call *c, const void *at, int64_t width, int64_t column)
{
    cuda_pointer p = (uintptr_t)at + (size_t)column * c->j.n->item;
    return c->j.n->o.batch_first ? (block){p, width, c->T * width} : (block){p, c->B * width, width};
}

/* Whether the kernels can use a caller's array as it is. */
static int usable(const call *c, const void *at, int64_t width, int64_t padded)
{
    return width == padded && (!c->j.n->o.batch_first || c->B == 1 || c->T == 1) && (uintptr_t)at % TRITLSTM_ALIGNMENT == 0;
}

static void take_lengths(call *c, const int32_t *lengths)
{
    cuda_arguments g = {0};
    const tritlstm_cuda_kernel *kernel = c->j.n->plain[KERNEL_clamp_lengths][0];
    if (!lengths) {
        fill(&c->j, c->s.lengths, (uint32_t)c->T, (size_t)c->B * 4);
        return;
    }
    give(&g, PARAMETER_lengths_ptr, (uintptr_t)lengths);
    give(&g, PARAMETER_target_ptr, c->s.lengths);
    give_size(&c->j, &g, PARAMETER_T, c->T);
    give_size(&c->j, &g, PARAMETER_B, c->B);
    launch(&c->j, kernel, divide_up(c->B, kernel->rows), 1, &g);
}

/* Zeros what lies in [rows, width] beyond the sequences' ends: it may be NaN, which a product with zero is too. */
static void zero_ends(call *c, cuda_pointer at, int64_t width)
{
    cuda_arguments g = {0};
    give(&g, PARAMETER_lengths_ptr, c->s.lengths);
    give(&g, PARAMETER_target_ptr, at);
    give_size(&c->j, &g, PARAMETER_T, c->T);
    give_size(&c->j, &g, PARAMETER_B, c->B);
    by_rows(&c->j, KERNEL_zero_ends, &g, c->rows, width);
}

static void take_x(call *c, const void *x, int clean)
{
    const network *n = c->j.n;
    int64_t extents[3] = {c->T, c->B, n->D}, valid[3] = {c->T, c->B, n->o.input_size};
    c->x = (uintptr_t)x;
    if (!clean && usable(c, x, n->o.input_size, n->D)) return;
    c->x = c->s.x;
    rearrange(&c->j, REARRANGE_SAME, time_major(c, x, n->o.input_size, 0), (block){c->x, c->B * n->D, n->D}, extents, valid, 0);
    if (clean) zero_ends(c, c->x, n->D);
}

/* Row `index` of a state [L * P, B, width], which may be NULL, in rows of `padded`. */
static void take_state(call *c, int variant, const void *from, int64_t index, int64_t width, cuda_pointer to,
                       int64_t padded)
{
    size_t item = variant == REARRANGE_TO_FP32 ? 4 : c->j.n->item;
    if (!from) fill(&c->j, to, 0, (size_t)(c->B * padded) * item);
    else resize(&c->j, variant, nth((uintptr_t)from, index, c->B, width, c->j.n->item), width, to, padded, c->B);
}

static void put_state(call *c, int variant, cuda_pointer from, int64_t padded, void *to, int64_t index, int64_t width)
{
    if (to) resize(&c->j, variant, from, padded, nth((uintptr_t)to, index, c->B, width, c->j.n->item), width, c->B);
}

/* Launches a recurrence, all its steps. `exchanged`: the buffer through which its blocks hand results on. */
static void recur(call *c, int kind, int save, cuda_arguments *g, cuda_pointer exchanged, int64_t width, int reverse)
{
    job *j = &c->j;
    const network *n = j->n;
    const tritlstm_cuda_kernel *kernel = choose(n, kind, save, c->T, c->B);
    int sms = n->device->limits.sms, counts = kernel->protocol == PROTOCOL_counter;
    int64_t tiles = tritlstm_cuda_tiles(kernel, sms, c->B), groups = tritlstm_cuda_groups(kernel, sms, c->B);
    if (kernel->protocol == PROTOCOL_flag) fill(j, exchanged, UINT32_MAX, (size_t)(c->rows * width) * n->item);
    if (kernel->protocol != PROTOCOL_none) fill(j, c->s.counter, 0, (size_t)(counts ? tiles : 1) * COUNTER_WORDS * 4);
    if (kernel->parts > 1) fill(j, c->s.parts, 0, c->s.parts_bytes);
    give(g, PARAMETER_parts_ptr, c->s.parts);
    give(g, PARAMETER_counter_ptr, c->s.counter);
    give(g, PARAMETER_status_ptr, n->report_on_device);
    give(g, PARAMETER_lengths_ptr, c->s.lengths);
    give_size(j, g, PARAMETER_T, c->T);
    give_size(j, g, PARAMETER_B, c->B);
    give(g, PARAMETER_reverse, (uint64_t)reverse);
    give_size(j, g, PARAMETER_n_tiles, tiles);
    give_size(j, g, PARAMETER_tile_rows, tritlstm_cuda_tile_rows(kernel, sms, c->B));
    give(g, PARAMETER_spin_limit, (uint64_t)tritlstm_spin_limit);
    int64_t each = kernel->tier == TIER_step ? 1 : c->T;
    for (int64_t step = 0; step < c->T && !j->status; step += each) {
        give_size(j, g, PARAMETER_step_begin, step);
        give_size(j, g, PARAMETER_step_end, step + each);
        launch(j, kernel, kernel->n_blocks, groups, g);
    }
}

/* One layer in one direction: states [B, W] and [B, H] in, h [rows, H] and the final states [B, H] out. */
typedef struct pass {
    int64_t index; /* layer * P + direction */
    int reverse;
    matrix input;
    cuda_pointer gates, cells, h; /* [rows, ...] */
    cuda_pointer h0, c0, h_n, c_n;
} pass;

static void forward_pass(call *c, const pass *q)
{
    job *j = &c->j;
    const network *n = j->n;
    const place *p = &n->places[q->index];
    cuda_arguments g = {0};
    cuda_pointer h0 = q->h0;
    multiply(j, PRODUCT_NT, q->input, dense(p->w_ih, 4 * n->H, q->input.columns), p->bias, dense(q->gates, c->rows, 4 * n->H), 0);
    if (n->o.proj_size) {
        /* The state before the first step is no product w_hr m: what it gives to the gates is added by itself. */
        cuda_arguments first = {0};
        multiply(j, PRODUCT_NT, dense(h0, c->B, n->W), dense(p->w_hh_rows, 4 * n->H, n->W), 0,
                 dense(c->s.gate0, c->B, 4 * n->H), 0);
        give(&first, PARAMETER_source_ptr, c->s.gate0);
        give(&first, PARAMETER_target_ptr, q->gates);
        give(&first, PARAMETER_lengths_ptr, c->s.lengths);
        give_size(j, &first, PARAMETER_B, c->B);
        give(&first, PARAMETER_reverse, (uint64_t)q->reverse);
        by_rows(j, KERNEL_add_first, &first, c->B, 4 * n->H);
        fill(j, c->s.zeros, 0, (size_t)(c->B * n->H) * n->item);
        h0 = c->s.zeros;
    }
    give(&g, PARAMETER_gates_ptr, q->gates);
    give(&g, PARAMETER_w_ptr, p->w_hh);
    give(&g, PARAMETER_h0_ptr, h0);
    give(&g, PARAMETER_c0_ptr, q->c0);
    give(&g, PARAMETER_exchange_ptr, q->h);
    give(&g, PARAMETER_out_ptr, q->h);
    give(&g, PARAMETER_cells_ptr, q->cells);
    give(&g, PARAMETER_h_n_ptr, q->h_n);
    give(&g, PARAMETER_c_n_ptr, q->c_n);
    recur(c, KERNEL_recurrent_forward, c->training, &g, q->h, n->H, q->reverse);
}

static void keep_empty(call *c, cuda_pointer from, cuda_pointer to, int64_t width)
{
    cuda_arguments g = {0};
    give(&g, PARAMETER_source_ptr, from);
    give(&g, PARAMETER_target_ptr, to);
    give(&g, PARAMETER_lengths_ptr, c->s.lengths);
    give_size(&c->j, &g, PARAMETER_B, c->B);
    by_rows(&c->j, KERNEL_keep_empty, &g, c->B, width);
}

/* What a direction adds to the layer's output [rows, P * W]. */
static void pass_on(call *c, const pass *q, cuda_pointer out)
{
    const network *n = c->j.n;
    cuda_pointer at = out + (size_t)(q->index % n->P * n->W) * n->item;
    if (n->o.proj_size) {
        multiply(&c->j, PRODUCT_NT, dense(q->h, c->rows, n->H), dense(n->places[q->index].w_hr, n->W, n->H), 0,
                 (matrix){at, c->rows, n->W, n->P * n->W}, 0);
    } else if (n->P > 1) {
        int64_t extents[3] = {1, c->rows, n->W};
        rearrange(&c->j, REARRANGE_SAME, (block){q->h, 0, n->H}, (block){at, 0, n->P * n->W}, extents, extents, 0);
    }
}

static void put_out(call *c, cuda_pointer from, void *out)
{
    const network *n = c->j.n;
    int64_t extents[3] = {c->T, c->B, n->R};
    for (int64_t k = 0; k < n->P; k++)
        rearrange(&c->j, REARRANGE_SAME, (block){from + (size_t)(k * n->W) * n->item, c->B * n->P * n->W, n->P * n->W},
                  time_major(c, out, n->P * n->R, k * n->R), extents, extents, 0);
}

static int begin_call(call *c, const network *n, int64_t T, int64_t B, void *stream)
{
    int status = check_report(n);
    memset(c, 0, sizeof *c);
    c->j = (job){n, stream, TRITLSTM_OK};
    c->T = T;
    c->B = B;
    c->rows = T * B;
    return status;
}

static void run_forward(call *c, const tritlstm_forward_args *a)
{
    const network *n = c->j.n;
    cuda_pointer input, out = 0;
    take_lengths(c, a->lengths);
    take_x(c, a->x, 0);
    input = c->x;
    for (int64_t layer = 0; layer < n->o.num_layers; layer++) {
        out = c->training ? nth(c->r.outs, layer, c->rows, n->P * n->W, n->item) : c->s.outs[layer % 2];
        for (int64_t p = 0; p < n->P; p++) {
            int64_t k = layer * n->P + p;
            pass q = {k, (int)p, dense(input, c->rows, input_width(n, layer)), c->s.gates, 0, c->s.h,
                      c->s.h0, c->s.c0, c->s.h_n, c->s.c_n};
            if (!c->training && !separate_outs(n)) q.h = out;
            if (c->training) {
                q.gates = nth(c->r.gates, k, c->rows, 4 * n->H, n->item);
                q.cells = nth(c->r.cells, k, c->rows, n->H, 4);
                q.h = nth(c->r.h, k, c->rows, n->H, n->item);
                if (n->o.proj_size) q.h_n = nth(c->r.h_n, k, c->B, n->H, n->item);
                if (!separate_outs(n)) out = q.h;
            }
            take_state(c, REARRANGE_SAME, a->h0, k, n->R, q.h0, n->W);
            take_state(c, REARRANGE_TO_FP32, a->c0, k, n->o.hidden_size, q.c0, n->H);
            forward_pass(c, &q);
            pass_on(c, &q, out);
            put_state(c, REARRANGE_FROM_FP32, q.c_n, n->H, a->c_n, k, n->o.hidden_size);
            if (n->o.proj_size && a->h_n) {
                multiply(&c->j, PRODUCT_NT, dense(q.h_n, c->B, n->H), dense(n->places[k].w_hr, n->W, n->H), 0,
                         dense(c->s.projected, c->B, n->W), 0);
                keep_empty(c, q.h0, c->s.projected, n->W);
            }
            put_state(c, REARRANGE_SAME, n->o.proj_size ? c->s.projected : q.h_n, n->W, a->h_n, k, n->R);
        }
        input = out;
    }
    put_out(c, out, a->out);
}

static int engine_forward(uint64_t id, const tritlstm_forward_args *a)
{
    const network *n = network_of(id);
    call c;
    arena work = {(uintptr_t)a->workspace, 0, 0}, kept = {(uintptr_t)a->reserve, 0, 0};
    int status = begin_call(&c, n, a->steps, a->batch, a->stream);
    c.training = a->reserve != NULL;
    if (status || (status = check_room(n, c.T, c.B, c.training, a->workspace_bytes, a->reserve_bytes))) return status;
    lay_out_forward(n, c.T, c.B, c.training, &work, &c.s);
    if (c.training) lay_out_reserve(n, c.T, c.B, &kept, &c.r);
    if ((status = cuda_enter(n->device))) return status;
    run_forward(&c, a);
    if (!c.j.status) c.j.status = check_report(n);
    return cuda_leave(n->device, c.j.status);
}

/* ---- backward ---------------------------------------------------------------------------------------- */

/* Gradient of a layer's output as one direction sees it: rows of `stride` elements, 0 where all of it is zero. */
typedef struct upstream {
    cuda_pointer at;
    int64_t stride;
    int zero;
} upstream;

static void *gradient_of(const network *n, const tritlstm_backward_args *a, int64_t index, int kind)
{
    int64_t each = 2 + (n->o.bias ? 2 : 0) + (n->o.proj_size ? 1 : 0);
    if (!a->grad_weights || ((kind == B_IH || kind == B_HH) && !n->o.bias) || (kind == W_HR && !n->o.proj_size)) return NULL;
    return a->grad_weights[index * each + (kind == W_HR && !n->o.bias ? 2 : kind)];
}

/* [4H packed, width] to the caller's [4 hidden_size, given], in `parts` of columns. */
static void put_gate_rows(call *c, cuda_pointer from, int64_t width, void *to, int64_t given, int64_t parts)
{
    const network *n = c->j.n;
    int64_t h = n->o.hidden_size;
    for (int64_t q = 0; to && q < parts; q++) {
        int64_t extents[3] = {h, 4, given / parts};
        rearrange(&c->j, REARRANGE_SAME, (block){from + (size_t)(q * (width / parts)) * n->item, 4 * width, width},
                  (block){(uintptr_t)to + (size_t)(q * (given / parts)) * n->item, given, h * given}, extents, extents, 0);
    }
}

static void put_biases(call *c, const tritlstm_backward_args *a, int64_t index)
{
    const network *n = c->j.n;
    const tritlstm_cuda_kernel *kernel = n->plain[KERNEL_column_sums][0];
    void *to[] = {gradient_of(n, a, index, B_IH), gradient_of(n, a, index, B_HH)};
    int64_t h = n->o.hidden_size, extents[3] = {h, 4, 1};
    cuda_arguments g = {0};
    if (!to[0] && !to[1]) return;
    give(&g, PARAMETER_a_ptr, c->s.grad_gates);
    give(&g, PARAMETER_out_ptr, c->s.sums);
    give_size(&c->j, &g, PARAMETER_K, c->rows);
    give_size(&c->j, &g, PARAMETER_N, 4 * n->H);
    launch(&c->j, kernel, divide_up(4 * n->H, kernel->columns), 1, &g);
    for (int k = 0; k < 2; k++)
        if (to[k])
            rearrange(&c->j, REARRANGE_FROM_FP32, (block){c->s.sums, 4, 1}, (block){(uintptr_t)to[k], 1, h}, extents,
                      extents, 0);
}

/* The recurrence back in time: s.grad_gates, and the gradient of c0 in s.c_n. */
static void backward_pass(call *c, const tritlstm_backward_args *a, const pass *q, upstream up)
{
    job *j = &c->j;
    const network *n = j->n;
    const place *p = &n->places[q->index];
    cuda_arguments g = {0};
    cuda_pointer grad_h_n = c->s.grad_h_n;
    int64_t stride_b = n->P, stride_t = n->P * c->B; /* in rows of H */
    take_state(c, REARRANGE_SAME, a->grad_h_n, q->index, n->R, c->s.grad_h_n, n->W);
    take_state(c, REARRANGE_TO_FP32, a->grad_c_n, q->index, n->o.hidden_size, c->s.c_n, n->H);
    fill(j, c->s.zeros, 0, (size_t)(c->B * n->H) * n->item);
    if (n->o.proj_size) {
        grad_h_n = c->s.grad_m_n;
        multiply(j, PRODUCT_NN, dense(c->s.grad_h_n, c->B, n->W), dense(p->w_hr, n->W, n->H), 0, dense(grad_h_n, c->B, n->H), 0);
        if (!up.zero)
            multiply(j, PRODUCT_NN, (matrix){up.at, c->rows, n->W, up.stride}, dense(p->w_hr, n->W, n->H), 0,
                     dense(c->s.grad_m, c->rows, n->H), 0);
        up.at = c->s.grad_m;
        stride_b = 1;
        stride_t = c->B;
    }
    give(&g, PARAMETER_grad_out_ptr, up.zero ? c->s.zeros : up.at);
    give_size(j, &g, PARAMETER_grad_out_stride_t, up.zero ? 0 : stride_t);
    give_size(j, &g, PARAMETER_grad_out_stride_b, up.zero ? 0 : stride_b);
    give(&g, PARAMETER_grad_h_n_ptr, grad_h_n);
    give(&g, PARAMETER_grad_c_n_ptr, c->s.c_n);
    give(&g, PARAMETER_w_ptr, p->w_hh);
    give(&g, PARAMETER_c0_ptr, q->c0);
    give(&g, PARAMETER_gates_ptr, q->gates);
    give(&g, PARAMETER_cells_ptr, q->cells);
    give(&g, PARAMETER_grad_gates_ptr, c->s.grad_gates);
    give(&g, PARAMETER_grad_c_ptr, c->s.c_n); /* a block reads its part before it writes it */
    recur(c, KERNEL_recurrent_backward, 1, &g, c->s.grad_gates, 4 * n->H, q->reverse);
}

/* Gradients of w_hh and, with a projection, of w_hr. s.gate0 has the gate gradients of the first steps. */
static void put_recurrent_weights(call *c, const tritlstm_backward_args *a, const pass *q, upstream up)
{
    job *j = &c->j;
    const network *n = j->n;
    const place *p = &n->places[q->index];
    void *to_hh = gradient_of(n, a, q->index, W_HH), *to_hr = gradient_of(n, a, q->index, W_HR);
    matrix gates = dense(c->s.grad_gates, c->rows, 4 * n->H), first = dense(c->s.gate0, c->B, 4 * n->H);
    matrix recurrent = dense(c->s.grad_w, 4 * n->H, n->H), hr = dense(c->s.grad_w_hr, n->W, n->H);
    cuda_arguments g = {0};
    if (!to_hh && !to_hr) return;
    give(&g, PARAMETER_h_ptr, q->h);
    give(&g, PARAMETER_h0_ptr, n->o.proj_size ? c->s.zeros : q->h0);
    give(&g, PARAMETER_lengths_ptr, c->s.lengths);
    give(&g, PARAMETER_target_ptr, c->s.previous);
    give_size(j, &g, PARAMETER_T, c->T);
    give_size(j, &g, PARAMETER_B, c->B);
    give(&g, PARAMETER_reverse, (uint64_t)q->reverse);
    by_rows(j, KERNEL_previous_states, &g, c->rows, n->H);
    multiply(j, PRODUCT_TN, gates, dense(c->s.previous, c->rows, n->H), 0, recurrent, 0);
    if (!n->o.proj_size) {
        put_gate_rows(c, recurrent.at, n->H, to_hh, n->R, 1);
        return;
    }
    if (to_hh) {
        matrix hh = dense(c->s.grad_w_hh, 4 * n->H, n->W);
        multiply(j, PRODUCT_NT, recurrent, dense(p->w_hr, n->W, n->H), 0, hh, 0);
        multiply(j, PRODUCT_TN, first, dense(q->h0, c->B, n->W), 0, hh, 1);
        put_gate_rows(c, hh.at, n->W, to_hh, n->R, 1);
    }
    if (to_hr) {
        int64_t extents[3] = {1, n->R, n->o.hidden_size};
        multiply(j, PRODUCT_TN, dense(p->w_hh_rows, 4 * n->H, n->W), recurrent, 0, hr, 0);
        multiply(j, PRODUCT_TN, dense(c->s.grad_h_n, c->B, n->W), dense(q->h_n, c->B, n->H), 0, hr, 1);
        if (!up.zero)
            multiply(j, PRODUCT_TN, (matrix){up.at, c->rows, n->W, up.stride}, dense(q->h, c->rows, n->H), 0, hr, 1);
        rearrange(j, REARRANGE_SAME, (block){hr.at, 0, n->H}, (block){(uintptr_t)to_hr, 0, n->o.hidden_size}, extents,
                  extents, 0);
    }
}

static void put_initial_states(call *c, const tritlstm_backward_args *a, const pass *q)
{
    const network *n = c->j.n;
    const place *p = &n->places[q->index];
    put_state(c, REARRANGE_FROM_FP32, c->s.c_n, n->H, a->grad_c0, q->index, n->o.hidden_size);
    if (!a->grad_h0) return;
    multiply(&c->j, PRODUCT_NN, dense(c->s.gate0, c->B, 4 * n->H), dense(p->w_hh_rows, 4 * n->H, n->W), 0,
             dense(c->s.grad_h0, c->B, n->W), 0);
    keep_empty(c, c->s.grad_h_n, c->s.grad_h0, n->W); /* a sequence of no steps passes its state on */
    put_state(c, REARRANGE_SAME, c->s.grad_h0, n->W, a->grad_h0, q->index, n->R);
}

static void take_first(call *c, int reverse)
{
    cuda_arguments g = {0};
    give(&g, PARAMETER_source_ptr, c->s.grad_gates);
    give(&g, PARAMETER_target_ptr, c->s.gate0);
    give(&g, PARAMETER_lengths_ptr, c->s.lengths);
    give_size(&c->j, &g, PARAMETER_B, c->B);
    give(&g, PARAMETER_reverse, (uint64_t)reverse);
    by_rows(&c->j, KERNEL_take_first, &g, c->B, 4 * c->j.n->H);
}

/* One layer, from the gradient of its output to that of its input in `below` (0: not wanted). */
static void backward_layer(call *c, const tritlstm_backward_args *a, int64_t layer, upstream up, cuda_pointer below)
{
    job *j = &c->j;
    const network *n = j->n;
    int64_t width = input_width(n, layer);
    cuda_pointer input = c->x;
    if (layer)
        input = separate_outs(n) ? nth(c->r.outs, layer - 1, c->rows, n->P * n->W, n->item)
                                 : nth(c->r.h, layer - 1, c->rows, n->H, n->item);
    for (int64_t p = 0; p < n->P; p++) {
        int64_t k = layer * n->P + p;
        pass q = {k, (int)p, dense(input, c->rows, width), nth(c->r.gates, k, c->rows, 4 * n->H, n->item),
                  nth(c->r.cells, k, c->rows, n->H, 4), nth(c->r.h, k, c->rows, n->H, n->item), c->s.h0, c->s.c0,
                  nth(c->r.h_n, k, c->B, n->H, n->item), 0};
        upstream own = {up.at + (size_t)(p * n->W) * n->item, up.stride, up.zero};
        matrix gates = dense(c->s.grad_gates, c->rows, 4 * n->H);
        void *to_ih = gradient_of(n, a, k, W_IH);
        take_state(c, REARRANGE_SAME, a->h0, k, n->R, q.h0, n->W);
        take_state(c, REARRANGE_TO_FP32, a->c0, k, n->o.hidden_size, q.c0, n->H);
        backward_pass(c, a, &q, own);
        take_first(c, q.reverse);
        put_biases(c, a, k);
        if (to_ih) {
            multiply(j, PRODUCT_TN, gates, q.input, 0, dense(c->s.grad_w, 4 * n->H, width), 0);
            put_gate_rows(c, c->s.grad_w, width, to_ih, given_width(n, layer), layer ? n->P : 1);
        }
        put_recurrent_weights(c, a, &q, own);
        put_initial_states(c, a, &q);
        if (below) multiply(j, PRODUCT_NN, gates, dense(n->places[k].w_ih, 4 * n->H, width), 0, dense(below, c->rows, width), p > 0);
    }
}

static void run_backward(call *c, const tritlstm_backward_args *a)
{
    const network *n = c->j.n;
    upstream up = {c->s.grads[1], n->P * n->W, a->grad_out == NULL};
    take_lengths(c, a->lengths);
    take_x(c, a->x, a->lengths != NULL);
    for (int64_t k = 0; a->grad_out && k < n->P; k++) {
        int64_t extents[3] = {c->T, c->B, n->W}, valid[3] = {c->T, c->B, n->R};
        rearrange(&c->j, REARRANGE_SAME, time_major(c, a->grad_out, n->P * n->R, k * n->R),
                  (block){up.at + (size_t)(k * n->W) * n->item, c->B * up.stride, up.stride}, extents, valid, 0);
    }
    if (a->grad_out && a->lengths) zero_ends(c, up.at, up.stride);
    for (int64_t layer = n->o.num_layers - 1; layer >= 0; layer--) {
        cuda_pointer below = up.at == c->s.grads[0] ? c->s.grads[1] : c->s.grads[0];
        int direct = !layer && a->grad_x && usable(c, a->grad_x, n->o.input_size, n->D);
        if (!layer) below = direct ? (uintptr_t)a->grad_x : a->grad_x ? below : 0;
        backward_layer(c, a, layer, up, below);
        if (!layer && a->grad_x && !direct) {
            int64_t extents[3] = {c->T, c->B, n->o.input_size};
            rearrange(&c->j, REARRANGE_SAME, (block){below, c->B * n->D, n->D}, time_major(c, a->grad_x, n->o.input_size, 0),
                      extents, extents, 0);
        }
        up = (upstream){below, n->P * n->W, 0};
    }
}

static int engine_backward(uint64_t id, const tritlstm_backward_args *a)
{
    const network *n = network_of(id);
    call c;
    arena work = {(uintptr_t)a->workspace, 0, 0}, kept = {(uintptr_t)a->reserve, 0, 0};
    int status = begin_call(&c, n, a->steps, a->batch, a->stream);
    c.training = 1;
    if (status || (status = check_room(n, c.T, c.B, 1, a->workspace_bytes, a->reserve_bytes))) return status;
    lay_out_backward(n, c.T, c.B, &work, &c.s);
    lay_out_reserve(n, c.T, c.B, &kept, &c.r);
    if ((status = cuda_enter(n->device))) return status;
    run_backward(&c, a);
    if (!c.j.status) c.j.status = check_report(n);
    return cuda_leave(n->device, c.j.status);
}

/* ---- streaming --------------------------------------------------------------------------------------- */

static void lay_out_state(state *s, arena *a)
{
    const network *n = s->n;
    int64_t L = n->o.num_layers;
    s->h = part(a, L, s->B, n->W, n->item);
    s->c = part(a, L, s->B, n->H, 4);
    s->bytes = a->used;
    s->ones = part(a, s->B, 1, 1, 4);
    s->h_dense = part(a, L, s->B, n->R, n->item);
    s->c_dense = part(a, L, s->B, n->o.hidden_size, n->item);
}

static int engine_state_destroy(uint64_t id)
{
    state *s = state_of(id);
    if (s->memory && cuda_enter(s->n->device) == TRITLSTM_OK) {
        cuda_free(s->memory);
        cuda_leave(s->n->device, TRITLSTM_OK);
    }
    free(s);
    return TRITLSTM_OK;
}

static int engine_state_create(uint64_t id, int64_t batch, uint64_t *result)
{
    const network *n = network_of(id);
    arena a = {0, 0, 0};
    state *s = calloc(1, sizeof *s);
    if (!s) return tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    s->n = n;
    s->B = batch;
    lay_out_state(s, &a);
    int status = batch > INT32_MAX || a.overflow ? too_large(1, batch) : cuda_enter(n->device);
    if (!status) {
        job j = {n, NULL, cuda_allocate(a.used, &s->memory)};
        lay_out_state(s, &(arena){s->memory, 0, 0});
        fill(&j, s->memory, 0, s->bytes);
        fill(&j, s->ones, 1, (size_t)batch * 4);
        if (!j.status) j.status = cuda_wait(NULL);
        status = cuda_leave(n->device, j.status);
    }
    if (status) engine_state_destroy((uint64_t)(uintptr_t)s);
    else *result = (uint64_t)(uintptr_t)s;
    return status;
}

static int engine_state_reset(uint64_t id, const uint8_t *rows, void *stream)
{
    state *s = state_of(id);
    const network *n = s->n;
    job j = {n, stream, cuda_enter(n->device)};
    if (j.status) return j.status;
    if (!rows) fill(&j, s->h, 0, s->bytes);
    for (int64_t b = 0, end; rows && b < s->B; b = end) { /* runs of rows that are reset together */
        for (end = b + 1; end < s->B && !rows[end] == !rows[b];) end++;
        for (int64_t layer = 0; rows[b] && layer < n->o.num_layers; layer++) {
            fill(&j, nth(s->h, layer * s->B + b, n->W, 1, n->item), 0, (size_t)((end - b) * n->W) * n->item);
            fill(&j, nth(s->c, layer * s->B + b, n->H, 1, 4), 0, (size_t)((end - b) * n->H) * 4);
        }
    }
    return cuda_leave(n->device, j.status);
}

static int engine_state_get(uint64_t id, void *h, void *c, int32_t device, void *stream)
{
    state *s = state_of(id);
    const network *n = s->n;
    int64_t rows = n->o.num_layers * s->B, hidden = n->o.hidden_size;
    job j = {n, stream, cuda_enter(n->device)};
    int on_host = device == TRITLSTM_CPU;
    if (j.status) return j.status;
    if (h) resize(&j, REARRANGE_SAME, s->h, n->W, on_host ? s->h_dense : (uintptr_t)h, n->R, rows);
    if (c) resize(&j, REARRANGE_FROM_FP32, s->c, n->H, on_host ? s->c_dense : (uintptr_t)c, hidden, rows);
    if (on_host && h && !j.status) j.status = cuda_copy_out(h, s->h_dense, (size_t)(rows * n->R) * n->item, stream);
    if (on_host && c && !j.status) j.status = cuda_copy_out(c, s->c_dense, (size_t)(rows * hidden) * n->item, stream);
    if (on_host && !j.status) j.status = cuda_wait(stream);
    return cuda_leave(n->device, j.status);
}

static int engine_state_set(uint64_t id, const void *h, const void *c, int32_t device, void *stream)
{
    state *s = state_of(id);
    const network *n = s->n;
    int64_t rows = n->o.num_layers * s->B, hidden = n->o.hidden_size;
    job j = {n, stream, cuda_enter(n->device)};
    int on_host = device == TRITLSTM_CPU;
    if (j.status) return j.status;
    if (on_host && h) j.status = cuda_copy_in(s->h_dense, h, (size_t)(rows * n->R) * n->item, stream);
    if (on_host && c && !j.status) j.status = cuda_copy_in(s->c_dense, c, (size_t)(rows * hidden) * n->item, stream);
    if (h) resize(&j, REARRANGE_SAME, on_host ? s->h_dense : (uintptr_t)h, n->R, s->h, n->W, rows);
    if (c) resize(&j, REARRANGE_TO_FP32, on_host ? s->c_dense : (uintptr_t)c, hidden, s->c, n->H, rows);
    if (on_host && !j.status) j.status = cuda_wait(stream);
    return cuda_leave(n->device, j.status);
}

static void run_step(call *c, state *s, const void *x, void *out)
{
    const network *n = c->j.n;
    cuda_pointer input;
    take_x(c, x, 0);
    input = c->x;
    for (int64_t layer = 0; layer < n->o.num_layers; layer++) {
        /* h is read by all blocks while some write it already, so it is copied; each c is read by the block that writes it. */
        cuda_pointer h = nth(s->h, layer, s->B, n->W, n->item), state_c = nth(s->c, layer, s->B, n->H, 4);
        size_t bytes = (size_t)(s->B * n->W) * n->item;
        cuda_pointer m = n->o.proj_size ? c->s.h : h;
        pass q = {layer, 0, dense(input, c->rows, input_width(n, layer)), c->s.gates, 0, m, c->s.h0, state_c, c->s.h_n, state_c};
        if (!c->j.status) c->j.status = cuda_copy(q.h0, h, bytes, c->j.stream);
        forward_pass(c, &q);
        if (n->o.proj_size)
            multiply(&c->j, PRODUCT_NT, dense(m, s->B, n->H), dense(n->places[layer].w_hr, n->W, n->H), 0, dense(h, s->B, n->W), 0);
        input = h;
    }
    put_out(c, input, out);
}

static int engine_step(uint64_t id, const void *x, void *out, void *workspace, size_t workspace_bytes, void *stream)
{
    state *s = state_of(id);
    const network *n = s->n;
    call c;
    arena work = {(uintptr_t)workspace, 0, 0};
    int status = begin_call(&c, n, 1, s->B, stream);
    if (status || (status = check_room(n, 1, s->B, 0, workspace_bytes, 0))) return status;
    lay_out_forward(n, 1, s->B, 0, &work, &c.s);
    c.s.lengths = s->ones;
    if ((status = cuda_enter(n->device))) return status;
    run_step(&c, s, x, out);
    if (!c.j.status) c.j.status = check_report(n);
    return cuda_leave(n->device, c.j.status);
}

/* ---- explain ----------------------------------------------------------------------------------------- */

typedef struct text {
    char *at;
    size_t room, used;
} text;

static void say(text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void say(text *t, const char *format, ...)
{
    va_list list;
    size_t left = t->used < t->room ? t->room - t->used : 0;
    va_start(list, format);
    int length = vsnprintf(left ? t->at + t->used : NULL, left, format, list);
    va_end(list);
    if (length > 0) t->used += (size_t)length;
}

static void say_kernel(text *t, const network *n, const char *what, int kind, int save, int64_t T, int64_t B)
{
    static const char *const tiers[] = {"single", "persistent", "streaming", "step"};
    static const char *const protocols[] = {"none", "counter", "flag"};
    const tritlstm_cuda_limits *limits = &n->limits;
    const tritlstm_cuda_kernel *k = choose(n, kind, save, T, B);
    int64_t groups = tritlstm_cuda_groups(k, limits->sms, B), rows = tritlstm_cuda_tile_rows(k, limits->sms, B);
    say(t, "%s: %s, exchange %s, %d blocks of %d units", what, tiers[k->tier], protocols[k->protocol], (int)k->n_blocks,
        (int)k->rows);
    if (k->parts > 1) say(t, " in teams of %d", (int)k->parts);
    say(t, " x %" PRId64 " groups, %" PRId64 " batch tiles of ", groups, tritlstm_cuda_tiles(k, limits->sms, B));
    if (rows < k->columns) say(t, "%" PRId64 " in ", rows);
    say(t, "%d, ", (int)k->columns);
    if (k->tier == TIER_single) say(t, "all of w_hh on chip, ");
    else say(t, "%d/%d chunks of w_hh on chip, ", (int)k->resident, (int)k->chunks);
    say(t, "%d warps, %u bytes of shared memory; %.2f us a step predicted, not measured\n", (int)k->warps, k->shared,
        tritlstm_cuda_predicted(k, limits, B, T == 1));
}

static int engine_explain(uint64_t id, int64_t T, int64_t B, int32_t training, char *at, size_t capacity, size_t *needed)
{
    const network *n = network_of(id);
    const cuda_device *d = n->device;
    const tritlstm_cuda_family *family = d->limits.family;
    text t = {at, capacity, 0};
    say(&t, "engine: aot, tritlstm %s\n", tritlstm_version_string());
    say(&t, "device: %s, compute capability %d.%d, %d multiprocessors, %" PRId64 " bytes of shared memory a block\n", d->name,
        d->major, d->minor, d->limits.sms, d->limits.shared);
    if (family->later)
        say(&t, "images: PTX of sm_%d%d, compiled by the driver: this library has no machine code for %d.%d\n", family->major,
            family->minor, d->major, d->minor);
    else say(&t, "images: machine code (cubin) of %s\n", family->name);
    say(&t, "dtype: %s\n", n->o.dtype == TRITLSTM_FLOAT32 ? "float32, products in float32 (no TF32)"
                           : n->o.dtype == TRITLSTM_FLOAT16 ? "float16, sums and cells in float32"
                                                            : "bfloat16, sums and cells in float32");
    if (n->H != n->o.hidden_size)
        say(&t, "hidden size: %" PRId64 " runs in kernels of %" PRId64 ", padded with zeros\n", n->o.hidden_size, n->H);
    say_kernel(&t, n, "forward", KERNEL_recurrent_forward, training, T, B);
    if (training) say_kernel(&t, n, "backward", KERNEL_recurrent_backward, 1, T, B);
    t.used--; /* the last line has no end */
    if (capacity) at[t.used < capacity ? t.used : capacity - 1] = 0;
    *needed = t.used + 1;
    return TRITLSTM_OK;
}

static const tritlstm_engine_functions functions = {
    TRITLSTM_ENGINE_INTERFACE, engine_create,     engine_destroy,   engine_get_weights,  engine_set_weights,
    engine_sizes,              engine_forward,    engine_backward,  engine_state_create, engine_state_destroy,
    engine_state_reset,        engine_state_get,  engine_state_set, engine_step,         engine_explain,
    NULL,
};

const tritlstm_engine_functions *tritlstm_cuda_functions(void) { return &functions; }
