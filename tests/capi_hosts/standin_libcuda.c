/* A stand-in for the NVIDIA driver: devices that do not exist, memory that is shared memory of this process.
 *
 * It notes every call, checks what the real driver would refuse (a context that is not current, more shared memory than was
 * asked for, a cooperative grid that does not fit, an image of another architecture, what a stream capture forbids), and fails
 * on demand. A launch calls `standin_launch`, which a test sets to run the kernel some other way.
 *
 * Errors have the driver's numbers. Functions of the test begin with standin_. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, ALIGNMENT = 256, MAX_CALLS = 1 << 16, MAX_BUFFERS = 4096, MAX_MODULES = 4096, MAX_STACK = 16 };
enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NO_BINARY = 209, NOT_FOUND = 500,
       TOO_LARGE = 720, CAPTURE_UNSUPPORTED = 900 };
#define ARENA ((size_t)1 << 28)
#define CONTEXT ((void *)(uintptr_t)0xC0)

typedef struct standin_launched {
    const char *kernel;
    const void *image;
    size_t image_bytes;
    unsigned x, y, threads, shared;
    int cooperative;
    void *stream;
    size_t bytes;
    unsigned char parameters[512];
} standin_launched;

typedef struct buffer {
    size_t offset, bytes;
    int live, host;
} buffer;

typedef struct module {
    int live;
    void *image;
    size_t bytes;
    char kernel[64];
    int shared; /* what cuFuncSetAttribute allowed */
} module;

/* ---- what a test sets and sees --------------------------------------------------------------------------- */

int standin_count = 1, standin_major = 9, standin_minor = 0, standin_sms = 4, standin_shared = 227 << 10, standin_cooperative = 1;
int standin_capturing, standin_rejecting;
int (*standin_launch)(const standin_launched *);

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char *arena;
static int arena_fd = -1;
static size_t arena_used;
static buffer buffers[MAX_BUFFERS];
static int n_buffers;
static module modules[MAX_MODULES];
static int n_modules;
static const char *calls[MAX_CALLS];
static long n_calls, fail_at, fail_with;
static int retained;
static standin_launched launches[1 << 14];
static long n_launches;
static __thread void *stack[MAX_STACK];
static __thread int depth;

long standin_calls(void) { return n_calls; }
const char *standin_call(long k) { return k < n_calls ? calls[k] : NULL; }
long standin_launches(void) { return n_launches; }
const standin_launched *standin_launched_at(long k) { return &launches[k]; }
int standin_depth(void) { return depth; }
void *standin_current(void) { return depth ? stack[depth - 1] : NULL; }
void standin_push(void *context) { stack[depth++] = context; }
void standin_pop(void) { depth--; }
int standin_arena(void) { return arena_fd; }
size_t standin_arena_bytes(void) { return ARENA; }
char *standin_base(void) { return arena; }

/* The n-th call from now fails with `error`; n = 0: none does. */
void standin_fail(long n, long error)
{
    pthread_mutex_lock(&mutex);
    n_calls = n_launches = 0;
    fail_at = n;
    fail_with = error;
    pthread_mutex_unlock(&mutex);
}

/* What was made and not ended: device and host memory, modules, contexts. */
int standin_live(void)
{
    int live = retained;
    for (int k = 0; k < n_buffers; k++) live += buffers[k].live;
    for (int k = 0; k < n_modules; k++) live += modules[k].live;
    return live;
}

/* Ends all of it. */
void standin_forget(void)
{
    retained = n_buffers = n_modules = 0;
}

/* Offsets of the pages that lie between buffers. */
long standin_guards(uint64_t *to, long room)
{
    long n = 0;
    if (n < room) to[n++] = 0;
    for (int k = 0; k < n_buffers && n < room; k++)
        to[n++] = (buffers[k].offset + (buffers[k].bytes ? buffers[k].bytes : 1) + PAGE - 1) / PAGE * PAGE;
    return n;
}

