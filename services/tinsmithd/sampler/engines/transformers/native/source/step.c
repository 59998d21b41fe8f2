/* A forward of a whole decoder over some rows, in one call: threads share the work of a phase by
 * taking pieces of it, and meet before the next one.
 *
 * What a row gives is computed by the same operations in the same order whatever the number of rows
 * and threads: no sum crosses rows or threads.
 */
#include "step.h"

#include <stdlib.h>

#include "attention.h"
#include "pool.h"
#include "tiled_attention.h"
#include "tiles.h"

#define PHASES_OF_LAYER 24
#define DRAW_BLOCK 128 /* as `sampling.BLOCK_TOKENS` */
#define PIECE_COLUMNS (8 * PANEL)

struct context {
    pool *all;
    float *memory;
    size_t room;
    atomic_int *taken; /* of each phase: pieces that a thread has */
    int phases;
};

/* What a thread of a call knows. */
typedef struct {
    context *in;
    int threads, phase;
    uint16_t *splits; /* room for those of an input */
    int parts;        /* of them */
} team;

static int next_piece(team *us) { return atomic_fetch_add(&us->in->taken[us->phase], 1); }

static void meet(team *us) {
    pool_meet(us->in->all);
    us->phase++;
}

static int pieces(int count, int size) { return (count + size - 1) / size; }

static int smaller(int a, int b) { return a < b ? a : b; }

/* --- inputs of products ------------------------------------------------------------------------ */

/* Rows as a weight, and all of its shape, take them; in a phase of its own where they are split. */
static input taken_by(team *us, const matrix *w, const float *x, size_t ldx, int rows) {
    input made = {x, ldx, rows, us->parts, NULL};
    if (!tiled(w)) return made;
    made.splits = us->splits;
    for (int i; (i = next_piece(us)) < pieces(rows, TILE_ROWS);) {
        size_t first = (size_t)i * TILE_ROWS;
        split_rows(
            x + first * ldx, ldx, smaller(TILE_ROWS, rows - (int)first), us->parts, w->k,
            us->splits + first * w->k * us->parts
        );
    }
    meet(us);
    return made;
}

/* Panels [first, last) of a product, of `rows` rows from `start` on; y is that of all rows. */
static void panels_of(
    const matrix *w, int first, int last, input from, int start, int rows, float *y, size_t ldy,
    int how
) {
    if (from.splits != NULL)
        product_of_tiles(w, first, last, from, start, rows, y, ldy, how);
    else
        product(
            w, first, last, from.x + start * from.ldx, from.ldx, rows, y + start * ldy, ldy, how);
}

/* --- products with what adapters add ---------------------------------------------------------- */

typedef struct {
    const group *groups;
    int groups_count, index; /* of the site */
    float *between;          /* (rows, ld_between): what A makes of each row */
    size_t ld_between;
    int rounds; /* ROUNDS, or 0 */
} adapters;

static int any(adapters of) {
    for (int g = 0; g < of.groups_count; g++)
        if (of.groups[g].sites[of.index].a != NULL) return 1;
    return 0;
}

/* What A makes; in the phase of the product beside it. */
static void adapters_down(team *us, adapters of, int k, const float *x, size_t ldx) {
    int seen = 0, own = next_piece(us);
    /* All columns of a row lie beside each other; but few adapters have to be shared out. */
    int piece = of.groups_count < 2 * us->threads ? PANEL : PIECE_COLUMNS;
    for (int g = 0; g < of.groups_count; g++) {
        const group *rows = &of.groups[g];
        const site *s = &rows->sites[of.index];
        if (s->a == NULL) continue;
        int columns = s->parts * s->rank;
        for (int start = 0; start < rows->count; start += BLOCK_ROWS)
            for (int at = 0; at < columns; at += piece) {
                if (seen++ != own) continue;
                const int32_t *index = rows->rows + start;
                product_of_columns(
                    s->a, columns, k, at, smaller(at + piece, columns), x, ldx, index,
                    smaller(BLOCK_ROWS, (int)rows->count - start), of.between, of.ld_between, index,
                    of.rounds
                );
                own = next_piece(us);
            }
    }
}

