/* Fuzz target: any bytes as the structs and numbers of a call, against what front.c promises an engine.
 *
 * The engine here does nothing but hold the front to its word: it aborts where an argument is out of range, misaligned,
 * overlaps another, or where a size overflows. Addresses are numbers that are never followed, but for lengths. */
#include "engine.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int condition)
{
    if (!condition) abort();
}

/* ---- the engine -------------------------------------------------------------------------------------- */

const char *const tritlstm_engine_name = "none";
static tritlstm_options now; /* of the handle in use */
static tritlstm_report told;

static size_t item(void) { return now.dtype == TRITLSTM_FLOAT64 ? 8 : now.dtype == TRITLSTM_FLOAT32 ? 4 : 2; }

typedef unsigned __int128 wide;

static int create(const tritlstm_options *o, const void *const *weights, const int32_t *dtypes, uint64_t *id)
{
    (void)weights, (void)dtypes;
    require(!o->more || (*o->more && strlen(o->more) <= 4096));
    require(o->size == sizeof *o && o->input_size >= 1 && o->hidden_size >= 1);
    require(o->num_layers >= 1 && o->num_layers <= TRITLSTM_MAX_LAYERS);
    require(o->proj_size >= 0 && o->proj_size < o->hidden_size);
    require((o->bias | 1) == 1 && (o->bidirectional | 1) == 1 && (o->batch_first | 1) == 1);
    require(o->dtype >= TRITLSTM_FLOAT32 && o->dtype <= TRITLSTM_FLOAT64);
    require(o->device == TRITLSTM_CPU ? o->device_index == 0 : o->device == TRITLSTM_CUDA && o->device_index >= 0);
    require((o->initial_weights == 1 || o->initial_weights == 2) && !o->reserved);
    now = *o;
    wide R = (wide)(o->proj_size ? o->proj_size : o->hidden_size), P = o->bidirectional ? 2 : 1, total = 0;
    for (int64_t layer = 0; layer < o->num_layers; layer++) {
        wide input = layer ? P * R : (wide)o->input_size;
        total += P * item() * (4 * (wide)o->hidden_size * (input + R + (o->bias ? 2 : 0)) +
                               (o->proj_size ? R * (wide)o->hidden_size : 0));
    }
    require(total <= PTRDIFF_MAX);
    *id = 7;
    return TRITLSTM_OK;
}

static int destroy(uint64_t id) { return require(id == 7), TRITLSTM_OK; }

static int get_weights(uint64_t id, void *const *weights, int32_t device, void *stream)
{
    (void)weights;
    require(id == 7 && (device == TRITLSTM_CPU || device == now.device) && (now.device != TRITLSTM_CPU || !stream));
    return TRITLSTM_OK;
}

static int set_weights(uint64_t id, const void *const *weights, int32_t device, void *stream)
{
    (void)weights;
    return get_weights(id, NULL, device, stream);
}

/* Bytes of the arrays of a call; that they and an engine's own fit the address space. */
typedef struct bytes {
    wide x, out, h, c;
} bytes;

static bytes bytes_of(int64_t steps, int64_t batch)
{
    require(steps >= 1 && batch >= 1);
    wide R = (wide)(now.proj_size ? now.proj_size : now.hidden_size), P = now.bidirectional ? 2 : 1;
    wide rows = (wide)steps * (wide)batch, places = (wide)now.num_layers * P;
    bytes b = {rows * (wide)now.input_size * item(), rows * P * R * item(), places * (wide)batch * R * item(),
               places * (wide)batch * (wide)now.hidden_size * item()};
    require(b.x <= PTRDIFF_MAX && b.out <= PTRDIFF_MAX && b.h <= PTRDIFF_MAX && b.c <= PTRDIFF_MAX);
    require(places * rows * ((wide)now.hidden_size + 7) * 64 <= PTRDIFF_MAX);
    return b;
}