static void *allocate_alone(size_t bytes, int host)
{
    if (!arena) {
        arena_fd = memfd_create("standin", 0);
        if (arena_fd < 0 || ftruncate(arena_fd, (off_t)ARENA)) return NULL;
        arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_SHARED, arena_fd, 0);
        if (arena == MAP_FAILED) return NULL;
    }
    int any = 0;
    for (int k = 0; k < n_buffers; k++) any |= buffers[k].live;
    if (!any) n_buffers = 0, arena_used = PAGE;
    size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    if (!bytes || n_buffers == MAX_BUFFERS || arena_used + whole + PAGE > ARENA) return NULL;
    size_t offset = arena_used + (whole - bytes) / ALIGNMENT * ALIGNMENT;
    buffers[n_buffers++] = (buffer){offset, bytes, 1, host};
    arena_used += whole + PAGE;
    memset(arena + offset, 0xFF, bytes); /* NaN: reading what nobody wrote shows */
    return arena + offset;
}

static void *allocate(size_t bytes, int host)
{
    pthread_mutex_lock(&mutex);
    void *at = allocate_alone(bytes, host);
    pthread_mutex_unlock(&mutex);
    return at;
}

static int deallocate(void *at)
{
    int error = INVALID_VALUE;
    pthread_mutex_lock(&mutex);
    for (int k = 0; k < n_buffers && error; k++)
        if (arena + buffers[k].offset == at && buffers[k].live) buffers[k].live = error = 0;
    pthread_mutex_unlock(&mutex);
    return error;
}

void *standin_allocate(size_t bytes) { return allocate(bytes, 0); }
int standin_deallocate(void *at) { return deallocate(at); }

/* Whether the bytes lie in one live buffer. */
static int inside(uint64_t at, size_t bytes)
{
    int found = 0;
    pthread_mutex_lock(&mutex);
    for (int k = 0; k < n_buffers && !found; k++) {
        uint64_t begin = (uint64_t)(uintptr_t)arena + buffers[k].offset;
        found = buffers[k].live && at >= begin && bytes <= buffers[k].bytes && at - begin <= buffers[k].bytes - bytes;
    }
    pthread_mutex_unlock(&mutex);
    return found;
}

/* ---- the driver ---------------------------------------------------------------------------------------- */

static int note(const char *name)
{
    int error = 0;
    pthread_mutex_lock(&mutex);
    if (n_calls < MAX_CALLS) calls[n_calls] = name;
    n_calls++;
    if (fail_at && n_calls == fail_at) error = (int)fail_with;
    pthread_mutex_unlock(&mutex);
    return error;
}

#define NOTE                                                                                                         \
    do {                                                                                                             \
        int error = note(__func__);                                                                                  \
        if (error) return error;                                                                                     \
    } while (0)
#define IN_CONTEXT                                                                                                   \
    do {                                                                                                             \
        if (standin_current() != CONTEXT) return INVALID_CONTEXT;                                                    \
    } while (0)
#define NOT_CAPTURED                                                                                                 \
    do {                                                                                                             \
        if (standin_capturing) return CAPTURE_UNSUPPORTED;                                                           \
    } while (0)

int cuGetErrorName(int error, const char **name)
{
    *name = error == OUT_OF_MEMORY        ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == INVALID_VALUE      ? "CUDA_ERROR_INVALID_VALUE"
            : error == INVALID_CONTEXT    ? "CUDA_ERROR_INVALID_CONTEXT"
            : error == NO_BINARY          ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
            : error == 222                ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
            : error == 700                ? "CUDA_ERROR_ILLEGAL_ADDRESS"
            : error == TOO_LARGE          ? "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
            : error == CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                                          : NULL;
    return *name ? 0 : INVALID_VALUE;
}

int cuGetErrorString(int error, const char **text)
{
    *text = error == OUT_OF_MEMORY ? "out of memory" : "words of the stand-in";
    return 0;
}

int cuInit(unsigned flags)
{
    NOTE;
    return flags ? INVALID_VALUE : 0;
}

int cuDeviceGetCount(int *count)
{
    NOTE;
    *count = standin_count;
    return 0;
}

int cuDeviceGet(int *device, int ordinal)
{
    NOTE;
    if (ordinal >= standin_count) return INVALID_DEVICE;
    *device = 100 + ordinal;
    return 0;
}

int cuDeviceGetName(char *name, int room, int device)
{
    NOTE;
    snprintf(name, (size_t)room, "Stand-in %d", device - 100);
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    NOTE;
    (void)device;
    *value = attribute == 16   ? standin_sms
             : attribute == 75 ? standin_major
             : attribute == 76 ? standin_minor
             : attribute == 95 ? standin_cooperative
             : attribute == 97 ? standin_shared
                               : -1;
    return *value < 0 ? INVALID_VALUE : 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    NOTE;
    (void)device;
    __atomic_add_fetch(&retained, 1, __ATOMIC_RELAXED);
    *context = CONTEXT;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
    (void)device;
    __atomic_sub_fetch(&retained, 1, __ATOMIC_RELAXED);
    NOTE;
    return 0;
}

