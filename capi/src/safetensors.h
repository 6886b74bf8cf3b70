/* A reader of safetensors files that trusts nothing in them.
 *
 * Everything in the header is checked before it is used: lengths against the file's size, the JSON's grammar, shapes
 * for overflow, and that the tensors' bytes follow one another and cover the file. Plain C99 and POSIX stat;
 * not thread-safe on one struct. */
#ifndef TRITLSTM_SAFETENSORS_H
#define TRITLSTM_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { ST_OK = 0, ST_FILE = 1, ST_FORMAT = 2, ST_MEMORY = 3 };

enum { ST_MAX_RANK = 8, ST_MAX_HEADER = 100 * 1000 * 1000 };

typedef struct st_tensor {
    char *name;
    char dtype[16]; /* "F32", "BF16", "U8", ... */
    int item_bytes; /* 0 for a type that this reader does not know */
    int rank;
    int64_t shape[ST_MAX_RANK];
    uint64_t elements;
    uint64_t begin, end; /* in the data, which starts behind the header */
} st_tensor;

typedef struct st_file {
    FILE *file;
    st_tensor *tensors; /* in the order of the header */
    size_t count;
    char **metadata; /* key, value, key, value, ... */
    size_t metadata_count;
    uint64_t data_start, data_bytes;
    char error[256]; /* why the last function on this struct failed */
} st_file;

/* Opens and checks a file; on failure nothing needs closing. */
int st_open(st_file *st, const char *path);
void st_close(st_file *st);

/* The tensor of that name, or NULL. */
const st_tensor *st_find(const st_file *st, const char *name);

/* The text that the file's __metadata__ has for a key, or NULL. */
const char *st_metadata(const st_file *st, const char *key);

/* Reads a tensor's bytes as they are; `buffer` holds end - begin. */
int st_read(st_file *st, const st_tensor *tensor, void *buffer);

/* Reads a tensor of type F64, F32, F16 or BF16 as floats; `buffer` holds `elements`. */
int st_read_floats(st_file *st, const st_tensor *tensor, float *buffer);

#endif
