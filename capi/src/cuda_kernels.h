/* What capi/aot.py generates: every kernel of the library, how it is launched, and where its machine code lies. */
#ifndef TRITLSTM_CUDA_KERNELS_H
#define TRITLSTM_CUDA_KERNELS_H

#include "tritlstm.h"

/* The kernels' arguments by name. Where each lies in a kernel's parameter block is in the table; one that the engine does not
 * know makes the table fail to compile. */
#define TRITLSTM_CUDA_PARAMETERS(X)                                                                                  \
    X(gates_ptr) X(w_ptr) X(h0_ptr) X(c0_ptr) X(lengths_ptr) X(exchange_ptr) X(out_ptr) X(cells_ptr) X(h_n_ptr)      \
    X(c_n_ptr) X(counter_ptr) X(status_ptr) X(grad_out_ptr) X(grad_h_n_ptr) X(grad_c_n_ptr) X(grad_gates_ptr)        \
    X(parts_ptr) X(grad_c_ptr) X(T) X(B) X(step_begin) X(step_end) X(reverse) X(n_tiles) X(tile_rows)                \
    X(spin_limit) X(grad_out_stride_t) X(grad_out_stride_b) X(a_ptr) X(b_ptr) X(bias_ptr) X(c_ptr) X(M) X(N)         \
    X(K) X(a_stride) X(b_stride) X(c_stride) X(biased) X(accumulate) X(source_ptr) X(target_ptr) X(h_ptr) X(W)       \
    X(n0) X(n1) X(n2) X(valid0) X(valid1) X(valid2) X(source_stride0) X(source_stride1) X(target_stride0)            \
    X(target_stride1)

#define TRITLSTM_CUDA_NAME(name) PARAMETER_##name,
enum { TRITLSTM_CUDA_PARAMETERS(TRITLSTM_CUDA_NAME) PARAMETERS };

enum {
    KERNEL_recurrent_forward,
    KERNEL_recurrent_backward,
    KERNEL_product,
    KERNEL_column_sums,
    KERNEL_rearrange,
    KERNEL_take_first,
    KERNEL_add_first,
    KERNEL_previous_states,
    KERNEL_keep_empty,
    KERNEL_zero_ends,
    KERNEL_clamp_lengths,
    KERNELS
};
enum { TIER_single, TIER_persistent, TIER_streaming, TIER_step };
enum { PROTOCOL_none, PROTOCOL_counter, PROTOCOL_flag };
/* Variants: of the product, which operands are given by columns, plus PRODUCT_LARGE for larger tiles; of rearrange, source and
 * target; of a recurrent kernel, 1 if it saves for backward. */
enum { PRODUCT_NT, PRODUCT_NN, PRODUCT_TN, PRODUCT_LARGE };
enum { REARRANGE_SAME, REARRANGE_TO_FP32, REARRANGE_FROM_FP32 };
enum { VARIANTS = 2 * PRODUCT_LARGE };

/* Kernels for one architecture; `later`: PTX, for devices later than its version. */
typedef struct tritlstm_cuda_family {
    const char *name;
    int major, minor, later;
    double l2_bytes_per_us, sm_l2_bytes_per_us;
    int first, count;
} tritlstm_cuda_family;

/* Deflated machine code in tritlstm_image_bytes. */
typedef struct tritlstm_cuda_image {
    uint32_t offset, stored, bytes;
} tritlstm_cuda_image;

typedef struct tritlstm_cuda_parameter {
    uint8_t name, size;
    uint16_t offset;
} tritlstm_cuda_parameter;

typedef struct tritlstm_cuda_kernel {
    uint8_t kind, dtype, variant;
    uint16_t rows, columns; /* a program's tile: BLOCK_M, BLOCK_N; of a recurrent kernel BLOCK_H, BLOCK_B */
    uint8_t warps;
    uint32_t shared;
    uint32_t image;
    uint32_t first_parameter;
    uint16_t parameters, parameter_bytes;
    /* Of a recurrent kernel. */
    uint16_t hidden;
    uint8_t tier, protocol;
    uint16_t n_blocks;
    uint32_t planned; /* bytes of shared memory by the planner's count */
    uint16_t resident, chunks;
    uint16_t parts; /* blocks of a team, which hand each other partial sums */
    double cost[7]; /* capi/aot.py, costs() */
} tritlstm_cuda_kernel;

extern const int32_t tritlstm_spin_limit;
extern const int tritlstm_tagged_slots;
extern const tritlstm_cuda_family tritlstm_families[];
extern const int tritlstm_families_count;
extern const tritlstm_cuda_image tritlstm_images[];
extern const int tritlstm_images_count;
extern const tritlstm_cuda_parameter tritlstm_parameters[];
extern const tritlstm_cuda_kernel tritlstm_kernels[];
extern const int tritlstm_kernels_count;
extern const uint8_t tritlstm_image_bytes[];

/* The name of a kernel in its image. Static. */
const char *tritlstm_cuda_kernel_name(const tritlstm_cuda_kernel *kernel);

#endif
