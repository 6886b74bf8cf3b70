/* tritlstm: long short-term memory networks for C, C++ and everything that speaks C.
 *
 * SPDX-License-Identifier: MIT
 *
 * One header for every engine behind it. Link one library, include this file, and read it top to bottom:
 * the rules that hold everywhere come first, then each function with what it alone adds.
 *
 *     tritlstm_options options;
 *     tritlstm_options_init(&options, sizeof options);
 *     options.input_size = 28;
 *     options.hidden_size = 32;
 *     if (tritlstm_create(&options, NULL, &lstm) != TRITLSTM_OK)
 *         fprintf(stderr, "%s\n", tritlstm_last_error());
 *
 * Sizes         T steps, B batch, D input_size, H hidden_size, L num_layers, P directions (1, or 2 if
 *               bidirectional), R recurrent width: proj_size if that is not 0, otherwise H. T, B >= 1.
 * Layout        Arrays are dense, row-major, without padding: [T, B, D] means element (t, b, d) at
 *               (t * B + b) * D + d. With batch_first, x, out and their gradients are [B, T, ...]; the states
 *               stay [L * P, B, ...]. Row l * P + p of a state belongs to layer l, direction p.
 * Gates         Where four gates are stacked, the order is i, f, g, o (input, forget, cell input, output).
 * Element type  One for everything that a handle reads and writes, its options' dtype; lengths are int32_t, resets
 *               uint8_t.
 * Device        All array pointers of a call point to memory of the handle's device: ordinary memory for
 *               TRITLSTM_CPU, memory of the CUDA device device_index for TRITLSTM_CUDA. Structs, strings,
 *               pointers to results and arrays of pointers are always ordinary memory.
 * Alignment     Arrays to their element size; workspace and reserve to TRITLSTM_ALIGNMENT bytes.
 * Ownership     The caller owns every array and struct; the library keeps no pointer after a call returns
 *               (TRITLSTM_CUDA: after the work it enqueued is done). Handles are the library's: destroy them.
 * Aliasing      What a call writes must not overlap what it reads or otherwise writes; that is refused. The
 *               exception: h_n may be the pointer h0 and c_n the pointer c0 (if no backward needs them later).
 * Zeroing       Outputs are overwritten, never added to, and need no initial value. On failure their content
 *               is undefined; the inputs are never changed.
 * Streams       `stream` is a cudaStream_t (CUstream) of the handle's device, NULL the default stream. Work is
 *               enqueued on it in order, and arrays must stay alive until it is done. With TRITLSTM_CPU it must
 *               be NULL, and the work is done when the call returns.
 * Threads       Any function may run in any thread. Calls that only read a handle (forward, backward, sizes,
 *               explain, get_weights, get_options, weight_info, state_create) may run at the same time on one
 *               handle with separate arrays; create them on one thread and use them on another as you like.
 *               set_weights excludes every other call on that handle, destroy too. A tritlstm_state
 *               belongs to one thread at a time.
 * Processes     After fork() a child can not use what its parent had already used (TRITLSTM_ERROR_FORKED): start it
 *               in the child, or fork first. With the engine "aot" that is so for TRITLSTM_CUDA only.
 * Failure       Functions that can fail return a status; the text is tritlstm_last_error(). The library never
 *               prints, exits, raises a signal or throws.
 * Memory        Scratch is the caller's: ask for its size. The engine "aot" allocates in tritlstm_create... and
 *               tritlstm_state_create alone (and in get_weights, set_weights and backward of more than 500 weights).
 *               The engine "python" also allocates temporaries of its own and may synchronise, so do not record its
 *               calls into a CUDA graph.
 */
#ifndef TRITLSTM_H
#define TRITLSTM_H

#include <stddef.h>
#include <stdint.h>

#define TRITLSTM_VERSION_MAJOR 0
#define TRITLSTM_VERSION_MINOR 1
#define TRITLSTM_VERSION_PATCH 0
/* 10000 * major + 100 * minor + patch */
#define TRITLSTM_VERSION (TRITLSTM_VERSION_MAJOR * 10000 + TRITLSTM_VERSION_MINOR * 100 + TRITLSTM_VERSION_PATCH)

