// A product of a few rows with a matrix whose rows are its columns: every element of the matrix is read once and serves all rows.
// PARTIALS partial sums of fused multiply-adds a result, joined by `tree`: the same at every level, whatever the tile.
//@ multiply_add
// `fused`; where that is no instruction it is called, not repeated
#if defined(__FMA__) || defined(__aarch64__)
INLINE
#else
static __attribute__((noinline))
#endif
f32v multiply_add(f32v a, f32v b, f32v c) { return fused(a, b, c); }
//@ part_f32 part_f16 part_bf16
// the next n elements, at most PARTIALS (bf16: twice as many), as PARTS vectors (bf16: those of even elements, then of odd ones)
INLINE void part_f32(const f32 *p, i64 n, f32v *v) {
#pragma GCC unroll 4
  for (int k = 0; k < PARTS; ++k) v[k] = load(p + k * W, n - k * W);
}
INLINE void part_f16(const u16 *p, i64 n, f32v *v) {
#pragma GCC unroll 4
  for (int k = 0; k < PARTS; ++k) v[k] = widen_f16(load(p + k * W, n - k * W));
}
INLINE void part_bf16(const u16 *p, i64 n, f32v *v) {
#pragma GCC unroll 4
  for (int k = 0; k < PARTS; ++k) {
    u32v words = load_pair(p + 2 * k * W, n - 2 * k * W);
    v[k] = half_of(words, 0), v[PARTS + k] = half_of(words, 1);
  }
}
//@ gemm_columns
// lanes without bit h of a, the others of b
INLINE f32v keep_lanes(int h, f32v a, f32v b) { return (lanes & h) != 0 ? b : a; }
// rows and columns of a tile: its sums stay in registers
#if NATIVE_BYTES == 64
enum { TILE_ROWS = 4, TILE_COLUMNS = 4 };
#else
enum { TILE_ROWS = 2, TILE_COLUMNS = 2 };
#endif
enum { TILE_PARTS = PARTS * TILE_DEPTH / PARTIALS, KEPT_COLUMNS = 2 * TILE_COLUMNS };
// rows whose elements are walked together, and elements of the depth at a time
enum { ROW_BLOCK = 64, DEPTH_BLOCK = 512 };
template <int M, int N> INLINE void multiply(const ELEMENT *a, i64 a_stride, const ELEMENT *b, i64 depth, i64 n, f32v (*sums)[N][PARTS]) {
  f32v right[N][TILE_PARTS], left[TILE_PARTS];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) PART(b + j * depth, n, right[j]);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    PART(a + i * a_stride, n, left);
