/* TRITLSTM_CPU in libtritlstm: an LSTM in plain C on the calling thread.
 *
 * Memory is allocated by create and state_create and nowhere else; a call works in the caller's workspace and reserve.
 * One function lays out each of them, and is run without memory to know the size.
 *
 * SPDX-License-Identifier: MIT */
#include "host_engine.h"
#include "host_kernels.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 64 }; /* a cache line, and the longest vector */

/* ---- memory ------------------------------------------------------------------------------------------ */

static size_t times(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }

static size_t round_up(size_t value, size_t unit)
{
    return value > SIZE_MAX - unit ? SIZE_MAX : (value + unit - 1) / unit * unit;
}

void *host_take(host_arena *arena, size_t a, size_t b, size_t c, size_t item)
{
    size_t bytes = round_up(times(times(times(a, b), c), item), LINE), at = arena->used;
    arena->used = bytes > SIZE_MAX - at ? SIZE_MAX : at + bytes;
    return arena->base ? arena->base + at : NULL;
}

/* A matrix [depth, columns] in the panels of host_kernels.h. */
static void *take_packed(const host_network *n, host_arena *arena, size_t depth, size_t columns)
{
    return host_take(arena, depth, round_up(columns, HOST_PANEL / n->real), 1, n->real);
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

/* The caller's workspace from its first cache line on. */
static host_arena workspace_arena(void *workspace)
{
    uintptr_t address = (uintptr_t)workspace;
    return (host_arena){workspace ? (unsigned char *)workspace + (LINE - address % LINE) % LINE : NULL, 0};
}

void host_reserve_parts(const host_network *n, size_t T, size_t B, host_arena *arena, host_reserve *r)
{
    size_t rows = times(T, B), places = n->L * n->P;
    r->mark = host_take(arena, HOST_MARK_BYTES, 1, 1, 1);
    r->h = host_take(arena, n->L, rows, n->P * n->R, n->real);
    r->gates = host_take(arena, places, rows, 4 * n->HX, n->real);
    r->cells = host_take(arena, places, rows, n->HX, n->real);
}

/* Rows of a product beyond which it no longer gets faster. */
enum { ROWS_AT_ONCE = 192 };

void host_forward_parts(const host_network *n, size_t T, size_t B, int training, host_arena *arena,
                        host_forward_scratch *s)
{
    s->steps = larger(ROWS_AT_ONCE / B, 1);
    if (s->steps > T) s->steps = T;
    s->x = host_take(arena, s->steps, B, n->D, n->real);
    s->gates = training ? NULL : host_take(arena, s->steps, B, 4 * n->HX, n->real);
    for (size_t k = 0; k < 2; k++)
        s->outs[k] = training || n->L < k + 2 ? NULL : host_take(arena, T, B, n->P * n->R, n->real);
    s->h = host_take(arena, B, n->R, 1, n->real);
    s->c = host_take(arena, B, n->HX, 1, n->real);
    s->shown = host_take(arena, B, n->HX, 1, n->real);
    s->projected = n->R == n->H ? NULL : host_take(arena, B, n->R, 1, n->real);
}

void host_backward_parts(const host_network *n, size_t T, size_t B, host_arena *arena, host_backward_scratch *s)
{
    size_t wide = larger(n->P * n->R, n->D), projected = n->R != n->H;
    s->x = host_take(arena, T, B, n->D, n->real);
    for (size_t k = 0; k < 2; k++) s->grads[k] = host_take(arena, T, B, wide, n->real);
    s->grad_gates = host_take(arena, T, B, 4 * n->HX, n->real);
    s->h0 = host_take(arena, B, n->R, 1, n->real);
    s->c0 = host_take(arena, B, n->HX, 1, n->real);
    s->grad_h = host_take(arena, B, n->R, 1, n->real);
    s->grad_h_next = host_take(arena, B, n->R, 1, n->real);
    s->grad_c = host_take(arena, B, n->HX, 1, n->real);
    s->grad_shown = host_take(arena, B, n->HX, 1, n->real);
    s->first = host_take(arena, B, 4 * n->HX, 1, n->real);
    s->packed_hh = take_packed(n, arena, 4 * n->HX, n->R);
    s->packed_hr = projected ? take_packed(n, arena, n->R, n->H) : NULL;
    s->grad_h_all = projected ? host_take(arena, T, B, n->R, n->real) : NULL;
    s->shown_all = projected ? host_take(arena, T, B, n->HX, n->real) : NULL;
    s->grad_weight = host_take(arena, 4 * n->HX, larger(wide, n->R), 1, n->real);
}

static int too_large(const char *what, int64_t steps, int64_t batch)
{
    return tritlstm_aot_fail(TRITLSTM_ERROR_OVERFLOW, "%s of %" PRId64 " steps x %" PRId64 " batch is too large", what,
                             steps, batch);
}

static int host_sizes(uint64_t id, int64_t steps, int64_t batch, int32_t training, size_t *workspace, size_t *reserve)
{
    const host_network *n = (const host_network *)(uintptr_t)id;
    host_arena forward = {0}, backward = {0}, kept = {0};
    host_forward_scratch f;
    host_backward_scratch b;
    host_reserve r;
    host_forward_parts(n, (size_t)steps, (size_t)batch, training, &forward, &f);
    if (training) {
        host_backward_parts(n, (size_t)steps, (size_t)batch, &backward, &b);
        host_reserve_parts(n, (size_t)steps, (size_t)batch, &kept, &r);
    }
    *workspace = larger(forward.used, backward.used);
    *reserve = kept.used;
    if (*workspace > PTRDIFF_MAX - LINE) return too_large("workspace", steps, batch);
    if (*reserve > PTRDIFF_MAX) return too_large("reserve", steps, batch);
    *workspace += LINE; /* room to begin at a cache line */
    return TRITLSTM_OK;
}

static int too_small(const char *name, size_t given, size_t needed)
{
    return tritlstm_aot_fail(TRITLSTM_ERROR_BUFFER, "%s is %zu, but %zu are needed: ask tritlstm_sizes", name, given,
                             needed);
}

/* ---- networks ---------------------------------------------------------------------------------------- */

/* Pointers of a place into the arena, or only its size. */
static void place_parts(const host_network *n, size_t k, host_arena *arena, host_place *place)
{
    size_t width = k < n->P ? n->D : n->P * n->R, four = 4 * n->H;
    int bias = n->options.bias, projected = n->R != n->H;
    place->w_ih = host_take(arena, four, width, 1, n->real);
    place->w_hh = host_take(arena, four, n->R, 1, n->real);
    place->b_ih = bias ? host_take(arena, four, 1, 1, n->real) : NULL;
    place->b_hh = bias ? host_take(arena, four, 1, 1, n->real) : NULL;
    place->w_hr = projected ? host_take(arena, n->R, n->H, 1, n->real) : NULL;
    place->packed_ih = take_packed(n, arena, width, 4 * n->HX);
    place->packed_hh = take_packed(n, arena, n->R, 4 * n->HX);
    place->packed_hr = projected ? take_packed(n, arena, n->H, n->R) : NULL;
    place->bias = host_take(arena, 4 * n->HX, 1, 1, n->real);
}

static void network_parts(const host_network *n, host_arena *arena, host_place *places)
{
    host_place unused;
    for (size_t k = 0; k < n->L * n->P; k++) place_parts(n, k, arena, places ? &places[k] : &unused);
}

/* Weight `index` in the order of tritlstm_weight_info: its array of REAL and its extents, columns 1 for a bias. */
static void *find_weight(const host_network *n, size_t index, size_t *rows, size_t *columns)
{
    size_t k = index / n->per_place, kind = index % n->per_place;
    const host_place *place = &n->places[k];
    *rows = 4 * n->H;
    if (kind == 0) return *columns = k < n->P ? n->D : n->P * n->R, place->w_ih;
    if (kind == 1) return *columns = n->R, place->w_hh;
    if (kind < 4 && n->options.bias) return *columns = 1, kind == 2 ? place->b_ih : place->b_hh;
    return *rows = n->R, *columns = n->H, place->w_hr;
}

static void load_weights(const host_network *n, const void *const *weights, const int32_t *dtypes)
{
    host_walk walk = host_walk_of(n);
    for (size_t k = 0; k < n->L * n->P * n->per_place; k++) {
        size_t rows, columns;
        void *to = find_weight(n, k, &rows, &columns);
        if (weights[k]) walk.load(n, dtypes ? dtypes[k] : n->options.dtype, weights[k], 1, rows * columns, to, rows * columns);
    }
    walk.pack(n);
}

static uint64_t next_identity(void)
{
    static uint64_t last;
    return __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
}

static void measure(host_network *n, const tritlstm_options *o)
{
    n->options = *o;
    n->item = o->dtype == TRITLSTM_FLOAT64 ? 8 : o->dtype == TRITLSTM_FLOAT32 ? 4 : 2;
    n->real = o->dtype == TRITLSTM_FLOAT64 ? sizeof(double) : sizeof(float);
    n->kernels = n->real == sizeof(double) ? (const void *)host_kernels_double() : (const void *)host_kernels_float();
    n->D = (size_t)o->input_size;
    n->H = (size_t)o->hidden_size;
    n->HX = round_up(n->H, HOST_UNITS);
    n->R = o->proj_size ? (size_t)o->proj_size : n->H;
    n->L = (size_t)o->num_layers;
    n->P = o->bidirectional ? 2 : 1;
    n->per_place = 2 + (o->bias ? 2 : 0) + (o->proj_size ? 1 : 0);
}

static void *allocate(size_t bytes)
{
    return bytes > PTRDIFF_MAX - LINE ? NULL : aligned_alloc(LINE, round_up(bytes, LINE));
}

static int host_destroy(uint64_t id)
{
    host_network *n = (host_network *)(uintptr_t)id;
    free(n->places);
    free(n->memory);
    free(n);
    return TRITLSTM_OK;
}

static int host_create(const tritlstm_options *options, const void *const *weights, const int32_t *dtypes, uint64_t *id)
{
    host_arena arena = {0};
    host_network *n = calloc(1, sizeof *n);
    if (!n) return tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    measure(n, options);
    network_parts(n, &arena, NULL);
    n->places = calloc(n->L * n->P, sizeof *n->places);
    n->memory = n->places ? allocate(arena.used) : NULL;
    if (!n->memory) {
        tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "can't allocate memory for the weights: %zu bytes", arena.used);
        host_destroy((uintptr_t)n);
        return TRITLSTM_ERROR_MEMORY;
    }
    arena = (host_arena){n->memory, 0};
    network_parts(n, &arena, n->places);
    n->identity = next_identity();
    if (weights) {
        load_weights(n, weights, dtypes);
    } else {
        host_walk walk = host_walk_of(n);
        if (options->initial_weights == TRITLSTM_WEIGHTS_UNIFORM) walk.draw(n);
        else memset(n->memory, 0, arena.used);
        walk.pack(n);
    }
    *id = (uintptr_t)n;
    return TRITLSTM_OK;
}

