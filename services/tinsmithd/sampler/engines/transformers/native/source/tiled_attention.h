/* Attention of rows of prompts on AMX, where queries, keys and values are bfloat16: many queries
 * meet a block of keys, whose weights are rounded as torch rounds them.
 *
 * Keys behind a row's own get no weight, and tiles add exact zeros for them. So a row finds the
 * same whatever rows it is computed with.
 */
#ifndef TIN_TILED_ATTENTION_H
#define TIN_TILED_ATTENTION_H

#include "attention.h"
#include "tiles.h"

/* Rows that meet keys together, at most. */
#define UNIT_ROWS 64

/* Rows of a prompt that follow each other, and query heads of one key head. */
typedef struct {
    const float *q; /* of the first row; heads beside each other */
    float *to;      /* what they find, likewise */
    size_t ldq, ldto;
    int rows, group, dim;
    int64_t position; /* of the first row */
    run from;         /* all keys of the prompt */
    float scaling;
} tiled_unit;

#ifdef AMX
/* Whether it can be computed so. */
INLINE int tiled_heads(int dim) { return dim % TILE_K == 0 && dim <= HEAD_DIM_MAX; }

/* What a block of keys becomes, and what queries make of it. */
typedef struct {
    uint16_t keys[NARROW_KEYS * HEAD_DIM_MAX];   /* [key / 16][dim / 32][dim pair][key][2] */
    uint16_t values[NARROW_KEYS * HEAD_DIM_MAX]; /* [key / 32][dim / 16][key pair][dim][2] */
    uint16_t q[TILE_ROWS * HEAD_DIM_MAX];
    float scores[TILE_ROWS][ROOM];
    uint16_t weights[TILE_ROWS][ROOM];
    float most[GROUP_MAX][UNIT_ROWS], sums[GROUP_MAX][UNIT_ROWS];
} tiled_room;

/* 16 rows of 16 elements of 32 bits, of which `rows` are there and others zero, turned round. */
static void turned_square(const uint32_t *from, size_t ld, int rows, uint32_t *to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++)
        a[i] = i < rows ? _mm512_loadu_si512(from + i * ld) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        __m512i high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        _mm512_storeu_si512(to + 16 * j, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(to + 16 * (8 + j), _mm512_shuffle_i32x4(low, high, 0xdd));
        low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_si512(to + 16 * (4 + j), _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(to + 16 * (12 + j), _mm512_shuffle_i32x4(low, high, 0xdd));
    }
}

