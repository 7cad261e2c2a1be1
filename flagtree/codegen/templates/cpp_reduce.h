// States that reductions carry.  `combine` is associative up to rounding; PARTIALS partial states, element e in state e % PARTIALS,
// are joined in one fixed tree, sums of f32 in PyTorch's order, so that the width of a vector never shows in a result.
//@ swap_lanes first_lane
#if defined(__clang__)
template <class V> INLINE V swap_lanes(V v, int h) {
  V r = v;
  for (int l = 0; l < W; ++l) r[l] = v[l ^ h];
  return r;
}
#else
INLINE f32v swap_lanes(f32v v, int h) { return __builtin_shuffle(v, lanes ^ h); }
INLINE i32v swap_lanes(i32v v, int h) { return __builtin_shuffle(v, lanes ^ h); }
INLINE f64v swap_lanes(f64v v, int h) { return __builtin_shuffle(v, lanes64 ^ (i64)h); }
INLINE i64v swap_lanes(i64v v, int h) { return __builtin_shuffle(v, lanes64 ^ (i64)h); }
#endif
INLINE f32v first_lane(f32v v) { return splat(v[0]); }
INLINE i32v first_lane(i32v v) { return splat(v[0]); }
INLINE f64v first_lane(f64v v) { return splat(v[0]); }
INLINE i64v first_lane(i64v v) { return splat(v[0]); }
//@ tree
// state i with state i + h for h = PARTIALS / 2, ..., 1; what lane 0 has then, in every lane
template <class S> INLINE S tree(S *s) {
#pragma GCC unroll 16
  for (int h = PARTS / 2; h > 0; h /= 2)
#pragma GCC unroll 16
    for (int k = 0; k < h; ++k) s[k] = combine(s[k], s[k + h]);
  S r = s[0];
#pragma GCC unroll 16
  for (int h = W / 2; h > 0; h /= 2) r = combine(r, swap_lanes(r, h));
  return first_lane(r);
}
//@ running
// Running sums along lanes: pairs, then fours, then eights (Sklansky's tree; blocks of 8 elements whatever W), each block's sum onto
// `carry`.  `before` is what earlier vectors of the block add up to, where a vector is less than a block.
template <class V> struct running { V carry, before[3]; };
INLINE f64v last_lane(f64v v) { return splat(v[W - 1]); }
INLINE i64v last_lane(i64v v) { return splat(v[W - 1]); }
INLINE i32v last_lane(i32v v) { return splat(v[W - 1]); }
#if defined(__clang__)
template <class V> INLINE V lower_half(V v, int h) {
  V r = {};
  for (int l = 0; l < W; ++l) if (l & h) r[l] = v[(l & (-2 * h)) + h - 1];
  return r;
}
#else
// in the upper half of each group of 2 * h lanes the last lane of its lower half, else zero
INLINE f64v lower_half(f64v v, i64 h) { return (lanes64 & h) != 0 ? __builtin_shuffle(v, (lanes64 & (-2 * h)) + (h - 1)) : f64v{}; }
INLINE i64v lower_half(i64v v, i64 h) { return (lanes64 & h) != 0 ? __builtin_shuffle(v, (lanes64 & (-2 * h)) + (h - 1)) : i64v{}; }
INLINE i32v lower_half(i32v v, i32 h) { return (lanes & h) != 0 ? __builtin_shuffle(v, (lanes & (-2 * h)) + (h - 1)) : i32v{}; }
#endif
template <class V> INLINE V advance(running<V> &s, V x, i64 at) {
#pragma GCC unroll 4
  for (int h = 1; h < W; h *= 2) x += lower_half(x, h);
#pragma GCC unroll 4
  for (int k = 0; W << k < 8; ++k) {
    if (at & (W << k)) x += s.before[k];
    else s.before[k] = last_lane(x);
  }
  const V y = s.carry + x;
  if (W >= 8 || (at & (8 - W)) == 8 - W) s.carry += last_lane(x);
  return y;
}
//@ sum_state
template <class V> struct sum_state { V value; };
template <class V> INLINE sum_state<V> combine(sum_state<V> a, sum_state<V> b) { return {a.value + b.value}; }
template <class V> INLINE sum_state<V> keep(int n, sum_state<V> a, sum_state<V> b) { return {keep(n, a.value, b.value)}; }
template <class V> INLINE sum_state<V> swap_lanes(sum_state<V> a, int h) { return {swap_lanes(a.value, h)}; }
template <class V> INLINE sum_state<V> first_lane(sum_state<V> a) { return {first_lane(a.value)}; }
//@ in_order
// The sum that 32 partial sums add up to in PyTorch's order (codegen/cpp_order.py), element e of a row in sum e % 32: of 4 vectors of 8
// lanes the first takes the others, then the lanes add up one after another.  `rest`: the elements behind the last whole 32 of a row of
// `length`, each in a sum of its own; whole vectors of them join the first, single ones come before the lanes.  Fewer than 8 are taken as
// 4 sums of their own.  In pairs (cpp_pair.py) the even elements' 16 sums stand before the odd ones'.
typedef f32 quad __attribute__((vector_size(16)));
template <bool PAIRS> INLINE f32v in_order(const sum_state<f32v> *s, const sum_state<f32v> *rest = 0, i64 length = 0) {
  enum : int { NEXT = PAIRS ? 1 : 2, HIGH = PAIRS ? 4 : 1 };
  const int left = length % 32, vectors = left / 8;
  f32 total = 0, place[32], single[32];
  quad m[8], r[8];
  __builtin_memcpy(m, s, sizeof m);
  if (left) {
    __builtin_memcpy(r, rest, sizeof r);
    __builtin_memcpy(place, rest, sizeof place);
    for (int e = 0; e < left; ++e) single[e] = place[PAIRS ? e % 2 * 16 + e / 2 : e];
  }
  if (length >= 4 && length < 8) {
    for (int e = 3; e < left; ++e) total += single[e == 3 ? 0 : e];
    return splat(total + single[1] + single[2] + single[3]);
  }
  quad half[2] = {m[0], m[HIGH]};
  for (int v = 0; v < vectors; ++v) half[0] += r[NEXT * v], half[1] += r[HIGH + NEXT * v];
#pragma GCC unroll 3
  for (int v = 1; v < 4; ++v) half[0] += m[NEXT * v], half[1] += m[HIGH + NEXT * v];
  for (int e = vectors * 8; e < left; ++e) total += single[e];
#pragma GCC unroll 8
  for (int l = 0; l < 8; ++l) total += PAIRS ? half[l % 2][l / 2] : half[l / 4][l % 4];
  return splat(total);
}
//@ prod_state
template <class V> struct prod_state { V value; };
template <class V> INLINE prod_state<V> combine(prod_state<V> a, prod_state<V> b) { return {a.value * b.value}; }
template <class V> INLINE prod_state<V> keep(int n, prod_state<V> a, prod_state<V> b) { return {keep(n, a.value, b.value)}; }
template <class V> INLINE prod_state<V> swap_lanes(prod_state<V> a, int h) { return {swap_lanes(a.value, h)}; }
template <class V> INLINE prod_state<V> first_lane(prod_state<V> a) { return {first_lane(a.value)}; }
//@ min_state
// the running value is the second operand: only the new one is looked at for NaN, so that nothing waits for that
template <class V> struct min_state { V value; };
template <class V> INLINE min_state<V> combine(min_state<V> a, min_state<V> b) { return {minimum(b.value, a.value)}; }
template <class V> INLINE min_state<V> keep(int n, min_state<V> a, min_state<V> b) { return {keep(n, a.value, b.value)}; }
template <class V> INLINE min_state<V> swap_lanes(min_state<V> a, int h) { return {swap_lanes(a.value, h)}; }
template <class V> INLINE min_state<V> first_lane(min_state<V> a) { return {first_lane(a.value)}; }
//@ max_state
template <class V> struct max_state { V value; };
template <class V> INLINE max_state<V> combine(max_state<V> a, max_state<V> b) { return {maximum(b.value, a.value)}; }
template <class V> INLINE max_state<V> keep(int n, max_state<V> a, max_state<V> b) { return {keep(n, a.value, b.value)}; }
template <class V> INLINE max_state<V> swap_lanes(max_state<V> a, int h) { return {swap_lanes(a.value, h)}; }
template <class V> INLINE max_state<V> first_lane(max_state<V> a) { return {first_lane(a.value)}; }
//@ any_state
template <class V> struct any_state { V value; };
template <class V> INLINE any_state<V> combine(any_state<V> a, any_state<V> b) { return {a.value | b.value}; }
template <class V> INLINE any_state<V> keep(int n, any_state<V> a, any_state<V> b) { return {keep(n, a.value, b.value)}; }
template <class V> INLINE any_state<V> swap_lanes(any_state<V> a, int h) { return {swap_lanes(a.value, h)}; }
template <class V> INLINE any_state<V> first_lane(any_state<V> a) { return {first_lane(a.value)}; }
//@ all_state
template <class V> struct all_state { V value; };
template <class V> INLINE all_state<V> combine(all_state<V> a, all_state<V> b) { return {a.value & b.value}; }
template <class V> INLINE all_state<V> keep(int n, all_state<V> a, all_state<V> b) { return {keep(n, a.value, b.value)}; }
template <class V> INLINE all_state<V> swap_lanes(all_state<V> a, int h) { return {swap_lanes(a.value, h)}; }
template <class V> INLINE all_state<V> first_lane(all_state<V> a) { return {first_lane(a.value)}; }
//@ argmax_state
// the first NaN wins over all, then the larger value, then the smaller index
template <class V, class I> struct argmax_state { V value; I index; };
template <class V, class I> INLINE argmax_state<V, I> combine(argmax_state<V, I> a, argmax_state<V, I> b) {
  i32v a_nan = mask(a.value != a.value), b_nan = mask(b.value != b.value), first = mask(a.index <= b.index);
  i32v a_wins = (a_nan & (~b_nan | first)) | (~a_nan & ~b_nan & (mask(a.value > b.value) | (mask(a.value == b.value) & first)));
  return {select(a_wins, a.value, b.value), select(a_wins, a.index, b.index)};
}
template <class V, class I> INLINE argmax_state<V, I> keep(int n, argmax_state<V, I> a, argmax_state<V, I> b) {
  return {keep(n, a.value, b.value), keep(n, a.index, b.index)};
}
template <class V, class I> INLINE argmax_state<V, I> swap_lanes(argmax_state<V, I> a, int h) {
  return {swap_lanes(a.value, h), swap_lanes(a.index, h)};
}
template <class V, class I> INLINE argmax_state<V, I> first_lane(argmax_state<V, I> a) { return {first_lane(a.value), first_lane(a.index)}; }
//@ argmin_state
template <class V, class I> struct argmin_state { V value; I index; };
template <class V, class I> INLINE argmin_state<V, I> combine(argmin_state<V, I> a, argmin_state<V, I> b) {
  i32v a_nan = mask(a.value != a.value), b_nan = mask(b.value != b.value), first = mask(a.index <= b.index);
  i32v a_wins = (a_nan & (~b_nan | first)) | (~a_nan & ~b_nan & (mask(a.value < b.value) | (mask(a.value == b.value) & first)));
  return {select(a_wins, a.value, b.value), select(a_wins, a.index, b.index)};
}
template <class V, class I> INLINE argmin_state<V, I> keep(int n, argmin_state<V, I> a, argmin_state<V, I> b) {
  return {keep(n, a.value, b.value), keep(n, a.index, b.index)};
}
template <class V, class I> INLINE argmin_state<V, I> swap_lanes(argmin_state<V, I> a, int h) {
  return {swap_lanes(a.value, h), swap_lanes(a.index, h)};
}
template <class V, class I> INLINE argmin_state<V, I> first_lane(argmin_state<V, I> a) { return {first_lane(a.value), first_lane(a.index)}; }
//@ welford_state
// mean, sum of squared distances from it, and count, joined by Chan's rule; an empty state joins to nothing
template <class V> struct welford_state { V mean, m2, count; };
template <class V> INLINE welford_state<V> combine(welford_state<V> a, welford_state<V> b) {
  V count = a.count + b.count, share = count != 0 ? b.count / count : count, delta = b.mean - a.mean;
  return {a.mean + delta * share, a.m2 + (b.m2 + delta * delta * (a.count * share)), count};
}
template <class V> INLINE welford_state<V> keep(int n, welford_state<V> a, welford_state<V> b) {
  return {keep(n, a.mean, b.mean), keep(n, a.m2, b.m2), keep(n, a.count, b.count)};
}
template <class V> INLINE welford_state<V> swap_lanes(welford_state<V> a, int h) {
  return {swap_lanes(a.mean, h), swap_lanes(a.m2, h), swap_lanes(a.count, h)};
}
template <class V> INLINE welford_state<V> first_lane(welford_state<V> a) { return {first_lane(a.mean), first_lane(a.m2), first_lane(a.count)}; }
//@ online_softmax_state
// the running maximum and the sum of exp(x - maximum); both -inf: the sums simply add
template <class V> struct online_softmax_state { V peak, total; };
template <class V> INLINE online_softmax_state<V> combine(online_softmax_state<V> a, online_softmax_state<V> b) {
  V peak = maximum(a.peak, b.peak), low = minimum(a.peak, b.peak);
  V scale = low == peak ? V{} + 1 : exp_of(low - peak);
  return {peak, a.peak < b.peak ? a.total * scale + b.total : a.total + b.total * scale};
}
template <class V> INLINE online_softmax_state<V> keep(int n, online_softmax_state<V> a, online_softmax_state<V> b) {
  return {keep(n, a.peak, b.peak), keep(n, a.total, b.total)};
}
template <class V> INLINE online_softmax_state<V> swap_lanes(online_softmax_state<V> a, int h) {
  return {swap_lanes(a.peak, h), swap_lanes(a.total, h)};
}
template <class V> INLINE online_softmax_state<V> first_lane(online_softmax_state<V> a) { return {first_lane(a.peak), first_lane(a.total)}; }
