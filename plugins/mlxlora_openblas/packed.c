/* Products with a weight that stays packed.

   The weight is as mlx.core.quantize has it: `bits` bits a value, lowest bits of a word of 32 first, and for
   each group of values a scale and a bias. A row of x times a row of the weight is, with q the values,

       sum over groups of  scale * (sum of q x)  +  bias * (sum of x),

   in float32 all through. A few rows are multiplied so, and decoding reads an eighth of the bytes of float32:
   x is laid out anew once, so that a vector of words, shifted by j values to the
   right, meets the numbers that belong to its lowest values side by side.

   For many rows, pieces of the weight become float32 in the cache, one after the other, and are multiplied there
   by the BLAS; or panels of bfloat16, and are multiplied by tiles (amx.c). Every sum is taken in an order that the weight alone decides. */

#include "processor.h"
#include "products.h"

#include <stdlib.h>
#include <string.h>

enum { LANES = 16, MOST_TOGETHER = 8, MOST_INPUTS = 1 << 15, PARTS_A_THREAD = 4 };

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

static inline __attribute__((always_inline)) void multiply_all(const struct work *work, int bits, int side_by_side,
                                                               int output, const float *scales,
                                                               const float *biases) {
    int first = 0;
    for (; side_by_side >= 8 && work->rows - first >= 8; first += 8)
        multiply(work, bits, 8, first, output, scales, biases);
    for (; work->rows - first >= 4; first += 4)
        multiply(work, bits, 4, first, output, scales, biases);
    for (; work->rows - first >= 2; first += 2)
        multiply(work, bits, 2, first, output, scales, biases);
    if (first < work->rows)
        multiply(work, bits, 1, first, output, scales, biases);
}

/* The outputs of one part. Rows are multiplied 4 or 8 side by side, as registers have room for. */
static inline __attribute__((always_inline)) void do_outputs(const struct work *work, int part, int side_by_side) {
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
            multiply_all(work, 4, side_by_side, output, scales, biases);
        else if (weight->bits == 8)
            multiply_all(work, 8, side_by_side, output, scales, biases);
        else
            multiply_all(work, 2, side_by_side, output, scales, biases);
        group_scales += groups;
        biases += groups;
        ready--;
    }
}

/* --- pieces as float32 --------------------------------------------------------------------------------- */

/* Values that are expanded at a time: every group is made of such runs. */
enum { RUN = 32 };

/* A run of values as float32; bits is a constant where this is called. The bits of a byte are spread over as
   many bytes as it has values. */
static inline __attribute__((always_inline)) void expand_run(const uint8_t *restrict bytes, int bits, float scale,
                                                             float bias, float *restrict to) {
    uint8_t values[RUN];
    uint16_t pairs[RUN / 2];
    uint32_t fours[RUN / 4];
    if (bits == 8) {
        memcpy(values, bytes, sizeof values);
    } else if (bits == 4) {
        for (int i = 0; i < RUN / 2; i++)
            pairs[i] = (uint16_t)((bytes[i] | bytes[i] << 4) & 0x0f0f);
        memcpy(values, pairs, sizeof values);
    } else {
        for (int i = 0; i < RUN / 4; i++) {
            const uint32_t halves = (bytes[i] | (uint32_t)bytes[i] << 12) & 0x000f000f;
            fours[i] = (halves | halves << 6) & 0x03030303;
        }
        memcpy(values, fours, sizeof values);
    }
    for (int i = 0; i < RUN; i++)
        to[i] = (float)values[i] * scale + bias;
}

/* `count` rows of the weight from `first` on, of each `length` values from `from` on, in runs, as float32. */
static inline __attribute__((always_inline)) void expand(const struct header *weight, int first, int count, int from,
                                                         int length, float *to) {
    const int group = weight->group, groups = weight->inputs / group, a_run = RUN * weight->bits / 8;
    const int low = from / group, high = (from + length - 1) / group;
    float scales[MOST_INPUTS / RUN], biases[MOST_INPUTS / RUN];
    for (int row = first; row < first + count; row++) {
        const uint8_t *bytes = (const uint8_t *)weight->words;
        bytes += ((size_t)row * weight->inputs + from) / RUN * a_run;
        widen(weight->scales, (size_t)row * groups + low, high - low + 1, weight->type, scales);
        widen(weight->biases, (size_t)row * groups + low, high - low + 1, weight->type, biases);
        for (int i = from; i < from + length; i += RUN, to += RUN, bytes += a_run) {
            const float scale = scales[i / group - low], bias = biases[i / group - low];
            if (weight->bits == 4)
                expand_run(bytes, 4, scale, bias, to);
            else if (weight->bits == 8)
                expand_run(bytes, 8, scale, bias, to);
            else
                expand_run(bytes, 2, scale, bias, to);
        }
    }
}

/* --- the fastest for this processor -------------------------------------------------------------------- */

