// Products of bf16 matrices in f32, whose operands lie as words of two elements that follow one another in depth.
//@ add_pairs
// c[i][n] += sum over k of a[i][k] * b[k][n] for rows i and columns n, multiples of TILE (`fresh`: c holds nothing yet).  Word p of a row of a
// is (a[i][2 p], a[i][2 p + 1]), word n of row p of b (b[2 p][n], b[2 p + 1][n]); words are a multiple of TILE; strides count words.
// The sum of TILE words: the products of lower halves are added one after the other, beginning with zero, those of upper halves too, and
// the sum of both is added to c.  Numbers below 2^-126 are zero, before and after each step.  So does Intel's TDPBF16PS (Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2); where a processor has none, vectors do the same, to the same bits.  (But on
// aarch64, which asks before it rounds whether a number is that small: between 2^-126 - 2^-151 and 2^-126.)
enum { TILE = 16 };
struct pair_product { const i32 *a; i64 a_stride; const i32 *b; i64 b_stride; f32 *c; i64 c_stride, rows, columns, words; bool fresh; };
#if defined(__x86_64__)
enum { FLUSH = 0x8040 };  // MXCSR: denormals are zero, flush to zero
INLINE u32 float_mode() { return __builtin_ia32_stmxcsr(); }
INLINE void float_mode(u32 mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
enum { FLUSH = 1 << 24 };  // FPCR.FZ
INLINE u64 float_mode() {
  u64 mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
INLINE void float_mode(u64 mode) { asm volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#endif
// M rows of N vectors
template <int M, int N> static __attribute__((noinline)) void add_pairs_part(const pair_product &p, i64 row, i64 column) {
  const i32 *const a = p.a + row * p.a_stride, *const b = p.b + column;
  f32 *const c = p.c + row * p.c_stride + column;
  for (i64 begin = 0; begin < p.words; begin += TILE) {
    f32v low[M][N] = {}, high[M][N] = {}, lower[N], upper[N];
    for (i64 k = begin; k < begin + TILE; ++k) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const u32v words = (u32v)load(b + k * p.b_stride + n * W, W);
        lower[n] = half_of(words, 0), upper[n] = half_of(words, 1);
      }
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        const u32v words = (u32v)splat(a[i * p.a_stride + k]);
        const f32v left = half_of(words, 0), right = half_of(words, 1);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) low[i][n] = multiply_add(left, lower[n], low[i][n]), high[i][n] = multiply_add(right, upper[n], high[i][n]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        f32 *const at = c + i * p.c_stride + n * W;
        const f32v sum = low[i][n] + high[i][n];
        store(at, (p.fresh && !begin ? f32v{} : load(at, W)) + sum, W);
      }
  }
}
static __attribute__((noinline)) void add_pairs_by_vectors(const pair_product &p) {
  enum { M = NATIVE_BYTES == 64 ? 4 : 2 };
  for (i64 i = 0; i < p.rows; i += M) {
    i64 n = 0;
    for (; n + 2 * W <= p.columns; n += 2 * W) add_pairs_part<M, 2>(p, i, n);
    for (; n < p.columns; n += W) add_pairs_part<M, 1>(p, i, n);
  }
}
#if defined(__x86_64__) && defined(__linux__) && NATIVE_BYTES == 64
#define TILES 1
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define TILE_LOAD(t, p, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"(4 * (stride)) : "memory")
#define TILE_STORE(t, p, stride) asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"(4 * (stride)) : "memory")
#define TILE_ADD(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
// two tiles of rows by two of columns: four sums
static __attribute__((noinline)) void add_pairs_by_tiles(const pair_product &p) {
  for (i64 i = 0; i < p.rows; i += 2 * TILE)
    for (i64 n = 0; n < p.columns; n += 2 * TILE) {
      const bool below = i + TILE < p.rows, beside = n + TILE < p.columns;
      f32 *const c = p.c + i * p.c_stride + n, *const d = c + TILE * p.c_stride;
      if (p.fresh) {
        TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
      } else {
        TILE_LOAD(0, c, p.c_stride);
        if (beside) TILE_LOAD(1, c + TILE, p.c_stride);
        if (below) TILE_LOAD(2, d, p.c_stride);
        if (below && beside) TILE_LOAD(3, d + TILE, p.c_stride);
      }
      for (i64 k = 0; k < p.words; k += TILE) {
        const i32 *const a = p.a + i * p.a_stride + k, *const b = p.b + k * p.b_stride + n;
        TILE_LOAD(4, a, p.a_stride);
        TILE_LOAD(6, b, p.b_stride);
        TILE_ADD(0, 4, 6);
        if (beside) {
          TILE_LOAD(7, b + TILE, p.b_stride);
          TILE_ADD(1, 4, 7);
        }
        if (below) {
          TILE_LOAD(5, a + TILE * p.a_stride, p.a_stride);
          TILE_ADD(2, 5, 6);
          if (beside) TILE_ADD(3, 5, 7);
        }
      }
      TILE_STORE(0, c, p.c_stride);
      if (beside) TILE_STORE(1, c + TILE, p.c_stride);
      if (below) TILE_STORE(2, d, p.c_stride);
      if (below && beside) TILE_STORE(3, d + TILE, p.c_stride);
    }
}
// does the processor have them, does the system keep them, and may this process use them (Linux, Documentation/arch/x86/xstate.rst)
static __attribute__((noinline)) bool ask_for_tiles() {
  u32 a = 7, b, c = 0, d, low, high;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;  // their configuration and data are saved
  i64 result = 158;  // arch_prctl
  asm volatile("syscall" : "+a"(result) : "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return result == 0;
}
INLINE bool has_tiles() {
  static int known;
  int found = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (!found) __atomic_store_n(&known, found = ask_for_tiles() ? 1 : -1, __ATOMIC_RELAXED);
  return found > 0;
}
// eight tiles of 16 rows of 64 bytes while it lives; what the thread had before comes back
struct tile_use {
  alignas(64) u8 before[64];
  bool there;
};
static __attribute__((noinline)) void begin_tiles(tile_use *use) {
  if (!(use->there = has_tiles())) return;
  alignas(64) u8 wanted[64] = {1};  // palette
  for (int t = 0; t < 8; ++t) wanted[16 + 2 * t] = 64, wanted[48 + t] = TILE;
  asm volatile("sttilecfg %0" : "=m"(use->before));
  asm volatile("ldtilecfg %0" ::"m"(wanted));
}
static __attribute__((noinline)) void end_tiles(tile_use *use) {
  if (use->there) asm volatile("ldtilecfg %0" ::"m"(use->before));
}
#else
#define TILES 0
struct tile_use {};
INLINE void begin_tiles(tile_use *) {}
INLINE void end_tiles(tile_use *) {}
#endif
// between begin_tiles and end_tiles of `use`
INLINE void add_pairs(const tile_use &use, const pair_product &p) {
#if TILES
  if (use.there) return add_pairs_by_tiles(p);
#endif
  const auto mode = float_mode();
  float_mode(mode | FLUSH);
  add_pairs_by_vectors(p);
  float_mode(mode);
}
