/* The public functions: everything about arguments that is the same for every engine.
 *
 * SPDX-License-Identifier: MIT */
#include "engine.h"
#include "safetensors.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TEXT(number) TEXT_OF(number)
#define TEXT_OF(number) #number
#define VERSION_TEXT \
    TEXT(TRITLSTM_VERSION_MAJOR) "." TEXT(TRITLSTM_VERSION_MINOR) "." TEXT(TRITLSTM_VERSION_PATCH)

enum { LIVE_LSTM = 0x4c53544d, LIVE_STATE = 0x53544154 };
enum { MAX_PREFIX = 400, MAX_NAME = MAX_PREFIX + 64, MAX_MORE = 4096 };

/* The largest array: a pointer difference must reach over it. */
#define MAX_BYTES ((uint64_t)PTRDIFF_MAX)

struct tritlstm {
    uint32_t live;
    int references; /* the caller's, and one for each state */
    uint64_t id;
    const tritlstm_engine_functions *engine;
    tritlstm_options options; /* `more` is the handle's own copy */
    int64_t count;            /* of weights */
    tritlstm_weight *weights; /* the engine's description of them, where there is `more`; otherwise NULL */
};

struct tritlstm_state {
    uint32_t live;
    uint64_t id;
    int64_t batch;
    tritlstm *lstm;
};

/* ---- failure ----------------------------------------------------------------------------------------- */

static _Thread_local char last_error[1024];

/* Cuts at a character's border where the text did not fit. */
static void trim_utf8(char *text, size_t room)
{
    size_t length = strlen(text);
    if (length + 1 < room) return;
    while (length && ((unsigned char)text[length - 1] & 0xC0) == 0x80) length--;
    if (length && (unsigned char)text[length - 1] >= 0xC0) length--;
    text[length] = 0;
}

static void report(const char *message)
{
    snprintf(last_error, sizeof last_error, "%s", message);
    trim_utf8(last_error, sizeof last_error);
}

static int fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

static int fail(int status, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(last_error, sizeof last_error, format, list);
    va_end(list);
    trim_utf8(last_error, sizeof last_error);
    return status;
}

const char *tritlstm_status_string(tritlstm_status status)
{
    static const char *const names[] = {
        "TRITLSTM_OK",           "TRITLSTM_ERROR_ARGUMENT",    "TRITLSTM_ERROR_UNSUPPORTED", "TRITLSTM_ERROR_OVERFLOW",
        "TRITLSTM_ERROR_MEMORY", "TRITLSTM_ERROR_FILE",        "TRITLSTM_ERROR_FORMAT",      "TRITLSTM_ERROR_WEIGHTS",
        "TRITLSTM_ERROR_BUFFER", "TRITLSTM_ERROR_STATE",       "TRITLSTM_ERROR_UNAVAILABLE", "TRITLSTM_ERROR_DEVICE",
        "TRITLSTM_ERROR_FORKED", "TRITLSTM_ERROR_INTERNAL",
    };
    return status >= 0 && (size_t)status < sizeof names / sizeof *names ? names[status] : "unknown status";
}

const char *tritlstm_last_error(void) { return last_error; }
int tritlstm_version(void) { return TRITLSTM_VERSION; }
const char *tritlstm_version_string(void) { return VERSION_TEXT; }
const char *tritlstm_engine(void) { return tritlstm_engine_name; }

static int null_argument(const char *name) { return fail(TRITLSTM_ERROR_ARGUMENT, "%s is NULL", name); }

/* ---- structs that grow ------------------------------------------------------------------------------- */

/* The sizes that structs had when they first appeared. */
#define FIRST_OPTIONS offsetof(tritlstm_options, more)
#define FIRST_LOAD_OPTIONS offsetof(tritlstm_load_options, more)
#define FIRST_FORWARD_ARGS offsetof(tritlstm_forward_args, resets)
#define FIRST_BACKWARD_ARGS offsetof(tritlstm_backward_args, resets)

/* Only two versions so far: no size between `first` and ours has been. */
static int had_size(size_t size, size_t our_size, size_t first)
{
    return size == first || (size >= our_size && size <= 4096);
}

/* Copies a caller's struct, which may be of an older or newer version, into one of this version. */
static int take_struct(void *ours, size_t our_size, size_t first, const void *theirs, const char *type)
{
    size_t size;
    if (!theirs) return null_argument(type);
    memcpy(&size, theirs, sizeof size);
    if (!had_size(size, our_size, first))
        return fail(TRITLSTM_ERROR_ARGUMENT, "%s.size is %zu, which no version had: call tritlstm_%s_init first", type,
                    size, type);
    for (size_t k = our_size; k < size; k++)
        if (((const unsigned char *)theirs)[k])
            return fail(TRITLSTM_ERROR_UNSUPPORTED,
                        "%s has a member set that library version " VERSION_TEXT " does not know: update the library",
                        type);
    memset(ours, 0, our_size);
    memcpy(ours, theirs, size < our_size ? size : our_size);
    memcpy(ours, &our_size, sizeof our_size);
    return TRITLSTM_OK;
}

/* Writes a struct of this version into a caller's of `size` bytes; what the caller knows beyond is zeroed. */
static int give_struct(void *theirs, size_t size, const void *ours, size_t our_size, size_t first, const char *type)
{
    if (!theirs) return null_argument(type);
    if (!had_size(size, our_size, first))
        return fail(TRITLSTM_ERROR_ARGUMENT, "size %zu is not that of a %s: pass sizeof(tritlstm_%s)", size, type, type);
    memset(theirs, 0, size);
    memcpy(theirs, ours, size < our_size ? size : our_size);
    memcpy(theirs, &size, sizeof size);
    return TRITLSTM_OK;
}

tritlstm_status tritlstm_options_init(tritlstm_options *options, size_t size)
{
    tritlstm_options defaults = {0};
    defaults.num_layers = 1;
    defaults.bias = 1;
    defaults.dtype = TRITLSTM_FLOAT32;
    defaults.device = TRITLSTM_CPU;
    defaults.initial_weights = TRITLSTM_WEIGHTS_UNIFORM;
    return give_struct(options, size, &defaults, sizeof defaults, FIRST_OPTIONS, "options");
}