static int sizes(uint64_t id, int64_t steps, int64_t batch, int32_t training, size_t *workspace, size_t *reserve)
{
    require(id == 7 && (training | 1) == 1);
    bytes_of(steps, batch);
    *workspace = *reserve = 64;
    return TRITLSTM_OK;
}

typedef struct span {
    const void *at;
    wide bytes;
    int written;
} span;

/* The first is the bytes of `resets`; all others are aligned. */
static void check_spans(const span *spans, int count)
{
    for (int a = 0; a < count; a++) {
        uintptr_t begin = (uintptr_t)spans[a].at;
        if (!begin) continue;
        require((!a || begin % item() == 0) && (wide)begin + spans[a].bytes <= UINTPTR_MAX);
        for (int b = 0; b < count; b++) {
            uintptr_t other = (uintptr_t)spans[b].at;
            if (a == b || !other || !spans[a].written || !spans[a].bytes || !spans[b].bytes) continue;
            require((wide)begin + spans[a].bytes <= other || (wide)other + spans[b].bytes <= begin);
        }
    }
}

static int forward(uint64_t id, const tritlstm_forward_args *a)
{
    bytes n = bytes_of(a->steps, a->batch);
    span spans[] = {{a->resets, (wide)a->steps * (wide)a->batch, 0},
                    {a->x, n.x, 0},
                    {a->h0 == a->h_n ? NULL : a->h0, n.h, 0},
                    {a->c0 == a->c_n ? NULL : a->c0, n.c, 0},
                    {a->out, n.out, 1},
                    {a->h_n, n.h, 1},
                    {a->c_n, n.c, 1},
                    {a->workspace, a->workspace_bytes, 1},
                    {a->reserve, a->reserve_bytes, 1}};
    require(id == 7 && a->size == sizeof *a && a->x && a->out && (now.device != TRITLSTM_CPU || !a->stream));
    require((!a->workspace_bytes || a->workspace) && (!a->reserve_bytes || a->reserve));
    require((uintptr_t)a->workspace % TRITLSTM_ALIGNMENT == 0 && (uintptr_t)a->reserve % TRITLSTM_ALIGNMENT == 0);
    check_spans(spans, sizeof spans / sizeof *spans);
    for (int64_t b = 0; a->lengths && b < a->batch && now.device == TRITLSTM_CPU; b++)
        require(a->lengths[b] >= 0 && a->lengths[b] <= a->steps);
    return TRITLSTM_OK;
}

static int backward(uint64_t id, const tritlstm_backward_args *a)
{
    bytes n = bytes_of(a->steps, a->batch);
    span spans[] = {{a->resets, (wide)a->steps * (wide)a->batch, 0},
                    {a->x, n.x, 0},
                    {a->h0, n.h, 0},
                    {a->c0, n.c, 0},
                    {a->out, n.out, 0},
                    {a->grad_out, n.out, 0},
                    {a->grad_h_n, n.h, 0},
                    {a->grad_c_n, n.c, 0},
                    {a->grad_x, n.x, 1},
                    {a->grad_h0, n.h, 1},
                    {a->grad_c0, n.c, 1},
                    {a->workspace, a->workspace_bytes, 1},
                    {a->reserve, a->reserve_bytes, 0}};
    require(id == 7 && a->size == sizeof *a && a->x && a->out && a->reserve);
    check_spans(spans, sizeof spans / sizeof *spans);
    return TRITLSTM_OK;
}

static int state_create(uint64_t id, int64_t batch, uint64_t *state)
{
    require(id == 7 && !now.bidirectional);
    bytes_of(1, batch);
    *state = 8;
    return TRITLSTM_OK;
}

static int state_destroy(uint64_t state) { return require(state == 8), TRITLSTM_OK; }

static int state_reset(uint64_t state, const uint8_t *rows, void *stream)
{
    (void)rows;
    return require(state == 8 && (now.device != TRITLSTM_CPU || !stream)), TRITLSTM_OK;
}