/* Required alignment of workspace and reserve; malloc and cudaMalloc both give it. */
#define TRITLSTM_ALIGNMENT 16
#define TRITLSTM_MAX_LAYERS 1024

#ifndef TRITLSTM_API
#if defined(__GNUC__)
#define TRITLSTM_API __attribute__((visibility("default")))
#else
#define TRITLSTM_API
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ------------------------------------------------------------------------------------------ */

/* Numbers are never changed or reused. Treat one that you do not know as a failure. */
typedef int tritlstm_status;
enum {
    TRITLSTM_OK = 0,
    TRITLSTM_ERROR_ARGUMENT = 1,     /* a null, negative, misaligned, overlapping or contradictory argument */
    TRITLSTM_ERROR_UNSUPPORTED = 2,  /* well-formed, but not offered by this engine or this version */
    TRITLSTM_ERROR_OVERFLOW = 3,     /* a product of sizes does not fit the address space */
    TRITLSTM_ERROR_MEMORY = 4,       /* out of host or device memory */
    TRITLSTM_ERROR_FILE = 5,         /* a file is missing or can not be read */
    TRITLSTM_ERROR_FORMAT = 6,       /* a file is damaged, truncated or of another kind */
    TRITLSTM_ERROR_WEIGHTS = 7,      /* a file lacks the weights asked for, or their shapes disagree */
    TRITLSTM_ERROR_BUFFER = 8,       /* workspace, reserve or text buffer too small */
    TRITLSTM_ERROR_STATE = 9,        /* a call out of order: a reserve that no matching forward filled */
    TRITLSTM_ERROR_UNAVAILABLE = 10, /* the engine's run time (Python environment, driver) is missing or broken */
    TRITLSTM_ERROR_DEVICE = 11,      /* the device is absent, or reported an error */
    TRITLSTM_ERROR_FORKED = 12,      /* used in a child process after its parent had used it */
    TRITLSTM_ERROR_INTERNAL = 13     /* a defect of the library: please report it with the message */
};

/* The name of a status, such as "TRITLSTM_ERROR_FILE"; for an unknown number "unknown status". Never NULL;
 * the string is static. Needs no engine. */
TRITLSTM_API const char *tritlstm_status_string(tritlstm_status status);

/* What went wrong in the last failed call of the calling thread, in words: the value received and the remedy.
 * "" if none has failed. Never NULL. UTF-8, cut to 1023 bytes. The string belongs to the calling thread and
 * lasts until its next failed call; a call that succeeds leaves it. */
TRITLSTM_API const char *tritlstm_last_error(void);

/* ---- version ----------------------------------------------------------------------------------------- */

/* TRITLSTM_VERSION of the library that is loaded (the header's macro is what you compiled with). */
TRITLSTM_API int tritlstm_version(void);

/* The same as text, "0.1.0". Static. */
TRITLSTM_API const char *tritlstm_version_string(void);

/* The engine behind this library: "aot" (libtritlstm) or "python" (libtritlstm_python). Static. */
TRITLSTM_API const char *tritlstm_engine(void);

/* ---- creating ---------------------------------------------------------------------------------------- */

/* Element types. 0 is none of them, so that a struct that was only zeroed is refused. */
enum {
    TRITLSTM_DTYPE_OF_FILE = 0, /* tritlstm_load_options only */
    TRITLSTM_FLOAT32 = 1,
    TRITLSTM_FLOAT16 = 2,  /* IEEE binary16 */
    TRITLSTM_BFLOAT16 = 3, /* the upper half of a binary32 */
    TRITLSTM_FLOAT64 = 4   /* an engine may lack it: TRITLSTM_ERROR_UNSUPPORTED */
};

/* Devices, numbered as DLPack does. */
enum { TRITLSTM_CPU = 1, TRITLSTM_CUDA = 2 };