tritlstm_status tritlstm_load_options_init(tritlstm_load_options *options, size_t size)
{
    tritlstm_load_options defaults = {0};
    defaults.device = TRITLSTM_CPU;
    return give_struct(options, size, &defaults, sizeof defaults, FIRST_LOAD_OPTIONS, "load_options");
}

tritlstm_status tritlstm_forward_args_init(tritlstm_forward_args *args, size_t size)
{
    tritlstm_forward_args empty = {0};
    return give_struct(args, size, &empty, sizeof empty, FIRST_FORWARD_ARGS, "forward_args");
}

tritlstm_status tritlstm_backward_args_init(tritlstm_backward_args *args, size_t size)
{
    tritlstm_backward_args empty = {0};
    return give_struct(args, size, &empty, sizeof empty, FIRST_BACKWARD_ARGS, "backward_args");
}

/* ---- options and weights ----------------------------------------------------------------------------- */

static size_t element_bytes(int32_t dtype)
{
    return dtype == TRITLSTM_FLOAT64 ? 8 : dtype == TRITLSTM_FLOAT32 ? 4 : 2;
}

static int64_t directions(const tritlstm_options *o) { return o->bidirectional ? 2 : 1; }
static int64_t recurrent_width(const tritlstm_options *o) { return o->proj_size ? o->proj_size : o->hidden_size; }
static int weights_per_direction(const tritlstm_options *o) { return 2 + (o->bias ? 2 : 0) + (o->proj_size ? 1 : 0); }
static int64_t weight_count(const tritlstm_options *o)
{
    return o->num_layers * directions(o) * weights_per_direction(o);
}

/* bytes *= factor, or 0 if the product passes MAX_BYTES. */
static int multiply(uint64_t *bytes, int64_t factor)
{
    if (factor && *bytes > MAX_BYTES / (uint64_t)factor) return 0;
    *bytes *= (uint64_t)factor;
    return 1;
}

/* Size in bytes of an array, or an error that names it. */
static int array_bytes(const char *name, const tritlstm_options *o, int64_t a, int64_t b, int64_t c, size_t *bytes)
{
    uint64_t product = element_bytes(o->dtype);
    if (!multiply(&product, a) || !multiply(&product, b) || !multiply(&product, c))
        return fail(TRITLSTM_ERROR_OVERFLOW, "%s: %" PRId64 " x %" PRId64 " x %" PRId64 " elements are too large", name,
                    a, b, c);
    *bytes = (size_t)product;
    return TRITLSTM_OK;
}

/* Name and extents of weight `index`, which is in range; columns is 0 for a vector. */
static void describe_weight(const tritlstm_options *o, int64_t index, char name[48], int64_t *rows, int64_t *columns)
{
    static const char *const kinds[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};
    int each = weights_per_direction(o), kind = (int)(index % each);
    int64_t place = index / each, layer = place / directions(o), reverse = place % directions(o);
    if (!o->bias && kind == 2) kind = 4;
    snprintf(name, 48, "%s_l%d%s", kinds[kind], (int)layer, reverse ? "_reverse" : "");
    *rows = kind == 4 ? o->proj_size : 4 * o->hidden_size;
    *columns = kind == 0   ? (layer ? directions(o) * recurrent_width(o) : o->input_size)
               : kind == 1 ? recurrent_width(o)
               : kind == 4 ? o->hidden_size
                           : 0;
}

static int plain_weight_bytes(const tritlstm_options *o, int64_t index, size_t *bytes)
{
    char name[48];
    int64_t rows, columns;
    describe_weight(o, index, name, &rows, &columns);
    return array_bytes(name, o, rows, columns ? columns : 1, 1, bytes);
}

/* Name and extents of a handle's weight `index`, which is in range. */
static void describe(const tritlstm *lstm, int64_t index, tritlstm_weight *weight)
{
    if (lstm->weights) *weight = lstm->weights[index];
    else describe_weight(&lstm->options, index, weight->name, &weight->rows, &weight->columns);
}

static int weight_bytes(const tritlstm *lstm, int64_t index, size_t *bytes)
{
    tritlstm_weight w;
    describe(lstm, index, &w);
    return array_bytes(w.name, &lstm->options, w.rows, w.columns ? w.columns : 1, 1, bytes);
}

static int check_extent(const char *name, int64_t value, int64_t least)
{
    if (value < least)
        return fail(TRITLSTM_ERROR_ARGUMENT, "%s is %" PRId64 ", but must be at least %" PRId64, name, value, least);
    return TRITLSTM_OK;
}

static int check_switch(const char *name, int32_t value)
{
    if (value != 0 && value != 1) return fail(TRITLSTM_ERROR_ARGUMENT, "%s is %d, but must be 0 or 1", name, (int)value);
    return TRITLSTM_OK;
}

static int check_device(int32_t device, int32_t index)
{
    if (device != TRITLSTM_CPU && device != TRITLSTM_CUDA)
        return fail(TRITLSTM_ERROR_ARGUMENT, "device is %d: TRITLSTM_CPU (1) or TRITLSTM_CUDA (2)", (int)device);
    if (index < 0 || (device == TRITLSTM_CPU && index != 0))
        return fail(TRITLSTM_ERROR_ARGUMENT, "device_index is %d: %s", (int)index,
                    device == TRITLSTM_CPU ? "must be 0 with TRITLSTM_CPU" : "must not be negative");
    return TRITLSTM_OK;
}

static int check_dtype(int32_t dtype)
{
    if (dtype < TRITLSTM_FLOAT32 || dtype > TRITLSTM_FLOAT64)
        return fail(TRITLSTM_ERROR_ARGUMENT,
                    "dtype is %d: TRITLSTM_FLOAT32 (1), _FLOAT16 (2), _BFLOAT16 (3) or _FLOAT64 (4)", (int)dtype);
    return TRITLSTM_OK;
}

static int check_more(const char *more)
{
    for (size_t length = 0; more && more[length]; length++)
        if (length == MAX_MORE)
            return fail(TRITLSTM_ERROR_ARGUMENT, "more is longer than %d bytes: it begins \"%.40s\"", (int)MAX_MORE,
                        more);
    return TRITLSTM_OK;
}

