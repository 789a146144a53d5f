/* Products of float32 matrices by the tiles of AMX, which multiply bfloat16 and add in float32.

   Each operand is rounded to bfloat16 once (one part), or is the sum of two bfloat16, of which three of the
   four products are added: high high + high low + low high (two parts; JAX calls that BF16_BF16_F32_X3). What
   is left out of the operands and of their product is below 2^-18 each, so that an entry of the result is off
   by at most 3 * 2^-18 of the sum of absolute values, beside the rounding of the sums.

   A panel is 32 rows of op(A), or 32 columns of op(B), and some of their terms: for every 32 terms two tiles of
   16 rows of 64 bytes, with two parts two tiles of the low parts after those. A row of a tile of op(A) is 32
   terms of one row; a row of a tile of op(B) is two terms, one beside the other, of 16 columns. All rows of
   op(A) are packed first, then each panel of op(B) just before it is used, so that the one lies in the second
   level of the cache and the other in the first. Every entry is summed in an order that the number of terms
   alone decides, so that its bits do not depend on how a product is split among threads.

   The tiles take numbers below 2^-126 for 0.

   Source of the instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter
   18; of Linux's permission: Documentation/arch/x86/xstate.rst. */

#define _GNU_SOURCE /* syscall */
#include "products.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(PORTABLE) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
    SIDE = 32,          /* rows or columns of a panel */
    TERMS = 32,         /* of a tile */
    TILE_BYTES = 1024,
    BLOCK_TERMS = 2048, /* of a panel at most, or half with two parts: its sums stay in tiles */
    COLUMNS = 256,      /* of op(B) that are packed at a time */
    MOST_ROWS = 1024,   /* of op(A) */
};

/* Where bits of |x| begin that bfloat16 rounds to infinity, or that are infinity or NaN. */
static const uint32_t TOO_LARGE = 0x7f7f8000;

/* --- packing ------------------------------------------------------------------------------------------ */

/* op(A) or op(B) as it is stored: the terms of a row or column stand side by side, or else its neighbours.
   op(B) may be a packed weight, whose numbers are made when they are packed into panels. */
struct operand {
    const float *numbers;
    size_t step;
    int terms_inside;
    const struct header *weight; /* or NULL */
};

static inline int smaller(int a, int b) { return a < b ? a : b; }

INLINE __mmask16 first(int count) { return (__mmask16)(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1); }

/* 32 numbers as bfloat16 in `high` and, with two parts, what that leaves out of them in `low`. */
INLINE void split(__m512 x, __m512 y, int parts, __m512i *high, __m512i *low) {
    *high = (__m512i)_mm512_cvtne2ps_pbh(y, x);
    if (parts == 1) return;
    __m512 x_high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(*high)), 16);
    __m512 y_high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(*high, 1)), 16);
    *low = (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(y, y_high), _mm512_sub_ps(x, x_high));
}

/* Turn 16 rows of 16 words around. */
INLINE void transpose(void *tile) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512((char *)tile + 64 * i);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* r[4 q + i] has column 4 l + i of rows 4 q to 4 q + 3 in its lane l */
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_store_si512((char *)tile + 64 * i, _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
        _mm512_store_si512((char *)tile + 64 * (4 + i), _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
        _mm512_store_si512((char *)tile + 64 * (8 + i), _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
        _mm512_store_si512((char *)tile + 64 * (12 + i), _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
    }
}

/* Number `at` of what a packed weight has one of for each group. */
INLINE __m512 of_group(const void *numbers, size_t at, int type) {
    const uint16_t half = ((const uint16_t *)numbers)[at * (type != FLOAT32)];
    if (type == FLOAT32) return _mm512_set1_ps(((const float *)numbers)[at]);
    if (type == BFLOAT16) return (__m512)_mm512_set1_epi32(half << 16);
    return _mm512_cvtph_ps(_mm256_set1_epi16((short)half));
}

/* 16 numbers of a packed weight, as packed.c expands them; `column` is a multiple of 16. */
INLINE __m512 expanded(const struct header *weight, size_t row, size_t column) {
    const int bits = weight->bits;
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i first_bits = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(bits));
    const uint32_t *from = weight->words + (row * (size_t)weight->inputs + column) * (size_t)bits / 32;
    const __m512i words = _mm512_maskz_loadu_epi32(first(bits / 2), from);
    const __m512i of_lane = _mm512_permutexvar_epi32(_mm512_srli_epi32(first_bits, 5), words);
    const __m512i values = _mm512_and_si512(
        _mm512_srlv_epi32(of_lane, _mm512_and_si512(first_bits, _mm512_set1_epi32(31))),
        _mm512_set1_epi32((1 << bits) - 1));
    const size_t group = row * (size_t)(weight->inputs / weight->group) + column / (size_t)weight->group;
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(values), of_group(weight->scales, group, weight->type),
                           of_group(weight->biases, group, weight->type));
}

