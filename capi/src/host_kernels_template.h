/* The inner loops of host_kernels.h for one type REAL and one instruction set with vectors of VECTOR bytes.
 *
 * host_kernels.c includes this file once for each pair. A vector is a machine register, so that the accumulators of a
 * product stay in registers. */
typedef REAL NAME(vec) __attribute__((vector_size(VECTOR)));
typedef REAL NAME(loose) __attribute__((vector_size(VECTOR), aligned(sizeof(REAL)), may_alias)); /* in memory */
typedef INTEGER NAME(bits) __attribute__((vector_size(VECTOR)));

enum {
    NAME(LANES) = VECTOR / sizeof(REAL),
    NAME(WIDTH) = HOST_PANEL / sizeof(REAL), /* columns of a panel */
    NAME(PARTS) = HOST_PANEL / VECTOR,       /* vectors of a panel's row */
};

static INLINE NAME(vec) NAME(load)(const REAL *from) { return *(const NAME(loose) *)from; }
static INLINE void NAME(store)(REAL *to, NAME(vec) value) { *(NAME(loose) *)to = value; }

/* ---- products ---------------------------------------------------------------------------------------- */

/* `rows` (a constant where this is called) rows of C in one panel: every accumulator in a register. */
static INLINE void NAME(tile)(size_t rows, size_t depth, const REAL *a, size_t a_row, size_t a_col, const REAL *b,
                              REAL *c, size_t c_row, int add)
{
    NAME(vec) sum[ROWS][NAME(PARTS)];
    UNROLL
    for (size_t m = 0; m < rows; m++) {
        UNROLL
        for (size_t v = 0; v < NAME(PARTS); v++) sum[m][v] = (NAME(vec)){0};
    }
    for (size_t k = 0; k < depth; k++) {
        NAME(vec) w[NAME(PARTS)];
        UNROLL
        for (size_t v = 0; v < NAME(PARTS); v++) w[v] = NAME(load)(b + k * NAME(WIDTH) + v * NAME(LANES));
        UNROLL
        for (size_t m = 0; m < rows; m++) {
            REAL value = a[m * a_row + k * a_col];
            UNROLL
            for (size_t v = 0; v < NAME(PARTS); v++) sum[m][v] += value * w[v];
        }
    }
    UNROLL
    for (size_t m = 0; m < rows; m++) {
        UNROLL
        for (size_t v = 0; v < NAME(PARTS); v++) {
            REAL *at = c + m * c_row + v * NAME(LANES);
            NAME(store)(at, add ? NAME(load)(at) + sum[m][v] : sum[m][v]);
        }
    }
}

/* One row of C: several steps of k at once, or each would wait for the addition before it. */
static INLINE void NAME(row)(size_t depth, const REAL *a, size_t a_col, const REAL *b, REAL *c, int add)
{
    enum { CHAINS = 8 / NAME(PARTS) };
    NAME(vec) sum[CHAINS][NAME(PARTS)];
    size_t k = 0;
    UNROLL
    for (size_t n = 0; n < CHAINS; n++) {
        UNROLL
        for (size_t v = 0; v < NAME(PARTS); v++) sum[n][v] = (NAME(vec)){0};
    }
    for (; k + CHAINS <= depth; k += CHAINS) {
        UNROLL
        for (size_t n = 0; n < CHAINS; n++) {
            REAL value = a[(k + n) * a_col];
            UNROLL
            for (size_t v = 0; v < NAME(PARTS); v++)
                sum[n][v] += value * NAME(load)(b + (k + n) * NAME(WIDTH) + v * NAME(LANES));
        }
    }
    for (; k < depth; k++) {
        REAL value = a[k * a_col];
        UNROLL
        for (size_t v = 0; v < NAME(PARTS); v++)
            sum[0][v] += value * NAME(load)(b + k * NAME(WIDTH) + v * NAME(LANES));
    }
    UNROLL
    for (size_t v = 0; v < NAME(PARTS); v++) {
        NAME(vec) total = sum[0][v];
        UNROLL
        for (size_t n = 1; n < CHAINS; n++) total += sum[n][v];
        NAME(store)(c + v * NAME(LANES), add ? NAME(load)(c + v * NAME(LANES)) + total : total);
    }
}

