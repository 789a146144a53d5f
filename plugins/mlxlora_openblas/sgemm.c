/* The cblas_sgemm that MLX calls: products of one row or column, and exponentials, go a faster way.

   MLX's CPU backend has one function for all products of float32. OpenBLAS's copies a matrix into panels
   before it multiplies, also where a single row or column needs each number once, and decoding then runs at
   half of what the memory gives. Here such a product becomes cblas_sgemv, if the numbers of the row or column
   stand side by side (others are slow on aarch64: OpenBLAS's issue 4951). On x86-64 OpenBLAS does not do this
   by itself, because some of its sgemv kernels were inaccurate (its pull request 4814). So check.py tries the
   one that is there before anything is passed on to it.

   MLX computes exp a number at a time. It takes no operation from outside but through its C++ interface,
   which changes from release to release; cblas_sgemm is the one function with a stable interface that it
   calls for a whole array. So a column times one array of one number, the token, is exp of the column. The
   token holds NaN: no other product with it can pass for a right result.

   hatch_build.py compiles this file. It needs no header of MLX or of a BLAS.

   Source of the interface: the CBLAS standard, BLAST Forum, appendix B. */

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

typedef void exp_function(size_t count, const float *restrict x, float *restrict y);

static sgemm_function *sgemm;
static sgemv_function *sgemv;
static const float *token;
static exp_function *exp_array;

/* Which text of this file the library was made from; SOURCE is its digest. */
EXPORT const char mlxlora_source[] = SOURCE;

/* --- the exponential -------------------------------------------------------------------------------- */

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

static exp_function *fastest_exp(void) {
#ifndef AT_MOST_AVX2
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return exp_avx512;
#endif
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? exp_avx2 : exp_any;
}
#else
static exp_function *fastest_exp(void) { return exp_any; }
#endif

/* --- what is called --------------------------------------------------------------------------------- */

/* The functions of the BLAS, and the token; to be called first. Where there is no vector_product (NULL),
   products of one row or column stay with matrix_product. */
EXPORT void mlxlora_use(sgemm_function *matrix_product, sgemv_function *vector_product,
                        const float *exp_token) {
    sgemm = matrix_product;
    sgemv = vector_product;
    token = exp_token;
    exp_array = fastest_exp();
}

/* cblas_sgemm. A product with the token that is not to the letter what exp() in sgemm.py asks for is a
   product like any other, and gives NaN. */
EXPORT void mlxlora_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                                const float *a, int lda, const float *b, int ldb, float beta, float *c,
                                int ldc) {
    const int a_plain = trans_a == PLAIN, b_plain = trans_b == PLAIN;
    const int known = order == ROW_MAJOR && (a_plain || trans_a == TRANSPOSED) &&
                      (b_plain || trans_b == TRANSPOSED);
    const int to_vector = known && sgemv && k > 0; /* of a sum without terms, sgemv would not write the 0 */

    if (b == token && order == ROW_MAJOR && a_plain && b_plain && m > 0 && n == 1 && k == 1 && alpha == 1 &&
        lda == 1 && ldb == 1 && beta == 0 && ldc == 1)
        exp_array((size_t)m, a, c);
    else if (to_vector && m == 1 && (a_plain || lda == 1)) /* C' = op(B)' A' */
        sgemv(ROW_MAJOR, b_plain ? TRANSPOSED : PLAIN, b_plain ? k : n, b_plain ? n : k, alpha, b, ldb, a, 1,
              beta, c, 1);
    else if (to_vector && n == 1 && (!b_plain || ldb == 1)) /* C = op(A) B */
        sgemv(ROW_MAJOR, trans_a, a_plain ? m : k, a_plain ? k : m, alpha, a, lda, b, 1, beta, c, ldc);
    else
        sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