#pragma GCC unroll 8
    for (int k = 0; k < TILE_PARTS; ++k)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j][k % PARTS] = multiply_add(left[k], right[j][k], sums[i][j][k % PARTS]);
  }
}
// the results of a tile: `tree` of each.  As many as a vector has lanes are joined together: of two vectors that wait for one step of the
// tree, one vector takes both halves' sums, so the same numbers meet in fewer instructions.
template <int M, int N> INLINE void join(f32v (*sums)[N][PARTS], f32 *out) {
  if constexpr (M * N == W && PARTS == 1) {
    f32v v[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) v[r] = sums[r / N][r % N][0];
#pragma GCC unroll 4
    for (int h = W / 2; h > 0; h /= 2)
#pragma GCC unroll 8
      for (int r = 0; r < h; ++r) v[r] = keep_lanes(h, v[r], v[r + h]) + swap_lanes(keep_lanes(h, v[r + h], v[r]), h);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) out[i * KEPT_COLUMNS + j] = v[0][i * N + j];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) out[i * KEPT_COLUMNS + j] = tree((sum_state<f32v> *)sums[i][j]).value[0];
  }
}
// `sums` of a tile over elements `begin` to `end` of the depth: kept in memory between such stretches, joined into `out` after the last
template <int M, int N>
static __attribute__((noinline)) void tile(const ELEMENT *a, i64 a_stride, const ELEMENT *b, i64 depth, i64 begin, i64 end, f32v (*kept)[KEPT_COLUMNS][PARTS], f32 *out) {
  f32v sums[M][N][PARTS];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
      for (int k = 0; k < PARTS; ++k) sums[i][j][k] = begin ? kept[i][j][k] : f32v{};
  i64 k = begin;
  for (; k + TILE_DEPTH <= end; k += TILE_DEPTH) multiply<M, N>(a + k, a_stride, b + k, depth, TILE_DEPTH, sums);
  if (k < end) multiply<M, N>(a + k, a_stride, b + k, depth, end - k, sums);
  if (end == depth) return join<M, N>(sums, out);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
      for (int k = 0; k < PARTS; ++k) kept[i][j][k] = sums[i][j][k];
}
template <int M> INLINE void tile_columns(const ELEMENT *a, i64 a_stride, const ELEMENT *b, i64 depth, i64 begin, i64 end, f32v (*kept)[KEPT_COLUMNS][PARTS], f32 *out, i64 columns) {
  enum { N = M == 1 ? 2 * TILE_COLUMNS : TILE_COLUMNS };
  i64 j = 0;
  for (; j + N <= columns; j += N) tile<M, N>(a, a_stride, b + j * depth, depth, begin, end, (f32v(*)[KEPT_COLUMNS][PARTS])kept[0][j], out + j);
  for (; j < columns; ++j)
    for (i64 i = 0; i < M; ++i)
      tile<1, 1>(a + i * a_stride, a_stride, b + j * depth, depth, begin, end, (f32v(*)[KEPT_COLUMNS][PARTS])kept[i][j], out + i * KEPT_COLUMNS + j);
}
// `columns` results of every row.  A block of rows stays in the second-level cache while a few columns at a time go over it, stretch by
// stretch of their depth, which stay in the first.
INLINE void gemm_columns(const ELEMENT *a, i64 a_stride, const ELEMENT *b, i64 depth, ELEMENT *c, i64 c_stride, i64 rows, i64 columns, const ELEMENT *bias) {
  f32v kept[ROW_BLOCK][KEPT_COLUMNS][PARTS];
  f32 out[ROW_BLOCK * KEPT_COLUMNS];
  for (i64 block = 0; block < rows; block += ROW_BLOCK) {
    const i64 last = rows - block < ROW_BLOCK ? rows - block : ROW_BLOCK;
    for (i64 j = 0; j < columns; j += KEPT_COLUMNS) {
      const i64 n = columns - j < KEPT_COLUMNS ? columns - j : KEPT_COLUMNS;
      for (i64 begin = 0; begin < depth; begin += DEPTH_BLOCK) {
        const i64 end = depth - begin < DEPTH_BLOCK ? depth : begin + DEPTH_BLOCK;
        for (i64 i = 0, m; i < last; i += m) {
          const ELEMENT *left = a + (block + i) * a_stride, *right = b + j * depth;
          m = last - i < TILE_ROWS ? last - i : TILE_ROWS;
#if NATIVE_BYTES == 64
          if (m == 4) tile_columns<4>(left, a_stride, right, depth, begin, end, kept + i, out + i * KEPT_COLUMNS, n);
          if (m == 3) tile_columns<3>(left, a_stride, right, depth, begin, end, kept + i, out + i * KEPT_COLUMNS, n);
#endif
          if (m == 2) tile_columns<2>(left, a_stride, right, depth, begin, end, kept + i, out + i * KEPT_COLUMNS, n);
          if (m == 1) tile_columns<1>(left, a_stride, right, depth, begin, end, kept + i, out + i * KEPT_COLUMNS, n);
        }
      }
      for (i64 i = 0; i < last; ++i)
        for (i64 l = 0; l < n; l += W)
          STORE(c + (block + i) * c_stride + j + l, load(out + i * KEPT_COLUMNS + l, n - l), n - l, bias + j + l);
    }
  }
}
