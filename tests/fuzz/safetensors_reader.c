/* Fuzz target: any bytes as a safetensors file. Whatever the reader accepts is read whole, into memory of exactly the size that
 * its header claims. Built by `make fuzz` for libFuzzer, by the tests with replay.c for the corpus. */
#define _GNU_SOURCE
#include "safetensors.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int condition)
{
    if (!condition) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char path[64];
    static int file = -1;
    st_file st;
    if (file < 0) {
        file = memfd_create("input", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    require(file >= 0 && !ftruncate(file, 0) && pwrite(file, data, size, 0) == (ssize_t)size);
    int status = st_open(&st, path);
    require(status == ST_OK || (status == ST_FORMAT && *st.error));
    if (status) return 0;
    uint64_t covered = 0;
    for (size_t k = 0; k < st.count; k++) {
        const st_tensor *tensor = &st.tensors[k];
        uint64_t bytes = tensor->end - tensor->begin;
        require(tensor->end <= st.data_bytes && st.data_start + st.data_bytes == size);
        require(!tensor->item_bytes || bytes == tensor->elements * (uint64_t)tensor->item_bytes);
        covered += bytes;
        void *raw = malloc((size_t)bytes);
        require(st_find(&st, tensor->name) == tensor && !st_read(&st, tensor, raw));
        require(!bytes || !memcmp(raw, data + st.data_start + tensor->begin, (size_t)bytes));
        free(raw);
        if (tensor->item_bytes) { /* so that the elements are as many as there are bytes for */
            float *values = malloc((size_t)tensor->elements * sizeof *values);
            int is_float = !strcmp(tensor->dtype, "F64") || !strcmp(tensor->dtype, "F32") ||
                           !strcmp(tensor->dtype, "F16") || !strcmp(tensor->dtype, "BF16");
            require(st_read_floats(&st, tensor, values) == (is_float ? ST_OK : ST_FORMAT));
            free(values);
        }
    }
    require(covered == st.data_bytes);
    st_metadata(&st, "format");
    st_close(&st);
    return 0;
}