static int state_get(uint64_t state, void *h, void *c, int32_t device, void *stream)
{
    require(state == 8 && (uintptr_t)h % item() == 0 && (uintptr_t)c % item() == 0);
    return get_weights(7, NULL, device, stream);
}

static int state_set(uint64_t state, const void *h, const void *c, int32_t device, void *stream)
{
    return state_get(state, (void *)(uintptr_t)h, (void *)(uintptr_t)c, device, stream);
}

static int step(uint64_t state, const void *x, void *out, void *workspace, size_t workspace_bytes, void *stream)
{
    require(state == 8 && x && out && (!workspace_bytes || workspace) && (now.device != TRITLSTM_CPU || !stream));
    return TRITLSTM_OK;
}

static int explain(uint64_t id, int64_t steps, int64_t batch, int32_t training, char *text, size_t capacity,
                   size_t *needed)
{
    static const char words[] = "four words of text";
    require(id == 7 && (training | 1) == 1);
    bytes_of(steps, batch);
    *needed = sizeof words;
    if (capacity) {
        memcpy(text, words, capacity < sizeof words ? capacity : sizeof words);
        text[(capacity < sizeof words ? capacity : sizeof words) - 1] = 0;
    }
    return TRITLSTM_OK;
}

/* One further weight, a vector of H. */
static int describe(const tritlstm_options *o, int64_t capacity, tritlstm_weight *weights, int64_t *count)
{
    int64_t plain = o->num_layers * (o->bidirectional ? 2 : 1) * (2 + (o->bias ? 2 : 0) + (o->proj_size ? 1 : 0));
    require(o->more && *o->more && (!capacity || capacity == plain + 1));
    if (strstr(o->more, "bad")) return told("no such option"), TRITLSTM_ERROR_ARGUMENT;
    for (int64_t k = 0; k < capacity; k++) {
        memset(weights[k].name, 'w', sizeof weights[k].name); /* the front ends it */
        weights[k].rows = o->hidden_size;
        weights[k].columns = 0;
    }
    *count = plain + 1;
    return TRITLSTM_OK;
}

int tritlstm_engine_start(tritlstm_report report, int32_t device, const tritlstm_engine_functions **engine)
{
    static const tritlstm_engine_functions functions = {
        TRITLSTM_ENGINE_INTERFACE, create,       destroy,      get_weights,   set_weights, sizes, forward, backward,
        state_create,              state_destroy, state_reset, state_get,     state_set,   step,  explain,
        describe,
    };
    (void)device;
    told = report;
    *engine = &functions;
    return TRITLSTM_OK;
}

int tritlstm_engine_forked(int32_t device) { return (void)device, 0; }

/* ---- the calls --------------------------------------------------------------------------------------- */

typedef struct input {
    const uint8_t *at;
    size_t left;
} input;

static void take(input *in, void *to, size_t bytes)
{
    size_t some = in->left < bytes ? in->left : bytes;
    memset(to, 0, bytes);
    memcpy(to, in->at, some);
    in->at += some;
    in->left -= some;
}

static uint8_t take_byte(input *in)
{
    uint8_t byte;
    take(in, &byte, 1);
    return byte;
}

/* A struct of the right type: as it comes, or initialised and then changed in some places. Its last member, which is
 * younger than the corpus, is the caller's to set from `how`: without more bytes of the input. */
