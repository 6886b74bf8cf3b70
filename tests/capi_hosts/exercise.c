/* A host that goes through all of the library, to be watched by valgrind, by sanitizers, or by its own malloc.
 *
 *     exercise everything FILE      every function on a grid of options, and refusals
 *     exercise threads FILE         eight threads create and use handles, and share one
 *     exercise no-allocation FILE   what may not allocate does not (only with -DCOUNT_ALLOCATIONS)
 *     exercise out-of-memory FILE   each allocation of the library fails in turn (only with -DCOUNT_ALLOCATIONS)
 *
 * FILE is a safetensors file of an LSTM of input size D and hidden size H. Workspaces and reserves have exactly the size that is
 * asked for. Prints what it did; exits 0 if all was as it should be. */
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tritlstm.h>

enum { T = 5, B = 3, D = 4, H = 6, MOST = 2 * 2 * 5, LARGEST = 4096, THREADS = 8 };

#define REQUIRE(condition)                                                                                           \
    do {                                                                                                             \
        if (!(condition)) {                                                                                          \
            printf("line %d: %s is false; last error: %s\n", __LINE__, #condition, tritlstm_last_error());           \
            exit(1);                                                                                                 \
        }                                                                                                            \
    } while (0)

/* ---- allocations ------------------------------------------------------------------------------------- */

#ifdef COUNT_ALLOCATIONS
/* The program's own malloc stands in front of the C library's for everyone, fopen included. */
void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *memory, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *memory);

static int watching;      /* inside a call of the library */
static long count, fails; /* allocations while watching; the one that fails, from 1, or 0 */
static long live;         /* allocations that were not freed */

static int refuse(void)
{
    if (!watching || ++count != fails) return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size)
{
    void *memory = refuse() ? NULL : __libc_malloc(size);
    live += memory != NULL;
    return memory;
}

void *calloc(size_t number, size_t size)
{
    void *memory = refuse() ? NULL : __libc_calloc(number, size);
    live += memory != NULL;
    return memory;
}

void *realloc(void *old, size_t size)
{
    void *memory = refuse() ? NULL : __libc_realloc(old, size);
    live += memory && !old;
    return memory;
}

void *aligned_alloc(size_t alignment, size_t size)
{
    void *memory = refuse() ? NULL : __libc_memalign(alignment, size);
    live += memory != NULL;
    return memory;
}

void free(void *memory)
{
    live -= memory != NULL;
    __libc_free(memory);
}

#define WATCH(call) (watching = 1, last = (call), watching = 0, last)
#else
#define WATCH(call) (last = (call))
#endif

/* ---- one network and its arrays ---------------------------------------------------------------------- */

/* Arrays large enough for every case, as doubles or anything smaller. */
typedef struct arrays {
    double x[LARGEST], h0[LARGEST], c0[LARGEST], out[LARGEST], h_n[LARGEST], c_n[LARGEST], grad[3][LARGEST];
    double weights[MOST][LARGEST];
    int32_t lengths[B];
    char text[2000];
} arrays;

static size_t item(int32_t dtype) { return dtype == TRITLSTM_FLOAT64 ? 8 : dtype == TRITLSTM_FLOAT32 ? 4 : 2; }

/* Small numbers in any type. */
static void fill(double *to, int32_t dtype, unsigned seed)
{
    static const uint16_t half[] = {0x0000, 0x3400, 0xB400, 0x2E66}, brain[] = {0x0000, 0x3E80, 0xBE80, 0x3DCD};
    for (size_t k = 0; k < LARGEST; k++) {
        unsigned pick = (seed + (unsigned)k * 7) % 11 % 4;
        double value = pick == 0 ? 0 : pick == 1 ? 0.25 : pick == 2 ? -0.25 : 0.1;
        if (dtype == TRITLSTM_FLOAT64) to[k] = value;
        else if (dtype == TRITLSTM_FLOAT32) ((float *)to)[k] = (float)value;
        else ((uint16_t *)to)[k] = dtype == TRITLSTM_FLOAT16 ? half[pick] : brain[pick];
    }
}

