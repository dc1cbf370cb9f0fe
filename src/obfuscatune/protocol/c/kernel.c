/* Arithmetic of shares over primes 64 < p < 256; what each function computes is written down, slowly, in
 * enclave/sharing/reference.py, protocol/residues.py and protocol/expand.py, and has the same bits here.
 *
 * Residues are centred: |r| <= (p - 1) / 2, one byte. Compiled without -ffast-math and without contraction, so that
 * every float64 operation rounds as IEEE 754 says; sums are of integers, so that their order is nothing to the result.
 * No function keeps anything, or chooses a branch or a place in memory by a number that is secret, except in lines marked
 * OPEN BRANCH and OPEN PLACE (tests/protocol/test_constant_time.py). A row takes a square root and two divisions.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

#define TILE 4         /* rows that share one reading of the check's vectors */
#define ROUND 6755399441055744.0 /* 1.5 2^52: adding it rounds to the nearest integer, ties to even, in the low bits */

/* A function for each kind of CPU, chosen by what the CPU can; gcc's target_clones asks for its maker's name instead. */
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define MIDDLE __attribute__((target("avx2")))
#define FOR_EACH_CPU(name, parameters, arguments)                                                          \
    WIDE static int64_t name##_wide parameters { return name##_any arguments; }                            \
    MIDDLE static int64_t name##_middle parameters { return name##_any arguments; }                        \
    int64_t name parameters {                                                                              \
        if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&                    \
            __builtin_cpu_supports("avx512vl"))                                                            \
            return name##_wide arguments;                                                                  \
        return __builtin_cpu_supports("avx2") ? name##_middle arguments : name##_any arguments;            \
    }
