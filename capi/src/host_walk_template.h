/* Forward and backward of the host path for one type REAL, float or double; host_walk.c includes this file twice.
 *
 * One layer and direction after another. The input product of many steps is made at once, then the walk over the steps
 * adds the recurrent one; on the way back the walk makes the gradients of the gates, and the products over all steps
 * follow it. Times are T, sequences B; `row` is t * B + b. */
#define KERNELS ((const TYPED(kernels) *)n->kernels)

/* ---- conversions ------------------------------------------------------------------------------------- */

static void NAME(load)(const host_network *n, int32_t dtype, const void *from, size_t rows, size_t width, void *to,
                       size_t to_row)
{
    size_t item = dtype == TRITLSTM_FLOAT64 ? 8 : dtype == TRITLSTM_FLOAT32 ? 4 : 2;
    for (size_t k = 0; k < rows; k++) {
        REAL *row = (REAL *)to + k * to_row;
        TYPED(host_load)(dtype, (const char *)from + k * width * item, width, row);
        if (dtype != n->options.dtype) TYPED(host_round)(n->options.dtype, row, width);
        memset(row + width, 0, (to_row - width) * sizeof *row);
    }
}

static void NAME(store)(const host_network *n, const void *from, size_t from_row, size_t rows, size_t width, void *to)
{
    for (size_t k = 0; k < rows; k++)
        TYPED(host_store)(n->options.dtype, (const REAL *)from + k * from_row, width, (char *)to + k * width * n->item);
}

/* Rows `begin` ... of a state [L * P, B, width] in the caller's dtype, or zeros. */
static void NAME(load_state)(const host_network *n, const void *from, size_t begin, size_t rows, size_t width, void *to,
                             size_t to_row)
{
    if (from) NAME(load)(n, n->options.dtype, (const char *)from + begin * width * n->item, rows, width, to, to_row);
    else memset(to, 0, rows * to_row * sizeof(REAL));
}

/* Where the caller's x or out has step t of sequence b. */
static size_t NAME(caller_row)(const host_network *n, size_t T, size_t B, size_t t, size_t b)
{
    return n->options.batch_first ? b * T + t : t * B + b;
}

/* Steps of the caller's [T, B, width] or [B, T, width], from `begin` on; zeros where a sequence has ended, if `cut`. */
static void NAME(gather)(const host_network *n, const void *from, size_t T, size_t B, size_t begin, size_t steps,
                         size_t width, const int32_t *cut, REAL *to)
{
    for (size_t t = begin; t < begin + steps; t++)
        for (size_t b = 0; b < B; b++, to += width) {
            if (cut && t >= (size_t)cut[b]) memset(to, 0, width * sizeof *to);
            else
                TYPED(host_load)(n->options.dtype,
                                 (const char *)from + NAME(caller_row)(n, T, B, t, b) * width * n->item, width, to);
        }
}

/* ---- products ---------------------------------------------------------------------------------------- */

/* C = A B or C += A B, B in rows: by the CBLAS if there is one. */
static void NAME(product)(const host_network *n, TYPED(product) p)
{
#ifdef TRITLSTM_CBLAS
    size_t lda = p.a_col == 1 ? p.a_row : p.a_col, limit = INT_MAX;
    if (lda && p.m <= limit && p.n <= limit && p.k <= limit && lda <= limit && p.b_row <= limit && p.c_row <= limit) {
        int transposed = p.a_col == 1 ? CBLAS_NO_TRANS : CBLAS_TRANS;
        GEMM(CBLAS_ROW_MAJOR, transposed, CBLAS_NO_TRANS, (int)p.m, (int)p.n, (int)p.k, 1, p.a, (int)lda, p.b,
             (int)p.b_row, p.add ? 1 : 0, p.c, (int)p.c_row);
        return;
    }
#endif
    KERNELS->product(&p);
}

