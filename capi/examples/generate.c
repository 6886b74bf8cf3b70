/* Generates text with a character model that PyTorch trained: embedding, LSTM, linear.
 *
 *     generate MODEL.safetensors [--prompt TEXT] [--length N] [--temperature X] [--seed N] [--logits FILE]
 *
 * The file holds embedding.weight [V, E], an LSTM as lstm.*, head.weight [V, R], head.bias [V] and vocabulary, uint8 [V]:
 * the byte of every id. Bytes that the vocabulary lacks take the id that the file's metadata names as unknown_id.
 * With --logits the program writes the logits after every byte of the prompt, float32 [bytes, V], and generates nothing.
 *
 *     cc generate.c safetensors.c $(pkg-config --cflags --libs tritlstm_python) -lm -o generate
 *
 * SPDX-License-Identifier: MIT */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tritlstm.h>

#include "safetensors.h"

typedef struct model {
    int64_t size;  /* V, ids */
    int64_t embed; /* E */
    int64_t width; /* R, the LSTM's output */
    float *embedding, *head, *bias;
    unsigned char vocabulary[256];
    int ids[256];   /* the id of a byte, or -1 */
    int64_t unknown; /* the id of all other bytes, or -1 */
    tritlstm *lstm;
} model;

static int complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

static int complain(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fputs("generate: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    return 0;
}

static int library_failed(const char *what, tritlstm_status status)
{
    return complain("%s: %s: %s", what, tritlstm_status_string(status), tritlstm_last_error());
}

/* malloc(a * b * item) that knows where that overflows. */
static void *allocate(int64_t a, int64_t b, size_t item)
{
    if (a < 0 || b < 0 || (b && (uint64_t)a > SIZE_MAX / item / (uint64_t)b)) return NULL;
    size_t bytes = (size_t)a * (size_t)b * item;
    return malloc(bytes ? bytes : 1);
}

/* ---- the model --------------------------------------------------------------------------------------- */

static float *read_matrix(st_file *file, const char *name, int rank, int64_t rows, int64_t *columns)
{
    const st_tensor *tensor = st_find(file, name);
    float *values = NULL;
    if (!tensor) complain("the file has no tensor '%s'", name);
    else if (tensor->rank != rank || tensor->shape[0] != rows || (columns && tensor->shape[1] < 1))
        complain("tensor '%s' does not have %d extents, the first %lld", name, rank, (long long)rows);
    else if (!(values = allocate((int64_t)tensor->elements, 1, sizeof *values))) complain("out of memory");
    else if (st_read_floats(file, tensor, values)) {
        complain("%s", file->error);
        free(values);
        values = NULL;
    } else if (columns) *columns = tensor->shape[1];
    return values;
}

static int read_vocabulary(model *m, st_file *file)
{
    const st_tensor *tensor = st_find(file, "vocabulary");
    if (!tensor || strcmp(tensor->dtype, "U8") || tensor->rank != 1 || tensor->shape[0] < 2 || tensor->shape[0] > 256)
        return complain("the file has no tensor 'vocabulary' of 2 to 256 bytes");
    if (st_read(file, tensor, m->vocabulary)) return complain("%s", file->error);
    m->size = tensor->shape[0];
    for (int byte = 0; byte < 256; byte++) m->ids[byte] = -1;
    for (int id = 0; id < (int)m->size; id++) m->ids[m->vocabulary[id]] = id;

    const char *text = st_metadata(file, "unknown_id");
    m->unknown = -1;
    if (text) {
        char *end;
        errno = 0;
        m->unknown = strtoll(text, &end, 10);
        if (errno || end == text || *end || m->unknown < 0 || m->unknown >= m->size)
            return complain("unknown_id '%.20s' in the file is not an id", text);
    }
    return 1;
}

static int read_model(model *m, const char *path)
{
    st_file file;
    if (st_open(&file, path)) return complain("%s: %s", path, file.error);
    int good = read_vocabulary(m, &file) &&
               (m->embedding = read_matrix(&file, "embedding.weight", 2, m->size, &m->embed)) &&
               (m->head = read_matrix(&file, "head.weight", 2, m->size, &m->width)) &&
               (m->bias = read_matrix(&file, "head.bias", 1, m->size, NULL));
    st_close(&file);
    return good;
}

static int read_lstm(model *m, const char *path)
{
    tritlstm_load_options load;
    tritlstm_options shape;
    tritlstm_status status;
    tritlstm_load_options_init(&load, sizeof load);
    load.prefix = "lstm.";
    load.dtype = TRITLSTM_FLOAT32;
    if ((status = tritlstm_create_from_safetensors(path, &load, &m->lstm))) return library_failed(path, status);
    tritlstm_options_init(&shape, sizeof shape);
    if ((status = tritlstm_get_options(m->lstm, &shape))) return library_failed(path, status);
    if (shape.bidirectional) return complain("%s: a bidirectional LSTM can not generate text", path);
    if (shape.input_size != m->embed || m->width != (shape.proj_size ? shape.proj_size : shape.hidden_size))
        return complain("%s: embedding, lstm and head do not fit together", path);
    return 1;
}

static void free_model(model *m)
{
    tritlstm_destroy(m->lstm);
    free(m->embedding);
    free(m->head);
    free(m->bias);
}

/* logits [V] = head.weight h + head.bias */
static void apply_head(const model *m, const float *h, float *logits)
{
    for (int64_t v = 0; v < m->size; v++) {
        double sum = m->bias[v];
        for (int64_t u = 0; u < m->width; u++) sum += (double)m->head[v * m->width + u] * h[u];
        logits[v] = (float)sum;
    }
}

static const float *embed(const model *m, int64_t id) { return m->embedding + id * m->embed; }

/* The prompt's ids, or 0 if a byte has none. */
static int encode(const model *m, const char *prompt, size_t length, int64_t *ids)
{
    for (size_t k = 0; k < length; k++) {
        unsigned char byte = (unsigned char)prompt[k];
        ids[k] = m->ids[byte] >= 0 ? m->ids[byte] : m->unknown;
        if (ids[k] < 0) return complain("byte 0x%02x of the prompt is not in the model's vocabulary", byte);
    }
    return 1;
}

/* ---- the two jobs ------------------------------------------------------------------------------------ */

/* Runs the whole prompt through tritlstm_forward and writes the logits of every position. */
static int write_logits(const model *m, const int64_t *ids, size_t length, const char *path)
{
    float *x = allocate((int64_t)length, m->embed, sizeof *x), *out = allocate((int64_t)length, m->width, sizeof *out);
    float *logits = allocate(m->size, 1, sizeof *logits);
    size_t workspace_bytes = 0;
    void *workspace = NULL;
    tritlstm_forward_args args;
    tritlstm_status status;
    FILE *file = NULL;
    int good = 0;
    if (!x || !out || !logits) {
        complain("out of memory");
        goto done;
    }
    if ((status = tritlstm_sizes(m->lstm, (int64_t)length, 1, 0, &workspace_bytes, NULL))) {
        library_failed("sizes", status);
        goto done;
    }
    if (workspace_bytes && !(workspace = malloc(workspace_bytes))) {
        complain("out of memory");
        goto done;
    }
    for (size_t t = 0; t < length; t++) memcpy(x + (int64_t)t * m->embed, embed(m, ids[t]), (size_t)m->embed * sizeof *x);
    tritlstm_forward_args_init(&args, sizeof args);
    args.steps = (int64_t)length;
    args.batch = 1;
    args.x = x;
    args.out = out;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    if ((status = tritlstm_forward(m->lstm, &args))) {
        library_failed("forward", status);
        goto done;
    }
    if (!(file = fopen(path, "wb"))) {
        complain("%s: %s", path, strerror(errno));
        goto done;
    }
    good = 1;
    for (size_t t = 0; t < length && good; t++) {
        apply_head(m, out + (int64_t)t * m->width, logits);
        good = fwrite(logits, sizeof *logits, (size_t)m->size, file) == (size_t)m->size;
    }
    if (fclose(file)) good = 0;
    if (!good) complain("%s: %s", path, strerror(errno));
done:
    free(x);
    free(out);
    free(logits);
    free(workspace);
    return good;
}

/* A uniform number in [0, 1): xorshift64* of Vigna (2016). */
static double draw(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)((*state * 0x2545F4914F6CDD1DULL) >> 11) / 9007199254740992.0;
}