/* Numbers of a row as it is stored, from a column on; 0 where the mask says so. */
INLINE __m512 numbers_at(const struct operand *o, int is_packed, size_t row, size_t column, __mmask16 mask) {
    if (!is_packed) return _mm512_maskz_loadu_ps(mask, o->numbers + row * o->step + column);
    return mask ? expanded(o->weight, row, column) : _mm512_setzero_ps();
}

/* One tile of `count` rows or columns from `at` on, and of `terms` terms of each from `from` on, the rest of it 0.
   In a tile for op(A) a row is a row of it; in one for op(B) it is two terms of all columns, which is the same
   turned around. */
INLINE void pack_tile(char *tile, const struct operand *o, int terms_inside, int for_a, int is_packed, int at, int count,
                      int from, int terms, int parts, __m512i *largest) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i beside = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                            22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const int rows = terms_inside ? count : (terms + 1) / 2;
    const __mmask16 left = terms_inside ? first(terms) : first(count);
    for (int i = 0; i < 16; i++) {
        __m512i high = _mm512_setzero_si512(), low = high;
        if (i < rows) {
            const size_t row = terms_inside ? at + i : from + 2 * i, column = terms_inside ? from : at;
            __m512 even = numbers_at(o, is_packed, row, column, left);
            __m512 odd = terms_inside ? numbers_at(o, is_packed, row, column + 16, first(terms - 16))
                         : 2 * i + 1 < terms ? numbers_at(o, is_packed, row + 1, column, left)
                                             : _mm512_setzero_ps();
            *largest = _mm512_max_epu32(*largest, _mm512_and_si512((__m512i)even, magnitude));
            *largest = _mm512_max_epu32(*largest, _mm512_and_si512((__m512i)odd, magnitude));
            split(even, odd, parts, &high, &low);
            if (!terms_inside) {
                high = _mm512_permutexvar_epi16(beside, high);
                if (parts == 2) low = _mm512_permutexvar_epi16(beside, low);
            }
        }
        _mm512_store_si512(tile + 64 * i, high);
        if (parts == 2) _mm512_store_si512(tile + 2 * TILE_BYTES + 64 * i, low);
    }
    if (terms_inside != for_a) {
        transpose(tile);
        if (parts == 2) transpose(tile + 2 * TILE_BYTES);
    }
}

/* Panels one after the other, `size` bytes each: `count` rows or columns from `at` on, and `terms` terms of them from
   `from` on. Where neighbours stand side by side, they are read along them. */
INLINE void pack_as(char *panels, size_t size, const struct operand *o, int terms_inside, int for_a, int is_packed,
                    int at, int count, int from, int terms, int parts, __m512i *largest) {
    const int tiles = (count + 15) / 16, times = (terms + TERMS - 1) / TERMS;
    for (int i = 0; i < tiles * times; i++) {
        const int tile = terms_inside ? i / times : i % tiles, time = terms_inside ? i % times : i / tiles;
        pack_tile(panels + tile / 2 * size + (time * 2 * parts + tile % 2) * TILE_BYTES, o, terms_inside, for_a,
                  is_packed, at + tile * 16, smaller(16, count - tile * 16), from + time * TERMS,
                  smaller(TERMS, terms - time * TERMS), parts, largest);
    }
}

