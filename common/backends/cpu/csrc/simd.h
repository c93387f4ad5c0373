/* Vectors of VL floats in the compiler's own vector types, so that one source serves every instruction set.
 * Where the hardware fuses multiply and add it is asked for by name (`fma`); everything else is compiled with
 * -ffp-contract=off, so that no result depends on what the optimiser found next to it. */
#pragma once
#include "kernels.h"

#include <math.h>
#include <string.h>
#if ISA_AVX512 || ISA_AVX2
#include <immintrin.h>
#elif ISA_DOTPROD
#include <arm_neon.h>
#endif

#if ISA_AVX512
#define VL 16
#elif ISA_AVX2
#define VL 8
#else
#define VL 4
#endif
#define NV (BLOCK / VL) /* vectors per block of outputs */

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")
/* Pins an accumulator to a register here: without it gcc orders a tile's sums so that they spill. */
#if ISA_AVX512
#define KEEP(accumulator) __asm__("" : "+v"(accumulator))
#elif ISA_AVX2
#define KEEP(accumulator) __asm__("" : "+x"(accumulator))
#elif defined(__aarch64__)
#define KEEP(accumulator) __asm__("" : "+w"(accumulator))
#else
#define KEEP(accumulator) (void)(accumulator)
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int16_t vh __attribute__((vector_size(VL * 2)));
typedef int8_t vb __attribute__((vector_size(VL)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int8_t vb_any __attribute__((vector_size(VL), aligned(1), may_alias));

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf v) { *(vf_any *)p = v; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splat_int(int32_t x) { return x - (vi){0}; }

/* The first n < VL lanes; the rest is zero on loading, untouched on storing. */
INLINE vf load_part(const float *p, int64_t n)
{
    float lanes[VL] = {0};
    memcpy(lanes, p, (size_t)n * sizeof(float));
    return load(lanes);
}
INLINE void store_part(float *p, vf v, int64_t n)
{
    float lanes[VL];
    store(lanes, v);
    memcpy(p, lanes, (size_t)n * sizeof(float));
}
INLINE vf load_up_to(const float *p, int64_t n) { return n >= VL ? load(p) : load_part(p, n); }
INLINE void store_up_to(float *p, vf v, int64_t n)
{
    if (n >= VL)
        store(p, v);
    else
        store_part(p, v, n);
}

INLINE vf fma_(vf a, vf b, vf c)
{
#if ISA_AVX512
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif ISA_AVX2
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif ISA_DOTPROD
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vf select_(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vi max_int(vi a, vi b)
{
    vi m = a > b;
    return (m & a) | (~m & b);
}
/* Of a NaN and a number these give b. x86 has instructions that do. */
INLINE vf max_(vf a, vf b)
{
#if ISA_AVX512
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif ISA_AVX2
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select_(a > b, a, b);
#endif
}
INLINE vf min_(vf a, vf b)
{
#if ISA_AVX512
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif ISA_AVX2
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select_(a < b, a, b);
#endif
}

/* Horizontal sum and maximum, always in the same tree. */
INLINE float sum_lanes(vf v)
{
#if ISA_AVX512 || ISA_AVX2
#if ISA_AVX512
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#else
    __m256 half = (__m256)v;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float lanes[VL];
    store(lanes, v);
    for (int step = VL / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            lanes[i] += lanes[i + step];
    return lanes[0];
#endif
}
INLINE float max_lanes(vf v)
{
    float lanes[VL];
    store(lanes, v);
    float best = lanes[0];
    for (int i = 1; i < VL; i++)
        best = lanes[i] > best ? lanes[i] : best;
    return best;
}

/* Of integers any order will do. */
INLINE int32_t sum_int_lanes(vi v)
{
#if ISA_AVX512
    return _mm512_reduce_add_epi32((__m512i)v);
#elif ISA_AVX2
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
#else
    int32_t sum = 0;
    for (int lane = 0; lane < VL; lane++)
        sum += v[lane];
    return sum;
#endif
}
INLINE int32_t max_int_lanes(vi v)
{
#if ISA_AVX512
    return _mm512_reduce_max_epi32((__m512i)v);
#elif ISA_AVX2
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
#else
    int32_t best = v[0];
    for (int lane = 1; lane < VL; lane++)
        best = v[lane] > best ? v[lane] : best;
    return best;
#endif
}

/* Round half to even for |x| < 2^22; the integer stands in the low bits of the sum. */
#define ROUND_MAGIC 12582912.0f
INLINE vi round_to_int(vf x)
{
    return (vi)(x + ROUND_MAGIC) - (vi)splat(ROUND_MAGIC);
}

/* Integers between -128 and 127 as bytes (others end anywhere). */
INLINE vb narrow(vi x)
{
#if ISA_AVX2 && !ISA_AVX512 /* which gcc would take apart lane by lane */
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    __m128i bytes = _mm_packs_epi16(words, words);
    vb low;
    memcpy(&low, &bytes, sizeof low);
    return low;
#else
    return __builtin_convertvector(x, vb);
#endif
}

/* e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor series to r^7 (remainder 5e-9).
 * Arguments are clamped to [-87.3, 88.3], the range in which the result is a normal number; NaN stays NaN. */
INLINE vf exp_(vf x)
{
    x = min_(splat(88.3f), max_(splat(-87.3f), x));
    vf shifted = fma_(x, splat(1.44269504088896341f), splat(ROUND_MAGIC));
    vf n = shifted - ROUND_MAGIC;
    vf r = fma_(n, splat(-0.693359375f), x);
    r = fma_(n, splat(2.12194440054690583e-4f), r);
    vf p = splat(1.0f / 5040);
    p = fma_(p, r, splat(1.0f / 720));
    p = fma_(p, r, splat(1.0f / 120));
    p = fma_(p, r, splat(1.0f / 24));
    p = fma_(p, r, splat(1.0f / 6));
    p = fma_(p, r, splat(0.5f));
    p = fma_(p, r * r, r) + 1.0f;
    vu exponent = ((vu)shifted - (vu)splat(ROUND_MAGIC)) << 23; /* unsigned: a NaN's bits may wrap */
    return (vf)((vu)p + exponent);
}

/* Fetches a line 2 KiB ahead: past the end of the page, where the hardware's prefetcher stops. Weights that are read
 * once per call (`once`) go to the L2 cache only. Not past the caches (`prefetchnta`): on an Intel server with AMX that
 * reads memory at half the speed, 6.3 instead of 12.8 GB/s of one core, and more slowly than no prefetch. */
INLINE void prefetch_weight(const void *p, const int once)
{
    if (once)
        __builtin_prefetch((const char *)p + 2048, 0, 2);
    else
        __builtin_prefetch((const char *)p + 2048, 0, 3);
}

/* This thread's share [*from, *to) of n equal items. */
INLINE void share(int64_t n, int thread, int threads, int64_t *from, int64_t *to)
{
    *from = n * thread / threads;
    *to = n * (thread + 1) / threads;
}