/* All rows of C in one panel. */
static void NAME(panel)(size_t rows, size_t depth, const REAL *a, size_t a_row, size_t a_col, const REAL *b, REAL *c,
                        size_t c_row, int add)
{
    size_t m = 0;
    for (; m + ROWS <= rows; m += ROWS) NAME(tile)(ROWS, depth, a + m * a_row, a_row, a_col, b, c + m * c_row, c_row, add);
    if (ROWS > 4 && m + 4 <= rows) {
        NAME(tile)(ROWS > 4 ? 4 : 1, depth, a + m * a_row, a_row, a_col, b, c + m * c_row, c_row, add);
        m += 4;
    }
    if (ROWS > 2 && m + 2 <= rows) {
        NAME(tile)(ROWS > 2 ? 2 : 1, depth, a + m * a_row, a_row, a_col, b, c + m * c_row, c_row, add);
        m += 2;
    }
    for (; m < rows; m++) NAME(row)(depth, a + m * a_row, a_col, b, c + m * c_row, add);
}

static void NAME(pack)(size_t depth, size_t width, const REAL *b, size_t b_row, REAL *packed)
{
    for (size_t k = 0; k < depth; k++) {
        memcpy(packed + k * NAME(WIDTH), b + k * b_row, width * sizeof(REAL));
        if (width < NAME(WIDTH))
            memset(packed + k * NAME(WIDTH) + width, 0, (NAME(WIDTH) - width) * sizeof(REAL));
    }
}

/* Blocks of M and K such that a block of A stays in the second-level cache and a panel's in the first. */
static void NAME(product)(const TYPED(product) *p)
{
    enum { M_BLOCK = 192, K_BLOCK = 256 };
    _Alignas(64) REAL packed[K_BLOCK * NAME(WIDTH)], edge[M_BLOCK * NAME(WIDTH)];
    if (!p->k && !p->add)
        for (size_t m = 0; m < p->m; m++) memset(p->c + m * p->c_row, 0, p->n * sizeof(REAL));
    for (size_t m = 0; m < p->m; m += M_BLOCK) {
        size_t rows = p->m - m < M_BLOCK ? p->m - m : M_BLOCK;
        for (size_t k = 0; k < p->k; k += K_BLOCK) {
            size_t depth = p->k - k < K_BLOCK ? p->k - k : K_BLOCK;
            const REAL *a = p->a + m * p->a_row + k * p->a_col;
            int add = p->add || k;
            for (size_t n = 0; n < p->n; n += NAME(WIDTH)) {
                size_t width = p->n - n < NAME(WIDTH) ? p->n - n : NAME(WIDTH);
                const REAL *b = p->b + n * p->k + k * NAME(WIDTH);
                REAL *c = p->c + m * p->c_row + n;
                if (p->b_row) {
                    NAME(pack)(depth, width, p->b + k * p->b_row + n, p->b_row, packed);
                    b = packed;
                }
                if (width == NAME(WIDTH)) {
                    NAME(panel)(rows, depth, a, p->a_row, p->a_col, b, c, p->c_row, add);
                    continue;
                }
                NAME(panel)(rows, depth, a, p->a_row, p->a_col, b, edge, NAME(WIDTH), 0);
                for (size_t r = 0; r < rows; r++)
                    for (size_t j = 0; j < width; j++) {
                        REAL *at = c + r * p->c_row + j;
                        *at = edge[r * NAME(WIDTH) + j] + (add ? *at : 0);
                    }
            }
        }
    }
}

/* ---- the cell ---------------------------------------------------------------------------------------- */

/* Where mask, a; elsewhere b. A NaN compares false, so it comes out of the clamps below as it is. */
static INLINE NAME(vec) NAME(choose)(NAME(bits) mask, NAME(vec) a, NAME(vec) b)
{
    return (NAME(vec))((mask & (NAME(bits))a) | (~mask & (NAME(bits))b));
}

/* exp(x) - 1 = scale * p + (scale - (REAL)1): x = n ln 2 + r, scale = 2^n, p the Taylor sum of exp(r) - 1 for
 * |r| <= ln 2 / 2, cut where the next term is below a tenth of a rounding. */