#else
#define FOR_EACH_CPU(name, parameters, arguments) \
    int64_t name parameters { return name##_any arguments; }
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE int32_t low_bits(double rounded) {
    int64_t bits;
    memcpy(&bits, &rounded, 8);
    return (int32_t)bits;
}

/* The centred residue of v - p / 2: floor(v / p) is v m / 2^22 with m = 2^22 / p rounded up, as long as v (p - 1) < 2^22,
 * so up to NEAR. Without a comparison, as p / 2 is added first and taken off at last. */
#define NEAR ((1 << 22) / 256)
INLINE int16_t centred(uint16_t v, uint16_t m, uint16_t p) {
    uint16_t k = (uint16_t)(((uint32_t)v * m) >> 16) >> 6;
    return (int16_t)(v - k * p - p / 2);
}

/* The same for all v below 2^16, with m rounded down: then the quotient is short by one at most. */
INLINE int16_t centred_wide(uint16_t v, uint16_t m, uint16_t p) {
    uint16_t k = (uint16_t)(((uint32_t)v * m) >> 16) >> 6;
    int16_t c = (int16_t)(v - k * p - p / 2);
    return (int16_t)(c - (p & ((p / 2 - c) >> 15))); /* without a comparison too, of which a compiler may make a branch */
}

INLINE uint16_t rounded_up(uint16_t p) { return (uint16_t)(((1 << 22) + p - 1) / p); }
INLINE uint16_t rounded_down(uint16_t p) { return (uint16_t)((1 << 22) / p); }

/* The centred residue of any int32. The quotient is off by less than 6, as |x / p| < 2^25; made positive by 8 p. */
INLINE int16_t reduced(int32_t x, uint16_t p, uint16_t m, float inverse) {
    int32_t k = (int32_t)((float)x * inverse);
    return centred((uint16_t)((uint32_t)x - (uint32_t)k * p + 8u * p + p / 2), m, p);
}

/* The same from 0 to p - 1. Not by %, whose time depends on the number on some CPUs. */
INLINE int16_t residue(int32_t x, uint16_t p, uint16_t m, float inverse) {
    int16_t r = reduced(x, p, m, inverse);
    return (int16_t)(r + (p & (r >> 15)));
}

/* What makes sums of at least -least positive: a multiple of p, and the half that `centred` takes off. */
INLINE uint16_t lift(int32_t least, uint16_t p) { return (uint16_t)((least + p - 1) / p * p + p / 2); }

/* Whether sums of at most `reach`, either way, can be reduced at all, lifted, in 16 bits; and whether by `centred`. */
INLINE int fits(int32_t reach, uint16_t p) { return 2 * reach + p + p / 2 < 1 << 16; }
INLINE int is_near(int32_t reach, uint16_t p) { return 2 * reach + p + p / 2 <= NEAR; }

INLINE void dot_tile(const int16_t *rows, int64_t width, int64_t count, const int16_t *v, int32_t *sums) {
    int32_t a = 0, b = 0, c = 0, d = 0;
    if (count == TILE) {
        for (int64_t j = 0; j < width; j++) {
            a += (int32_t)rows[j] * v[j];
            b += (int32_t)rows[width + j] * v[j];
            c += (int32_t)rows[2 * width + j] * v[j];
            d += (int32_t)rows[3 * width + j] * v[j];
        }
        sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        a = 0;
        for (int64_t j = 0; j < width; j++) a += (int32_t)rows[i * width + j] * v[j];
        sums[i] = a;
    }
}

/* rint(x column scale) of one row, and the scale that keeps its norm below `room` + `half`. A row that is not finite gives
 * zeros, and the scale NaN, of which its result will be. */
INLINE double quantize(const float *x, const double *column, int64_t width, double room, double half, double *t,
                       int32_t *q) {
    int64_t top = 0, squares = 0;
    for (int64_t j = 0; j < width; j++) {
        double value = (double)x[j] * column[j];
        int64_t bits;
        memcpy(&bits, &value, 8);
        bits &= INT64_MAX; /* of positive numbers the order of the bits is the order of the values; NaN is above all */
        top = bits > top ? bits : top;
        t[j] = value;
    }
    int64_t exponent = top >> 52;
    if (exponent == 2047) { /* OPEN BRANCH: that a row is not finite */
        memset(q, 0, (size_t)width * sizeof *q);
        return NAN;
    }
    if (room == 0) { /* integers already, within what their bound allows */
        for (int64_t j = 0; j < width; j++) q[j] = low_bits(t[j] + ROUND);
        return 1;
    }
    if (exponent < 18) { /* zeros, or so small that they are: OPEN BRANCH */
        memset(q, 0, (size_t)width * sizeof *q);
        return 1;
    }
    int64_t bits = (2064 - exponent) << 52; /* a power of two that brings the largest to 2^18..2^19 */
    double coarse;
    memcpy(&coarse, &bits, 8);
    for (int64_t j = 0; j < width; j++) {
        int64_t r = low_bits(t[j] * coarse + ROUND);
        squares += r * r;
    }
    double scale = room * coarse / (sqrt((double)squares) + half);
    for (int64_t j = 0; j < width; j++) q[j] = low_bits(t[j] * scale + ROUND);
    return scale;
}

/* Shares of rows. With T numbers drawn, share t = c0 X + c1 U1 + .. + cT UT mod p, T at most 2. */
struct encoding {
    const float *x;         /* [n, width] */
    const double *column;   /* [width] */
    int64_t n, width;
    double room, half;      /* room 0: x column is rounded as it is */
    const int32_t *primes;  /* [L] */
    int64_t L;
    const int8_t *drawn;    /* [T, L, n, width], centred */
    int64_t T;
    const int16_t *weights; /* [L, made, 1 + T], centred */
    int64_t made;
    const int16_t *vectors; /* [L, checks, width], centred */
    int64_t checks;
    int8_t *const *shares;  /* [made] of [L, n, width] */
    double *scales;         /* [n] */
    int16_t *images;        /* [n, L, checks], 0 to p - 1 */
};

/* Rows begin to end - 1. Returns `end`; -1 without memory. */
INLINE int64_t encode_any(const struct encoding *e, int64_t begin, int64_t end) {
    const int64_t width = e->width, L = e->L, T = e->T, checks = e->checks, plane = e->n * width;
    int64_t done = end;
    double *t = malloc((size_t)width * sizeof *t);
    int32_t *q = malloc((size_t)(TILE * width) * sizeof *q);
    int16_t *r = malloc((size_t)(TILE * width) * sizeof *r), *part = malloc((size_t)width * sizeof *part);
    if (!t || !q || !r || !part) {
        done = -1;
        goto end;
    }
    for (int64_t first = begin; first < end; first += TILE) {
        int64_t count = end - first < TILE ? end - first : TILE;
        for (int64_t i = 0; i < count; i++)
            e->scales[first + i] =
                quantize(e->x + (first + i) * width, e->column, width, e->room, e->half, t, q + i * width);
        for (int64_t l = 0; l < L; l++) {
            const int32_t prime = e->primes[l];
            const uint16_t p = (uint16_t)prime, m = rounded_up(p), below = rounded_down(p), four = 4 * p + p / 2;
            const float inverse = 1.0f / p;
            for (int64_t i = 0; i < count; i++) {
                const int32_t *qi = q + i * width;
                int16_t *ri = r + i * width;
                for (int64_t j = 0; j < width; j++) { /* |q| <= 2^30 + half: the quotient is off by less than 4 */
                    int32_t k = (int32_t)((float)qi[j] * inverse);
                    ri[j] = centred((uint16_t)(qi[j] - k * prime + four), m, p);
                }
                const int64_t at = l * plane + (first + i) * width;
                const int8_t *u1 = e->drawn + at, *u2 = T > 1 ? u1 + L * plane : u1;
                for (int64_t s = 0; s < e->made; s++) {
                    const int16_t *w = e->weights + (l * e->made + s) * (1 + T), *own = ri;
                    int16_t w0 = w[0], w1 = w[1], w2 = T > 1 ? w[2] : 0;
                    int32_t reach = (abs(w0) + abs(w1) + abs(w2)) * (p / 2);
                    int8_t *out = e->shares[s] + at;
                    if (!fits(reach, p)) { /* three terms: the first two by themselves */
                        const uint16_t up = lift((abs(w0) + abs(w1)) * (p / 2), p);
                        for (int64_t j = 0; j < width; j++)
                            part[j] = centred_wide((uint16_t)(w0 * ri[j] + w1 * u1[j] + up), below, p);
                        own = part, w0 = 1, w1 = 0, reach = (1 + abs(w2)) * (p / 2);
                    }
                    const uint16_t up = lift(reach, p);
                    if (w2 == 0 && is_near(reach, p))
                        for (int64_t j = 0; j < width; j++)
                            out[j] = (int8_t)centred((uint16_t)(w0 * own[j] + w1 * u1[j] + up), m, p);
                    else
                        for (int64_t j = 0; j < width; j++)
                            out[j] = (int8_t)centred_wide((uint16_t)(w0 * own[j] + w1 * u1[j] + w2 * u2[j] + up), below, p);
                }
            }
            for (int64_t k = 0; k < checks; k++) {
                int32_t sums[TILE];
                dot_tile(r, width, count, e->vectors + (l * checks + k) * width, sums);
                for (int64_t i = 0; i < count; i++)
                    e->images[((first + i) * L + l) * checks + k] = residue(sums[i], p, m, inverse);
            }
        }
    }
end:
    free(t), free(q), free(r), free(part);
    return done;
}
FOR_EACH_CPU(encode, (const struct encoding *e, int64_t begin, int64_t end), (e, begin, end))

/* Rows of products, times the inverse of M / p: interpolated at 0, checked, lifted, scaled. */
struct decoding {
    const int8_t *const *replies; /* [needed] of [L, n, width], any bytes, read once: others may change them */
    int64_t needed, n, width;
    const int32_t *primes;        /* [L] */
    int64_t L;
    const int16_t *weights;       /* [L, needed], centred */
    const int16_t *vectors;       /* [L, checks, width], centred */
    int64_t checks;
    const int16_t *images;        /* [n, L, checks] */
    const double *scales;         /* [n] */
    const double *column;         /* [width] */
    float *out;                   /* [n, width] */
};

/* Rows begin to end - 1. Returns a row at or before the first one that is wrong, or `end`; -1 without memory. */
INLINE int64_t decode_any(const struct decoding *e, int64_t begin, int64_t end) {
    const int64_t width = e->width, L = e->L, needed = e->needed, checks = e->checks, plane = e->n * width;
    int64_t done = begin;
    int16_t *r = malloc((size_t)(TILE * width) * sizeof *r);
    int32_t *parts = malloc((size_t)(2 * TILE * width) * sizeof *parts); /* of the first three primes, of the others */
    int32_t whole[2] = {1, 1};
    if (!r || !parts) {
        done = -1;
        goto end;
    }
    for (int64_t l = 0; l < L; l++) whole[l >= 3] *= e->primes[l]; /* a part is at most twice its product: below 2^31 */
    const double inverse0 = 1.0 / whole[0], inverse1 = 1.0 / whole[1];
    for (int64_t first = begin; first < end; first += TILE) {
        const int64_t count = end - first < TILE ? end - first : TILE, span = count * width;
        memset(parts, 0, (size_t)(2 * TILE * width) * sizeof *parts);
        for (int64_t l = 0; l < L; l++) {
            const int32_t prime = e->primes[l], rest = whole[l >= 3] / prime;
            const uint16_t p = (uint16_t)prime, m = rounded_up(p), below = rounded_down(p);
            const float inverse = 1.0f / p;
            const int64_t at = l * plane + first * width;
            int32_t *part = parts + (l >= 3) * TILE * width;
            for (int64_t s = 0, next; s < needed; s = next) { /* bytes that may be anything, up to three at a time */
                const int16_t *w = e->weights + l * needed + s;
                int32_t reach = s ? p / 2 : 0;
                for (next = s; next < needed && next < s + 3 && fits(reach + 128 * abs(w[next - s]), p); next++)
                    reach += 128 * abs(w[next - s]);
                const int8_t *a = e->replies[s] + at, *b = next > s + 1 ? e->replies[s + 1] + at : a,
                             *c = next > s + 2 ? e->replies[s + 2] + at : a;
                const int16_t w0 = w[0], w1 = next > s + 1 ? w[1] : 0, w2 = next > s + 2 ? w[2] : 0;
                const uint16_t up = lift(reach, p);
                if (s == 0 && is_near(reach, p))
                    for (int64_t j = 0; j < span; j++)
                        r[j] = centred((uint16_t)(w0 * a[j] + w1 * b[j] + w2 * c[j] + up), m, p);
                else if (s == 0)
                    for (int64_t j = 0; j < span; j++)
                        r[j] = centred_wide((uint16_t)(w0 * a[j] + w1 * b[j] + w2 * c[j] + up), below, p);
                else
                    for (int64_t j = 0; j < span; j++)
                        r[j] = centred_wide((uint16_t)(r[j] + w0 * a[j] + w1 * b[j] + w2 * c[j] + up), below, p);
            }
            for (int64_t j = 0; j < span; j++) part[j] += r[j] * rest;
            for (int64_t k = 0; k < checks; k++) {
                int32_t sums[TILE];
                dot_tile(r, width, count, e->vectors + (l * checks + k) * width, sums);
                for (int64_t i = 0; i < count; i++)
                    if (e->images[((first + i) * L + l) * checks + k] != residue(sums[i], p, m, inverse)) /* OPEN BRANCH */
                        goto end;
            }
        }
        for (int64_t i = 0; i < count; i++) {
            const int32_t *g0 = parts + i * width, *g1 = parts + (TILE + i) * width;
            const double unit = 1 / e->scales[first + i];
            float *out = e->out + (first + i) * width;
            for (int64_t j = 0; j < width; j++) { /* Y / M = g0 / P0 + g1 / P1 mod 1, centred; |k| <= 4 */
                int32_t k = low_bits(g0[j] * inverse0 + g1[j] * inverse1 + ROUND);
                int64_t y = (int64_t)(g0[j] - k * whole[0]) * whole[1] + (int64_t)g1[j] * whole[0];
                out[j] = (float)((double)y * e->column[j] * unit);
            }
        }
        done = first + count;
    }
end:
    free(r), free(parts);
    return done;
}
FOR_EACH_CPU(decode, (const struct decoding *e, int64_t begin, int64_t end), (e, begin, end))

/* The centred residues of int32 numbers. */
INLINE int64_t reduce_any(const int32_t *x, int64_t n, int32_t prime, int8_t *out) {
    const uint16_t p = (uint16_t)prime, m = rounded_up(p);
    const float inverse = 1.0f / p;
    for (int64_t j = 0; j < n; j++) out[j] = (int8_t)reduced(x[j], p, m, inverse);
    return n;
}
FOR_EACH_CPU(reduce, (const int32_t *x, int64_t n, int32_t prime, int8_t *out), (x, n, prime, out))

/* Keep of bytes, masked to the bits of a prime, those below p, centred; at most `wanted`. Returns how many were kept. */
INLINE int32_t mask_of(int32_t prime) { return prime < 128 ? 127 : 255; }

INLINE int64_t keep_one_by_one(const uint8_t *bytes, int64_t n, int32_t prime, int8_t *out, int64_t wanted) {
    int64_t kept = 0;
    const int32_t half = prime / 2, mask = mask_of(prime);
    for (int64_t j = 0; j < n && kept < wanted; j++) { /* OPEN BRANCH: how many are kept says nothing of those */
        int32_t b = bytes[j] & mask;
        /* Of a comparison gcc 12 makes a branch. */
        out[kept] = (int8_t)(b - (prime & ((half - b) >> 31))); /* OPEN PLACE */
        kept += (uint32_t)(b - prime) >> 31;
    }
    return kept;
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f,avx512bw,avx512vbmi2"))) static int64_t keep_by_64(const uint8_t *bytes, int64_t n,
                                                                                   int32_t prime, int8_t *out,
                                                                                   int64_t wanted) {
    int64_t kept = 0, j = 0;
    const __m512i p = _mm512_set1_epi8((char)prime), half = _mm512_set1_epi8((char)(prime / 2)),
                  mask = _mm512_set1_epi8((char)mask_of(prime));
    for (; j + 64 <= n && kept + 64 <= wanted; j += 64) { /* OPEN BRANCH */
        __m512i b = _mm512_and_si512(_mm512_loadu_si512(bytes + j), mask);
        __mmask64 good = _mm512_cmplt_epu8_mask(b, p);
        b = _mm512_mask_sub_epi8(b, _mm512_cmpgt_epu8_mask(b, half), b, p);
        _mm512_storeu_si512(out + kept, _mm512_maskz_compress_epi8(good, b)); /* OPEN PLACE */
        kept += __builtin_popcountll(good);
    }
    return kept + keep_one_by_one(bytes + j, n - j, prime, out + kept, wanted - kept);
}

/* Which of eight bytes a pattern of bits keeps, in order. The pattern says which bytes are thrown away, and so nothing of
 * those that are kept. */
static uint8_t kept_of[256][8];

__attribute__((constructor)) static void fill_kept_of(void) { /* when it is loaded; C has no shorter way to write a table */
    for (int pattern = 0; pattern < 256; pattern++)
        for (int bit = 0, kept = 0; bit < 8; bit++)
            if (pattern >> bit & 1) kept_of[pattern][kept++] = (uint8_t)bit;
}

MIDDLE static int64_t keep_by_16(const uint8_t *bytes, int64_t n, int32_t prime, int8_t *out, int64_t wanted) {
    int64_t kept = 0, j = 0;
    const __m128i p = _mm_set1_epi8((char)prime), last = _mm_set1_epi8((char)(prime - 1)),
                  upper = _mm_set1_epi8((char)(prime / 2 + 1)), mask = _mm_set1_epi8((char)mask_of(prime));
    for (; j + 16 <= n && kept + 16 <= wanted; j += 16) { /* OPEN BRANCH */
        __m128i b = _mm_and_si128(_mm_loadu_si128((const __m128i *)(bytes + j)), mask);
        const unsigned good = (unsigned)_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_min_epu8(b, last), b));
        b = _mm_sub_epi8(b, _mm_and_si128(_mm_cmpeq_epi8(_mm_max_epu8(b, upper), b), p));
        for (unsigned pattern = good, eight = 0; eight < 2; eight++, pattern >>= 8, b = _mm_srli_si128(b, 8)) {
            const __m128i order = _mm_loadl_epi64((const __m128i *)kept_of[pattern & 255]); /* OPEN PLACE */
            _mm_storel_epi64((__m128i *)(out + kept), _mm_shuffle_epi8(b, order));          /* OPEN PLACE */
            kept += __builtin_popcount(pattern & 255);
        }
    }
    return kept + keep_one_by_one(bytes + j, n - j, prime, out + kept, wanted - kept);
}
#endif