/* gates [rows, 4HX] += a [rows, depth] w^T, for w [4H, depth] and the same packed. */
static void NAME(gate_product)(const host_network *n, size_t rows, size_t depth, const REAL *a, const void *w,
                               const void *packed, REAL *gates)
{
    size_t N = 4 * n->HX;
#ifdef TRITLSTM_CBLAS
    if (rows >= CBLAS_ROWS && rows <= INT_MAX && n->H <= INT_MAX && depth <= INT_MAX && N <= INT_MAX) {
        for (size_t gate = 0; gate < 4; gate++)
            GEMM(CBLAS_ROW_MAJOR, CBLAS_NO_TRANS, CBLAS_TRANS, (int)rows, (int)n->H, (int)depth, 1, a, (int)depth,
                 (const REAL *)w + gate * n->H * depth, (int)depth, 1, gates + gate * n->HX, (int)N);
        return;
    }
#endif
    (void)w;
    KERNELS->product(&(TYPED(product)){rows, N, depth, a, depth, 1, packed, 0, gates, N, 1});
}

/* The panels of host_kernels.h for the matrix B [depth, columns] whose element (k, j) is w[k * w_row + j * w_col]. */
static void NAME(pack)(REAL *packed, const REAL *w, size_t depth, size_t columns, size_t w_row, size_t w_col)
{
    size_t width = HOST_PANEL / sizeof(REAL);
    for (size_t j = 0; j < columns; j += width)
        for (size_t k = 0; k < depth; k++)
            for (size_t v = 0; v < width; v++)
                *packed++ = j + v < columns ? w[k * w_row + (j + v) * w_col] : 0;
}

/* The same for w^T of a stacked w [4H, depth]: column g * HX + u is row g * H + u of w. */
static void NAME(pack_gates)(const host_network *n, REAL *packed, const REAL *w, size_t depth)
{
    size_t width = HOST_PANEL / sizeof(REAL);
    for (size_t j = 0; j < 4 * n->HX; j += width)
        for (size_t k = 0; k < depth; k++)
            for (size_t v = 0; v < width; v++) {
                size_t gate = (j + v) / n->HX, unit = (j + v) % n->HX;
                *packed++ = unit < n->H ? w[(gate * n->H + unit) * depth + k] : 0;
            }
}

static void NAME(pack_network)(const host_network *n)
{
    for (size_t k = 0; k < n->L * n->P; k++) {
        const host_place *place = &n->places[k];
        REAL *bias = place->bias;
        const REAL *b_ih = place->b_ih, *b_hh = place->b_hh;
        NAME(pack_gates)(n, place->packed_ih, place->w_ih, k < n->P ? n->D : n->P * n->R);
        NAME(pack_gates)(n, place->packed_hh, place->w_hh, n->R);
        if (place->w_hr) NAME(pack)(place->packed_hr, place->w_hr, n->H, n->R, 1, n->H);
        for (size_t j = 0; j < 4 * n->HX; j++) {
            size_t gate = j / n->HX, unit = j % n->HX;
            bias[j] = b_ih && unit < n->H ? b_ih[gate * n->H + unit] + b_hh[gate * n->H + unit] : 0;
        }
    }
}

/* Uniform in (-1/sqrt(H), 1/sqrt(H)), the weights one after another. */
static void NAME(draw)(const host_network *n)
{
    host_random random;
    double bound = 1 / sqrt((double)n->H);
    host_random_seed(&random, n->options.seed);
    for (size_t k = 0; k < n->L * n->P; k++) {
        const host_place *place = &n->places[k];
        size_t width = k < n->P ? n->D : n->P * n->R;
        TYPED(host_random_uniform)(&random, n->options.dtype, bound, 4 * n->H * width, place->w_ih);
        TYPED(host_random_uniform)(&random, n->options.dtype, bound, 4 * n->H * n->R, place->w_hh);
        if (place->b_ih) {
            TYPED(host_random_uniform)(&random, n->options.dtype, bound, 4 * n->H, place->b_ih);
            TYPED(host_random_uniform)(&random, n->options.dtype, bound, 4 * n->H, place->b_hh);
        }
        if (place->w_hr) TYPED(host_random_uniform)(&random, n->options.dtype, bound, n->R * n->H, place->w_hr);
    }
}

/* ---- forward ----------------------------------------------------------------------------------------- */

