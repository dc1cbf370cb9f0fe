/* Runs the kernel with all that is secret marked as undefined. Valgrind then names each place where a branch or an address
 * depends on it, which is where the time could. See test_constant_time.py. */

#include KERNEL
#include <valgrind/memcheck.h>

enum { ROWS = 5, WIDTH = 77, PRIMES = 7, CHECKS = 3, DRAWN = 5000, MADE = 3 };

static float x[ROWS * WIDTH], y[ROWS * WIDTH];
static double column[WIDTH], scales[ROWS];
static const int32_t primes[PRIMES] = {251, 241, 239, 233, 229, 227, 83};
static int8_t drawn[2 * PRIMES * ROWS * WIDTH], shares[MADE][PRIMES * ROWS * WIDTH], residues[DRAWN];
static int16_t weights[PRIMES * MADE * 3], vectors[PRIMES * CHECKS * WIDTH], images[ROWS * PRIMES * CHECKS];
static int32_t sums[DRAWN];
static uint8_t seed[32], bytes[DRAWN];

#define SECRET(array) (void)VALGRIND_MAKE_MEM_UNDEFINED(array, sizeof array)

int main(void) {
    for (int i = 0; i < ROWS * WIDTH; i++) x[i] = (float)(i % 17) - 8;
    for (int i = 0; i < WIDTH; i++) column[i] = 1;
    for (int T = 1; T <= 2; T++) {
        /* Factors of each share: sums of residues stay within 14 bits, within 16 bits, and are too large for both. */
        static const int16_t factors[MADE] = {20, 62, -125};
        for (int i = 0; i < PRIMES * MADE * (1 + T); i++) weights[i] = factors[i / (1 + T) % MADE];
        int8_t *const to[MADE] = {shares[0], shares[1], shares[2]};
        struct encoding e = {x, column, ROWS, WIDTH, 1e6, 5, primes, PRIMES, drawn, T, weights, MADE,
                             vectors, CHECKS, to, scales, images};
        SECRET(x), SECRET(column), SECRET(drawn), SECRET(vectors);
        if (encode(&e, 0, ROWS) < 0 || encode_any(&e, 0, ROWS) < 0) return 1;
        e.room = 0; /* rows that are integers already */
        if (encode(&e, 0, ROWS) < 0 || encode_any(&e, 0, ROWS) < 0) return 1;
    }
    const int8_t *const from[MADE] = {shares[0], shares[1], shares[2]};
    for (int checks = 0; checks <= CHECKS; checks += CHECKS) {
        struct decoding d = {from, MADE, ROWS, WIDTH, primes, PRIMES, weights, vectors, checks, images, scales, column, y};
        SECRET(shares), SECRET(images), SECRET(scales), SECRET(column), SECRET(vectors);
        if (decode(&d, 0, ROWS) < 0 || decode_any(&d, 0, ROWS) < 0) return 1;
    }
    for (int l = 0; l < PRIMES; l++) {
        SECRET(seed), SECRET(bytes), SECRET(sums);
        expand(seed, 1, primes[l], residues, DRAWN);
        keep_one_by_one(bytes, DRAWN, primes[l], residues, DRAWN);
        reduce(sums, DRAWN, primes[l], residues);
        reduce_any(sums, DRAWN, primes[l], residues);
    }
    return 0;
}
