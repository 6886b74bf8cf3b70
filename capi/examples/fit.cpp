// Trains an LSTM in C++17 to say what it heard a step ago, by gradient descent, then runs it step by step.
//
//     fit [STEPS_OF_DESCENT]
//
// The loss is the mean square of (unit 0 of the output - half the input a step ago). Prints the loss before and after, and
// how far the outputs of single steps are from those of the whole sequence; exits 0 if training and streaming did as they should.
//
//     c++ -std=c++17 fit.cpp $(pkg-config --cflags --libs tritlstm) -o fit
//
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <tritlstm.hpp>
#include <vector>

namespace {

constexpr int T = 12, B = 4, D = 1, H = 8;
constexpr double RATE = 0.5;

// Inputs in [-1, 1] that look random: the fractional parts of multiples of the golden ratio.
std::vector<double> make_input()
{
    std::vector<double> x(T * B * D);
    for (std::size_t k = 0; k < x.size(); k++) x[k] = 2 * std::fmod(static_cast<double>(k) * 0.6180339887498949, 1.0) - 1;
    return x;
}

struct trainer {
    tritlstm_cpp::lstm lstm;
    std::vector<double> x = make_input(), out = std::vector<double>(T * B * H), grad_out = out;
    std::vector<std::vector<double>> weights, gradients;
    tritlstm_cpp::scratches memory = lstm.memory(T, B, tritlstm_cpp::mode::training);

    explicit trainer(const tritlstm_options &options) : lstm(options)
    {
        std::vector<void *> pointers;
        for (const auto &info : lstm.weights()) {
            weights.emplace_back(info.bytes / sizeof(double));
            gradients.emplace_back(info.bytes / sizeof(double));
        }
        for (auto &weight : weights) pointers.push_back(weight.data());
        lstm.get_weights(pointers.data());
    }

    // Runs forward, fills grad_out, returns the loss.
    double loss()
    {
        tritlstm_cpp::forward_args args;
        args.steps = T, args.batch = B, args.x = x.data(), args.out = out.data();
        lstm.forward(args, memory);
        double sum = 0;
        std::fill(grad_out.begin(), grad_out.end(), 0.0);
        for (std::size_t row = B; row < T * B; row++) {
            double error = out[row * H] - x[row - B] / 2;
            sum += error * error;
            grad_out[row * H] = 2 * error / ((T - 1) * B);
        }
        return sum / ((T - 1) * B);
    }

    void descend()
    {
        tritlstm_cpp::backward_args args;
        std::vector<void *> into;
        std::vector<const void *> from;
        for (auto &gradient : gradients) into.push_back(gradient.data());
        args.steps = T, args.batch = B, args.x = x.data(), args.out = out.data();
        args.grad_out = grad_out.data(), args.grad_weights = into.data();
        lstm.backward(args, memory);
        for (std::size_t k = 0; k < weights.size(); k++) {
            for (std::size_t n = 0; n < weights[k].size(); n++) weights[k][n] -= RATE * gradients[k][n];
            from.push_back(weights[k].data());
        }
        lstm.set_weights(from.data());
    }

    // The largest difference between the outputs of single steps and those in `out`.
    double streaming_error()
    {
        tritlstm_cpp::state state(lstm, B);
        auto step = lstm.memory(1, B, tritlstm_cpp::mode::inference);
        std::vector<double> one(B * H);
        double worst = 0;
        for (std::size_t t = 0; t < T; t++) {
            state.step(&x[t * B * D], one.data(), step.workspace);
            for (std::size_t n = 0; n < one.size(); n++) worst = std::max(worst, std::fabs(one[n] - out[t * B * H + n]));
        }
        return worst;
    }
};

int run(int descents)
{
    tritlstm_cpp::options options;
    options.input_size = D;
    options.hidden_size = H;
    options.dtype = TRITLSTM_FLOAT64;
    options.seed = 3;
    trainer all(options);
    std::puts(all.lstm.explain(T, B, tritlstm_cpp::mode::training).c_str());
    double before = all.loss(), after = before;
    for (int k = 0; k < descents; k++) {
        all.descend();
        after = all.loss();
    }
    double error = all.streaming_error();
    std::printf("loss %.12f before, %.12f after %d steps\nstreaming differs by %.1e\n", before, after, descents, error);

    try { // the wrong use of it
        options.hidden_size = -1;
        tritlstm_cpp::lstm impossible(options);
    } catch (const tritlstm_cpp::error &refused) {
        std::printf("refused: %s: %s\n", refused.name(), refused.what());
    }
    return (descents && !(after < before)) || !(error < 1e-12);
}

} // namespace

int main(int argc, char **argv)
{
    try {
        return run(argc > 1 ? std::atoi(argv[1]) : 300);
    } catch (const std::exception &failure) {
        std::fprintf(stderr, "fit: %s\n", failure.what());
        return 1;
    }
}