typedef struct NAME(layer) {
    size_t place, p;
    const REAL *input; /* [T, B, width]; NULL: the caller's x */
    size_t width;
    REAL *h, *c;       /* [B, R], [B, HX]: before the first step, then after the last */
    REAL *gates;       /* [T, B, 4HX] to keep, or NULL */
    REAL *cells;       /* [T, B, HX] to keep, or NULL */
    REAL *output;      /* [T, B, P * R] for the next layer or for backward, or NULL */
    int top;           /* writes the caller's out */
} NAME(layer);

/* One sequence's h of step t to where it is wanted; NULL: the sequence has ended. */
static void NAME(emit)(const host_network *n, const host_run *run, const NAME(layer) *l, size_t t, size_t b,
                       const REAL *h)
{
    size_t wide = n->P * n->R, at = l->p * n->R;
    if (l->output) {
        REAL *to = l->output + (t * run->B + b) * wide + at;
        if (h) memcpy(to, h, n->R * sizeof *h);
        else memset(to, 0, n->R * sizeof *h);
    }
    if (l->top) {
        char *to = (char *)run->out + (NAME(caller_row)(n, run->T, run->B, t, b) * wide + at) * n->item;
        if (h) TYPED(host_store)(n->options.dtype, h, n->R, to);
        else memset(to, 0, n->R * n->item);
    }
}

static void NAME(step)(const host_network *n, const host_run *run, const host_forward_scratch *s,
                       const NAME(layer) *l, size_t t, REAL *gates)
{
    const host_place *place = &n->places[l->place];
    size_t B = run->B, N = 4 * n->HX, new_row = place->w_hr ? n->R : n->HX;
    REAL *shown = s->shown, *new = place->w_hr ? s->projected : shown;
    NAME(gate_product)(n, B, n->R, l->h, place->w_hh, place->packed_hh, gates);
    for (size_t b = 0; b < B; b++)
        if (!run->lengths || t < (size_t)run->lengths[b])
            KERNELS->cell(n->HX, gates + b * N, l->c + b * n->HX, shown + b * n->HX);
    if (place->w_hr)
        KERNELS->product(&(TYPED(product)){B, n->R, n->H, shown, n->HX, 1, place->packed_hr, 0, new, n->R, 0});
    for (size_t b = 0; b < B; b++) {
        if (run->lengths && t >= (size_t)run->lengths[b]) {
            NAME(emit)(n, run, l, t, b, NULL);
            continue;
        }
        TYPED(host_round)(n->options.dtype, new + b * new_row, n->R);
        memcpy(l->h + b * n->R, new + b * new_row, n->R * sizeof *new);
        NAME(emit)(n, run, l, t, b, new + b * new_row);
    }
    if (l->cells) memcpy(l->cells + t * B * n->HX, l->c, B * n->HX * sizeof *l->c);
}

static void NAME(run_layer)(const host_network *n, const host_run *run, const host_forward_scratch *s,
                            const NAME(layer) *l)
{
    const host_place *place = &n->places[l->place];
    size_t T = run->T, B = run->B, N = 4 * n->HX;
    memset(s->shown, 0, B * n->HX * sizeof(REAL));
    for (size_t done = 0; done < T; done += s->steps) {
        size_t steps = T - done < s->steps ? T - done : s->steps, begin = l->p ? T - done - steps : done;
        REAL *gates = l->gates ? l->gates + begin * B * N : s->gates;
        const REAL *input = l->input ? l->input + begin * B * l->width : s->x;
        if (!l->input) NAME(gather)(n, run->x, T, B, begin, steps, l->width, NULL, s->x);
        for (size_t k = 0; k < steps * B; k++) memcpy(gates + k * N, place->bias, N * sizeof *gates);
        NAME(gate_product)(n, steps * B, l->width, input, place->w_ih, place->packed_ih, gates);
        for (size_t k = 0; k < steps; k++) {
            size_t inside = l->p ? steps - 1 - k : k;
            NAME(step)(n, run, s, l, begin + inside, gates + inside * B * N);
        }
    }
}

