/* Products of few rows of residues: x W mod p, when a worker decodes; what it computes is written down in
 * worker/residues.py (`int8_product`, then `reduce`), and has the same bits here.
 *
 * With few rows the time is that of reading W. It is read once, row after row in groups of DEPTH, as it lies in memory
 * (a packed copy would double a worker's memory), each group from left to right, which is DEPTH streams that the CPU's
 * prefetchers follow. The sums of a group are added up in a buffer that stays in the cache.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH 64  /* rows of W at a time; a multiple of 4 */
#define WIDTH 64  /* columns of a block: bytes of a vector */
#define AHEAD 4   /* blocks: how early the next ones are asked for */
#define ROWS 5    /* of x whose sums are in registers at a time: 4 vectors each */
#define SHIFT 128 /* makes residues of x unsigned, as the instruction wants its first factor */

int64_t reduce(const int32_t *x, int64_t n, int32_t prime, int8_t *out);

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define INLINE static inline __attribute__((always_inline))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,prefer-vector-width=512")))

/* Add to sums[r][4][16] what `depth` rows of W from w on, and of x from u[r] on, give in one block of columns. Element e
 * of lane l of vector v is column 16 l + 4 v + e: the order in which four rows of bytes are woven into words of four. */
INLINE VNNI void block(const uint8_t *u, int64_t stride, int rows, const int8_t *w, int64_t m, int64_t depth,
                       int64_t left, __mmask64 columns, int64_t ahead, int32_t *sums, int64_t apart) {
    __m512i a[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 4; v++) a[r][v] = _mm512_loadu_si512(sums + r * apart + 16 * v);
    for (int64_t i = 0; i < depth; i += 4) {
        __m512i q[4], t[4];
        for (int64_t j = 0; j < 4; j++) { /* below the last row its own bytes, which x's zeros multiply */
            const int8_t *row = w + (i + j < left ? i + j : left - 1) * m;
            __builtin_prefetch((const void *)((uintptr_t)row + (uintptr_t)ahead));
            q[j] = _mm512_maskz_loadu_epi8(columns, row);
        }
        t[0] = _mm512_unpacklo_epi8(q[0], q[1]), t[1] = _mm512_unpackhi_epi8(q[0], q[1]);
        t[2] = _mm512_unpacklo_epi8(q[2], q[3]), t[3] = _mm512_unpackhi_epi8(q[2], q[3]);
        q[0] = _mm512_unpacklo_epi16(t[0], t[2]), q[1] = _mm512_unpackhi_epi16(t[0], t[2]);
        q[2] = _mm512_unpacklo_epi16(t[1], t[3]), q[3] = _mm512_unpackhi_epi16(t[1], t[3]);
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, u + r * stride + i, 4);
            const __m512i x = _mm512_set1_epi32(four);
            for (int v = 0; v < 4; v++) a[r][v] = _mm512_dpbusd_epi32(a[r][v], x, q[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 4; v++) _mm512_storeu_si512(sums + r * apart + 16 * v, a[r][v]);
}

/* One plane. u: n + 1 rows of x + SHIFT, `stride` apart and zeros beyond k; the last is SHIFT alone, and gives what the
 * shift has added to each column. sums: (n + 1) times `apart`, zeros. */
VNNI static void plane(const uint8_t *u, int64_t stride, int64_t n, int64_t k, const int8_t *w, int64_t m, int32_t prime,
                       int32_t *sums, int64_t apart, int32_t *line, int8_t *out) {
    for (int64_t i = 0; i < k; i += DEPTH) {
        const int64_t left = k - i, depth = left < DEPTH ? (left + 3) / 4 * 4 : DEPTH;
        for (int64_t c = 0; c < m; c += WIDTH) {
            const __mmask64 columns = m - c < WIDTH ? ((__mmask64)1 << (m - c)) - 1 : ~(__mmask64)0;
            /* What is read AHEAD blocks later: further right, or at the left of the next group. */
            const int64_t ahead = AHEAD * WIDTH + (c + AHEAD * WIDTH < m ? 0 : (DEPTH - 1) * m);
            for (int64_t r = 0; r <= n; r += ROWS) {
                const uint8_t *x = u + r * stride + i;
                const int8_t *from = w + i * m + c;
                int32_t *to = sums + r * apart + c;
                switch (n + 1 - r) { /* the compiler unrolls each */
                case 1: block(x, stride, 1, from, m, depth, left, columns, ahead, to, apart); break;
                case 2: block(x, stride, 2, from, m, depth, left, columns, ahead, to, apart); break;
                case 3: block(x, stride, 3, from, m, depth, left, columns, ahead, to, apart); break;
                case 4: block(x, stride, 4, from, m, depth, left, columns, ahead, to, apart); break;
                default: block(x, stride, ROWS, from, m, depth, left, columns, ahead, to, apart);
                }
            }
        }
    }
    for (int64_t r = 0; r < n; r++) {
        for (int64_t c = 0; c < apart; c += WIDTH) {
            const int32_t *of_x = sums + r * apart + c, *of_shift = sums + n * apart + c;
            for (int v = 0; v < 4; v++)
                for (int l = 0; l < 4; l++)
                    for (int e = 0; e < 4; e++)
                        line[c + 16 * l + 4 * v + e] = /* modulo 2^32, as the instruction adds */
                            (int32_t)((uint32_t)of_x[16 * v + 4 * l + e] - (uint32_t)of_shift[16 * v + 4 * l + e]);
        }
        reduce(line, m, prime, out + r * m);
    }
}

int64_t few_rows(const int8_t *x, int64_t n, int64_t k, const int8_t *w, int64_t m, const int32_t *primes, int64_t begin,
                 int64_t end, int8_t *out) {
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vnni")) return 1;
    const int64_t stride = (k + 3) / 4 * 4, apart = (m + WIDTH - 1) / WIDTH * WIDTH;
    uint8_t *u = malloc((size_t)((n + 1) * stride));
    int32_t *sums = malloc((size_t)((n + 2) * apart) * sizeof *sums);
    if (u && sums)
        for (int64_t l = begin; l < end; l++) {
            memset(u, 0, (size_t)((n + 1) * stride));
            for (int64_t r = 0; r < n; r++)
                for (int64_t j = 0; j < k; j++) u[r * stride + j] = (uint8_t)(x[(l * n + r) * k + j] + SHIFT);
            memset(u + n * stride, SHIFT, (size_t)k);
            memset(sums, 0, (size_t)((n + 1) * apart) * sizeof *sums);
            plane(u, stride, n, k, w + l * k * m, m, primes[l], sums, apart, sums + (n + 1) * apart, out + l * n * m);
        }
    const int64_t failed = u && sums ? 0 : -1;
    free(u), free(sums);
    return failed;
}
#else
int64_t few_rows(const int8_t *x, int64_t n, int64_t k, const int8_t *w, int64_t m, const int32_t *primes, int64_t begin,
                 int64_t end, int8_t *out) {
    (void)x, (void)n, (void)k, (void)w, (void)m, (void)primes, (void)begin, (void)end, (void)out;
    return 1;
}
#endif
