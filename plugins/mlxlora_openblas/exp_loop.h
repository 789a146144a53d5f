/* The loop that makes exponentials, for all files whose loops have some. */

#ifndef MLXLORA_EXP_LOOP_H
#define MLXLORA_EXP_LOOP_H

#include <stddef.h>
#include <stdint.h>

#define LOOP static inline __attribute__((always_inline))

union word {
    float number;
    uint32_t bits;
};

/* y = exp(x - less), to 1.2 units in the last place.

   With x - less = n ln 2 + r and |r| <= ln 2 / 2, exp(x) is 2^n exp(r), and exp(r) its Taylor series up to r^7,
   which leaves out less than 2^-27 of it. There is no branch, so that compilers make vectors of the loop. */
LOOP void exp_loop(size_t count, const float *restrict x, float less, float *restrict y) {
    const float whole = 0x1.8p23f;                                  /* added to this, a float is rounded */
    const float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f; /* n ln2_high is exact */
    const float highest = 89, lowest = -104;                        /* beyond them lie infinity and 0 */
    for (size_t i = 0; i < count; i++) {
        float given = x[i] - less;
        float within = highest < given ? highest : given; /* this way round, NaN stays NaN */
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
        y[i] = sum * half.number * (given <= lowest ? 0 : rest.number);
    }
}

#endif
