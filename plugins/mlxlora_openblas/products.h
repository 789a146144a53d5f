/* What the C files of this library share: the functions of a BLAS, and the threads that products take.

   hatch_build.py compiles all of them into one library. None needs a header of MLX or of a BLAS.

   Source of the interface: the CBLAS standard, BLAST Forum, appendix B. */

#ifndef MLXLORA_PRODUCTS_H
#define MLXLORA_PRODUCTS_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };

/* C (m, n) = alpha op(A) op(B) + beta C, with sums of k terms. */
typedef void sgemm_function(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                            const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);

/* y = alpha op(A) x + beta y, with A (rows, columns) as it is stored. */
typedef void sgemv_function(int order, int trans, int rows, int columns, float alpha, const float *a, int lda,
                            const float *x, int x_step, float beta, float *y, int y_step);

/* --- exponential.c ----------------------------------------------------------------------------------- */

typedef void exp_function(size_t count, const float *restrict x, float *restrict y);

struct exponentials {
    exp_function *exp;
    exp_function *row; /* exp(x - the highest x) */
    void (*log_softmax)(size_t count, float *x);
    void (*scaled_exp)(size_t count, float factor, float *x);
};

/* The fastest loops for this processor. */
const struct exponentials *fastest_exponentials(void);

/* --- layers.c ---------------------------------------------------------------------------------------- */

struct layer_loops {
    void (*silu_times)(size_t count, const float *x, float *y);
    void (*silu_slope)(size_t count, const float *x, float *y);
    void (*normalise)(size_t count, float eps, const float *x, float *y);
    void (*normalise_back)(size_t count, float eps, const float *x, float *y);
    void (*rotate)(size_t count, const float *x, const float *cosines, const float *sines, float *y);
    void (*softmax_back)(size_t count, const float *x, float *y);
};

/* The fastest loops for this processor. */
const struct layer_loops *fastest_layer_loops(void);

/* --- scratch.c --------------------------------------------------------------------------------------- */

/* What the memory is for: each has its own. */
enum scratch_use { FOR_TILES, FOR_EXPANDED, SCRATCH_USES };

/* `size` bytes that this thread keeps until it ends, aligned to a page and with whatever is in them, or NULL. */
void *scratch(enum scratch_use use, size_t size);

/* --- special.c --------------------------------------------------------------------------------------- */

enum kind {
    PACKED = 1,
    PACKED_BACK,
    ROWS,
    LOG_SOFTMAX,
    SCALED_EXP,
    SILU_TIMES,
    SILU_SLOPE,
    NORMALISE,
    NORMALISE_BACK,
    ROTATE,
    SOFTMAX_BACK
};
enum type { FLOAT32, FLOAT16, BFLOAT16 };

/* What a product stands for, as special.py writes it. */
struct header {
    uint32_t magic[4];
    const struct header *self;
    int32_t kind;
    /* ROWS: exponentials of rows of such a length less their highest; with `queries`, rows come in groups of
       so many, of which the last sees all numbers of the row, the one before all but one, and so on. */
    int32_t length, queries;
    /* PACKED and PACKED_BACK: a weight as of mlx.core.quantize. */
    int32_t outputs, inputs, group, bits, type;
    /* NORMALISE and NORMALISE_BACK: added to the mean square of a row, of `length` numbers. */
    float eps;
    const uint32_t *words;       /* (outputs, inputs * bits / 32) */
    const void *scales, *biases; /* (outputs, inputs / group) */
    /* ROTATE: of `length` numbers, which repeat. */
    const float *cosines, *sines;
};

/* Do what the matrix b (1, n) stands for with x (m, 1), and say whether it stood for anything. Matrices are
   multiplied by `sgemm`, or large ones by tiles where `parts` is not 0. */
int special(const struct exponentials *loops, sgemm_function *sgemm, int parts, int m, int n, const float *x, const float *b,
            float *y);

/* The same for what the matrix stands for that changes y (m, n) in place: LOG_SOFTMAX of each row, or SCALED_EXP
   with a factor x (m, 1) for each row. */
int special_in_place(const struct exponentials *loops, int m, int n, const float *x, const float *b, float *y);

/* --- amx.c ------------------------------------------------------------------------------------------- */

/* Whether the processor and the system have tiles that multiply bfloat16. */
int amx_present(void);

/* Ask the system that this process may use them; whether it may. Not by two threads at a time. */
int amx_start(void);

enum { LEAST_SIDE = 32, LEAST_TERMS = 128 }; /* of a product for tiles */

/* An sgemm, row-major, by one thread with tiles, where 1 or 2 bfloat16 stand for a number; after amx_start.

   Returns 0 where a number is not finite, or too large for bfloat16, or there is no memory: then C is as it was,
   or with a beta of 0 undefined, and the product is to be computed otherwise. */
int amx_product(int parts, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                const float *b, int ldb, float beta, float *c, int ldc);

/* The same of x (m, terms) with a packed weight: some of its outputs are the columns start to end of y, or with
   `back` some of its inputs are. */
int amx_packed_product(int parts, int back, int m, int start, int end, const float *x, const struct header *weight,
                       float *y);

/* --- packed.c ---------------------------------------------------------------------------------------- */

/* y (m, outputs) = x (m, inputs) times the packed weight, by tiles where `parts` is not 0 and they pay, or by
   `sgemm`; NaN where there is no memory. */
void packed_product(sgemm_function *sgemm, int parts, int m, const float *x, const struct header *weight, float *y);

/* y (m, inputs) = x (m, outputs) times the packed weight, turned around: what its gradient takes. */
void packed_product_back(sgemm_function *sgemm, int parts, int m, const float *x, const struct header *weight,
                         float *y);

/* --- pool.c ------------------------------------------------------------------------------------------ */

/* Does one of the parts of some work; parts of one work run at the same time, in any order. */
typedef void part_function(const void *work, int part);

/* How many threads a product takes, the one that asks for it among them. */
int pool_threads(void);

/* Do all parts of a work; which thread does which follows who is free, and nothing else may depend on it. */
void pool_run(part_function *do_part, const void *work, int parts);

/* --- split.c ----------------------------------------------------------------------------------------- */

/* An sgemm, row-major, of operands that are plain or transposed, as parts for the threads of the pool. */
void split_product(sgemm_function *sgemm, int trans_a, int trans_b, int m, int n, int k, float alpha,
                   const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);

/* The same for an sgemv whose x has its numbers side by side. */
void split_vector(sgemv_function *sgemv, int trans, int rows, int columns, float alpha, const float *a, int lda,
                  const float *x, float beta, float *y, int y_step);

#endif