/* What B makes of that, added to y. */
static void adapters_up(team *us, adapters of, float *y, size_t ldy) {
    int seen = 0, own = next_piece(us);
    for (int g = 0; g < of.groups_count; g++) {
        const group *rows = &of.groups[g];
        const site *s = &rows->sites[of.index];
        if (s->a == NULL) continue;
        size_t n = 0, offset = 0;
        for (int p = 0; p < s->parts; p++) n += s->widths[p];
        for (int p = 0; p < s->parts; offset += s->widths[p++])
            for (int start = 0; start < rows->count; start += BLOCK_ROWS)
                for (int at = 0; at < s->widths[p]; at += PIECE_COLUMNS) {
                    if (seen++ != own) continue;
                    const int32_t *index = rows->rows + start;
                    product_of_columns(
                        s->b + (size_t)p * s->rank * n + offset, n, s->rank, at,
                        smaller(at + PIECE_COLUMNS, s->widths[p]), of.between + p * s->rank,
                        of.ld_between, index, smaller(BLOCK_ROWS, (int)rows->count - start),
                        y + offset, ldy, index, ADDS | of.rounds
                    );
                    own = next_piece(us);
                }
    }
}

static void multiplied(
    team *us, const matrix *w, const float *x, size_t ldx, int rows, float *y, size_t ldy, int how,
    adapters of
) {
    input from = taken_by(us, w, x, ldx, rows);
    int panels = pieces(w->n, PANEL), blocks = pieces(rows, BLOCK_ROWS);
    int chunk = panels / (us->threads * 4);
    chunk = chunk > 8 ? 8 : chunk < 2 ? 2 : chunk / 2 * 2;
    int all = pieces(panels, chunk) * blocks;
    for (int i; (i = next_piece(us)) < all;) {
        int first = i / blocks * chunk, start = i % blocks * BLOCK_ROWS;
        panels_of(
            w, first, smaller(first + chunk, panels), from, start,
            smaller(BLOCK_ROWS, rows - start), y, ldy, how
        );
    }
    us->phase++; /* the adapters' pieces are counted apart, and nobody needs to wait */
    if (any(of)) {
        adapters_down(us, of, w->k, x, ldx);
        meet(us);
        adapters_up(us, of, y, ldy);
    }
    meet(us);
}

/* --- what is between products ------------------------------------------------------------------ */

/* x / sqrt(mean(x^2) + eps) * weight; `to` may be x. Where it rounds, before the weight as well. */
INLINE void norm_of(
    const float *x, const float *weight, int size, float eps, float *to, const int rounds
) {
    vec sum = v_all(0);
    float squares = 0;
    int d = 0;
    for (; d + WIDTH <= size; d += WIDTH) {
        vec own = v_load(x + d);
        sum = v_fma(own, own, sum);
    }
    for (int tail = d; tail < size; tail++) squares = fmaf(x[tail], x[tail], squares);
    squares += v_sum(sum);
    float scale = 1.0f / sqrtf(squares / (float)size + eps);
    for (d = 0; d + WIDTH <= size; d += WIDTH) {
        vec made = v_mul(v_load(x + d), v_all(scale)), times = v_load(weight + d);
        v_store(to + d, rounds ? v_rounded(v_mul(v_rounded(made), times)) : v_mul(made, times));
    }
    for (; d < size; d++)
        to[d] = rounds ? rounded(rounded(x[d] * scale) * weight[d]) : x[d] * scale * weight[d];
}

static void norm(
    const float *x, const float *weight, int size, float eps, float *to, int rounds
) {
    if (rounds) norm_of(x, weight, size, eps, to, 1);
    else norm_of(x, weight, size, eps, to, 0);
}

