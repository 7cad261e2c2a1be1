// Attention over rows of one key head: a block of keys at a time, with a running maximum; every key and value is read once for ROWS rows.
// Row r sees the keys seen_from[r]..seen_to[r]-1.  A score has PARTIALS partial sums, joined by `tree`; an element of a result adds its
// keys one after the other: the same at every level.
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
enum { KEYS = 64, ROW_TILE = 4, STEP_PARTS = PARTS * TILE_DEPTH / PARTIALS, STEPS = NATIVE_BYTES == 64 ? 64 / TILE_DEPTH : 1 };
// the scores of ROW_TILE rows with 4 keys at a time; keys beyond `count` repeat the last one
INLINE void score_keys(const ELEMENT *const *q, const ELEMENT *k, i64 k_stride, i64 depth, i64 count, f32 (*out)[KEYS]) {
  for (i64 j = 0; j < count; j += 4) {
    const ELEMENT *key[4];
    for (int n = 0; n < 4; ++n) key[n] = k + (j + n < count ? j + n : count - 1) * k_stride;
    f32v sums[ROW_TILE][4][PARTS] = {};
    for (i64 d = 0; d < depth; d += TILE_DEPTH) {
      f32v right[4][STEP_PARTS], left[STEP_PARTS];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) PART(key[n] + d, depth - d, right[n]);
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
// scores to weights exp(score - maximum) of one row, zero outside of first..end-1; what the sums so far are to be multiplied with
INLINE f32 weigh(f32 *s, i64 first, i64 end, f32 *highest, f32 *total) {
  for (i64 j = 0; j < first; ++j) s[j] = -__builtin_inff();
  for (i64 j = end; j < KEYS; ++j) s[j] = -__builtin_inff();
  f32v most = splat(*highest);
  for (int j = 0; j < KEYS; j += W) most = maximum(load(s + j, W), most);
  f32 peak = *highest;
  for (int l = 0; l < W; ++l) peak = most[l] > peak || most[l] != most[l] ? most[l] : peak;
  const f32 base = peak == -__builtin_inff() ? 0.f : peak;
  sum_state<f32v> sums[PARTS] = {};
  for (int j = 0; j < KEYS; j += PARTIALS)
    for (int p = 0; p < PARTS; ++p) {
      const f32v weight = exp_of(load(s + j + p * W, W) - base);
      store(s + j + p * W, weight, W);
      sums[p].value += weight;
    }
  const f32 rescale = exp_of(splat(*highest - base))[0];
  *total = *total * rescale + tree(sums).value[0];
  *highest = peak;
  return rescale;
}
// sums[i][e] += weights[i][j] * v[j][e] for N steps of elements
template <int N> INLINE void add_values(const f32 (*weights)[KEYS], const ELEMENT *v, i64 v_stride, i64 first, i64 end, i64 left, f32 *sums) {
  f32v held[ROW_TILE][N * STEP_PARTS], value[STEP_PARTS];
#pragma GCC unroll 4
  for (int i = 0; i < ROW_TILE; ++i)
#pragma GCC unroll 8
    for (int p = 0; p < N * STEP_PARTS; ++p) held[i][p] = load(sums + i * WIDTH_PADDED + p * W, W);
  for (i64 j = first; j < end; ++j)
#pragma GCC unroll 4
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
                                                  const i64 *seen_from, const i64 *seen_to, i64 rows, ELEMENT *const *out) {
  f32 sums[ROWS * WIDTH_PADDED] = {}, highest[ROWS], total[ROWS] = {}, weights[ROW_TILE][KEYS];
  i64 from = 0, to = 0;
  for (i64 r = 0; r < rows; ++r) {
    highest[r] = -__builtin_inff();
    if (seen_from[r] >= seen_to[r]) continue;
    from = from < to && from < seen_from[r] ? from : seen_from[r];
    to = to > seen_to[r] ? to : seen_to[r];
  }
  for (i64 start = from; start < to; start += KEYS)
    for (i64 r = 0; r < rows; r += ROW_TILE) {
      i64 low = KEYS, high = 0, first[ROW_TILE], last[ROW_TILE];
      for (int i = 0; i < ROW_TILE; ++i) {
        first[i] = seen_from[r + i] > start ? seen_from[r + i] - start : 0;
        last[i] = seen_to[r + i] - start < KEYS ? seen_to[r + i] - start : KEYS;
        if (first[i] >= last[i]) first[i] = last[i] = 0;
        else low = low < first[i] ? low : first[i], high = high > last[i] ? high : last[i];
      }
      if (low >= high) continue;
      score_keys(q + r, k + start * k_stride, k_stride, DEPTH, high, weights);
      for (int i = 0; i < ROW_TILE; ++i) {
        const f32 rescale = weigh(weights[i], first[i], last[i], highest + r + i, total + r + i);
        if (rescale != 1.f)
          for (int e = 0; e < WIDTH_PADDED; e += W) {
            f32 *const p = sums + (r + i) * WIDTH_PADDED + e;
            store(p, load(p, W) * rescale, W);
          }
      }
      const ELEMENT *const values = v + start * v_stride;
      i64 e = 0;
      for (; e + STEPS * TILE_DEPTH <= WIDTH; e += STEPS * TILE_DEPTH)
        add_values<STEPS>(weights, values + e, v_stride, low, high, WIDTH - e, sums + r * WIDTH_PADDED + e);
      for (; e < WIDTH; e += TILE_DEPTH) add_values<1>(weights, values + e, v_stride, low, high, WIDTH - e, sums + r * WIDTH_PADDED + e);
    }
  for (i64 r = 0; r < rows; ++r) {
    const f32v share = splat(total[r] == 0.f ? 1.f : total[r]);
    for (i64 e = 0; e < WIDTH && out[r]; e += TILE_DEPTH) {
      f32v result[STEP_PARTS];
      for (int p = 0; p < STEP_PARTS; ++p) result[p] = load(sums + r * WIDTH_PADDED + e + p * W, W) / share;
      STORE_STEP(out[r] + e, result, WIDTH - e);
    }
  }
}
