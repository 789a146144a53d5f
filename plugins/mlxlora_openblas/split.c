/* Products in parts, each of them a product of the BLAS by one thread. */

#include "products.h"

/* Parts for each thread: more even out better what takes unlike long, and copy more of the operands. */
enum { PARTS_A_THREAD = 2 };

/* Multiplications that are worth a part of their own, in a product and in one with a vector, where
   memory sets the pace; and what the sides of a part are multiples of, for kernels take so many at a time. */
enum { PART_PRODUCTS = 1 << 20, PART_NUMBERS = 1 << 15, PART_SIDE = 32 };

struct product {
    sgemm_function *sgemm;
    int trans_a, trans_b, m, n, k, lda, ldb, ldc;
    int rows, columns, parts_across; /* of a part; and parts beside each other */
    float alpha, beta;
    const float *a, *b;
    float *c;
};

struct vector_product {
    sgemv_function *sgemv;
    int trans, rows, columns, lda, y_step;
    int outputs; /* of a part */
    float alpha, beta;
    const float *a, *x;
    float *y;
};

static int least(int a, int b) { return a < b ? a : b; }

/* How long each of `parts` parts of a length is, the last of which may be shorter. */
static int part_length(int length, int parts) {
    int part = (length + parts - 1) / parts;
    return (part + PART_SIDE - 1) / PART_SIDE * PART_SIDE;
}

static int count(int length, int part) { return (length + part - 1) / part; }

/* How many parts work of this size is worth at most. */
static int parts_for(double size, double part_size) {
    double worth = size / part_size, most = (double)PARTS_A_THREAD * pool_threads();
    return pool_threads() < 2 ? 1 : (int)(worth < most ? worth : most);
}

static void do_product(const void *work, int part) {
    const struct product *p = work;
    int row = part / p->parts_across * p->rows, column = part % p->parts_across * p->columns;
    const float *a = p->a + (p->trans_a == PLAIN ? (size_t)row * p->lda : (size_t)row);
    const float *b = p->b + (p->trans_b == PLAIN ? (size_t)column : (size_t)column * p->ldb);
    p->sgemm(ROW_MAJOR, p->trans_a, p->trans_b, least(p->rows, p->m - row), least(p->columns, p->n - column), p->k,
             p->alpha, a, p->lda, b, p->ldb, p->beta, p->c + (size_t)row * p->ldc + column, p->ldc);
}

void split_product(sgemm_function *sgemm, int trans_a, int trans_b, int m, int n, int k, float alpha,
                   const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    int parts = parts_for((double)m * n * k, PART_PRODUCTS);
    /* Each part copies its rows of A and columns of B, so that the sum of both is to be small. */
    int down = 1;
    for (int tried = 1; tried <= parts; tried++)
        if (parts % tried == 0 &&
            (int64_t)tried * n + (int64_t)(parts / tried) * m < (int64_t)down * n + (int64_t)(parts / down) * m)
            down = tried;
    if (parts < 2) {
        sgemm(ROW_MAJOR, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    struct product p = {sgemm, trans_a, trans_b, m, n, k, lda, ldb, ldc, 0, 0, 0, alpha, beta, a, b, c};
    p.rows = part_length(m, down);
    p.columns = part_length(n, parts / down);
    p.parts_across = count(n, p.columns);
    pool_run(do_product, &p, p.parts_across * count(m, p.rows));
}

static void do_vector(const void *work, int part) {
    const struct vector_product *p = work;
    int plain = p->trans == PLAIN, start = part * p->outputs;
    int outputs = least(p->outputs, (plain ? p->rows : p->columns) - start);
    p->sgemv(ROW_MAJOR, p->trans, plain ? outputs : p->rows, plain ? p->columns : outputs, p->alpha,
             p->a + (plain ? (size_t)start * p->lda : (size_t)start), p->lda, p->x, 1, p->beta,
             p->y + (size_t)start * p->y_step, p->y_step);
}

void split_vector(sgemv_function *sgemv, int trans, int rows, int columns, float alpha, const float *a, int lda,
                  const float *x, float beta, float *y, int y_step) {
    int parts = parts_for((double)rows * columns, PART_NUMBERS);
    if (parts < 2) {
        sgemv(ROW_MAJOR, trans, rows, columns, alpha, a, lda, x, 1, beta, y, y_step);
        return;
    }
    struct vector_product p = {sgemv, trans, rows, columns, lda, y_step, 0, alpha, beta, a, x, y};
    int outputs = trans == PLAIN ? rows : columns;
    p.outputs = part_length(outputs, parts);
    pool_run(do_vector, &p, count(outputs, p.outputs));
}
