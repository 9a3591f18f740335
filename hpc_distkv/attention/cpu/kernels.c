/* MicroAttention over paged rBlocks on a CPU: float32 statistics, base e.
 *
 * A row's queries and the query heads of one KV head are packed into one matrix ("lines": line i is
 * query i / group, head i % group), so they share every load of K and V. Work is cut into items
 * (row, tile of lines, KV head, split of the block list). The cut depends on the row alone, and an
 * item's result on nothing but its inputs: neither batch-mates nor the number of threads change a bit.
 *
 * stream: few lines; bound by memory. Keys are read in place, the next tile is prefetched through
 *         the block table.
 * tiled:  many lines; bound by arithmetic. Each tile of keys is transposed and converted to float32
 *         once, then two register-blocked products do the rest.
 *
 * Options (window, soft-capping, ALiBi) act on the scores of a tile, between the first product and the
 * softmax: one test per line and tile if they are off. Keys behind the window are never read.
 *
 * "Working order": bfloat16 rows are widened two vectors at a time into even and odd elements (one
 * shift, one mask). Queries, keys, values and sums all live in that order; only `finish` undoes it.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* W floats per vector. EVEN/ODD pick from the concatenation of two vectors, ZIP interleaves them.
 * COLUMNS: vectors per line in the 6-line product; with its operands it must fit the registers. */
#if defined(__AVX512F__)
#define W 16
#define COLUMNS 4
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define W 8
#define COLUMNS 2
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define W 4
#define COLUMNS 4
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif

enum { F32, BF16, F16 };
enum {
    TILE = 64,            /* keys per softmax update */
    STREAM_LINES = 16,    /* lines per stream item */
    TILED_LINES = 96,     /* lines per tiled item, a multiple of PRODUCT_LINES */
    PRODUCT_LINES = 6,
    STREAM_SPLIT = 1024,  /* keys per split */
    TILED_SPLIT = 8192,
    SPLIT_TILES = 4,      /* rows of more tiles than this have work for all threads without splits */
    PARALLEL = 1 << 17,   /* multiply-adds below which waking other threads costs more than it saves */
    COPY_PARALLEL = 1 << 18, /* the same for copies, in bytes */
};
enum { OK, NO_MEMORY, BAD_BATCH };

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef vf vf_any __attribute__((aligned(4), may_alias));
typedef vi vi_any __attribute__((aligned(4), may_alias));
typedef vu vu_any __attribute__((aligned(2), may_alias));
typedef vh vh_any __attribute__((aligned(2), may_alias));

/* The arguments of micro_attention; native.py packs the same fields in the same order. */
typedef struct {
    const char *q, *k, *v;
    float *out, *lse;
    const int32_t *query_start, *query_position, *block_start, *blocks, *first_token, *kv_len;
    const float *slopes; /* [heads], or none */
    int64_t queries, rows, listed, heads, kv_heads, dim, num_blocks, block_size;
    int64_t q_stride, k_stride, v_stride; /* bytes between queries, between rBlocks */
    int64_t dtype, causal, window, stream_lines, threads;
    double scale, softcap;
} Call;

/* ---- vectors ---- */

INLINE vf load(const void *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf x) { *(vf_any *)p = x; }
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf zip_low(vf a, vf b) { return __builtin_shufflevector(a, b, ZIP_LOW); }
INLINE vf zip_high(vf a, vf b) { return __builtin_shufflevector(a, b, ZIP_HIGH); }
INLINE vf add_pairs(vf a, vf b) {
    return __builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD);
}

INLINE float sum_of(vf x) {
    for (int n = W; n > 1; n /= 2) x = add_pairs(x, x);
    return x[0];
}

INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }

INLINE float max_of(vf x) {
    for (int n = W; n > 1; n /= 2)
        x = larger(__builtin_shufflevector(x, x, EVEN), __builtin_shufflevector(x, x, ODD));
    return x[0];
}

INLINE vf load_half(const void *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p));
#else /* finite values only: the exponent is rebased by a product */
    vu x = __builtin_convertvector(*(const vh_any *)p, vu);
    vf magnitude = (vf)((x & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vu)magnitude | (x & 0x8000) << 16);
#endif
}

/* Vector i of a row of keys, values or queries, alone: natural order. */
INLINE vf load_one(const char *row, int i, int dtype) {
    if (dtype == F32) return load(row + 4 * W * i);
    if (dtype == F16) return load_half(row + 2 * W * i);
    return (vf)(__builtin_convertvector(*(const vh_any *)(row + 2 * W * i), vu) << 16);
}

