// Attention over many bf16 rows of one key head, by products of pairs (cpp_pairs.h): scores of all rows with a block of keys, their
// weights, rounded to bf16 as eager's are, and what these add to the results.  Sums of weights are f32.
//@ weight_of
// exp(x) for x <= 0, off by at most 2^-17 of it (codegen/cpp_attention.py, WEIGHT_ERROR), which rounding to bf16 hides: 2^-18.4 of the
// polynomial, 2^-19.6 of log2(e), whose error |x| <= 87 magnifies.  Zero below -87, so that no weight is denormal; a NaN stays.
INLINE f32v weight_of(f32v x) {
  const f32v shifted = fused(x, 1.44269504088896341f, 12582912.f), k = shifted - 12582912.f;
  const f32v r = fused(x, 1.44269504088896341f, -k);
  f32v p = fused(r, 0x1.3a02ccp-7f, 0x1.c9fc46p-5f);
  p = fused(p, r, 0x1.ec0378p-3f);
  p = fused(p, r, 0x1.62e12cp-1f);
  return select(x < -87.f, splat(0.f), times_power_of_two(fused(p, r, 1.f), k, bits(shifted) - 0x4b400000));
}
//@ attend_pairs
// words of two elements of key j: word d at [d][j]; beyond `count` the last key again, to a whole tile
static __attribute__((noinline)) void turn_pairs(const u16 *k, i64 k_stride, i64 count, i32 (*out)[KEYS]) {
  for (i64 j = 0; j < (count + TILE - 1) / TILE * TILE; j += W)
    for (i64 d = 0; d < DEPTH; d += 2 * W) {
      i32v v[W];
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) v[n] = (i32v)load_pair(k + (j + n < count ? j + n : count - 1) * k_stride + d, DEPTH - d);
      transpose(v);
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) store(out[d / 2 + n] + j, v[n], W);
    }
}
// words of elements e of two values: value j at half j % 2 of [j / 2][e]; zeros beyond `count`, to whole tiles
static __attribute__((noinline)) void pair_values(const u16 *v, i64 v_stride, i64 count, i32 (*out)[COLUMNS]) {
  for (i64 j = 0; j < (count + 2 * TILE - 1) / (2 * TILE) * (2 * TILE); j += 2)
    for (i64 e = 0; e < COLUMNS; e += W) {
      const u16 *const p = v + j * v_stride + e;
      const u32v low = j < count ? unsigned_of(load(p, WIDTH - e)) : u32v{};
      const u32v high = j + 1 < count ? unsigned_of(load(p + v_stride, WIDTH - e)) : u32v{};
      store(out[j / 2] + e, (i32v)(low | high << 16), W);
    }
}
// a row's weights from its products with KEYS keys, and how they change what there is of its result
INLINE void weigh_pairs(const f32 *scores, i64 first, i64 last, f32 *highest, f32 *total, u16 *weights, f32 *sums
#ifdef MASKED
                        , const MASK_ELEMENT *mask
#endif
) {
  enum { N = KEYS / W };
  f32v x[N], most = splat(*highest);
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    x[n] = load(scores + n * W, W) * SCALE;
#ifdef MASKED
    x[n] = MASKED(x[n], load(mask + n * W, last - n * W));
#endif
    if (first > 0 || last < KEYS) x[n] = select((lanes + n * W >= (i32)first) & (lanes + n * W < (i32)last), x[n], splat(-__builtin_inff()));
    most = larger(x[n], most);
  }
  // a NaN may get lost here: its weight is NaN all the same
