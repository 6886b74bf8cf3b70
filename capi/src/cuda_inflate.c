/* Raw deflate (RFC 1951): canonical Huffman codes decoded bit by bit, which is fast enough for kernels of some 30 KB.
 *
 * SPDX-License-Identifier: MIT */
#include "cuda_inflate.h"

#include <string.h>

enum { MAX_BITS = 15, LITERALS = 288, DISTANCES = 32, LENGTH_CODES = 19 };

typedef struct input {
    const uint8_t *at, *end;
    uint32_t bits;
    int count;
    int failed;
} input;

/* Codes of one length are consecutive numbers: `count` codes of each length, and the symbols in the order of their codes. */
typedef struct code {
    uint16_t count[MAX_BITS + 1];
    uint16_t symbol[LITERALS];
} code;

static unsigned take(input *in, int wanted)
{
    while (in->count < wanted) {
        if (in->at == in->end) {
            in->failed = 1;
            return 0;
        }
        in->bits |= (uint32_t)*in->at++ << in->count;
        in->count += 8;
    }
    unsigned value = in->bits & ((1u << wanted) - 1);
    in->bits >>= wanted;
    in->count -= wanted;
    return value;
}

/* -1 if more codes are asked for than there are numbers. */
static int make_code(code *c, const uint8_t *lengths, int n)
{
    uint16_t offset[MAX_BITS + 2] = {0};
    memset(c->count, 0, sizeof c->count);
    for (int k = 0; k < n; k++) c->count[lengths[k]]++;
    c->count[0] = 0;
    int left = 1;
    for (int bits = 1; bits <= MAX_BITS; bits++) {
        left = 2 * left - c->count[bits];
        if (left < 0) return -1;
        offset[bits + 1] = (uint16_t)(offset[bits] + c->count[bits]);
    }
    for (int k = 0; k < n; k++)
        if (lengths[k]) c->symbol[offset[lengths[k]]++] = (uint16_t)k;
    return 0;
}

static int symbol_of(input *in, const code *c)
{
    int value = 0, first = 0, index = 0;
    for (int bits = 1; bits <= MAX_BITS; bits++) {
        value |= (int)take(in, 1);
        if (value - first < c->count[bits]) return c->symbol[index + value - first];
        index += c->count[bits];
        first = (first + c->count[bits]) << 1;
        value <<= 1;
    }
    in->failed = 1;
    return 0;
}

static int read_codes(input *in, code *literals, code *distances)
{
    static const uint8_t order[LENGTH_CODES] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[LITERALS + DISTANCES] = {0}, of_lengths[LENGTH_CODES] = {0};
    int n_literals = (int)take(in, 5) + 257, n_distances = (int)take(in, 5) + 1, n_lengths = (int)take(in, 4) + 4;
    code codes;
    if (n_literals > LITERALS || n_distances > DISTANCES) return -1;
    for (int k = 0; k < n_lengths; k++) of_lengths[order[k]] = (uint8_t)take(in, 3);
    if (in->failed || make_code(&codes, of_lengths, LENGTH_CODES)) return -1;
    for (int k = 0; k < n_literals + n_distances && !in->failed;) {
        int symbol = symbol_of(in, &codes), times = 1;
        uint8_t value = (uint8_t)symbol;
        if (symbol == 16) {
            if (!k) return -1;
            value = lengths[k - 1];
            times = 3 + (int)take(in, 2);
        } else if (symbol > 16) {
            value = 0;
            times = symbol == 17 ? 3 + (int)take(in, 3) : 11 + (int)take(in, 7);
        }
        if (k + times > n_literals + n_distances) return -1;
        while (times--) lengths[k++] = value;
    }
    if (in->failed || make_code(literals, lengths, n_literals)) return -1;
    return make_code(distances, lengths + n_literals, n_distances);
}

static void fixed_codes(code *literals, code *distances)
{
    uint8_t lengths[LITERALS], fives[DISTANCES];
    for (int k = 0; k < LITERALS; k++) lengths[k] = k < 144 ? 8 : k < 256 ? 9 : k < 280 ? 7 : 8;
    memset(fives, 5, sizeof fives);
    make_code(literals, lengths, LITERALS);
    make_code(distances, fives, DISTANCES);
}

static int stored_block(input *in, uint8_t *out, size_t *used, size_t room)
{
    in->bits = 0; /* the rest of the byte; whole bytes are not read ahead */
    in->count = 0;
    if (in->end - in->at < 4) return -1;
    size_t length = in->at[0] | (size_t)in->at[1] << 8, check = in->at[2] | (size_t)in->at[3] << 8;
    in->at += 4;
    if ((length ^ check) != 0xFFFF || (size_t)(in->end - in->at) < length || length > room - *used) return -1;
    memcpy(out + *used, in->at, length);
    in->at += length;
    *used += length;
    return 0;
}

static int coded_block(input *in, const code *literals, const code *distances, uint8_t *out, size_t *used, size_t room)
{
    static const uint16_t length_base[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                           31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const uint8_t length_bits[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    for (;;) {
        int symbol = symbol_of(in, literals);
        if (in->failed) return -1;
        if (symbol == 256) return 0;
        if (symbol < 256) {
            if (*used == room) return -1;
            out[(*used)++] = (uint8_t)symbol;
            continue;
        }
        if (symbol > 285) return -1;
        size_t length = length_base[symbol - 257] + take(in, length_bits[symbol - 257]), distance;
        int far = symbol_of(in, distances);
        if (far > 29) return -1;
        if (far < 4) distance = 1 + (size_t)far;
        else distance = 1 + ((size_t)(2 + far % 2) << (far / 2 - 1)) + take(in, far / 2 - 1);
        if (in->failed || distance > *used || length > room - *used) return -1;
        for (; length; length--, (*used)++) out[*used] = out[*used - distance];
    }
}

int tritlstm_inflate(const uint8_t *in, size_t length, uint8_t *out, size_t room)
{
    input stream = {in, in + length, 0, 0, 0};
    code literals, distances;
    size_t used = 0;
    int last;
    do {
        last = (int)take(&stream, 1);
        unsigned kind = take(&stream, 2);
        int failed = stream.failed || kind == 3;
        if (!failed && kind == 0) failed = stored_block(&stream, out, &used, room);
        else if (!failed) {
            if (kind == 1) fixed_codes(&literals, &distances);
            else failed = read_codes(&stream, &literals, &distances);
            if (!failed) failed = coded_block(&stream, &literals, &distances, out, &used, room);
        }
        if (failed) return -1;
    } while (!last);
    return used == room && stream.at == stream.end ? 0 : -1;
}
