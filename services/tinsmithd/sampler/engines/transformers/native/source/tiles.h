/* Products on AMX, whose tiles multiply bfloat16 and sum in float32.
 *
 * A float32 is the sum of three bfloat16, to 24 bits: its nearest, the nearest of what is left, and
 * again. Where weights are bfloat16 themselves, each term of a product is exact, and a result is as
 * good as a sum in float32. The instructions sum a row by itself, in one order whatever the rows
 * beside it. Rows that are bfloat16 themselves are one part in place of three.
 */
#ifndef TIN_TILES_H
#define TIN_TILES_H

#include "products.h"

#define TILE_ROWS 16
#define TILE_K 32
/* Parts of a float32. */
#define SPLITS 3
/* Elements of a part of a block of rows, per TILE_K. */
#define PART (TILE_ROWS * TILE_K)

/* Rows as they are, and their splits where products of them go by tiles: blocks of TILE_ROWS rows,
 * `[k / TILE_K][parts][TILE_ROWS][TILE_K]` each. */
typedef struct {
    const float *x;
    size_t ldx;
    int rows, parts; /* SPLITS, or 1 where x is bfloat16 */
    const uint16_t *splits;
} input;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_shapes;

#ifdef AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Chains of this many k are summed, and then their sums. */
#define TILED_K 1024
#define REQUEST_PERMISSION 0x1023
#define TILE_DATA 18

/* Whether the kernel lets this process have tiles. */
static int tiles_granted(void) {
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

INLINE int tiled(const matrix *w) { return w->narrow && w->k % TILE_K == 0; }

/* Floats that the splits of so many rows take. */
INLINE size_t split_floats(size_t rows, size_t k, int parts) {
    size_t blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return blocks * ((k + TILE_K - 1) / TILE_K) * parts * PART / 2;
}

/* The shapes of a thread's tiles: those from `whole` on have TILE_ROWS rows, others `rows`. */
static void tiles_shaped(int rows, int whole) {
    tile_shapes own = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        own.bytes[t] = 64;
        own.rows[t] = t >= whole ? TILE_ROWS : rows;
    }
    _tile_loadconfig(&own);
}

/* The shapes that a thread had before: its other libraries rely on them. */
INLINE tile_shapes tiles_begun(void) {
    tile_shapes before;
    _tile_storeconfig(&before);
    return before;
}

INLINE void tiles_ended(tile_shapes before) {
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
}

INLINE vec widened_half(__m512bh both, const int half) {
    __m512i bits = (__m512i)both;
    __m256i own = half ? _mm512_extracti64x4_epi64(bits, 1) : _mm512_castsi512_si256(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(own), 16));
}

/* The splits of a block of at most TILE_ROWS rows. */
INLINE void split_into(
    const int parts, const float *x, size_t ldx, int rows, int k, uint16_t *to
) {
    for (int i = 0; i < k; i += TILE_K, to += parts * PART)
        for (int r = 0; r < rows; r++) {
            vec low = v_load(x + r * ldx + i), high = v_load(x + r * ldx + i + WIDTH);
            for (int s = 0; s < parts; s++) {
                __m512bh near = _mm512_cvtne2ps_pbh(high, low);
                _mm512_storeu_si512(to + (s * TILE_ROWS + r) * TILE_K, (__m512i)near);
                if (s + 1 == parts) break;
                low = _mm512_sub_ps(low, widened_half(near, 0));
                high = _mm512_sub_ps(high, widened_half(near, 1));
            }
        }
}

static void split_rows(
    const float *x, size_t ldx, int rows, int parts, int k, uint16_t *to
) {
    if (parts == 1) split_into(1, x, ldx, rows, k, to);
    else split_into(SPLITS, x, ldx, rows, k, to);
}