/* What was made, added to hidden states, which are rounded. */
static void added(float *h, const float *made, int size) {
    int d = 0;
    for (; d + WIDTH <= size; d += WIDTH)
        v_store(h + d, v_rounded(v_add(v_load(h + d), v_load(made + d))));
    for (; d < size; d++) h[d] = rounded(h[d] + made[d]);
}

/* Norms of hidden states; where there is `made`, first that is added to them. `to` may be that. */
static void norms(
    team *us, const model *m, int rows, float *h, const float *made, const float *weight, float *to
) {
    size_t size = m->hidden;
    for (int i; (i = next_piece(us)) < pieces(rows, TILE);)
        for (int r = i * TILE; r < smaller(rows, (i + 1) * TILE); r++) {
            if (made != NULL) added(h + r * size, made + r * size, size);
            norm(h + r * size, weight, size, m->eps, to + r * size, m->narrow);
        }
    meet(us);
}

/* silu(gate) * up in place of gate: x / (1 + e^-x). Where it rounds, before the product as well. */
INLINE void gated_of(float *gate, const float *up, int count, const int rounds) {
    const vec one = v_all(1), minus = v_all(-1);
    int d = 0;
    for (; d + WIDTH <= count; d += WIDTH) {
        vec x = v_load(gate + d);
        vec silu = v_div(x, v_add(one, v_exp(v_mul(minus, x))));
        vec made = v_mul(rounds ? v_rounded(silu) : silu, v_load(up + d));
        v_store(gate + d, rounds ? v_rounded(made) : made);
    }
    for (; d < count; d++) {
        float silu = gate[d] / (1 + exp_of(-gate[d]));
        gate[d] = rounds ? rounded(rounded(silu) * up[d]) : silu * up[d];
    }
}

static void gated(float *gate, const float *up, int count, int rounds) {
    if (rounds) gated_of(gate, up, count, 1);
    else gated_of(gate, up, count, 0);
}

/* silu(x gate^T) * (x up^T) in the first half of y, `(rows, 2 * ffn)`. */
static void gated_up(
    team *us, const layer *own, const float *x, size_t ldx, int rows, float *y, adapters of
) {
    int ffn = own->gate.n, panels = pieces(ffn, PANEL), blocks = pieces(rows, BLOCK_ROWS);
    size_t ldy = 2 * (size_t)ffn;
    int chunk = panels / (us->threads * 4), later = any(of);
    input from = taken_by(us, own->up.narrow ? &own->gate : &own->up, x, ldx, rows);
    chunk = chunk > 4 ? 4 : chunk < 2 ? 2 : chunk / 2 * 2;
    int all = pieces(panels, chunk) * blocks;
    for (int i; (i = next_piece(us)) < all;) {
        int first = i / blocks * chunk, last = smaller(first + chunk, panels);
        int start = i % blocks * BLOCK_ROWS, count = smaller(BLOCK_ROWS, rows - start);
        float *to = y + start * ldy;
        panels_of(&own->gate, first, last, from, start, count, y, ldy, of.rounds);
        panels_of(&own->up, first, last, from, start, count, y + ffn, ldy, of.rounds);
        for (int r = 0; r < count && !later; r++) {
            float *part = to + r * ldy + first * PANEL;
            gated(part, part + ffn, smaller(last * PANEL, ffn) - first * PANEL, of.rounds);
        }
    }
    us->phase++;
    if (later) {
        adapters_down(us, of, own->gate.k, x, ldx);
        meet(us);
        adapters_up(us, of, y, ldy);
        meet(us);
        for (int r; (r = next_piece(us)) < rows;)
            gated(y + r * ldy, y + r * ldy + ffn, ffn, of.rounds);
    }
    meet(us);
}

/* --- attention --------------------------------------------------------------------------------- */

static run head_of(const model *m, const store *from, int64_t slot, int layer, int head) {
    size_t bytes = m->narrow ? 2 : 4;
    size_t run_bytes = (size_t)from->capacity * m->head_dim * bytes;
    const char *start = from->layers[layer];
    start += ((size_t)slot * 2 * m->kv_heads + head) * run_bytes;
    return (run){start, start + m->kv_heads * run_bytes};
}

