/* A plain C host on a CUDA device: runs one LSTM forward and backward, from a file and to a file.
 *
 *     cuda_host PROBLEM RESULT
 *
 * PROBLEM: 9 int64 (input_size, hidden_size, num_layers, bidirectional, bias, proj_size, dtype, T, B), then the weights, x, h0,
 * c0, grad_out, grad_h_n, grad_c_n. RESULT: out, h_n, c_n, the gradients of x, h0, c0 and of the weights. Prints what will run.
 * The driver is the only thing that it needs beside the library. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <tritlstm.h>

static int (*init)(unsigned), (*device_get)(int *, int), (*retain)(void **, int), (*set_current)(void *);
static int (*allocate)(uint64_t *, size_t), (*copy_in)(uint64_t, const void *, size_t), (*copy_out)(void *, uint64_t, size_t);

static void stop(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, tritlstm_last_error());
    exit(1);
}

static void open_driver(void)
{
    void *context, *library = dlopen("libcuda.so.1", RTLD_NOW);
    int device;
    if (!library) stop(dlerror());
#define LOOK_UP(variable, name)                                                                                      \
    *(void **)&variable = dlsym(library, name);                                                                      \
    if (!variable) stop(name)
    LOOK_UP(init, "cuInit");
    LOOK_UP(device_get, "cuDeviceGet");
    LOOK_UP(retain, "cuDevicePrimaryCtxRetain");
    LOOK_UP(set_current, "cuCtxSetCurrent");
    LOOK_UP(allocate, "cuMemAlloc_v2");
    LOOK_UP(copy_in, "cuMemcpyHtoD_v2");
    LOOK_UP(copy_out, "cuMemcpyDtoH_v2");
    if (init(0) || device_get(&device, 0) || retain(&context, device) || set_current(context)) stop("CUDA");
}

static void *on_device(size_t bytes)
{
    uint64_t at;
    if (allocate(&at, bytes ? bytes : 1)) stop("cuMemAlloc");
    return (void *)(uintptr_t)at;
}

static void *from_file(FILE *file, size_t bytes)
{
    void *there = on_device(bytes), *here = malloc(bytes);
    if (!here || fread(here, 1, bytes, file) != bytes || copy_in((uintptr_t)there, here, bytes)) stop("reading");
    free(here);
    return there;
}

static void to_file(FILE *file, const void *there, size_t bytes)
{
    void *here = malloc(bytes);
    if (!here || copy_out(here, (uintptr_t)there, bytes) || fwrite(here, 1, bytes, file) != bytes) stop("writing");
    free(here);
}

int main(int argc, char **argv)
{
    int64_t n[9], count;
    static char text[4096];
    FILE *in = argc == 3 ? fopen(argv[1], "rb") : NULL, *result = argc == 3 ? fopen(argv[2], "wb") : NULL;
    tritlstm_options options;
    tritlstm_forward_args f;
    tritlstm_backward_args b;
    tritlstm *lstm;
    if (!in || !result || fread(n, sizeof *n, 9, in) != 9) stop("arguments");
    tritlstm_options_init(&options, sizeof options);
    options.input_size = n[0], options.hidden_size = n[1], options.num_layers = n[2], options.bidirectional = (int32_t)n[3];
    options.bias = (int32_t)n[4], options.proj_size = n[5], options.dtype = (int32_t)n[6];
    options.device = TRITLSTM_CUDA;
    options.initial_weights = TRITLSTM_WEIGHTS_ZERO;
    open_driver();
    if (tritlstm_create(&options, NULL, &lstm) || tritlstm_num_weights(lstm, &count)) stop("create");

    size_t item = options.dtype == TRITLSTM_FLOAT32 ? 4 : 2, T = (size_t)n[7], B = (size_t)n[8], P = n[3] ? 2 : 1;
    size_t R = (size_t)(n[5] ? n[5] : n[1]), rows = (size_t)n[2] * P;
    size_t x = T * B * (size_t)n[0] * item, out = T * B * P * R * item, h = rows * B * R * item, c = rows * B * (size_t)n[1] * item;
    void **weights = calloc((size_t)count, sizeof *weights), **grads = calloc((size_t)count, sizeof *grads);
    size_t *bytes = calloc((size_t)count, sizeof *bytes);
    if (!weights || !grads || !bytes) stop("memory");
    for (int64_t k = 0; k < count; k++) {
        tritlstm_weight w = {sizeof w, "", 0, 0, 0};
        if (tritlstm_weight_info(lstm, k, &w)) stop("weight_info");
        bytes[k] = w.bytes;
        weights[k] = from_file(in, w.bytes);
        grads[k] = on_device(w.bytes);
    }
    if (tritlstm_set_weights(lstm, (const void *const *)weights, TRITLSTM_CUDA, NULL)) stop("set_weights");

    tritlstm_forward_args_init(&f, sizeof f);
    tritlstm_backward_args_init(&b, sizeof b);
    f.steps = b.steps = n[7], f.batch = b.batch = n[8];
    f.x = b.x = from_file(in, x), f.h0 = b.h0 = from_file(in, h), f.c0 = b.c0 = from_file(in, c);
    b.grad_out = from_file(in, out), b.grad_h_n = from_file(in, h), b.grad_c_n = from_file(in, c);
    f.out = on_device(out), f.h_n = on_device(h), f.c_n = on_device(c);
    b.out = f.out, b.grad_x = on_device(x), b.grad_h0 = on_device(h), b.grad_c0 = on_device(c), b.grad_weights = grads;
    if (tritlstm_sizes(lstm, n[7], n[8], 1, &f.workspace_bytes, &f.reserve_bytes)) stop("sizes");
    f.workspace = b.workspace = on_device(f.workspace_bytes), b.workspace_bytes = f.workspace_bytes;
    f.reserve = on_device(f.reserve_bytes), b.reserve = f.reserve, b.reserve_bytes = f.reserve_bytes;
    if (tritlstm_forward(lstm, &f)) stop("forward");
    if (tritlstm_backward(lstm, &b)) stop("backward");
    if (tritlstm_explain(lstm, n[7], n[8], 1, text, sizeof text, NULL)) stop("explain");
    puts(text);

    to_file(result, f.out, out);
    to_file(result, f.h_n, h);
    to_file(result, f.c_n, c);
    to_file(result, b.grad_x, x);
    to_file(result, b.grad_h0, h);
    to_file(result, b.grad_c0, c);
    for (int64_t k = 0; k < count; k++) to_file(result, grads[k], bytes[k]);
    tritlstm_destroy(lstm);
    free(weights), free(grads), free(bytes);
    return fclose(in) | fclose(result);
}