/* Sums of a block of rows times two panels that lie `step` bytes apart, `(rows, 2 * PANEL)`. */
INLINE void tile_sums(
    const char *panel, size_t step, int k, const uint16_t *splits, int rows, float *sums
) {
    const size_t pairs = PANEL * 4, columns = 2 * PANEL;
    float more[TILE_ROWS * 2 * PANEL];
    for (int start = 0; start < k; start += TILED_K) {
        int end = start + TILED_K < k ? start + TILED_K : k;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int i = start; i < end; i += TILE_K) {
            const uint16_t *own = splits + i / TILE_K * SPLITS * PART;
            const char *w = panel + i / 2 * pairs;
            _tile_loadd(4, own, 64);
            _tile_loadd(5, own + PART, 64);
            _tile_loadd(6, own + 2 * PART, 64);
#define TIMES(SUM, AT) \
    _tile_loadd(7, AT, pairs); \
    _tile_dpbf16ps(SUM, 4, 7); \
    _tile_dpbf16ps(SUM, 5, 7); \
    _tile_dpbf16ps(SUM, 6, 7)
            TIMES(0, w);
            TIMES(1, w + 64);
            TIMES(2, w + step);
            TIMES(3, w + step + 64);
#undef TIMES
        }
        float *to = start ? more : sums;
        _tile_stored(0, to, columns * 4);
        _tile_stored(1, to + 16, columns * 4);
        _tile_stored(2, to + 32, columns * 4);
        _tile_stored(3, to + 48, columns * 4);
        for (int j = 0; start && j < rows * 2 * PANEL; j += WIDTH)
            v_store(sums + j, v_add(v_load(sums + j), v_load(more + j)));
    }
}

/* How many k of rows that are bfloat16 are one chain. Any number would do; this is oneDNN's where
 * there are more than 32 rows, so sums are mostly rounded as a trainer's are. */
INLINE int chain_of(int k) {
    int chains = k / 512 + 1;
    return ((k + chains - 1) / chains + TILE_K - 1) / TILE_K * TILE_K;
}

/* Sums over k from `start` to `end`, of R blocks of rows, of one part each, `step` elements apart,
 * times a panel: `(rows, PANEL)` each. */
