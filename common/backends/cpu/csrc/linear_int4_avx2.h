/* W4A16 with AVX2: inputs of 14 bits are whole, and pairs of them the fastest product. Included by linear_int4.h. */
#pragma once

#if ISA_AVX2
#define INT4_WHOLE 1 /* W4A16's inputs are one int16 instead of two digits, which int4_pairs takes */
/* sum += the products of pairs, in place: left to itself gcc moves the sums of six rows between registers and the stack. */
#if ISA_AVXVNNI
#define ADD_PAIRS(sum, w, x) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x))
#else
#define ADD_PAIRS(sum, w, x) __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(w, x)))
#endif

/* What int4_tile does, with inputs that are int16: pairs of nibbles, one in each half of 32 bits, with pairs of inputs. */
INLINE void int4_pairs(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale, const uint16_t *offset,
                       const int8_t *x, const float *x_scale, const int32_t *sums, float (*totals)[BLOCK], const int rows,
                       const int has_offset)
{
    const int columns = rows == 1 ? NV : 2;
    const int64_t groups = a->k / a->group, group_bytes = 2 * rows * a->group;
    const __m256i nibble = _mm256_set1_epi16(15);
    const float *x_sum = x_scale + a->m * groups;
    for (int64_t g = 0; g < groups; g++, w += BLOCK / 2 * a->group, x += group_bytes)
        for (int v0 = 0; v0 < NV; v0 += columns) {
            __asm__("" : "+r"(x_scale), "+r"(x_sum), "+r"(sums)); /* or they are fetched once for all columns, and spilled */
            __m256i acc[6][NV];
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++)
                acc[r][v] = _mm256_set1_epi32(sums[r * groups + g]);
            const uint8_t *p = w + v0 * VL * 4;
            const int8_t *xk = x, *end = x + group_bytes;
            do {
                if (v0 == 0) {
                    prefetch_weight(p, 1);
                    prefetch_weight(p + 64, 1);
                }
                UNROLL for (int pair = 0; pair < 4; pair++) {
                    __m256i nibbles[NV];
                    UNROLL for (int v = 0; v < columns; v++) {
                        nibbles[v] = _mm256_srli_epi16(_mm256_loadu_si256((const void *)(p + v * VL * 4)), 4 * pair);
                        if (pair < 3)
                            nibbles[v] = _mm256_and_si256(nibbles[v], nibble);
                    }
                    UNROLL for (int r = 0; r < rows; r++) {
                        const __m256i xr = _mm256_set1_epi32(word_at(xk + 16 * r + 4 * pair));
                        UNROLL for (int v = 0; v < columns; v++) ADD_PAIRS(acc[r][v], nibbles[v], xr);
                    }
                }
                p += BLOCK * 4;
                xk += 16 * rows;
            } while (xk != end);
            UNROLL for (int v = 0; v < columns; v++) {
                const int j = (v0 + v) * VL;
                const vf factor = widen_scale(scale + g * BLOCK + j);
                const vf added = has_offset ? widen_scale(offset + g * BLOCK + j) * splat(-0.125f) : (vf){0};
                UNROLL for (int r = 0; r < rows; r++) {
                    const vf sum = (vf)_mm256_cvtepi32_ps(acc[r][v]) * splat(x_scale[r * groups + g]); /* exact */
                    const vf total = fma_(sum, factor, load(totals[r] + j));
                    store(totals[r] + j, has_offset ? fma_(splat(x_sum[r * groups + g]), added, total) : total);
                }
            }
        }
}
#else
#define INT4_WHOLE 0
#define int4_pairs(...) (void)0
#endif
