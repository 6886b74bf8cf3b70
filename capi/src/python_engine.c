/* python_engine.so: an embedded Python behind the table of engine.h.
 *
 * cffi generates the C functions tritlstm_py_* around the Python functions of host.py and compiles this file with
 * them. Such a function returns 0 when its Python side never came up, so there success is another number, and
 * nothing but the wrappers below sees it.
 *
 * SPDX-License-Identifier: MIT */
#include "python_engine.h"
#include "python_calls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PYTHON_SUCCESS = 0x600D };

static int cffi_start_python(void);
static tritlstm_report report;

static void tritlstm_py_report(const char *message) { report(message); }

static int failed(int status, const char *message)
{
    report(message);
    return status;
}

/* Calls into Python only once it is up, and turns what comes back into a status. */
#define CALL(call)                                                                                                   \
    do {                                                                                                             \
        int result;                                                                                                  \
        if (!Py_IsInitialized() || cffi_start_python())                                                              \
            return failed(TRITLSTM_ERROR_UNAVAILABLE, "the Python interpreter of this process has ended");           \
        result = (call);                                                                                             \
        if (result == PYTHON_SUCCESS) return TRITLSTM_OK;                                                            \
        if (result <= TRITLSTM_OK || result > TRITLSTM_ERROR_INTERNAL)                                               \
            return failed(TRITLSTM_ERROR_INTERNAL, "the Python side returned an impossible status");                 \
        return result;                                                                                               \
    } while (0)

static int engine_create(const tritlstm_options *options, const void *const *weights, const int32_t *dtypes, uint64_t *id)
{
    CALL(tritlstm_py_create(options, weights, dtypes, id));
}

static int engine_destroy(uint64_t id) { CALL(tritlstm_py_destroy(id)); }

static int engine_get_weights(uint64_t id, void *const *weights, int32_t device, void *stream)
{
    CALL(tritlstm_py_get_weights(id, weights, device, stream));
}

static int engine_set_weights(uint64_t id, const void *const *weights, int32_t device, void *stream)
{
    CALL(tritlstm_py_set_weights(id, weights, device, stream));
}

static int engine_sizes(uint64_t id, int64_t steps, int64_t batch, int32_t training, size_t *workspace, size_t *reserve)
{
    CALL(tritlstm_py_sizes(id, steps, batch, training, workspace, reserve));
}

static int engine_forward(uint64_t id, const tritlstm_forward_args *args) { CALL(tritlstm_py_forward(id, args)); }
static int engine_backward(uint64_t id, const tritlstm_backward_args *args) { CALL(tritlstm_py_backward(id, args)); }

static int engine_state_create(uint64_t id, int64_t batch, uint64_t *state)
{
    CALL(tritlstm_py_state_create(id, batch, state));
}

static int engine_state_destroy(uint64_t state) { CALL(tritlstm_py_state_destroy(state)); }

static int engine_state_reset(uint64_t state, const uint8_t *rows, void *stream)
{
    CALL(tritlstm_py_state_reset(state, rows, stream));
}

static int engine_state_get(uint64_t state, void *h, void *c, int32_t device, void *stream)
{
    CALL(tritlstm_py_state_get(state, h, c, device, stream));
}

static int engine_state_set(uint64_t state, const void *h, const void *c, int32_t device, void *stream)
{
    CALL(tritlstm_py_state_set(state, h, c, device, stream));
}

static int engine_step(uint64_t state, const void *x, void *out, void *workspace, size_t workspace_bytes, void *stream)
{
    CALL(tritlstm_py_step(state, x, out, workspace, workspace_bytes, stream));
}

static int engine_explain(uint64_t id, int64_t steps, int64_t batch, int32_t training, char *text, size_t capacity,
                          size_t *needed)
{
    CALL(tritlstm_py_explain(id, steps, batch, training, text, capacity, needed));
}

static int engine_describe(const tritlstm_options *options, int64_t capacity, tritlstm_weight *weights, int64_t *count)
{
    CALL(tritlstm_py_describe(options, capacity, weights, count));
}

static const tritlstm_engine_functions functions = {
    TRITLSTM_ENGINE_INTERFACE, engine_create,       engine_destroy,     engine_get_weights, engine_set_weights,
    engine_sizes,              engine_forward,      engine_backward,    engine_state_create, engine_state_destroy,
    engine_state_reset,        engine_state_get,    engine_state_set,   engine_step,        engine_explain,
    engine_describe,
};

/* ---- start ------------------------------------------------------------------------------------------- */

