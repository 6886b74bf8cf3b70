/* A host that uses libtritlstm's CUDA side from many threads, on the stand-in driver with two devices, for a thread sanitizer.
 *
 * Launches are noted and nothing runs, so the results say nothing: what is watched is who touches which memory. At the end
 * nothing of the driver's may be left. Prints what it did; exits 0 if every status was as it should be. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tritlstm.h>

enum { T = 3, B = 2, D = 8, H = 32, LAYERS = 2, THREADS = 8, ROUNDS = 4, ITEM = 2 };
enum { X = T * B * D * ITEM, OUT = T * B * H * ITEM, STATE = LAYERS * B * H * ITEM };

extern int standin_count;
int standin_live(void);
void *standin_allocate(size_t bytes);
int standin_deallocate(void *memory);
void standin_push(void *context);
void *standin_current(void);

#define REQUIRE(condition)                                                                                           \
    do {                                                                                                             \
        if (!(condition)) {                                                                                          \
            printf("line %d: %s is false; last error: %s\n", __LINE__, #condition, tritlstm_last_error());           \
            exit(1);                                                                                                 \
        }                                                                                                            \
    } while (0)

static tritlstm *shared[2];
static pthread_barrier_t together;

static void *on_device(size_t bytes)
{
    void *memory = standin_allocate(bytes ? bytes : 1);
    REQUIRE(memory);
    return memory;
}

static tritlstm *create(int device)
{
    tritlstm *lstm;
    tritlstm_options o;
    REQUIRE(!tritlstm_options_init(&o, sizeof o));
    o.input_size = D, o.hidden_size = H, o.num_layers = LAYERS, o.dtype = TRITLSTM_FLOAT16;
    o.device = TRITLSTM_CUDA, o.device_index = device;
    REQUIRE(!tritlstm_create(&o, NULL, &lstm));
    return lstm;
}

static void train(const tritlstm *lstm)
{
    tritlstm_forward_args f;
    tritlstm_backward_args b;
    void *given[8];
    int64_t weights;
    REQUIRE(!tritlstm_forward_args_init(&f, sizeof f) && !tritlstm_backward_args_init(&b, sizeof b));
    REQUIRE(!tritlstm_sizes(lstm, T, B, 1, &f.workspace_bytes, &f.reserve_bytes));
    f.steps = b.steps = T, f.batch = b.batch = B;
    f.x = b.x = on_device(X), f.out = on_device(OUT), f.h_n = on_device(STATE), f.c_n = on_device(STATE);
    f.workspace = b.workspace = on_device(f.workspace_bytes), f.reserve = on_device(f.reserve_bytes);
    REQUIRE(!tritlstm_forward(lstm, &f));
    b.out = f.out, b.grad_out = on_device(OUT), b.grad_x = on_device(X);
    b.reserve = f.reserve, b.reserve_bytes = f.reserve_bytes, b.workspace_bytes = f.workspace_bytes;
    REQUIRE(!tritlstm_num_weights(lstm, &weights) && weights == 4 * LAYERS);
    for (int64_t k = 0; k < weights; k++) {
        tritlstm_weight info = {.size = sizeof info};
        REQUIRE(!tritlstm_weight_info(lstm, k, &info));
        given[k] = on_device(info.bytes);
    }
    b.grad_weights = given;
    REQUIRE(!tritlstm_backward(lstm, &b));
    for (int64_t k = 0; k < weights; k++) standin_deallocate(given[k]);
    void *all[] = {(void *)f.x, f.out, f.h_n, f.c_n, f.workspace, f.reserve, (void *)b.grad_out, b.grad_x};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) standin_deallocate(all[k]);
}

static void stream(const tritlstm *lstm)
{
    static const uint8_t one[B] = {0, 1};
    char h[STATE], c[STATE];
    tritlstm_state *state;
    size_t bytes;
    REQUIRE(!tritlstm_sizes(lstm, 1, B, 0, &bytes, NULL) && !tritlstm_state_create(lstm, B, &state));
    void *x = on_device(B * D * ITEM), *out = on_device(B * H * ITEM), *workspace = on_device(bytes);
    for (int t = 0; t < T; t++) REQUIRE(!tritlstm_step(state, x, out, workspace, bytes, NULL));
    REQUIRE(!tritlstm_state_get(state, h, c, TRITLSTM_CPU, NULL) && !tritlstm_state_set(state, h, c, TRITLSTM_CPU, NULL));
    REQUIRE(!tritlstm_state_reset(state, one, NULL) && !tritlstm_state_reset(state, NULL, NULL));
    tritlstm_state_destroy(state);
    standin_deallocate(x), standin_deallocate(out), standin_deallocate(workspace);
}

static void copy_weights(tritlstm *lstm, int set)
{
    static const size_t bytes = 4 * H * H * ITEM;
    void *weights[4 * LAYERS];
    for (int k = 0; k < 4 * LAYERS; k++) REQUIRE((weights[k] = malloc(bytes)));
    REQUIRE(!tritlstm_get_weights(lstm, weights, TRITLSTM_CPU, NULL));
    if (set) REQUIRE(!tritlstm_set_weights(lstm, (const void *const *)weights, TRITLSTM_CPU, NULL));
    for (int k = 0; k < 4 * LAYERS; k++) free(weights[k]);
}

static void refused(int number)
{
    tritlstm *lstm;
    tritlstm_options o;
    char words[64];
    REQUIRE(!tritlstm_options_init(&o, sizeof o));
    o.input_size = D, o.hidden_size = H, o.dtype = TRITLSTM_FLOAT16, o.device = TRITLSTM_CUDA, o.device_index = 2 + number;
    REQUIRE(tritlstm_create(&o, NULL, &lstm) == TRITLSTM_ERROR_DEVICE);
    snprintf(words, sizeof words, "device_index is %d, but", 2 + number);
    REQUIRE(!strncmp(tritlstm_last_error(), words, strlen(words)));
}

static void use_shared(tritlstm *lstm)
{
    char text[2000];
    train(lstm), stream(lstm), copy_weights(lstm, 0);
    REQUIRE(!tritlstm_explain(lstm, T, B, 1, text, sizeof text, NULL));
}

static void *thread(void *argument)
{
    int number = (int)(intptr_t)argument;
    standin_push(argument); /* a context of the host's own, which no call may change */
    pthread_barrier_wait(&together);
    for (int round = 0; round < ROUNDS; round++) {
        tritlstm *own = create((number + round) % 2);
        train(own), stream(own), copy_weights(own, 1), train(own);
        tritlstm_destroy(own);
        refused(number);
        if (shared[0]) use_shared(shared[(number + round) % 2]);
        REQUIRE(standin_current() == argument);
    }
    return NULL;
}

static void run_threads(void)
{
    pthread_t all[THREADS];
    for (intptr_t k = 0; k < THREADS; k++) REQUIRE(!pthread_create(&all[k], NULL, thread, (void *)k));
    for (int k = 0; k < THREADS; k++) pthread_join(all[k], NULL);
}

int main(void)
{
    standin_count = 2;
    pthread_barrier_init(&together, NULL, THREADS);
    run_threads(); /* they open the driver and the devices, and close them, all at once */
    REQUIRE(standin_live() == 0);
    for (int device = 0; device < 2; device++) shared[device] = create(device);
    run_threads();
    for (int device = 0; device < 2; device++) tritlstm_destroy(shared[device]);
    REQUIRE(standin_live() == 0);
    printf("%d threads on 2 devices: nothing is left\n", THREADS);
    return 0;
}
