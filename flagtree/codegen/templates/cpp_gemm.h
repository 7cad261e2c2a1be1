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
// rows and columns of a tile: its sums stay in registers
#if NATIVE_BYTES == 64
enum { TILE_ROWS = 4, TILE_COLUMNS = 4 };
#else
enum { TILE_ROWS = 2, TILE_COLUMNS = 2 };
#endif
enum { TILE_PARTS = PARTS * TILE_DEPTH / PARTIALS };
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
template <int M, int N>
static __attribute__((noinline)) void tile(const ELEMENT *a, i64 a_stride, const ELEMENT *b, i64 depth, f32 *out, i64 out_stride) {
  f32v sums[M][N][PARTS] = {};
  i64 k = 0;
  for (; k + TILE_DEPTH <= depth; k += TILE_DEPTH) multiply<M, N>(a + k, a_stride, b + k, depth, TILE_DEPTH, sums);
  if (k < depth) multiply<M, N>(a + k, a_stride, b + k, depth, depth - k, sums);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) out[i * out_stride + j] = tree((sum_state<f32v> *)sums[i][j]).value[0];
}
template <int M> INLINE void tile_columns(const ELEMENT *a, i64 a_stride, const ELEMENT *b, i64 depth, f32 *out, i64 columns) {
  enum { N = M == 1 ? 2 * TILE_COLUMNS : TILE_COLUMNS };
  i64 j = 0;
  for (; j + N <= columns; j += N) tile<M, N>(a, a_stride, b + j * depth, depth, out + j, columns);
  for (; j < columns; ++j)
    for (i64 i = 0; i < M; ++i) tile<1, 1>(a + i * a_stride, a_stride, b + j * depth, depth, out + i * columns + j, columns);
}
// `columns` results of every row; a few columns at a time, so that later rows find them in the cache
INLINE void gemm_columns(const ELEMENT *a, i64 a_stride, const ELEMENT *b, i64 depth, ELEMENT *c, i64 c_stride, i64 rows, i64 columns) {
  f32 out[TILE_ROWS * 2 * TILE_COLUMNS];
  for (i64 j = 0; j < columns; j += 2 * TILE_COLUMNS) {
    const i64 n = columns - j < 2 * TILE_COLUMNS ? columns - j : 2 * TILE_COLUMNS;
    for (i64 i = 0, m; i < rows; i += m) {
      const ELEMENT *left = a + i * a_stride, *right = b + j * depth;
      m = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
#if NATIVE_BYTES == 64
      if (m == 4) tile_columns<4>(left, a_stride, right, depth, out, n);
      if (m == 3) tile_columns<3>(left, a_stride, right, depth, out, n);
#endif
      if (m == 2) tile_columns<2>(left, a_stride, right, depth, out, n);
      if (m == 1) tile_columns<1>(left, a_stride, right, depth, out, n);
      for (i64 r = 0; r < m; ++r)
        for (i64 l = 0; l < n; l += W) STORE(c + (i + r) * c_stride + j + l, load(out + r * n + l, n - l), n - l);
    }
  }
}
