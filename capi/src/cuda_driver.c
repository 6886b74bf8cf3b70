/* SPDX-License-Identifier: MIT */
#include "cuda_driver.h"
#include "aot_engine.h"
#include "cuda_inflate.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef TRITLSTM_LIBCUDA
#define TRITLSTM_LIBCUDA "libcuda.so.1"
#endif

/* ---- the driver's interface, as far as it is used -------------------------------------------------------- */

enum { CUDA_SUCCESS = 0, ERROR_OUT_OF_MEMORY = 2, ERROR_NO_DEVICE = 100, ERROR_INVALID_DEVICE = 101 };
enum { ERROR_INVALID_IMAGE = 200, ERROR_NO_BINARY = 209, ERROR_INVALID_PTX = 218, ERROR_UNSUPPORTED_PTX = 222 };
enum { ERROR_JIT_NOT_FOUND = 221, ERROR_JIT_DISABLED = 223, ERROR_TOO_LARGE = 720 };
enum { ATTRIBUTE_SMS = 16, ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76, ATTRIBUTE_COOPERATIVE = 95, ATTRIBUTE_SHARED = 97 };
enum { FUNCTION_DYNAMIC_SHARED = 8, LAUNCH_COOPERATIVE = 2, HOST_PORTABLE = 1, HOST_MAPPED = 2 };
enum { JIT_ERROR_LOG = 5, JIT_ERROR_LOG_BYTES = 6 };

/* Shared memory that a kernel gets without being asked for. */
enum { PLAIN_SHARED = 48 << 10 };
enum { MAX_DEVICES = 64, JIT_LOG = 400, WARP = 32, MAX_PARAMETER_BYTES = 512 };

typedef struct launch_attribute {
    int id;
    char pad[4];
    union {
        char size[64];
        int cooperative;
    } value;
} launch_attribute;

typedef struct launch_config {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    cuda_stream stream;
    launch_attribute *attributes;
    unsigned attributes_count;
} launch_config;

/* Of functions that the driver has in two versions, the exported name is the newer one's. */
#define DRIVER_FUNCTIONS(X)                                                                                          \
    X(cuInit, (unsigned))                                                                                            \
    X(cuGetErrorName, (int, const char **))                                                                          \
    X(cuGetErrorString, (int, const char **))                                                                        \
    X(cuDeviceGetCount, (int *))                                                                                     \
    X(cuDeviceGet, (int *, int))                                                                                     \
    X(cuDeviceGetName, (char *, int, int))                                                                           \
    X(cuDeviceGetAttribute, (int *, int, int))                                                                       \
    X(cuDevicePrimaryCtxRetain, (void **, int))                                                                      \
    X(cuDevicePrimaryCtxRelease_v2, (int))                                                                           \
    X(cuCtxPushCurrent_v2, (void *))                                                                                 \
    X(cuCtxPopCurrent_v2, (void **))                                                                                 \
    X(cuMemAlloc_v2, (cuda_pointer *, size_t))                                                                       \
    X(cuMemFree_v2, (cuda_pointer))                                                                                  \
    X(cuMemHostAlloc, (void **, size_t, unsigned))                                                                   \
    X(cuMemHostGetDevicePointer_v2, (cuda_pointer *, void *, unsigned))                                              \
    X(cuMemFreeHost, (void *))                                                                                       \
    X(cuMemsetD32Async, (cuda_pointer, unsigned, size_t, cuda_stream))                                               \
    X(cuMemcpyDtoDAsync_v2, (cuda_pointer, cuda_pointer, size_t, cuda_stream))                                       \
    X(cuMemcpyHtoDAsync_v2, (cuda_pointer, const void *, size_t, cuda_stream))                                       \
    X(cuMemcpyDtoHAsync_v2, (void *, cuda_pointer, size_t, cuda_stream))                                             \
    X(cuStreamSynchronize, (cuda_stream))                                                                            \
    X(cuModuleLoadDataEx, (void **, const void *, unsigned, int *, void **))                                         \
    X(cuModuleGetFunction, (void **, void *, const char *))                                                          \
    X(cuModuleUnload, (void *))                                                                                      \
    X(cuFuncSetAttribute, (void *, int, int))                                                                        \
    X(cuLaunchKernelEx, (const launch_config *, void *, void **, void **))