static int check_options(const tritlstm_options *o)
{
    int status;
    if ((status = check_extent("input_size", o->input_size, 1)) ||
        (status = check_extent("hidden_size", o->hidden_size, 1)) ||
        (status = check_extent("num_layers", o->num_layers, 1)) ||
        (status = check_extent("proj_size", o->proj_size, 0)) || (status = check_switch("bias", o->bias)) ||
        (status = check_switch("bidirectional", o->bidirectional)) ||
        (status = check_switch("batch_first", o->batch_first)) || (status = check_dtype(o->dtype)) ||
        (status = check_device(o->device, o->device_index)))
        return status;
    if (o->num_layers > TRITLSTM_MAX_LAYERS)
        return fail(TRITLSTM_ERROR_ARGUMENT, "num_layers is %" PRId64 ", but may be at most %d", o->num_layers,
                    TRITLSTM_MAX_LAYERS);
    if (o->proj_size >= o->hidden_size)
        return fail(TRITLSTM_ERROR_ARGUMENT, "proj_size is %" PRId64 ", but must be smaller than hidden_size %" PRId64,
                    o->proj_size, o->hidden_size);
    if (o->initial_weights != TRITLSTM_WEIGHTS_UNIFORM && o->initial_weights != TRITLSTM_WEIGHTS_ZERO)
        return fail(TRITLSTM_ERROR_ARGUMENT, "initial_weights is %d: TRITLSTM_WEIGHTS_UNIFORM (1) or _ZERO (2)",
                    (int)o->initial_weights);
    if (o->reserved) return fail(TRITLSTM_ERROR_ARGUMENT, "reserved is %d, but must be 0", (int)o->reserved);
    if ((status = check_more(o->more))) return status;

    /* 8 * H bounds 4 * H and the two directions' outputs, so describe_weight can't overflow after this. */
    if (o->hidden_size > INT64_MAX / 8)
        return fail(TRITLSTM_ERROR_OVERFLOW, "hidden_size %" PRId64 " is too large", o->hidden_size);
    uint64_t total = 0;
    for (int64_t k = 0; k < weight_count(o); k++) {
        size_t bytes;
        if ((status = plain_weight_bytes(o, k, &bytes))) return status;
        if (bytes > MAX_BYTES - total)
            return fail(TRITLSTM_ERROR_OVERFLOW, "the weights of %" PRId64 " layers are too large together",
                        o->num_layers);
        total += bytes;
    }
    return TRITLSTM_OK;
}

/* ---- arrays ------------------------------------------------------------------------------------------ */

typedef struct array {
    const char *name;
    uintptr_t begin, end;
    int written;
    size_t place; /* among the arguments: of two that begin together, the earlier is named first */
} array;

typedef struct arrays {
    int status;
    size_t count;
    array *items;
} arrays;

/* Arrays of a call that are noted on the stack; for the gradients of more weights than that, memory is allocated. */
enum { FEW = 528 };

/* Checks one array and notes it for the overlap check. NULL is allowed unless `needed`. */
static void add_array(arrays *set, const char *name, const void *pointer, size_t bytes, size_t alignment, int needed,
                      int written)
{
    uintptr_t begin = (uintptr_t)pointer;
    if (set->status) return;
    if (!pointer) {
        if (needed) set->status = null_argument(name);
        return;
    }
    if (begin % alignment) {
        set->status = fail(TRITLSTM_ERROR_ARGUMENT, "%s is at address %p, not a multiple of %zu bytes", name, pointer,
                           alignment);
        return;
    }
    if (bytes > UINTPTR_MAX - begin) {
        set->status = fail(TRITLSTM_ERROR_OVERFLOW, "%s of %zu bytes does not fit the address space", name, bytes);
        return;
    }
    if (bytes) {
        set->items[set->count] = (array){name, begin, begin + bytes, written, set->count};
        set->count++;
    }
}

static int later(const array *a, const array *b)
{
    return a->begin > b->begin || (a->begin == b->begin && a->place > b->place);
}

/* Shell's sort with the gaps of Ciura (2001): in place, where the C library's qsort may allocate. */
static void sort_by_address(array *items, size_t count)
{
    static const size_t gaps[] = {29524, 9842, 1750, 701, 301, 132, 57, 23, 10, 4, 1};
    for (size_t g = 0; g < sizeof gaps / sizeof *gaps; g++)
        for (size_t k = gaps[g]; k < count; k++) {
            array moved = items[k];
            size_t at = k;
            for (; at >= gaps[g] && later(&items[at - gaps[g]], &moved); at -= gaps[g])
                items[at] = items[at - gaps[g]];
            items[at] = moved;
        }
}

static int check_overlap(arrays *set)
{
    if (set->status) return set->status;
    sort_by_address(set->items, set->count);
    const array *farthest = NULL, *written = NULL; /* of those before: which reaches farthest */
    for (size_t k = 0; k < set->count; k++) {
        const array *now = &set->items[k], *hit = NULL;
        if (written && now->begin < written->end) hit = written;
        else if (now->written && farthest && now->begin < farthest->end) hit = farthest;
        if (hit) return fail(TRITLSTM_ERROR_ARGUMENT, "%s and %s overlap in memory", hit->name, now->name);
        if (!farthest || now->end > farthest->end) farthest = now;
        if (now->written && (!written || now->end > written->end)) written = now;
    }
    return TRITLSTM_OK;
}

static int check_stream(const tritlstm_options *o, const void *stream)
{
    if (o->device == TRITLSTM_CPU && stream)
        return fail(TRITLSTM_ERROR_ARGUMENT, "stream is %p, but must be NULL with TRITLSTM_CPU", stream);
    return TRITLSTM_OK;
}

/* ---- handles ----------------------------------------------------------------------------------------- */

static int check_fork(int32_t device)
{
    if (!tritlstm_engine_forked(device)) return TRITLSTM_OK;
    return fail(TRITLSTM_ERROR_FORKED, "this process was forked after its parent had used the library: "
                                       "create handles in the child before the parent does, or do not fork");
}

