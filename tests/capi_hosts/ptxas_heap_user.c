/* Uses ptxas_heap.c, checks what it gives, and prints a sum of all addresses. */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(what) do { if (!(what)) { printf("line %d: %s\n", __LINE__, #what); exit(1); } } while (0)
enum { COUNT = 500 };

static uint32_t state = 1;
static uint32_t draw(void) { return state = state * 1664525u + 1013904223u, state >> 8; }

int main(void)
{
    static unsigned char *blocks[COUNT];
    static size_t sizes[COUNT];
    uint64_t sum = 0;
    for (int step = 0; step < 100000; step++) {
        unsigned k = draw() % COUNT;
        size_t size = draw() % 64 ? draw() % 3000 : draw() % 3000000, alignment = 16;
        for (size_t j = 0; j < sizes[k]; j += 1 + sizes[k] / 50) REQUIRE(blocks[k][j] == (unsigned char)(k + j));
        if (draw() % 3 == 0) {
            size_t kept = sizes[k] < size ? sizes[k] : size;
            blocks[k] = realloc(blocks[k], size);
            for (size_t j = 0; j < kept; j += 1 + sizes[k] / 50) REQUIRE(blocks[k][j] == (unsigned char)(k + j));
        } else {
            free(blocks[k]);
            switch (draw() % 3) {
            case 0: blocks[k] = malloc(size); break;
            case 1:
                blocks[k] = calloc(size / 7 + 1, 7);
                for (size_t j = 0; j < size; j++) REQUIRE(!blocks[k][j]);
                break;
            default:
                alignment <<= draw() % 10;
                REQUIRE(!posix_memalign((void **)&blocks[k], alignment, size));
            }
        }
        REQUIRE(blocks[k] && (uintptr_t)blocks[k] % alignment == 0 && malloc_usable_size(blocks[k]) >= size);
        for (size_t j = 0; j < size; j++) blocks[k][j] = (unsigned char)(k + j);
        sizes[k] = size;
        sum = sum * 31 + (uintptr_t)blocks[k];
    }
    volatile size_t huge = SIZE_MAX / 2;
    errno = 0;
    REQUIRE(!malloc(huge) && errno == ENOMEM && !calloc(huge, 3) && !realloc(NULL, huge) && !memalign(64, huge * 2));
    REQUIRE((uintptr_t)blocks[0] >> 40);
    printf("%016llx\n", (unsigned long long)sum);
    return 0;
}