enum {
    TRITLSTM_WEIGHTS_UNIFORM = 1, /* uniform in (-1/sqrt(H), 1/sqrt(H)), as PyTorch does, from `seed`; further
                                     weights as tritlstm.LSTM initialises them */
    TRITLSTM_WEIGHTS_ZERO = 2
};

/* An LSTM's description. Fill it with tritlstm_options_init, then change what should differ: members are only
 * ever added at the end, and the initialiser is what gives a member you do not know its default. */
typedef struct tritlstm_options {
    size_t size;             /* sizeof(tritlstm_options), set by the initialiser */
    int64_t input_size;      /* D >= 1; no default */
    int64_t hidden_size;     /* H >= 1; no default */
    int64_t num_layers;      /* L, 1 ... TRITLSTM_MAX_LAYERS; default 1 */
    int64_t proj_size;       /* 0 (default): none; otherwise h is projected to this many, 1 ... H - 1 */
    int32_t bias;            /* 1 (default): two biases a layer and direction; 0: none */
    int32_t bidirectional;   /* 0 (default) or 1: a second direction, outputs side by side */
    int32_t batch_first;     /* 0 (default) or 1: x, out are [B, T, ...] */
    int32_t dtype;           /* default TRITLSTM_FLOAT32 */
    int32_t device;          /* TRITLSTM_CPU (default) or TRITLSTM_CUDA */
    int32_t device_index;    /* default 0; 0 with TRITLSTM_CPU */
    int32_t initial_weights; /* TRITLSTM_WEIGHTS_UNIFORM (default) or _ZERO; not used where weights are given */
    int32_t reserved;        /* 0 */
    uint64_t seed;           /* default 0; the same seed gives the same weights in the same engine, and with `more`
                                the same random bits in the same sequence of training forwards */
    const char *more;        /* NULL (default) or "": nothing; otherwise see "Any option of the Python library" */
} tritlstm_options;

/* Any option of the Python library: options->more holds further keyword arguments of Python's tritlstm.LSTM as
 * `name=value`, separated by commas, the values Python literals; UTF-8, NUL-terminated, at most 4096 bytes:
 *
 *     options.more = "peephole=True, cell_clip=3.0, zoneout=(0.1, 0.05), activations=('hard_sigmoid', 'tanh', 'tanh')";
 *
 * The names are dropout, peephole, coupled, cell_clip, zoneout, recurrent_dropout, weight_dropout, forget_bias,
 * activations, num_heads, layer_norm and recompute; what they do stands in the package's docs/variants.md. What the
 * struct has a member for is refused, and so is a list of hidden sizes. The string is read and copied.
 *   Engines   "python". UNSUPPORTED with the engine "aot". ARGUMENT: no such option, or no value for it; the text is
 *             that of tritlstm.LSTM.
 *   Weights   peephole adds weight_ch [3H] to a layer and direction, layer_norm adds norm_ih [4H], norm_hh [4H],
 *             norm_c [H] and norm_c_bias [H]: further weights, which come after all others, by layer and direction.
 *             num_heads makes weight_hh [4H, H / num_heads].
 *   Random    A forward with a reserve is training: dropout, zoneout, recurrent_dropout and weight_dropout draw bits,
 *             new ones in each such call, of which the reserve keeps the seed: backward of that reserve uses the same.
 *             A forward without a reserve and tritlstm_step are evaluation and draw none. Calls in several threads
 *             share the sequence of seeds in the order in which they come.
 *   Time      On a CPU peephole and the like run in plain operators, at the speed of a loop in Python. */

/* How to read an LSTM from a file. */
typedef struct tritlstm_load_options {
    size_t size;          /* sizeof(tritlstm_load_options), set by the initialiser */
    const char *prefix;   /* what stands before "weight_ih_l0" in the file, such as "lstm."; NULL (default): "" */
    int32_t dtype;        /* weights are converted to this; default TRITLSTM_DTYPE_OF_FILE: as they are stored */
    int32_t device;       /* as in tritlstm_options */
    int32_t device_index; /* as in tritlstm_options */
    int32_t batch_first;  /* as in tritlstm_options */
    const char *more;     /* as in tritlstm_options: what the file does not say. The further weights are read from the
                             file, too, and must be there. The seed of random bits is 0. */
} tritlstm_load_options;

