/* A C host that opens the library with dlopen and goes through what only a host of its own can show.
 *
 *     probe LIBRARY local              create, forward, destroy behind RTLD_LOCAL; prints the sum of the outputs
 *     probe LIBRARY threads            eight threads use it for the first time at once, half of them wrongly
 *     probe LIBRARY fork               parent, then child: the child is refused and ends in time
 *     probe LIBRARY fork-first         the child before the parent: both work
 *     probe LIBRARY fork-free          parent, then child with the parent's handle: both work
 *     probe LIBRARY retry              create twice in an environment that may be broken; prints both statuses
 *
 * Prints one line for the test to read; exits 0 if what must hold in every case held. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <tritlstm.h>
#include <unistd.h>

enum { T = 3, B = 2, D = 4, H = 5, THREADS = 8 };

#define FUNCTIONS(X)                                                                                                 \
    X(tritlstm_last_error) X(tritlstm_options_init) X(tritlstm_create) X(tritlstm_destroy) X(tritlstm_forward)       \
    X(tritlstm_forward_args_init) X(tritlstm_sizes)
#define POINTER(name) static __typeof__(name) *p_##name;
FUNCTIONS(POINTER)

static void open_library(const char *path)
{
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        fprintf(stderr, "%s\n", dlerror());
        exit(3);
    }
#define FIND(name)                                                                                                   \
    {                                                                                                                \
        void *symbol = dlsym(handle, #name);                                                                         \
        memcpy(&p_##name, &symbol, sizeof symbol);                                                                   \
    }
    FUNCTIONS(FIND)
}

static int create(int64_t hidden, tritlstm **lstm)
{
    tritlstm_options options;
    p_tritlstm_options_init(&options, sizeof options);
    options.input_size = D;
    options.hidden_size = hidden;
    options.seed = 7;
    *lstm = (tritlstm *)1;
    return p_tritlstm_create(&options, NULL, lstm);
}

static int forward(tritlstm *lstm, float *out)
{
    float x[T * B * D];
    tritlstm_forward_args args;
    for (int k = 0; k < T * B * D; k++) x[k] = (float)(k % 7) / 7;
    p_tritlstm_forward_args_init(&args, sizeof args);
    args.steps = T;
    args.batch = B;
    args.x = x;
    args.out = out;
    int status = p_tritlstm_sizes(lstm, T, B, 0, &args.workspace_bytes, NULL);
    if (status) return status;
    if (args.workspace_bytes) args.workspace = malloc(args.workspace_bytes);
    status = p_tritlstm_forward(lstm, &args);
    free(args.workspace);
    return status;
}

static double sum(const float *out)
{
    double total = 0;
    for (int k = 0; k < T * B * H; k++) total += out[k];
    return total;
}

/* One whole use; returns the status, and the sum if that is 0. */
static int use(double *total)
{
    float out[T * B * H];
    tritlstm *lstm;
    int status = create(H, &lstm);
    if (!status) status = forward(lstm, out);
    p_tritlstm_destroy(lstm);
    if (!status) *total = sum(out);
    return status;
}

static pthread_barrier_t barrier;

/* Even threads work, odd ones ask for a hidden size that only they name; each must read its own message. */
static void *thread(void *argument)
{
    int number = (int)(intptr_t)argument;
    char expected[64];
    double total, first = 0;
    pthread_barrier_wait(&barrier);
    for (int round = 0; round < 50; round++) {
        if (number % 2 == 0) {
            if (use(&total) || (round && total != first)) return "a working thread failed";
            first = total;
            continue;
        }
        tritlstm *lstm;
        snprintf(expected, sizeof expected, "hidden_size is %d,", -number);
        if (create(-number, &lstm) != TRITLSTM_ERROR_ARGUMENT || lstm) return "a wrong size was not refused";
        if (strncmp(p_tritlstm_last_error(), expected, strlen(expected))) return "another thread's message";
    }
    if (number % 2 == 0 && *p_tritlstm_last_error()) return "a message without a failure";
    return NULL;
}

static int threads(void)
{
    pthread_t all[THREADS];
    int failures = 0;
    pthread_barrier_init(&barrier, NULL, THREADS);
    for (intptr_t k = 0; k < THREADS; k++) pthread_create(&all[k], NULL, thread, (void *)k);
    for (int k = 0; k < THREADS; k++) {
        void *result;
        pthread_join(all[k], &result);
        if (result) printf("thread %d: %s\n", k, (char *)result);
        failures += result != NULL;
    }
    printf("threads %d failures\n", failures);
    return failures != 0;
}

/* The child goes on with the parent's handle, and gets what the parent gets. */
static int run_free_child(void)
{
    int status;
    tritlstm *lstm;
    float out[T * B * H];
    double total;
    if ((status = create(H, &lstm)) || forward(lstm, out)) return 10;
    total = sum(out);
    pid_t child = fork();
    if (child == 0) {
        double own;
        status = forward(lstm, out) || sum(out) != total || use(&own) || own != total;
        p_tritlstm_destroy(lstm);
        exit(status);
    }
    waitpid(child, &status, 0);
    status = !WIFEXITED(status) || WEXITSTATUS(status) || forward(lstm, out) || sum(out) != total;
    p_tritlstm_destroy(lstm);
    if (!status) puts("fork ok");
    return status;
}

static int run_child(int first)
{
    int status;
    double total;
    tritlstm *lstm = NULL;
    float out[T * B * H];
    if (!first && (status = create(H, &lstm))) return 10;
    pid_t child = fork();
    if (child == 0) {
        if (first) exit(use(&total) ? 20 : 0);
        if (forward(lstm, out) != TRITLSTM_ERROR_FORKED) exit(21);
        if (!strstr(p_tritlstm_last_error(), "forked")) exit(22);
        if (use(&total) != TRITLSTM_ERROR_FORKED) exit(23);
        p_tritlstm_destroy(lstm);
        exit(0);
    }
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
        printf("child: status %x\n", status);
        return 11;
    }
    if (!first && forward(lstm, out)) return 12;
    p_tritlstm_destroy(lstm);
    if (use(&total)) return 13;
    puts("fork ok");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 3) return 2;
    open_library(argv[1]);
    if (!strcmp(argv[2], "threads")) return threads();
    if (!strcmp(argv[2], "fork")) return run_child(0);
    if (!strcmp(argv[2], "fork-first")) return run_child(1);
    if (!strcmp(argv[2], "fork-free")) return run_free_child();
    if (!strcmp(argv[2], "retry")) {
        for (int k = 0; k < 2; k++) {
            tritlstm *lstm;
            int status = create(H, &lstm);
            printf("%d %d %s\n", status, lstm != NULL, p_tritlstm_last_error());
            p_tritlstm_destroy(lstm);
        }
        return 0;
    }
    double total;
    int status = use(&total);
    if (status) printf("%d %s\n", status, p_tritlstm_last_error());
    else printf("%.9g\n", total);
    return status;
}