static int check_lstm(const tritlstm *lstm)
{
    if (!lstm) return null_argument("lstm");
    if (lstm->live != LIVE_LSTM) return fail(TRITLSTM_ERROR_ARGUMENT, "lstm is not a handle, or was destroyed");
    return check_fork(lstm->options.device);
}

static int check_state(const tritlstm_state *state)
{
    if (!state) return null_argument("state");
    if (state->live != LIVE_STATE) return fail(TRITLSTM_ERROR_ARGUMENT, "state is not a handle, or was destroyed");
    return check_fork(state->lstm->options.device);
}

static void discard(tritlstm *lstm)
{
    if (!lstm) return;
    free((char *)lstm->options.more);
    free(lstm->weights);
    free(lstm);
}

static void release(tritlstm *lstm)
{
    if (__atomic_sub_fetch(&lstm->references, 1, __ATOMIC_ACQ_REL)) return;
    if (!tritlstm_engine_forked(lstm->options.device)) lstm->engine->destroy(lstm->id);
    discard(lstm);
}

/* Gives the handle a copy of options.more, and the weights that come of it. */
static int take_more(tritlstm *lstm, const char *more)
{
    tritlstm_options *o = &lstm->options;
    int64_t count = 0, found;
    int status;
    if (!lstm->engine->describe)
        return fail(TRITLSTM_ERROR_UNSUPPORTED,
                    "more is \"%.200s\", but the engine \"%s\" runs the plain LSTM alone: leave it NULL, or link "
                    "libtritlstm_python",
                    more, tritlstm_engine_name);
    char *copy = malloc(strlen(more) + 1);
    if (!copy) return fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    o->more = strcpy(copy, more);
    if ((status = lstm->engine->describe(o, 0, NULL, &count))) return status;
    if (count < lstm->count)
        return fail(TRITLSTM_ERROR_INTERNAL, "the engine has %" PRId64 " weights instead of %" PRId64, count,
                    lstm->count);
    if (!(lstm->weights = calloc((size_t)count, sizeof *lstm->weights)))
        return fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    if ((status = lstm->engine->describe(o, count, lstm->weights, &found))) return status;
    for (int64_t k = 0; k < count; k++) lstm->weights[k].name[sizeof lstm->weights[k].name - 1] = 0;
    lstm->count = count;
    return TRITLSTM_OK;
}

/* A handle that knows its weights but has none yet: `finish` or `discard` it. */
static int begin(const tritlstm_options *options, tritlstm **result)
{
    const tritlstm_engine_functions *engine;
    int status = check_fork(options->device);
    if (status || (status = tritlstm_engine_start(report, options->device, &engine))) return status;
    tritlstm *lstm = calloc(1, sizeof *lstm);
    if (!lstm) return fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    lstm->engine = engine;
    lstm->options = *options;
    lstm->options.more = NULL;
    lstm->count = weight_count(options);
    if (options->more && *options->more && (status = take_more(lstm, options->more))) {
        discard(lstm);
        return status;
    }
    *result = lstm;
    return TRITLSTM_OK;
}

/* weights: NULL, or lstm->count pointers, of which those of further weights may be NULL. */
static int finish(tritlstm *lstm, const void *const *weights, const int32_t *dtypes, tritlstm **result)
{
    int status = lstm->engine->create(&lstm->options, weights, dtypes, &lstm->id);
    if (status) {
        discard(lstm);
        return status;
    }
    lstm->live = LIVE_LSTM;
    lstm->references = 1;
    *result = lstm;
    return TRITLSTM_OK;
}

tritlstm_status tritlstm_create(const tritlstm_options *options, const void *const *weights, tritlstm **lstm)
{
    tritlstm_options o;
    tritlstm *made;
    int status;
    if (!lstm) return null_argument("lstm");
    *lstm = NULL;
    if ((status = take_struct(&o, sizeof o, FIRST_OPTIONS, options, "options")) || (status = check_options(&o)))
        return status;
    int64_t plain = weight_count(&o);
    for (int64_t k = 0; weights && k < plain; k++) {
        char name[48];
        int64_t rows, columns;
        describe_weight(&o, k, name, &rows, &columns);
        if (!weights[k])
            return fail(TRITLSTM_ERROR_ARGUMENT, "weights[%" PRId64 "] (%s) is NULL: give all %" PRId64 " or none", k,
                        name, plain);
        if ((uintptr_t)weights[k] % element_bytes(o.dtype))
            return fail(TRITLSTM_ERROR_ARGUMENT, "weights[%" PRId64 "] (%s) is not aligned to %zu bytes", k, name,
                        element_bytes(o.dtype));
    }
    if ((status = begin(&o, &made))) return status;
    if (!weights || made->count == plain) return finish(made, weights, NULL, lstm);
    const void **all = calloc((size_t)made->count, sizeof *all);
    if (!all) {
        discard(made);
        return fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    }
    memcpy(all, weights, (size_t)plain * sizeof *all);
    status = finish(made, (const void *const *)all, NULL, lstm);
    free(all);
    return status;
}

void tritlstm_destroy(tritlstm *lstm)
{
    if (!lstm || lstm->live != LIVE_LSTM) return;
    lstm->live = 0;
    release(lstm);
}

tritlstm_status tritlstm_get_options(const tritlstm *lstm, tritlstm_options *options)
{
    int status = check_lstm(lstm);
    if (status) return status;
    if (!options) return null_argument("options");
    return give_struct(options, options->size, &lstm->options, sizeof lstm->options, FIRST_OPTIONS, "options");
}

/* ---- files ------------------------------------------------------------------------------------------- */

static const st_tensor *find_weight(const st_file *file, const char *prefix, const char *name)
{
    char full[MAX_NAME];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    return st_find(file, full);
}

static int dtype_of(const st_tensor *tensor)
{
    static const char *const names[] = {"F32", "F16", "BF16", "F64"};
    for (int k = 0; k < 4; k++)
        if (!strcmp(tensor->dtype, names[k])) return k + 1;
    return 0;
}