/* Vectors i and i + 1 of a row, i even: working order. */
INLINE void load_two(const char *row, int i, int dtype, vf *a, vf *b) {
    if (dtype == BF16) {
        vu x = *(const vu_any *)(row + 2 * W * i);
        *a = (vf)(x << 16);
        *b = (vf)(x & 0xffff0000u);
    } else {
        *a = load_one(row, i, dtype);
        *b = load_one(row, i + 1, dtype);
    }
}

INLINE void widen(const char *row, int vectors, int dtype, float scale, float *to) {
    int i = 0;
    for (vf a, b; i + 2 <= vectors; i += 2) {
        load_two(row, i, dtype, &a, &b);
        store(to + W * i, a * scale);
        store(to + W * i + W, b * scale);
    }
    if (i < vectors) store(to + W * i, load_one(row, i, dtype) * scale);
}

/* exp(x) for x <= 0, relative error below 1e-7 (1 + |x|); exactly 0 from -87 down, -inf included.
 * No two-part reduction: where x is large enough to lose digits, the weight no longer matters. */
INLINE vf exp_negative(vf x) {
    vf y = x * 1.44269504f;
    vi n = __builtin_convertvector(y - 0.5f, vi);
    vf f = y - __builtin_convertvector(n, vf);
    vf p = f * 1.535336188e-4f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332548e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    vi bits = (vi)p + (n << 23);
    return (vf)(bits & (x > -87.0f));
}

INLINE float exp_one(float x) { return exp_negative(splat(x))[0]; }

/* Relative error below 1e-6: near 0 the quotient would lose digits, a series does not. */
INLINE vf tanh_of(vf x) {
    vf size = larger(x, -x), square = x * x, e = exp_negative(size * -2.0f);
    vf near = size - size * square * (0.333333333f - square * (0.133333333f - square * 5.39682540e-2f));
    vf result = choose(size > 0.125f, (1.0f - e) / (1.0f + e), near);
    return choose(x < 0.0f, -result, result);
}

/* ---- the keys of an item, in tiles ---- */

typedef struct {
    const char *k[TILE], *v[TILE];
    int32_t position[TILE];
    int count, earliest, latest; /* keys, the first and the last position among them */
} Tile;

typedef struct {
    const Call *call;
    int64_t head_offset;
    int row_block, block, end; /* first rBlock of the row; those of the split still to read */
    int offset, tokens, oldest, horizon; /* keys before `oldest` or after the horizon are not read */
} Cursor;

static void next_tile(Cursor *at, Tile *tile, int row_bytes) {
    const Call *call = at->call;
    int n = 0, earliest = INT32_MAX, latest = INT32_MIN;
    while (n < TILE && at->block < at->end) {
        int64_t before = (int64_t)(at->block - at->row_block) * call->block_size;
        int64_t visible = at->tokens - before;
        int64_t first = call->first_token[at->block], past = (int64_t)at->horizon - first + 1;
        int64_t hidden = at->oldest - first;
        if (visible > call->block_size) visible = call->block_size;
        if (visible > past) visible = past;
        if (hidden > at->offset) at->offset = hidden < visible ? hidden : call->block_size;
        int64_t take = visible - at->offset;
        if (take > TILE - n) take = TILE - n;
        int64_t index = call->blocks[at->block], inside = at->head_offset + (int64_t)at->offset * row_bytes;
        const char *k = call->k + index * call->k_stride + inside;
        const char *v = call->v + index * call->v_stride + inside;
        for (int t = 0; t < take; t++, n++, k += row_bytes, v += row_bytes) {
            tile->k[n] = k;
            tile->v[n] = v;
            tile->position[n] = first + at->offset + t;
        }
        if (take > 0) {
            at->offset += take;
            if (tile->position[n - 1] > latest) latest = tile->position[n - 1];
            if (tile->position[n - take] < earliest) earliest = tile->position[n - take];
        }
        if (at->offset >= visible) at->block++, at->offset = 0;
    }
    tile->count = n;
    tile->earliest = earliest;
    tile->latest = latest;
    for (int t = n; n && t < TILE; t++) { /* products work on whole vectors of keys */
        tile->k[t] = tile->k[n - 1];
        tile->v[t] = tile->v[n - 1];
        tile->position[t] = tile->position[n - 1];
    }
}

/* ---- softmax ---- */

INLINE void mask_future(float *s, const Tile *tile, int position) {
    for (int j = 0; j < tile->count; j += W) {
        vi seen = *(const vi_any *)(tile->position + j) <= position;
        store(s + j, choose(seen, load(s + j), splat(-INFINITY)));
    }
}

INLINE void mask_past(float *s, const Tile *tile, int64_t position) {
    for (int j = 0; j < tile->count; j += W) {
        vi seen = *(const vi_any *)(tile->position + j) > (int)position;
        store(s + j, choose(seen, load(s + j), splat(-INFINITY)));
    }
}