static void NAME(forward)(const host_network *n, const host_run *run, const host_forward_scratch *s)
{
    size_t T = run->T, B = run->B, wide = n->P * n->R;
    const host_reserve *r = run->reserve;
    for (size_t place = 0; place < n->L * n->P; place++) {
        size_t l = place / n->P, rows = T * B;
        NAME(layer) layer = {.place = place, .p = place % n->P, .width = l ? wide : n->D, .top = l + 1 == n->L};
        if (r) {
            REAL *outputs = r->h;
            layer.gates = (REAL *)r->gates + place * rows * 4 * n->HX;
            layer.cells = (REAL *)r->cells + place * rows * n->HX;
            layer.output = outputs + l * rows * wide;
            layer.input = l ? outputs + (l - 1) * rows * wide : NULL;
        } else {
            layer.output = layer.top ? NULL : s->outs[l % 2];
            layer.input = l ? s->outs[(l - 1) % 2] : NULL;
        }
        if (run->state) {
            layer.h = (REAL *)run->state->h + place * B * n->R;
            layer.c = (REAL *)run->state->c + place * B * n->HX;
            NAME(run_layer)(n, run, s, &layer);
            continue;
        }
        layer.h = s->h;
        layer.c = s->c;
        NAME(load_state)(n, run->h0, place * B, B, n->R, layer.h, n->R);
        NAME(load_state)(n, run->c0, place * B, B, n->H, layer.c, n->HX);
        NAME(run_layer)(n, run, s, &layer);
        if (run->h_n) NAME(store)(n, layer.h, n->R, B, n->R, (char *)run->h_n + place * B * n->R * n->item);
        if (run->c_n) NAME(store)(n, layer.c, n->HX, B, n->H, (char *)run->c_n + place * B * n->H * n->item);
    }
}

/* ---- backward ---------------------------------------------------------------------------------------- */

typedef struct NAME(way_back) {
    const tritlstm_backward_args *a;
    const host_backward_scratch *s;
    size_t place, p, T, B;
    const REAL *input;  /* [T, B, width] */
    size_t width;
    const REAL *output; /* [T, B, P * R] */
    const REAL *gates;  /* [T, B, 4HX] */
    const REAL *cells;  /* [T, B, HX] */
    const REAL *grad_output; /* [T, B, P * R] */
    REAL *grad_input;        /* [T, B, width], or NULL; direction 0 writes, direction 1 adds */
} NAME(way_back);

static int NAME(ended)(const NAME(way_back) *w, size_t t, size_t b)
{
    return w->a->lengths && t >= (size_t)w->a->lengths[b];
}

/* Gradients of the gates of step t from those of its h and c, which become those of the step before in time. */
static void NAME(step_back)(const host_network *n, const NAME(way_back) *w, size_t t)
{
    const host_backward_scratch *s = w->s;
    const host_place *place = &n->places[w->place];
    size_t B = w->B, HX = n->HX, N = 4 * HX, wide = n->P * n->R;
    REAL *grad_h = s->grad_h, *next = s->grad_h_next, *grad_shown = s->grad_shown;
    REAL *grad_gates = (REAL *)s->grad_gates + t * B * N;
    REAL *total = place->w_hr ? (REAL *)s->grad_h_all + t * B * n->R : grad_shown;
    size_t total_row = place->w_hr ? n->R : HX;
    int at_start = w->p ? t + 1 == w->T : t == 0;
    const REAL *before = at_start ? s->c0 : w->cells + (w->p ? t + 1 : t - 1) * B * HX;
    for (size_t b = 0; b < B; b++) {
        const REAL *given = w->grad_output + (t * B + b) * wide + w->p * n->R;
        for (size_t u = 0; u < n->R; u++)
            total[b * total_row + u] = NAME(ended)(w, t, b) ? 0 : grad_h[b * n->R + u] + given[u];
    }
    if (place->w_hr)
        KERNELS->product(&(TYPED(product)){B, n->H, n->R, total, n->R, 1, s->packed_hr, 0, grad_shown, HX, 0});
    for (size_t b = 0; b < B; b++) {
        size_t row = t * B + b;
        REAL *shown = place->w_hr ? (REAL *)s->shown_all + row * HX : NULL;
        if (NAME(ended)(w, t, b)) {
            memset(grad_gates + b * N, 0, N * sizeof *grad_gates);
            if (shown) memset(shown, 0, HX * sizeof *shown);
            continue;
        }
        KERNELS->cell_backward(HX, w->gates + row * N, w->cells + row * HX, before + b * HX, grad_shown + b * HX,
                               (REAL *)s->grad_c + b * HX, grad_gates + b * N);
        if (shown) KERNELS->show(HX, w->gates + row * N, w->cells + row * HX, shown);
    }
    KERNELS->product(&(TYPED(product)){B, n->R, N, grad_gates, N, 1, s->packed_hh, 0, next, n->R, 0});
    for (size_t b = 0; b < B; b++)
        if (!NAME(ended)(w, t, b)) memcpy(grad_h + b * n->R, next + b * n->R, n->R * sizeof *next);
}