static struct {
#define MEMBER(name, arguments) int (*name) arguments;
    DRIVER_FUNCTIONS(MEMBER)
} driver;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* of everything static here, and of loading */
static int driver_open;
static cuda_device *devices[MAX_DEVICES];

/* ---- failure ----------------------------------------------------------------------------------------- */

static int status_of(int error)
{
    switch (error) {
    case CUDA_SUCCESS: return TRITLSTM_OK;
    case ERROR_OUT_OF_MEMORY: return TRITLSTM_ERROR_MEMORY;
    case ERROR_INVALID_IMAGE:
    case ERROR_NO_BINARY:
    case ERROR_INVALID_PTX:
    case ERROR_UNSUPPORTED_PTX:
    case ERROR_JIT_NOT_FOUND:
    case ERROR_JIT_DISABLED: return TRITLSTM_ERROR_UNAVAILABLE;
    default: return TRITLSTM_ERROR_DEVICE;
    }
}

static const char *name_of(int error)
{
    const char *name = NULL;
    return driver.cuGetErrorName && driver.cuGetErrorName(error, &name) == CUDA_SUCCESS && name ? name : "unknown error";
}

/* The driver's own words for what `call` returned; `more` is appended. */
static int check_call(int error, const char *call, const char *more)
{
    const char *text = NULL;
    if (error == CUDA_SUCCESS) return TRITLSTM_OK;
    if (driver.cuGetErrorString(error, &text) != CUDA_SUCCESS || !text) text = "no description";
    return tritlstm_aot_fail(status_of(error), "%s: %s (%d): %s%s%s", call, name_of(error), error, text,
                             *more ? ". " : "", more);
}

#define CALL(name, arguments) check_call(driver.name arguments, #name, "")

/* ---- opening ----------------------------------------------------------------------------------------- */

