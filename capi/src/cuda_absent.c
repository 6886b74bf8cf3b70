/* In place of the CUDA side where the library is built without device images.
 *
 * SPDX-License-Identifier: MIT */
#include "cuda_engine.h"

const tritlstm_engine_functions *tritlstm_cuda_functions(void) { return NULL; }
