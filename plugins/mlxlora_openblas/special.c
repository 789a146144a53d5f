/* Products that stand for something else.

   MLX takes no operation from outside but through its C++ interface, which changes from release to release;
   cblas_sgemm is the one function with a stable interface that it calls for a whole array. So what packed.c,
   exponential.c and layers.c compute is asked for as a product of numbers (m, 1), all following each other, with a
   matrix (1, n) that begins with a header. No other matrix can pass for one: a header begins with NaN and
   holds its own address, so that no product with it, or with a copy of it, can pass for a right result. */

#include "products.h"

enum { MAGIC = 0x7fc1a6e5 }; /* NaN as a float */

/* Numbers that are worth a part of their own. */
enum { PART_NUMBERS = 1 << 14, PARTS_A_THREAD = 2 };

struct work {
    const struct exponentials *loops;
    const struct layer_loops *layer;
    const struct header *what;
    size_t count, part;
    const float *x;
    float *y;
};

static void do_rows(const void *given, int part) {
    const struct work *work = given;
    const size_t length = (size_t)work->what->length, queries = (size_t)work->what->queries;
    const size_t rows = work->count / length, start = part * work->part;
    for (size_t row = start; row < rows && row < start + work->part; row++) {
        const size_t seen = queries ? length - queries + row % queries + 1 : length;
        float *y = work->y + row * length;
        work->loops->row(seen, work->x + row * length, y);
        for (size_t i = seen; i < length; i++)
            y[i] = 0;
    }
}

static void change_rows(const void *given, int part) {
    const struct work *work = given;
    const size_t length = (size_t)work->what->outputs, start = part * work->part;
    for (size_t row = start; row < work->count && row < start + work->part; row++)
        if (work->what->kind == LOG_SOFTMAX)
            work->loops->log_softmax(length, work->y + row * length);
        else
            work->loops->scaled_exp(length, work->x[row], work->y + row * length);
}

static void do_numbers(const void *given, int part) {
    const struct work *work = given;
    const size_t start = part * work->part, rest = work->count - start;
    const size_t length = rest < work->part ? rest : work->part;
    if (work->what->kind == SILU_TIMES)
        work->layer->silu_times(length, work->x + start, work->y + start);
    else
        work->layer->silu_slope(length, work->x + start, work->y + start);
}

static void do_layer_rows(const void *given, int part) {
    const struct work *work = given;
    const struct header *what = work->what;
    const size_t length = (size_t)what->length, first = part * work->part;
    for (size_t row = first; row < work->count && row < first + work->part; row++) {
        const float *x = work->x + row * length;
        float *y = work->y + row * length;
        if (what->kind == NORMALISE)
            work->layer->normalise(length, what->eps, x, y);
        else if (what->kind == NORMALISE_BACK)
            work->layer->normalise_back(length, what->eps, x, y);
        else if (what->kind == ROTATE)
            work->layer->rotate(length, x, what->cosines, what->sines, y);
        else
            work->layer->softmax_back(length, x, y);
    }
}

/* Share `count` items of `size` numbers each. */
static void share(part_function *do_part, struct work *work, size_t count, size_t size) {
    const size_t most = (size_t)(PARTS_A_THREAD * pool_threads()), worth = count * size / PART_NUMBERS;
    const size_t parts = worth < 1 ? 1 : worth < most ? worth : most;
    work->part = (count + parts - 1) / parts;
    pool_run(do_part, work, (int)((count + work->part - 1) / work->part));
}

/* Share the rows that the numbers are. */
static void share_rows(struct work *work) {
    const size_t length = (size_t)work->what->length;
    work->layer = fastest_layer_loops();
    work->count /= length;
    share(do_layer_rows, work, work->count, length);
}

static int is_header(const float *b) {
    const struct header *header = (const struct header *)b;
    for (int i = 0; i < 4; i++) /* one after the other: what does not begin so may be shorter */
        if (((const uint32_t *)b)[i] != MAGIC + (uint32_t)i)
            return 0;
    return (uintptr_t)b % _Alignof(struct header) == 0 && header->self == header;
}

int special(const struct exponentials *loops, sgemm_function *sgemm, int parts, int m, int n, const float *x,
            const float *b, float *y) {
    if (m < 1 || n < 1 || !is_header(b))
        return 0;
    const struct header *what = (const struct header *)b;
    struct work work = {.loops = loops, .what = what, .count = (size_t)m, .x = x, .y = y};
    if (what->kind == PACKED && n == what->outputs)
        packed_product(sgemm, parts, m, x, what, y);
    else if (what->kind == PACKED_BACK && n == what->inputs)
        packed_product_back(sgemm, parts, m, x, what, y);
    else if (what->kind == ROWS && n == 1 && what->length > 0 && m % what->length == 0 &&
             what->queries >= 0 && what->queries <= what->length)
        share(do_rows, &work, work.count / (size_t)what->length, (size_t)what->length);
    else if ((what->kind == NORMALISE || what->kind == ROTATE) && n == 1 && what->length > 0 && m % what->length == 0)
        share_rows(&work);
    else
        return 0;
    return 1;
}

int special_in_place(const struct exponentials *loops, int m, int n, const float *x, const float *b, float *y) {
    if (m < 1 || n < 1 || !is_header(b))
        return 0;
    const struct header *what = (const struct header *)b;
    struct work work = {.loops = loops, .what = what, .count = (size_t)m, .x = x, .y = y};
    if ((what->kind == LOG_SOFTMAX || what->kind == SCALED_EXP) && what->outputs == n)
        share(change_rows, &work, work.count, (size_t)n);
    else if ((what->kind == SILU_TIMES || what->kind == SILU_SLOPE) && n == 1) {
        work.layer = fastest_layer_loops();
        share(do_numbers, &work, work.count, 1);
    } else if ((what->kind == NORMALISE_BACK || what->kind == SOFTMAX_BACK) && n == 1 && what->length > 0 &&
               m % what->length == 0)
        share_rows(&work);
    else
        return 0;
    return 1;
}