/* Bring `count` keys and values from `start` on into tiles; what fills the last ones is zero. */
static void packed_keys(run from, int64_t start, int count, int dim, tiled_room *room) {
    const uint16_t *keys = (const uint16_t *)from.keys + start * dim;
    const uint16_t *values = (const uint16_t *)from.values + start * dim;
    uint16_t *to = room->keys;
    int whole = (count + TILE_K - 1) / TILE_K * TILE_K;
    for (int j = 0; j < whole; j += 16)
        for (int d = 0; d < dim; d += TILE_K, to += PART)
            turned_square(
                (const uint32_t *)(keys + (size_t)j * dim + d), dim / 2, count - j, (uint32_t *)to);
    uint16_t order[2][32];
    for (int i = 0; i < 32; i++)
        for (int half = 0; half < 2; half++) order[half][i] = half * 16 + i / 2 + i % 2 * 32;
    __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
    for (int j = 0; j < whole; j += 2)
        for (int d = 0; d < dim; d += TILE_K) {
            const uint16_t *own = values + (size_t)j * dim + d;
            __m512i zero = _mm512_setzero_si512();
            __m512i a = j < count ? _mm512_loadu_si512(own) : zero;
            __m512i b = j + 1 < count ? _mm512_loadu_si512(own + dim) : zero;
            uint16_t *tile = room->values + ((size_t)(j / TILE_K) * dim / 16 + d / 16) * PART;
            tile += j % TILE_K / 2 * 32;
            _mm512_storeu_si512(tile, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(tile + PART, _mm512_permutex2var_epi16(a, high, b));
        }
}

/* The products of a tile of queries with so many keys, a multiple of TILE_K. */
static void tiled_scores(tiled_room *room, int keys, int dim) {
    size_t group = (size_t)dim / TILE_K * PART;
    for (int j = 0; j < keys; j += TILE_K) {
        const uint16_t *own = room->keys + j / 16 * group;
        _tile_zero(0);
        _tile_zero(1);
        for (int i = 0; i < dim / TILE_K; i++) {
            _tile_loadd(4, room->q + i * PART, 64);
            _tile_loadd(6, own + i * PART, 64);
            _tile_loadd(7, own + group + i * PART, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, &room->scores[0][j], sizeof *room->scores);
        _tile_stored(1, &room->scores[0][j + 16], sizeof *room->scores);
    }
}

/* Their values, by weights, added to what was found in earlier blocks. */
static void tiled_values(
    const tiled_room *room, int keys, int dim, int is_first, float *to, size_t ldto
) {
    for (int d = 0; d < dim; d += TILE_K) {
        if (is_first) {
            _tile_zero(0);
            _tile_zero(1);
        } else {
            _tile_loadd(0, to + d, ldto * 4);
            _tile_loadd(1, to + d + 16, ldto * 4);
        }
        for (int j = 0; j < keys; j += TILE_K) {
            const uint16_t *own = room->values + ((size_t)j / TILE_K * dim / 16 + d / 16) * PART;
            _tile_loadd(4, &room->weights[0][j], sizeof *room->weights);
            _tile_loadd(6, own, 64);
            _tile_loadd(7, own + PART, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, to + d, ldto * 4);
        _tile_stored(1, to + d + 16, ldto * 4);
    }
}

/* Rounded weights of a row's `count` keys, zeros behind them up to `keys`; their sum before. */
static float tiled_weights(const float *scores, int count, int keys, float most, uint16_t *to) {
    vec sum = v_all(0), least = v_all(-most);
    int j = 0;
    for (; j < count; j += TILE_K) {
        vec low = v_exp_fast(v_add(v_load(scores + j), least)), high = v_all(0);
        sum = v_add(sum, low);
        if (j + WIDTH < count) {
            high = v_exp_fast(v_add(v_load(scores + j + WIDTH), least));
            sum = v_add(sum, high);
        }
        _mm512_storeu_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    for (; j < keys; j += TILE_K) _mm512_storeu_si512(to + j, _mm512_setzero_si512());
    return v_sum(sum);
}

/* One tile of rows of one head meets a block of `count` keys from `start` on. */
static void tile_meets(
    const tiled_unit *u, tiled_room *room, int head, int first, int64_t start, int count
) {
    int rows = u->rows - first < TILE_ROWS ? u->rows - first : TILE_ROWS;
    int64_t seen = u->position + first + rows - start;
    int keys = seen < count ? (int)seen : count, whole = (keys + TILE_K - 1) / TILE_K * TILE_K;
    float *to = u->to + first * u->ldto + head * u->dim;
    if (keys <= 0) return;
    tiles_shaped(rows, 6);
    split_rows(u->q + first * u->ldq + head * u->dim, u->ldq, rows, 1, u->dim, room->q);
    tiled_scores(room, whole, u->dim);
    for (int r = 0; r < rows; r++) {
        int64_t own = u->position + first + r + 1 - start;
        int visible = own < 0 ? 0 : own < keys ? (int)own : keys;
        float *most = &room->most[head][first + r], *sum = &room->sums[head][first + r];
        float *scores = room->scores[r], highest = scaled(scores, visible, u->scaling, *most);
        if (highest > *most && start) {
            float less = exp_of(*most - highest);
            *sum *= less;
            for (int d = 0; d < u->dim; d++) to[r * u->ldto + d] *= less;
        }
        *most = highest;
        *sum += tiled_weights(scores, visible, whole, highest, room->weights[r]);
    }
    tiled_values(room, whole, u->dim, start == 0, to, u->ldto);
}

/* All that a unit finds, rounded. */
static void attend_tiles(const tiled_unit *u) {
    tiled_room room;
    int64_t end = u->position + u->rows;
    for (int g = 0; g < u->group; g++)
        for (int r = 0; r < u->rows; r++) {
            room.most[g][r] = -INFINITY;
            room.sums[g][r] = 0;
        }
    for (int64_t start = 0; start < end; start += NARROW_KEYS) {
        int count = end - start < NARROW_KEYS ? (int)(end - start) : NARROW_KEYS;
        packed_keys(u->from, start, count, u->dim, &room);
        for (int g = 0; g < u->group; g++)
            for (int first = 0; first < u->rows; first += TILE_ROWS)
                tile_meets(u, &room, g, first, start, count);
    }
    for (int r = 0; r < u->rows; r++)
        for (int g = 0; g < u->group; g++) {
            float *to = u->to + r * u->ldto + g * u->dim;
            vec part = v_all(1.0f / room.sums[g][r]);
            for (int d = 0; d < u->dim; d += WIDTH)
                v_store(to + d, v_rounded(v_mul(v_load(to + d), part)));
        }
}
#else
INLINE int tiled_heads(int dim) { return 0; }
INLINE void attend_tiles(const tiled_unit *u) {}
#endif
#endif
