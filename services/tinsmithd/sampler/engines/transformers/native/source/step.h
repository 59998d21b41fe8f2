/* What a caller hands in; `native/abi.py` says the same in Python. Pointers stay the caller's. */
#ifndef TIN_STEP_H
#define TIN_STEP_H

#include "products.h"

#define SITES 4
#define PARTS_MAX 3
enum { SITE_QKV, SITE_O, SITE_GATE_UP, SITE_DOWN };

typedef struct {
    matrix qkv, o, gate, up, down;
    const float *norm_1, *norm_2;
    const float *norm_q, *norm_k; /* (head_dim,), or NULL */
    int64_t window;               /* tokens that a token sees, itself included; 0: all */
} layer;

typedef struct {
    int32_t layers, heads, kv_heads, head_dim, hidden, ffn;
    /* Keys and values are bfloat16, and all else is rounded to it where torch does. */
    int32_t narrow;
    float eps, qk_eps, scaling;
    const layer *each;
    const float *norm;
} model;

/* What an adapter adds to a product: `b^T a^T x` of each part. a is NULL where it adds nothing. */
typedef struct {
    const float *a; /* (k, parts * rank) */
    const float *b; /* (parts * rank, n), of which a part uses its own rows and columns */
    int32_t parts, rank;
    int32_t widths[PARTS_MAX]; /* columns of each part */
    int32_t unused;
} site;

/* Rows that have one adapter. */
typedef struct {
    const site *sites; /* [layers][SITES], or one for the head */
    const int32_t *rows;
    int64_t count;
} group;

/* Keys and values, per layer `(slots, 2 * kv_heads, capacity, head_dim)`: keys, then values. */
typedef struct {
    void *const *layers;
    int64_t capacity;
} store;

/* A token. Its sequence's first `split` tokens are in `shared`, a store of one slot; the rest, and
 * what it writes itself, in `slot` of `store`. */
typedef struct {
    int64_t store, slot, position, shared, split;
} row;

typedef struct {
    const row *rows;
    const store *stores;
    const group *groups;
    const float *angles; /* (count, head_dim): cosines of half a head, then sines */
    float *h;            /* (count, hidden): embeddings; used up */
    float *out;          /* (count, hidden): after the last norm */
    int32_t count, groups_count;
    int32_t sequences; /* rows, the first, that are next tokens; others are of prompts */
    int32_t unused;
} step;

/* A matrix that is to be turned round: `to[c][r] = scale * given[r][c]`. */
typedef struct {
    const float *given;    /* (rows, columns) */
    float *to;             /* (columns, ld), of which the first `rows` columns are written */
    int32_t rows, columns;
    int64_t ld;
    float scale;
    int32_t unused;
} turning;

typedef struct context context;
#endif
