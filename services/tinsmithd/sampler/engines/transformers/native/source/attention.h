/* Attention of one row over the keys before it, block after block, with a running maximum.
 *
 * Keys are numbered by their positions, wherever they lie, and blocks begin at the first key that
 * the row sees. So what a row finds depends on its own position alone.
 */
#ifndef TIN_ATTENTION_H
#define TIN_ATTENTION_H

#include "vector.h"

#define BLOCK_KEYS 64
/* In bfloat16 as many as torch: it rounds their weights, beside the largest of the block. */
#define NARROW_KEYS 512
#define HEAD_DIM_MAX 256
/* Query heads of a key head whose sums are on the stack. */
#define GROUP_MAX 16
/* Of a block of keys, and what fills its last vector. */
#define ROOM (NARROW_KEYS + 16)
/* Rows that may meet the same keys together. */
#define JOINED 8
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
    return v_highest(highest);
}

/* Weights e^(s - max) in place of scores, zeros behind the last; their sum, before they are rounded
 * where they are. */
INLINE float weights_of(float *scores, int count, float most, const int rounds) {
    int whole = (count + WIDTH - 1) / WIDTH * WIDTH;
    vec sum = v_all(0), least = v_all(-most);
    for (int j = 0; j < whole; j += WIDTH) {
        vec less = v_add(v_load(scores + j), least);
        vec made = rounds ? v_exp_fast(less) : v_exp(less);
        v_store(scores + j, rounds ? v_rounded(made) : made);
        sum = v_add(sum, made);
    }
    return v_sum(sum);
}

/* What the queries of one row and one key head have found so far. */
typedef struct {
    const float *q; /* (group, dim) */
    float *to;      /* (group, dim): sums of values, by weights */
    run own;        /* keys from `split` on, counted from there */
    int64_t last;   /* the last key that they meet */
    float most[GROUP_MAX], sums[GROUP_MAX];
} meeting;

/* How many of the keys [start, start + count) are before `split`. */
INLINE int keys_before(int64_t split, int64_t start, int count) {
    return start >= split ? 0 : split - start < count ? (int)(split - start) : count;
}

/* Weights of the keys [start, start + count), of which those before `split` are in `shared`. */
INLINE void weighed_keys(
    meeting *m, int group, int dim, run shared, int64_t split, int64_t start, int count,
    float scaling, const int narrow, float p[][ROOM]
) {
    int before = keys_before(split, start, count);
    size_t after = before ? 0 : (size_t)(start - split);
    if (before) all_scores(group, m->q, shared.keys, start, before, dim, narrow, 0, p);
    all_scores(group, m->q, m->own.keys, after, count - before, dim, narrow, before, p);
    for (int g = 0; g < group; g++) {
        float *acc = m->to + g * dim, highest = scaled(p[g], count, scaling, m->most[g]);
        if (highest > m->most[g]) {
            float less = exp_of(m->most[g] - highest);
            m->sums[g] *= less;
            for (int d = 0; d < dim; d++) acc[d] *= less;
            m->most[g] = highest;
        }
        m->sums[g] += weights_of(p[g], count, highest, narrow);
    }
}

/* Their values, by these weights. */
INLINE void added_values(
    meeting *m, int group, int dim, run shared, int64_t split, int64_t start, int count,
    const int narrow, float p[][ROOM]
) {
    int before = keys_before(split, start, count);
    size_t after = before ? 0 : (size_t)(start - split);
    if (before) all_values(group, m->to, p, 0, shared.values, start, before, dim, narrow);
    all_values(group, m->to, p, before, m->own.values, after, count - before, dim, narrow);
}

/* Queries of one key head, of `rows` rows that see keys from `first` on. Those before `alike` are
 * the same for all of them: they are read once for all. What a row does is the same without others. */
INLINE void attend_with(
    meeting *all, int rows, int group, int dim, run shared, int64_t split, int64_t first,
    int64_t alike, float scaling, const int narrow
) {
    float p[JOINED][GROUP_MAX][ROOM];
    const int block = narrow ? NARROW_KEYS : BLOCK_KEYS;
    int64_t start = first;
    for (int r = 0; r < rows; r++) {
        for (int g = 0; g < group; g++) {
            all[r].most[g] = -INFINITY;
            all[r].sums[g] = 0;
        }
        memset(all[r].to, 0, sizeof(float) * (size_t)(group * dim));
    }
    for (; rows > 1 && start + block <= alike; start += block) {
        for (int r = 0; r < rows; r++)
            weighed_keys(&all[r], group, dim, shared, split, start, block, scaling, narrow, p[r]);
        for (int r = 0; r < rows; r++)
            added_values(&all[r], group, dim, shared, split, start, block, narrow, p[r]);
    }
    for (int r = 0; r < rows; r++) {
        meeting *m = &all[r];
        for (int64_t at = start; at <= m->last; at += block) {
            int count = m->last + 1 - at < block ? (int)(m->last + 1 - at) : block;
            weighed_keys(m, group, dim, shared, split, at, count, scaling, narrow, p[0]);
            added_values(m, group, dim, shared, split, at, count, narrow, p[0]);
        }
        for (int g = 0; g < group; g++)
            for (int d = 0; d < dim; d++) {
                float *to = &m->to[g * dim + d];
                *to = narrow ? rounded(*to * (1.0f / m->sums[g])) : *to / m->sums[g];
            }
    }
}

static void attend_wide(
    meeting *all, int rows, int group, int dim, run shared, int64_t split, int64_t first,
    int64_t alike, float scaling
) {
    attend_with(all, rows, group, dim, shared, split, first, alike, scaling, 0);
}

static void attend_narrow(
    meeting *all, int rows, int group, int dim, run shared, int64_t split, int64_t first,
    int64_t alike, float scaling
) {
    attend_with(all, rows, group, dim, shared, split, first, alike, scaling, 1);
}
#endif