INLINE void cap_scores(float *s, int n, float cap) {
    for (int j = 0; j < n; j += W) store(s + j, tanh_of(load(s + j) * (1 / cap)) * cap);
}

INLINE void add_slope(float *s, const Tile *tile, int position, float slope) {
    for (int j = 0; j < tile->count; j += W) {
        vi distance = *(const vi_any *)(tile->position + j) - position;
        store(s + j, load(s + j) + __builtin_convertvector(distance, vf) * slope);
    }
}

/* Scores to weights, in place; returns the factor for everything summed so far. */
INLINE float update_softmax(float *s, int n, float *top, float *total) {
    int whole = (n + W - 1) / W * W;
    for (int j = n; j < whole; j++) s[j] = -INFINITY;
    vf peak = load(s);
    for (int j = W; j < whole; j += W) peak = larger(load(s + j), peak);
    float old = *top, new = max_of(peak);
    if (new == -INFINITY) {
        memset(s, 0, whole * sizeof *s);
        return 1;
    }
    if (old > new) new = old;
    vf sum = {};
    for (int j = 0; j < whole; j += W) {
        vf p = exp_negative(load(s + j) - new);
        store(s + j, p);
        sum += p;
    }
    float factor = exp_one(old - new);
    *top = new;
    *total = *total * factor + sum_of(sum);
    return factor;
}

/* ---- items ---- */

typedef struct {
    int row, line, lines, kv_head, split; /* lines [line, line + lines) of the row */
    int block, end;
    int position; /* of the row's first query */
    float *out, *lse; /* the row's: outputs, or the partials of the split; [queries, heads, dim] */
} Item;

typedef struct {
    float *q, *o, *s, *k, *v, *top, *total, *factor;
} Scratch;

INLINE int group_of(const Call *call) { return call->heads / call->kv_heads; }

INLINE int position_of(const Call *call, const Item *item, int i) {
    return item->position + (item->line + i) / group_of(call);
}

/* Line i of the item in q. */
INLINE const char *line_of(const Call *call, const Item *item, int i, int dtype) {
    int line = item->line + i, group = group_of(call);
    int64_t query = call->query_start[item->row] + line / group;
    int64_t head = item->kv_head * group + line % group;
    return call->q + query * call->q_stride + head * call->dim * (dtype == F32 ? 4 : 2);
}

/* What the options of the call, if any are on, and causality make of the scores of line i. */
INLINE void shape_scores(const Call *call, const Item *item, int i, const Tile *tile, float *s) {
    int position = position_of(call, item, i), group = group_of(call);
    if (call->softcap > 0) cap_scores(s, tile->count, call->softcap);
    if (call->slopes)
        add_slope(s, tile, position, call->slopes[item->kv_head * group + (item->line + i) % group]);
    if (call->causal && tile->latest > position) mask_future(s, tile, position);
    if (call->window && tile->earliest <= position - call->window)
        mask_past(s, tile, position - call->window);
}

static void start(const Call *call, const Item *item, const Scratch *w, int padded, int dtype) {
    int dim = call->dim;
    for (int i = 0; i < padded; i++) {
        float *q = w->q + i * dim;
        w->top[i] = -INFINITY;
        w->total[i] = 0;
        if (i < item->lines)
            widen(line_of(call, item, i, dtype), dim / W, dtype, call->scale, q);
        else
            memset(q, 0, dim * sizeof *q);
    }
    memset(w->o, 0, (size_t)padded * dim * sizeof *w->o);
}

static void finish(const Call *call, const Item *item, const Scratch *w, int dtype) {
    int group = group_of(call), dim = call->dim;
    for (int i = 0; i < item->lines; i++) {
        int line = item->line + i;
        int64_t at = (int64_t)(line / group) * call->heads + item->kv_head * group + line % group;
        float *out = item->out + at * dim, *o = w->o + i * dim, total = w->total[i];
        float factor = total > 0 ? 1 / total : 0;
        item->lse[at] = total > 0 ? w->top[i] + logf(total) : -INFINITY;
        for (int d = 0; d < dim; d += W) {
            vf a = load(o + d) * factor;
            if (dtype == BF16 && d + 2 * W <= dim) {
                vf b = load(o + d + W) * factor;
                store(out + d, zip_low(a, b));
                store(out + (d += W), zip_high(a, b));
            } else {
                store(out + d, a);
            }
        }
    }
}

static Cursor cursor_of(const Call *call, const Item *item, int row_bytes) {
    return (Cursor){
        .call = call,
        .head_offset = (int64_t)item->kv_head * call->block_size * row_bytes,
        .row_block = call->block_start[item->row],
        .block = item->block,
        .end = item->end,
        .tokens = call->kv_len[item->row],
        .oldest = call->window ? position_of(call, item, 0) - call->window + 1 : INT32_MIN,
        .horizon = call->causal ? position_of(call, item, item->lines - 1) : INT32_MAX - 1,
    };
}

