/* The functions that cffi generates around those of host.py; build.py gives this text to cffi as well. */
int tritlstm_py_create(const tritlstm_options *options, const void *const *weights, const int32_t *dtypes, uint64_t *id);
int tritlstm_py_destroy(uint64_t id);
int tritlstm_py_get_weights(uint64_t id, void *const *weights, int32_t device, void *stream);
int tritlstm_py_set_weights(uint64_t id, const void *const *weights, int32_t device, void *stream);
int tritlstm_py_sizes(uint64_t id, int64_t steps, int64_t batch, int32_t training, size_t *workspace, size_t *reserve);
int tritlstm_py_forward(uint64_t id, const tritlstm_forward_args *args);
int tritlstm_py_backward(uint64_t id, const tritlstm_backward_args *args);
int tritlstm_py_state_create(uint64_t id, int64_t batch, uint64_t *state);
int tritlstm_py_state_destroy(uint64_t state);
int tritlstm_py_state_reset(uint64_t state, const uint8_t *rows, void *stream);
int tritlstm_py_state_get(uint64_t state, void *h, void *c, int32_t device, void *stream);
int tritlstm_py_state_set(uint64_t state, const void *h, const void *c, int32_t device, void *stream);
int tritlstm_py_step(uint64_t state, const void *x, void *out, void *workspace, size_t workspace_bytes, void *stream);
int tritlstm_py_explain(uint64_t id, int64_t steps, int64_t batch, int32_t training, char *text, size_t capacity,
                        size_t *needed);
int tritlstm_py_describe(const tritlstm_options *options, int64_t capacity, tritlstm_weight *weights, int64_t *count);