int cuCtxPushCurrent_v2(void *context)
{
    NOTE;
    if (depth == MAX_STACK) return INVALID_VALUE;
    stack[depth++] = context;
    return 0;
}

int cuCtxPopCurrent_v2(void **context)
{
    if (!depth) return INVALID_CONTEXT;
    *context = stack[--depth];
    NOTE;
    return 0;
}

int cuCtxSetCurrent(void *context)
{
    NOTE;
    depth = 0;
    stack[depth++] = context;
    return 0;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes)
{
    NOTE;
    IN_CONTEXT;
    if (!inside(to, bytes)) return INVALID_VALUE;
    memcpy((void *)(uintptr_t)to, from, bytes);
    return 0;
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes)
{
    NOTE;
    IN_CONTEXT;
    if (!inside(from, bytes)) return INVALID_VALUE;
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return 0;
}

int cuMemAlloc_v2(uint64_t *pointer, size_t bytes)
{
    NOTE;
    IN_CONTEXT;
    NOT_CAPTURED;
    *pointer = (uint64_t)(uintptr_t)allocate(bytes, 0);
    return *pointer ? 0 : OUT_OF_MEMORY;
}

/* What ends something ends it even where it reports an earlier failure, as the driver does. */
int cuMemFree_v2(uint64_t pointer)
{
    IN_CONTEXT;
    int error = deallocate((void *)(uintptr_t)pointer);
    NOTE;
    return error;
}

int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags)
{
    NOTE;
    IN_CONTEXT;
    NOT_CAPTURED;
    if (flags != 3) return INVALID_VALUE;
    *memory = allocate(bytes, 1);
    return *memory ? 0 : OUT_OF_MEMORY;
}

int cuMemHostGetDevicePointer_v2(uint64_t *pointer, void *memory, unsigned flags)
{
    NOTE;
    *pointer = (uint64_t)(uintptr_t)memory;
    return flags ? INVALID_VALUE : 0;
}

int cuMemFreeHost(void *memory)
{
    IN_CONTEXT;
    int error = deallocate(memory);
    NOTE;
    return error;
}

int cuMemsetD32Async(uint64_t to, unsigned word, size_t words, void *stream)
{
    NOTE;
    IN_CONTEXT;
    (void)stream;
    if (to % 4 || !inside(to, 4 * words)) return INVALID_VALUE;
    for (size_t k = 0; k < words; k++) ((unsigned *)(uintptr_t)to)[k] = word;
    return 0;
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream)
{
    NOTE;
    IN_CONTEXT;
    (void)stream;
    if (!inside(to, bytes) || !inside(from, bytes)) return INVALID_VALUE;
    memmove((void *)(uintptr_t)to, (void *)(uintptr_t)from, bytes);
    return 0;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream)
{
    NOTE;
    IN_CONTEXT;
    NOT_CAPTURED; /* it could be, but would read the caller's memory at every replay */
    (void)stream;
    if (!inside(to, bytes)) return INVALID_VALUE;
    memcpy((void *)(uintptr_t)to, from, bytes);
    return 0;
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream)
{
    NOTE;
    IN_CONTEXT;
    NOT_CAPTURED;
    (void)stream;
    if (!inside(from, bytes)) return INVALID_VALUE;
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return 0;
}

int cuStreamSynchronize(void *stream)
{
    NOTE;
    IN_CONTEXT;
    NOT_CAPTURED;
    (void)stream;
    return 0;
}

/* Machine code: its length, and whether it runs on the device. Formats 7 and 8 of cubins keep the architecture in different
 * bits of e_flags; one that ends in "a" runs on that architecture only. */