/* Fills a struct with the defaults. `size` is sizeof(the struct) as you compiled it; a library of another
 * version fills only that much. ARGUMENT: NULL, or a size that no version has had. Needs no engine. */
TRITLSTM_API tritlstm_status tritlstm_options_init(tritlstm_options *options, size_t size);
TRITLSTM_API tritlstm_status tritlstm_load_options_init(tritlstm_load_options *options, size_t size);

/* A network, its options and weights. Opaque. */
typedef struct tritlstm tritlstm;

/* Makes an LSTM.
 *   options   read, not kept.
 *   weights   NULL: as options->initial_weights says. Otherwise the array of tritlstm_num_weights pointers in the
 *             order of tritlstm_weight_info, none NULL, each to an array in ordinary memory (whatever the
 *             device) of options->dtype; copied. Of further weights (see "Any option of the Python library") it has
 *             none: they get what options->initial_weights says, and tritlstm_set_weights changes them.
 *   lstm      receives the handle, or NULL on failure.
 * The first call of a process starts the engine ("python": about two seconds; "aot": nothing to start on a CPU). */
TRITLSTM_API tritlstm_status tritlstm_create(const tritlstm_options *options, const void *const *weights,
                                             tritlstm **lstm);

/* Makes an LSTM from a safetensors file that holds the state_dict of torch.nn.LSTM (or of a model around one):
 * weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0, weight_hr_l0, ..._l1, ..._reverse behind options->prefix.
 * Sizes, layers, biases, directions and projection are taken from the file; other tensors in it are ignored.
 *   path      a regular file; the string is read, not kept.
 *   options   NULL: the defaults.
 *   lstm      receives the handle, or NULL on failure.
 * FILE, FORMAT, WEIGHTS: see the status. Weights may be stored as F64, F32, F16 or BF16. */
TRITLSTM_API tritlstm_status tritlstm_create_from_safetensors(const char *path,
                                                              const tritlstm_load_options *options,
                                                              tritlstm **lstm);

/* Ends a handle. NULL is allowed. States made from it stay usable. With TRITLSTM_CUDA wait for its work first. */
TRITLSTM_API void tritlstm_destroy(tritlstm *lstm);

/* Writes the options that the handle has. Set options->size (with the initialiser) before. options->more is NULL or
 * the handle's own copy of the string: it lasts as long as the handle. */
TRITLSTM_API tritlstm_status tritlstm_get_options(const tritlstm *lstm, tritlstm_options *options);

/* ---- weights ----------------------------------------------------------------------------------------- */

/* One weight. All are matrices in PyTorch's layout, biases are vectors:
 *   weight_ih [4H, D] in layer 0, [4H, P * R] above     weight_hh [4H, R]
 *   bias_ih, bias_hh [4H]                               weight_hr [R, H]
 * Further ones: see "Any option of the Python library". */
typedef struct tritlstm_weight {
    size_t size;     /* sizeof(tritlstm_weight): set it before the call */
    char name[48];   /* PyTorch's name, such as "weight_ih_l0_reverse"; NUL-terminated */
    int64_t rows;    /* the first extent */
    int64_t columns; /* the second extent; 0 for a vector */
    size_t bytes;    /* of the whole array, in the handle's dtype */
} tritlstm_weight;

/* How many weights there are, which is the length of the arrays of pointers below: L * P times 2, plus 2 with
 * bias, plus 1 with projection, plus further ones, see "Any option of the Python library". */
TRITLSTM_API tritlstm_status tritlstm_num_weights(const tritlstm *lstm, int64_t *count);

/* Describes weight `index`, 0 ... count - 1. The order: by layer, in it by direction (forward, reverse), in it
 * weight_ih, weight_hh, then bias_ih, bias_hh if there are biases, then weight_hr if there is a projection. Behind
 * them all come further weights, again by layer and direction. */
TRITLSTM_API tritlstm_status tritlstm_weight_info(const tritlstm *lstm, int64_t index, tritlstm_weight *weight);