static int host_get_weights(uint64_t id, void *const *weights, int32_t device, void *stream)
{
    const host_network *n = (const host_network *)(uintptr_t)id;
    host_walk walk = host_walk_of(n);
    (void)device, (void)stream;
    for (size_t k = 0; k < n->L * n->P * n->per_place; k++) {
        size_t rows, columns;
        const void *from = find_weight(n, k, &rows, &columns);
        if (weights[k]) walk.store(n, from, rows * columns, 1, rows * columns, weights[k]);
    }
    return TRITLSTM_OK;
}

static int host_set_weights(uint64_t id, const void *const *weights, int32_t device, void *stream)
{
    (void)device, (void)stream;
    load_weights((const host_network *)(uintptr_t)id, weights, NULL);
    return TRITLSTM_OK;
}

/* ---- forward and backward ---------------------------------------------------------------------------- */

/* Backward compares what forward left here with its own arguments. */
typedef struct mark {
    char magic[8];
    uint64_t identity;
    int64_t steps, batch, lengths;
} mark;

static mark mark_of(const host_network *n, int64_t steps, int64_t batch, const int32_t *lengths)
{
    return (mark){{'t', 'r', 'i', 't', 'l', 's', 't', 'm'}, n->identity, steps, batch, lengths != NULL};
}