static int open_driver(void)
{
    void *library = dlopen(TRITLSTM_LIBCUDA, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *why = dlerror();
        return tritlstm_aot_fail(TRITLSTM_ERROR_UNAVAILABLE,
                                 "the NVIDIA driver's " TRITLSTM_LIBCUDA " can not be opened (%s): install the driver, or "
                                 "use TRITLSTM_CPU", why ? why : "no reason given");
    }
#define LOOK_UP(name, arguments)                                                                                     \
    *(void **)&driver.name = dlsym(library, #name);                                                                  \
    if (!driver.name)                                                                                                \
        return tritlstm_aot_fail(TRITLSTM_ERROR_UNAVAILABLE,                                                         \
                                 "the NVIDIA driver lacks " #name ": it must be of CUDA 11.8 or later");
    DRIVER_FUNCTIONS(LOOK_UP)
    return CALL(cuInit, (0));
}

static int attribute(const cuda_device *device, int which, int *value)
{
    return CALL(cuDeviceGetAttribute, (value, which, device->handle));
}

static int describe(cuda_device *d)
{
    int count, status, cooperative, shared;
    if ((status = CALL(cuDeviceGetCount, (&count)))) return status;
    if (d->ordinal >= count || d->ordinal >= MAX_DEVICES)
        return tritlstm_aot_fail(TRITLSTM_ERROR_DEVICE, "device_index is %d, but the driver sees %d CUDA device%s",
                                 d->ordinal, count, count == 1 ? "" : "s");
    if ((status = CALL(cuDeviceGet, (&d->handle, d->ordinal))) ||
        (status = CALL(cuDeviceGetName, (d->name, (int)sizeof d->name, d->handle))) ||
        (status = attribute(d, ATTRIBUTE_MAJOR, &d->major)) || (status = attribute(d, ATTRIBUTE_MINOR, &d->minor)) ||
        (status = attribute(d, ATTRIBUTE_SMS, &d->limits.sms)) || (status = attribute(d, ATTRIBUTE_SHARED, &shared)) ||
        (status = attribute(d, ATTRIBUTE_COOPERATIVE, &cooperative)))
        return status;
    d->limits.shared = shared;
    d->limits.family = tritlstm_cuda_family_for(d->major, d->minor);
    if (!d->limits.family)
        return tritlstm_aot_fail(TRITLSTM_ERROR_UNSUPPORTED,
                                 "%s is of compute capability %d.%d, for which this library has no kernels%s", d->name,
                                 d->major, d->minor,
                                 d->major < 8 ? ": 8.0 is the oldest" : ": build it with --images default");
    if (!cooperative || d->limits.sms < 1)
        return tritlstm_aot_fail(TRITLSTM_ERROR_UNSUPPORTED, "%s can not launch cooperatively", d->name);
    return TRITLSTM_OK;
}

static void release_device(cuda_device *d)
{
    int entered = d->context && driver.cuCtxPushCurrent_v2(d->context) == CUDA_SUCCESS;
    for (int k = 0; d->modules && k < d->limits.family->count; k++)
        if (d->modules[k] && entered) driver.cuModuleUnload(d->modules[k]);
    if (entered) driver.cuCtxPopCurrent_v2(&(void *){NULL});
    if (d->context) driver.cuDevicePrimaryCtxRelease_v2(d->handle);
    free(d->modules);
    free(d->functions);
    free(d);
}

static int make_device(int ordinal, cuda_device **device)
{
    cuda_device *d = calloc(1, sizeof *d);
    if (!d) return tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    d->ordinal = ordinal;
    int status = describe(d);
    if (!status) {
        size_t count = (size_t)d->limits.family->count;
        d->modules = calloc(count, sizeof *d->modules);
        d->functions = calloc(count, sizeof *d->functions);
        if (!d->modules || !d->functions) status = tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    }
    if (!status) status = CALL(cuDevicePrimaryCtxRetain, (&d->context, d->handle));
    if (status) {
        d->context = NULL;
        release_device(d);
        return status;
    }
    *device = d;
    return TRITLSTM_OK;
}

int cuda_device_open(int ordinal, cuda_device **device)
{
    int status = TRITLSTM_OK;
    pthread_mutex_lock(&mutex);
    if (!driver_open) {
        status = open_driver();
        driver_open = !status;
    }
    cuda_device *found = ordinal < MAX_DEVICES ? devices[ordinal] : NULL;
    if (!status && !found) {
        status = make_device(ordinal, &found);
        if (!status) devices[ordinal] = found;
    }
    if (!status) {
        found->references++;
        *device = found;
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

void cuda_device_close(cuda_device *device)
{
    pthread_mutex_lock(&mutex);
    if (!--device->references) {
        devices[device->ordinal] = NULL;
        release_device(device);
    }
    pthread_mutex_unlock(&mutex);
}

int cuda_enter(const cuda_device *device) { return CALL(cuCtxPushCurrent_v2, (device->context)); }

int cuda_leave(const cuda_device *device, int status)
{
    void *popped = NULL;
    int error = driver.cuCtxPopCurrent_v2(&popped);
    if (status) return status; /* the first failure is the one to tell */
    if (error == CUDA_SUCCESS && popped != device->context)
        return tritlstm_aot_fail(TRITLSTM_ERROR_INTERNAL, "another context became current during a call");
    return check_call(error, "cuCtxPopCurrent_v2", "");
}

/* ---- kernels ----------------------------------------------------------------------------------------- */

static int slot_of(const cuda_device *device, const tritlstm_cuda_kernel *kernel)
{
    return (int)(kernel - tritlstm_kernels) - device->limits.family->first;
}

static int load_image(cuda_device *device, const tritlstm_cuda_kernel *kernel, void **module, void **function)
{
    const tritlstm_cuda_image *image = &tritlstm_images[kernel->image];
    char log[JIT_LOG] = "";
    int options[] = {JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES};
    void *values[] = {log, (void *)(uintptr_t)sizeof log};
    uint8_t *code = malloc(image->bytes);
    if (!code) return tritlstm_aot_fail(TRITLSTM_ERROR_MEMORY, "out of memory for a kernel of %u bytes", image->bytes);
    if (tritlstm_inflate(tritlstm_image_bytes + image->offset, image->stored, code, image->bytes)) {
        free(code);
        return tritlstm_aot_fail(TRITLSTM_ERROR_INTERNAL, "image %u of this library is damaged", kernel->image);
    }
    int error = driver.cuModuleLoadDataEx(module, code, 2, options, values);
    free(code);
    log[JIT_LOG - 1] = 0;
    int status = check_call(error, "cuModuleLoadDataEx", log);
    if (status) return status;
    if ((status = CALL(cuModuleGetFunction, (function, *module, tritlstm_cuda_kernel_name(kernel)))) ||
        (kernel->shared > PLAIN_SHARED &&
         (status = CALL(cuFuncSetAttribute, (*function, FUNCTION_DYNAMIC_SHARED, (int)kernel->shared))))) {
        driver.cuModuleUnload(*module);
        *module = NULL;
        *function = NULL;
    }
    (void)device;
    return status;
}

int cuda_load(cuda_device *device, const tritlstm_cuda_kernel *kernel)
{
    int slot = slot_of(device, kernel), status = TRITLSTM_OK;
    pthread_mutex_lock(&mutex);
    if (!device->functions[slot]) {
        void *module = NULL, *function = NULL;
        status = load_image(device, kernel, &module, &function);
        if (!status) {
            device->modules[slot] = module;
            device->functions[slot] = function;
        }
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

int cuda_launch(const cuda_device *device, const tritlstm_cuda_kernel *kernel, int64_t x, int64_t y,
                const cuda_arguments *arguments, cuda_stream stream)
{
    unsigned char block[MAX_PARAMETER_BYTES] = {0}; /* Triton's two scratch pointers at its end stay zero */
    size_t bytes = kernel->parameter_bytes;
    void *extra[] = {(void *)1, block, (void *)2, &bytes, NULL}; /* CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE, _END */
    launch_attribute cooperative;
    launch_config config;
    for (int k = 0; k < kernel->parameters; k++) {
        const tritlstm_cuda_parameter *p = &tritlstm_parameters[kernel->first_parameter + (uint32_t)k];
        if (!arguments->given[p->name] || (size_t)p->offset + p->size > sizeof block)
            return tritlstm_aot_fail(TRITLSTM_ERROR_INTERNAL, "%s is launched without its argument %d",
                                     tritlstm_cuda_kernel_name(kernel), k);
        memcpy(block + p->offset, &arguments->value[p->name], p->size); /* the low bytes: CUDA hosts are little-endian */
    }
    memset(&cooperative, 0, sizeof cooperative);
    cooperative.id = LAUNCH_COOPERATIVE;
    cooperative.value.cooperative = 1;
    memset(&config, 0, sizeof config);
    config.grid_x = (unsigned)x;
    config.grid_y = (unsigned)y;
    config.grid_z = 1;
    config.block_x = kernel->warps * WARP;
    config.block_y = config.block_z = 1;
    config.shared = kernel->shared;
    config.stream = stream;
    config.attributes = &cooperative;
    config.attributes_count = kernel->protocol != PROTOCOL_none; /* a grid that does not fit at once is then refused */
    int error = driver.cuLaunchKernelEx(&config, device->functions[slot_of(device, kernel)], NULL, extra);
    return check_call(error, "cuLaunchKernelEx",
                      error == ERROR_TOO_LARGE ? "Something else holds part of the device: a partition, a debugger or MPS"
                                               : "");
}

/* ---- memory ------------------------------------------------------------------------------------------ */

int cuda_allocate(size_t bytes, cuda_pointer *pointer) { return CALL(cuMemAlloc_v2, (pointer, bytes)); }
void cuda_free(cuda_pointer pointer) { driver.cuMemFree_v2(pointer); }

int cuda_allocate_host(size_t bytes, void **memory, cuda_pointer *on_device)
{
    int status = CALL(cuMemHostAlloc, (memory, bytes, HOST_PORTABLE | HOST_MAPPED));
    if (status) return status;
    memset(*memory, 0, bytes);
    if ((status = CALL(cuMemHostGetDevicePointer_v2, (on_device, *memory, 0)))) {
        driver.cuMemFreeHost(*memory);
        *memory = NULL;
    }
    return status;
}

void cuda_free_host(void *memory) { driver.cuMemFreeHost(memory); }

int cuda_fill(cuda_pointer to, uint32_t word, size_t words, cuda_stream stream)
{
    return CALL(cuMemsetD32Async, (to, word, words, stream));
}

int cuda_copy(cuda_pointer to, cuda_pointer from, size_t bytes, cuda_stream stream)
{
    return CALL(cuMemcpyDtoDAsync_v2, (to, from, bytes, stream));
}

int cuda_copy_in(cuda_pointer to, const void *from, size_t bytes, cuda_stream stream)
{
    return CALL(cuMemcpyHtoDAsync_v2, (to, from, bytes, stream));
}

int cuda_copy_out(void *to, cuda_pointer from, size_t bytes, cuda_stream stream)
{
    return CALL(cuMemcpyDtoHAsync_v2, (to, from, bytes, stream));
}

int cuda_wait(cuda_stream stream) { return CALL(cuStreamSynchronize, (stream)); }