/* Where it rounds, each product as well. */
static void turn(float *x, const float *angles, int half, int rounds) {
    for (int d = 0; rounds && d < half; d++) {
        float a = x[d], b = x[d + half], cos = angles[d], sin = angles[d + half];
        x[d] = rounded(rounded(a * cos) - rounded(b * sin));
        x[d + half] = rounded(rounded(b * cos) + rounded(a * sin));
    }
    for (int d = 0; !rounds && d < half; d++) {
        float a = x[d], b = x[d + half], cos = angles[d], sin = angles[d + half];
        x[d] = fmaf(a, cos, -b * sin);
        x[d + half] = fmaf(b, cos, a * sin);
    }
}

static void kv_written(const float *from, const void *run_start, int64_t at, int dim, int narrow) {
    if (narrow) {
        uint16_t *to = (uint16_t *)run_start + (size_t)at * dim;
        for (int d = 0; d < dim; d++) to[d] = narrowed(from[d]);
    } else {
        memcpy((float *)run_start + (size_t)at * dim, from, sizeof(float) * (size_t)dim);
    }
}

/* Turn queries and keys, and write keys and values where they stay. */
static void placed(team *us, const model *m, const step *s, int index, float *qkv) {
    const layer *own = &m->each[index];
    int dim = m->head_dim, turned = m->heads + m->kv_heads;
    size_t ld = (size_t)(turned + m->kv_heads) * dim;
    for (int r; (r = next_piece(us)) < s->count;) {
        const row *at = &s->rows[r];
        float *heads = qkv + r * ld;
        for (int h = 0; h < turned; h++) {
            const float *weight = h < m->heads ? own->norm_q : own->norm_k;
            float *own = heads + h * dim;
            if (weight != NULL) norm(own, weight, dim, m->qk_eps, own, m->narrow);
            turn(own, s->angles + (size_t)r * dim, dim / 2, m->narrow);
        }
        for (int h = 0; h < m->kv_heads; h++) {
            run to = head_of(m, &s->stores[at->store], at->slot, index, h);
            const float *key = heads + (m->heads + h) * dim;
            const float *value = key + m->kv_heads * dim;
            kv_written(key, to.keys, at->position - at->split, dim, m->narrow);
            kv_written(value, to.values, at->position - at->split, dim, m->narrow);
        }
    }
    meet(us);
}

static int64_t first_key(const row *at, int64_t window) {
    return window && at->position >= window ? at->position - window + 1 : 0;
}

/* Before which key two rows see the same: in what they share, or because they are of one sequence;
 * -1 where they do not begin with the same. */
static int64_t alike(const row *a, const row *b, int64_t window) {
    if (a->split != b->split || first_key(a, window) != first_key(b, window)) return -1;
    if (a->split && a->shared != b->shared) return -1;
    if (a->store == b->store && a->slot == b->slot)
        return (a->position < b->position ? a->position : b->position) + 1;
    return a->split ? a->split : -1;
}

/* Whether rows of prompts meet their keys in tiles. */
static int by_tiles(const model *m, int index) {
    return m->narrow && !m->each[index].window && tiled_heads(m->head_dim);
}

/* How many rows from r on follow each other in one prompt, at most so many. */
static int following(const step *s, int r, int most) {
    const row *at = &s->rows[r];
    int rows = 1;
    while (rows < most && r + rows < s->count && at[rows].store == at->store &&
           at[rows].position == at->position + rows)
        rows++;
    return rows;
}