/* Copies weights out of (get) or into (set) the handle.
 *   weights   an array of tritlstm_num_weights pointers in the order above; a NULL entry is left out.
 *   device    where the entries point: TRITLSTM_CPU, or TRITLSTM_CUDA for a handle on that device.
 *   stream    see "Streams". Copies to and from ordinary memory are done when the call returns. */
TRITLSTM_API tritlstm_status tritlstm_get_weights(const tritlstm *lstm, void *const *weights, int32_t device,
                                                  void *stream);
TRITLSTM_API tritlstm_status tritlstm_set_weights(tritlstm *lstm, const void *const *weights, int32_t device,
                                                  void *stream);

/* ---- forward and backward ---------------------------------------------------------------------------- */

/* How much memory the calls below need for T = steps, B = batch.
 *   training         0: forward without, 1: forward with a reserve, and backward.
 *   workspace_bytes  receives the scratch size of one call (free for other use after it); may be 0.
 *   reserve_bytes    receives the size of what forward leaves for backward; 0 if training is 0.
 * Either result may be NULL if it is not wanted. */
TRITLSTM_API tritlstm_status tritlstm_sizes(const tritlstm *lstm, int64_t steps, int64_t batch, int32_t training,
                                            size_t *workspace_bytes, size_t *reserve_bytes);

/* Arguments of tritlstm_forward. Fill with the initialiser (which sets `size` and zeroes the rest). */
typedef struct tritlstm_forward_args {
    size_t size;
    int64_t steps;           /* T >= 1 */
    int64_t batch;           /* B >= 1 */
    const void *x;           /* [T, B, D] or [B, T, D]; read */
    const int32_t *lengths;  /* [B], each 0 ... T: step t >= lengths[b] gives out 0 and leaves the states; the
                                reverse direction starts at lengths[b] - 1. NULL: all T. Out-of-range values
                                are refused with TRITLSTM_CPU and clamped with TRITLSTM_CUDA. */
    const void *h0;          /* [L * P, B, R]; NULL: zeros */
    const void *c0;          /* [L * P, B, H]; NULL: zeros */
    void *out;               /* [T, B, P * R] or [B, T, P * R]: h of the top layer; forward, then reverse half */
    void *h_n;               /* [L * P, B, R], the states after the last step; NULL: not wanted */
    void *c_n;               /* [L * P, B, H]; NULL: not wanted */
    void *workspace;         /* scratch; NULL if workspace_bytes is 0 */
    size_t workspace_bytes;  /* at least what tritlstm_sizes says */
    void *reserve;           /* written for backward; NULL: inference */
    size_t reserve_bytes;    /* at least what tritlstm_sizes says for training, 0 for inference */
    void *stream;            /* see "Streams" */
    const uint8_t *resets;   /* [T, B], with batch_first [B, T]; not 0: h and c of all layers are zeroed before that
                                step; the reverse direction zeroes its own between that step and the one before it.
                                NULL: none. Read. UNSUPPORTED with the engine "aot". */
} tritlstm_forward_args;

/* Arguments of tritlstm_backward. Everything that forward read must be as it was, the weights too. */
typedef struct tritlstm_backward_args {
    size_t size;
    int64_t steps;             /* as in forward, down to c0 */
    int64_t batch;
    const void *x;
    const int32_t *lengths;
    const void *h0;
    const void *c0;
    const void *out;           /* what forward wrote; read */
    const void *grad_out;      /* as out; gradient of the loss in out. NULL: zeros */
    const void *grad_h_n;      /* [L * P, B, R]; NULL: zeros */
    const void *grad_c_n;      /* [L * P, B, H]; NULL: zeros */
    void *grad_x;              /* as x; NULL: not wanted */
    void *grad_h0;             /* [L * P, B, R]; NULL: not wanted. Defined also where h0 is NULL */
    void *grad_c0;             /* [L * P, B, H]; NULL: not wanted */
    void *const *grad_weights; /* tritlstm_num_weights pointers in the order of tritlstm_weight_info, a NULL entry
                                  not wanted; NULL: none wanted */
    void *workspace;           /* scratch; NULL if workspace_bytes is 0 */
    size_t workspace_bytes;    /* at least what tritlstm_sizes says for training */
    const void *reserve;       /* as forward left it; read, so backward may be called again */
    size_t reserve_bytes;
    void *stream;              /* see "Streams" */
    const uint8_t *resets;     /* as in forward */
} tritlstm_backward_args;