/* "weight_ih_l0 is not there", and where it is instead. */
static int no_weights(const st_file *file, const char *prefix)
{
    static const char wanted[] = "weight_ih_l0";
    for (size_t k = 0; k < file->count; k++) {
        const char *name = file->tensors[k].name;
        size_t length = strlen(name), tail = sizeof wanted - 1;
        if (length > tail && length <= tail + MAX_PREFIX && !strcmp(name + length - tail, wanted))
            return fail(TRITLSTM_ERROR_WEIGHTS, "the file has no '%s%s', but '%s': set prefix to \"%.*s\"", prefix,
                        wanted, name, (int)(length - tail), name);
    }
    return fail(TRITLSTM_ERROR_WEIGHTS, "the file has no '%s%s' (of %zu tensors): is it of an LSTM?", prefix, wanted,
                file->count);
}

/* Takes sizes and switches from the tensors' names and shapes; read_weights compares the rest. */
static int options_from_file(const st_file *file, const char *prefix, tritlstm_options *o)
{
    const st_tensor *w_ih = find_weight(file, prefix, "weight_ih_l0"), *w_hr = find_weight(file, prefix, "weight_hr_l0");
    char name[48];
    if (!w_ih) return no_weights(file, prefix);
    if (w_ih->rank != 2 || w_ih->shape[0] < 4 || w_ih->shape[0] % 4 || w_ih->shape[1] < 1)
        return fail(TRITLSTM_ERROR_WEIGHTS, "'%sweight_ih_l0' is not a [4 * hidden_size, input_size] matrix", prefix);
    o->hidden_size = w_ih->shape[0] / 4;
    o->input_size = w_ih->shape[1];
    o->bias = find_weight(file, prefix, "bias_ih_l0") != NULL;
    o->bidirectional = find_weight(file, prefix, "weight_ih_l0_reverse") != NULL;
    if (w_hr) {
        if (w_hr->rank != 2 || w_hr->shape[0] < 1 || w_hr->shape[0] >= o->hidden_size)
            return fail(TRITLSTM_ERROR_WEIGHTS, "'%sweight_hr_l0' is not a [proj_size, hidden_size] matrix", prefix);
        o->proj_size = w_hr->shape[0];
    }
    o->num_layers = 0;
    for (int layer = 0; layer <= TRITLSTM_MAX_LAYERS; layer++) {
        snprintf(name, sizeof name, "weight_ih_l%d", layer);
        if (!find_weight(file, prefix, name)) continue;
        if (layer != o->num_layers)
            return fail(TRITLSTM_ERROR_WEIGHTS, "the file has '%s%s' but not layer %" PRId64, prefix, name,
                        o->num_layers);
        o->num_layers++;
    }
    if (o->dtype == TRITLSTM_DTYPE_OF_FILE && !(o->dtype = dtype_of(w_ih)))
        return fail(TRITLSTM_ERROR_WEIGHTS, "'%sweight_ih_l0' is %s: only F64, F32, F16 and BF16 can be read", prefix,
                    w_ih->dtype);
    return check_options(o);
}

static int file_status(int status)
{
    return status == ST_FILE     ? TRITLSTM_ERROR_FILE
           : status == ST_FORMAT ? TRITLSTM_ERROR_FORMAT
           : status == ST_MEMORY ? TRITLSTM_ERROR_MEMORY
                                 : TRITLSTM_OK;
}

static const char *shape_text(const st_tensor *tensor, char *text, size_t room)
{
    size_t at = (size_t)snprintf(text, room, "[");
    for (int k = 0; k < tensor->rank && at < room; k++)
        at += (size_t)snprintf(text + at, room - at, "%s%" PRId64, k ? ", " : "", tensor->shape[k]);
    if (at < room) snprintf(text + at, room - at, "]");
    return text;
}

static int has_weight(const tritlstm *lstm, const char *name)
{
    for (int64_t k = 0; lstm->weights && k < lstm->count; k++)
        if (!strcmp(lstm->weights[k].name, name)) return 1;
    return 0;
}

/* A file of a variant does not become the plain LSTM, nor another variant. */
static int check_variant(const st_file *file, const char *prefix, const tritlstm *lstm)
{
    static const char *const variants[][3] = {{"weight_ch_l0", "peepholes", "peephole=True"},
                                              {"norm_ih_l0", "layer normalisation", "layer_norm=True"}};
    for (size_t k = 0; k < sizeof variants / sizeof *variants; k++)
        if (find_weight(file, prefix, variants[k][0]) && !has_weight(lstm, variants[k][0]))
            return fail(TRITLSTM_ERROR_WEIGHTS,
                        "the file has '%s%s': it is of an LSTM with %s, which only the engine \"python\" runs: with "
                        "\"%s\" in load_options.more",
                        prefix, variants[k][0], variants[k][1], variants[k][2]);
    return TRITLSTM_OK;
}

static int read_weights(st_file *file, const char *prefix, const tritlstm *lstm, int same_dtype, void **weights,
                        int32_t *dtypes)
{
    for (int64_t k = 0; k < lstm->count; k++) {
        tritlstm_weight w;
        describe(lstm, k, &w);
        const char *name = w.name;
        int64_t rows = w.rows, columns = w.columns;
        const st_tensor *tensor = find_weight(file, prefix, name);
        if (!tensor) return fail(TRITLSTM_ERROR_WEIGHTS, "the file has no '%s%s'", prefix, name);
        if (tensor->rank != (columns ? 2 : 1) || tensor->shape[0] != rows || (columns && tensor->shape[1] != columns)) {
            char found[96], wanted[48];
            if (columns) snprintf(wanted, sizeof wanted, "[%" PRId64 ", %" PRId64 "]", rows, columns);
            else snprintf(wanted, sizeof wanted, "[%" PRId64 "]", rows);
            return fail(TRITLSTM_ERROR_WEIGHTS, "'%s%s' has shape %s instead of %s", prefix, name,
                        shape_text(tensor, found, sizeof found), wanted);
        }
        dtypes[k] = dtype_of(tensor);
        if (!dtypes[k] || (same_dtype && dtypes[k] != lstm->options.dtype))
            return fail(TRITLSTM_ERROR_WEIGHTS, "'%s%s' is stored as %s: %s", prefix, name, tensor->dtype,
                        dtypes[k] ? "the weights differ in type, so name one in load_options.dtype"
                                  : "only F64, F32, F16 and BF16 can be read");
        weights[k] = malloc((size_t)(tensor->end - tensor->begin));
        if (!weights[k])
            return fail(TRITLSTM_ERROR_MEMORY, "out of memory for '%s%s' of %" PRIu64 " bytes", prefix, name,
                        tensor->end - tensor->begin);
        int status = st_read(file, tensor, weights[k]);
        if (status) return fail(file_status(status), "%s", file->error);
    }
    return TRITLSTM_OK;
}