static int host_forward(uint64_t id, const tritlstm_forward_args *a)
{
    const host_network *n = (const host_network *)(uintptr_t)id;
    size_t T = (size_t)a->steps, B = (size_t)a->batch, workspace, reserve;
    host_forward_scratch s;
    host_reserve r;
    host_arena scratch = workspace_arena(a->workspace), kept = {a->reserve, 0};
    host_run run = {T, B, a->lengths, a->x, a->h0, a->c0, a->out, a->h_n, a->c_n, NULL, a->reserve ? &r : NULL};
    int status = host_sizes(id, a->steps, a->batch, a->reserve != NULL, &workspace, &reserve);
    if (status) return status;
    if (a->reserve_bytes < reserve) return too_small("reserve_bytes", a->reserve_bytes, reserve);
    if (a->workspace_bytes < workspace) return too_small("workspace_bytes", a->workspace_bytes, workspace);
    host_forward_parts(n, T, B, a->reserve != NULL, &scratch, &s);
    if (a->reserve) host_reserve_parts(n, T, B, &kept, &r);
    host_walk_of(n).forward(n, &run, &s);
    if (a->reserve) {
        mark m = mark_of(n, a->steps, a->batch, a->lengths);
        memcpy(r.mark, &m, sizeof m);
    }
    return TRITLSTM_OK;
}

