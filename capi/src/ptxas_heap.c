/* SPDX-License-Identifier: MIT
 *
 * Memory for ptxas, loaded before it: at the same addresses in every run and on every machine, because what ptxas makes
 * of some kernels depends on the addresses of its own data. Not a part of libtritlstm.
 *
 * Every class of sizes has a range of addresses of its own, so that an allocation of one size moves none of another.
 * Above 2048 bytes sizes grow by factors of four: a stream's buffer has 4096 or 8192 bytes, as the file system says. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

#define FIRST ((uintptr_t)1 << 40) /* above what a program has below 4 GiB, below where the kernel puts anything else */
#define RANGE ((uintptr_t)1 << 36)
#define LEAST_GROWTH ((size_t)256 << 10)
enum { STEP = 16, SMALL = 128, CLASSES = SMALL + 11 };

size_t malloc_usable_size(void *given);
void *memalign(size_t alignment, size_t size);

static struct {
    void *freed; /* a list through the blocks' first words */
    size_t used, mapped;
} classes[CLASSES];
static atomic_flag busy = ATOMIC_FLAG_INIT;

static size_t block_size(unsigned class)
{
    return class < SMALL ? STEP * ((size_t)class + 1) : (size_t)8192 << 2 * (class - SMALL);
}

static unsigned class_of(size_t size)
{
    unsigned class = SMALL;
    if (size <= (size_t)STEP * SMALL) return size ? (unsigned)((size - 1) / STEP) : 0;
    while (class < CLASSES && block_size(class) < size) class++;
    return class;
}

static void *take(unsigned class)
{
    char *start = (char *)(FIRST + class * RANGE), *block = classes[class].freed;
    size_t size = block_size(class);
    if (block) {
        memcpy(&classes[class].freed, block, sizeof(void *));
        return block;
    }
    if (classes[class].mapped - classes[class].used < size) {
        size_t more = size > LEAST_GROWTH ? size : LEAST_GROWTH;
        char *wanted = start + classes[class].mapped;
        if (classes[class].mapped + more > RANGE ||
            mmap(wanted, more, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) != wanted)
            return NULL;
        classes[class].mapped += more;
    }
    block = start + classes[class].used;
    classes[class].used += size;
    return block;
}

void *malloc(size_t size)
{
    unsigned class = class_of(size);
    void *block;
    while (atomic_flag_test_and_set(&busy)) {}
    block = class < CLASSES ? take(class) : NULL;
    atomic_flag_clear(&busy);
    if (!block) errno = ENOMEM;
    return block;
}

/* The class of a block of ours, and where it begins; CLASSES of any other address. */
static unsigned find(void *given, char **block)
{
    uintptr_t at = (uintptr_t)given - FIRST;
    unsigned class = (uintptr_t)given < FIRST || at / RANGE >= CLASSES ? CLASSES : (unsigned)(at / RANGE);
    if (class < CLASSES) *block = (char *)given - at % RANGE % block_size(class);
    return class;
}

void free(void *given)
{
    char *block;
    unsigned class = find(given, &block);
    if (class == CLASSES) return;
    while (atomic_flag_test_and_set(&busy)) {}
    memcpy(block, &classes[class].freed, sizeof(void *));
    classes[class].freed = block;
    atomic_flag_clear(&busy);
}

void *calloc(size_t count, size_t size)
{
    void *block;
    if (size && count > SIZE_MAX / size) {
        errno = ENOMEM;
        return NULL;
    }
    block = malloc(count * size);
    return block ? memset(block, 0, count * size) : NULL;
}

size_t malloc_usable_size(void *given)
{
    char *block;
    unsigned class = find(given, &block);
    return class == CLASSES ? 0 : block_size(class) - (size_t)((char *)given - block);
}

void *realloc(void *given, size_t size)
{
    size_t room = malloc_usable_size(given);
    void *block;
    if (given && size <= room) return given;
    block = malloc(size);
    if (block && given) {
        memcpy(block, given, room);
        free(given);
    }
    return block;
}

void *memalign(size_t alignment, size_t size)
{
    char *block;
    if (alignment <= STEP) return malloc(size);
    if (size > SIZE_MAX - alignment) {
        errno = ENOMEM;
        return NULL;
    }
    block = malloc(size + alignment);
    return block ? block + (alignment - (uintptr_t)block % alignment) % alignment : NULL;
}

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **result, size_t alignment, size_t size)
{
    void *block = memalign(alignment, size);
    if (block) *result = block;
    return block ? 0 : ENOMEM;
}

/* Tells the build that this is in use: a name that can't be loaded before a program is left out of it. */
__attribute__((constructor)) static void tell(void)
{
    static const char words[] = "ptxas_heap in use\n";
    if (getenv("PTXAS_HEAP_TELLS") && write(STDERR_FILENO, words, sizeof words - 1) < 0) _exit(1);
}