struct loops {
    part_function *outputs;
    void (*expand)(const struct header *weight, int first, int count, int from, int length, float *to);
};

#define LOOPS(name, together, ...)                                                                           \
    __VA_ARGS__ static void outputs_##name(const void *work, int part) { do_outputs(work, part, together); }  \
    __VA_ARGS__ static void expand_##name(const struct header *weight, int first, int count, int from,        \
                                          int length, float *to) {                                            \
        expand(weight, first, count, from, length, to);                                                       \
    }                                                                                                         \
    static const struct loops loops_##name = {outputs_##name, expand_##name};

LOOPS(any, 4, )
#ifdef X86_LOOPS
LOOPS(avx2, 4, AVX2)
LOOPS(avx512, 8, AVX512)
#endif

static const struct loops *fastest(void) { return FASTEST(loops); }

/* --- a few rows --------------------------------------------------------------------------------------- */

/* Up to so many rows are few, of which each has the same bits whatever their number. 1536 x 576 at 4 bits by two
   threads: 16 rows take 0.81 ms so, and 17 rows, which are many, 0.92. */
enum { FEW_ROWS = 16 };

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

static void few_rows(int m, const float *x, const struct header *weight, float *y) {
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
    pool_run(fastest()->outputs, &work, count(weight->outputs, work.outputs));
    free(scratch);
}

/* --- many rows ---------------------------------------------------------------------------------------- */

/* What is expanded and multiplied at a time lies in the second level of the cache; a sum goes over so many terms
   at a time. */
enum { PIECE_NUMBERS = 1 << 18, PIECE_TERMS = 1024, PIECE_SIDE = 32, PART_PRODUCTS = 1 << 20 };

struct many {
    const struct header *weight;
    sgemm_function *sgemm;
    const struct loops *loops;
    int parts;            /* bfloat16 that stand for a number where tiles multiply, or 0 */
    int rows, back, side; /* of x; whether the weight is turned around; numbers of a row of y in a part */
    const float *x;
    float *y;
};

/* A part: some outputs of all rows, or with `back` some inputs of them. */
static void do_many(const void *given, int part) {
    const struct many *work = given;
    const struct header *weight = work->weight;
    const int back = work->back, sides = back ? weight->inputs : weight->outputs;
    const int terms = back ? weight->outputs : weight->inputs, deepest = least(terms, PIECE_TERMS);
    const int widest = PIECE_NUMBERS / deepest / PIECE_SIDE * PIECE_SIDE, start = part * work->side;
    const int end = least(sides, start + work->side);
    if (work->parts && work->rows >= LEAST_SIDE && end - start >= LEAST_SIDE && terms >= LEAST_TERMS &&
        amx_packed_product(work->parts, back, work->rows, start, end, work->x, weight, work->y))
        return;
    float *piece = scratch(FOR_EXPANDED, sizeof(float) * PIECE_NUMBERS);
    for (int row = 0; !piece && row < work->rows; row++)
        for (int side = start; side < end; side++)
            work->y[(size_t)row * sides + side] = __builtin_nanf("");
    for (int side = start; piece && side < end; side += widest)
        for (int term = 0; term < terms; term += PIECE_TERMS) {
            const int wide = least(widest, end - side), deep = least(PIECE_TERMS, terms - term);
            if (back)
                work->loops->expand(weight, term, deep, side, wide, piece);
            else
                work->loops->expand(weight, side, wide, term, deep, piece);
            work->sgemm(ROW_MAJOR, PLAIN, back ? PLAIN : TRANSPOSED, work->rows, wide, deep, 1, work->x + term, terms,
                        piece, back ? wide : deep, term > 0, work->y + side, sides);
        }
}

static void many_rows(sgemm_function *sgemm, int parts_of_a_number, int back, int m, const float *x,
                      const struct header *weight, float *y) {
    const int sides = back ? weight->inputs : weight->outputs;
    const double worth = (double)m * weight->inputs * weight->outputs / PART_PRODUCTS;
    const int most = pool_threads(), parts = worth > most ? most : worth < 1 ? 1 : (int)worth;
    struct many work = {.weight = weight, .sgemm = sgemm, .parts = parts_of_a_number, .rows = m, .back = back,
                        .loops = fastest(), .x = x, .y = y};
    work.side = count(count(sides, parts), PIECE_SIDE) * PIECE_SIDE;
    pool_run(do_many, &work, count(sides, work.side));
}

void packed_product(sgemm_function *sgemm, int parts, int m, const float *x, const struct header *weight, float *y) {
    if (m > FEW_ROWS)
        many_rows(sgemm, parts, 0, m, x, weight, y);
    else
        few_rows(m, x, weight, y);
}

void packed_product_back(sgemm_function *sgemm, int parts, int m, const float *x, const struct header *weight,
                         float *y) {
    many_rows(sgemm, parts, 1, m, x, weight, y);
}
