/* Vectors of float32, of WIDTH elements: the one place that names instructions.
 *
 * All else is written once for both widths. -DWIDTH=8 takes AVX2 with FMA, -DWIDTH=16 AVX-512F.
 */
#ifndef TIN_VECTOR_H
#define TIN_VECTOR_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if WIDTH == 16
typedef __m512 vec;
INLINE vec v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec v_all(float x) { return _mm512_set1_ps(x); }
INLINE vec v_add(vec x, vec y) { return _mm512_add_ps(x, y); }
INLINE vec v_mul(vec x, vec y) { return _mm512_mul_ps(x, y); }
INLINE vec v_div(vec x, vec y) { return _mm512_div_ps(x, y); }
INLINE vec v_fma(vec x, vec y, vec z) { return _mm512_fmadd_ps(x, y, z); }
/* Of a NaN and a number these give y. */
INLINE vec v_min(vec x, vec y) { return _mm512_min_ps(x, y); }
INLINE vec v_max(vec x, vec y) { return _mm512_max_ps(x, y); }
INLINE vec v_round(vec x) { return _mm512_roundscale_ps(x, 8); }
INLINE vec v_floor(vec x) { return _mm512_roundscale_ps(x, 9); }
/* 0 where x is below `least`, else y; NaN is not below. */
INLINE vec v_unless_below(vec x, vec least, vec y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), y);
}
/* 2^n of whole numbers from -126 to 127. */
INLINE vec v_power(vec n) {
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}
/* The float whose bits are a whole number, which is cut off. */
INLINE vec v_bits(vec x) { return _mm512_castsi512_ps(_mm512_cvttps_epi32(x)); }
/* The lower and the upper bfloat16 of each 32 bits. */
INLINE vec v_low(const uint32_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512((const void *)p), 16));
}
INLINE vec v_high(const uint32_t *p) {
    const __m512i mask = _mm512_set1_epi32((int)0xffff0000);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512((const void *)p), mask));
}
INLINE vec v_load_narrow(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
/* Halves added: what is left is as wide as with WIDTH 8. */
INLINE __m256 v_half(vec x) {
    __m512d both = _mm512_castps_pd(x);
    __m256 low = _mm256_castpd_ps(_mm512_extractf64x4_pd(both, 0));
    return _mm256_add_ps(low, _mm256_castpd_ps(_mm512_extractf64x4_pd(both, 1)));
}
#else
typedef __m256 vec;
INLINE vec v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vec x) { _mm256_storeu_ps(p, x); }
INLINE vec v_all(float x) { return _mm256_set1_ps(x); }
INLINE vec v_add(vec x, vec y) { return _mm256_add_ps(x, y); }
INLINE vec v_mul(vec x, vec y) { return _mm256_mul_ps(x, y); }
INLINE vec v_div(vec x, vec y) { return _mm256_div_ps(x, y); }
INLINE vec v_fma(vec x, vec y, vec z) { return _mm256_fmadd_ps(x, y, z); }
INLINE vec v_min(vec x, vec y) { return _mm256_min_ps(x, y); }
INLINE vec v_max(vec x, vec y) { return _mm256_max_ps(x, y); }
INLINE vec v_round(vec x) { return _mm256_round_ps(x, 8); }
INLINE vec v_floor(vec x) { return _mm256_round_ps(x, 9); }
INLINE vec v_unless_below(vec x, vec least, vec y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_NLT_UQ), y);
}
INLINE vec v_power(vec n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
INLINE vec v_bits(vec x) { return _mm256_castsi256_ps(_mm256_cvttps_epi32(x)); }
INLINE vec v_low(const uint32_t *p) {
    __m256i both = _mm256_loadu_si256((const __m256i *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
}
INLINE vec v_high(const uint32_t *p) {
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)p), mask));
}
INLINE vec v_load_narrow(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE __m256 v_half(vec x) { return x; }
#endif

/* The sums of eight vectors: halves are added, then neighbours, twice, then halves. */
#if WIDTH == 16
INLINE __m512 v_halves(vec x, vec y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
}
INLINE __m512 v_neighbours(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
}
INLINE void v_sums(const vec x[8], float *to) {
    __m512 a = v_neighbours(v_halves(x[0], x[4]), v_halves(x[1], x[5]));
    __m512 b = v_neighbours(v_halves(x[2], x[6]), v_halves(x[3], x[7]));
    a = v_neighbours(a, b);
    a = _mm512_add_ps(_mm512_shuffle_f32x4(a, a, 0x08), _mm512_shuffle_f32x4(a, a, 0x0d));
    _mm256_storeu_ps(to, _mm512_castps512_ps256(a));
}
#else
INLINE void v_sums(const vec x[8], float *to) {
    __m256 a = _mm256_hadd_ps(v_half(x[0]), v_half(x[1]));
    __m256 b = _mm256_hadd_ps(v_half(x[2]), v_half(x[3]));
    __m256 c = _mm256_hadd_ps(v_half(x[4]), v_half(x[5]));
    __m256 d = _mm256_hadd_ps(v_half(x[6]), v_half(x[7]));
    a = _mm256_hadd_ps(a, b);
    c = _mm256_hadd_ps(c, d);
    b = _mm256_permute2f128_ps(a, c, 0x20);
    d = _mm256_permute2f128_ps(a, c, 0x31);
    _mm256_storeu_ps(to, _mm256_add_ps(b, d));
}
#endif

/* The largest element of one vector, which has no NaN. */
INLINE float v_highest(vec x) {
#if WIDTH == 16
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    __m128 four = _mm512_castps512_ps128(x);
#else
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
#endif
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

/* The sum of one vector. */
INLINE float v_sum(vec x) {
    float all[8];
    _mm256_storeu_ps(all, v_half(x));
    return ((all[0] + all[1]) + (all[2] + all[3])) + ((all[4] + all[5]) + (all[6] + all[7]));
}

INLINE float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

/* To the nearest bfloat16, of equals to the even one. */
INLINE uint16_t narrowed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float rounded(float x) { return widened(narrowed(x)); }

/* The same of each element; the instruction takes numbers below 1e-38 for zero. */
INLINE vec v_rounded(vec x) {
#ifdef AMX
    __m512i near = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(near, 16));
#elif WIDTH == 16
    const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(half, odd));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    near = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(near, _mm512_set1_epi32((int)0xffff0000)));
