/* Feeds damaged copies of a safetensors file to the reader; meant to be compiled with sanitizers.
 *
 *     mutate FILE COUNT
 *
 * Every damaged copy is written to a file in memory, opened, and, where the reader accepts it, read whole into memory of exactly
 * the size the header claims. Prints how many were accepted and refused; a crash is the failure. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "safetensors.h"

static uint64_t state = 88172645463325252u;

static size_t below(size_t limit)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return limit ? (size_t)(state % limit) : 0;
}

/* Damages `bytes` in place, which has room for 64 more; returns the new size. */
static size_t damage(unsigned char *bytes, size_t size, size_t header)
{
    static const char *const words[] = {"\"", "{", "}", "[", "]", ",", ":", "\\u", "\\ud83d\\ude00", "-1", "0", "9223372036854775807",
                                        "18446744073709551615", "\\", "F64", "BOOL", "__metadata__", "\"dtype\"", "1e9"};
    size_t at = below(4) ? 8 + below(header) : below(size);
    size_t length, other;
    if (at >= size) at = size - 1;
    switch (below(7)) {
    case 0: bytes[at] = (unsigned char)below(256); break;
    case 1: bytes[at] ^= (unsigned char)(1u << below(8)); break;
    case 2: size = below(size + 1); break;
    case 3:
        length = below(size - at);
        memmove(bytes + at, bytes + at + length, size - at - length);
        size -= length;
        break;
    case 4: {
        const char *word = words[below(sizeof words / sizeof *words)];
        length = strlen(word);
        memmove(bytes + at + length, bytes + at, size - at);
        memcpy(bytes + at, word, length);
        size += length;
        if (size > 8 && below(2)) bytes[0] = (unsigned char)(bytes[0] + length);
        break;
    }
    case 5:
        other = 8 + below(header);
        length = below(16);
        if (other + length < size && at + length < size) memmove(bytes + at, bytes + other, length);
        break;
    default: bytes[below(8)] = (unsigned char)below(256); break;
    }
    return size;
}

int main(int argc, char **argv)
{
    long counts[4] = {0};
    if (argc != 3) return 2;
    FILE *file = fopen(argv[1], "rb");
    static unsigned char base[1 << 16], copy[(1 << 16) + 1024];
    size_t size = file ? fread(base, 1, sizeof base, file) : 0;
    if (size < 16) return 2;
    fclose(file);
    char path[64];
    int scratch = memfd_create("damaged", 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", scratch);
    size_t header = base[0] | (size_t)base[1] << 8;
    for (long k = 0; k < atol(argv[2]); k++) {
        st_file st;
        size_t length = size;
        memcpy(copy, base, size);
        for (size_t n = 1 + below(3); n && length > 8; n--) length = damage(copy, length, header);
        if (ftruncate(scratch, 0) || pwrite(scratch, copy, length, 0) != (ssize_t)length) return 2;
        int status = st_open(&st, path);
        counts[status]++;
        if (status) continue;
        for (size_t n = 0; n < st.count; n++) {
            const st_tensor *tensor = &st.tensors[n];
            void *raw = malloc((size_t)(tensor->end - tensor->begin));
            float *values = malloc((size_t)tensor->elements * sizeof *values);
            if (st_find(&st, tensor->name) != tensor || st_read(&st, tensor, raw)) return 3;
            if (tensor->item_bytes) st_read_floats(&st, tensor, values);
            free(raw);
            free(values);
        }
        st_metadata(&st, "format");
        st_close(&st);
    }
    printf("%ld accepted, %ld refused\n", counts[0], counts[1] + counts[2] + counts[3]);
    return counts[1] + counts[3] ? 4 : 0;
}
