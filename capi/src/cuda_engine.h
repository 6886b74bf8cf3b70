/* TRITLSTM_CUDA in libtritlstm: what aot_engine.c calls, and either cuda_engine.c or cuda_absent.c defines. */
#ifndef TRITLSTM_CUDA_ENGINE_H
#define TRITLSTM_CUDA_ENGINE_H

#include "aot_engine.h"

/* The table for handles on a CUDA device, the same at every call and valid for ever; NULL in a library that was built
 * without device images. It opens nothing: the driver is opened by its `create`. May be called by many threads. A child
 * that is forked after the first call is refused before it reaches the table. */
const tritlstm_engine_functions *tritlstm_cuda_functions(void);

#endif