static int64_t keep_below(const uint8_t *bytes, int64_t n, int32_t prime, int8_t *out, int64_t wanted) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2"))
        return keep_by_64(bytes, n, prime, out, wanted);
    if (__builtin_cpu_supports("avx2")) return keep_by_16(bytes, n, prime, out, wanted);
#endif
    return keep_one_by_one(bytes, n, prime, out, wanted);
}

/* ChaCha20 (RFC 8439), sixteen blocks at a time: one vector holds a word of each. */
#define LANES 16
typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));
#define TURN(v, bits) ((v) << (bits) | (v) >> (32 - (bits)))
#define QUARTER(a, b, c, d)                   \
    a += b, d ^= a, d = TURN(d, 16), c += d, b ^= c, b = TURN(b, 12), a += b, d ^= a, d = TURN(d, 8), \
    c += d, b ^= c, b = TURN(b, 7)

/* The centred residues of plane `nonce` of a seed of 32 bytes: see protocol/expand.py. Returns `wanted`. */
INLINE int64_t expand_any(const uint8_t *seed, uint32_t nonce, int32_t prime, int8_t *out, int64_t wanted) {
    static const uint8_t constants[16] = {'e', 'x', 'p', 'a', 'n', 'd', ' ', '3', '2', '-', 'b', 'y', 't', 'e', ' ', 'k'};
    uint32_t start[16] = {0};
    lanes x[16], y[16], counters = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int i = 0; i < 12; i++) { /* little-endian, whatever this machine is */
        const uint8_t *b = i < 4 ? constants + 4 * i : seed + 4 * (i - 4);
        start[i] = (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
    }
    start[13] = nonce;
    for (int i = 0; i < 16; i++) x[i] = start[i] + (lanes){0};
    x[12] = counters;
    for (int64_t kept = 0; kept < wanted; x[12] += LANES) { /* OPEN BRANCH */
        for (int i = 0; i < 16; i++) y[i] = x[i];
        for (int round = 0; round < 10; round++) {
            QUARTER(y[0], y[4], y[8], y[12]), QUARTER(y[1], y[5], y[9], y[13]);
            QUARTER(y[2], y[6], y[10], y[14]), QUARTER(y[3], y[7], y[11], y[15]);
            QUARTER(y[0], y[5], y[10], y[15]), QUARTER(y[1], y[6], y[11], y[12]);
            QUARTER(y[2], y[7], y[8], y[13]), QUARTER(y[3], y[4], y[9], y[14]);
        }
        for (int i = 0; i < 16; i++) y[i] += x[i];
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < LANES; j++) y[i][j] = __builtin_bswap32(y[i][j]);
#endif
        kept += keep_below((const uint8_t *)y, sizeof y, prime, out + kept, wanted - kept);
    }
    return wanted;
}
FOR_EACH_CPU(expand, (const uint8_t *seed, uint32_t nonce, int32_t prime, int8_t *out, int64_t wanted),
             (seed, nonce, prime, out, wanted))