static int create_from_file(st_file *file, const char *prefix, tritlstm_options *o, tritlstm **lstm)
{
    int same_dtype = o->dtype == TRITLSTM_DTYPE_OF_FILE, status = options_from_file(file, prefix, o);
    if (status) return status;
    tritlstm *made;
    if ((status = begin(o, &made))) return status;
    if ((status = check_variant(file, prefix, made))) {
        discard(made);
        return status;
    }
    size_t count = (size_t)made->count;
    void **weights = calloc(count, sizeof *weights);
    int32_t *dtypes = calloc(count, sizeof *dtypes);
    if (!weights || !dtypes) status = fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    else status = read_weights(file, prefix, made, same_dtype, weights, dtypes);
    if (status) discard(made);
    else status = finish(made, (const void *const *)weights, dtypes, lstm);
    for (size_t k = 0; weights && k < count; k++) free(weights[k]);
    free(weights);
    free(dtypes);
    return status;
}

tritlstm_status tritlstm_create_from_safetensors(const char *path, const tritlstm_load_options *options, tritlstm **lstm)
{
    tritlstm_load_options load;
    tritlstm_options o;
    st_file file;
    int status;
    if (!lstm) return null_argument("lstm");
    *lstm = NULL;
    if (!path) return null_argument("path");
    tritlstm_load_options_init(&load, sizeof load);
    if (options && (status = take_struct(&load, sizeof load, FIRST_LOAD_OPTIONS, options, "load_options"))) return status;
    if (load.dtype != TRITLSTM_DTYPE_OF_FILE && (status = check_dtype(load.dtype))) return status;
    if ((status = check_device(load.device, load.device_index)) ||
        (status = check_switch("batch_first", load.batch_first)) || (status = check_more(load.more)))
        return status;
    const char *prefix = load.prefix ? load.prefix : "";
    if (strlen(prefix) > MAX_PREFIX)
        return fail(TRITLSTM_ERROR_ARGUMENT, "prefix is longer than %d bytes", (int)MAX_PREFIX);

    tritlstm_options_init(&o, sizeof o);
    o.dtype = load.dtype;
    o.device = load.device;
    o.device_index = load.device_index;
    o.batch_first = load.batch_first;
    o.more = load.more;
    if ((status = st_open(&file, path))) {
        fail(file_status(status), "'%.400s': %s", path, file.error);
        return file_status(status);
    }
    status = create_from_file(&file, prefix, &o, lstm);
    st_close(&file);
    return status;
}

/* ---- weights ----------------------------------------------------------------------------------------- */

tritlstm_status tritlstm_num_weights(const tritlstm *lstm, int64_t *count)
{
    int status = check_lstm(lstm);
    if (status) return status;
    if (!count) return null_argument("count");
    *count = lstm->count;
    return TRITLSTM_OK;
}

tritlstm_status tritlstm_weight_info(const tritlstm *lstm, int64_t index, tritlstm_weight *weight)
{
    tritlstm_weight ours = {0};
    int status = check_lstm(lstm);
    if (status) return status;
    if (!weight) return null_argument("weight");
    if (index < 0 || index >= lstm->count)
        return fail(TRITLSTM_ERROR_ARGUMENT, "weight %" PRId64 " of %" PRId64, index, lstm->count);
    describe(lstm, index, &ours);
    if ((status = weight_bytes(lstm, index, &ours.bytes))) return status;
    return give_struct(weight, weight->size, &ours, sizeof ours, sizeof ours, "weight");
}

/* For copies: where the caller's side of them is. */
static int check_copy(const tritlstm_options *o, int32_t device, const void *stream)
{
    int status = check_device(device, 0);
    if (status) return status;
    if (device != TRITLSTM_CPU && device != o->device)
        return fail(TRITLSTM_ERROR_ARGUMENT, "device is %d, but the handle's is %d: pass that or TRITLSTM_CPU (1)",
                    (int)device, (int)o->device);
    return check_stream(o, stream);
}

static int check_weights(const tritlstm *lstm, const void *const *weights, int32_t device, const void *stream,
                         int written)
{
    array few[FEW];
    arrays set = {0, 0, few};
    int status = check_lstm(lstm);
    if (status) return status;
    const tritlstm_options *o = &lstm->options;
    size_t count = (size_t)lstm->count;
    if (!weights) return null_argument("weights");
    if ((status = check_copy(o, device, stream))) return status;
    if (count > FEW && !(set.items = malloc(count * sizeof *set.items)))
        return fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    for (size_t k = 0; k < count; k++) {
        size_t bytes = 0;
        if (!set.status) set.status = weight_bytes(lstm, (int64_t)k, &bytes);
        add_array(&set, "weights", weights[k], bytes, element_bytes(o->dtype), 0, written);
    }
    status = check_overlap(&set);
    if (set.items != few) free(set.items);
    return status;
}

tritlstm_status tritlstm_get_weights(const tritlstm *lstm, void *const *weights, int32_t device, void *stream)
{
    int status = check_weights(lstm, (const void *const *)weights, device, stream, 1);
    return status ? status : lstm->engine->get_weights(lstm->id, weights, device, stream);
}

tritlstm_status tritlstm_set_weights(tritlstm *lstm, const void *const *weights, int32_t device, void *stream)
{
    int status = check_weights(lstm, weights, device, stream, 0);
    return status ? status : lstm->engine->set_weights(lstm->id, weights, device, stream);
}

/* ---- forward and backward ---------------------------------------------------------------------------- */

typedef struct extents {
    size_t x, out, h, c, element;
} extents;