#pragma GCC unroll 4
  for (int h = W / 2; h > 0; h /= 2) most = larger(swap_lanes(most, h), most);
  const f32v base = select(most == -__builtin_inff(), splat(0.f), most);
  sum_state<f32v> added[PARTS] = {};
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    const f32v weight = weight_of(x[n] - base);
    store(weights + n * W, narrow_bf16(nearest_bf16(weight)), W);
    added[n % PARTS].value += weight;
  }
  if (*highest != base[0]) {
    const f32 rescale = *highest == -__builtin_inff() ? 0.f : exp_of(splat(*highest) - base)[0];
    for (int e = 0; e < COLUMNS; e += W) store(sums + e, load(sums + e, W) * rescale, W);
    *total *= rescale;
  }
  *highest = most[0];
  *total += tree(added).value[0];
}
// rows is a multiple of TILE; a row that sees nothing gives zeros
static __attribute__((noinline)) void attend_pairs(const u16 *const *q, const u16 *k, i64 k_stride, const u16 *v, i64 v_stride,
                                                   const i64 *seen_from, const i64 *seen_to, i64 rows, u16 *const *out
#ifdef MASKED
                                                   , const MASK_ELEMENT *const *masks
#endif
) {
  enum { SOME = 4 * TILE };  // rows at a time, whose scores stay in the first-level cache
  alignas(64) i32 queries[ROWS][WORDS], keys[WORDS][KEYS], values[KEYS / 2][COLUMNS], weights[SOME][KEYS / 2];
  alignas(64) f32 sums[ROWS][COLUMNS], scores[SOME][KEYS];
  f32 highest[ROWS], total[ROWS] = {};
  i64 from, to, first[ROWS], last[ROWS];
  for (i64 d = DEPTH / 2; d < WORDS; ++d)
    for (i64 j = 0; j < KEYS; ++j) keys[d][j] = 0;
  for (i64 r = 0; r < rows; ++r) {
    for (i64 d = 0; d < WORDS; d += W) store(queries[r] + d, (i32v)load_pair(q[r] + 2 * d, DEPTH - 2 * d), W);
    for (i64 e = 0; e < COLUMNS; e += W) store(sums[r] + e, f32v{}, W);
    highest[r] = -__builtin_inff();
  }
  seen_by_some(seen_from, seen_to, rows, &from, &to);
  tile_use use;
  begin_tiles(&use);
  for (i64 start = from; start < to; start += KEYS) {
    const i64 count = to - start < KEYS ? to - start : KEYS;
    i64 begin = rows, end = 0;
    for (i64 r = 0; r < rows; ++r)
      if (seen_in_block(seen_from[r], seen_to[r], start, first + r, last + r)) begin = begin < r ? begin : r, end = r + 1;
    if (begin >= end) continue;
    begin = begin / TILE * TILE, end = (end + TILE - 1) / TILE * TILE;
    turn_pairs(k + start * k_stride, k_stride, count, keys);
    pair_values(v + start * v_stride, v_stride, count, values);
    const i64 columns = (count + TILE - 1) / TILE * TILE, words = (columns / 2 + TILE - 1) / TILE * TILE;
    for (i64 r = begin; r < end; r += SOME) {
      const i64 some = end - r < SOME ? end - r : SOME;
      add_pairs(use, {queries[r], WORDS, keys[0], KEYS, scores[0], KEYS, some, columns, WORDS, true});
      for (i64 i = 0; i < some; ++i)
        weigh_pairs(scores[i], first[r + i], last[r + i], highest + r + i, total + r + i, (u16 *)weights[i], sums[r + i]
#ifdef MASKED
                    , masks[r + i] + start
#endif
        );
      add_pairs(use, {weights[0], KEYS / 2, values[0], COLUMNS, sums[r], COLUMNS, some, COLUMNS, words, false});
    }
  }
  end_tiles(&use);
  for (i64 r = 0; r < rows; ++r) {
    const f32 share = 1.f / total[r];
    for (i64 e = 0; e < WIDTH && out[r]; e += W) {
      // an infinite value that no mask admits has made a sum NaN
      const f32v result = total[r] == 0.f ? f32v{} : load(sums[r] + e, W) * share;
      store(out[r] + e, narrow_bf16(round_bf16(result)), WIDTH - e);
    }
  }
}
