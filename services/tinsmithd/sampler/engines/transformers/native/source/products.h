/* Products of rows with weights. Each element of a result is the sum, in their order, of chains of
 * fused multiply-adds over BLOCK_K ascending k, which begin with zero: whatever the number of rows
 * and threads, its bits are its own.
 */
#ifndef TIN_PRODUCTS_H
#define TIN_PRODUCTS_H

#include <stddef.h>

#include "vector.h"

#define VECTORS 2
#define PANEL (VECTORS * WIDTH)
/* Rows whose sums stay in registers. */
#define TILE (WIDTH == 16 ? 8 : 6)
/* Bytes of rows that are multiplied with a panel before the next panel comes. */
#define BLOCK_BYTES (128 * 1024)

/* Rows of one piece of work, at most. */
#define BLOCK_ROWS 64

/* Longer chains round more: each addition by as much as the sum so far is large. */
#define BLOCK_K 192

/* A weight (n, k) in panels of PANEL columns, the last filled up with zeros: float32 `[k][PANEL]`,
 * or, where narrow, bfloat16 in pairs of k, `[(k + 1) / 2][PANEL][2]`. */
typedef struct {
    const void *panels;
    const float *bias; /* (n,), or NULL */
    int32_t n, k, narrow, unused;
} matrix;

/* What becomes of sums: they are added to what is there, or what comes of them is rounded to
 * bfloat16. */
enum { ADDS = 1, ROUNDS = 2 };

INLINE size_t panel_bytes(int k, int narrow) {
    return (size_t)PANEL * 4 * (narrow ? (k + 1) / 2 : k);
}

/* R rows times columns of a weight: `count` vectors, of which each k has its own `step` elements
 * behind the last. */