static INLINE NAME(vec) NAME(exponential)(NAME(vec) x, NAME(vec) *scale)
{
    NAME(vec) shifted = x * LOG2_E + SHIFT, n = shifted - SHIFT; /* the integer stands in shifted's last bits */
    NAME(vec) r = x - n * LN2_HIGH - n * LN2_LOW;
    NAME(vec) q = (NAME(vec)){0} + (REAL)(1.0 / FACTORIAL);
    static const REAL inverse[] = {INVERSE_FACTORIALS};
    UNROLL
    for (size_t k = 0; k < sizeof inverse / sizeof *inverse; k++) q = q * r + inverse[k];
    *scale = (NAME(vec))(((NAME(bits))shifted + BIAS) << MANTISSA);
    return r + r * (r * q);
}

static INLINE NAME(vec) NAME(sigmoid)(NAME(vec) x)
{
    NAME(vec) scale, minus = -x, p;
    minus = NAME(choose)((NAME(bits))(minus > LARGEST), (NAME(vec)){0} + LARGEST, minus);
    minus = NAME(choose)((NAME(bits))(minus < -LARGEST), (NAME(vec)){0} - LARGEST, minus);
    p = NAME(exponential)(minus, &scale);
    return (REAL)1 / ((REAL)1 + (scale + scale * p));
}

/* tanh |x| = e / (e + 2) with e = exp(2 |x|) - 1, accurate near 0 too; then the sign. */
static INLINE NAME(vec) NAME(tangent)(NAME(vec) x)
{
    NAME(bits) sign = (NAME(bits))x & ((NAME(bits)){0} + SIGN);
    NAME(vec) scale, twice = (NAME(vec))((NAME(bits))x ^ sign) * (REAL)2, p;
    twice = NAME(choose)((NAME(bits))(twice > SATURATED), (NAME(vec)){0} + SATURATED, twice);
    p = NAME(exponential)(twice, &scale);
    p = scale * p + (scale - (REAL)1);
    return (NAME(vec))((NAME(bits))(p / (p + (REAL)2)) | sign);
}

static void NAME(cell)(size_t units, REAL *gates, REAL *c, REAL *h)
{
    for (size_t u = 0; u < units; u += NAME(LANES)) {
        NAME(vec) i = NAME(sigmoid)(NAME(load)(gates + u)), f = NAME(sigmoid)(NAME(load)(gates + units + u));
        NAME(vec) g = NAME(tangent)(NAME(load)(gates + 2 * units + u));
        NAME(vec) o = NAME(sigmoid)(NAME(load)(gates + 3 * units + u));
        NAME(vec) cell = f * NAME(load)(c + u) + i * g;
        NAME(store)(gates + u, i);
        NAME(store)(gates + units + u, f);
        NAME(store)(gates + 2 * units + u, g);
        NAME(store)(gates + 3 * units + u, o);
        NAME(store)(c + u, cell);
        NAME(store)(h + u, o * NAME(tangent)(cell));
    }
}

static void NAME(cell_backward)(size_t units, const REAL *gates, const REAL *c, const REAL *c_before,
                                const REAL *grad_h, REAL *grad_c, REAL *grad_gates)
{
    for (size_t u = 0; u < units; u += NAME(LANES)) {
        NAME(vec) i = NAME(load)(gates + u), f = NAME(load)(gates + units + u);
        NAME(vec) g = NAME(load)(gates + 2 * units + u), o = NAME(load)(gates + 3 * units + u);
        NAME(vec) shown = NAME(tangent)(NAME(load)(c + u)), dh = NAME(load)(grad_h + u);
        NAME(vec) dc = NAME(load)(grad_c + u) + dh * o * ((REAL)1 - shown * shown);
        NAME(store)(grad_gates + u, dc * g * i * ((REAL)1 - i));
        NAME(store)(grad_gates + units + u, dc * NAME(load)(c_before + u) * f * ((REAL)1 - f));
        NAME(store)(grad_gates + 2 * units + u, dc * i * ((REAL)1 - g * g));
        NAME(store)(grad_gates + 3 * units + u, dh * shown * o * ((REAL)1 - o));
        NAME(store)(grad_c + u, dc * f);
    }
}

static void NAME(show)(size_t units, const REAL *gates, const REAL *c, REAL *h)
{
    for (size_t u = 0; u < units; u += NAME(LANES))
        NAME(store)(h + u, NAME(load)(gates + 3 * units + u) * NAME(tangent)(NAME(load)(c + u)));
}

static const TYPED(kernels) NAME(table) = {INSTRUCTIONS, NAME(product), NAME(cell), NAME(cell_backward), NAME(show)};
