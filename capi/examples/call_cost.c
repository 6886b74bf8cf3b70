/* What a call costs: times single steps, whole sequences and training steps of a network on a CPU.
 *
 *     call_cost D H LAYERS STEPS BATCH CALLS [launcher]
 *
 * Runs each kind of call CALLS times and prints, in nanoseconds, the 20th, 50th and 80th percentile; before that the sum of
 * the outputs for x = (k % 7) / 7, by which the weights of seed 7 can be checked. A network of D = H = STEPS = BATCH = 1 has
 * next to no work: what it takes is the cost of the call. With `launcher` the network is on a CUDA device whose driver is
 * one that does nothing (capi/src/null_libcuda.c): what is timed is the library up to the driver, and the sum is of zeros.
 *
 *     cc -O2 call_cost.c $(pkg-config --cflags --libs tritlstm) -o call_cost
 *
 * SPDX-License-Identifier: MIT */
#define _POSIX_C_SOURCE 200809L
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <tritlstm.h>

typedef struct job {
    tritlstm *lstm;
    tritlstm_state *state;
    tritlstm_forward_args forward, training;
    tritlstm_backward_args backward;
    void *step_workspace;
    size_t step_bytes;
} job;

static void check(tritlstm_status status)
{
    if (status == TRITLSTM_OK) return;
    fprintf(stderr, "call_cost: %s: %s\n", tritlstm_status_string(status), tritlstm_last_error());
    exit(1);
}

static void *allocate(size_t bytes)
{
    void *memory = bytes ? calloc(bytes, 1) : NULL;
    if (bytes && !memory) {
        fputs("call_cost: out of memory\n", stderr);
        exit(1);
    }
    return memory;
}

static void step(job *j)
{
    check(tritlstm_step(j->state, j->forward.x, j->forward.out, j->step_workspace, j->step_bytes, NULL));
}

static void forward(job *j) { check(tritlstm_forward(j->lstm, &j->forward)); }

static void train(job *j)
{
    check(tritlstm_forward(j->lstm, &j->training));
    check(tritlstm_backward(j->lstm, &j->backward));
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static void measure(const char *name, void (*call)(job *), job *j, size_t calls)
{
    int64_t *times = allocate(calls * sizeof *times);
    for (size_t k = 0; k < calls / 10 + 2; k++) call(j);
    for (size_t k = 0; k < calls; k++) {
        int64_t before = now();
        call(j);
        times[k] = now() - before;
    }
    qsort(times, calls, sizeof *times, ascending);
    printf("%s %" PRId64 " %" PRId64 " %" PRId64 "\n", name, times[calls / 5], times[calls / 2], times[calls * 4 / 5]);
    free(times);
}

static void set_up(job *j, const int64_t *n, int32_t device)
{
    int64_t D = n[0], H = n[1], layers = n[2], T = n[3], B = n[4], count;
    size_t workspace, reserve, rows = (size_t)(T * B);
    tritlstm_options options;
    check(tritlstm_options_init(&options, sizeof options));
    options.input_size = D, options.hidden_size = H, options.num_layers = layers, options.seed = 7;
    options.device = device;
    check(tritlstm_create(&options, NULL, &j->lstm));
    check(tritlstm_state_create(j->lstm, B, &j->state));
    check(tritlstm_sizes(j->lstm, 1, B, 0, &j->step_bytes, NULL));
    j->step_workspace = allocate(j->step_bytes);

    float *x = allocate(rows * (size_t)D * sizeof *x), *ones = allocate(rows * (size_t)H * sizeof *ones);
    for (size_t k = 0; k < rows * (size_t)D; k++) x[k] = (float)(k % 7) / 7;
    for (size_t k = 0; k < rows * (size_t)H; k++) ones[k] = 1;
    check(tritlstm_forward_args_init(&j->forward, sizeof j->forward));
    j->forward.steps = T, j->forward.batch = B, j->forward.x = x;
    j->forward.out = allocate(rows * (size_t)H * sizeof(float));
    j->training = j->forward;
    check(tritlstm_sizes(j->lstm, T, B, 0, &workspace, NULL));
    j->forward.workspace = allocate(workspace), j->forward.workspace_bytes = workspace;
    check(tritlstm_sizes(j->lstm, T, B, 1, &workspace, &reserve));
    j->training.workspace = allocate(workspace), j->training.workspace_bytes = workspace;
    j->training.reserve = allocate(reserve), j->training.reserve_bytes = reserve;

    check(tritlstm_num_weights(j->lstm, &count));
    void **gradients = allocate((size_t)count * sizeof *gradients);
    for (int64_t k = 0; k < count; k++) {
        tritlstm_weight info;
        info.size = sizeof info;
        check(tritlstm_weight_info(j->lstm, k, &info));
        gradients[k] = allocate(info.bytes);
    }
    check(tritlstm_backward_args_init(&j->backward, sizeof j->backward));
    j->backward.steps = T, j->backward.batch = B, j->backward.x = x, j->backward.out = j->training.out;
    j->backward.grad_out = ones, j->backward.grad_x = allocate(rows * (size_t)D * sizeof(float));
    j->backward.grad_weights = gradients;
    j->backward.workspace = j->training.workspace, j->backward.workspace_bytes = workspace;
    j->backward.reserve = j->training.reserve, j->backward.reserve_bytes = reserve;

    forward(j);
    double sum = 0;
    for (size_t k = 0; k < rows * (size_t)H; k++) sum += ((const float *)j->forward.out)[k];
    printf("sum %.9g\n", sum);
}

int main(int argc, char **argv)
{
    job j;
    int64_t numbers[6];
    for (int k = 0; k < 6; k++) {
        numbers[k] = k + 1 < argc ? strtoll(argv[k + 1], NULL, 10) : 0;
        if (numbers[k] < 1 || argc < 7 || argc > 8 || (argc == 8 && strcmp(argv[7], "launcher"))) {
            fputs("usage: call_cost D H LAYERS STEPS BATCH CALLS [launcher]\n", stderr);
            return 2;
        }
    }
    set_up(&j, numbers, argc == 8 ? TRITLSTM_CUDA : TRITLSTM_CPU);
    measure("step", step, &j, (size_t)numbers[5]);
    measure("forward", forward, &j, (size_t)numbers[5]);
    measure("train", train, &j, (size_t)numbers[5]);
    return 0; /* the process ends here, and its memory with it */
}