static int host_backward(uint64_t id, const tritlstm_backward_args *a)
{
    const host_network *n = (const host_network *)(uintptr_t)id;
    size_t T = (size_t)a->steps, B = (size_t)a->batch, workspace, reserve;
    mark m = mark_of(n, a->steps, a->batch, a->lengths);
    host_backward_scratch s;
    host_reserve r;
    host_arena scratch = workspace_arena(a->workspace), kept = {(unsigned char *)a->reserve, 0};
    int status;
    if (a->reserve_bytes < HOST_MARK_BYTES) {
        if ((status = host_sizes(id, a->steps, a->batch, 1, &workspace, &reserve))) return status;
        return too_small("reserve_bytes", a->reserve_bytes, reserve);
    }
    if (memcmp(a->reserve, &m, sizeof m))
        return tritlstm_aot_fail(TRITLSTM_ERROR_STATE,
                                 "the reserve was not filled by a forward of this handle with the same steps, batch and "
                                 "use of lengths: pass reserve to tritlstm_forward first");
    if ((status = host_sizes(id, a->steps, a->batch, 1, &workspace, &reserve))) return status;
    if (a->reserve_bytes < reserve) return too_small("reserve_bytes", a->reserve_bytes, reserve);
    if (a->workspace_bytes < workspace) return too_small("workspace_bytes", a->workspace_bytes, workspace);
    host_backward_parts(n, T, B, &scratch, &s);
    host_reserve_parts(n, T, B, &kept, &r);
    host_walk_of(n).backward(n, a, &r, &s);
    return TRITLSTM_OK;
}

/* ---- streaming --------------------------------------------------------------------------------------- */

static int host_state_destroy(uint64_t state)
{
    free((void *)(uintptr_t)state);
    return TRITLSTM_OK;
}

static int host_state_create(uint64_t id, int64_t batch, uint64_t *state)
{
    const host_network *n = (const host_network *)(uintptr_t)id;
    host_arena arena = {0};
    host_state *s;
    unsigned char *memory;
    for (int pass = 0; pass < 2; pass++) {
        s = host_take(&arena, 1, 1, 1, sizeof *s);
        void *h = host_take(&arena, n->L, (size_t)batch, n->R, n->real);
        void *c = host_take(&arena, n->L, (size_t)batch, n->HX, n->real);
        if (pass) {
            memset(s, 0, arena.used);
            *s = (host_state){n, (size_t)batch, h, c};
            break;
        }
        if (!(memory = allocate(arena.used)))
            return tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "can't allocate memory for a state of %" PRId64 " sequences",
                                     batch);
        arena = (host_arena){memory, 0};
    }
    *state = (uintptr_t)s;
    return TRITLSTM_OK;
}