/* As pack_as, whatever the operand is. */
TARGET static void pack(char *panels, size_t size, const struct operand *o, int for_a, int at, int count, int from,
                        int terms, int parts, __m512i *largest) {
#define PACK(inside, a, packed, p) \
    if (o->terms_inside == inside && for_a == a && (o->weight != NULL) == packed && parts == p) \
        pack_as(panels, size, o, inside, a, packed, at, count, from, terms, p, largest)
    PACK(1, 1, 0, 1);
    PACK(1, 1, 0, 2);
    PACK(1, 0, 0, 1);
    PACK(1, 0, 0, 2);
    PACK(0, 1, 0, 1);
    PACK(0, 1, 0, 2);
    PACK(0, 0, 0, 1);
    PACK(0, 0, 0, 2);
    PACK(1, 0, 1, 1);
    PACK(1, 0, 1, 2);
    PACK(0, 0, 1, 1);
    PACK(0, 0, 1, 2);
#undef PACK
}

/* --- multiplying -------------------------------------------------------------------------------------- */

/* All eight tiles have 16 rows of 64 bytes. */
struct configuration {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

TARGET static void take_tiles(void) {
    struct configuration c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.row_bytes[i] = 64;
        c.rows[i] = 16;
    }
    _tile_loadconfig(&c);
}

/* Tiles 0 to 3 += the products of tiles 4 and 5 of op(A) with tiles 6 and 7 of op(B). */
INLINE void multiply_tiles(int two_rows, int two_columns) {
    _tile_dpbf16ps(0, 4, 6);
    if (two_columns) _tile_dpbf16ps(1, 4, 7);
    if (two_rows) _tile_dpbf16ps(2, 5, 6);
    if (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
}

INLINE void multiply_as(const char *a, const char *b, int steps, int parts, int two_rows, int two_columns) {
    const int size = 2 * parts * TILE_BYTES;
    for (int s = 0; s < steps; s++, a += size, b += size) {
        _tile_loadd(6, b, 64);
        if (two_columns) _tile_loadd(7, b + TILE_BYTES, 64);
        if (parts == 2) { /* the small ones first */
            _tile_loadd(4, a + 2 * TILE_BYTES, 64);
            if (two_rows) _tile_loadd(5, a + 3 * TILE_BYTES, 64);
            multiply_tiles(two_rows, two_columns);
        }
        _tile_loadd(4, a, 64);
        if (two_rows) _tile_loadd(5, a + TILE_BYTES, 64);
        multiply_tiles(two_rows, two_columns);
        if (parts == 2) {
            _tile_loadd(6, b + 2 * TILE_BYTES, 64);
            if (two_columns) _tile_loadd(7, b + 3 * TILE_BYTES, 64);
            multiply_tiles(two_rows, two_columns);
        }
    }
}

/* c (rows, columns) = alpha sums + beta c; with a beta of 0, c is not read. */
TARGET static void add_sums(const float *sums, float alpha, float beta, float *c, size_t step, int rows,
                            int columns) {
    for (int i = 0; i < rows; i++, c += step)
        for (int j = 0; j < columns; j += 16) {
            const __mmask16 mask = first(columns - j);
            __m512 x = _mm512_mul_ps(_mm512_set1_ps(alpha), _mm512_load_ps(sums + i * SIDE + j));
            if (beta != 0) x = _mm512_fmadd_ps(_mm512_set1_ps(beta), _mm512_maskz_loadu_ps(mask, c + j), x);
            _mm512_mask_storeu_ps(c + j, mask, x);
        }
}

INLINE void load_sums(const float *c, size_t step) {
    _tile_loadd(0, c, 4 * step);
    _tile_loadd(1, c + 16, 4 * step);
    _tile_loadd(2, c + 16 * step, 4 * step);
    _tile_loadd(3, c + 16 * step + 16, 4 * step);
}

INLINE void store_sums(float *c, size_t step) {
    _tile_stored(0, c, 4 * step);
    _tile_stored(1, c + 16, 4 * step);
    _tile_stored(2, c + 16 * step, 4 * step);
    _tile_stored(3, c + 16 * step + 16, 4 * step);
}

/* Where a product of two panels goes: (rows, columns) of c, with alpha and beta. */
struct place {
    float alpha, beta, *c;
    size_t step;
    int rows, columns;
};

/* Add the product of two panels to `sums` (32, 32), which hold nothing when it is the first; when it is the last,
   they go to their place. */
TARGET static void multiply_panels(const char *a, const char *b, int steps, int parts, float *sums, int is_first,
                                   int is_last, const struct place *to) {
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        load_sums(sums, SIDE);
    }
#define MULTIPLY(p, two_rows, two_columns) \
    if (parts == p && (to->rows > 16) == two_rows && (to->columns > 16) == two_columns) \
        multiply_as(a, b, steps, p, two_rows, two_columns)
    MULTIPLY(1, 1, 1);
    MULTIPLY(1, 1, 0);
    MULTIPLY(1, 0, 1);
    MULTIPLY(1, 0, 0);
    MULTIPLY(2, 1, 1);
    MULTIPLY(2, 1, 0);
    MULTIPLY(2, 0, 1);
    MULTIPLY(2, 0, 0);
#undef MULTIPLY
    if (is_last && to->rows == SIDE && to->columns == SIDE && to->alpha == 1 && to->beta == 0) {
        store_sums(to->c, to->step);
        return;
    }
    store_sums(sums, SIDE);
    if (is_last) add_sums(sums, to->alpha, to->beta, to->c, to->step, to->rows, to->columns);
}

