/* What a layer computes beside its products, in one pass through memory each: MLX takes one for every sign of a
   formula. The formulas, and those of their gradients, stand in special.py, which asks for them. */

#include "exp_loop.h"
#include "processor.h"
#include "products.h"

#include <math.h>
#include <string.h>

enum { LANES = 16, AT_A_TIME = 512 };

typedef float numbers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* LANES numbers; a macro, for functions do not pass vectors that their processor may lack. */
#define load(at) (*(const numbers *)(at))

/* What the lanes hold together. */
LOOP float together(const numbers *sums) {
    float lanes[LANES];
    memcpy(lanes, sums, sizeof lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++)
            lanes[lane] += lanes[lane + width];
    return lanes[0];
}

/* The sum of x y, and in `total` that of x. */
LOOP float sums_of(size_t count, const float *x, const float *y, float *total) {
    numbers products = {0}, alone = {0};
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        products += load(x + i) * load(y + i);
        alone += load(x + i);
    }
    float rest_x[LANES] = {0}, rest_y[LANES] = {0};
    memcpy(rest_x, x + i, sizeof(float) * (count - i));
    memcpy(rest_y, y + i, sizeof(float) * (count - i));
    products += load(rest_x) * load(rest_y);
    alone += load(rest_x);
    *total = together(&alone);
    return together(&products);
}

LOOP float dot(size_t count, const float *x, const float *y) {
    float total;
    return sums_of(count, x, y, &total);
}

/* One over the root of the mean square. */
LOOP float norm_factor(size_t count, float eps, const float *x) {
    return 1 / sqrtf(dot(count, x, x) / (float)count + eps);
}

/* y *= silu(x), or with `slope` its slope. */
LOOP void silu_loop(int slope, size_t count, const float *restrict x, float *restrict y) {
    float negative[AT_A_TIME], powers[AT_A_TIME];
    for (size_t start = 0; start < count; start += AT_A_TIME, x += AT_A_TIME, y += AT_A_TIME) {
        const size_t length = count - start < AT_A_TIME ? count - start : AT_A_TIME;
        for (size_t i = 0; i < length; i++)
            negative[i] = -x[i];
        exp_loop(length, negative, 0, powers);
        if (slope)
            for (size_t i = 0; i < length; i++) {
                const float sigmoid = 1 / (1 + powers[i]);
                y[i] *= sigmoid * (1 + x[i] * (1 - sigmoid));
            }
        else
            for (size_t i = 0; i < length; i++)
                y[i] *= x[i] * (1 / (1 + powers[i]));
    }
}

/* y = x / the root of its mean square. */
LOOP void normalise_loop(size_t count, float eps, const float *restrict x, float *restrict y) {
    const float factor = norm_factor(count, eps, x);
    for (size_t i = 0; i < count; i++)
        y[i] = x[i] * factor;
}

/* y, the gradient of what normalise_loop gives, becomes that of its x. */
LOOP void normalise_back_loop(size_t count, float eps, const float *restrict x, float *restrict y) {
    const float factor = norm_factor(count, eps, x);
    const float along = dot(count, x, y) * (factor * factor / (float)count);
    for (size_t i = 0; i < count; i++)
        y[i] = (y[i] - x[i] * along) * factor;
}

/* Pairs of neighbours in x turned, by cosines and signed sines. */
LOOP void rotate_loop(size_t count, const float *restrict x, const float *restrict cosines,
                      const float *restrict sines, float *restrict y) {
    for (size_t i = 0; i < count; i += 2) {
        y[i] = x[i] * cosines[i] + x[i + 1] * sines[i];
        y[i + 1] = x[i + 1] * cosines[i + 1] + x[i] * sines[i + 1];
    }
}

/* y, the gradient of shares x / sum of x, becomes that of the logarithms of x. It is to be divided by that sum
   already. */
LOOP void softmax_back_loop(size_t count, const float *restrict x, float *restrict y) {
    float total;
    const float along = sums_of(count, x, y, &total), mean = along / total;
    for (size_t i = 0; i < count; i++)
        y[i] = x[i] * (y[i] - mean);
}

#define LOOPS(suffix, target)                                                                               \
    target static void silu_times_##suffix(size_t count, const float *x, float *y) {                        \
        silu_loop(0, count, x, y);                                                                          \
    }                                                                                                       \
    target static void silu_slope_##suffix(size_t count, const float *x, float *y) {                        \
        silu_loop(1, count, x, y);                                                                          \
    }                                                                                                       \
    target static void normalise_##suffix(size_t count, float eps, const float *x, float *y) {              \
        normalise_loop(count, eps, x, y);                                                                   \
    }                                                                                                       \
    target static void normalise_back_##suffix(size_t count, float eps, const float *x, float *y) {         \
        normalise_back_loop(count, eps, x, y);                                                              \
    }                                                                                                       \
    target static void rotate_##suffix(size_t count, const float *x, const float *cosines, const float *sines, \
                                       float *y) {                                                          \
        rotate_loop(count, x, cosines, sines, y);                                                           \
    }                                                                                                       \
    target static void softmax_back_##suffix(size_t count, const float *x, float *y) {                      \
        softmax_back_loop(count, x, y);                                                                     \
    }                                                                                                       \
    static const struct layer_loops loops_##suffix = {silu_times_##suffix,     silu_slope_##suffix,         \
                                                      normalise_##suffix,      normalise_back_##suffix,     \
                                                      rotate_##suffix,         softmax_back_##suffix};

LOOPS(any, )
#ifdef X86_LOOPS
LOOPS(avx2, AVX2)
LOOPS(avx512, AVX512)
#endif

const struct layer_loops *fastest_layer_loops(void) { return FASTEST(loops); }
