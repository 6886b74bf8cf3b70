// tritlstm.h for C++17: handles that destroy themselves, statuses as exceptions. Header only; the rules, shapes and
// lifetimes are those of tritlstm.h, which this includes.
//
//     tritlstm_cpp::options options;
//     options.input_size = 28;
//     options.hidden_size = 32;
//     tritlstm_cpp::lstm lstm(options);
//     auto memory = lstm.memory(steps, batch, tritlstm_cpp::mode::inference);
//     tritlstm_cpp::forward_args args;
//     args.steps = steps, args.batch = batch, args.x = x.data(), args.out = out.data();
//     lstm.forward(args, memory);
//
// Every function throws tritlstm_cpp::error where the function of C returns a status other than TRITLSTM_OK, and
// std::bad_alloc where memory of its own is not to be had. Moved-from objects may only be assigned to or destroyed.
//
// SPDX-License-Identifier: MIT
#ifndef TRITLSTM_HPP
#define TRITLSTM_HPP

#include <tritlstm.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace tritlstm_cpp {

class error : public std::runtime_error {
public:
    explicit error(tritlstm_status status) : std::runtime_error(tritlstm_last_error()), status_(status) {}

    tritlstm_status status() const noexcept { return status_; }
    // Such as "TRITLSTM_ERROR_FILE".
    const char *name() const noexcept { return tritlstm_status_string(status_); }

private:
    tritlstm_status status_;
};

inline void check(tritlstm_status status)
{
    if (status != TRITLSTM_OK) throw error(status);
}

// The structs of C, initialised.
struct options : tritlstm_options {
    options() { check(tritlstm_options_init(this, sizeof(tritlstm_options))); }
};

struct load_options : tritlstm_load_options {
    load_options() { check(tritlstm_load_options_init(this, sizeof(tritlstm_load_options))); }
};

struct forward_args : tritlstm_forward_args {
    forward_args() { check(tritlstm_forward_args_init(this, sizeof(tritlstm_forward_args))); }
};

struct backward_args : tritlstm_backward_args {
    backward_args() { check(tritlstm_backward_args_init(this, sizeof(tritlstm_backward_args))); }
};

enum class mode : std::int32_t { inference = 0, training = 1 };

// Ordinary memory of some bytes, aligned for workspace and reserve. Null if there are none.
class scratch {
public:
    explicit scratch(std::size_t bytes = 0) : memory_(bytes ? new unsigned char[bytes] : nullptr), bytes_(bytes)
    {
        static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ >= TRITLSTM_ALIGNMENT, "operator new aligns too little");
    }

    void *data() const noexcept { return memory_.get(); }
    std::size_t bytes() const noexcept { return bytes_; }

private:
    std::unique_ptr<unsigned char[]> memory_;
    std::size_t bytes_;
};

struct sizes {
    std::size_t workspace, reserve; // bytes
};

struct scratches {
    scratch workspace, reserve;
};

// A network: tritlstm *.
class lstm {
public:
    // weights: an array of pointers as tritlstm_create wants it; null: as the options say.
    explicit lstm(const tritlstm_options &how, const void *const *weights = nullptr)
    {
        tritlstm *made;
        check(tritlstm_create(&how, weights, &made));
        handle_.reset(made);
    }

    // From a safetensors file.
    explicit lstm(const std::string &path, const tritlstm_load_options &how = load_options())
    {
        tritlstm *made;
        check(tritlstm_create_from_safetensors(path.c_str(), &how, &made));
        handle_.reset(made);
    }

    // For functions of C; null once moved from.
    tritlstm *get() const noexcept { return handle_.get(); }

    // Its `more` points into this network.
    tritlstm_cpp::options options() const
    {
        tritlstm_cpp::options found;
        check(tritlstm_get_options(get(), &found));
        return found;
    }

    // Names and extents of the weights, in the order of all arrays of pointers to them.
    std::vector<tritlstm_weight> weights() const
    {
        std::int64_t count;
        check(tritlstm_num_weights(get(), &count));
        std::vector<tritlstm_weight> found(static_cast<std::size_t>(count));
        for (std::int64_t k = 0; k < count; k++) {
            auto &weight = found[static_cast<std::size_t>(k)];
            weight.size = sizeof weight;
            check(tritlstm_weight_info(get(), k, &weight));
        }
        return found;
    }