/* Sizes of a call's arrays, and that no array of the engine's own (gates of all layers, padded) overflows. */
static int call_extents(const tritlstm_options *o, int64_t steps, int64_t batch, extents *e)
{
    int64_t rows = o->num_layers * directions(o), width = recurrent_width(o);
    int status;
    if ((status = check_extent("steps", steps, 1)) || (status = check_extent("batch", batch, 1))) return status;
    e->element = element_bytes(o->dtype);
    if ((status = array_bytes("x", o, steps, batch, o->input_size, &e->x)) ||
        (status = array_bytes("out", o, steps, batch, directions(o) * width, &e->out)) ||
        (status = array_bytes("h0", o, rows, batch, width, &e->h)) ||
        (status = array_bytes("c0", o, rows, batch, o->hidden_size, &e->c)))
        return status;
    uint64_t all = 8 * 8; /* four gates, the cell and the layers' outputs, each in at most 8 bytes */
    if (!multiply(&all, steps) || !multiply(&all, batch) || !multiply(&all, rows) || !multiply(&all, o->hidden_size + 7))
        return fail(TRITLSTM_ERROR_OVERFLOW,
                    "gates: %" PRId64 " steps x %" PRId64 " batch x %" PRId64 " layers and directions x 4 x %" PRId64
                    " are too large",
                    steps, batch, rows, o->hidden_size);
    return TRITLSTM_OK;
}

static int check_lengths(const tritlstm_options *o, const int32_t *lengths, int64_t steps, int64_t batch)
{
    if (!lengths || o->device != TRITLSTM_CPU) return TRITLSTM_OK;
    for (int64_t b = 0; b < batch; b++)
        if (lengths[b] < 0 || lengths[b] > steps)
            return fail(TRITLSTM_ERROR_ARGUMENT, "lengths[%" PRId64 "] is %d, but must be 0 ... steps (%" PRId64 ")", b,
                        (int)lengths[b], steps);
    return TRITLSTM_OK;
}

static int check_resets(const tritlstm *lstm, const uint8_t *resets)
{
    if (!resets || lstm->engine->describe) return TRITLSTM_OK;
    return fail(TRITLSTM_ERROR_UNSUPPORTED,
                "resets is given, but the engine \"%s\" has none: leave it NULL and call once for each stretch between "
                "resets, or link libtritlstm_python",
                tritlstm_engine_name);
}

static void add_scratch(arrays *set, const char *name, const void *pointer, size_t bytes, int written)
{
    add_array(set, name, pointer, bytes, TRITLSTM_ALIGNMENT, bytes != 0, written);
}

tritlstm_status tritlstm_sizes(const tritlstm *lstm, int64_t steps, int64_t batch, int32_t training,
                               size_t *workspace_bytes, size_t *reserve_bytes)
{
    size_t workspace, reserve;
    extents e;
    int status = check_lstm(lstm);
    if (status || (status = check_switch("training", training)) ||
        (status = call_extents(&lstm->options, steps, batch, &e)) ||
        (status = lstm->engine->sizes(lstm->id, steps, batch, training, &workspace, &reserve)))
        return status;
    if (workspace_bytes) *workspace_bytes = workspace;
    if (reserve_bytes) *reserve_bytes = reserve;
    return TRITLSTM_OK;
}

tritlstm_status tritlstm_forward(const tritlstm *lstm, const tritlstm_forward_args *args)
{
    array items[16];
    arrays set = {0, 0, items};
    tritlstm_forward_args a;
    extents e;
    int status = check_lstm(lstm);
    if (status || (status = take_struct(&a, sizeof a, FIRST_FORWARD_ARGS, args, "forward_args"))) return status;
    const tritlstm_options *o = &lstm->options;
    if ((status = call_extents(o, a.steps, a.batch, &e)) || (status = check_stream(o, a.stream)) ||
        (status = check_resets(lstm, a.resets)))
        return status;

    add_array(&set, "x", a.x, e.x, e.element, 1, 0);
    add_array(&set, "lengths", a.lengths, (size_t)a.batch * sizeof *a.lengths, sizeof *a.lengths, 0, 0);
    add_array(&set, "resets", a.resets, (size_t)a.steps * (size_t)a.batch, 1, 0, 0);
    add_array(&set, "h0", a.h0, a.h0 == a.h_n ? 0 : e.h, e.element, 0, 0);
    add_array(&set, "c0", a.c0, a.c0 == a.c_n ? 0 : e.c, e.element, 0, 0);
    add_array(&set, "out", a.out, e.out, e.element, 1, 1);
    add_array(&set, "h_n", a.h_n, e.h, e.element, 0, 1);
    add_array(&set, "c_n", a.c_n, e.c, e.element, 0, 1);
    add_scratch(&set, "workspace", a.workspace, a.workspace_bytes, 1);
    add_scratch(&set, "reserve", a.reserve, a.reserve_bytes, 1);
    if ((status = check_overlap(&set)) || (status = check_lengths(o, a.lengths, a.steps, a.batch))) return status;
    return lstm->engine->forward(lstm->id, &a);
}

static int check_backward(const tritlstm *lstm, const tritlstm_backward_args *a, array *items)
{
    const tritlstm_options *o = &lstm->options;
    arrays set = {0, 0, items};
    extents e;
    int status;
    if ((status = call_extents(o, a->steps, a->batch, &e)) || (status = check_stream(o, a->stream)) ||
        (status = check_resets(lstm, a->resets)))
        return status;
    add_array(&set, "x", a->x, e.x, e.element, 1, 0);
    add_array(&set, "lengths", a->lengths, (size_t)a->batch * sizeof *a->lengths, sizeof *a->lengths, 0, 0);
    add_array(&set, "resets", a->resets, (size_t)a->steps * (size_t)a->batch, 1, 0, 0);
    add_array(&set, "h0", a->h0, e.h, e.element, 0, 0);
    add_array(&set, "c0", a->c0, e.c, e.element, 0, 0);
    add_array(&set, "out", a->out, e.out, e.element, 1, 0);
    add_array(&set, "grad_out", a->grad_out, e.out, e.element, 0, 0);
    add_array(&set, "grad_h_n", a->grad_h_n, e.h, e.element, 0, 0);
    add_array(&set, "grad_c_n", a->grad_c_n, e.c, e.element, 0, 0);
    add_array(&set, "grad_x", a->grad_x, e.x, e.element, 0, 1);
    add_array(&set, "grad_h0", a->grad_h0, e.h, e.element, 0, 1);
    add_array(&set, "grad_c0", a->grad_c0, e.c, e.element, 0, 1);
    add_scratch(&set, "workspace", a->workspace, a->workspace_bytes, 1);
    add_scratch(&set, "reserve", a->reserve, a->reserve_bytes, 0);
    if (!set.status && !a->reserve) set.status = null_argument("reserve");
    for (int64_t k = 0; a->grad_weights && k < lstm->count && !set.status; k++) {
        size_t bytes;
        if ((status = weight_bytes(lstm, k, &bytes))) return status;
        add_array(&set, "grad_weights", a->grad_weights[k], bytes, e.element, 0, 1);
    }
    if ((status = check_overlap(&set))) return status;
    return check_lengths(o, a->lengths, a->steps, a->batch);
}