#else
    const __m256i half = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1);
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(half, odd));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    near = _mm256_blendv_epi8(near, quiet, nan);
    return _mm256_castsi256_ps(_mm256_and_si256(near, _mm256_set1_epi32((int)0xffff0000)));
#endif
}

/* Some floats in place. */
INLINE void round_all(float *x, int count) {
    int i = 0;
    for (; i + WIDTH <= count; i += WIDTH) v_store(x + i, v_rounded(v_load(x + i)));
    for (; i < count; i++) x[i] = rounded(x[i]);
}

/* e^x to about an ulp: 2^n times a polynomial over [-ln 2 / 2, ln 2 / 2], its coefficients those of
 * the Taylor series up to 1/7!. Below -87.3 it is that of -87.3, 1e-38; NaN stays NaN. */
INLINE vec v_exp(vec x) {
    x = v_max(v_all(-87.3f), v_min(v_all(88.3f), x));
    vec n = v_round(v_mul(x, v_all(1.44269504088896341f)));
    vec r = v_fma(n, v_all(-0.693359375f), x);
    r = v_fma(n, v_all(2.12194440e-4f), r);
    vec p = v_all(1.0f / 5040);
    p = v_fma(p, r, v_all(1.0f / 720));
    p = v_fma(p, r, v_all(1.0f / 120));
    p = v_fma(p, r, v_all(1.0f / 24));
    p = v_fma(p, r, v_all(1.0f / 6));
    p = v_fma(p, r, v_all(0.5f));
    p = v_fma(p, r, v_all(1.0f));
    p = v_fma(p, r, v_all(1.0f));
    return v_mul(p, v_power(n));
}

/* e^x to 1e-4, as torch makes the weights of attention that it rounds to bfloat16; 0 below -87.3.
 * A float's bits are about 2^23 times its logarithm. */
INLINE vec v_exp_fast(vec x) {
    vec y = v_mul(x, v_all(1.44269504088896341f));
    vec part = v_fma(v_floor(y), v_all(-1.0f), y);
    vec p = v_fma(part, v_all(-0.079204240219773236f), v_all(-0.22433836478672356f));
    p = v_fma(part, p, v_all(0.30354260500649682f));
    p = v_fma(part, p, v_all(0.00010703434948458272f));
    y = v_fma(p, v_all(-1.0f), y);
    vec made = v_bits(v_fma(v_all(8388608.0f), y, v_all(8388608.0f * 127.0f)));
    /* NaN stays NaN. */
    return v_unless_below(x, v_all(-87.3365f), v_fma(x, v_all(0.0f), made));
}

/* The same of a number, by the same steps. */
INLINE float exp_of(float x) {
    float all[WIDTH];
    v_store(all, v_exp(v_all(x)));
    return all[0];
}

/* A square of SQUARE rows of x, turned round and multiplied, in y; `ld` from a row to the next. */
#define SQUARE 8
INLINE void v_square(const float *x, size_t ldx, float times, float *y, size_t ldy) {
    __m256 r[SQUARE], s[SQUARE];
    for (int i = 0; i < SQUARE; i++)
        r[i] = _mm256_mul_ps(_mm256_loadu_ps(x + i * ldx), _mm256_set1_ps(times));
    for (int i = 0; i < SQUARE; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < SQUARE; i += 4) {
        r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(y + i * ldy, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(y + (i + 4) * ldy, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}
#endif