INLINE void tile(
    const int R, const int count, const int narrow,
    const void *weight, size_t step, int k, const float *const *x, float sums[][PANEL]
) {
    vec acc[TILE][VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < count; v++) acc[r][v] = v_all(0);
    if (narrow) {
        const uint32_t *w = weight;
        for (int i = 0; i + 1 < k; i += 2, w += step) {
            __builtin_prefetch((const char *)w + 2048);
            __builtin_prefetch((const char *)w + 2112);
            vec part[VECTORS];
            for (int v = 0; v < count; v++) part[v] = v_low(w + v * WIDTH);
            for (int r = 0; r < R; r++) {
                vec own = v_all(x[r][i]);
                for (int v = 0; v < count; v++) acc[r][v] = v_fma(own, part[v], acc[r][v]);
            }
            for (int v = 0; v < count; v++) part[v] = v_high(w + v * WIDTH);
            for (int r = 0; r < R; r++) {
                vec own = v_all(x[r][i + 1]);
                for (int v = 0; v < count; v++) acc[r][v] = v_fma(own, part[v], acc[r][v]);
            }
        }
        if (k % 2)
            for (int r = 0; r < R; r++)
                for (int v = 0; v < count; v++)
                    acc[r][v] = v_fma(v_all(x[r][k - 1]), v_low(w + v * WIDTH), acc[r][v]);
    } else {
        const float *w = weight;
        for (int i = 0; i < k; i++, w += step) {
            __builtin_prefetch((const char *)w + 2048);
            vec part[VECTORS];
            for (int v = 0; v < count; v++) part[v] = v_load(w + v * WIDTH);
            for (int r = 0; r < R; r++) {
                vec own = v_all(x[r][i]);
                for (int v = 0; v < count; v++) acc[r][v] = v_fma(own, part[v], acc[r][v]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < count; v++) v_store(sums[r] + v * WIDTH, acc[r][v]);
}

/* As `tile`, of 1 to TILE rows. */
#define TILE_OF(R, COUNT, NARROW) \
    case R: tile(R, COUNT, NARROW, weight, step, k, x, sums); break
#if WIDTH == 16
#define TILES(COUNT, NARROW) \
    TILE_OF(1, COUNT, NARROW); TILE_OF(2, COUNT, NARROW); TILE_OF(3, COUNT, NARROW); \
    TILE_OF(4, COUNT, NARROW); TILE_OF(5, COUNT, NARROW); TILE_OF(6, COUNT, NARROW); \
    TILE_OF(7, COUNT, NARROW); TILE_OF(8, COUNT, NARROW)
#else
#define TILES(COUNT, NARROW) \
    TILE_OF(1, COUNT, NARROW); TILE_OF(2, COUNT, NARROW); TILE_OF(3, COUNT, NARROW); \
    TILE_OF(4, COUNT, NARROW); TILE_OF(5, COUNT, NARROW); TILE_OF(6, COUNT, NARROW)
#endif

static void tile_narrow(
    int rows, const void *weight, size_t step, int k, const float *const *x, float sums[][PANEL]
) {
    switch (rows) { TILES(VECTORS, 1); }
}

static void tile_wide(
    int rows, const void *weight, size_t step, int k, const float *const *x, float sums[][PANEL]
) {
    switch (rows) { TILES(VECTORS, 0); }
}

static void tile_wide_1(
    int rows, const void *weight, size_t step, int k, const float *const *x, float sums[][PANEL]
) {
    switch (rows) { TILES(1, 0); }
}

typedef void (*tile_of)(int, const void *, size_t, int, const float *const *, float[][PANEL]);

/* As `tile` over all of k; `columns` of the sums count. x is used up. */
static void summed(
    tile_of some, int rows, const void *weight, size_t step, int per_row, int k, const float **x,
    float sums[][PANEL], int columns
) {
    some(rows, weight, step, k < BLOCK_K ? k : BLOCK_K, x, sums);
    for (int start = BLOCK_K; start < k; start += BLOCK_K) {
        float more[TILE][PANEL];
        for (int r = 0; r < rows; r++) x[r] += BLOCK_K;
        weight = (const char *)weight + step * 4 * (BLOCK_K / per_row);
        some(rows, weight, step, k - start < BLOCK_K ? k - start : BLOCK_K, x, more);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) sums[r][c] += more[r][c];
    }
}

/* Sums of columns from panel p on, and the bias, in a row of y. */
INLINE void put(const matrix *w, int p, const float *sums, int columns, float *y, int how) {
    float *to = y + p * PANEL;
    const float *bias = w->bias ? w->bias + p * PANEL : NULL;
    for (int c = 0; c < columns; c++) {
        float made = bias ? sums[c] + bias[c] : sums[c];
        to[c] = how & ADDS ? to[c] + made : made;
    }
    if (how & ROUNDS) round_all(to, columns);
}

/* Panels [first, last) of `x W^T + b`. `ldx` and `ldy` are the elements from a row to the next. */
static void product(
    const matrix *w, int first, int last,
    const float *x, size_t ldx, int rows, float *y, size_t ldy, int how
) {
    size_t bytes = panel_bytes(w->k, w->narrow);
    int block = BLOCK_BYTES / (4 * w->k) / TILE * TILE;
    if (block < TILE) block = TILE;
    for (int start = 0; start < rows; start += block) {
        int end = start + block < rows ? start + block : rows;
        for (int p = first; p < last; p++) {
            const char *panel = (const char *)w->panels + p * bytes;
            int columns = w->n - p * PANEL < PANEL ? w->n - p * PANEL : PANEL;
            for (int row = start; row < end; row += TILE) {
                int count = end - row < TILE ? end - row : TILE;
                const float *own[TILE];
                float sums[TILE][PANEL];
                for (int r = 0; r < count; r++) own[r] = x + (row + r) * ldx;
                tile_of some = w->narrow ? tile_narrow : tile_wide;
                summed(some, count, panel, PANEL, w->narrow ? 2 : 1, w->k, own, sums, PANEL);
                for (int r = 0; r < count; r++)
                    put(w, p, sums[r], columns, y + (row + r) * ldy, how);
            }
        }
    }
}

/* Vectors of columns that one row meets at once: long reads of a weight that is read once. */
#define LONG 8

/* One row times V vectors of columns, as `summed`. */
INLINE void long_sums(const int V, const float *w, size_t ldw, int k, const float *x, float *to) {
    for (int start = 0; start < k; start += BLOCK_K) {
        int end = start + BLOCK_K < k ? start + BLOCK_K : k;
        vec acc[LONG];
        for (int v = 0; v < V; v++) acc[v] = v_all(0);
        for (int i = start; i < end; i++) {
            vec own = v_all(x[i]);
            for (int v = 0; v < V; v++)
                acc[v] = v_fma(own, v_load(w + i * ldw + v * WIDTH), acc[v]);
        }
        for (int v = 0; v < V; v++) {
            if (start) acc[v] = v_add(v_load(to + v * WIDTH), acc[v]);
            v_store(to + v * WIDTH, acc[v]);
        }
    }
}

/* Of whole vectors of `columns`, as many as there are registers for; returns how many columns. */
static int long_row(int columns, const float *w, size_t ldw, int k, const float *x, float *to) {
    int count = columns / WIDTH < LONG ? columns / WIDTH : LONG;
    switch (count) {
#define LONG_OF(V) case V: long_sums(V, w, ldw, k, x, to); break
        LONG_OF(1); LONG_OF(2); LONG_OF(3); LONG_OF(4);
        LONG_OF(5); LONG_OF(6); LONG_OF(7); LONG_OF(8);
    }
    return count * WIDTH;
}

/* Rows times float32 columns [start, end) of `w`, `(k, ldw)`: what adapters are made of. Rows of x
 * and y are those of an index. */
static void product_of_columns(
    const float *w, size_t ldw, int k, int start, int end,
    const float *x, size_t ldx, const int32_t *x_rows, int rows,
    float *y, size_t ldy, const int32_t *y_rows, int how
) {
    for (int row = 0; row < rows; row += TILE) {
        int count = rows - row < TILE ? rows - row : TILE;
        const float *rows_of_x[TILE];
        float *to[TILE];
        float sums[TILE][PANEL];
        for (int r = 0; r < count; r++) {
            rows_of_x[r] = x + (x_rows ? (size_t)x_rows[row + r] : (size_t)(row + r)) * ldx;
            to[r] = y + (y_rows ? (size_t)y_rows[row + r] : (size_t)(row + r)) * ldy;
        }
        int at = start;
        while (count == 1 && end - at >= WIDTH) {
            float made[LONG * WIDTH];
            int columns = long_row(end - at, w + at, ldw, k, rows_of_x[0], made);
            for (int c = 0; c < columns; c++)
                to[0][at + c] = how & ADDS ? to[0][at + c] + made[c] : made[c];
            if (how & ROUNDS) round_all(to[0] + at, columns);
            at += columns;
        }
        while (at < end) {
            int left = end - at, made = left >= PANEL ? PANEL : left >= WIDTH ? WIDTH : left;
            const float *own[TILE];
            memcpy(own, rows_of_x, sizeof own);
            if (made == PANEL) summed(tile_wide, count, w + at, ldw, 1, k, own, sums, made);
            else if (made == WIDTH) summed(tile_wide_1, count, w + at, ldw, 1, k, own, sums, made);
            else
                for (int r = 0; r < count; r++)
                    for (int c = 0; c < made; c++) {
                        sums[r][c] = 0;
                        for (int start_k = 0; start_k < k; start_k += BLOCK_K) {
                            float sum = 0;
                            for (int i = start_k; i < k && i < start_k + BLOCK_K; i++)
                                sum = fmaf(own[r][i], w[i * ldw + at + c], sum);
                            sums[r][c] = start_k ? sums[r][c] + sum : sum;
                        }
                    }
            for (int r = 0; r < count; r++) {
                for (int c = 0; c < made; c++)
                    to[r][at + c] = how & ADDS ? to[r][at + c] + sums[r][c] : sums[r][c];
                if (how & ROUNDS) round_all(to[r] + at, made);
            }
            at += made;
        }
    }
}
#endif
