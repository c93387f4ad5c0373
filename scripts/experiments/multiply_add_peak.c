/* What one core of this machine can multiply and add, in registers: the limit of the products of many rows.
 *
 *     gcc -O2 scripts/experiments/multiply_add_peak.c -o /tmp/peak && /tmp/peak
 *
 * For int8 on AVX2 it compares the two exact ways: pairs of int16 (`vpmaddwd` and an addition for 16 products), and
 * `vpmaddubsw` on |x| and sign(w, x) (four instructions for 32). Both operands change in each step, as a tile's do. */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CHAINS 12
#define EACH _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++)

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One loop of CHAINS independent accumulators; `step` uses w, x and a[i]. Returns 1e9 multiply-adds per second. */
#define PEAK(name, isa, vector, lanes, step)                                                                          \
    __attribute__((target(isa))) static double name(long n)                                                          \
    {                                                                                                                \
        vector a[CHAINS], w, x;                                                                                      \
        w = x = (vector){0};                                                                                         \
        EACH a[i] = w;                                                                                               \
        double start = now();                                                                                        \
        for (long j = 0; j < n; j++)                                                                                 \
            EACH                                                                                                     \
            {                                                                                                        \
                __asm__("" : "+x"(w), "+x"(x));                                                                      \
                step;                                                                                                \
                __asm__("" : "+x"(a[i]));                                                                            \
            }                                                                                                        \
        EACH __asm__("" : : "x"(a[i]));                                                                              \
        return (double)n * CHAINS * lanes / (now() - start) / 1e9;                                                   \
    }

PEAK(pairs, "avx2", __m256i, 16, a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(w, x)))
PEAK(signs, "avx2", __m256i, 32,
     a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, _mm256_sign_epi8(w, x)), _mm256_set1_epi16(1))))
PEAK(floats, "avx2,fma", __m256, 8, a[i] = _mm256_fmadd_ps(w, x, a[i]))
PEAK(vnni, "avx2,avxvnni", __m256i, 32, a[i] = _mm256_dpbusd_avx_epi32(a[i], w, x))
PEAK(vnni512, "avx512f,avx512vnni", __m512i, 64, a[i] = _mm512_dpbusd_epi32(a[i], w, x))
PEAK(floats512, "avx512f", __m512, 16, a[i] = _mm512_fmadd_ps(w, x, a[i]))
PEAK(bf16, "avx512f,avx512bf16", __m512, 32, a[i] = _mm512_dpbf16_ps(a[i], (__m512bh)w, (__m512bh)x))

__attribute__((target("amx-tile,amx-int8,amx-bf16"))) static void tiles(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    if (syscall(SYS_arch_prctl, 0x1023, 18))
        return;
    const long n = 1000000;
    _tile_loadconfig(&config);
    double start = now();
    for (long j = 0; j < n; j++) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    double middle = now();
    for (long j = 0; j < n; j++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    double end = now();
    _tile_release();
    const double products = (double)n * 4 * 16 * 16 / 1e9;
    printf("amx int8 %.0f, amx bf16 %.0f\n", products * 64 / (middle - start), products * 32 / (end - middle));
}

int main(void)
{
    const long n = 5000000;
    __builtin_cpu_init();
    printf("1e9 multiply-adds a second, one core\n");
    printf("avx2 int8 as pairs %.0f, avx2 int8 by maddubs %.0f, avx2 float32 %.0f\n", pairs(n), signs(n), floats(n));
    if (__builtin_cpu_supports("avx512vnni"))
        printf("avx512 int8 %.0f, avx512 float32 %.0f\n", vnni512(n), floats512(n));
    if (__builtin_cpu_supports("avx512bf16"))
        printf("avx512 bf16 %.0f\n", bf16(n));
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
    if (a >> 4 & 1)
        printf("avxvnni int8 %.0f\n", vnni(n));
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    if ((d >> 24 & 1) && (d >> 25 & 1))
        tiles();
    return 0;
}
