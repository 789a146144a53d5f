/* A few rows times a weight that stays packed: decoding reads an eighth of the bytes of float32.

   The weight is as mlx.core.quantize has it: `bits` bits a value, lowest bits of a word of 32 first, and for
   each group of values a scale and a bias. A row of x times a row of the weight is, with q the values,

       sum over groups of  scale * (sum of q x)  +  bias * (sum of x),

   in float32 all through. x is laid out anew once, so that a vector of words, shifted by j values to the
   right, meets the numbers that belong to its lowest values side by side. */

#include "products.h"

#include <stdlib.h>
#include <string.h>

enum { LANES = 16, MOST_TOGETHER = 4, MOST_INPUTS = 1 << 15, PARTS_A_THREAD = 4 };

/* Words of a weight that are worth a part of their own. */
enum { PART_WORDS = 1 << 13 };

/* Scales that are made float32 at a time. */
enum { WIDENED = 1 << 11 };

typedef float numbers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(4 * LANES)));

struct work {
    const struct header *weight;
    int rows, outputs;      /* of x, and of a part */
    int blocks, sum_blocks; /* of LANES words in a row of the weight, and of LANES groups; the rest is 0 */
    const float *x;         /* (rows, blocks, values of a word, LANES) */
    const float *x_sums;    /* (rows, sum_blocks, LANES) */
    float *y;               /* (rows, outputs of the weight) */
};

/* LANES numbers; a macro, for functions do not pass vectors that their processor may lack. */
#define load(at) (*(const numbers *)(at))

static int least(int a, int b) { return a < b ? a : b; }

static int count(int length, int part) { return (length + part - 1) / part; }

union word {
    uint32_t bits;
    float number;
};

/* Numbers `start` and following of one of three types as float32. */
static inline __attribute__((always_inline)) void widen(const void *from, size_t start, int length, int type,
                                                        float *restrict to) {
    const uint16_t *half = (const uint16_t *)from + start;
    if (type == FLOAT32)
        memcpy(to, (const float *)from + start, sizeof(float) * (size_t)length);
    else if (type == BFLOAT16)
        for (int i = 0; i < length; i++)
            to[i] = ((union word){.bits = (uint32_t)half[i] << 16}).number;
    else
        for (int i = 0; i < length; i++) {
            /* 5 bits of exponent with bias 15 become 8 with bias 127; infinity and NaN stay what they are. */
            uint32_t size = (half[i] & 0x7fffu) << 13, sign = (uint32_t)(half[i] & 0x8000u) << 16;
            union word wide = {.bits = size};
            wide.number *= 0x1p112f;
            wide.bits |= sign | (size >= 0x0f800000u ? 0x7f800000u : 0);
            to[i] = wide.number;
        }
}

static inline __attribute__((always_inline)) float sum_of(const numbers *x) {
    float lanes[LANES];
    memcpy(lanes, x, sizeof lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++)
            lanes[lane] += lanes[lane + width];
    return lanes[0];
}

/* One output for `rows` rows of x from `first` on; bits and rows are constants where this is called.
   `scales` has the scale of each word, `biases` the bias of each group. */
static inline __attribute__((always_inline)) void multiply(const struct work *work, int bits, int rows,
                                                           int first, int output, const float *scales,
                                                           const float *biases) {
    const int values = 32 / bits, length = work->weight->inputs / values;
    const uint32_t *row = work->weight->words + (size_t)output * length;
    const size_t step = (size_t)work->blocks * values * LANES, sum_step = (size_t)work->sum_blocks * LANES;
    const float *x = work->x + first * step, *x_sums = work->x_sums + first * sum_step;
    numbers total[MOST_TOGETHER] = {{0}};
    for (int block = 0; block < work->blocks; block++) {
        const int held = least(LANES, length - block * LANES);
        words packed = {0};
        if (held == LANES)
            memcpy(&packed, row + block * LANES, sizeof packed);
        else
            memcpy(&packed, row + block * LANES, sizeof(uint32_t) * (size_t)held);
        numbers sum[MOST_TOGETHER] = {{0}};
        for (int j = 0; j < values; j++) {
            const words value = (packed >> (j * bits)) & ((1 << bits) - 1);
            const numbers q = __builtin_convertvector(value, numbers);
            for (int r = 0; r < rows; r++)
                sum[r] += q * load(x + r * step + ((size_t)block * values + j) * LANES);
        }
        for (int r = 0; r < rows; r++)
            total[r] += sum[r] * load(scales + block * LANES);
    }
    for (int r = 0; r < rows; r++) {
        for (int block = 0; block < work->sum_blocks; block++)
            total[r] += load(biases + block * LANES) * load(x_sums + r * sum_step + block * LANES);
        work->y[(size_t)(first + r) * work->weight->outputs + output] = sum_of(&total[r]);
    }
}

