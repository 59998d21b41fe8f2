/* Attention of one row over the keys before it, block after block, with a running maximum.
 *
 * Keys are numbered by their positions, wherever they lie, and blocks begin at the first key that
 * the row sees. So what a row finds depends on its own position alone.
 */
#ifndef TIN_ATTENTION_H
#define TIN_ATTENTION_H

#include "vector.h"

#define BLOCK_KEYS 64
#define HEAD_DIM_MAX 256
/* Query heads of a key head whose sums are on the stack. */
#define GROUP_MAX 16
/* Of a block of keys, and what fills its last vector. */
#define ROOM (BLOCK_KEYS + 16)
/* Queries at once. */
#define SCORED 3
#define VALUED 4

/* The keys and values of one head of a run of tokens, head_dim elements each. */
typedef struct {
    const void *keys, *values;
} run;

INLINE vec kv_load(const void *from, size_t at, const int narrow) {
    return narrow ? v_load_narrow((const uint16_t *)from + at) : v_load((const float *)from + at);
}

INLINE float kv_one(const void *from, size_t at, int narrow) {
    return narrow ? widened(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

/* The products of Q queries, `dim` apart, with `count` keys. */
INLINE void scores_of(
    const int Q, const float *q, const void *keys, size_t first, int count, int dim,
    const int narrow, int at, float to[][ROOM]
) {
    int j = 0;
    if (dim % WIDTH == 0) {
        for (; j + 8 <= count; j += 8) {
            vec acc[SCORED][8];
            for (int g = 0; g < Q; g++)
                for (int i = 0; i < 8; i++) acc[g][i] = v_all(0);
            for (int d = 0; d < dim; d += WIDTH)
                for (int i = 0; i < 8; i++) {
                    vec key = kv_load(keys, (first + j + i) * dim + d, narrow);
                    for (int g = 0; g < Q; g++)
                        acc[g][i] = v_fma(v_load(q + g * dim + d), key, acc[g][i]);
                }
            for (int g = 0; g < Q; g++) v_sums(acc[g], to[g] + at + j);
        }
        for (; j < count; j++)
            for (int g = 0; g < Q; g++) {
                vec acc[8];
                for (int i = 0; i < 8; i++) acc[i] = v_all(0);
                for (int d = 0; d < dim; d += WIDTH) {
                    vec key = kv_load(keys, (first + j) * dim + d, narrow);
                    acc[0] = v_fma(v_load(q + g * dim + d), key, acc[0]);
                }
                float sums[8];
                v_sums(acc, sums);
                to[g][at + j] = sums[0];
            }
    }
    for (; j < count; j++)
        for (int g = 0; g < Q; g++) {
            float sum = 0;
            for (int d = 0; d < dim; d++)
                sum = fmaf(q[g * dim + d], kv_one(keys, (first + j) * dim + d, narrow), sum);
            to[g][at + j] = sum;
        }
}

/* acc + sum of p[j] times value j, of Q queries, `dim` apart. */
INLINE void values_added(
    const int Q, float *acc, float p[][ROOM], int at, const void *values, size_t first, int count,
    int dim, const int narrow
) {
    int d = 0;
    for (; d + 4 * WIDTH <= dim; d += 4 * WIDTH) {
        vec sum[VALUED][4];
        for (int g = 0; g < Q; g++)
            for (int v = 0; v < 4; v++) sum[g][v] = v_load(acc + g * dim + d + v * WIDTH);
        for (int j = 0; j < count; j++)
            for (int v = 0; v < 4; v++) {
                vec value = kv_load(values, (first + j) * dim + d + v * WIDTH, narrow);
                for (int g = 0; g < Q; g++)
                    sum[g][v] = v_fma(v_all(p[g][at + j]), value, sum[g][v]);
            }
        for (int g = 0; g < Q; g++)
            for (int v = 0; v < 4; v++) v_store(acc + g * dim + d + v * WIDTH, sum[g][v]);
    }
    for (; d + WIDTH <= dim; d += WIDTH)
        for (int g = 0; g < Q; g++) {
            vec sum = v_load(acc + g * dim + d);
            for (int j = 0; j < count; j++)
                sum = v_fma(
                    v_all(p[g][at + j]), kv_load(values, (first + j) * dim + d, narrow), sum);
            v_store(acc + g * dim + d, sum);
        }
    for (; d < dim; d++)
        for (int g = 0; g < Q; g++)
            for (int j = 0; j < count; j++)
                acc[g * dim + d] = fmaf(
                    p[g][at + j], kv_one(values, (first + j) * dim + d, narrow), acc[g * dim + d]);
}

/* Both of any number of queries, as many at once as there are registers for. */
INLINE void all_scores(
    int group, const float *q, const void *keys, size_t first, int count, int dim,
    const int narrow, int at, float to[][ROOM]
) {
    int g = 0;
#if WIDTH == 16
    for (; g + 3 <= group; g += 3)
        scores_of(3, q + g * dim, keys, first, count, dim, narrow, at, to + g);
    for (; g + 2 <= group; g += 2)
        scores_of(2, q + g * dim, keys, first, count, dim, narrow, at, to + g);
#endif
    for (; g < group; g++)
        scores_of(1, q + g * dim, keys, first, count, dim, narrow, at, to + g);
}

INLINE void all_values(
    int group, float *acc, float p[][ROOM], int at, const void *values, size_t first, int count,
    int dim, const int narrow
) {
    int g = 0;
#if WIDTH == 16
    for (; g + 4 <= group; g += 4)
        values_added(4, acc + g * dim, p + g, at, values, first, count, dim, narrow);
#endif
    for (; g + 3 <= group; g += 3)
        values_added(3, acc + g * dim, p + g, at, values, first, count, dim, narrow);
    for (; g + 2 <= group; g += 2)
        values_added(2, acc + g * dim, p + g, at, values, first, count, dim, narrow);
    for (; g < group; g++)
        values_added(1, acc + g * dim, p + g, at, values, first, count, dim, narrow);
}

/* Scores times `scaling`, padded to whole vectors; the largest of them and of `most`. */
INLINE float scaled(float *scores, int count, float scaling, float most) {
    int whole = (count + WIDTH - 1) / WIDTH * WIDTH;
    for (int j = count; j < whole; j++) scores[j] = -INFINITY;
    vec highest = v_all(most), times = v_all(scaling);
    for (int j = 0; j < whole; j += WIDTH) {
        vec made = v_mul(v_load(scores + j), times);
        v_store(scores + j, made);
        /* NaN goes on into the weights, not into the maximum. */
        highest = v_max(made, highest);
    }
    float lanes[WIDTH];
    v_store(lanes, highest);
    for (int i = 0; i < WIDTH; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

/* Weights e^(s - max) in place of scores, zeros behind the last; their sum. */
INLINE float weights_of(float *scores, int count, float most) {
    int whole = (count + WIDTH - 1) / WIDTH * WIDTH;
    vec sum = v_all(0), least = v_all(-most);
    for (int j = 0; j < whole; j += WIDTH) {
        vec made = v_exp(v_add(v_load(scores + j), least));
        v_store(scores + j, made);
        sum = v_add(sum, made);
    }
    return v_sum(sum);
}

/* Queries of one key head over keys [first, last], of which those before `split` are in `shared`,
 * and the others, counted from there, in `own`. `q` and `to` are (group, dim). */
INLINE void attend_with(
    const float *q, int group, int dim, run shared, int64_t split, run own,
    int64_t first, int64_t last, float scaling, const int narrow, float *to
) {
    float most[GROUP_MAX], sums[GROUP_MAX];
    for (int g = 0; g < group; g++) {
        most[g] = -INFINITY;
        sums[g] = 0;
    }
    memset(to, 0, sizeof *to * (size_t)(group * dim));
    for (int64_t start = first; start <= last; start += BLOCK_KEYS) {
        int count = last + 1 - start < BLOCK_KEYS ? (int)(last + 1 - start) : BLOCK_KEYS;
        int before = 0;
        if (start < split) before = split - start < count ? (int)(split - start) : count;
        size_t after = before ? 0 : (size_t)(start - split);
        float p[GROUP_MAX][ROOM];
        if (before) all_scores(group, q, shared.keys, start, before, dim, narrow, 0, p);
        all_scores(group, q, own.keys, after, count - before, dim, narrow, before, p);
        for (int g = 0; g < group; g++) {
            float *acc = to + g * dim, highest = scaled(p[g], count, scaling, most[g]);
            if (highest > most[g]) {
                float less = exp_of(most[g] - highest);
                sums[g] *= less;
                for (int d = 0; d < dim; d++) acc[d] *= less;
                most[g] = highest;
            }
            sums[g] += weights_of(p[g], count, highest);
        }
        if (before) all_values(group, to, p, 0, shared.values, start, before, dim, narrow);
        all_values(group, to, p, before, own.values, after, count - before, dim, narrow);
    }
    for (int g = 0; g < group; g++)
        for (int d = 0; d < dim; d++) to[g * dim + d] /= sums[g];
}

static void attend_wide(
    const float *q, int group, int dim, run shared, int64_t split, run own,
    int64_t first, int64_t last, float scaling, float *to
) {
    attend_with(q, group, dim, shared, split, own, first, last, scaling, 0, to);
}

static void attend_narrow(
    const float *q, int group, int dim, run shared, int64_t split, run own,
    int64_t first, int64_t last, float scaling, float *to
) {
    attend_with(q, group, dim, shared, split, own, first, last, scaling, 1, to);
}
#endif