#define TAKE(in, type, value, last)                                                                                  \
    do {                                                                                                             \
        size_t first = offsetof(tritlstm_##type, last);                                                              \
        how = take_byte(in);                                                                                         \
        if (how & 1) {                                                                                               \
            memset(&(value), 0, sizeof(value));                                                                      \
            take(in, &(value), first);                                                                               \
            if (how & 2) (value).size = how & 128 ? sizeof(value) : first;                                           \
            else if ((value).size > first) (value).size = 0; /* nothing may be read behind it */                     \
        } else {                                                                                                     \
            tritlstm_##type##_init(&(value), sizeof(value));                                                         \
            for (int n = how >> 1 & 15; n; n--) {                                                                    \
                size_t at = sizeof(size_t) + take_byte(in) % (first / 4 - 2) * 4;                                    \
                take(in, (char *)&(value) + at, 4);                                                                  \
            }                                                                                                        \
        }                                                                                                            \
    } while (0)

/* Every failure has words and a number that the header knows. */
static int said(tritlstm_status status)
{
    require(status >= TRITLSTM_OK && status <= TRITLSTM_ERROR_INTERNAL);
    require(!status || *tritlstm_last_error());
    require(strlen(tritlstm_last_error()) < 1024);
    return status;
}

static void use(input *in, tritlstm *lstm)
{
    static int32_t lengths[64];
    tritlstm_forward_args f;
    tritlstm_backward_args b;
    uint8_t how;
    tritlstm_state *state;
    int64_t numbers[3];
    char text[64];
    size_t needed;
    switch (take_byte(in) % 6) {
    case 0:
        TAKE(in, forward_args, f, resets);
        if (how & 64) f.resets = (const uint8_t *)((uintptr_t)f.x + (how & 32)); /* an address that nothing reads */
        take(in, lengths, sizeof lengths);
        f.lengths = f.lengths && f.batch <= 64 ? lengths : NULL;
        said(tritlstm_forward(lstm, &f));
        break;
    case 1:
        TAKE(in, backward_args, b, resets);
        if (how & 64) b.resets = (const uint8_t *)((uintptr_t)b.x + (how & 32));
        take(in, lengths, sizeof lengths);
        b.lengths = b.lengths && b.batch <= 64 ? lengths : NULL;
        b.grad_weights = NULL;
        said(tritlstm_backward(lstm, &b));
        break;
    case 2:
        take(in, numbers, sizeof numbers);
        said(tritlstm_sizes(lstm, numbers[0], numbers[1], (int32_t)numbers[2], &needed, NULL));
        break;
    case 3:
        take(in, numbers, sizeof numbers);
        said(tritlstm_explain(lstm, numbers[0], numbers[1], take_byte(in) % 3, text,
                              (uint64_t)numbers[2] % sizeof text, &needed));
        break;
    case 4: {
        tritlstm_weight info = {.size = sizeof info};
        take(in, numbers, sizeof numbers);
        if (!said(tritlstm_weight_info(lstm, numbers[0], &info)))
            require(info.rows >= 1 && info.columns >= 0 && info.bytes <= PTRDIFF_MAX && strlen(info.name) < 48);
        break;
    }
    default:
        take(in, numbers, sizeof numbers);
        if (said(tritlstm_state_create(lstm, numbers[0], &state))) break;
        take(in, numbers, sizeof numbers);
        void *one = (void *)(uintptr_t)numbers[0], *two = (void *)(uintptr_t)numbers[1];
        void *three = (void *)(uintptr_t)numbers[2];
        said(tritlstm_step(state, one, two, three, take_byte(in), NULL));
        said(tritlstm_state_get(state, one, two, take_byte(in), three));
        said(tritlstm_state_set(state, one, two, take_byte(in), NULL));
        said(tritlstm_state_reset(state, NULL, three));
        tritlstm_state_destroy(state);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    tritlstm_options options;
    static const char *const texts[4] = {NULL, "", "bad", "peephole=True"};
    static char endless[4200];
    uint8_t how;
    tritlstm *lstm = NULL;
    TAKE(&in, options, options, more);
    options.more = texts[how >> 5 & 3];
    if (how >> 4 == 15) options.more = memset(endless, 'x', sizeof endless - 1);
    int status = said(tritlstm_create(&options, NULL, &lstm));
    require(!status == !!lstm);
    while (lstm && in.left) use(&in, lstm);
    tritlstm_destroy(lstm);
    return 0;
}