static int host_state_reset(uint64_t state, const uint8_t *rows, void *stream)
{
    host_state *s = (host_state *)(uintptr_t)state;
    const host_network *n = s->network;
    (void)stream;
    for (size_t k = 0; k < n->L * s->batch; k++) {
        if (rows && !rows[k % s->batch]) continue;
        memset((char *)s->h + k * n->R * n->real, 0, n->R * n->real);
        memset((char *)s->c + k * n->HX * n->real, 0, n->HX * n->real);
    }
    return TRITLSTM_OK;
}

static int host_state_get(uint64_t state, void *h, void *c, int32_t device, void *stream)
{
    const host_state *s = (const host_state *)(uintptr_t)state;
    const host_network *n = s->network;
    host_walk walk = host_walk_of(n);
    (void)device, (void)stream;
    if (h) walk.store(n, s->h, n->R, n->L * s->batch, n->R, h);
    if (c) walk.store(n, s->c, n->HX, n->L * s->batch, n->H, c);
    return TRITLSTM_OK;
}

static int host_state_set(uint64_t state, const void *h, const void *c, int32_t device, void *stream)
{
    const host_state *s = (const host_state *)(uintptr_t)state;
    const host_network *n = s->network;
    host_walk walk = host_walk_of(n);
    (void)device, (void)stream;
    if (h) walk.load(n, n->options.dtype, h, n->L * s->batch, n->R, s->h, n->R);
    if (c) walk.load(n, n->options.dtype, c, n->L * s->batch, n->H, s->c, n->HX);
    return TRITLSTM_OK;
}

static int host_step(uint64_t state, const void *x, void *out, void *workspace, size_t workspace_bytes, void *stream)
{
    const host_state *s = (const host_state *)(uintptr_t)state;
    const host_network *n = s->network;
    host_arena counted = {0}, arena = workspace_arena(workspace);
    host_forward_scratch scratch;
    host_run run = {.T = 1, .B = s->batch, .x = x, .out = out, .state = s};
    (void)stream;
    host_forward_parts(n, 1, s->batch, 0, &counted, &scratch);
    if (counted.used > PTRDIFF_MAX - LINE) return too_large("workspace", 1, (int64_t)s->batch);
    if (workspace_bytes < counted.used + LINE)
        return too_small("workspace_bytes", workspace_bytes, counted.used + LINE);
    host_forward_parts(n, 1, s->batch, 0, &arena, &scratch);
    host_walk_of(n).forward(n, &run, &scratch);
    return TRITLSTM_OK;
}

/* ---- what will run ----------------------------------------------------------------------------------- */

static int host_explain(uint64_t id, int64_t steps, int64_t batch, int32_t training, char *text, size_t capacity,
                        size_t *needed)
{
    static const char *const dtypes[] = {"float32", "float16", "bfloat16", "float64"};
    const host_network *n = (const host_network *)(uintptr_t)id;
    size_t workspace, reserve;
    int status = host_sizes(id, steps, batch, training, &workspace, &reserve);
    if (status) return status;
    int length = snprintf(text, capacity,
                          "engine: aot, tritlstm %s, no Python\n"
                          "dtype: %s, arithmetic in %s\n"
                          "path: host path, C on the calling thread (%s), because options.device is TRITLSTM_CPU\n"
                          "products: %s\n"
                          "memory: workspace %zu bytes, reserve %zu bytes",
                          tritlstm_version_string(), dtypes[n->options.dtype - 1],
                          n->real == sizeof(double) ? "float64" : "float32", host_walk_of(n).instructions,
                          host_products, workspace, reserve);
    if (length < 0) return tritlstm_aot_fail(TRITLSTM_ERROR_INTERNAL, "the text can't be made");
    *needed = (size_t)length + 1;
    return TRITLSTM_OK;
}

const tritlstm_engine_functions *tritlstm_host_functions(void)
{
    static const tritlstm_engine_functions functions = {
        TRITLSTM_ENGINE_INTERFACE, host_create,       host_destroy,   host_get_weights,  host_set_weights,
        host_sizes,                host_forward,      host_backward,  host_state_create, host_state_destroy,
        host_state_reset,          host_state_get,    host_state_set, host_step,         host_explain,
        NULL,
    };
    return &functions;
}