static void fill_all(arrays *a, int32_t dtype)
{
    fill(a->x, dtype, 1), fill(a->h0, dtype, 2), fill(a->c0, dtype, 3);
    for (unsigned k = 0; k < 3; k++) fill(a->grad[k], dtype, 4 + k);
    a->lengths[0] = T, a->lengths[1] = 0, a->lengths[2] = 2;
}

static int is_finite(const double *values, int32_t dtype, size_t some)
{
    for (size_t k = 0; k < some; k++) {
        if (dtype == TRITLSTM_FLOAT64 && !isfinite(values[k])) return 0;
        if (dtype == TRITLSTM_FLOAT32 && !isfinite(((const float *)values)[k])) return 0;
        if (dtype == TRITLSTM_FLOAT16 && (((const uint16_t *)values)[k] & 0x7C00) == 0x7C00) return 0;
        if (dtype == TRITLSTM_BFLOAT16 && (((const uint16_t *)values)[k] & 0x7F80) == 0x7F80) return 0;
    }
    return 1;
}

/* Exactly `bytes`; NULL for none. */
static void *scratch(size_t bytes)
{
    void *memory = bytes ? malloc(bytes) : NULL;
    REQUIRE(!bytes || memory);
    if (bytes) memset(memory, 0xFF, bytes);
    return memory;
}

static void options_of(tritlstm_options *o, unsigned bits)
{
    REQUIRE(!tritlstm_options_init(o, sizeof *o));
    o->input_size = D;
    o->hidden_size = H;
    o->num_layers = 1 + (bits & 1);
    o->bidirectional = bits >> 1 & 1;
    o->proj_size = bits >> 2 & 1 ? 2 : 0;
    o->bias = !(bits >> 3 & 1);
    o->batch_first = bits >> 4 & 1;
    o->dtype = TRITLSTM_FLOAT32 + (int32_t)(bits >> 5 & 3);
    o->seed = bits;
}

/* ---- what may fail for lack of memory ---------------------------------------------------------------- */

#define TRY(call)                                                                                                    \
    do {                                                                                                             \
        if (WATCH(call)) goto done;                                                                                  \
    } while (0)

/* Forward, forward with a reserve, backward; the status of the first that failed. */
static int train(const tritlstm *lstm, arrays *a, int with_lengths)
{
    int last;
    int64_t weights = 0;
    size_t workspace_bytes, training_bytes, reserve_bytes;
    void *workspace = NULL, *training = NULL, *reserve = NULL, *grad_weights[MOST];
    tritlstm_options o;
    tritlstm_forward_args f;
    tritlstm_backward_args b;
    tritlstm_options_init(&o, sizeof o);
    TRY(tritlstm_get_options(lstm, &o));
    TRY(tritlstm_num_weights(lstm, &weights));
    TRY(tritlstm_sizes(lstm, T, B, 0, &workspace_bytes, &reserve_bytes));
    REQUIRE(reserve_bytes == 0);
    workspace = scratch(workspace_bytes);
    TRY(tritlstm_sizes(lstm, T, B, 1, &training_bytes, &reserve_bytes));
    training = scratch(training_bytes), reserve = scratch(reserve_bytes);

    tritlstm_forward_args_init(&f, sizeof f);
    f.steps = T, f.batch = B, f.x = a->x, f.h0 = a->h0, f.c0 = a->c0, f.out = a->out, f.h_n = a->h_n, f.c_n = a->c_n;
    f.lengths = with_lengths ? a->lengths : NULL;
    f.workspace = workspace, f.workspace_bytes = workspace_bytes;
    TRY(tritlstm_forward(lstm, &f));
    size_t wide = (size_t)((o.proj_size ? o.proj_size : H) * (o.bidirectional + 1)) * T * B;
    REQUIRE(is_finite(a->out, o.dtype, wide));
    memcpy(a->text, a->out, sizeof a->text);
    f.workspace = training, f.workspace_bytes = training_bytes, f.reserve = reserve, f.reserve_bytes = reserve_bytes;
    TRY(tritlstm_forward(lstm, &f));
    size_t bytes = wide * item(o.dtype);
    REQUIRE(!memcmp(a->text, a->out, bytes < sizeof a->text ? bytes : sizeof a->text));

    for (int64_t k = 0; k < weights; k++) grad_weights[k] = a->weights[k];
    tritlstm_backward_args_init(&b, sizeof b);
    b.steps = T, b.batch = B, b.x = a->x, b.h0 = a->h0, b.c0 = a->c0, b.out = a->out, b.lengths = f.lengths;
    b.grad_out = a->grad[0], b.grad_h_n = a->grad[1], b.grad_c_n = a->grad[2];
    b.grad_x = a->h_n, b.grad_weights = grad_weights; /* into arrays that are free again */
    b.workspace = training, b.workspace_bytes = training_bytes, b.reserve = reserve, b.reserve_bytes = reserve_bytes;
    TRY(tritlstm_backward(lstm, &b));
    REQUIRE(is_finite(a->h_n, o.dtype, T * B * D) && is_finite(a->weights[0], o.dtype, 4 * H * D));
done:
    free(workspace);
    free(training);
    free(reserve);
    return last;
}