/* ---- few lines: stream ---- */

INLINE void prefetch_row(const char *row, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

/* sums[l, u] of one key u and line l each, to s[l, u]: all W of them reduced by one tree. */
INLINE void store_scores(vf sums[W], int lines, int keys, float scale, float *s) {
    vf half[W / 2];
    for (int j = 0; j < W / 2; j++) half[j] = add_pairs(sums[2 * j], sums[2 * j + 1]);
    for (int j = 0; j < W / 4; j++) half[j] = add_pairs(half[2 * j], half[2 * j + 1]);
    for (int j = 0; j < W / 8; j++) half[j] = add_pairs(half[2 * j], half[2 * j + 1]);
    for (int j = 0; j < W / 16; j++) half[j] = add_pairs(half[2 * j], half[2 * j + 1]);
    vf all = half[0] * scale;
    for (int l = 0; l < lines; l++) memcpy(s + l * TILE, (float *)&all + l * keys, keys * sizeof *s);
}

INLINE void score_widened(const float *q, const Tile *tile, const Tile *next, int vectors, int dtype,
                          int lines, int keys, float *s) {
    int bytes = vectors * W * (dtype == F32 ? 4 : 2);
    for (int t = 0; t < tile->count; t += keys) {
        vf sums[W] = {};
        int i = 0;
        for (int u = 0; u < keys; u++) prefetch_row(next->k[t + u], bytes);
        for (vf a, b; i + 2 <= vectors; i += 2)
            for (int u = 0; u < keys; u++) {
                load_two(tile->k[t + u], i, dtype, &a, &b);
                for (int l = 0; l < lines; l++) {
                    const float *x = q + (l * vectors + i) * W;
                    sums[l * keys + u] += a * load(x);
                    sums[l * keys + u] += b * load(x + W);
                }
            }
        if (i < vectors)
            for (int u = 0; u < keys; u++) {
                vf a = load_one(tile->k[t + u], i, dtype);
                for (int l = 0; l < lines; l++)
                    sums[l * keys + u] += a * load(q + (l * vectors + i) * W);
            }
        store_scores(sums, lines, keys, 1, s + t);
    }
}

#if defined(__AVX512BF16__)
INLINE __m512bh load_pairs(const char *row, int whole) {
    if (whole) return (__m512bh)_mm512_loadu_si512(row);
    return (__m512bh)_mm512_zextsi256_si512(_mm256_loadu_si256((const void *)row));
}

/* bfloat16 products in pairs, summed in float32: as exact as widening, at half the instructions. */
INLINE void score_pairs(const char *const *q, const Tile *tile, const Tile *next, int bytes, float scale,
                        int lines, int keys, float *s) {
    for (int t = 0; t < tile->count; t += keys) {
        vf sums[W] = {};
        for (int u = 0; u < keys; u++) prefetch_row(next->k[t + u], bytes);
        for (int i = 0; i < bytes; i += 64)
            for (int u = 0; u < keys; u++) {
                __m512bh a = load_pairs(tile->k[t + u] + i, i + 64 <= bytes);
                for (int l = 0; l < lines; l++) {
                    __m512bh x = load_pairs(q[l] + i, i + 64 <= bytes);
                    sums[l * keys + u] = (vf)_mm512_dpbf16_ps((__m512)sums[l * keys + u], a, x);
                }
            }
        store_scores(sums, lines, keys, scale, s + t);
    }
}
#endif

/* Scores of lines [i, i + lines) of the item, as many keys at a time as W sums allow. */
INLINE void score(const Call *call, const Item *item, const Scratch *w, const Tile *tile,
                  const Tile *next, int dtype, int i, int lines) {
    int dim = call->dim, keys = lines == 1 ? W : lines == 2 ? W / 2 : W / 4;
    float *s = w->s + i * TILE;
#if defined(__AVX512BF16__)
    if (dtype == BF16) {
        const char *q[4];
        for (int l = 0; l < lines; l++) q[l] = line_of(call, item, i + l, dtype);
        score_pairs(q, tile, next, 2 * dim, call->scale, lines, keys, s);
        return;
    }
#endif
    score_widened(w->q + i * dim, tile, next, dim / W, dtype, lines, keys, s);
}

/* Vectors [i, i + n) of the sums of `lines` lines. */
INLINE void accumulate(const float *p, const Tile *tile, const Tile *next, int vectors, int dtype,
                       int lines, int i, int n, const float *factor, float *o) {
    vf sums[4][8], x[8];
    int bytes = n * W * (dtype == F32 ? 4 : 2), ahead = i * W * (dtype == F32 ? 4 : 2);
    for (int l = 0; l < lines; l++)
        for (int j = 0; j < n; j++) sums[l][j] = load(o + (l * vectors + i + j) * W) * factor[l];
    for (int t = 0; t < tile->count; t++) {
        prefetch_row(next->v[t] + ahead, bytes);
        if (n == 1)
            x[0] = load_one(tile->v[t], i, dtype);
        else
            for (int j = 0; j < n; j += 2) load_two(tile->v[t], i + j, dtype, &x[j], &x[j + 1]);
        for (int l = 0; l < lines; l++)
            for (int j = 0; j < n; j++) sums[l][j] += x[j] * p[l * TILE + t];
    }
    for (int l = 0; l < lines; l++)
        for (int j = 0; j < n; j++) store(o + (l * vectors + i + j) * W, sums[l][j]);
}

INLINE void accumulate_all(const float *p, const Tile *tile, const Tile *next, int vectors, int dtype,
                           int lines, const float *factor, float *o) {
    int i = 0, wide = W == 16 ? 4 : 2;
    if (lines <= 2)
        for (; i + 2 * wide <= vectors; i += 2 * wide)
            accumulate(p, tile, next, vectors, dtype, lines, i, 2 * wide, factor, o);
    for (; i + wide <= vectors; i += wide)
        accumulate(p, tile, next, vectors, dtype, lines, i, wide, factor, o);
    for (; i + 2 <= vectors; i += 2)
        accumulate(p, tile, next, vectors, dtype, lines, i, 2, factor, o);
    if (i < vectors) accumulate(p, tile, next, vectors, dtype, lines, i, 1, factor, o);
}

INLINE void stream_tile(const Call *call, const Item *item, const Tile *tile, const Tile *next,
                        const Scratch *w, int dtype) {
    int dim = call->dim, vectors = dim / W, n;
    for (int i = 0; i < item->lines; i += n) {
        n = item->lines - i < 4 ? item->lines - i : 4;
        if (n == 1) score(call, item, w, tile, next, dtype, i, 1);
        else if (n == 2) score(call, item, w, tile, next, dtype, i, 2);
        else if (n == 3) score(call, item, w, tile, next, dtype, i, 3);
        else score(call, item, w, tile, next, dtype, i, 4);
    }
    for (int i = 0; i < item->lines; i++) {
        shape_scores(call, item, i, tile, w->s + i * TILE);
        w->factor[i] = update_softmax(w->s + i * TILE, tile->count, w->top + i, w->total + i);
    }
    for (int i = 0; i < item->lines; i += n) {
        const float *p = w->s + i * TILE, *factor = w->factor + i;
        float *o = w->o + i * dim;
        n = item->lines - i < 4 ? item->lines - i : 4;
        if (n == 1) accumulate_all(p, tile, next, vectors, dtype, 1, factor, o);
        else if (n == 2) accumulate_all(p, tile, next, vectors, dtype, 2, factor, o);
        else if (n == 3) accumulate_all(p, tile, next, vectors, dtype, 3, factor, o);
        else accumulate_all(p, tile, next, vectors, dtype, 4, factor, o);
    }
}

INLINE void stream(const Call *call, const Item *item, const Scratch *w, int dtype) {
    int row_bytes = call->dim * (dtype == F32 ? 4 : 2), now = 0;
    Cursor at = cursor_of(call, item, row_bytes);
    Tile tiles[2];
    start(call, item, w, item->lines, dtype);
    for (next_tile(&at, &tiles[0], row_bytes); tiles[now].count; now ^= 1) {
        next_tile(&at, &tiles[now ^ 1], row_bytes);
        const Tile *next = &tiles[tiles[now ^ 1].count ? now ^ 1 : now];
        stream_tile(call, item, &tiles[now], next, w, dtype);
    }
    finish(call, item, w, dtype);
}

/* ---- many lines: tiled ---- */

INLINE void transpose(vf x[W]) {
    vf y[W];
    for (int n = 1; n < W; n *= 2) {
        for (int j = 0; j < W / 2; j++) {
            y[2 * j] = zip_low(x[j], x[j + W / 2]);
            y[2 * j + 1] = zip_high(x[j], x[j + W / 2]);
        }
        for (int j = 0; j < W; j++) x[j] = y[j];
    }
}

/* K of a tile as float32 [dim, TILE], in working order. */
INLINE void transpose_keys(const Tile *tile, int vectors, int dtype, float *to) {
    for (int t = 0; t < tile->count; t += W) {
        int i = 0;
        for (; i + 2 <= vectors; i += 2) {
            vf a[W], b[W];
            for (int j = 0; j < W; j++) load_two(tile->k[t + j], i, dtype, &a[j], &b[j]);
            transpose(a);
            transpose(b);
            for (int j = 0; j < W; j++) store(to + (i * W + j) * TILE + t, a[j]);
            for (int j = 0; j < W; j++) store(to + (i * W + W + j) * TILE + t, b[j]);
        }
        if (i < vectors) {
            vf a[W];
            for (int j = 0; j < W; j++) a[j] = load_one(tile->k[t + j], i, dtype);
            transpose(a);
            for (int j = 0; j < W; j++) store(to + (i * W + j) * TILE + t, a[j]);
        }
    }
}

/* c[6, n W] = a[6, depth] b[depth, n W], added to c if `add`. */
INLINE void product_block(const float *a, int lda, const float *b, int ldb, float *c, int ldc,
                          int depth, int n, int add) {
    vf sums[PRODUCT_LINES][COLUMNS], x[COLUMNS];
    for (int l = 0; l < PRODUCT_LINES; l++)
        for (int j = 0; j < n; j++) sums[l][j] = add ? load(c + l * ldc + j * W) : (vf){};
    for (int d = 0; d < depth; d++) {
        for (int j = 0; j < n; j++) x[j] = load(b + d * ldb + j * W);
        for (int l = 0; l < PRODUCT_LINES; l++) {
            vf y = splat(a[l * lda + d]);
            for (int j = 0; j < n; j++) sums[l][j] += y * x[j];
        }
    }
    for (int l = 0; l < PRODUCT_LINES; l++)
        for (int j = 0; j < n; j++) store(c + l * ldc + j * W, sums[l][j]);
}

INLINE void product_columns(const float *a, int lda, const float *b, int ldb, float *c, int ldc,
                            int lines, int depth, int n, int add) {
    for (int l = 0; l < lines; l += PRODUCT_LINES)
        product_block(a + l * lda, lda, b, ldb, c + l * ldc, ldc, depth, n, add);
}

INLINE void product(const float *a, int lda, const float *b, int ldb, float *c, int ldc, int lines,
                    int columns, int depth, int add) {
    int j = 0;
    for (; j + COLUMNS * W <= columns; j += COLUMNS * W)
        product_columns(a, lda, b + j, ldb, c + j, ldc, lines, depth, COLUMNS, add);
    for (; j + 2 * W <= columns; j += 2 * W)
        product_columns(a, lda, b + j, ldb, c + j, ldc, lines, depth, 2, add);
    for (; j < columns; j += W)
        product_columns(a, lda, b + j, ldb, c + j, ldc, lines, depth, 1, add);
}

INLINE void tiled(const Call *call, const Item *item, const Scratch *w, int dtype) {
    int dim = call->dim, row_bytes = dim * (dtype == F32 ? 4 : 2);
    int padded = (item->lines + PRODUCT_LINES - 1) / PRODUCT_LINES * PRODUCT_LINES;
    Cursor at = cursor_of(call, item, row_bytes);
    Tile tile;
    start(call, item, w, padded, dtype);
    memset(w->s, 0, (size_t)padded * TILE * sizeof *w->s);
    for (next_tile(&at, &tile, row_bytes); tile.count; next_tile(&at, &tile, row_bytes)) {
        int columns = (tile.count + W - 1) / W * W;
        transpose_keys(&tile, dim / W, dtype, w->k);
        for (int t = 0; t < tile.count; t++) widen(tile.v[t], dim / W, dtype, 1, w->v + t * dim);
        product(w->q, dim, w->k, TILE, w->s, TILE, padded, columns, dim, 0);
        for (int i = 0; i < item->lines; i++) {
            float *s = w->s + i * TILE, *o = w->o + i * dim;
            shape_scores(call, item, i, &tile, s);
            float factor = update_softmax(s, tile.count, w->top + i, w->total + i);
            if (factor != 1)
                for (int d = 0; d < dim; d += W) store(o + d, load(o + d) * factor);
        }
        product(w->s, TILE, w->v, dim, w->o, dim, padded, dim, tile.count, 1);
    }
    finish(call, item, w, dtype);
}

static void run_f32(const Call *c, const Item *i, const Scratch *w, int few) {
    if (few) stream(c, i, w, F32);
    else tiled(c, i, w, F32);
}

static void run_bf16(const Call *c, const Item *i, const Scratch *w, int few) {
    if (few) stream(c, i, w, BF16);
    else tiled(c, i, w, BF16);
}

static void run_f16(const Call *c, const Item *i, const Scratch *w, int few) {
    if (few) stream(c, i, w, F16);
    else tiled(c, i, w, F16);
}

/* ---- the plan: rows to items ---- */

typedef struct {
    int64_t first_item, first_part; /* parts are counted in (query, head) lines, over all splits */
    int tiles, splits, few;
} RowPlan;

INLINE int at_most(int a, int b) { return a < b ? a : b; }

INLINE int blocks_per_split(const Call *call, int few) {
    int blocks = (few ? STREAM_SPLIT : TILED_SPLIT) / call->block_size;
    return blocks ? blocks : 1;
}

/* Fills plan[rows + 1] and `work` (multiply-adds), or finds a batch that would read out of bounds. */
static int make_plan(const Call *call, RowPlan *plan, double *work) {
    int64_t items = 0, parts = 0, tokens = 0;
    *work = 0;
    if (call->query_start[0] != 0 || call->block_start[0] != 0) return BAD_BATCH;
    for (int r = 0; r < call->rows; r++) {
        int64_t queries = (int64_t)call->query_start[r + 1] - call->query_start[r];
        int64_t blocks = (int64_t)call->block_start[r + 1] - call->block_start[r];
        if (queries < 0 || blocks < 0 || call->kv_len[r] < 0) return BAD_BATCH;
        if (call->kv_len[r] > blocks * call->block_size) return BAD_BATCH;
        int64_t lines = queries * group_of(call);
        int few = lines <= call->stream_lines, most = few ? STREAM_LINES : TILED_LINES;
        int per_split = blocks_per_split(call, few);
        int tiles = (lines + most - 1) / most, splits = 1;
        blocks = (call->kv_len[r] + call->block_size - 1) / call->block_size;
        if (few || tiles <= SPLIT_TILES) splits = (blocks + per_split - 1) / per_split;
        if (splits < 1) splits = 1;
        plan[r] = (RowPlan){items, parts, tiles, splits, few};
        items += (int64_t)tiles * splits * call->kv_heads;
        if (splits > 1) parts += splits * queries * call->heads;
        *work += (double)queries * call->heads * call->dim * call->kv_len[r];
        tokens += queries;
    }
    plan[call->rows] = (RowPlan){.first_item = items, .first_part = parts};
    if (call->block_start[call->rows] != call->listed) return BAD_BATCH;
    for (int64_t b = 0; b < call->listed; b++)
        if (call->blocks[b] < 0 || call->blocks[b] >= call->num_blocks) return BAD_BATCH;
    return tokens == call->queries ? OK : BAD_BATCH;
}

static Item item_at(const Call *call, const RowPlan *plan, int64_t index, float *parts) {
    int64_t low = 0, high = call->rows; /* plan[low] starts at or before the item, plan[high] after */
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (plan[middle].first_item <= index) low = middle;
        else high = middle;
    }
    const RowPlan *p = plan + low;
    int64_t start = call->query_start[low], queries = call->query_start[low + 1] - start;
    int64_t rest = index - p->first_item, lines = queries * group_of(call);
    int per_split = blocks_per_split(call, p->few);
    int split = rest % p->splits, kv_head = rest / p->splits % call->kv_heads;
    int tile = p->tiles - 1 - rest / p->splits / call->kv_heads; /* the tile that sees most goes first */
    int most = p->few ? STREAM_LINES : TILED_LINES, blocks = call->block_start[low + 1];
    Item item = {.row = low, .line = tile * most, .kv_head = kv_head, .split = split};
    item.lines = at_most(lines - item.line, most);
    item.position = call->query_position[low];
    item.block = call->block_start[low] + split * per_split;
    item.end = p->splits > 1 ? at_most(blocks, item.block + per_split) : blocks;
    item.out = call->out + start * call->heads * call->dim;
    item.lse = call->lse + start * call->heads;
    if (p->splits > 1) {
        int64_t part = p->first_part + split * queries * call->heads;
        item.out = parts + part * call->dim;
        item.lse = parts + plan[call->rows].first_part * call->dim + part;
    }
    return item;
}

