/* The exponential of an array: MLX computes it a number at a time. */

#include "exp_loop.h"
#include "processor.h"
#include "products.h"

#include <math.h>

/* The highest of x; NaN is not found. */
LOOP float highest_of(size_t count, const float *x) {
    enum { LANES = 16 };
    float highest[LANES];
    size_t i = 0;
    for (int lane = 0; lane < LANES; lane++)
        highest[lane] = x[0];
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            highest[lane] = x[i + lane] > highest[lane] ? x[i + lane] : highest[lane];
    for (; i < count; i++)
        highest[0] = x[i] > highest[0] ? x[i] : highest[0];
    for (int lane = 1; lane < LANES; lane++)
        highest[0] = highest[lane] > highest[0] ? highest[lane] : highest[0];
    return highest[0];
}

/* exp(x - the highest x) of a row; where x has NaN, so has y. */
LOOP void row_loop(size_t count, const float *restrict x, float *restrict y) {
    exp_loop(count, x, highest_of(count, x), y);
}

/* x less the logarithm of the sum of exp(x), in place. */
LOOP void log_softmax_loop(size_t count, float *x) {
    enum { LANES = 16, AT_A_TIME = 512 };
    const float highest = highest_of(count, x);
    float powers[AT_A_TIME];
    double total = 0;
    for (size_t start = 0; start < count; start += AT_A_TIME) {
        const size_t length = count - start < AT_A_TIME ? count - start : AT_A_TIME;
        float sums[LANES] = {0};
        exp_loop(length, x + start, highest, powers);
        for (size_t i = length; i < AT_A_TIME; i++)
            powers[i] = 0;
        for (size_t i = 0; i < AT_A_TIME; i += LANES)
            for (int lane = 0; lane < LANES; lane++)
                sums[lane] += powers[i + lane];
        for (int lane = 0; lane < LANES; lane++)
            total += (double)sums[lane];
    }
    const float logarithm = logf((float)total);
    for (size_t i = 0; i < count; i++)
        x[i] = x[i] - highest - logarithm;
}

/* factor exp(x), in place. */
LOOP void scaled_exp_loop(size_t count, float factor, float *x) {
    enum { AT_A_TIME = 512 };
    float powers[AT_A_TIME];
    for (size_t start = 0; start < count; start += AT_A_TIME) {
        const size_t length = count - start < AT_A_TIME ? count - start : AT_A_TIME;
        exp_loop(length, x + start, 0, powers);
        for (size_t i = 0; i < length; i++)
            x[start + i] = factor * powers[i];
    }
}

/* One function for each kind of processor. */
#define LOOPS(suffix, target)                                                                               \
    target static void exp_##suffix(size_t count, const float *restrict x, float *restrict y) {             \
        exp_loop(count, x, 0, y);                                                                           \
    }                                                                                                       \
    target static void row_##suffix(size_t count, const float *restrict x, float *restrict y) {             \
        row_loop(count, x, y);                                                                              \
    }                                                                                                       \
    target static void log_softmax_##suffix(size_t count, float *x) { log_softmax_loop(count, x); }         \
    target static void scaled_exp_##suffix(size_t count, float factor, float *x) {                          \
        scaled_exp_loop(count, factor, x);                                                                  \
    }                                                                                                       \
    static const struct exponentials loops_##suffix = {exp_##suffix, row_##suffix, log_softmax_##suffix,      \
                                                       scaled_exp_##suffix};

LOOPS(any, )
#ifdef X86_LOOPS
LOOPS(avx2, AVX2)
LOOPS(avx512, AVX512)
#endif

const struct exponentials *fastest_exponentials(void) { return FASTEST(loops); }