/* What the queries of prompts find, in tiles. */
static void attended_by_tiles(
    team *us, const model *m, const step *s, int index, const float *qkv, float *to
) {
    int dim = m->head_dim, group_heads = m->heads / m->kv_heads;
    size_t ld = (size_t)(m->heads + 2 * m->kv_heads) * dim, ldto = (size_t)m->heads * dim;
    int few = (s->count - s->sequences) * m->kv_heads < 4 * us->threads * UNIT_ROWS;
    int most = few ? TILE_ROWS : UNIT_ROWS;
    int seen = 0, own = next_piece(us);
    for (int r = s->sequences, rows; r < s->count; r += rows) {
        const row *at = &s->rows[r];
        rows = following(s, r, most);
        for (int h = 0; h < m->heads; h += smaller(GROUP_MAX, group_heads - h % group_heads)) {
            if (seen++ != own) continue;
            run from = head_of(m, &s->stores[at->store], at->slot, index, h / group_heads);
            int group = smaller(GROUP_MAX, group_heads - h % group_heads);
            attend_tiles(&(tiled_unit){
                qkv + r * ld + h * dim, to + r * ldto + h * dim, ld, ldto, rows, group, dim,
                at->position, from, m->scaling});
            own = next_piece(us);
        }
    }
}

/* What the queries find, `(count, heads * head_dim)`. Rows beside each other that see the same keys
 * meet them together. */
static void attended(team *us, const model *m, const step *s, int index, const float *qkv, float *to) {
    if (by_tiles(m, index)) {
        attended_by_tiles(us, m, s, index, qkv, to);
        us->phase++;
    }
    int all_rows = by_tiles(m, index) ? s->sequences : s->count;
    int dim = m->head_dim, group_heads = m->heads / m->kv_heads;
    size_t ld = (size_t)(m->heads + 2 * m->kv_heads) * dim;
    int64_t window = m->each[index].window;
    /* Few rows are shared out by the query head. */
    int each = all_rows * m->kv_heads < 4 * us->threads ? 1 : smaller(group_heads, GROUP_MAX);
    int parts = pieces(group_heads, each);
    int most = smaller(JOINED, all_rows * m->kv_heads * parts / (4 * us->threads));
    if (most < 1) most = 1;
    int joins = pieces(all_rows, most);
    int all = m->kv_heads * parts * joins;
    for (int i; (i = next_piece(us)) < all;) {
        int part = i / joins % parts, h = i / joins / parts;
        int first_head = h * group_heads + part * each;
        int count = smaller(each, group_heads - part * each);
        int end = smaller(all_rows, (i % joins + 1) * most);
        for (int r = i % joins * most, rows; r < end; r += rows) {
            const row *at = &s->rows[r];
            meeting met[JOINED];
            int64_t bound = at->position + 1, next;
            for (rows = 0; r + rows < end; rows++) {
                const row *one = &s->rows[r + rows];
                if (rows && (next = alike(at, one, window)) < 0) break;
                if (rows && next < bound) bound = next;
                met[rows].q = qkv + (r + rows) * ld + first_head * dim;
                met[rows].to = to + ((size_t)(r + rows) * m->heads + first_head) * dim;
                met[rows].own = head_of(m, &s->stores[one->store], one->slot, index, h);
                met[rows].last = one->position;
            }
            run shared = met[0].own;
            if (at->split) shared = head_of(m, &s->stores[at->shared], 0, index, h);
            (m->narrow ? attend_narrow : attend_wide)(
                met, rows, count, dim, shared, at->split, first_key(at, window), bound, m->scaling);
        }
    }
    meet(us);
}

/* --- calls ------------------------------------------------------------------------------------- */

typedef struct {
    context *in;
    const model *m;
    const step *s;
    float *x, *qkv, *found, *both, *between;
    size_t ld_between;
    uint16_t *splits;
    int parts;
} forward;