static int copy_weights(tritlstm *lstm, arrays *a)
{
    int last;
    void *out[MOST] = {0};
    const void *in[MOST] = {0};
    int64_t weights;
    TRY(tritlstm_num_weights(lstm, &weights));
    for (int64_t k = 0; k < weights; k++) {
        tritlstm_weight info = {.size = sizeof info};
        TRY(tritlstm_weight_info(lstm, k, &info));
        REQUIRE(info.bytes <= sizeof a->weights[k]);
        in[k] = out[k] = a->weights[k];
    }
    TRY(tritlstm_get_weights(lstm, out, TRITLSTM_CPU, NULL));
    in[0] = NULL;
    TRY(tritlstm_set_weights(lstm, in, TRITLSTM_CPU, NULL));
done:
    return last;
}

/* Steps one by one; the last output is that of the whole sequence if it began with zeros. */
static int stream(const tritlstm *lstm, arrays *a)
{
    int last;
    static const uint8_t one[B] = {0, 1, 0};
    size_t bytes;
    void *workspace = NULL;
    tritlstm_state *state = NULL;
    TRY(tritlstm_sizes(lstm, 1, B, 0, &bytes, NULL));
    workspace = scratch(bytes);
    TRY(tritlstm_state_create(lstm, B, &state));
    for (int t = 0; t < T; t++) TRY(tritlstm_step(state, a->x, a->out, workspace, bytes, NULL));
    TRY(tritlstm_state_get(state, a->h_n, a->c_n, TRITLSTM_CPU, NULL));
    TRY(tritlstm_state_reset(state, one, NULL));
    TRY(tritlstm_state_set(state, a->h_n, a->c_n, TRITLSTM_CPU, NULL));
    TRY(tritlstm_state_reset(state, NULL, NULL));
done:
    tritlstm_state_destroy(state);
    free(workspace);
    return last;
}

static int explain(const tritlstm *lstm, arrays *a)
{
    int last;
    size_t needed;
    TRY(tritlstm_explain(lstm, T, B, 1, NULL, 0, &needed));
    REQUIRE(needed < sizeof a->text);
    TRY(tritlstm_explain(lstm, T, B, 1, a->text, sizeof a->text, NULL));
    REQUIRE(strlen(a->text) + 1 == needed);
    REQUIRE(tritlstm_explain(lstm, T, B, 0, a->text, 7, &needed) == TRITLSTM_ERROR_BUFFER && strlen(a->text) == 6);
done:
    return last;
}

/* Everything with one set of options; the first status that was not OK. */
static int use(unsigned bits, arrays *a)
{
    int last;
    tritlstm_options o;
    tritlstm *lstm = NULL;
    options_of(&o, bits);
    fill_all(a, o.dtype);
    if (WATCH(tritlstm_create(&o, NULL, &lstm))) return last;
    if (!(last = train(lstm, a, bits & 1)) && !(last = copy_weights(lstm, a)) && !(last = explain(lstm, a)) &&
        !o.bidirectional)
        last = stream(lstm, a);
    tritlstm_destroy(lstm);
    return last;
}

