/* Attention over bfloat16 keys and values on the tile unit (AMX), whose products of bfloat16 are summed in float32.
 *
 * A float32 query, and the probability of a key, is the sum of two bfloat16: 16 bits, where a key or value has 8. 16 rows
 * are multiplied at a time, with 64 keys. Scores come out as [keys][rows], so that a row is a lane: its maximum and sum
 * need no horizontal step. Neighbouring probabilities then become pairs, and tiles [rows][keys]. Values lie in pairs of
 * neighbouring positions, two rows interleaved, which takes 32 columns of the result out of order until it is finished.
 * What a row gets depends on nothing beside it: keys that it does not see count zero times a finite value. */
#pragma once
#include "amx.h"
#include "attention_item.h"

#if ISA_AMX
#define LANES 16                     /* rows of q that are multiplied at a time */
#define TILE (LANES * 64)            /* bytes of a tile */
#define COLUMNS 64                   /* of values that are multiplied with all rows before the next */

INLINE void amx_transpose(__m512i v[16])
{
    __m512i a[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        v[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
        v[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
    UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; j++) {
        a[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
        a[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
    }
    UNROLL for (int j = 0; j < 8; j++) {
        v[j] = _mm512_shuffle_i32x4(a[j], a[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_i32x4(a[j], a[j + 8], 0xdd);
    }
}

/* Two numbers a lane as pairs of bfloat16: their upper 8 bits, or the next 8, rounded. */
INLINE __m512i amx_pair(__m512i even, __m512i odd)
{
    return _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(odd, _mm512_set1_epi32((int32_t)0xffff0000)));
}
INLINE __m512i amx_rest(__m512i x)
{
    const __m512i upper = _mm512_and_si512(x, _mm512_set1_epi32((int32_t)0xffff0000));
    const __m512 rest = _mm512_sub_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(upper));
    return _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
}
INLINE __m512i amx_part(__m512i even, __m512i odd, const int part)
{
    return part ? amx_pair(amx_rest(even), amx_rest(odd)) : amx_pair(even, odd);
}

/* Rows of q from `row` on, at most 16 -> tiles [dim / 32][2 parts][16 pairs of dimensions][16 rows] */
static void amx_queries(const float *q, int64_t rows, int64_t dim, char *tiles)
{
    for (int64_t d = 0; d < dim; d += 32)
        UNROLL for (int part = 0; part < 2; part++, tiles += TILE) {
            __m512i unit[16];
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            for (int r = 0; r < 16; r++) {
                unit[r] = _mm512_setzero_si512();
                if (r < rows) {
                    const __m512i low = _mm512_loadu_si512(q + r * dim + d), high = _mm512_loadu_si512(q + r * dim + d + 16);
                    unit[r] = amx_part(_mm512_permutex2var_epi32(low, even, high),
                                       _mm512_permutex2var_epi32(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high), part);
                }
            }
            amx_transpose(unit);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(tiles + 64 * i, unit[i]);
        }
}

/* scores[16 * tiles][16 rows] = keys as they lie, rows of `dim` bfloat16, times q's tiles; tiles is 1 or 4 */
INLINE void amx_score(const char *keys, const char *q, float *scores, int64_t dim, struct fetch *f, const int tiles)
{
    const int64_t stride = dim * 2;
    struct fetch ahead = *f;
    _tile_zero(0);
    if (tiles > 1) {
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t d = 0; d < dim; d += 32, keys += 64, q += 2 * TILE) {
        fetch_step(&ahead);
        if (tiles > 1)
            fetch_step(&ahead);
        _tile_loadd(6, q, 64);
        _tile_loadd(4, keys, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, q + TILE, 64);
        if (tiles > 1) {
            _tile_loadd(5, keys + 16 * stride, stride);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_dpbf16ps(0, 4, 7);
        if (tiles > 1) {
            fetch_step(&ahead);
            fetch_step(&ahead);
            _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(4, keys + 32 * stride, stride);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(5, keys + 48 * stride, stride);
            _tile_dpbf16ps(3, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, scores, 64);
    if (tiles > 1) {
        _tile_stored(1, scores + 16 * LANES, 64);
        _tile_stored(2, scores + 32 * LANES, 64);
        _tile_stored(3, scores + 48 * LANES, 64);
    }
    *f = ahead;
}

/* The running maxima and sums of 16 rows */
struct running {
    float *maximum, *sum, *rescale; /* [16]; rescale: what the sums so far have to shrink by */
};

/* e^x of x <= 0, to 2^-18 and down to e^-87: what is multiplied has 16 bits. NaN stays NaN. */
INLINE vf amx_exp(vf x)
{
    x = max_(splat(-87.0f), x);
    const vf n = fma_(x, splat(1.44269504088896341f), splat(ROUND_MAGIC)) - ROUND_MAGIC;
    const vf r = fma_(n, splat(-0.693147180559945286f), x);
    vf p = fma_(splat(1.0f / 120), r, splat(1.0f / 24));
    p = fma_(p, r, splat(1.0f / 6));
    p = fma_(p, r, splat(0.5f));
    p = fma_(p, r, splat(1));
    return (vf)_mm512_scalef_ps((__m512)fma_(p, r, splat(1)), (__m512)n);
}

/* scores[n][16 rows] -> their exp(score - maximum), zero beyond the first `seen` of a row; rows that see none are left. */
INLINE void amx_softmax(float *scores, int64_t n, vi seen, const struct running *r, struct fetch *f, const int all)
{
    struct fetch ahead = *f;
    vf top[4], total[4];
    UNROLL for (int i = 0; i < 4; i++) {
        top[i] = splat(-INFINITY);
        total[i] = (vf){0};
    }
    for (int64_t key = 0; key < n; key += 4) {
        fetch_step(&ahead);
        UNROLL for (int i = 0; i < 4; i++) {
            vf s = load(scores + (key + i) * LANES);
            top[i] = max_(all ? s : select_(seen > (int32_t)(key + i), s, splat(-INFINITY)), top[i]);
        }
    }
    const vf before = load(r->maximum), maximum = max_(max_(before, top[0]), max_(top[1], max_(top[2], top[3])));
    for (int64_t key = 0; key < n; key += 4) {
        fetch_step(&ahead);
        UNROLL for (int i = 0; i < 4; i++) {
            vf p = amx_exp(load(scores + (key + i) * LANES) - maximum);
            p = all ? p : select_(seen > (int32_t)(key + i), p, (vf){0});
            store(scores + (key + i) * LANES, p);
            total[i] = total[i] + p;
        }
    }
    *f = ahead;
    /* exp stops at a small positive number, which times the empty sums of the first chunk is still zero. */
    const vf rescale = select_(seen > 0, exp_(before - maximum), splat(1));
    store(r->maximum, maximum);
    store(r->rescale, rescale);
    store(r->sum, load(r->sum) * rescale + ((total[0] + total[1]) + (total[2] + total[3])));
}

/* probabilities[n][16 rows] -> tiles [n / 32][2 parts][16 rows][32 keys] */
INLINE void amx_probabilities(const float *p, int64_t n, char *tiles, struct fetch *f)
{
    struct fetch ahead = *f;
    for (int64_t key = 0; key < n; key += 32, p += 32 * LANES)
        UNROLL for (int part = 0; part < 2; part++, tiles += TILE) {
            __m512i pair[16];
            fetch_step(&ahead);
            fetch_step(&ahead);
            UNROLL for (int i = 0; i < 16; i++)
                pair[i] = amx_part(_mm512_load_si512(p + 2 * i * LANES), _mm512_load_si512(p + (2 * i + 1) * LANES), part);
            amx_transpose(pair);
            fetch_step(&ahead);
            fetch_step(&ahead);
            UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(tiles + 64 * i, pair[i]);
        }
    *f = ahead;
}

/* Columns of values in a cache: `columns` of them, at most COLUMNS, of rows `bytes` apart or at `offsets`. */
struct values {
    const char *from;
    int64_t columns, bytes;
    const int64_t *offsets;
    int finite; /* whether all of those in the tiles are */
};

INLINE const char *value_row(const struct values *v, int64_t key)
{
    return v->from + (v->offsets ? v->offsets[key] : key * v->bytes);
}

/* What is no number makes the rows that see it NaN, and would make the others so, which multiply it by zero. Takes such
 * values out of the tiles; or, where there are no tiles, spoils that column of the rows that see more than its key. */
static void amx_no_numbers(const struct values *v, int64_t n, char *tiles, float *out, int64_t dim, vi seen)
{
    for (int64_t key = 0; key < n; key++)
        for (int64_t c = 0; c < v->columns; c++) {
            const int64_t tile = c / 32 * 2 + c / 4 % 2, column = c % 32 / 8 * 4 + c % 4;
            if ((((const uint16_t *)value_row(v, key))[c] & 0x7f80) != 0x7f80)
                continue;
            if (tiles)
                memset(tiles + (key / 32 * (COLUMNS / 16) + tile) * TILE + key % 32 / 2 * 64 + column * 4 + key % 2 * 2, 0, 2);
            for (int r = 0; !tiles && r < LANES; r++)
                if (seen[r] > key)
                    out[r * dim + tile * 16 + column] = NAN;
        }
}

/* n values -> tiles [n / 32 rounded up][COLUMNS / 16][16 pairs of keys][16 columns], zero beyond the last */
static void amx_values(struct values *v, int64_t n, char *tiles, struct fetch *f)
{
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), zero = _mm512_setzero_si512();
    __m512i largest = zero;
    struct fetch ahead = *f;
    for (int64_t key = 0; key < (n + 31) / 32 * 32; key += 2) {
        const char *even = value_row(v, key < n ? key : 0), *odd = value_row(v, key + 1 < n ? key + 1 : 0);
        char *to = tiles + key / 32 * (COLUMNS / 16) * TILE + key % 32 / 2 * 64;
        fetch_step(&ahead);
        for (int64_t c = 0; c < v->columns; c += 32, to += 2 * TILE) {
            const __m512i a = key < n ? _mm512_loadu_si512(even + 2 * c) : zero;
            const __m512i b = key + 1 < n ? _mm512_loadu_si512(odd + 2 * c) : zero;
            largest = _mm512_max_epu16(largest, _mm512_and_si512(a, magnitude));
            largest = _mm512_max_epu16(largest, _mm512_and_si512(b, magnitude));
            _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(to + TILE, _mm512_unpackhi_epi16(a, b));
        }
    }
    *f = ahead;
    v->finite = !_mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80));
    if (!v->finite)
        amx_no_numbers(v, n, tiles, NULL, 0, (vi){0});
}

/* out[16 rows][16 * tiles columns] += p's tiles @ values' tiles, over 32 * steps keys; tiles is 2 or 4 */
INLINE void amx_add_tiles(const char *p, const char *values, float *out, int64_t dim, int64_t steps, struct fetch *f,
                          const int tiles)
{
    const int64_t stride = dim * 4;
    struct fetch ahead = *f;
    _tile_loadd(0, out, stride);
    _tile_loadd(1, out + 16, stride);
    if (tiles > 2) {
        _tile_loadd(2, out + 32, stride);
        _tile_loadd(3, out + 48, stride);
    }
    for (int64_t step = 0; step < steps; step++, values += COLUMNS / 16 * TILE, p += 2 * TILE) {
        _tile_loadd(6, p, 64);
        _tile_loadd(4, values, 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(7, p + TILE, 64);
        fetch_step(&ahead);
        fetch_step(&ahead);
        _tile_loadd(5, values + TILE, 64);
        _tile_dpbf16ps(1, 6, 5);
        _tile_dpbf16ps(0, 7, 4);
        _tile_dpbf16ps(1, 7, 5);
        fetch_step(&ahead);
        fetch_step(&ahead);
        if (tiles > 2) {
            _tile_loadd(4, values + 2 * TILE, 64);
            _tile_dpbf16ps(2, 6, 4);
            fetch_step(&ahead);
            fetch_step(&ahead);
            _tile_loadd(5, values + 3 * TILE, 64);
            _tile_dpbf16ps(3, 6, 5);
            _tile_dpbf16ps(2, 7, 4);
            _tile_dpbf16ps(3, 7, 5);
            fetch_step(&ahead);
            fetch_step(&ahead);
        }
    }
    *f = ahead;
    _tile_stored(0, out, stride);
    _tile_stored(1, out + 16, stride);
    if (tiles > 2) {
        _tile_stored(2, out + 32, stride);
        _tile_stored(3, out + 48, stride);
    }
}

/* The same for what values have: all of their columns, and those that are no number. */
INLINE void amx_add(const char *p, const struct values *v, const char *tiles, float *out, int64_t dim, int64_t n, vi seen,
                    struct fetch *f)
{
    if (v->columns > 32)
        amx_add_tiles(p, tiles, out, dim, (n + 31) / 32, f, 4);
    else
        amx_add_tiles(p, tiles, out, dim, (n + 31) / 32, f, 2);
    if (!v->finite)
        amx_no_numbers(v, n, NULL, out, dim, seen);
}

/* A row of the result over its sum, in the order that its columns had before amx_values */
static void amx_finish(const float *from, float sum, float *to, int64_t dim)
{
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    for (int64_t d = 0; d < dim; d += 32) {
        const __m512 a = _mm512_loadu_ps(from + d), b = _mm512_loadu_ps(from + d + 16);
        store(to + d, (vf)_mm512_permutex2var_ps(a, low, b) / sum);
        store(to + d + 16, (vf)_mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b) / sum);
    }
}

/* The scores of 16 rows with n keys as they lie, as [keys][16] */
INLINE void amx_scores(const struct item *i, int64_t row, const char *keys, int64_t n, float *scores, struct fetch *f)
{
    const int64_t dim = i->a->dim;
    const char *q = i->q_tiles + row * dim * 4;
    if (n == KEYS)
        amx_score(keys, q, scores, dim, f, 4);
    else
        for (int64_t key = 0; key < n; key += 16)
            amx_score(keys + key * dim * 2, q, scores + key * LANES, dim, f, 1);
}

/* From the scores of 16 rows with n keys, tiles of probabilities; the rows' results so far shrink. */
INLINE void amx_weights(const struct item *i, int64_t row, float *scores, int64_t n, vi seen, char *tiles, struct fetch *f)
{
    const int64_t dim = i->a->dim, upto = (n + 15) / 16 * 16, all = (n + 31) / 32 * 32;
    const struct running running = {i->maximum + row, i->sum + row, i->rescale + row};
    float *out = i->out + row * dim;
    if (!_mm512_cmpneq_epi32_mask((__m512i)seen, _mm512_set1_epi32(KEYS)))
        amx_softmax(scores, KEYS, seen, &running, f, 1);
    else
        amx_softmax(scores, upto, seen, &running, f, 0);
    memset(scores + upto * LANES, 0, (size_t)((all - upto) * LANES) * sizeof *scores);
    amx_probabilities(scores, all, tiles, f);
    for (int r = 0; r < LANES; r++)
        if (running.rescale[r] != 1.0f)
            for (int64_t d = 0; d < dim; d += VL)
                store(out + r * dim + d, load(out + r * dim + d) * running.rescale[r]);
}

/* How many keys of a chunk each of 16 rows sees */
INLINE vi amx_seen(const struct item *i, int64_t row, int64_t chunk)
{
    const __m512i seen = _mm512_sub_epi32(_mm512_loadu_si512(i->sees + row), _mm512_set1_epi32((int32_t)chunk));
    return (vi)_mm512_min_epi32(_mm512_max_epi32(seen, _mm512_setzero_si512()), _mm512_set1_epi32(KEYS));
}

/* Prepares an item's rows, and as many more as 16 at a time may touch. */
static void amx_begin(const struct item *i, int64_t room)
{
    const int64_t dim = i->a->dim, group = i->a->heads / i->a->kv_heads;
    amx_configure(AMX_ROWS);
    for (int64_t row = 0; row < i->rows; row += LANES)
        amx_queries(i->q + row * dim, i->rows - row, dim, i->q_tiles + row * dim * 4);
    for (int64_t row = 0; row < room; row++)
        i->sees[row] = (int32_t)(i->s->length + i->first + (row < i->rows ? row : i->rows - 1) / group + 1);
    for (int64_t row = i->rows; row < room; row++)
        i->maximum[row] = i->sum[row] = 0;
    memset(i->out + i->rows * dim, 0, (size_t)((room - i->rows) * dim) * sizeof *i->out);
}

static void amx_attend_chunks(const struct item *i, int64_t from, int64_t to)
{
    const struct attention_args *a = i->a;
    const struct slot *slot = &i->s->slot;
    const int64_t dim = a->dim, bytes = kv_row_bytes(slot);
    char *v_tiles = (char *)(i->slab + KEYS * LANES); /* behind scores */
    for (int64_t chunk = from; chunk < to; chunk += KEYS) {
        const int64_t at = kv_chunk_at(slot, a->layer, i->head, chunk), n = to - chunk < KEYS ? to - chunk : KEYS;
        const int64_t begin = first_row_of(i, chunk), first = begin / LANES * LANES;
        const int64_t blocks = (i->rows - first + LANES - 1) / LANES, tiles = (n + 15) / 16, steps = (n + 31) / 32;
        if (chunk > from && chunk % ATTENTION_SPAN == 0)
            for (int64_t row = begin; row < i->rows; row++)
                end_span(i, row, chunk / ATTENTION_SPAN - 1);
        struct fetch f = fetch_evenly(slot->v + at, n * bytes, blocks * (tiles * (dim / 32 + 8) + steps * 8));
        for (int64_t row = first; row < i->rows; row += LANES) {
            amx_scores(i, row, slot->k + at, n, i->slab, &f);
            amx_weights(i, row, i->slab, n, amx_seen(i, row, chunk), (char *)(i->scores + row * KEYS), &f);
        }
        f = fetch_next_keys(i, chunk, to, steps * (16 + 8 * blocks) * ((dim + COLUMNS - 1) / COLUMNS));
        for (int64_t d = 0; d < dim; d += COLUMNS) {
            struct values v = {.from = slot->v + at + 2 * d, .columns = dim - d < COLUMNS ? dim - d : COLUMNS, .bytes = bytes};
            amx_values(&v, n, v_tiles, &f);
            for (int64_t row = first; row < i->rows; row += LANES)
                amx_add((const char *)(i->scores + row * KEYS), &v, v_tiles, i->out + row * dim + d, dim, n,
                        amx_seen(i, row, chunk), &f);
        }
    }
}

/* As attend_tree: each token by itself, on lanes of its own. */
static void amx_attend_tree(const struct item *i)
{
    const struct segment *s = i->s;
    const struct slot *slot = &s->slot;
    const int64_t dim = i->a->dim, group = i->a->heads / i->a->kv_heads, bytes = kv_row_bytes(slot);
    const int64_t base = s->length / KEYS * KEYS, n = s->length - base + i->last, blocks = (i->rows + LANES - 1) / LANES;
    const int64_t at = kv_chunk_at(slot, i->a->layer, i->head, base);
    const int64_t stride = kv_chunk_at(slot, i->a->layer, i->head, base + KEYS) - at;
    char *p = (char *)i->scores, *v_tiles = (char *)(i->slab + KEYS * LANES);
    struct fetch none = {0};
    for (int64_t part = 0; part * KEYS < n; part++)
        for (int64_t block = 0; block < blocks; block++)
            amx_scores(i, block * LANES, slot->k + at + part * stride, n - part * KEYS < KEYS ? n - part * KEYS : KEYS,
                       i->tree_scores + (part * blocks + block) * KEYS * LANES, &none);
    for (int64_t token = i->first; token < i->last; token++) {
        const int64_t sees = tree_keys(i, token, base, stride, bytes), first = (token - i->first) * group;
        for (int64_t chunk = 0; chunk < sees; chunk += KEYS)
            for (int64_t row = first; row < first + group; row += LANES) {
                const int64_t lanes = first + group - row < LANES ? first + group - row : LANES;
                const int64_t valid = sees - chunk < KEYS ? sees - chunk : KEYS;
                vi seen = {0};
                memset(i->slab, 0, KEYS * LANES * sizeof *i->slab);
                for (int64_t lane = 0; lane < lanes; lane++) {
                    seen[lane] = (int32_t)valid;
                    if (chunk && (base + chunk) % ATTENTION_SPAN == 0)
                        end_span(i, row + lane, (base + chunk) / ATTENTION_SPAN - 1);
                    for (int64_t key = 0; key < valid; key++) {
                        const int64_t from = i->where[chunk + key], block = from / KEYS * blocks + (row + lane) / LANES;
                        i->slab[key * LANES + lane] =
                            i->tree_scores[(block * KEYS + from % KEYS) * LANES + (row + lane) % LANES];
                    }
                }
                amx_weights(i, row, i->slab, valid, seen, p, &none);
                for (int64_t d = 0; d < dim; d += COLUMNS) {
                    struct values v = {.from = slot->v + at + 2 * d, .columns = dim - d < COLUMNS ? dim - d : COLUMNS,
                                       .offsets = i->offsets + chunk};
                    amx_values(&v, valid, v_tiles, &none);
                    amx_add(p, &v, v_tiles, i->out + row * dim + d, dim, valid, seen, &none);
                }
            }
    }
}
#endif