/* The id for which the running sum of exp(logits / temperature) passes a uniform draw; the likeliest at 0. */
static int64_t sample(const model *m, const float *logits, double temperature, uint64_t *state)
{
    int64_t best = -1, last = -1;
    double total = 0, at;
    for (int64_t v = 0; v < m->size; v++)
        if (v != m->unknown && (best < 0 || logits[v] > logits[best])) best = v;
    if (temperature == 0) return best;
    for (int64_t v = 0; v < m->size; v++)
        if (v != m->unknown) total += exp(((double)logits[v] - logits[best]) / temperature);
    at = draw(state) * total;
    for (int64_t v = 0; v < m->size; v++) {
        if (v == m->unknown) continue;
        last = v;
        at -= exp(((double)logits[v] - logits[best]) / temperature);
        if (at < 0) break;
    }
    return last;
}

/* Feeds the prompt, then every byte that was drawn, through tritlstm_step. */
static int write_text(const model *m, const char *prompt, const int64_t *ids, size_t prompt_length, long long length,
                      double temperature, uint64_t seed)
{
    float *out = allocate(m->width, 1, sizeof *out), *logits = allocate(m->size, 1, sizeof *logits);
    /* splitmix64's increment: seeds 0, 1, 2, ... give unlike states, and none gives 0 */
    uint64_t random = (seed + 1) * 0x9E3779B97F4A7C15ULL | 1;
    size_t workspace_bytes = 0;
    void *workspace = NULL;
    tritlstm_state *state = NULL;
    tritlstm_status status;
    int good = 0;
    if (!out || !logits) {
        complain("out of memory");
        goto done;
    }
    if ((status = tritlstm_sizes(m->lstm, 1, 1, 0, &workspace_bytes, NULL)) ||
        (status = tritlstm_state_create(m->lstm, 1, &state))) {
        library_failed("state", status);
        goto done;
    }
    if (workspace_bytes && !(workspace = malloc(workspace_bytes))) {
        complain("out of memory");
        goto done;
    }
    fwrite(prompt, 1, prompt_length, stdout);
    int64_t id = 0;
    for (long long k = 0; k < (long long)prompt_length + length; k++) {
        if (k < (long long)prompt_length) {
            id = ids[k];
        } else {
            apply_head(m, out, logits);
            id = sample(m, logits, temperature, &random);
            putchar(m->vocabulary[id]);
        }
        if ((status = tritlstm_step(state, embed(m, id), out, workspace, workspace_bytes, NULL))) {
            library_failed("step", status);
            goto done;
        }
    }
    putchar('\n');
    good = !fflush(stdout) && !ferror(stdout);
    if (!good) complain("writing the text failed: %s", strerror(errno));
done:
    tritlstm_state_destroy(state);
    free(out);
    free(logits);
    free(workspace);
    return good;
}