static void forward_part(void *given, int thread) {
    (void)thread;
    forward *f = given;
    const model *m = f->m;
    const step *s = f->s;
    team us = {f->in, pool_threads(f->in->all), 0, f->splits, f->parts};
    tile_shapes before = tiles_begun();
    int count = s->count, hidden = m->hidden, dims = m->heads * m->head_dim;
    size_t ld = (size_t)dims + 2 * (size_t)m->kv_heads * m->head_dim;
    /* Rounded sums wait in x until a norm adds them to h: an adapter adds to them first. */
    float *y = m->narrow ? f->x : s->h, *made = m->narrow ? f->x : NULL;
    int rounds = m->narrow ? ROUNDS : 0, adds = m->narrow ? ROUNDS : ADDS;
    for (int i = 0; i < m->layers; i++) {
        const layer *own = &m->each[i];
        adapters of[SITES];
        for (int site = 0; site < SITES; site++)
            of[site] = (adapters){
                s->groups, s->groups_count, i * SITES + site, f->between, f->ld_between, rounds};
        norms(&us, m, count, s->h, i ? made : NULL, own->norm_1, f->x);
        multiplied(&us, &own->qkv, f->x, hidden, count, f->qkv, ld, rounds, of[SITE_QKV]);
        placed(&us, m, s, i, f->qkv);
        attended(&us, m, s, i, f->qkv, f->found);
        multiplied(&us, &own->o, f->found, dims, count, y, hidden, adds, of[SITE_O]);
        norms(&us, m, count, s->h, made, own->norm_2, f->x);
        gated_up(&us, own, f->x, hidden, count, f->both, of[SITE_GATE_UP]);
        multiplied(
            &us, &own->down, f->both, 2 * (size_t)m->ffn, count, y, hidden, adds, of[SITE_DOWN]);
    }
    norms(&us, m, count, s->h, made, m->norm, s->out);
    tiles_ended(before);
}

/* Have memory for so many floats, and counters for so many phases, all zero. */
static int prepared(context *in, size_t floats, int phases) {
    if (floats > in->room) {
        free(in->memory);
        in->room = 0;
        in->memory = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        if (in->memory == NULL) return -1;
        in->room = floats;
    }
    if (phases > in->phases) {
        free(in->taken);
        in->phases = 0;
        in->taken = malloc(sizeof *in->taken * (size_t)phases);
        if (in->taken == NULL) return -1;
        in->phases = phases;
    }
    for (int i = 0; i < phases; i++) atomic_init(&in->taken[i], 0);
    return 0;
}

static size_t between_of(const group *groups, int count, int sites) {
    size_t most = 0;
    for (int g = 0; g < count; g++)
        for (int i = 0; i < sites; i++) {
            const site *s = &groups[g].sites[i];
            size_t columns = s->a == NULL ? 0 : (size_t)s->parts * s->rank;
            if (columns > most) most = columns;
        }
    return most;
}

/* Compute a forward. Returns 0, or -1 where memory lacks and nothing was done. */
int tin_forward(context *in, const model *m, const step *s) {
    size_t rows = s->count, dims = (size_t)m->heads * m->head_dim;
    size_t ld = dims + 2 * (size_t)m->kv_heads * m->head_dim;
    forward f = {.in = in, .m = m, .s = s, .parts = m->narrow ? 1 : SPLITS};
    f.ld_between = between_of(s->groups, s->groups_count, SITES * m->layers);
    size_t floats = rows * (m->hidden + ld + dims + 2 * (size_t)m->ffn + f.ld_between) + 64;
    size_t most = m->hidden > m->ffn ? m->hidden : m->ffn;
    size_t splits = split_floats(rows, most > dims ? most : dims, f.parts);
    if (prepared(in, splits + floats, m->layers * PHASES_OF_LAYER + 2)) return -1;
    f.splits = (uint16_t *)in->memory;
    f.x = in->memory + splits;
    f.qkv = f.x + rows * m->hidden;
    f.found = f.qkv + rows * ld;
    f.both = f.found + rows * dims;
    f.between = f.both + rows * 2 * m->ffn;
    pool_run(in->all, forward_part, &f);
    return 0;
}

typedef struct {
    context *in;
    const matrix *w;
    const float *x;
    float *y;
    int rows;
    adapters of;
    uint16_t *splits;
    int parts;
} one_product;

