/* SPDX-License-Identifier: MIT */
#include "cuda_plan.h"

/* Two predictions that differ by less are equal: the coefficients are rounded. */
static const double equal = 1e-9;

const char *tritlstm_cuda_kernel_name(const tritlstm_cuda_kernel *kernel)
{
    static const char *const names[KERNELS] = {"recurrent_forward", "recurrent_backward", "product",
                                               "column_sums",       "rearrange",          "take_first",
                                               "add_first",         "previous_states",    "keep_empty",
                                               "zero_ends",         "clamp_lengths"};
    return names[kernel->kind];
}

/* Machine code of 8.0 runs on 8.6 and 8.9 too; from 9.0 on it is made for one architecture alone. */
const tritlstm_cuda_family *tritlstm_cuda_family_for(int major, int minor)
{
    const tritlstm_cuda_family *found = NULL, *ptx = NULL;
    for (int k = 0; k < tritlstm_families_count; k++) {
        const tritlstm_cuda_family *family = &tritlstm_families[k];
        int later = family->major < major || (family->major == major && family->minor <= minor);
        if (family->later && later) ptx = family;
        if (family->later || family->major != major || !later || (major > 8 && family->minor != minor)) continue;
        if (!found || found->minor < family->minor) found = family;
    }
    return found ? found : ptx;
}

static int recurrent(const tritlstm_cuda_kernel *kernel)
{
    return kernel->kind == KERNEL_recurrent_forward || kernel->kind == KERNEL_recurrent_backward;
}

int tritlstm_cuda_hidden(const tritlstm_cuda_family *family, int dtype, int64_t hidden)
{
    int found = 0;
    for (int k = family->first; k < family->first + family->count; k++) {
        const tritlstm_cuda_kernel *kernel = &tritlstm_kernels[k];
        if (recurrent(kernel) && kernel->dtype == dtype && kernel->hidden >= hidden && (!found || kernel->hidden < found))
            found = kernel->hidden;
    }
    return found;
}

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* As plan.tile_rows: the batch is dealt out to all groups of blocks alike where blocks read less for fewer rows. */
int64_t tritlstm_cuda_tile_rows(const tritlstm_cuda_kernel *kernel, int sms, int64_t batch)
{
    int64_t groups = sms / kernel->n_blocks, turns, tiles;
    if (kernel->tier == TIER_single || kernel->tier == TIER_step) return kernel->columns;
    turns = divide_up(divide_up(batch, kernel->columns), groups);
    tiles = batch < groups * turns ? batch : groups * turns;
    return divide_up(batch, tiles);
}

int64_t tritlstm_cuda_tiles(const tritlstm_cuda_kernel *kernel, int sms, int64_t batch)
{
    return divide_up(batch, tritlstm_cuda_tile_rows(kernel, sms, batch));
}

int64_t tritlstm_cuda_groups(const tritlstm_cuda_kernel *kernel, int sms, int64_t batch)
{
    int64_t tiles = tritlstm_cuda_tiles(kernel, sms, batch), most = sms / kernel->n_blocks;
    return kernel->tier == TIER_step || tiles < most ? tiles : most;
}

double tritlstm_cuda_predicted(const tritlstm_cuda_kernel *kernel, const tritlstm_cuda_limits *limits, int64_t batch,
                               int one_step)
{
    const double *c = kernel->cost;
    int64_t tiles = tritlstm_cuda_tiles(kernel, limits->sms, batch);
    int64_t each = tritlstm_cuda_tile_rows(kernel, limits->sms, batch), groups = tritlstm_cuda_groups(kernel, limits->sms, batch);
    int64_t blocks = kernel->n_blocks * groups, waves = divide_up(blocks, limits->sms);
    double rows = (double)(batch < each ? batch : each);
    if (blocks > limits->sms) blocks = limits->sms;
    double q = 1 / limits->family->sm_l2_bytes_per_us, shared_q = (double)blocks / limits->family->l2_bytes_per_us;
    if (q < shared_q) q = shared_q;
    double step = c[one_step ? 0 : 1] + c[2] * rows * (double)groups +
                  (double)waves * (c[3] + c[4] * rows + q * (c[5] + c[6] * rows));
    return step * (double)divide_up(tiles, groups);
}

int tritlstm_cuda_fits(const tritlstm_cuda_kernel *kernel, const tritlstm_cuda_limits *limits)
{
    if (kernel->planned > limits->shared || kernel->shared > limits->shared) return 0;
    return !recurrent(kernel) || kernel->tier == TIER_step || kernel->n_blocks <= limits->sms;
}

/* A tile of twice the batch or more is not considered. */
static int suits(const tritlstm_cuda_kernel *kernel, int64_t batch)
{
    int64_t power = 16;
    while (power < batch) power *= 2;
    return kernel->columns <= 16 || kernel->columns < 2 * power;
}

/* Whether `a` is preferred to `b`: the order of plan._best. */
static int before(const tritlstm_cuda_kernel *a, double time_a, const tritlstm_cuda_kernel *b, double time_b)
{
    double difference = time_a - time_b, least = equal * time_b;
    if (difference < -least || difference > least) return difference < 0;
    if (a->warps != b->warps) return a->warps < b->warps;
    if (a->columns != b->columns) return a->columns < b->columns;
    return a->rows < b->rows;
}

const tritlstm_cuda_kernel *tritlstm_cuda_choose(const tritlstm_cuda_limits *limits, int kind, int dtype, int save,
                                                 int hidden, int64_t batch, int one_step)
{
    const tritlstm_cuda_family *family = limits->family;
    const tritlstm_cuda_kernel *best = NULL;
    double time = 0;
    for (int k = family->first; k < family->first + family->count; k++) {
        const tritlstm_cuda_kernel *kernel = &tritlstm_kernels[k];
        if (kernel->kind != kind || kernel->dtype != dtype || kernel->variant != save || kernel->hidden != hidden ||
            !tritlstm_cuda_fits(kernel, limits) || !suits(kernel, batch))
            continue;
        int alone = one_step && kernel->tier == TIER_step, best_alone = one_step && best && best->tier == TIER_step;
        double own = tritlstm_cuda_predicted(kernel, limits, batch, one_step);
        if (!best || alone > best_alone || (alone == best_alone && before(kernel, own, best, time))) {
            best = kernel;
            time = own;
        }
    }
    return best;
}

const tritlstm_cuda_kernel *tritlstm_cuda_find(const tritlstm_cuda_family *family, int kind, int dtype, int variant)
{
    for (int k = family->first; k < family->first + family->count; k++) {
        const tritlstm_cuda_kernel *kernel = &tritlstm_kernels[k];
        if (kernel->kind == kind && kernel->dtype == dtype && kernel->variant == variant) return kernel;
    }
    return NULL;
}