    void get_weights(void *const *to, std::int32_t device = TRITLSTM_CPU, void *stream = nullptr) const
    {
        check(tritlstm_get_weights(get(), to, device, stream));
    }

    void set_weights(const void *const *from, std::int32_t device = TRITLSTM_CPU, void *stream = nullptr)
    {
        check(tritlstm_set_weights(get(), from, device, stream));
    }

    tritlstm_cpp::sizes sizes(std::int64_t steps, std::int64_t batch, mode how) const
    {
        tritlstm_cpp::sizes found{};
        check(tritlstm_sizes(get(), steps, batch, static_cast<std::int32_t>(how), &found.workspace, &found.reserve));
        return found;
    }

    // Workspace and reserve in ordinary memory, for handles of TRITLSTM_CPU.
    scratches memory(std::int64_t steps, std::int64_t batch, mode how) const
    {
        auto needed = sizes(steps, batch, how);
        return {scratch(needed.workspace), scratch(needed.reserve)};
    }

    void forward(const tritlstm_forward_args &args) const { check(tritlstm_forward(get(), &args)); }
    void backward(const tritlstm_backward_args &args) const { check(tritlstm_backward(get(), &args)); }

    // With `using_` filled in as workspace and, if it has bytes, reserve.
    void forward(tritlstm_forward_args args, const scratches &using_) const
    {
        args.workspace = using_.workspace.data(), args.workspace_bytes = using_.workspace.bytes();
        args.reserve = using_.reserve.data(), args.reserve_bytes = using_.reserve.bytes();
        forward(args);
    }

    void backward(tritlstm_backward_args args, const scratches &using_) const
    {
        args.workspace = using_.workspace.data(), args.workspace_bytes = using_.workspace.bytes();
        args.reserve = using_.reserve.data(), args.reserve_bytes = using_.reserve.bytes();
        backward(args);
    }

    // Which engine, device and path a call of this size takes, and why.
    std::string explain(std::int64_t steps, std::int64_t batch, mode how = mode::inference) const
    {
        std::size_t needed;
        check(tritlstm_explain(get(), steps, batch, static_cast<std::int32_t>(how), nullptr, 0, &needed));
        std::string text(needed, '\0');
        check(tritlstm_explain(get(), steps, batch, static_cast<std::int32_t>(how), text.data(), needed, nullptr));
        text.resize(needed - 1);
        return text;
    }

private:
    struct destroy {
        void operator()(tritlstm *handle) const noexcept { tritlstm_destroy(handle); }
    };
    std::unique_ptr<tritlstm, destroy> handle_;
};

// The states of some sequences between two steps: tritlstm_state *. Keeps the network's weights alive.
class state {
public:
    state(const lstm &network, std::int64_t batch)
    {
        tritlstm_state *made;
        check(tritlstm_state_create(network.get(), batch, &made));
        handle_.reset(made);
    }

    tritlstm_state *get() const noexcept { return handle_.get(); }

    void step(const void *x, void *out, const scratch &workspace) { step(x, out, workspace.data(), workspace.bytes()); }

    void step(const void *x, void *out, void *workspace, std::size_t workspace_bytes, void *stream = nullptr)
    {
        check(tritlstm_step(get(), x, out, workspace, workspace_bytes, stream));
    }

    // rows: one byte a sequence, not 0 where to reset; null: all.
    void reset(const std::uint8_t *rows = nullptr, void *stream = nullptr)
    {
        check(tritlstm_state_reset(get(), rows, stream));
    }

    void copy_out(void *h, void *c, std::int32_t device = TRITLSTM_CPU, void *stream = nullptr) const
    {
        check(tritlstm_state_get(get(), h, c, device, stream));
    }

    void copy_in(const void *h, const void *c, std::int32_t device = TRITLSTM_CPU, void *stream = nullptr)
    {
        check(tritlstm_state_set(get(), h, c, device, stream));
    }

private:
    struct destroy {
        void operator()(tritlstm_state *handle) const noexcept { tritlstm_state_destroy(handle); }
    };
    std::unique_ptr<tritlstm_state, destroy> handle_;
};

} // namespace tritlstm_cpp

#endif
