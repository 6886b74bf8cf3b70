/* host_kernels_template.h for float and for double, with the constants of each. Included by host_kernels.c. */
#define REAL float
#define INTEGER uint32_t
#define MANTISSA 23
#define BIAS 127
#define SIGN 0x80000000u
#define SHIFT 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer */
#define LOG2_E 1.44269504088896340736f
#define LN2_HIGH 0.693359375f /* 355 / 512: its product with an exponent is exact */
#define LN2_LOW -2.12194440054690583e-4f
#define LARGEST 88.0f
#define SATURATED 20.0f /* tanh(10) rounds to 1 */
#define FACTORIAL 40320 /* 8! */
#define INVERSE_FACTORIALS 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2
#include "host_kernels_template.h"
#undef REAL
#undef INTEGER
#undef MANTISSA
#undef BIAS
#undef SIGN
#undef SHIFT
#undef LOG2_E
#undef LN2_HIGH
#undef LN2_LOW
#undef LARGEST
#undef SATURATED
#undef FACTORIAL
#undef INVERSE_FACTORIALS

#define REAL double
#define INTEGER uint64_t
#define MANTISSA 52
#define BIAS 1023
#define SIGN 0x8000000000000000u
#define SHIFT 6755399441055744.0 /* 1.5 * 2^52 */
#define LOG2_E 1.44269504088896340736
#define LN2_HIGH 0x1.62e42fefp-1 /* 33 bits: its product with an exponent is exact */
#define LN2_LOW 0x1.473de6af278edp-34
#define LARGEST 708.0
#define SATURATED 40.0
#define FACTORIAL 6227020800 /* 13! */
#define INVERSE_FACTORIALS                                                                                           \
    1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,     \
        1.0 / 24, 1.0 / 6, 1.0 / 2
#include "host_kernels_template.h"
#undef REAL
#undef INTEGER
#undef MANTISSA
#undef BIAS
#undef SIGN
#undef SHIFT
#undef LOG2_E
#undef LN2_HIGH
#undef LN2_LOW
#undef LARGEST
#undef SATURATED
#undef FACTORIAL
#undef INVERSE_FACTORIALS
