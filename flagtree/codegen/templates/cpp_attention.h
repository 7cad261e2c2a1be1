// Attention over rows of one key head: a block of keys at a time, with a running maximum; every key and value is read once for ROWS rows.
// Row r sees the keys seen_from[r]..seen_to[r]-1.  A score has PARTIALS partial sums, joined by `tree` (few rows), or adds its products one
// after the other (many rows: KEYS_ALONG_LANES); an element of a result adds its keys one after the other: the same at every level.
//@ KEYS
enum { KEYS = 64 };  // of a block
//@ seen_by_some
// the keys from..to-1 that hold what any row sees
INLINE void seen_by_some(const i64 *seen_from, const i64 *seen_to, i64 rows, i64 *from, i64 *to) {
  *from = *to = 0;
  for (i64 r = 0; r < rows; ++r) {
    if (seen_from[r] >= seen_to[r]) continue;
    *from = *from < *to && *from < seen_from[r] ? *from : seen_from[r];
    *to = *to > seen_to[r] ? *to : seen_to[r];
  }
}
//@ seen_in_block
// does a row see any of KEYS keys from `start` on: the first..last-1 of them
INLINE bool seen_in_block(i64 seen_from, i64 seen_to, i64 start, i64 *first, i64 *last) {
  *first = seen_from > start ? seen_from - start : 0;
  *last = seen_to - start < KEYS ? seen_to - start : KEYS;
  if (*first < *last) return true;
  *first = *last = 0;
  return false;
}
//@ transpose
// lanes without bit h of a, in the others those of b that are h lanes before; and lanes with bit h of b, in the others those of a h behind
#if defined(__clang__)
template <class V> INLINE void exchange(V *a, V *b, int h) {
  const V before = *a;
  *a = select((lanes & h) != 0, swap_lanes(*b, h), before);
  *b = select((lanes & h) != 0, *b, swap_lanes(before, h));
}
#else
template <class V> INLINE void exchange(V *a, V *b, int h) {
  const V before = *a;
  *a = __builtin_shuffle(before, *b, (lanes & h) != 0 ? (lanes ^ h) + (i32)W : lanes);
  *b = __builtin_shuffle(before, *b, (lanes & h) != 0 ? lanes + (i32)W : lanes ^ h);
}
#endif
// W vectors of W lanes, element l of vector i and element i of vector l exchanged
template <class V> INLINE void transpose(V *v) {
#pragma GCC unroll 4
  for (int h = W / 2; h > 0; h /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & h)) exchange(v + i, v + i + h, h);
}
//@ weigh
enum { ROW_TILE = 4 };
// scores to weights exp(score - maximum) of ROW_TILE rows, zero outside of first..last-1; what the sums so far are to be multiplied with
INLINE void weigh(f32 (*s)[KEYS], const i64 *first, const i64 *last, f32 *highest, f32 *total, f32 *rescale) {
  f32 base[ROW_TILE], fallen[W] = {};
#pragma GCC unroll 4
  for (int i = 0; i < ROW_TILE; ++i) {
    for (i64 j = 0; j < first[i]; ++j) s[i][j] = -__builtin_inff();
    for (i64 j = last[i]; j < KEYS; ++j) s[i][j] = -__builtin_inff();
    max_state<f32v> most[PARTS];
    for (int p = 0; p < PARTS; ++p) most[p].value = load(s[i] + p * W, W);
    for (int j = PARTIALS; j < KEYS; j += PARTIALS)
      for (int p = 0; p < PARTS; ++p) most[p] = combine(most[p], max_state<f32v>{load(s[i] + j + p * W, W)});
    const f32 peak = maximum(tree(most).value, splat(highest[i]))[0];
    base[i] = peak == -__builtin_inff() ? 0.f : peak;
    fallen[i] = highest[i] - base[i];
    highest[i] = peak;
  }
  const f32v shares = exp_of(load(fallen, W));
#pragma GCC unroll 4
  for (int i = 0; i < ROW_TILE; ++i) {
    sum_state<f32v> sums[PARTS] = {};
    for (int j = 0; j < KEYS; j += PARTIALS)
      for (int p = 0; p < PARTS; ++p) {
        // what is too far below the maximum is zero, -inf too: denormal numbers are slow
        const f32v x = load(s[i] + j + p * W, W) - base[i];
        const f32v weight = select(x < -87.f, splat(0.f), exp_of(select(x < -87.f, splat(0.f), x)));
        store(s[i] + j + p * W, weight, W);
        sums[p].value += weight;
      }
    rescale[i] = shares[i];
    total[i] = total[i] * rescale[i] + tree(sums).value[0];
  }
}
//@ store_step_f32 store_step_bf16
// what PART loads, back again
INLINE void store_step_f32(f32 *p, const f32v *v, i64 n) {
  for (int k = 0; k < PARTS; ++k) store(p + k * W, v[k], n - k * W);
}
INLINE void store_step_bf16(u16 *p, const f32v *v, i64 n) {
  for (int k = 0; k < PARTS; ++k) {
    const f32v halves[2] = {round_bf16(v[k]), round_bf16(v[PARTS + k])};
    store_pair(p + 2 * k * W, halves, n - 2 * k * W);
  }
}
//@ attend_rows
enum { STEP_PARTS = PARTS * TILE_DEPTH / PARTIALS, STEPS = NATIVE_BYTES == 64 ? WIDE_STEPS : 1 };
#if KEYS_ALONG_LANES
// element d of key j at [d][j]; keys beyond `count` repeat the last one
static __attribute__((noinline)) void turn_keys(const ELEMENT *k, i64 k_stride, i64 count, f32 (*out)[KEYS]) {
  for (i64 j = 0; j < count; j += W)
    for (i64 d = 0; d < DEPTH; d += W) {
      f32v v[W];
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) v[n] = load(k + (j + n < count ? j + n : count - 1) * k_stride + d, DEPTH - d);
      transpose(v);
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) store(out[d + n] + j, v[n], W);
    }
}
// the scores of ROW_TILE rows with N vectors of keys from key j on
template <int N> INLINE void score_vectors(const f32 (*q)[DEPTH_PADDED], const f32 (*keys)[KEYS], i64 j, f32 (*out)[KEYS]) {
  f32v sums[ROW_TILE][N] = {};
  for (i64 d = 0; d < DEPTH; ++d) {
    f32v key[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) key[n] = load(keys[d] + j + n * W, W);
#pragma GCC unroll 4
    for (int i = 0; i < ROW_TILE; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[i][n] = multiply_add(splat(q[i][d]), key[n], sums[i][n]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROW_TILE; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out[i] + j + n * W, sums[i][n] * SCALE, W);
}
// the scores of ROW_TILE rows with `count` keys; of the last vector's keys, turn_keys repeats one
INLINE void score_keys(const f32 (*q)[DEPTH_PADDED], const f32 (*keys)[KEYS], i64 count, f32 (*out)[KEYS]) {
  enum { N = NATIVE_BYTES == 64 ? 4 : 2 };
  i64 j = 0;
  for (; j + (N - 1) * W < count; j += N * W) score_vectors<N>(q, keys, j, out);
  for (; j < count; j += W) score_vectors<1>(q, keys, j, out);
}
#else
// the scores of ROW_TILE rows with 4 keys at a time; keys beyond `count` repeat the last one
INLINE void score_keys(const ELEMENT *const *q, const ELEMENT *k, i64 k_stride, i64 depth, i64 count, f32 (*out)[KEYS]) {
  for (i64 j = 0; j < count; j += 4) {
    const ELEMENT *key[4];
    for (int n = 0; n < 4; ++n) key[n] = k + (j + n < count ? j + n : count - 1) * k_stride;
    f32v sums[ROW_TILE][4][PARTS] = {};
    for (i64 d = 0; d < depth; d += TILE_DEPTH) {
      f32v right[4][STEP_PARTS], left[STEP_PARTS];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) ahead(key[n] + d), PART(key[n] + d, depth - d, right[n]);
#pragma GCC unroll 4
      for (int i = 0; i < ROW_TILE; ++i) {
        PART(q[i] + d, depth - d, left);
#pragma GCC unroll 8
        for (int p = 0; p < STEP_PARTS; ++p)
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) sums[i][n][p % PARTS] = multiply_add(left[p], right[n][p], sums[i][n][p % PARTS]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROW_TILE; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) out[i][j + n] = tree((sum_state<f32v> *)sums[i][n]).value[0] * SCALE;
  }
}
#endif
// sums[i][e] += weights[i][j] * v[j][e] for N steps of elements
template <int N> INLINE void add_values(const f32 (*weights)[KEYS], const ELEMENT *v, i64 v_stride, i64 first, i64 end, i64 left, f32 *sums) {
  f32v held[ROW_TILE][N * STEP_PARTS], value[STEP_PARTS];
#pragma GCC unroll 4
  for (int i = 0; i < ROW_TILE; ++i)
#pragma GCC unroll 8
    for (int p = 0; p < N * STEP_PARTS; ++p) held[i][p] = load(sums + i * WIDTH_PADDED + p * W, W);
  for (i64 j = first; j < end; ++j)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      PART(v + j * v_stride + n * TILE_DEPTH, left - n * TILE_DEPTH, value);
#pragma GCC unroll 4
      for (int i = 0; i < ROW_TILE; ++i)
#pragma GCC unroll 8
        for (int p = 0; p < STEP_PARTS; ++p)
          held[i][n * STEP_PARTS + p] = multiply_add(splat(weights[i][j]), value[p], held[i][n * STEP_PARTS + p]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < ROW_TILE; ++i)
#pragma GCC unroll 8
    for (int p = 0; p < N * STEP_PARTS; ++p) store(sums + i * WIDTH_PADDED + p * W, held[i][p], W);
}
// rows is a multiple of ROW_TILE; a row that sees nothing gives zeros
static __attribute__((noinline)) void attend_rows(const ELEMENT *const *q, const ELEMENT *k, i64 k_stride, const ELEMENT *v, i64 v_stride,
                                                  const i64 *seen_from, const i64 *seen_to, i64 rows, ELEMENT *const *out
#ifdef MASKED
                                                  , const MASK_ELEMENT *const *masks
#endif
) {
  f32 sums[ROWS * WIDTH_PADDED] = {}, highest[ROWS], total[ROWS] = {}, weights[ROW_TILE][KEYS];
#if KEYS_ALONG_LANES
  f32 turned[DEPTH_PADDED][KEYS], queries[ROWS][DEPTH_PADDED];
  for (i64 r = 0; r < rows; ++r)
    for (i64 d = 0; d < DEPTH; d += W) store(queries[r] + d, load(q[r] + d, DEPTH - d), W);
#endif
  i64 from, to;
  seen_by_some(seen_from, seen_to, rows, &from, &to);
  for (i64 r = 0; r < rows; ++r) highest[r] = -__builtin_inff();
  for (i64 start = from; start < to; start += KEYS) {
#if KEYS_ALONG_LANES
    turn_keys(k + start * k_stride, k_stride, to - start < KEYS ? to - start : KEYS, turned);
#endif
    for (i64 r = 0; r < rows; r += ROW_TILE) {
      i64 low = KEYS, high = 0, first[ROW_TILE], last[ROW_TILE];
      for (int i = 0; i < ROW_TILE; ++i)
        if (seen_in_block(seen_from[r + i], seen_to[r + i], start, first + i, last + i))
          low = low < first[i] ? low : first[i], high = high > last[i] ? high : last[i];
      if (low >= high) continue;
#if KEYS_ALONG_LANES
      score_keys(queries + r, turned, high, weights);
#else
      score_keys(q + r, k + start * k_stride, k_stride, DEPTH, high, weights);
#endif
#ifdef MASKED
      for (int i = 0; i < ROW_TILE; ++i) {
        const MASK_ELEMENT *const mask = masks[r + i] + start;
#pragma GCC ivdep
        for (i64 j = 0; j < last[i]; ++j) weights[i][j] = MASKED(weights[i][j], mask[j]);
      }
#endif
      f32 rescale[ROW_TILE];
      weigh(weights, first, last, highest + r, total + r, rescale);
      for (int i = 0; i < ROW_TILE; ++i)
        if (rescale[i] != 1.f)
          for (int e = 0; e < WIDTH_PADDED; e += W) {
            f32 *const p = sums + (r + i) * WIDTH_PADDED + e;
            store(p, load(p, W) * rescale[i], W);
          }
      const ELEMENT *const values = v + start * v_stride;
      i64 e = 0;
      for (; e + STEPS * TILE_DEPTH <= WIDTH_PADDED; e += STEPS * TILE_DEPTH)
        add_values<STEPS>(weights, values + e, v_stride, low, high, WIDTH - e, sums + r * WIDTH_PADDED + e);
      for (; e < WIDTH; e += TILE_DEPTH) add_values<1>(weights, values + e, v_stride, low, high, WIDTH - e, sums + r * WIDTH_PADDED + e);
    }
  }
  for (i64 r = 0; r < rows; ++r) {
    const int nothing = total[r] == 0.f;  // an infinite value that no mask admits has made a sum NaN
    const f32v share = splat(nothing ? 1.f : total[r]);
    for (i64 e = 0; e < WIDTH && out[r]; e += TILE_DEPTH) {
      f32v result[STEP_PARTS];
      for (int p = 0; p < STEP_PARTS; ++p) result[p] = nothing ? f32v{} : load(sums + r * WIDTH_PADDED + e + p * W, W) / share;
      STORE_STEP(out[r] + e, result, WIDTH - e);
    }
  }
}