static void product_part(void *given, int thread) {
    (void)thread;
    one_product *p = given;
    team us = {p->in, pool_threads(p->in->all), 0, p->splits, p->parts};
    tile_shapes before = tiles_begun();
    multiplied(&us, p->w, p->x, p->w->k, p->rows, p->y, p->w->n, 0, p->of);
    tiles_ended(before);
}

/* y = x W^T + b, with what adapters add; x is (rows, k), of bfloat16's values where `narrow`, y
 * (rows, n). Returns as `tin_forward`. */
int tin_product(
    context *in, const matrix *w, const float *x, int rows, int narrow, float *y,
    const group *groups, int count
) {
    int parts = narrow ? 1 : SPLITS;
    size_t ld = between_of(groups, count, 1), splits = split_floats(rows, w->k, parts);
    if (prepared(in, splits + rows * ld + 64, 5)) return -1;
    adapters of = {groups, count, 0, in->memory + splits, ld, 0};
    one_product p = {in, w, x, y, rows, of, (uint16_t *)in->memory, parts};
    pool_run(in->all, product_part, &p);
    return 0;
}

typedef struct {
    context *in;
    const float *logits, *inverse;
    float *weights, *maxima;
    double *sums;
    int rows, vocab;
} weighing;

/* e^((x - max) / t) of a row in blocks, and the sum of each block. */
static void weighed(const weighing *w, int r) {
    int blocks = pieces(w->vocab, DRAW_BLOCK);
    const float *from = w->logits + (size_t)r * w->vocab;
    float *to = w->weights + (size_t)r * blocks * DRAW_BLOCK;
    vec most = v_all(-INFINITY);
    int d = 0;
    for (; d + WIDTH <= w->vocab; d += WIDTH) most = v_max(most, v_load(from + d));
    float lanes[WIDTH], highest = -INFINITY;
    v_store(lanes, most);
    for (int i = 0; i < WIDTH; i++) highest = lanes[i] > highest ? lanes[i] : highest;
    for (; d < w->vocab; d++) highest = from[d] > highest ? from[d] : highest;
    w->maxima[r] = highest;
    const vec shift = v_all(-highest), times = v_all(w->inverse[r]), least = v_all(-87.0f);
    for (int b = 0; b < blocks; b++) {
        float padded[DRAW_BLOCK];
        int start = b * DRAW_BLOCK, count = smaller(DRAW_BLOCK, w->vocab - start);
        const float *own = from + start;
        if (count < DRAW_BLOCK) {
            for (int i = 0; i < DRAW_BLOCK; i++) padded[i] = i < count ? own[i] : -INFINITY;
            own = padded;
        }
        vec sum = v_all(0);
        for (int i = 0; i < DRAW_BLOCK; i += WIDTH) {
            vec x = v_mul(v_add(v_load(own + i), shift), times);
            /* What cannot be drawn has no weight at all. */
            vec made = v_unless_below(x, least, v_exp(x));
            v_store(to + start + i, made);
            sum = v_add(sum, made);
        }
        w->sums[(size_t)r * blocks + b] = v_sum(sum);
    }
}

static void weighing_part(void *given, int thread) {
    (void)thread;
    weighing *w = given;
    team us = {w->in, pool_threads(w->in->all)};
    for (int r; (r = next_piece(&us)) < w->rows;) weighed(w, r);
}

/* Unnormalised probabilities of rows of logits, (rows, vocab): float32 weights relative to the
 * row's largest logit, (rows, blocks * DRAW_BLOCK), zeros behind the last; the largest logits; and
 * the sums of blocks, (rows, blocks). Returns as `tin_forward`. */
int tin_weigh(
    context *in, const float *logits, int rows, int vocab, const float *inverse, float *weights,
    float *maxima, double *sums
) {
    if (prepared(in, 64, 1)) return -1;
    weighing w = {in, logits, inverse, weights, maxima, sums, rows, vocab};
    pool_run(in->all, weighing_part, &w);
    return 0;
}

