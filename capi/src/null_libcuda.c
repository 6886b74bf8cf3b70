/* A driver that does nothing and says that all went well, in the place of libcuda.so.1: with it a call of libtritlstm on a
 * CUDA device takes the time of the library alone. Its device is of architecture 9.0, and its device memory is ordinary
 * memory. Used by `python -m tritlstm.capi.call_cost --launcher`; in no library.
 *
 * SPDX-License-Identifier: MIT */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SMS = 132, MAJOR = 9, MINOR = 0, SHARED = 227 << 10 };

static void *current; /* of the one thread that calls */
static int something;

int cuInit(unsigned flags) { return flags != 0; }
int cuGetErrorName(int error, const char **name) { return *name = error ? "error" : "success", 0; }
int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char *name, int room, int device)
{
    (void)device;
    strncpy(name, "a device that does nothing", (size_t)room);
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    *value = attribute == 16 ? SMS : attribute == 75 ? MAJOR : attribute == 76 ? MINOR : attribute == 97 ? SHARED : 1;
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) { return (void)device, *context = &something, 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, 0; }
int cuCtxPushCurrent_v2(void *context) { return current = context, 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = current, 0; }
int cuMemAlloc_v2(uint64_t *pointer, size_t bytes) { return !(*pointer = (uintptr_t)calloc(bytes, 1)); }
int cuMemFree_v2(uint64_t pointer) { return free((void *)(uintptr_t)pointer), 0; }
int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) { return (void)flags, !(*memory = calloc(bytes, 1)); }
int cuMemHostGetDevicePointer_v2(uint64_t *pointer, void *memory, unsigned flags)
{
    (void)flags;
    *pointer = (uintptr_t)memory;
    return 0;
}

int cuMemFreeHost(void *memory) { return free(memory), 0; }
int cuMemsetD32Async(uint64_t to, unsigned word, size_t words, void *stream)
{
    return (void)to, (void)word, (void)words, (void)stream, 0;
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream)
{
    return (void)to, (void)from, (void)bytes, (void)stream, 0;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream)
{
    return (void)to, (void)from, (void)bytes, (void)stream, 0;
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream)
{
    return (void)to, (void)from, (void)bytes, (void)stream, 0;
}

int cuStreamSynchronize(void *stream) { return (void)stream, 0; }
int cuModuleLoadDataEx(void **module, const void *image, unsigned n, int *options, void **values)
{
    (void)image, (void)n, (void)options, (void)values;
    *module = &something;
    return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name)
{
    (void)name;
    *function = module;
    return 0;
}

int cuModuleUnload(void *module) { return (void)module, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return (void)function, (void)attribute, (void)value, 0; }
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra)
{
    return (void)config, (void)function, (void)arguments, (void)extra, 0;
}
