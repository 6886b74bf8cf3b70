/* What stands between the public functions (front.c) and the engine that does the work.
 *
 * The front has validated every struct, size, pointer and overlap before it calls an engine; an engine sees whole
 * structs of the current version. Functions return a tritlstm_status and leave the text with `report`. */
#ifndef TRITLSTM_ENGINE_H
#define TRITLSTM_ENGINE_H

#include "tritlstm.h"

/* Raised whenever this interface changes: the front and an engine loaded at run time must agree. */
#define TRITLSTM_ENGINE_INTERFACE 2

typedef struct tritlstm_engine_functions {
    int interface;
    /* Of `weights` those that are NULL, all where the array is, get the values that the options say. */
    int (*create)(const tritlstm_options *options, const void *const *weights, const int32_t *dtypes, uint64_t *id);
    int (*destroy)(uint64_t id);
    int (*get_weights)(uint64_t id, void *const *weights, int32_t device, void *stream);
    int (*set_weights)(uint64_t id, const void *const *weights, int32_t device, void *stream);
    int (*sizes)(uint64_t id, int64_t steps, int64_t batch, int32_t training, size_t *workspace, size_t *reserve);
    int (*forward)(uint64_t id, const tritlstm_forward_args *args);
    int (*backward)(uint64_t id, const tritlstm_backward_args *args);
    int (*state_create)(uint64_t id, int64_t batch, uint64_t *state);
    int (*state_destroy)(uint64_t state);
    int (*state_reset)(uint64_t state, const uint8_t *rows, void *stream);
    int (*state_get)(uint64_t state, void *h, void *c, int32_t device, void *stream);
    int (*state_set)(uint64_t state, const void *h, const void *c, int32_t device, void *stream);
    int (*step)(uint64_t state, const void *x, void *out, void *workspace, size_t workspace_bytes, void *stream);
    int (*explain)(uint64_t id, int64_t steps, int64_t batch, int32_t training, char *text, size_t capacity,
                   size_t *needed);
    /* All weights that options->more leads to, the plain LSTM's first: `count`, and name and extents of the first
     * `capacity`. NULL: this engine runs the plain LSTM alone, without options->more and without resets. */
    int (*describe)(const tritlstm_options *options, int64_t capacity, tritlstm_weight *weights, int64_t *count);
} tritlstm_engine_functions;

/* Takes the text of a failure into the calling thread's last error. */
typedef void (*tritlstm_report)(const char *message);

/* The loader, one for each library: starts what runs handles of `device` on first use, in any thread. */
int tritlstm_engine_start(tritlstm_report report, int32_t device, const tritlstm_engine_functions **engine);

/* 1 if this process is a child that was forked after what runs handles of `device` had been started, and that does not
 * survive a fork. */
int tritlstm_engine_forked(int32_t device);

/* The result of tritlstm_engine(). */
extern const char *const tritlstm_engine_name;

#endif
