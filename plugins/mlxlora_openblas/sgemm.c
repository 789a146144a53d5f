/* The cblas_sgemm that MLX calls: it passes on each product to who is fastest at it.

   MLX's CPU backend has one function for all products of float32. OpenBLAS's copies a matrix into panels
   before it multiplies, also where a single row or column needs each number once, and decoding then runs at
   half of what the memory gives. Here such a product becomes cblas_sgemv, if the numbers of the row or column
   stand side by side (others are slow on aarch64: OpenBLAS's issue 4951). On x86-64 OpenBLAS does not do this
   by itself, because some of its sgemv kernels were inaccurate (its pull request 4814). So check.py tries the
   one that is there before anything is passed on to it.

   MLX computes exp a number at a time. So a column times one array of one number, the token, is exp of the
   column. The token holds NaN: no other product with it can pass for a right result. More that MLX is slow at
   is asked for in a like way (special.c).

   Where less than float32 is asked for, large ones go to the tiles of AMX (amx.c), if there are such. Small ones
   gain nothing by them, and from 128 terms on two bfloat16 for a number keep within the bound (k + 4) 2^-23 of
   the sum of absolute values that check.py holds float32 to: the operands leave out 96 of it, the 3 k / 32 sums
   of tiles and those within a tile the rest.

   All others are cut into parts, which threads of this library share (pool.c): the BLAS has one thread. */

#include "products.h"

static sgemm_function *sgemm; /* of one thread */
static sgemv_function *sgemv; /* of one thread, or NULL */
static const float *token;
static const struct exponentials *loops;
static int parts; /* bfloat16 that stand for a number in large products; 0 is float32 */

/* Which text of the C files the library was made from; SOURCE is its digest. */
EXPORT const char mlxlora_source[] = SOURCE;

/* The functions of the BLAS, and the token; to be called first. Where there is no vector_product (NULL),
   products of one row or column stay with matrix_product. */
EXPORT void mlxlora_use(sgemm_function *matrix_product, sgemv_function *vector_product,
                        const float *exp_token) {
    sgemm = matrix_product;
    sgemv = vector_product;
    token = exp_token;
    loops = fastest_exponentials();
}

/* Whether the processor could multiply bfloat16 by tiles. */
EXPORT int mlxlora_has_tiles(void) { return amx_present(); }

/* Let 1 or 2 bfloat16 stand for a number in large products from now on, or with 0 the number itself. Returns
   whether that is so now; else it is float32. Not to be called while anything is computed. */
EXPORT int mlxlora_set_parts(int count) {
    parts = count > 0 && count <= 2 && amx_start() ? count : 0;
    return parts == count;
}

/* An sgemm by tiles, or where there are few terms or they cannot, by the BLAS. */
static void tiles(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                  const float *b, int ldb, float beta, float *c, int ldc) {
    if (k < LEAST_TERMS || !amx_product(parts, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc))
        sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* cblas_sgemm. A product with the token that is not to the letter what exp() in sgemm.py asks for is a
   product like any other, and gives NaN. */
EXPORT void mlxlora_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                                const float *a, int lda, const float *b, int ldb, float beta, float *c,
                                int ldc) {
    const int a_plain = trans_a == PLAIN, b_plain = trans_b == PLAIN;
    const int known = order == ROW_MAJOR && (a_plain || trans_a == TRANSPOSED) &&
                      (b_plain || trans_b == TRANSPOSED);
    sgemm_function *const fastest = parts && m >= LEAST_SIDE ? tiles : sgemm;
    const int to_vector = known && sgemv && k > 0; /* of a sum without terms, sgemv would not write the 0 */

    if (b == token && order == ROW_MAJOR && a_plain && b_plain && m > 0 && n == 1 && k == 1 && alpha == 1 &&
        lda == 1 && ldb == 1 && beta == 0 && ldc == 1)
        loops->exp((size_t)m, a, c);
    else if (order == ROW_MAJOR && a_plain && b_plain && k == 1 && alpha == 1 && lda == 1 && ldc == n &&
             ((beta == 0 && special(loops, sgemm, parts, m, n, a, b, c)) ||
              (beta == 1 && special_in_place(loops, m, n, a, b, c))))
        return;
    else if (to_vector && m == 1 && (a_plain || lda == 1)) /* C' = op(B)' A' */
        split_vector(sgemv, b_plain ? TRANSPOSED : PLAIN, b_plain ? k : n, b_plain ? n : k, alpha, b, ldb, a,
                     beta, c, 1);
    else if (to_vector && n == 1 && (!b_plain || ldb == 1)) /* C = op(A) B */
        split_vector(sgemv, trans_a, a_plain ? m : k, a_plain ? k : m, alpha, a, lda, b, beta, c, ldc);
    else if (known)
        split_product(n >= LEAST_SIDE ? fastest : sgemm, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    else
        sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