static void merge_splits(const Call *call, const RowPlan *plan, int row, const float *parts) {
    int64_t start = call->query_start[row], dim = call->dim;
    int64_t lines = (call->query_start[row + 1] - start) * call->heads;
    const float *outs = parts + plan[row].first_part * dim;
    const float *lses = parts + plan[call->rows].first_part * dim + plan[row].first_part;
    for (int64_t i = 0; i < lines; i++) {
        float *out = call->out + (start * call->heads + i) * dim, top = -INFINITY, total = 0;
        for (int s = 0; s < plan[row].splits; s++)
            if (lses[s * lines + i] > top) top = lses[s * lines + i];
        memset(out, 0, dim * sizeof *out);
        for (int s = 0; top > -INFINITY && s < plan[row].splits; s++) {
            float weight = exp_one(lses[s * lines + i] - top);
            total += weight;
            for (int d = 0; d < dim; d += W)
                store(out + d, load(out + d) + load(outs + (s * lines + i) * dim + d) * weight);
        }
        float factor = total > 0 ? 1 / total : 0;
        for (int d = 0; d < dim; d += W) store(out + d, load(out + d) * factor);
        call->lse[start * call->heads + i] = total > 0 ? top + logf(total) : -INFINITY;
    }
}

enum { LINE_FLOATS = TILED_LINES * TILE + 3 * TILED_LINES };