/* --- a product ---------------------------------------------------------------------------------------- */

/* Whether the numbers are none that bfloat16 cannot hold. */
TARGET static int all_fit(__m512i largest) { return _mm512_reduce_max_epu32(largest) < TOO_LARGE; }

/* Whether all numbers of a matrix, as it is stored, are such. */
TARGET static int matrix_fits(const float *x, size_t step, int rows, int columns) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < rows; i++, x += step)
        for (int j = 0; j < columns; j += 16) {
            __m512i bits = (__m512i)_mm512_maskz_loadu_ps(first(columns - j), x + j);
            largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
        }
    return all_fit(largest);
}

/* A product, and the memory of this thread for it. */
struct work {
    struct operand left, right;
    int parts, k, blocks, terms; /* of a block of terms; of the last one fewer */
    size_t panel;                /* bytes of one */
    char *a, *b;                 /* panels of op(A), block by block, and of op(B) for a block */
    float *sums;
    __m512i largest;
};

/* Set all but `largest`, for at most `rows` rows at a time; 0 where there is no memory. */
static int take_memory(struct work *w, int rows) {
    w->blocks = (w->k + BLOCK_TERMS / w->parts - 1) / (BLOCK_TERMS / w->parts);
    w->terms = ((w->k + w->blocks - 1) / w->blocks + TERMS - 1) / TERMS * TERMS;
    w->panel = (size_t)w->terms / TERMS * 2 * w->parts * TILE_BYTES;
    const size_t panels = ((size_t)rows + SIDE - 1) / SIDE;
    const size_t a = panels * w->blocks * w->panel, b = COLUMNS / SIDE * w->panel;
    w->a = scratch(FOR_TILES, a + b + panels * SIDE * COLUMNS * sizeof *w->sums);
    if (!w->a) return 0;
    w->b = w->a + a;
    w->sums = (float *)(w->b + b);
    return 1;
}

