/* Products of residues, x W mod p, on CPUs with AVX2 and without int8 instructions; what it computes is written down in
 * worker/residues.py (`float_product`, then `reduce`), and has the same bits here.
 *
 * An instruction multiplies sixteen int16 numbers and adds them up in pairs, exactly: twice as many products as one of
 * float32. W is read in blocks of DEPTH rows and WIDTH columns; a block becomes pairs of int16, one pair for two rows of
 * a column, and stays in the cache while all rows of x are multiplied by it.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH 64  /* rows of W at a time; even */
#define WIDTH 64  /* columns of a block: bytes of a cache line */
#define TILE 6    /* rows of x whose sums are in registers at a time: two vectors each */
#define FEW 16    /* rows of x, up to which W is read row after row, as it lies in memory, and the sums of all columns are kept */
#define PIECE 1024 /* rows of x at a time, so that the sums of WIDTH columns stay in the cache */
#define AHEAD 4   /* blocks: how early the next ones are asked for */

int64_t reduce(const int32_t *x, int64_t n, int32_t prime, int8_t *out);

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define INLINE static inline __attribute__((always_inline))
#define AVX2 __attribute__((target("avx2")))

/* Add to sums the products of pairs. With an intrinsic for the addition gcc 12 copies every sum at each step, which takes
 * 1.4 times as long. The three operands are the same in both syntaxes of assembly. */
INLINE AVX2 void add_products(__m256i *sums, __m256i a, __m256i b) {
    const __m256i products = _mm256_madd_epi16(a, b);
    __asm__("vpaddd %1, %0, %0" : "+x"(*sums) : "x"(products));
}

/* Two rows of WIDTH bytes become WIDTH pairs. */
INLINE AVX2 void weave(const int8_t *upper, const int8_t *lower, int32_t *pairs) {
    for (int j = 0; j < WIDTH; j += 16) {
        /* The middle words change places, because what follows works on each half of a vector by itself. */
        __m128i a = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(upper + j)), _MM_SHUFFLE(3, 1, 2, 0));
        __m128i b = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(lower + j)), _MM_SHUFFLE(3, 1, 2, 0));
        __m256i c = _mm256_cvtepi8_epi16(a), d = _mm256_cvtepi8_epi16(b);
        _mm256_storeu_si256((__m256i *)(pairs + j), _mm256_unpacklo_epi16(c, d));
        _mm256_storeu_si256((__m256i *)(pairs + j + 8), _mm256_unpackhi_epi16(c, d));
    }
}