/* --- weights of adapters ------------------------------------------------------------------------ */

static void turned(const turning *m) {
    size_t columns = (size_t)m->columns, ld = (size_t)m->ld;
    for (size_t row = 0; row < (size_t)m->rows; row += SQUARE) {
        size_t rows = (size_t)smaller(SQUARE, m->rows - (int)row), c = 0;
        const float *from = m->given + row * columns;
        float *to = m->to + row;
        if (rows == SQUARE)
            for (; c + SQUARE <= columns; c += SQUARE)
                v_square(from + c, columns, m->scale, to + c * ld, ld);
        for (; c < columns; c++)
            for (size_t r = 0; r < rows; r++) to[c * ld + r] = m->scale * from[r * columns + c];
    }
}

/* Turn matrices round, on the thread that calls. */
void tin_turn(const turning *all, int count) {
    for (int i = 0; i < count; i++) turned(&all[i]);
}

/* --- set up ------------------------------------------------------------------------------------ */

/* Whether this machine lets the process use the instructions that this was compiled for. */
int tin_usable(void) { return tiles_granted(); }

/* NULL where memory lacks. */
context *tin_open(int threads) {
    context *in = calloc(1, sizeof *in);
    if (in == NULL) return NULL;
    in->all = pool_open(threads < 1 ? 1 : threads);
    if (in->all == NULL) {
        free(in);
        return NULL;
    }
    return in;
}

/* Nothing may be under way. */
void tin_close(context *in) {
    pool_close(in->all);
    free(in->memory);
    free(in->taken);
    free(in);
}

/* Bytes of what of this interface could be laid out otherwise. */
int64_t tin_layout(void) {
    return (int64_t)(sizeof(model) + 1000 * (sizeof(layer) + 1000 * (sizeof(step) + 1000 * (
        sizeof(site) + 1000 * (
            sizeof(group) + sizeof(store) + sizeof(row) + sizeof(turning))))));
}

int64_t tin_packed_bytes(int n, int k, int narrow) {
    return (int64_t)pieces(n, PANEL) * (int64_t)panel_bytes(k, narrow);
}

typedef struct {
    context *in;
    const float *weight;
    int n, k, narrow;
    char *to;
} packing;

static void packed_panel(const packing *p, int at) {
    size_t bytes = panel_bytes(p->k, p->narrow);
    int first = at * PANEL, columns = smaller(PANEL, p->n - first);
    const float *from = p->weight + (size_t)first * p->k;
    if (columns < PANEL || p->k % 2) memset(p->to + at * bytes, 0, bytes);
    for (int i = 0; i < p->k; i++) {
        float *wide = (float *)(p->to + at * bytes) + (size_t)i * PANEL;
        uint16_t *narrow = (uint16_t *)(p->to + at * bytes) + (size_t)(i / 2) * PANEL * 2 + i % 2;
        for (int c = 0; c < columns; c++) {
            uint32_t bits;
            memcpy(&bits, &from[(size_t)c * p->k + i], sizeof bits);
            if (p->narrow) narrow[2 * c] = (uint16_t)(bits >> 16);
            else memcpy(&wide[c], &bits, sizeof bits);
        }
    }
}

static void packing_part(void *given, int thread) {
    (void)thread;
    packing *p = given;
    team us = {p->in, pool_threads(p->in->all)};
    for (int at; (at = next_piece(&us)) < pieces(p->n, PANEL);) packed_panel(p, at);
}

/* Bring a float32 weight (n, k) into panels. Of a narrow one the lower halves must be zero.
 * Returns as `tin_forward`. */
int tin_pack(context *in, const float *weight, int n, int k, int narrow, void *to) {
    if (prepared(in, 64, 1)) return -1;
    packing p = {in, weight, n, k, narrow, to};
    pool_run(in->all, packing_part, &p);
    return 0;
}
