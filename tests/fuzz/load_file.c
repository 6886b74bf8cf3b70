/* Fuzz target: any bytes as the file of tritlstm_create_from_safetensors, which takes options and weights from it.
 *
 * The engine here reads every weight to its end and aborts where the options are not those of an LSTM. The first two bytes say how
 * to load. */
#define _GNU_SOURCE
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int condition)
{
    if (!condition) abort();
}

const char *const tritlstm_engine_name = "none";
static volatile unsigned char sum; /* so that the reading is not left out */
static int32_t asked;

static int create(const tritlstm_options *o, const void *const *weights, const int32_t *dtypes, uint64_t *id)
{
    int64_t R = o->proj_size ? o->proj_size : o->hidden_size, P = o->bidirectional ? 2 : 1, next = 0;
    require(!o->more && weights && dtypes && o->input_size >= 1 && o->hidden_size >= 1 && R <= o->hidden_size && R >= 1);
    require(o->num_layers >= 1 && o->num_layers <= TRITLSTM_MAX_LAYERS && o->dtype >= 1 && o->dtype <= 4);
    require(!asked || o->dtype == asked);
    for (int64_t place = 0; place < o->num_layers * P; place++) {
        int64_t four = 4 * o->hidden_size, counts[5] = {four * (place < P ? o->input_size : P * R), four * R};
        int kinds = 2;
        if (o->bias) counts[kinds++] = four, counts[kinds++] = four;
        if (o->proj_size) counts[kinds++] = R * o->hidden_size;
        for (int k = 0; k < kinds; k++, next++) {
            int32_t dtype = dtypes[next];
            size_t item = dtype == TRITLSTM_FLOAT64 ? 8 : dtype == TRITLSTM_FLOAT32 ? 4 : 2;
            require(dtype >= 1 && dtype <= 4 && (asked || dtype == o->dtype));
            for (size_t n = 0; n < (size_t)counts[k] * item; n++) sum ^= ((const unsigned char *)weights[next])[n];
        }
    }
    *id = 7;
    return TRITLSTM_OK;
}

static int destroy(uint64_t id) { return require(id == 7), TRITLSTM_OK; }

int tritlstm_engine_start(tritlstm_report report, int32_t device, const tritlstm_engine_functions **engine)
{
    static const tritlstm_engine_functions functions = {
        .interface = TRITLSTM_ENGINE_INTERFACE, .create = create, .destroy = destroy};
    (void)report, (void)device;
    *engine = &functions;
    return TRITLSTM_OK;
}

int tritlstm_engine_forked(int32_t device) { return (void)device, 0; }

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char path[64];
    static int file = -1;
    tritlstm_load_options load;
    tritlstm *lstm;
    if (size < 2) return 0;
    if (file < 0) {
        file = memfd_create("input", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    require(file >= 0 && !ftruncate(file, 0) && pwrite(file, data + 2, size - 2, 0) == (ssize_t)(size - 2));
    require(!tritlstm_load_options_init(&load, sizeof load));
    load.dtype = asked = data[0] % 5;
    load.prefix = data[1] & 1 ? "m." : NULL;
    tritlstm_status status = tritlstm_create_from_safetensors(path, &load, &lstm);
    require(!status == !!lstm);
    require(!status || status == TRITLSTM_ERROR_FORMAT || status == TRITLSTM_ERROR_WEIGHTS ||
            status == TRITLSTM_ERROR_OVERFLOW || status == TRITLSTM_ERROR_ARGUMENT);
    require(!status || *tritlstm_last_error());
    tritlstm_destroy(lstm);
    return 0;
}