static Scratch scratch_at(float *base, int64_t dim) {
    Scratch w = {.q = base};
    w.o = w.q + TILED_LINES * dim;
    w.k = w.o + TILED_LINES * dim;
    w.v = w.k + TILE * dim;
    w.s = w.v + TILE * dim;
    w.top = w.s + TILED_LINES * TILE;
    w.total = w.top + TILED_LINES;
    w.factor = w.total + TILED_LINES;
    return w;
}

int hpc_distkv_micro_attention(const Call *call) {
    RowPlan *plan = malloc((call->rows + 1) * sizeof *plan);
    double work;
    int status = plan ? make_plan(call, plan, &work) : NO_MEMORY;
    if (status != OK) {
        free(plan);
        return status;
    }
    int64_t items = plan[call->rows].first_item, lines = plan[call->rows].first_part;
    int64_t each = 2 * (TILED_LINES + TILE) * call->dim + LINE_FLOATS; /* a multiple of 16 floats */
    int threads = work < PARALLEL ? 1 : at_most(call->threads, at_most(items, 1 << 20));
    int64_t bytes = (threads * each + lines * (call->dim + 1)) * sizeof(float);
    float *memory = aligned_alloc(64, (bytes + 63) / 64 * 64), *parts = memory + threads * each;
    void (*run)(const Call *, const Item *, const Scratch *, int) =
        call->dtype == F32 ? run_f32 : call->dtype == BF16 ? run_bf16 : run_f16;
    if (!memory) {
        free(plan);
        return NO_MEMORY;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch scratch = scratch_at(memory + omp_get_thread_num() * each, call->dim);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < items; i++) {
            Item item = item_at(call, plan, i, parts);
            run(call, &item, &scratch, plan[item.row].few);
        }
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < call->rows; r++)
            if (plan[r].splits > 1) merge_splits(call, plan, r, parts);
    }
    free(memory);
    free(plan);
    return OK;
}