/* ---- the command line -------------------------------------------------------------------------------- */

typedef struct arguments {
    const char *model, *prompt, *logits;
    long long length;
    unsigned long long seed;
    double temperature;
} arguments;

static int usage(void)
{
    fputs("usage: generate MODEL.safetensors [--prompt TEXT] [--length N] [--temperature X] [--seed N] [--logits FILE]\n",
          stderr);
    return 0;
}

static int parse(arguments *a, int argc, char **argv)
{
    for (int k = 1; k < argc; k++) {
        const char *name = argv[k], *value = k + 1 < argc ? argv[k + 1] : NULL;
        char *end = NULL;
        if (strncmp(name, "--", 2)) {
            if (a->model) return usage();
            a->model = name;
            continue;
        }
        if (!value) return usage();
        k++;
        errno = 0;
        if (!strcmp(name, "--prompt")) a->prompt = value;
        else if (!strcmp(name, "--logits")) a->logits = value;
        else if (!strcmp(name, "--length")) a->length = strtoll(value, &end, 10);
        else if (!strcmp(name, "--seed")) a->seed = strtoull(value, &end, 10);
        else if (!strcmp(name, "--temperature")) a->temperature = strtod(value, &end);
        else return usage();
        if (end && (end == value || *end || errno)) return complain("%s '%s' is not a number", name, value);
    }
    if (!a->model) return usage();
    if (!*a->prompt) return complain("--prompt must have at least one byte");
    if (a->length < 0 || a->length > INT_MAX) return complain("--length is %lld, but must be 0 ... %d", a->length, INT_MAX);
    if (!(a->temperature >= 0 && a->temperature <= 1000)) return complain("--temperature must be 0 ... 1000");
    return 1;
}

int main(int argc, char **argv)
{
    arguments a = {NULL, "def ", NULL, 400, 0, 0.7};
    model m = {0};
    int64_t *ids = NULL;
    if (!parse(&a, argc, argv)) return 2;
    size_t length = strlen(a.prompt);
    int good = read_model(&m, a.model);
    if (good && !(ids = allocate((int64_t)length, 1, sizeof *ids))) good = complain("out of memory");
    good = good && encode(&m, a.prompt, length, ids) && read_lstm(&m, a.model) &&
           (a.logits ? write_logits(&m, ids, length, a.logits)
                     : write_text(&m, a.prompt, ids, length, a.length, a.temperature, a.seed));
    free(ids);
    free_model(&m);
    return good ? 0 : 1;
}
