/* The exponential of an array: MLX computes it a number at a time. */

#include "products.h"

union word {
    float number;
    uint32_t bits;
};

/* y = exp(x), to 1.2 units in the last place.

   With x = n ln 2 + r and |r| <= ln 2 / 2, exp(x) is 2^n exp(r), and exp(r) its Taylor series up to r^7,
   which leaves out less than 2^-27 of it. There is no branch, so that compilers make vectors of the loop. */
static inline __attribute__((always_inline)) void exp_loop(size_t count, const float *restrict x,
                                                           float *restrict y) {
    const float whole = 0x1.8p23f;                                  /* added to this, a float is rounded */
    const float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f; /* n ln2_high is exact */
    const float highest = 89, lowest = -104;                        /* beyond them lie infinity and 0 */
    for (size_t i = 0; i < count; i++) {
        float within = highest < x[i] ? highest : x[i]; /* this way round, NaN stays NaN */
        within = lowest > within ? lowest : within;
        union word rounded = {.number = within * 0x1.715476p0f + whole};
        float n = rounded.number - whole;
        float r = within - n * ln2_high - n * ln2_low;
        float sum = 1.0f / 5040;
        sum = sum * r + 1.0f / 720;
        sum = sum * r + 1.0f / 120;
        sum = sum * r + 1.0f / 24;
        sum = sum * r + 1.0f / 6;
        sum = sum * r + 0.5f;
        sum = sum * r + 1;
        sum = sum * r + 1;
        /* 2^n in two factors, for it may be no float itself; 0x4b400000 are the bits of `whole`. */
        uint32_t exponent = rounded.bits - 0x4b400000u + 2 * 127;
        union word half = {.bits = (exponent / 2) << 23};
        union word rest = {.bits = (exponent - exponent / 2) << 23};
        /* Masked keys are -inf, and a product that underflows is slow: their 0 comes without one. */
        y[i] = sum * half.number * (x[i] <= lowest ? 0 : rest.number);
    }
}

static void exp_any(size_t count, const float *restrict x, float *restrict y) { exp_loop(count, x, y); }

#if defined(__x86_64__) && !defined(PORTABLE)
__attribute__((target("avx2,fma"))) static void exp_avx2(size_t count, const float *restrict x,
                                                         float *restrict y) {
    exp_loop(count, x, y);
}

#ifndef AT_MOST_AVX2 /* which a test says, to see that loop too */
__attribute__((target("avx512f,avx512dq,avx512vl,fma"))) static void exp_avx512(size_t count,
                                                                               const float *restrict x,
                                                                               float *restrict y) {
    exp_loop(count, x, y);
}
#endif

exp_function *fastest_exp(void) {
#ifndef AT_MOST_AVX2
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return exp_avx512;
#endif
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? exp_avx2 : exp_any;
}
#else
exp_function *fastest_exp(void) { return exp_any; }
#endif

