/* The CUDA driver, opened at run time, and the devices and kernels that it gives. */
#ifndef TRITLSTM_CUDA_DRIVER_H
#define TRITLSTM_CUDA_DRIVER_H

#include "cuda_plan.h"

typedef struct cuda_stream *cuda_stream; /* CUstream */
typedef uint64_t cuda_pointer;           /* CUdeviceptr */

/* A device that at least one handle uses. Its kernels are loaded when a handle first wants them and stay until the last one ends. */
typedef struct cuda_device {
    int ordinal;
    int references;
    int handle;    /* CUdevice */
    void *context; /* its primary context */
    int major, minor;
    char name[96];
    tritlstm_cuda_limits limits;
    void **modules;   /* one for each kernel of the family; NULL: not loaded */
    void **functions;
} cuda_device;

/* The arguments of a launch, by name. */
typedef struct cuda_arguments {
    uint64_t value[PARAMETERS];
    unsigned char given[PARAMETERS];
} cuda_arguments;

/* All functions return a tritlstm_status and leave the words of a failure. Those below cuda_device_close want the device's
 * context to be current: call them between cuda_enter and cuda_leave. */

/* Opens the driver and the device; TRITLSTM_ERROR_UNAVAILABLE where there is no driver, _DEVICE where there is no such device,
 * _UNSUPPORTED where the library has no kernels for it. */
int cuda_device_open(int ordinal, cuda_device **device);
void cuda_device_close(cuda_device *device);

/* Makes the device's primary context current, and puts the caller's own back. */
int cuda_enter(const cuda_device *device);
int cuda_leave(const cuda_device *device, int status);

/* Makes a kernel ready to launch. Not while a stream is being captured. */
int cuda_load(cuda_device *device, const tritlstm_cuda_kernel *kernel);
int cuda_launch(const cuda_device *device, const tritlstm_cuda_kernel *kernel, int64_t x, int64_t y,
                const cuda_arguments *arguments, cuda_stream stream);

int cuda_allocate(size_t bytes, cuda_pointer *pointer);
void cuda_free(cuda_pointer pointer);
/* Zeroed host memory that the device can write. */
int cuda_allocate_host(size_t bytes, void **memory, cuda_pointer *on_device);
void cuda_free_host(void *memory);

/* `words` words of 32 bits. */
int cuda_fill(cuda_pointer to, uint32_t word, size_t words, cuda_stream stream);
int cuda_copy(cuda_pointer to, cuda_pointer from, size_t bytes, cuda_stream stream);
int cuda_copy_in(cuda_pointer to, const void *from, size_t bytes, cuda_stream stream);
int cuda_copy_out(void *to, cuda_pointer from, size_t bytes, cuda_stream stream);
int cuda_wait(cuda_stream stream);

#endif
