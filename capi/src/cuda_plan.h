/* Which kernels run on a device: the choice of tritlstm/plan.py among those that the library has. */
#ifndef TRITLSTM_CUDA_PLAN_H
#define TRITLSTM_CUDA_PLAN_H

#include "cuda_kernels.h"

/* What the choice depends on. */
typedef struct tritlstm_cuda_limits {
    const tritlstm_cuda_family *family;
    int sms;
    int64_t shared; /* bytes a block can have */
} tritlstm_cuda_limits;

/* The kernels for a device of this compute capability: machine code of its architecture, else PTX; NULL if there is neither. */
const tritlstm_cuda_family *tritlstm_cuda_family_for(int major, int minor);

/* The smallest hidden size >= `hidden` that the family has kernels for; 0 if there is none. */
int tritlstm_cuda_hidden(const tritlstm_cuda_family *family, int dtype, int64_t hidden);

/* Groups that share the batch tiles: tile g is of group g modulo this many. */
/* Sequences of a batch tile, how many tiles there are, and how many of them are walked at the same time. */
int64_t tritlstm_cuda_tile_rows(const tritlstm_cuda_kernel *kernel, int sms, int64_t batch);
int64_t tritlstm_cuda_tiles(const tritlstm_cuda_kernel *kernel, int sms, int64_t batch);
int64_t tritlstm_cuda_groups(const tritlstm_cuda_kernel *kernel, int sms, int64_t batch);

/* µs of a step of the whole batch, as the planner predicts. */
double tritlstm_cuda_predicted(const tritlstm_cuda_kernel *kernel, const tritlstm_cuda_limits *limits, int64_t batch,
                               int one_step);

/* 1 if a kernel runs on the device at all. */
int tritlstm_cuda_fits(const tritlstm_cuda_kernel *kernel, const tritlstm_cuda_limits *limits);

/* The kernel predicted to be the fastest; a single step runs in the step tier. `hidden` is one that kernels are built for.
 * NULL: none fits the device. */
const tritlstm_cuda_kernel *tritlstm_cuda_choose(const tritlstm_cuda_limits *limits, int kind, int dtype, int save,
                                                 int hidden, int64_t batch, int one_step);

/* The kernel of a kind that is no recurrence; NULL: not in this library. */
const tritlstm_cuda_kernel *tritlstm_cuda_find(const tritlstm_cuda_family *family, int kind, int dtype, int variant);

#endif