tritlstm_status tritlstm_backward(const tritlstm *lstm, const tritlstm_backward_args *args)
{
    array few[FEW], *items = few;
    tritlstm_backward_args a;
    int status = check_lstm(lstm);
    if (status || (status = take_struct(&a, sizeof a, FIRST_BACKWARD_ARGS, args, "backward_args"))) return status;
    size_t room = 16 + (a.grad_weights ? (size_t)lstm->count : 0);
    if (room > FEW && !(items = malloc(room * sizeof *items)))
        return fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    status = check_backward(lstm, &a, items);
    if (items != few) free(items);
    return status ? status : lstm->engine->backward(lstm->id, &a);
}

/* ---- streaming --------------------------------------------------------------------------------------- */

tritlstm_status tritlstm_state_create(const tritlstm *lstm, int64_t batch, tritlstm_state **result)
{
    extents e;
    int status;
    if (!result) return null_argument("state");
    *result = NULL;
    if ((status = check_lstm(lstm)) || (status = call_extents(&lstm->options, 1, batch, &e))) return status;
    if (lstm->options.bidirectional)
        return fail(TRITLSTM_ERROR_UNSUPPORTED,
                    "a bidirectional LSTM needs the whole sequence: use tritlstm_forward instead of steps");
    tritlstm_state *state = calloc(1, sizeof *state);
    if (!state) return fail(TRITLSTM_ERROR_MEMORY, "out of memory");
    if ((status = lstm->engine->state_create(lstm->id, batch, &state->id))) {
        free(state);
        return status;
    }
    state->live = LIVE_STATE;
    state->batch = batch;
    state->lstm = (tritlstm *)lstm;
    __atomic_add_fetch(&state->lstm->references, 1, __ATOMIC_RELAXED);
    *result = state;
    return TRITLSTM_OK;
}

void tritlstm_state_destroy(tritlstm_state *state)
{
    if (!state || state->live != LIVE_STATE) return;
    state->live = 0;
    if (!tritlstm_engine_forked(state->lstm->options.device)) state->lstm->engine->state_destroy(state->id);
    release(state->lstm);
    free(state);
}

tritlstm_status tritlstm_step(tritlstm_state *state, const void *x, void *out, void *workspace, size_t workspace_bytes,
                              void *stream)
{
    array items[4];
    arrays set = {0, 0, items};
    extents e;
    int status = check_state(state);
    if (status) return status;
    const tritlstm_options *o = &state->lstm->options;
    if ((status = call_extents(o, 1, state->batch, &e)) || (status = check_stream(o, stream))) return status;
    add_array(&set, "x", x, e.x, e.element, 1, 0);
    add_array(&set, "out", out, e.out, e.element, 1, 1);
    add_scratch(&set, "workspace", workspace, workspace_bytes, 1);
    if ((status = check_overlap(&set))) return status;
    return state->lstm->engine->step(state->id, x, out, workspace, workspace_bytes, stream);
}

tritlstm_status tritlstm_state_reset(tritlstm_state *state, const uint8_t *rows, void *stream)
{
    int status = check_state(state);
    if (status || (status = check_stream(&state->lstm->options, stream))) return status;
    return state->lstm->engine->state_reset(state->id, rows, stream);
}

static int copy_state(const tritlstm_state *state, const void *h, const void *c, int32_t device, const void *stream,
                      int written)
{
    array items[2];
    arrays set = {0, 0, items};
    extents e;
    int status = check_state(state);
    if (status) return status;
    const tritlstm_options *o = &state->lstm->options;
    if ((status = check_copy(o, device, stream)) || (status = call_extents(o, 1, state->batch, &e))) return status;
    add_array(&set, "h", h, e.h, e.element, 0, written);
    add_array(&set, "c", c, e.c, e.element, 0, written);
    return check_overlap(&set);
}

tritlstm_status tritlstm_state_get(const tritlstm_state *state, void *h, void *c, int32_t device, void *stream)
{
    int status = copy_state(state, h, c, device, stream, 1);
    return status ? status : state->lstm->engine->state_get(state->id, h, c, device, stream);
}

tritlstm_status tritlstm_state_set(tritlstm_state *state, const void *h, const void *c, int32_t device, void *stream)
{
    int status = copy_state(state, h, c, device, stream, 0);
    return status ? status : state->lstm->engine->state_set(state->id, h, c, device, stream);
}

/* ---- what will run ----------------------------------------------------------------------------------- */

tritlstm_status tritlstm_explain(const tritlstm *lstm, int64_t steps, int64_t batch, int32_t training, char *text,
                                 size_t capacity, size_t *needed)
{
    extents e;
    size_t bytes = 0;
    int status = check_lstm(lstm);
    if (status || (status = check_switch("training", training)) ||
        (status = call_extents(&lstm->options, steps, batch, &e)))
        return status;
    if (!text && capacity) return null_argument("text");
    if ((status = lstm->engine->explain(lstm->id, steps, batch, training, text, capacity, &bytes))) return status;
    if (needed) *needed = bytes;
    if (!capacity || bytes <= capacity) return TRITLSTM_OK;
    trim_utf8(text, capacity);
    return fail(TRITLSTM_ERROR_BUFFER, "capacity is %zu bytes, but the text needs %zu", capacity, bytes);
}
