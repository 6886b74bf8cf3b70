/* SPDX-License-Identifier: MIT */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include "safetensors.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct reader {
    const char *at, *end, *start;
    st_file *st;
} reader;

static int fail(st_file *st, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

static int fail(st_file *st, int status, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(st->error, sizeof st->error, format, list);
    va_end(list);
    return status;
}

static int damaged(reader *r, const char *expected)
{
    return fail(r->st, ST_FORMAT, "byte %ld of the header: expected %s", (long)(r->at - r->start), expected);
}

static void skip_space(reader *r)
{
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r')) r->at++;
}

static int take(reader *r, char c)
{
    skip_space(r);
    if (r->at == r->end || *r->at != c) return 0;
    r->at++;
    return 1;
}

static int hex4(reader *r, unsigned *value)
{
    *value = 0;
    if (r->end - r->at < 4) return 0;
    for (int k = 0; k < 4; k++, r->at++) {
        char c = *r->at;
        unsigned digit;
        if (c >= '0' && c <= '9') digit = (unsigned)(c - '0');
        else if (c >= 'a' && c <= 'f') digit = (unsigned)(c - 'a' + 10);
        else if (c >= 'A' && c <= 'F') digit = (unsigned)(c - 'A' + 10);
        else return 0;
        *value = *value * 16 + digit;
    }
    return 1;
}

static char *put_utf8(char *out, unsigned code)
{
    if (code < 0x80) {
        *out++ = (char)code;
    } else if (code < 0x800) {
        *out++ = (char)(0xC0 | (code >> 6));
        *out++ = (char)(0x80 | (code & 63));
    } else if (code < 0x10000) {
        *out++ = (char)(0xE0 | (code >> 12));
        *out++ = (char)(0x80 | ((code >> 6) & 63));
        *out++ = (char)(0x80 | (code & 63));
    } else {
        *out++ = (char)(0xF0 | (code >> 18));
        *out++ = (char)(0x80 | ((code >> 12) & 63));
        *out++ = (char)(0x80 | ((code >> 6) & 63));
        *out++ = (char)(0x80 | (code & 63));
    }
    return out;
}

/* Reads a string into memory that the caller frees. An escape never grows when it is resolved, so what is left of the
 * raw string bounds the copy. U+0000 is refused because a C string can't hold it. */
static int take_string(reader *r, char **result)
{
    if (!take(r, '"')) return damaged(r, "a string");
    const char *close = r->at;
    while (close < r->end && *close != '"') close += *close == '\\' && r->end - close > 1 ? 2 : 1;
    if (close >= r->end) return damaged(r, "the end of a string");
    char *text = malloc((size_t)(close - r->at) + 1), *out = text;
    if (!text) return fail(r->st, ST_MEMORY, "out of memory");
    while (r->at < close) {
        char c = *r->at;
        if ((unsigned char)c < 0x20) goto bad;
        if (c != '\\') {
            *out++ = c;
            r->at++;
            continue;
        }
        c = r->at[1];
        r->at += 2;
        static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
        const char *found = c ? strchr(names, c) : NULL;
        if (found) {
            *out++ = values[found - names];
            continue;
        }
        unsigned code, low;
        if (c != 'u' || !hex4(r, &code) || code == 0 || (code >= 0xDC00 && code <= 0xDFFF)) goto bad;
        if (code >= 0xD800 && code <= 0xDBFF) {
            if (close - r->at < 6 || r->at[0] != '\\' || r->at[1] != 'u') goto bad;
            r->at += 2;
            if (!hex4(r, &low) || low < 0xDC00 || low > 0xDFFF) goto bad;
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        out = put_utf8(out, code);
    }
    if (r->at != close) goto bad;
    *out = 0;
    r->at = close + 1;
    *result = text;
    return ST_OK;
bad:
    free(text);
    return damaged(r, "a valid character in a string");
}

static int take_integer(reader *r, uint64_t *value)
{
    skip_space(r);
    const char *first = r->at;
    *value = 0;
    while (r->at < r->end && *r->at >= '0' && *r->at <= '9') {
        unsigned digit = (unsigned)(*r->at - '0');
        if (*value > (UINT64_MAX - digit) / 10) return damaged(r, "a number below 2^64");
        *value = *value * 10 + digit;
        r->at++;
    }
    if (r->at == first || (*first == '0' && r->at - first > 1)) return damaged(r, "a whole number");
    return ST_OK;
}

/* Reads "[a, b, ...]" of at most `limit` numbers. */
static int take_integers(reader *r, uint64_t *values, int limit, int *count)
{
    *count = 0;
    if (!take(r, '[')) return damaged(r, "'['");
    if (take(r, ']')) return ST_OK;
    do {
        if (*count == limit) return damaged(r, "fewer numbers");
        int status = take_integer(r, &values[*count]);
        if (status) return status;
        ++*count;
    } while (take(r, ','));
    return take(r, ']') ? ST_OK : damaged(r, "',' or ']'");
}

static int item_bytes(const char *dtype)
{
    static const struct {
        const char *name;
        int bytes;
    } known[] = {{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4},  {"I16", 2},     {"I8", 1},
                 {"U64", 8}, {"U32", 4}, {"U16", 2}, {"U8", 1},   {"C64", 8}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    for (size_t k = 0; k < sizeof known / sizeof *known; k++)
        if (!strcmp(dtype, known[k].name)) return known[k].bytes;
    return 0;
}

static int take_tensor(reader *r, st_tensor *tensor)
{
    uint64_t shape[ST_MAX_RANK], offsets[2];
    int seen_dtype = 0, seen_shape = 0, seen_offsets = 0, count, status;
    if (!take(r, '{')) return damaged(r, "'{'");
    do {
        char *key, *text;
        if ((status = take_string(r, &key))) return status;
        int is_dtype = !strcmp(key, "dtype"), is_shape = !strcmp(key, "shape"), is_offsets = !strcmp(key, "data_offsets");
        free(key);
        if (!take(r, ':')) return damaged(r, "':'");
        if (is_dtype && !seen_dtype++) {
            if ((status = take_string(r, &text))) return status;
            size_t length = strlen(text);
            if (length >= sizeof tensor->dtype) {
                free(text);
                return damaged(r, "a shorter dtype");
            }
            memcpy(tensor->dtype, text, length + 1);
            free(text);
        } else if (is_shape && !seen_shape++) {
            if ((status = take_integers(r, shape, ST_MAX_RANK, &tensor->rank))) return status;
        } else if (is_offsets && !seen_offsets++) {
            if ((status = take_integers(r, offsets, 2, &count))) return status;
            if (count != 2) return damaged(r, "two data_offsets");
        } else {
            return damaged(r, "dtype, shape and data_offsets, each once");
        }
    } while (take(r, ','));
    if (!take(r, '}')) return damaged(r, "',' or '}'");
    if (!seen_dtype || !seen_shape || !seen_offsets) return damaged(r, "dtype, shape and data_offsets before this");

    tensor->item_bytes = item_bytes(tensor->dtype);
    tensor->elements = 1;
    for (int k = 0; k < tensor->rank; k++) {
        if (shape[k] > INT64_MAX || (shape[k] && tensor->elements > INT64_MAX / shape[k]))
            return damaged(r, "a shape whose product is below 2^63, before this");
        tensor->shape[k] = (int64_t)shape[k];
        tensor->elements *= shape[k];
    }
    tensor->begin = offsets[0];
    tensor->end = offsets[1];
    if (tensor->begin > tensor->end || tensor->end > r->st->data_bytes)
        return damaged(r, "data_offsets inside the file, before this (is it truncated?)");
    uint64_t item = (uint64_t)tensor->item_bytes;
    if (item && (tensor->elements > UINT64_MAX / item || tensor->elements * item != tensor->end - tensor->begin))
        return damaged(r, "data_offsets that fit the shape, before this");
    return ST_OK;
}

/* Appends a string, which is freed if there is no room for it. */
static int keep_metadata(st_file *st, char *text)
{
    size_t n = st->metadata_count;
    if (!(n & (n - 1))) {
        char **more = realloc(st->metadata, (n ? 2 * n : 1) * sizeof *more);
        if (!more) {
            free(text);
            return fail(st, ST_MEMORY, "out of memory");
        }
        st->metadata = more;
    }
    st->metadata[st->metadata_count++] = text;
    return ST_OK;
}

static int take_metadata(reader *r)
{
    if (r->st->metadata_count) return damaged(r, "__metadata__ once");
    if (!take(r, '{')) return damaged(r, "'{'");
    if (take(r, '}')) return ST_OK;
    do {
        for (int side = 0; side < 2; side++) {
            char *text;
            int status = take_string(r, &text);
            if (status || (status = keep_metadata(r->st, text))) return status;
            if (side == 0 && !take(r, ':')) return damaged(r, "':'");
        }
    } while (take(r, ','));
    return take(r, '}') ? ST_OK : damaged(r, "',' or '}'");
}

static int take_header(reader *r)
{
    st_file *st = r->st;
    size_t room = 0;
    if (!take(r, '{')) return damaged(r, "'{'");
    if (!take(r, '}')) {
        do {
            char *name;
            int status = take_string(r, &name);
            if (status) return status;
            if (!take(r, ':')) {
                free(name);
                return damaged(r, "':'");
            }
            if (!strcmp(name, "__metadata__")) {
                free(name);
                if ((status = take_metadata(r))) return status;
                continue;
            }
            if (st->count == room) {
                room = room ? 2 * room : 16;
                st_tensor *more = realloc(st->tensors, room * sizeof *more);
                if (!more) {
                    free(name);
                    return fail(st, ST_MEMORY, "out of memory");
                }
                st->tensors = more;
            }
            st_tensor *tensor = &st->tensors[st->count++];
            memset(tensor, 0, sizeof *tensor);
            tensor->name = name;
            if ((status = take_tensor(r, tensor))) return status;
        } while (take(r, ','));
        if (!take(r, '}')) return damaged(r, "',' or '}'");
    }
    skip_space(r);
    return r->at == r->end ? ST_OK : damaged(r, "nothing more");
}

static int by_offset(const void *a, const void *b)
{
    const st_tensor *x = *(st_tensor *const *)a, *y = *(st_tensor *const *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(st_tensor *const *)a)->name, (*(st_tensor *const *)b)->name);
}

/* No name twice, and the tensors follow one another without gaps or overlap to the end of the file. */
static int check_tensors(st_file *st)
{
    uint64_t at = 0;
    int status = ST_OK;
    st_tensor **order = malloc((st->count + 1) * sizeof *order);
    if (!order) return fail(st, ST_MEMORY, "out of memory");
    for (size_t k = 0; k < st->count; k++) order[k] = &st->tensors[k];
    qsort(order, st->count, sizeof *order, by_name);
    for (size_t k = 1; k < st->count && !status; k++)
        if (!strcmp(order[k - 1]->name, order[k]->name))
            status = fail(st, ST_FORMAT, "tensor '%.64s' stands twice in the header", order[k]->name);
    qsort(order, st->count, sizeof *order, by_offset);
    for (size_t k = 0; k < st->count && !status; k++) {
        if (order[k]->begin != at)
            status = fail(st, ST_FORMAT, "tensor '%.64s' overlaps another or leaves a gap", order[k]->name);
        at = order[k]->end;
    }
    if (!status && at != st->data_bytes)
        status = fail(st, ST_FORMAT, "%llu bytes behind the last tensor",
                      (unsigned long long)(st->data_bytes - at));
    free(order);
    return status;
}

static int read_header(st_file *st, uint64_t file_bytes)
{
    unsigned char prefix[8];
    uint64_t length = 0;
    if (file_bytes < 8 || fread(prefix, 1, 8, st->file) != 8)
        return fail(st, ST_FORMAT, "%llu bytes are too few for a safetensors file", (unsigned long long)file_bytes);
    for (int k = 7; k >= 0; k--) length = length << 8 | prefix[k];
    if (length > ST_MAX_HEADER || length > file_bytes - 8)
        return fail(st, ST_FORMAT,
                    "a header of %llu bytes is announced, the file has %llu (truncated, or no safetensors file)",
                    (unsigned long long)length, (unsigned long long)file_bytes);
    st->data_start = 8 + length;
    st->data_bytes = file_bytes - st->data_start;
    char *text = malloc((size_t)length + 1);
    if (!text) return fail(st, ST_MEMORY, "out of memory for a header of %llu bytes", (unsigned long long)length);
    int status;
    if (fread(text, 1, (size_t)length, st->file) != length) {
        status = fail(st, ST_FILE, "the header can not be read: %s", ferror(st->file) ? strerror(errno) : "file ends");
    } else {
        reader r = {text, text + length, text, st};
        status = take_header(&r);
    }
    free(text);
    return status ? status : check_tensors(st);
}

int st_open(st_file *st, const char *path)
{
    struct stat info;
    memset(st, 0, sizeof *st);
    if (stat(path, &info)) return fail(st, ST_FILE, "%s", strerror(errno));
    if (!S_ISREG(info.st_mode)) return fail(st, ST_FILE, "not a regular file");
    st->file = fopen(path, "rb");
    if (!st->file) return fail(st, errno == ENOMEM ? ST_MEMORY : ST_FILE, "%s", strerror(errno));
    int status = read_header(st, (uint64_t)info.st_size);
    if (status) st_close(st);
    return status;
}

void st_close(st_file *st)
{
    for (size_t k = 0; k < st->count; k++) free(st->tensors[k].name);
    for (size_t k = 0; k < st->metadata_count; k++) free(st->metadata[k]);
    free(st->tensors);
    free(st->metadata);
    if (st->file) fclose(st->file);
    st->tensors = NULL;
    st->metadata = NULL;
    st->file = NULL;
    st->count = st->metadata_count = 0;
}

const st_tensor *st_find(const st_file *st, const char *name)
{
    for (size_t k = 0; k < st->count; k++)
        if (!strcmp(st->tensors[k].name, name)) return &st->tensors[k];
    return NULL;
}

const char *st_metadata(const st_file *st, const char *key)
{
    for (size_t k = 0; k + 1 < st->metadata_count; k += 2)
        if (!strcmp(st->metadata[k], key)) return st->metadata[k + 1];
    return NULL;
}

int st_read(st_file *st, const st_tensor *tensor, void *buffer)
{
    uint64_t bytes = tensor->end - tensor->begin;
    if (fseeko(st->file, (off_t)(st->data_start + tensor->begin), SEEK_SET) ||
        fread(buffer, 1, (size_t)bytes, st->file) != bytes)
        return fail(st, ST_FILE, "tensor '%.64s' can not be read: %s", tensor->name,
                    ferror(st->file) ? strerror(errno) : "the file became shorter");
    return ST_OK;
}

static float from_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3FF, bits;
    float value;
    if (exponent == 31) {
        bits = sign | 0x7F800000 | fraction << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else { /* subnormal: fraction * 2^-24 is exact */
        value = (float)fraction / 16777216.0f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, 4);
    return value;
}

int st_read_floats(st_file *st, const st_tensor *tensor, float *buffer)
{
    uint64_t bytes = tensor->end - tensor->begin;
    int wide = !strcmp(tensor->dtype, "F64"), half = !strcmp(tensor->dtype, "F16"), brain = !strcmp(tensor->dtype, "BF16");
    if (!strcmp(tensor->dtype, "F32")) return st_read(st, tensor, buffer);
    if (!wide && !half && !brain)
        return fail(st, ST_FORMAT, "tensor '%.64s' is %s, not a floating-point type", tensor->name, tensor->dtype);
    unsigned char *raw = malloc((size_t)bytes + 1);
    if (!raw) return fail(st, ST_MEMORY, "out of memory for tensor '%.64s'", tensor->name);
    int status = st_read(st, tensor, raw);
    for (uint64_t k = 0; k < tensor->elements && !status; k++) {
        double number;
        uint16_t word;
        uint32_t bits;
        if (wide) {
            memcpy(&number, raw + 8 * k, 8);
            buffer[k] = (float)number;
            continue;
        }
        memcpy(&word, raw + 2 * k, 2);
        bits = (uint32_t)word << 16;
        if (half) buffer[k] = from_half(word);
        else memcpy(&buffer[k], &bits, 4);
    }
    free(raw);
    return status;
}