/* grad_gates of the step that each sequence begins with; zeros for a sequence of no steps. */
static void NAME(take_first)(const host_network *n, const NAME(way_back) *w)
{
    size_t N = 4 * n->HX;
    for (size_t b = 0; b < w->B; b++) {
        size_t length = w->a->lengths ? (size_t)w->a->lengths[b] : w->T, t = w->p && length ? length - 1 : 0;
        memcpy((REAL *)w->s->first + b * N, (const REAL *)w->s->grad_gates + (t * w->B + b) * N, N * sizeof(REAL));
    }
}

/* grad_weight [4H, width] = (added to, if `add`) grad_gates^T [4H, rows] b [rows, width]. */
static void NAME(weight_product)(const host_network *n, size_t rows, const REAL *grad_gates, const REAL *b, size_t width,
                                 size_t b_row, int add, REAL *grad_weight)
{
    size_t N = 4 * n->HX;
    for (size_t gate = 0; gate < 4; gate++)
        NAME(product)(n, (TYPED(product)){n->H, width, rows, grad_gates + gate * n->HX, 1, N, b, b_row,
                                          grad_weight + gate * n->H * width, width, add});
}

/* The gradients of this layer and direction's weights that are wanted. */
static void NAME(weight_gradients)(const host_network *n, const NAME(way_back) *w)
{
    const host_backward_scratch *s = w->s;
    size_t T = w->T, B = w->B, N = 4 * n->HX, rows = T * B, wide = n->P * n->R, item = n->item;
    void *const *wanted = w->a->grad_weights ? w->a->grad_weights + w->place * n->per_place : NULL;
    const REAL *grad_gates = s->grad_gates, one = 1;
    REAL *sum = s->grad_weight;
    if (!wanted) return;
    if (wanted[0]) {
        NAME(weight_product)(n, rows, grad_gates, w->input, w->width, w->width, 0, sum);
        NAME(store)(n, sum, w->width, 4 * n->H, w->width, wanted[0]);
    }
    if (wanted[1]) { /* the h before a step is h0 or the output of the step before */
        NAME(take_first)(n, w);
        NAME(weight_product)(n, B, s->first, s->h0, n->R, n->R, 0, sum);
        if (T > 1)
            NAME(weight_product)(n, rows - B, w->p ? grad_gates : grad_gates + B * N,
                                 w->output + w->p * (n->R + B * wide), n->R, wide, 1, sum);
        NAME(store)(n, sum, n->R, 4 * n->H, n->R, wanted[1]);
    }
    if (n->options.bias && (wanted[2] || wanted[3])) {
        KERNELS->product(&(TYPED(product)){1, N, rows, &one, 0, 0, grad_gates, N, sum, N, 0});
        for (size_t k = 2; k < 4; k++)
            for (size_t gate = 0; gate < 4 && wanted[k]; gate++)
                NAME(store)(n, sum + gate * n->HX, n->H, 1, n->H, (char *)wanted[k] + gate * n->H * item);
    }
    if (n->options.proj_size && wanted[n->per_place - 1]) {
        NAME(product)(n, (TYPED(product)){n->R, n->H, rows, s->grad_h_all, 1, n->R, s->shown_all, n->HX, sum, n->H, 0});
        NAME(store)(n, sum, n->H, n->R, n->H, wanted[n->per_place - 1]);
    }
}