/* Set `size` and zero everything else. `size` is sizeof(the struct) as you compiled it. Needs no engine. */
TRITLSTM_API tritlstm_status tritlstm_forward_args_init(tritlstm_forward_args *args, size_t size);
TRITLSTM_API tritlstm_status tritlstm_backward_args_init(tritlstm_backward_args *args, size_t size);

/* Runs the network over T steps. The struct is read, not kept. */
TRITLSTM_API tritlstm_status tritlstm_forward(const tritlstm *lstm, const tritlstm_forward_args *args);

/* Gradients of a loss from its gradients in out, h_n and c_n, after a forward with a reserve on the same
 * handle and device. STATE: the reserve was not filled by such a forward (checked with TRITLSTM_CPU only). */
TRITLSTM_API tritlstm_status tritlstm_backward(const tritlstm *lstm, const tritlstm_backward_args *args);

/* ---- streaming --------------------------------------------------------------------------------------- */

/* The states h and c of B independent sequences between two steps. Opaque. */
typedef struct tritlstm_state tritlstm_state;

/* Makes a state of zeros for `batch` sequences. UNSUPPORTED: bidirectional, which can't run step by step.
 *   state   receives the handle, or NULL on failure. It keeps the network's weights alive by itself. */
TRITLSTM_API tritlstm_status tritlstm_state_create(const tritlstm *lstm, int64_t batch, tritlstm_state **state);

/* Ends a state. NULL is allowed. */
TRITLSTM_API void tritlstm_state_destroy(tritlstm_state *state);

/* One step of all sequences: reads and replaces the state.
 *   x         [B, D]; read.
 *   out       [B, R]: h of the top layer.
 *   workspace, workspace_bytes   as tritlstm_sizes(lstm, 1, B, 0, ...) says.
 *   stream    see "Streams". */
TRITLSTM_API tritlstm_status tritlstm_step(tritlstm_state *state, const void *x, void *out, void *workspace,
                                           size_t workspace_bytes, void *stream);

/* Sets sequences back to zeros. rows: [B] bytes in ordinary memory, not 0 where to reset; NULL: all. */
TRITLSTM_API tritlstm_status tritlstm_state_reset(tritlstm_state *state, const uint8_t *rows, void *stream);

/* Copies the state out (get) or in (set).
 *   h        [L, B, R]; NULL: left out.
 *   c        [L, B, H]; NULL: left out.
 *   device   where h and c point: TRITLSTM_CPU, or TRITLSTM_CUDA for a handle on that device.
 *   stream   see "Streams". Copies to and from ordinary memory are done when the call returns. */
TRITLSTM_API tritlstm_status tritlstm_state_get(const tritlstm_state *state, void *h, void *c, int32_t device,
                                                void *stream);
TRITLSTM_API tritlstm_status tritlstm_state_set(tritlstm_state *state, const void *h, const void *c,
                                                int32_t device, void *stream);

/* ---- what will run ----------------------------------------------------------------------------------- */

/* Says in a few lines of text which engine, device and path a call of this size takes, and why.
 *   steps, batch, training   as in tritlstm_sizes.
 *   text      receives UTF-8 with a final NUL, cut to `capacity` bytes; may be NULL if capacity is 0.
 *   needed    receives the bytes that the whole text needs, NUL included; may be NULL.
 * BUFFER: capacity is not 0 and the text was cut. */
TRITLSTM_API tritlstm_status tritlstm_explain(const tritlstm *lstm, int64_t steps, int64_t batch,
                                              int32_t training, char *text, size_t capacity, size_t *needed);

#ifdef __cplusplus
}
#endif

#endif