INLINE void narrow_sums(
    const int R, const char *panel, int start, int end, const uint16_t *x, size_t step, float *sums
) {
    const size_t pairs = PANEL * 4;
    _tile_zero(0);
    _tile_zero(1);
    if (R == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = start; i < end; i += TILE_K) {
        const uint16_t *own = x + i / TILE_K * PART;
        const char *w = panel + i / 2 * pairs;
        _tile_loadd(6, w, pairs);
        _tile_loadd(7, w + 64, pairs);
        _tile_loadd(4, own, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (R == 2) {
            _tile_loadd(5, own + step, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + 16, PANEL * 4);
    if (R == 2) {
        _tile_stored(2, sums + TILE_ROWS * PANEL, PANEL * 4);
        _tile_stored(3, sums + TILE_ROWS * PANEL + 16, PANEL * 4);
    }
}

/* As `put`, of sums, and those of the last chain if there are several; nothing is added to. */
INLINE void narrow_put(
    const matrix *w, int p, float *sums, const float *last, int columns, float *y, const int rounds
) {
    float *to = y + p * PANEL;
    const float *bias = w->bias ? w->bias + p * PANEL : NULL;
    for (int c = 0; c < PANEL; c += WIDTH) {
        vec made = v_load(sums + c);
        if (last != NULL) made = v_add(made, v_load(last + c));
        if (columns < PANEL) {
            v_store(sums + c, made);
            continue;
        }
        if (bias != NULL) made = v_add(made, v_load(bias + c));
        v_store(to + c, rounds ? v_rounded(made) : made);
    }
    if (columns < PANEL) put(w, p, sums, columns, y, rounds ? ROUNDS : 0);
}

/* As `product_of_tiles`, of at most BLOCK_ROWS rows that are bfloat16. All of them meet a chain's
 * part of a panel, which stays in the first cache, before the next part comes. */
static void narrow_product(
    const matrix *w, int first, int last,
    input from, int start, int rows, float *y, size_t ldy, int how
) {
    float sums[BLOCK_ROWS * PANEL], more[2 * TILE_ROWS * PANEL];
    size_t bytes = panel_bytes(w->k, 1), step = (size_t)TILE_ROWS * w->k;
    int shaped = 0, chain = chain_of(w->k);
    for (int p = first; p < last; p++) {
        const char *panel = (const char *)w->panels + p * bytes;
        int columns = w->n - p * PANEL < PANEL ? w->n - p * PANEL : PANEL;
        for (int k = 0; k < w->k; k += chain)
            for (int row = 0, count; row < rows; row += count) {
                int left = rows - row, end = k + chain < w->k ? k + chain : w->k;
                count = left >= 2 * TILE_ROWS ? 2 * TILE_ROWS : left < TILE_ROWS ? left : TILE_ROWS;
                int shape = count < TILE_ROWS ? count : TILE_ROWS;
                if (shaped != shape) tiles_shaped(shaped = shape, 6);
                const uint16_t *x = from.splits + (size_t)(start + row) * w->k;
                float *own = sums + row * PANEL, *to = k ? more : own;
                if (count > TILE_ROWS) narrow_sums(2, panel, k, end, x, step, to);
                else narrow_sums(1, panel, k, end, x, step, to);
                for (int j = 0; k && end < w->k && j < count * PANEL; j += WIDTH)
                    v_store(own + j, v_add(v_load(own + j), v_load(more + j)));
                for (int r = 0; end == w->k && r < count; r++, own += PANEL) {
                    float *out = y + (start + row + r) * ldy;
                    const float *rest = k ? more + r * PANEL : NULL;
                    if (how & ROUNDS) narrow_put(w, p, own, rest, columns, out, 1);
                    else narrow_put(w, p, own, rest, columns, out, 0);
                }
            }
    }
}

/* As `product`, of rows [start, start + rows) whose splits there are. */
static void product_of_tiles(
    const matrix *w, int first, int last,
    input from, int start, int rows, float *y, size_t ldy, int how
) {
    if (from.parts == 1) {
        narrow_product(w, first, last, from, start, rows, y, ldy, how);
        return;
    }
    size_t bytes = panel_bytes(w->k, 1);
    int shaped = 0;
    for (int p = first; p < last; p += 2) {
        const char *panel = (const char *)w->panels + p * bytes;
        size_t step = p + 1 < last ? bytes : 0;
        int most = step ? 2 * PANEL : PANEL, left = w->n - p * PANEL;
        int columns = left < most ? left : most;
        for (int row = start; row < start + rows; row += TILE_ROWS) {
            int count = start + rows - row < TILE_ROWS ? start + rows - row : TILE_ROWS;
            float sums[TILE_ROWS * 2 * PANEL];
            if (shaped != count) tiles_shaped(shaped = count, 7);
            tile_sums(panel, step, w->k, from.splits + (size_t)row * w->k * SPLITS, count, sums);
            for (int r = 0; r < count; r++)
                put(w, p, sums + r * 2 * PANEL, columns, y + (row + r) * ldy, how);
        }
    }
}
#else
static int tiles_granted(void) { return 1; }
INLINE int tiled(const matrix *w) { return 0; }
INLINE size_t split_floats(size_t rows, size_t k, int parts) { return 0; }
INLINE tile_shapes tiles_begun(void) { return (tile_shapes){0}; }
INLINE void tiles_ended(tile_shapes before) {}
INLINE void split_rows(
    const float *x, size_t ldx, int rows, int parts, int k, uint16_t *to
) {}
INLINE void product_of_tiles(
    const matrix *w, int first, int last,
    input from, int start, int rows, float *y, size_t ldy, int how
) {}
#endif
#endif