/* The rows of C from `at` on, and its columns from `first_column` on, where `to` is the place of the first. */
TARGET static void multiply_rows(struct work *w, int at, int rows, int first_column, int n, const struct place *to) {
    const int panels = (rows + SIDE - 1) / SIDE;
    for (int t = 0; t < w->blocks; t++)
        pack(w->a + t * panels * w->panel, w->panel, &w->left, 1, at, rows, t * w->terms,
             smaller(w->terms, w->k - t * w->terms), w->parts, &w->largest);
    for (int j = 0; j < n; j += COLUMNS)
        for (int t = 0; t < w->blocks; t++) {
            const int columns = smaller(COLUMNS, n - j), terms = smaller(w->terms, w->k - t * w->terms);
            float *sums = w->sums;
            pack(w->b, w->panel, &w->right, 0, first_column + j, columns, t * w->terms, terms, w->parts, &w->largest);
            for (int p = 0; p < panels; p++)
                for (int q = 0; q < columns; q += SIDE, sums += SIDE * SIDE) {
                    struct place here = *to;
                    here.c += (size_t)p * SIDE * to->step + j + q;
                    here.rows = smaller(SIDE, rows - p * SIDE);
                    here.columns = smaller(SIDE, columns - q);
                    multiply_panels(w->a + (t * panels + p) * w->panel, w->b + q / SIDE * w->panel,
                                    (terms + TERMS - 1) / TERMS, w->parts, sums, t == 0, t == w->blocks - 1, &here);
                }
        }
}

/* All rows of a product whose operands are set; whether no number was too large. */
TARGET static int multiply(struct work *w, int m, int first_column, int n, struct place to) {
    const int rows = smaller(m, MOST_ROWS);
    w->largest = _mm512_setzero_si512();
    if (!take_memory(w, rows)) return 0;
    take_tiles();
    for (int i = 0; i < m; i += rows, to.c += rows * to.step)
        multiply_rows(w, i, smaller(rows, m - i), first_column, n, &to);
    _tile_release();
    return all_fit(w->largest);
}

/* See products.h. */
TARGET int amx_product(int parts, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                       const float *b, int ldb, float beta, float *c, int ldc) {
    const int a_plain = trans_a == PLAIN, b_plain = trans_b == PLAIN;
    if (m <= 0 || n <= 0 || k <= 0) return 0;
    struct work w = {.left = {a, (size_t)lda, a_plain, NULL},
                     .right = {b, (size_t)ldb, !b_plain, NULL},
                     .parts = parts,
                     .k = k};
    if (beta != 0 && !(matrix_fits(a, w.left.step, a_plain ? m : k, a_plain ? k : m) &&
                       matrix_fits(b, w.right.step, b_plain ? k : n, b_plain ? n : k)))
        return 0;
    return multiply(&w, m, 0, n, (struct place){.alpha = alpha, .beta = beta, .c = c, .step = (size_t)ldc});
}

/* See products.h. */
TARGET int amx_packed_product(int parts, int back, int m, int start, int end, const float *x,
                              const struct header *weight, float *y) {
    const int terms = back ? weight->outputs : weight->inputs, sides = back ? weight->inputs : weight->outputs;
    struct work w = {.left = {x, (size_t)terms, 1, NULL},
                     .right = {NULL, 0, !back, weight},
                     .parts = parts,
                     .k = terms};
    return multiply(&w, m, start, end - start, (struct place){.alpha = 1, .c = y + start, .step = (size_t)sides});
}

/* --- whether there are tiles -------------------------------------------------------------------------- */

int amx_present(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* OSXSAVE */
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned saved = 0x600e6; /* SSE, AVX, AVX-512, and the tiles and their configuration */
    if ((low & saved) != saved || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    const unsigned amx = 1u << 22 | 1u << 24;                          /* BF16, TILE */
    if ((b & avx512) != avx512 || (d & amx) != amx) return 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1); /* AVX512_BF16 */
}

int amx_start(void) {
    static int started;
    const long request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    if (!started)
        started = amx_present() && syscall(SYS_arch_prctl, request, tile_data) == 0;
    return started;
}

#else

int amx_present(void) { return 0; }

int amx_start(void) { return 0; }

int amx_product(int parts, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                const float *b, int ldb, float beta, float *c, int ldc) {
    (void)parts, (void)trans_a, (void)trans_b, (void)m, (void)n, (void)k, (void)alpha, (void)a, (void)lda;
    (void)b, (void)ldb, (void)beta, (void)c, (void)ldc;
    return 0;
}

int amx_packed_product(int parts, int back, int m, int start, int end, const float *x, const struct header *weight,
                       float *y) {
    (void)parts, (void)back, (void)m, (void)start, (void)end, (void)x, (void)weight, (void)y;
    return 0;
}

#endif