static int check_image(const unsigned char *image, size_t *bytes)
{
    int here = standin_major * 10 + standin_minor;
    if (memcmp(image, "\177ELF", 4)) {
        const char *target = strstr((const char *)image, ".target sm_");
        *bytes = strlen((const char *)image) + 1;
        return target && atoi(target + 11) <= here && !strchr("af", target[11 + (atoi(target + 11) < 100 ? 2 : 3)]) ? 0 : NO_BINARY;
    }
    uint64_t sections, programs;
    uint32_t flags;
    uint16_t counts[4];
    memcpy(&programs, image + 32, 8);
    memcpy(&sections, image + 40, 8);
    memcpy(&flags, image + 48, 4);
    memcpy(counts, image + 54, 8);
    uint64_t end = sections + (uint64_t)counts[2] * counts[3], other = programs + (uint64_t)counts[0] * counts[1];
    *bytes = (size_t)(end > other ? end : other);
    int arch = (int)(image[8] >= 8 ? flags >> 8 & 0xFF : flags & 0xFF);
    int runs = arch >= 90 ? arch == here : arch / 10 == here / 10 && arch <= here;
    return image[18] == 190 && runs ? 0 : NO_BINARY;
}

int cuModuleLoadDataEx(void **result, const void *image, unsigned n, int *options, void **values)
{
    size_t bytes;
    NOTE;
    IN_CONTEXT;
    NOT_CAPTURED;
    int error = standin_rejecting ? NO_BINARY : check_image(image, &bytes);
    if (n != 2 || options[0] != 5 || options[1] != 6) return INVALID_VALUE;
    if (error) {
        snprintf(values[0], (size_t)(uintptr_t)values[1], "the stand-in's log");
        return error;
    }
    pthread_mutex_lock(&mutex);
    int k = 0;
    while (k < n_modules && modules[k].image) k++;
    if (k == n_modules) n_modules++;
    module *m = &modules[k];
    memset(m, 0, sizeof *m);
    m->live = 1;
    m->bytes = bytes;
    m->image = malloc(bytes);
    memcpy(m->image, image, bytes);
    pthread_mutex_unlock(&mutex);
    *result = m;
    return 0;
}

int cuModuleGetFunction(void **function, void *handle, const char *name)
{
    module *m = handle;
    NOTE;
    IN_CONTEXT;
    snprintf(m->kernel, sizeof m->kernel, "%s", name);
    if (!memmem(m->image, m->bytes, name, strlen(name))) return NOT_FOUND;
    *function = m;
    return 0;
}

int cuModuleUnload(void *handle)
{
    module *m = handle;
    IN_CONTEXT;
    pthread_mutex_lock(&mutex);
    free(m->image);
    m->image = NULL;
    m->live = 0;
    pthread_mutex_unlock(&mutex);
    NOTE;
    return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value)
{
    module *m = function;
    NOTE;
    IN_CONTEXT;
    if (attribute != 8 || value > standin_shared) return INVALID_VALUE;
    m->shared = value;
    return 0;
}

#ifndef WITHOUT_LAUNCH
typedef struct launch_config {
    unsigned x, y, z, threads, threads_y, threads_z, shared;
    void *stream;
    struct {
        int id;
        char pad[4];
        union {
            char size[64];
            int cooperative;
        } value;
    } *attributes;
    unsigned n_attributes;
} launch_config;

int cuLaunchKernelEx(const launch_config *c, void *function, void **arguments, void **extra)
{
    module *m = function;
    NOTE;
    IN_CONTEXT;
    if (!m || !m->live || arguments || extra[0] != (void *)1 || extra[2] != (void *)2 || extra[4]) return INVALID_VALUE;
    if (!c->x || !c->y || c->z != 1 || c->y > 65535 || !c->threads || c->threads > 1024) return INVALID_VALUE;
    if (c->shared > (unsigned)(m->shared ? m->shared : 48 << 10)) return INVALID_VALUE;
    standin_launched l = {m->kernel, m->image, m->bytes, c->x, c->y, c->threads, c->shared, 0, c->stream, *(size_t *)extra[3], {0}};
    if (l.bytes > sizeof l.parameters) return INVALID_VALUE;
    memcpy(l.parameters, extra[1], l.bytes);
    for (unsigned k = 0; k < c->n_attributes; k++)
        if (c->attributes[k].id == 2) l.cooperative = c->attributes[k].value.cooperative;
    if (l.cooperative && (uint64_t)c->x * c->y > (uint64_t)standin_sms) return TOO_LARGE;
    pthread_mutex_lock(&mutex);
    if (n_launches < (long)(sizeof launches / sizeof *launches)) launches[n_launches++] = l;
    pthread_mutex_unlock(&mutex);
    return standin_launch ? standin_launch(&l) : 0;
}
#endif
