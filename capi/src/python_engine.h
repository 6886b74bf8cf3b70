/* What the loader (python_loader.c) calls in python_engine.so. */
#ifndef TRITLSTM_PYTHON_ENGINE_H
#define TRITLSTM_PYTHON_ENGINE_H

#include "engine.h"

/* Exported by python_engine.so as tritlstm_python_start. Starts Python with the environment of `python`, or takes the
 * interpreter that the process already runs. May be called again after a failure; not by two threads at once. */
typedef int (*tritlstm_python_start_function)(const char *python, tritlstm_report report,
                                              const tritlstm_engine_functions **engine);

#endif