static int use_file(const char *path, int32_t dtype, arrays *a)
{
    int last;
    tritlstm_load_options load;
    tritlstm *lstm = NULL;
    tritlstm_load_options_init(&load, sizeof load);
    load.dtype = dtype;
    load.more = "peephole=True";
    REQUIRE(tritlstm_create_from_safetensors(path, &load, &lstm) != TRITLSTM_OK && !lstm);
    load.more = NULL;
    if (WATCH(tritlstm_create_from_safetensors(path, &load, &lstm))) return last;
    fill_all(a, dtype);
    last = train(lstm, a, 0);
    tritlstm_destroy(lstm);
    return last;
}

static void refusals(const char *path, arrays *a)
{
    tritlstm_options o;
    tritlstm *lstm;
    tritlstm_state *state;
    tritlstm_forward_args f;
    options_of(&o, 2);
    o.hidden_size = 0;
    REQUIRE(tritlstm_create(&o, NULL, &lstm) == TRITLSTM_ERROR_ARGUMENT && !lstm);
    o.hidden_size = INT64_C(1) << 22; /* 2^48 bytes and more */
    REQUIRE(tritlstm_create(&o, NULL, &lstm) == TRITLSTM_ERROR_MEMORY && !lstm);
    options_of(&o, 2);
    o.device = TRITLSTM_CUDA;
    o.device_index = 1000;
    REQUIRE(tritlstm_create(&o, NULL, &lstm) != TRITLSTM_OK && !lstm);
    options_of(&o, 2);
    o.more = "peephole=True";
    REQUIRE(tritlstm_create(&o, NULL, &lstm) == TRITLSTM_ERROR_UNSUPPORTED && !lstm);
    REQUIRE(tritlstm_create_from_safetensors("/nowhere", NULL, &lstm) == TRITLSTM_ERROR_FILE);
    REQUIRE(tritlstm_create_from_safetensors("/dev/null", NULL, &lstm) == TRITLSTM_ERROR_FILE);
    options_of(&o, 2);
    REQUIRE(!tritlstm_create(&o, NULL, &lstm));
    REQUIRE(tritlstm_state_create(lstm, 1, &state) == TRITLSTM_ERROR_UNSUPPORTED && !state);
    tritlstm_forward_args_init(&f, sizeof f);
    f.steps = T, f.batch = B, f.x = a->x, f.out = a->x;
    REQUIRE(tritlstm_forward(lstm, &f) == TRITLSTM_ERROR_ARGUMENT);
    f.out = a->out, f.resets = (const uint8_t *)a->x;
    REQUIRE(tritlstm_forward(lstm, &f) == TRITLSTM_ERROR_UNSUPPORTED);
    tritlstm_destroy(lstm);
    tritlstm_destroy(NULL);
    tritlstm_state_destroy(NULL);
    (void)path;
}

static void everything(const char *path, arrays *a)
{
    int cases = 0;
    /* Of the 128 combinations those that differ from one another in two options at once. */
    for (unsigned bits = 0; bits < 128; bits++) {
        unsigned ones = 0;
        for (unsigned k = 0; k < 5; k++) ones += bits >> k & 1;
        if ((ones + (bits >> 5)) % 4 != 2) continue;
        REQUIRE(!use(bits, a));
        cases++;
    }
    for (int32_t dtype = TRITLSTM_FLOAT32; dtype <= TRITLSTM_FLOAT64; dtype++) REQUIRE(!use_file(path, dtype, a));
    refusals(path, a);
    printf("everything: %d cases\n", cases);
}

/* ---- threads ----------------------------------------------------------------------------------------- */

typedef struct shared {
    const tritlstm *lstm;
    const double *expected; /* [T, B, H] floats */
    unsigned number;
} shared;

static void *thread(void *argument)
{
    const shared *s = argument;
    arrays *a = malloc(sizeof *a);
    REQUIRE(a);
    for (unsigned round = 0; round < 4; round++) {
        char words[64];
        tritlstm_options o;
        tritlstm *lstm;
        REQUIRE(!use((s->number * 4 + round) * 5 % 128, a));
        fill_all(a, TRITLSTM_FLOAT32);
        REQUIRE(!train(s->lstm, a, 0) && !memcmp(a->out, s->expected, T * B * H * sizeof(float)));
        REQUIRE(!stream(s->lstm, a));
        options_of(&o, 0);
        o.input_size = -(int64_t)s->number - 1;
        snprintf(words, sizeof words, "input_size is %lld,", (long long)o.input_size);
        REQUIRE(tritlstm_create(&o, NULL, &lstm) == TRITLSTM_ERROR_ARGUMENT);
        REQUIRE(!strncmp(tritlstm_last_error(), words, strlen(words)));
    }
    free(a);
    return NULL;
}

