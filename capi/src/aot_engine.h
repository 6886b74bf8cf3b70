/* libtritlstm: an engine that needs no Python, one table of engine.h for each kind of device. */
#ifndef TRITLSTM_AOT_ENGINE_H
#define TRITLSTM_AOT_ENGINE_H

#include "engine.h"

/* TRITLSTM_CPU: C on the calling thread. */
const tritlstm_engine_functions *tritlstm_host_functions(void);

/* Leaves the words of a failure as the calling thread's last error and returns `status`. */
int tritlstm_aot_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
