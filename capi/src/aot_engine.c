/* libtritlstm's loader: the table for a device, without anything to start.
 *
 * A handle belongs to the table that made it: front.c keeps the two together, so nothing is dispatched in a call.
 *
 * SPDX-License-Identifier: MIT */
#define _POSIX_C_SOURCE 200809L
#include "aot_engine.h"
#include "cuda_engine.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

const char *const tritlstm_engine_name = "aot";

static tritlstm_report reporter; /* the front's, always the same */
static pid_t cuda_starter;       /* the process that first used a CUDA device, or 0 */

int tritlstm_aot_fail(int status, const char *format, ...)
{
    char message[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    __atomic_load_n(&reporter, __ATOMIC_RELAXED)(message);
    return status;
}

/* The host path has no threads and no driver: a forked child may go on with it. */
int tritlstm_engine_forked(int32_t device)
{
    if (device == TRITLSTM_CPU) return 0;
    pid_t pid = __atomic_load_n(&cuda_starter, __ATOMIC_RELAXED);
    return pid && pid != getpid();
}

int tritlstm_engine_start(tritlstm_report report, int32_t device, const tritlstm_engine_functions **engine)
{
    __atomic_store_n(&reporter, report, __ATOMIC_RELAXED);
    if (device == TRITLSTM_CPU) {
        *engine = tritlstm_host_functions();
        return TRITLSTM_OK;
    }
    *engine = tritlstm_cuda_functions();
    if (!*engine)
        return tritlstm_aot_fail(TRITLSTM_ERROR_UNAVAILABLE,
                                 "device is TRITLSTM_CUDA, but this libtritlstm was built without device images: build it "
                                 "with `tritlstm build-c DIR --engine aot --images default`, or use TRITLSTM_CPU");
    __atomic_store_n(&cuda_starter, getpid(), __ATOMIC_RELAXED);
    return TRITLSTM_OK;
}