static void NAME(layer_back)(const host_network *n, const NAME(way_back) *w)
{
    const host_backward_scratch *s = w->s;
    const tritlstm_backward_args *a = w->a;
    const host_place *place = &n->places[w->place];
    size_t T = w->T, B = w->B, HX = n->HX, width = HOST_PANEL / sizeof(REAL), state = w->place * B;
    NAME(load_state)(n, a->h0, state, B, n->R, s->h0, n->R);
    NAME(load_state)(n, a->c0, state, B, n->H, s->c0, HX);
    NAME(load_state)(n, a->grad_h_n, state, B, n->R, s->grad_h, n->R);
    NAME(load_state)(n, a->grad_c_n, state, B, n->H, s->grad_c, HX);
    memset(s->grad_shown, 0, B * HX * sizeof(REAL));
    REAL *packed = s->packed_hh;
    for (size_t j = 0; j < n->R; j += width) /* the units of a gate, then zeros up to HX */
        for (size_t k = 0; k < 4 * HX; k++)
            for (size_t v = 0; v < width; v++) {
                size_t gate = k / HX, unit = k % HX;
                *packed++ = unit < n->H && j + v < n->R
                                ? ((const REAL *)place->w_hh)[(gate * n->H + unit) * n->R + j + v]
                                : 0;
            }
    if (place->w_hr) NAME(pack)(s->packed_hr, place->w_hr, n->R, n->H, n->H, 1);
    for (size_t k = 0; k < T; k++) NAME(step_back)(n, w, w->p ? k : T - 1 - k);

    NAME(weight_gradients)(n, w);
    for (size_t gate = 0; gate < 4 && w->grad_input; gate++)
        NAME(product)(n, (TYPED(product)){T * B, w->width, n->H, (const REAL *)s->grad_gates + gate * HX, 4 * HX, 1,
                                          (const REAL *)place->w_ih + gate * n->H * w->width, w->width, w->grad_input,
                                          w->width, gate || w->p});
    if (a->grad_h0) NAME(store)(n, s->grad_h, n->R, B, n->R, (char *)a->grad_h0 + state * n->R * n->item);
    if (a->grad_c0) NAME(store)(n, s->grad_c, HX, B, n->H, (char *)a->grad_c0 + state * n->H * n->item);
}

static void NAME(backward)(const host_network *n, const tritlstm_backward_args *a, const host_reserve *r,
                           const host_backward_scratch *s)
{
    size_t T = (size_t)a->steps, B = (size_t)a->batch, rows = T * B, wide = n->P * n->R;
    REAL *grad = s->grads[0], *below = s->grads[1];
    if (a->grad_out) NAME(gather)(n, a->grad_out, T, B, 0, T, wide, NULL, grad);
    else memset(grad, 0, rows * wide * sizeof *grad);
    NAME(gather)(n, a->x, T, B, 0, T, n->D, a->lengths, s->x);
    for (size_t l = n->L; l-- > 0;) {
        for (size_t p = 0; p < n->P; p++) {
            size_t place = l * n->P + p;
            NAME(way_back) way = {.a = a, .s = s, .place = place, .p = p, .T = T, .B = B};
            const REAL *outputs = r->h;
            way.width = l ? wide : n->D;
            way.input = l ? outputs + (l - 1) * rows * wide : s->x;
            way.output = outputs + l * rows * wide;
            way.gates = (const REAL *)r->gates + place * rows * 4 * n->HX;
            way.cells = (const REAL *)r->cells + place * rows * n->HX;
            way.grad_output = grad;
            way.grad_input = l || a->grad_x ? below : NULL;
            NAME(layer_back)(n, &way);
        }
        REAL *swap = grad;
        grad = below;
        below = swap;
    }
    for (size_t t = 0; t < T && a->grad_x; t++)
        for (size_t b = 0; b < B; b++)
            TYPED(host_store)(n->options.dtype, grad + (t * B + b) * n->D, n->D,
                              (char *)a->grad_x + NAME(caller_row)(n, T, B, t, b) * n->D * n->item);
}

#undef KERNELS
