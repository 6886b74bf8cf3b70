/* One training step by hand: forward with a reserve, backward, and every gradient against finite differences.
 *
 *     train_step
 *
 * The loss is a fixed random combination of out, h_n and c_n, so its gradients in them are known. For each input of the
 * LSTM (x, h0, c0 and every weight) the analytic gradient is projected on random directions and compared with
 * (loss(p + s d) - loss(p - s d)) / 2s in float64. Then it goes one step down the gradient of the weights.
 * Prints a table; exits 0 if all agree and the loss falls as it should, 1 otherwise.
 *
 *     cc train_step.c $(pkg-config --cflags --libs tritlstm_python) -lm -o train_step
 *
 * SPDX-License-Identifier: MIT */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tritlstm.h>

enum { T = 5, B = 3, D = 4, H = 6, LAYERS = 2, DIRECTIONS = 2, WEIGHTS = LAYERS * DIRECTIONS * 4 };
enum { ROWS = LAYERS * DIRECTIONS, STATE = ROWS * B * H, OUT = T * B * DIRECTIONS * H, INPUTS = 3 + WEIGHTS };

/* Central differences err by s^2 from the cut series and by eps / s from rounding: s = eps^(1/3) = 6e-6 balances them, at
 * about 4e-11 relative to the loss's size. */
static const double STEP = 6e-6, TOLERANCE = 1e-8;

static double random_number(void)
{
    static uint64_t state = 20240229;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (double)((state * 0x2545F4914F6CDD1DULL) >> 11) / 4503599627370496.0 - 1.0;
}

static double *random_array(size_t count)
{
    double *values = malloc(count * sizeof *values);
    if (!values) {
        fputs("train_step: out of memory\n", stderr);
        exit(1);
    }
    for (size_t k = 0; k < count; k++) values[k] = random_number();
    return values;
}

static void check(const char *what, tritlstm_status status)
{
    if (status == TRITLSTM_OK) return;
    fprintf(stderr, "train_step: %s: %s: %s\n", what, tritlstm_status_string(status), tritlstm_last_error());
    exit(1);
}

typedef struct input {
    const char *name;
    size_t count;
    double *values, *gradient;
} input;

static tritlstm *lstm;
static input inputs[INPUTS]; /* x, h0, c0, the weights */
static tritlstm_weight info[WEIGHTS];
static double *out, *h_n, *c_n, *seed_out, *seed_h, *seed_c;
static void *workspace, *reserve;
static size_t workspace_bytes, reserve_bytes;

static double dot(const double *a, const double *b, size_t count)
{
    double sum = 0;
    for (size_t k = 0; k < count; k++) sum += a[k] * b[k];
    return sum;
}

static double loss(int training)
{
    const void *weights[WEIGHTS];
    tritlstm_forward_args args;
    for (int k = 0; k < WEIGHTS; k++) weights[k] = inputs[3 + k].values;
    check("set_weights", tritlstm_set_weights(lstm, weights, TRITLSTM_CPU, NULL));
    tritlstm_forward_args_init(&args, sizeof args);
    args.steps = T;
    args.batch = B;
    args.x = inputs[0].values;
    args.h0 = inputs[1].values;
    args.c0 = inputs[2].values;
    args.out = out;
    args.h_n = h_n;
    args.c_n = c_n;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    if (training) {
        args.reserve = reserve;
        args.reserve_bytes = reserve_bytes;
    }
    check("forward", tritlstm_forward(lstm, &args));
    return dot(out, seed_out, OUT) + dot(h_n, seed_h, STATE) + dot(c_n, seed_c, STATE);
}

static void backward(void)
{
    void *weights[WEIGHTS];
    tritlstm_backward_args args;
    for (int k = 0; k < WEIGHTS; k++) weights[k] = inputs[3 + k].gradient;
    tritlstm_backward_args_init(&args, sizeof args);
    args.steps = T;
    args.batch = B;
    args.x = inputs[0].values;
    args.h0 = inputs[1].values;
    args.c0 = inputs[2].values;
    args.out = out;
    args.grad_out = seed_out;
    args.grad_h_n = seed_h;
    args.grad_c_n = seed_c;
    args.grad_x = inputs[0].gradient;
    args.grad_h0 = inputs[1].gradient;
    args.grad_c0 = inputs[2].gradient;
    args.grad_weights = weights;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    args.reserve = reserve;
    args.reserve_bytes = reserve_bytes;
    check("backward", tritlstm_backward(lstm, &args));
}

