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

/* The products of a query with `count` keys. */
INLINE void scores_of(
    const float *q, const void *keys, size_t first, int count, int dim, const int narrow, float *to
) {
    int j = 0;
    if (dim % WIDTH == 0) {
        for (; j + 8 <= count; j += 8) {
            vec acc[8];
            for (int i = 0; i < 8; i++) acc[i] = v_all(0);
            for (int d = 0; d < dim; d += WIDTH) {
                vec own = v_load(q + d);
                for (int i = 0; i < 8; i++)
                    acc[i] = v_fma(own, kv_load(keys, (first + j + i) * dim + d, narrow), acc[i]);
            }
            v_sums(acc, to + j);
        }
        for (; j < count; j++) {
            vec acc[8];
            for (int i = 0; i < 8; i++) acc[i] = v_all(0);
            for (int d = 0; d < dim; d += WIDTH)
                acc[0] = v_fma(v_load(q + d), kv_load(keys, (first + j) * dim + d, narrow), acc[0]);
            float sums[8];
            v_sums(acc, sums);
            to[j] = sums[0];
        }
    }
    for (; j < count; j++) {
        float sum = 0;
        for (int d = 0; d < dim; d++)
            sum = fmaf(q[d], kv_one(keys, (first + j) * dim + d, narrow), sum);
        to[j] = sum;
    }
}

/* acc + sum of p[j] times value j. */
INLINE void values_added(
    float *acc, const float *p, const void *values, size_t first, int count, int dim,
    const int narrow
) {
    int d = 0;
    for (; d + 4 * WIDTH <= dim; d += 4 * WIDTH) {
        vec sum[4];
        for (int v = 0; v < 4; v++) sum[v] = v_load(acc + d + v * WIDTH);
        for (int j = 0; j < count; j++) {
            vec own = v_all(p[j]);
            for (int v = 0; v < 4; v++)
                sum[v] = v_fma(own, kv_load(values, (first + j) * dim + d + v * WIDTH, narrow), sum[v]);
        }
        for (int v = 0; v < 4; v++) v_store(acc + d + v * WIDTH, sum[v]);
    }
    for (; d + WIDTH <= dim; d += WIDTH) {
        vec sum = v_load(acc + d);
        for (int j = 0; j < count; j++)
            sum = v_fma(v_all(p[j]), kv_load(values, (first + j) * dim + d, narrow), sum);
        v_store(acc + d, sum);
    }
    for (; d < dim; d++)
        for (int j = 0; j < count; j++)
            acc[d] = fmaf(p[j], kv_one(values, (first + j) * dim + d, narrow), acc[d]);
}

/* Weights e^(s - max) in place of scores, padded to whole vectors with zeros; their sum. */
INLINE float weights_of(float *scores, int count, float most) {
    int whole = (count + WIDTH - 1) / WIDTH * WIDTH;
    for (int j = count; j < whole; j++) scores[j] = -INFINITY;
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
        for (int g = 0; g < group; g++) {
            float p[BLOCK_KEYS + WIDTH];
            const float *query = q + g * dim;
            if (before) scores_of(query, shared.keys, start, before, dim, narrow, p);
            scores_of(query, own.keys, after, count - before, dim, narrow, p + before);
            float highest = most[g];
            for (int j = 0; j < count; j++) {
                p[j] *= scaling;
                /* NaN goes on into the weights, not into the maximum. */
                if (p[j] > highest) highest = p[j];
            }
            float *acc = to + g * dim;
            if (highest > most[g]) {
                float less = exp_of(most[g] - highest);
                sums[g] *= less;
                for (int d = 0; d < dim; d++) acc[d] *= less;
                most[g] = highest;
            }
            sums[g] += weights_of(p, count, highest);
            if (before) values_added(acc, p, shared.values, start, before, dim, narrow);
            values_added(acc, p + before, own.values, after, count - before, dim, narrow);
        }
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