static inline __attribute__((always_inline)) void multiply_all(const struct work *work, int bits, int output,
                                                               const float *scales, const float *biases) {
    int first = 0;
    for (; work->rows - first >= 4; first += 4)
        multiply(work, bits, 4, first, output, scales, biases);
    for (; work->rows - first >= 2; first += 2)
        multiply(work, bits, 2, first, output, scales, biases);
    if (first < work->rows)
        multiply(work, bits, 1, first, output, scales, biases);
}

/* The outputs of one part. */
static inline __attribute__((always_inline)) void do_outputs(const struct work *work, int part) {
    const struct header *weight = work->weight;
    const int groups = weight->inputs / weight->group, a_group = weight->group * weight->bits / 32; /* words */
    const int end = least(weight->outputs, (part + 1) * work->outputs), together = WIDENED / groups;
    const float *group_scales = NULL, *biases = NULL; /* of the row */
    float all_scales[WIDENED], all_biases[WIDENED + LANES], scales[MOST_INPUTS / 4 + 3 * LANES];
    memset(all_biases, 0, sizeof all_biases); /* what is beyond those of a row meets zeros, and is to be a number */
    for (int output = part * work->outputs, ready = 0; output < end; output++) {
        if (!ready) {
            ready = least(together, end - output);
            widen(weight->scales, (size_t)output * groups, ready * groups, weight->type, all_scales);
            widen(weight->biases, (size_t)output * groups, ready * groups, weight->type, all_biases);
            group_scales = all_scales;
            biases = all_biases;
        }
        for (int group = 0; group < groups; group++) /* the next group writes over what is too much */
            for (int word = 0; word < a_group; word += LANES)
                for (int lane = 0; lane < LANES; lane++)
                    scales[group * a_group + word + lane] = group_scales[group];
        if (weight->bits == 4)
            multiply_all(work, 4, output, scales, biases);
        else if (weight->bits == 8)
            multiply_all(work, 8, output, scales, biases);
        else
            multiply_all(work, 2, output, scales, biases);
        group_scales += groups;
        biases += groups;
        ready--;
    }
}

static void outputs_any(const void *work, int part) { do_outputs(work, part); }

#if defined(__x86_64__) && !defined(PORTABLE)
__attribute__((target("avx2,fma"))) static void outputs_avx2(const void *work, int part) {
    do_outputs(work, part);
}

#ifndef AT_MOST_AVX2
__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))) static void outputs_avx512(const void *work,
                                                                                           int part) {
    do_outputs(work, part);
}
#endif

static part_function *fastest(void) {
#ifndef AT_MOST_AVX2
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        return outputs_avx512;
#endif
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? outputs_avx2 : outputs_any;
}
#else
static part_function *fastest(void) { return outputs_any; }
#endif

/* Lay x (rows, inputs) out as struct work says. */
static void lay_out(const struct work *work, const float *x, float *laid, float *sums) {
    const struct header *weight = work->weight;
    const int values = 32 / weight->bits, length = weight->inputs / values;
    memset(laid, 0, sizeof(float) * LANES * (size_t)work->rows * work->blocks * values);
    memset(sums, 0, sizeof(float) * LANES * (size_t)work->rows * work->sum_blocks);
    for (int row = 0; row < work->rows; row++) {
        const float *from = x + (size_t)row * weight->inputs;
        float *to = laid + (size_t)row * work->blocks * values * LANES;
        for (int word = 0; word < length; word++)
            for (int j = 0; j < values; j++)
                to[(word / LANES * values + j) * LANES + word % LANES] = from[word * values + j];
        for (int i = 0; i < weight->inputs; i++)
            sums[(size_t)row * work->sum_blocks * LANES + i / weight->group] += from[i];
    }
}

void packed_product(int m, const float *x, const struct header *weight, float *y) {
    struct work work = {.weight = weight, .rows = m, .y = y};
    const int length = weight->inputs * weight->bits / 32;
    work.blocks = count(length, LANES);
    work.sum_blocks = count(weight->inputs / weight->group, LANES);
    const size_t laid = (size_t)m * work.blocks * (32 / weight->bits) * LANES;
    float *scratch = aligned_alloc(64, sizeof(float) * (laid + (size_t)m * work.sum_blocks * LANES));
    if (!scratch) {
        for (size_t i = 0; i < (size_t)m * weight->outputs; i++)
            y[i] = __builtin_nanf("");
        return;
    }
    lay_out(&work, x, scratch, scratch + laid);
    work.x = scratch;
    work.x_sums = scratch + laid;
    const double worth = (double)length * weight->outputs / PART_WORDS;
    const int most = PARTS_A_THREAD * pool_threads(), parts = worth > most ? most : worth < 1 ? 1 : (int)worth;
    work.outputs = count(weight->outputs, parts);
    pool_run(fastest(), &work, count(weight->outputs, work.outputs));
    free(scratch);
}