/* Clears Python's current exception and reports it behind `what`. Needs the GIL. */
static int report_exception(const char *what)
{
    char message[1024];
    PyObject *type, *value, *trace, *text = NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (value) text = PyObject_Str(value);
    const char *words = text ? PyUnicode_AsUTF8(text) : NULL;
    snprintf(message, sizeof message, "%s: %s: %s", what, type ? ((PyTypeObject *)type)->tp_name : "error",
             words ? words : "(no text)");
    PyErr_Clear();
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    Py_XDECREF(text);
    return failed(TRITLSTM_ERROR_UNAVAILABLE, message);
}

static int check_start(PyStatus status)
{
    char message[512];
    if (!PyStatus_Exception(status)) return TRITLSTM_OK;
    snprintf(message, sizeof message, "Python can not start: %s%s%s", status.func ? status.func : "",
             status.func ? ": " : "", status.err_msg ? status.err_msg : "unknown reason");
    return failed(TRITLSTM_ERROR_UNAVAILABLE, message);
}

/* Two variables that Python obeys even in isolation: they are out of the way while it starts. */
static const char *const misleading[] = {"PYTHONEXECUTABLE", "__PYVENV_LAUNCHER__"};
enum { MISLEADING = sizeof misleading / sizeof *misleading };

static int hide_variables(char *values[MISLEADING])
{
    int status = TRITLSTM_OK;
    for (int k = 0; k < MISLEADING; k++) {
        const char *value = getenv(misleading[k]);
        values[k] = value ? strdup(value) : NULL;
        if (value && !values[k]) status = failed(TRITLSTM_ERROR_MEMORY, "out of memory");
        if (values[k]) unsetenv(misleading[k]);
    }
    return status;
}

static void show_variables(char *values[MISLEADING])
{
    for (int k = 0; k < MISLEADING; k++) {
        if (values[k]) setenv(misleading[k], values[k], 1);
        free(values[k]);
    }
}

/* The isolated configuration reads no other PYTHON* variable, no user site and no command line, installs no signal handler
 * and leaves the locale alone; sys.path follows from the executable, as when the environment's python runs. */
static int start_interpreter(const char *python)
{
    PyPreConfig before;
    PyConfig config;
    char *values[MISLEADING];
    int status;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1;
    if ((status = check_start(Py_PreInitialize(&before)))) return status;
    PyConfig_InitIsolatedConfig(&config);
    config.install_signal_handlers = 0;
    config.pathconfig_warnings = 0;
    status = check_start(PyConfig_SetBytesString(&config, &config.executable, python));
    if (!status) status = check_start(PyWideStringList_Append(&config.warnoptions, L"ignore"));
    if (!status) {
        status = hide_variables(values);
        if (!status) status = check_start(Py_InitializeFromConfig(&config));
        show_variables(values);
    }
    PyConfig_Clear(&config);
    if (!status) PyEval_SaveThread();
    return status;
}

/* Imports what can fail, in our own hands: a failure inside cffi's start-up would print to stderr and stay for good.
 * Needs the GIL. */
static int import_host(const char *python, int own)
{
    char what[600];
    PyObject *backend = PyImport_ImportModule("_cffi_backend"), *host = NULL, *result = NULL;
    if (backend) host = PyImport_ImportModule("tritlstm.capi.host");
    if (host) result = PyObject_CallMethod(host, "prepare", "ii", TRITLSTM_VERSION, own);
    Py_XDECREF(backend);
    Py_XDECREF(host);
    Py_XDECREF(result);
    if (result) return TRITLSTM_OK;
    snprintf(what, sizeof what, "%s%.400s has no usable tritlstm (python -m pip install tritlstm)",
             own ? "the environment of " : "the Python of this process, not ", python);
    return report_exception(what);
}

__attribute__((visibility("default"))) int tritlstm_python_start(const char *python, tritlstm_report to,
                                                                 const tritlstm_engine_functions **engine);

int tritlstm_python_start(const char *python, tritlstm_report to, const tritlstm_engine_functions **engine)
{
    static int own;
    int status;
    report = to;
    *engine = &functions;
    if (!Py_IsInitialized()) {
        if ((status = start_interpreter(python))) return status;
        own = 1;
    }
    PyGILState_STATE state = PyGILState_Ensure();
    status = import_host(python, own);
    if (!status) {
        /* Before Python 3.12 cffi takes a lock in this type's version tag and waits for ever if it is in use. */
        PyType_Modified(&PyCapsule_Type);
        if (cffi_start_python())
            status = failed(TRITLSTM_ERROR_UNAVAILABLE, "the cffi module of the Python engine can not start: is the "
                                                        "installed cffi the one it was built with?");
    }
    PyGILState_Release(state);
    return status;
}