static void set_up(void)
{
    tritlstm_options options;
    int64_t count;
    tritlstm_options_init(&options, sizeof options);
    options.input_size = D;
    options.hidden_size = H;
    options.num_layers = LAYERS;
    options.bidirectional = DIRECTIONS == 2;
    options.dtype = TRITLSTM_FLOAT64;
    check("create", tritlstm_create(&options, NULL, &lstm));
    check("num_weights", tritlstm_num_weights(lstm, &count));
    if (count != WEIGHTS) {
        fprintf(stderr, "train_step: %lld weights instead of %d\n", (long long)count, WEIGHTS);
        exit(1);
    }
    inputs[0] = (input){"x", T * B * D, NULL, NULL};
    inputs[1] = (input){"h0", STATE, NULL, NULL};
    inputs[2] = (input){"c0", STATE, NULL, NULL};
    for (int k = 0; k < WEIGHTS; k++) {
        info[k].size = sizeof info[k];
        check("weight_info", tritlstm_weight_info(lstm, k, &info[k]));
        inputs[3 + k] = (input){info[k].name, info[k].bytes / sizeof(double), NULL, NULL};
    }
    for (int k = 0; k < INPUTS; k++) {
        inputs[k].values = random_array(inputs[k].count);
        inputs[k].gradient = random_array(inputs[k].count);
    }
    out = random_array(OUT);
    h_n = random_array(STATE);
    c_n = random_array(STATE);
    seed_out = random_array(OUT);
    seed_h = random_array(STATE);
    seed_c = random_array(STATE);
    check("sizes", tritlstm_sizes(lstm, T, B, 1, &workspace_bytes, &reserve_bytes));
    workspace = workspace_bytes ? random_array(workspace_bytes / sizeof(double) + 1) : NULL;
    reserve = random_array(reserve_bytes / sizeof(double) + 1);
}

/* The largest relative error over a few random directions. */
static double compare(input *in, double *analytic, double *numeric)
{
    double *base = random_array(in->count), worst = -1;
    memcpy(base, in->values, in->count * sizeof *base);
    for (int trial = 0; trial < 3; trial++) {
        double *direction = random_array(in->count), up, down, a, n, error;
        for (size_t k = 0; k < in->count; k++) in->values[k] = base[k] + STEP * direction[k];
        up = loss(0);
        for (size_t k = 0; k < in->count; k++) in->values[k] = base[k] - STEP * direction[k];
        down = loss(0);
        memcpy(in->values, base, in->count * sizeof *base);
        a = dot(in->gradient, direction, in->count);
        n = (up - down) / (2 * STEP);
        error = fabs(a - n) / (1 + fabs(n));
        if (isnan(error)) error = INFINITY;
        if (error > worst) {
            worst = error;
            *analytic = a;
            *numeric = n;
        }
        free(direction);
    }
    free(base);
    return worst;
}

/* Goes down along the gradient by a step so short that the loss must fall; returns by how much. */
static double descend(double before)
{
    double slope = 0, rate;
    for (int k = 3; k < INPUTS; k++) slope += dot(inputs[k].gradient, inputs[k].gradient, inputs[k].count);
    rate = 1e-3 / slope;
    for (int k = 3; k < INPUTS; k++)
        for (size_t n = 0; n < inputs[k].count; n++) inputs[k].values[n] -= rate * inputs[k].gradient[n];
    return before - loss(0);
}

int main(void)
{
    int failures = 0;
    set_up();
    double value = loss(1);
    backward();
    printf("loss %.6f; T=%d B=%d D=%d H=%d, %d layers, %d directions, float64\n\n", value, T, B, D, H, LAYERS, DIRECTIONS);
    printf("%-24s %12s %12s %10s\n", "gradient of", "backward", "differences", "error");
    for (int k = 0; k < INPUTS; k++) {
        double analytic = 0, numeric = 0, error = compare(&inputs[k], &analytic, &numeric);
        int good = error <= TOLERANCE;
        printf("%-24s %12.6f %12.6f %10.1e  %s\n", inputs[k].name, analytic, numeric, error, good ? "ok" : "WRONG");
        failures += !good;
    }
    printf("\n%d of %d gradients agree within %.0e\n", INPUTS - failures, INPUTS, TOLERANCE);
    double fall = descend(value);
    int expected = fall > 0.9e-3 && fall < 1.1e-3; /* to first order the loss falls by rate * |gradient|^2 */
    printf("a step down the gradient lowers the loss by %.6f, expected 0.001000  %s\n", fall, expected ? "ok" : "WRONG");
    failures += !expected;
    for (int k = 0; k < INPUTS; k++) {
        free(inputs[k].values);
        free(inputs[k].gradient);
    }
    free(out);
    free(h_n);
    free(c_n);
    free(seed_out);
    free(seed_h);
    free(seed_c);
    free(workspace);
    free(reserve);
    tritlstm_destroy(lstm);
    return failures ? 1 : 0;
}