static void threads(arrays *a)
{
    pthread_t all[THREADS];
    shared s[THREADS];
    static double expected[LARGEST];
    tritlstm_options o;
    tritlstm *lstm;
    options_of(&o, 0);
    REQUIRE(!tritlstm_create(&o, NULL, &lstm));
    fill_all(a, TRITLSTM_FLOAT32);
    REQUIRE(!train(lstm, a, 0));
    memcpy(expected, a->out, sizeof expected);
    for (unsigned k = 0; k < THREADS; k++) {
        s[k] = (shared){lstm, expected, k};
        REQUIRE(!pthread_create(&all[k], NULL, thread, &s[k]));
    }
    for (unsigned k = 0; k < THREADS; k++) pthread_join(all[k], NULL);
    tritlstm_destroy(lstm);
    puts("threads: all agree");
}

/* ---- memory ------------------------------------------------------------------------------------------ */

#ifdef COUNT_ALLOCATIONS
static void no_allocation(arrays *a)
{
    long calls = 0;
    for (unsigned bits = 0; bits < 128; bits += 3) {
        tritlstm_options o;
        tritlstm *lstm;
        tritlstm_state *state = NULL;
        size_t bytes;
        options_of(&o, bits);
        fill_all(a, o.dtype);
        REQUIRE(!tritlstm_create(&o, NULL, &lstm));
        count = 0;
        REQUIRE(!train(lstm, a, 1) && !copy_weights(lstm, a) && !explain(lstm, a));
        if (!o.bidirectional) {
            int last;
            REQUIRE(!tritlstm_state_create(lstm, B, &state) && !tritlstm_sizes(lstm, 1, B, 0, &bytes, NULL));
            void *workspace = scratch(bytes);
            for (int t = 0; t < T; t++) REQUIRE(!WATCH(tritlstm_step(state, a->x, a->out, workspace, bytes, NULL)));
            REQUIRE(!WATCH(tritlstm_state_reset(state, NULL, NULL)));
            free(workspace);
        }
        REQUIRE(count == 0);
        calls++;
        tritlstm_state_destroy(state);
        tritlstm_destroy(lstm);
    }
    printf("no-allocation: %ld cases\n", calls);
}

static int says_memory(void)
{
    return strstr(tritlstm_last_error(), "out of memory") || strstr(tritlstm_last_error(), "llocate memory");
}

static void out_of_memory(const char *path, arrays *a)
{
    long failures = 0, survived = 0;
    for (unsigned which = 0; which < 6; which++) {
        for (fails = 1;; fails++) {
            long before = live;
            count = 0;
            int status = which < 4 ? use(which * 21, a) : use_file(path, which == 4 ? 1 : 2, a);
            REQUIRE(live == before);
            if (count < fails) {
                REQUIRE(!status);
                break;
            }
            if (!status) { /* the C library reads a file without a buffer, too */
                survived++;
                continue;
            }
            REQUIRE(status == TRITLSTM_ERROR_MEMORY && says_memory());
            failures++;
        }
    }
    fails = 0;
    REQUIRE(survived <= 2); /* one for each run with a file */
    printf("out-of-memory: %ld failures, each a status, nothing left behind\n", failures);
}
#endif

int main(int argc, char **argv)
{
    static arrays a;
    if (argc != 3) return 2;
    printf("engine %s\n", tritlstm_engine());
    if (!strcmp(argv[1], "everything")) everything(argv[2], &a);
    else if (!strcmp(argv[1], "threads")) threads(&a);
#ifdef COUNT_ALLOCATIONS
    else if (!strcmp(argv[1], "no-allocation")) no_allocation(&a);
    else if (!strcmp(argv[1], "out-of-memory")) out_of_memory(argv[2], &a);
#endif
    else return 2;
    return 0;
}