/* The same of a transposed W: sixteen bytes of each of eight columns become eight pairs of each, and rows of pairs. */
INLINE AVX2 void weave_columns(const int8_t *w, int64_t across, int32_t *pairs) {
    __m256i a[8], b[8];
    for (int j = 0; j < 8; j++) a[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + j * across)));
    for (int j = 0; j < 8; j += 2)
        b[j] = _mm256_unpacklo_epi32(a[j], a[j + 1]), b[j + 1] = _mm256_unpackhi_epi32(a[j], a[j + 1]);
    for (int j = 0; j < 8; j += 4)
        for (int i = 0; i < 2; i++) {
            a[j + 2 * i] = _mm256_unpacklo_epi64(b[j + i], b[j + 2 + i]);
            a[j + 2 * i + 1] = _mm256_unpackhi_epi64(b[j + i], b[j + 2 + i]);
        }
    for (int i = 0; i < 4; i++) { /* the lower halves hold pairs 0 to 3, the upper ones 4 to 7 */
        _mm256_storeu_si256((__m256i *)(pairs + i * WIDTH), _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
        _mm256_storeu_si256((__m256i *)(pairs + (i + 4) * WIDTH), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
    }
}

/* A block of `depth` rows and `width` columns of W, whose element (i, j) is w[i down + j across], as pairs; zeros beyond. */
INLINE AVX2 void pack(const int8_t *w, int64_t down, int64_t across, int64_t depth, int64_t width, int64_t ahead,
                      int32_t *pairs) {
    static const int8_t none[WIDTH];
    int8_t ends[2][WIDTH] = {{0}};
    if (across == 1) {
        for (int64_t i = 0; i < depth; i += 2) {
            const int8_t *a = w + i * down, *b = i + 1 < depth ? a + down : none;
            if (width < WIDTH) {
                memcpy(ends[0], a, (size_t)width), memcpy(ends[1], b, (size_t)width);
                a = ends[0], b = ends[1];
            } else {
                __builtin_prefetch((const void *)((uintptr_t)a + (uintptr_t)ahead));
                __builtin_prefetch((const void *)((uintptr_t)b + (uintptr_t)ahead));
            }
            weave(a, b, pairs + i / 2 * WIDTH);
        }
        return;
    }
    if (down == 1 && depth == DEPTH && width == WIDTH) {
        for (int64_t j = 0; j < WIDTH; j += 8)
            for (int64_t i = 0; i < DEPTH; i += 16) weave_columns(w + i + j * across, across, pairs + i / 2 * WIDTH + j);
        return;
    }
    memset(pairs, 0, (size_t)((depth + 1) / 2 * WIDTH) * sizeof *pairs);
    for (int64_t j = 0; j < width; j++)
        for (int64_t i = 0; i < depth; i++)
            ((int16_t *)pairs)[(i / 2 * WIDTH + j) * 2 + i % 2] = w[i * down + j * across];
}

/* Add to `rows` rows of WIDTH sums what x, whose rows are `stride` apart, and a block of `deep` rows of pairs give. */
INLINE AVX2 void tile(const int16_t *x, int64_t stride, int rows, const int32_t *pairs, int64_t deep, int32_t *sums) {
    for (int j = 0; j < WIDTH; j += 16) {
        __m256i a[TILE][2];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < 2; v++) a[r][v] = _mm256_loadu_si256((const __m256i *)(sums + r * WIDTH + j + 8 * v));
        for (int64_t i = 0; i < deep; i++) {
            const __m256i b = _mm256_loadu_si256((const __m256i *)(pairs + i * WIDTH + j));
            const __m256i c = _mm256_loadu_si256((const __m256i *)(pairs + i * WIDTH + j + 8));
            for (int r = 0; r < rows; r++) {
                int32_t two;
                memcpy(&two, x + r * stride + 2 * i, 4);
                const __m256i q = _mm256_set1_epi32(two);
                add_products(&a[r][0], q, b), add_products(&a[r][1], q, c);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < 2; v++) _mm256_storeu_si256((__m256i *)(sums + r * WIDTH + j + 8 * v), a[r][v]);
    }
}

/* u: n rows of x, `stride` apart and zeros beyond k. sums: n rows for each block of a strip of columns. */
AVX2 static void strips(const int16_t *u, int64_t stride, int64_t n, int64_t k, const int8_t *w, int64_t down,
                        int64_t across, int64_t m, int32_t prime, int64_t strip, int32_t *pairs, int32_t *sums,
                        int8_t *out) {
    for (int64_t s = 0; s < m; s += strip) {
        const int64_t end = s + strip < m ? s + strip : m;
        memset(sums, 0, (size_t)(n * strip) * sizeof *sums);
        for (int64_t i = 0; i < k; i += DEPTH) {
            const int64_t depth = k - i < DEPTH ? k - i : DEPTH, deep = (depth + 1) / 2;
            for (int64_t c = s; c < end; c += WIDTH) {
                /* What is read AHEAD blocks later: further right, or at the left of the next rows; or just below. */
                const int64_t ahead = strip == WIDTH          ? DEPTH * down
                                      : c + AHEAD * WIDTH < m ? AHEAD * WIDTH
                                                              : AHEAD * WIDTH + (DEPTH - 1) * down;
                int32_t *to = sums + (c - s) * n;
                pack(w + i * down + c * across, down, across, depth, end - c < WIDTH ? end - c : WIDTH, ahead, pairs);
                for (int64_t r = 0; r < n; r += TILE, to += TILE * WIDTH) {
                    const int16_t *x = u + r * stride + i;
                    switch (n - r) { /* the compiler unrolls each */
                    case 1: tile(x, stride, 1, pairs, deep, to); break;
                    case 2: tile(x, stride, 2, pairs, deep, to); break;
                    case 3: tile(x, stride, 3, pairs, deep, to); break;
                    case 4: tile(x, stride, 4, pairs, deep, to); break;
                    case 5: tile(x, stride, 5, pairs, deep, to); break;
                    default: tile(x, stride, TILE, pairs, deep, to);
                    }
                }
            }
        }
        for (int64_t c = s; c < end; c += WIDTH)
            for (int64_t r = 0; r < n; r++)
                reduce(sums + (c - s) * n + r * WIDTH, end - c < WIDTH ? end - c : WIDTH, prime, out + r * m + c);
    }
}

/* out [n, m] of x [n, k], both contiguous, and of W: element (i, j) is w[i down + j across]. Returns 1 where the CPU cannot,
 * -1 without memory. */
int64_t pairs_product(const int8_t *x, int64_t n, int64_t k, const int8_t *w, int64_t down, int64_t across, int64_t m,
                      int32_t prime, int8_t *out) {
    if (!__builtin_cpu_supports("avx2")) return 1;
    const int64_t most = n < PIECE ? n : PIECE, stride = (k + 1) / 2 * 2;
    const int64_t strip = n > FEW ? WIDTH : (m + WIDTH - 1) / WIDTH * WIDTH;
    int16_t *u = malloc((size_t)(most * stride) * sizeof *u + 1); /* 1: none is empty */
    int32_t *pairs = malloc(DEPTH / 2 * WIDTH * sizeof *pairs), *sums = malloc((size_t)(most * strip) * sizeof *sums + 1);
    const int64_t failed = u && pairs && sums ? 0 : -1;
    for (int64_t begin = 0; begin < n && !failed; begin += PIECE) {
        const int64_t rows = n - begin < PIECE ? n - begin : PIECE;
        for (int64_t r = 0; r < rows; r++) {
            u[r * stride + stride - 1] = 0; /* beyond k, where k is odd */
            for (int64_t j = 0; j < k; j++) u[r * stride + j] = x[(begin + r) * k + j];
        }
        strips(u, stride, rows, k, w, down, across, m, prime, strip, pairs, sums, out + begin * m);
    }
    free(u), free(pairs), free(sums);
    return failed;
}
#else
int64_t pairs_product(const int8_t *x, int64_t n, int64_t k, const int8_t *w, int64_t down, int64_t across, int64_t m,
                      int32_t prime, int8_t *out) {
    (void)x, (void)n, (void)k, (void)w, (void)down, (void)across, (void)m, (void)prime, (void)out;
    return 1;
}
#endif