/* Merges part_out[i, h], part_lse[i, h] into out[rows[i], h], lse[rows[i], h]. */
int hpc_distkv_merge_rows(float *out, float *lse, const int32_t *rows, const float *part_out,
                          const float *part_lse, int64_t n, int64_t total, int64_t heads, int64_t dim,
                          int64_t threads) {
    for (int64_t i = 0; i < n; i++)
        if (rows[i] < 0 || rows[i] >= total) return BAD_BATCH;
#pragma omp parallel for num_threads(threads) if (threads > 1 && n * heads * dim * 4 > COPY_PARALLEL)
    for (int64_t i = 0; i < n * heads; i++) {
        int64_t line = rows[i / heads] * heads + i % heads;
        float *to = out + line * dim, mine = lse[line], theirs = part_lse[i];
        const float *from = part_out + i * dim;
        if (theirs == -INFINITY) continue;
        float top = mine > theirs ? mine : theirs;
        float a = expf(mine - top), b = expf(theirs - top), sum = a + b;
        lse[line] = top + logf(sum);
        a /= sum;
        b /= sum;
        for (int64_t d = 0; d < dim; d++) to[d] = to[d] * a + from[d] * b;
    }
    return OK;
}

/* k[t, h], v[t, h] (row_bytes each, heads adjacent) to cache[blocks[t], h, offsets[t]]. Bytes only. */
int hpc_distkv_write_kv(const char *k, const char *v, char *k_cache, char *v_cache,
                        const int32_t *blocks, const int32_t *offsets, int64_t tokens, int64_t heads,
                        int64_t row_bytes, int64_t num_blocks, int64_t block_size, int64_t k_stride,
                        int64_t v_stride, int64_t k_cache_stride, int64_t v_cache_stride,
                        int64_t threads) {
    for (int64_t t = 0; t < tokens; t++)
        if (blocks[t] < 0 || blocks[t] >= num_blocks || offsets[t] < 0 || offsets[t] >= block_size)
            return BAD_BATCH;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * heads * row_bytes > COPY_PARALLEL)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t inside = (h * block_size + offsets[t]) * row_bytes;
            char *k_to = k_cache + blocks[t] * k_cache_stride + inside;
            char *v_to = v_cache + blocks[t] * v_cache_stride + inside;
            memcpy(k_to, k + t * k_stride + h * row_bytes, row_bytes);
            memcpy(v_to, v + t * v_stride + h * row_bytes, row_bytes);
        }
    return OK;
}
