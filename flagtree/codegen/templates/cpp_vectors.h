// Vector types of W lanes, conversions between register types, and memory access.
// A fragment starts at "//@ names it defines"; codegen/cpp_prelude.py copies those that a kernel names, in this order.
// Register types: f32v holds f32, bf16, f16 and f8e4m3fn; i32v holds i32, narrower integers and b1 (-1 true, 0 false); i64v; f64v.
//@ base
typedef signed char i8; typedef unsigned char u8; typedef short i16; typedef unsigned short u16;
typedef int i32; typedef unsigned u32; typedef long long i64; typedef unsigned long long u64;
typedef float f32; typedef double f64;
#define INLINE static inline __attribute__((always_inline))
#define RARELY(x) __builtin_expect(!!(x), 0)
#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define NATIVE_BYTES 64
#elif defined(__AVX2__)
#define NATIVE_BYTES 32
#else
#define NATIVE_BYTES 16
#endif
// GCC's names of single instructions, used where plain vector code gives the same bits more slowly
#if !defined(__clang__) && defined(__SSE4_1__)
#define X86_BUILTINS 1
#else
#define X86_BUILTINS 0
#endif
enum : int { W = NATIVE_BYTES / WIDEST_BYTES, PARTS = PARTIALS / W };
typedef f32 f32v __attribute__((vector_size(4 * W)));
typedef i32 i32v __attribute__((vector_size(4 * W)));
typedef u32 u32v __attribute__((vector_size(4 * W)));
typedef f64 f64v __attribute__((vector_size(8 * W)));
typedef i64 i64v __attribute__((vector_size(8 * W)));
typedef u64 u64v __attribute__((vector_size(8 * W)));
typedef u16 u16v __attribute__((vector_size(2 * W)));
typedef i16 i16v __attribute__((vector_size(2 * W)));
typedef u8 u8v __attribute__((vector_size(W)));
typedef i8 i8v __attribute__((vector_size(W)));
template <class T> struct vector_of;
template <> struct vector_of<f32> { typedef f32v type; };
template <> struct vector_of<i32> { typedef i32v type; };
template <> struct vector_of<f64> { typedef f64v type; };
template <> struct vector_of<i64> { typedef i64v type; };
template <> struct vector_of<u16> { typedef u16v type; };
template <> struct vector_of<i16> { typedef i16v type; };
template <> struct vector_of<u8> { typedef u8v type; };
template <> struct vector_of<i8> { typedef i8v type; };
INLINE f32v splat(f32 x) { return x - f32v{}; }
INLINE f64v splat(f64 x) { return x - f64v{}; }
INLINE i32v splat(i32 x) { return x - i32v{}; }
INLINE i64v splat(i64 x) { return x - i64v{}; }
//@ lanes lanes64
#define LANES_2 0, 1
#define LANES_4 LANES_2, 2, 3
#define LANES_8 LANES_4, 4, 5, 6, 7
#define LANES_16 LANES_8, 8, 9, 10, 11, 12, 13, 14, 15
#if NATIVE_BYTES / WIDEST_BYTES == 16
#define LANES LANES_16
#elif NATIVE_BYTES / WIDEST_BYTES == 8
#define LANES LANES_8
#elif NATIVE_BYTES / WIDEST_BYTES == 4
#define LANES LANES_4
#else
#define LANES LANES_2
#endif
static const i32v lanes = {LANES};
static const i64v lanes64 = {LANES};
//@ bits floats bits64 floats64
INLINE i32v bits(f32v x) { return (i32v)x; }
INLINE f32v floats(i32v x) { return (f32v)x; }
INLINE i64v bits64(f64v x) { return (i64v)x; }
INLINE f64v floats64(i64v x) { return (f64v)x; }
//@ select
INLINE f32v select(i32v m, f32v a, f32v b) { return m ? a : b; }
INLINE i32v select(i32v m, i32v a, i32v b) { return m ? a : b; }
INLINE f64v select(i32v m, f64v a, f64v b) { return __builtin_convertvector(m, i64v) ? a : b; }
INLINE i64v select(i32v m, i64v a, i64v b) { return __builtin_convertvector(m, i64v) ? a : b; }
//@ mask
INLINE i32v mask(i32v m) { return m; }
INLINE i32v mask(i64v m) { return __builtin_convertvector(m, i32v); }
//@ to_f32 to_f64 to_i32 to_i64
INLINE f32v to_f32(f32v x) { return x; }
INLINE f32v to_f32(f64v x) { return __builtin_convertvector(x, f32v); }
INLINE f32v to_f32(i32v x) { return __builtin_convertvector(x, f32v); }
INLINE f32v to_f32(i64v x) { return __builtin_convertvector(x, f32v); }
INLINE f64v to_f64(f32v x) {
#if X86_BUILTINS && NATIVE_BYTES / WIDEST_BYTES == 8 && NATIVE_BYTES == 64
  return (f64v)__builtin_ia32_cvtps2pd512_mask(x, f64v{}, -1, 4);
#else
  return __builtin_convertvector(x, f64v);
#endif
}
INLINE f64v to_f64(f64v x) { return x; }
INLINE f64v to_f64(i32v x) { return __builtin_convertvector(x, f64v); }
INLINE f64v to_f64(i64v x) { return __builtin_convertvector(x, f64v); }
INLINE i32v to_i32(f32v x) { return __builtin_convertvector(x, i32v); }
INLINE i32v to_i32(f64v x) { return __builtin_convertvector(x, i32v); }
INLINE i32v to_i32(i32v x) { return x; }
INLINE i32v to_i32(i64v x) { return __builtin_convertvector(x, i32v); }
INLINE i64v to_i64(f32v x) { return __builtin_convertvector(x, i64v); }
INLINE i64v to_i64(f64v x) { return __builtin_convertvector(x, i64v); }
INLINE i64v to_i64(i32v x) { return __builtin_convertvector(x, i64v); }
INLINE i64v to_i64(i64v x) { return x; }
//@ wrap_i8 wrap_u8 wrap_i16
INLINE i32v wrap_i8(i32v x) { return (x << 24) >> 24; }
INLINE i32v wrap_u8(i32v x) { return x & 255; }
INLINE i32v wrap_i16(i32v x) { return (x << 16) >> 16; }
//@ nearest_bf16 round_bf16
// to the nearest bf16, ties to even, kept as f32; a NaN stays a NaN.  Where the low halves of NaNs are known to be zero
// (codegen/cpp.py), adding to them carries nothing into their upper halves, and they need no look.
// `nearest_bf16` leaves something in the low half: enough for what is stored.
INLINE f32v nearest_bf16(f32v x) {
  u32v u = (u32v)x;
#if CLEAN_NANS && X86_BUILTINS && NATIVE_BYTES == 64 && WIDEST_BYTES == 4
  i32v up = (i32v)u + 0x7fff;  // masked adds: two instructions less
  return (f32v)__builtin_ia32_paddd512_mask((i32v)u, splat(0x8000), up, __builtin_ia32_ptestmd512((i32v)u, splat(0x10000), -1));
#elif CLEAN_NANS && X86_BUILTINS && NATIVE_BYTES == 64
  i32v up = (i32v)u + 0x7fff;
  return (f32v)__builtin_ia32_paddd256_mask((i32v)u, splat(0x8000), up, __builtin_ia32_ptestmd256((i32v)u, splat(0x10000), -1));
#elif CLEAN_NANS
  return (f32v)(u + 0x7fff + (u >> 16 & 1));
#elif X86_BUILTINS && NATIVE_BYTES == 64 && WIDEST_BYTES == 4
  i32v odd = splat(0x10000), even_up = (i32v)u + 0x7fff, quiet = splat(0x400000);
  i32v r = __builtin_ia32_paddd512_mask((i32v)u, splat(0x8000), even_up, __builtin_ia32_ptestmd512((i32v)u, odd, -1));
  return (f32v)__builtin_ia32_pord512_mask((i32v)u, quiet, r, __builtin_ia32_cmpps512_mask(x, x, 3, -1, 4));
#else
  u32v r = u + 0x7fff + (u >> 16 & 1);
  return (f32v)(x == x ? r : u | 0x400000);
#endif
}
INLINE f32v round_bf16(f32v x) { return (f32v)((u32v)nearest_bf16(x) & 0xffff0000); }
//@ round_f16
// to the nearest f16, ties to even, kept as f32: by integers where the result is normal, by adding 0.5 (whose last bit is the
// smallest f16) where it is subnormal
INLINE f32v round_f16(f32v x) {
#if X86_BUILTINS && NATIVE_BYTES == 64 && WIDEST_BYTES == 4
  return (f32v)__builtin_ia32_vcvtph2ps512_mask(__builtin_ia32_vcvtps2ph512_mask(x, 0, i16v{}, -1), f32v{}, -1, 4);
#elif X86_BUILTINS && NATIVE_BYTES >= 32 && NATIVE_BYTES / WIDEST_BYTES == 8
  return (f32v)__builtin_ia32_vcvtph2ps256(__builtin_ia32_vcvtps2ph256(x, 0));
#else
  u32v u = (u32v)x, sign = u & 0x80000000, a = u ^ sign;
  u32v normal = (a + 0xfff + (a >> 13 & 1)) & 0xffffe000;
  normal = normal > 0x477fe000 ? 0x7f800000 - u32v{} : normal;
  u32v tiny = (u32v)((f32v)a + 0.5f - 0.5f);
  u32v r = a < 0x38800000 ? tiny : a > 0x7f800000 ? a | 0x400000 : normal;
  return (f32v)(r | sign);
#endif
}
//@ round_f8e4m3fn
// to the nearest of 4 significant bits, ties to even, kept as f32: by integers where the result is normal, by adding 2^14 (whose last
// bit is 2^-9, the smallest e4m3) where it is subnormal; 448 for all that lies beyond, infinity too: the format has none
INLINE f32v round_f8e4m3fn(f32v x) {
  u32v u = (u32v)x, sign = u & 0x80000000, a = u ^ sign;
  u32v normal = (a + 0x7ffff + (a >> 20 & 1)) & 0xfff00000;
  normal = a > 0x7f800000 ? a | 0x400000 : normal > 0x43e00000 ? 0x43e00000 - u32v{} : normal;
  u32v tiny = (u32v)((f32v)a + 16384.0f - 16384.0f);
  return (f32v)((a < 0x3c800000 ? tiny : normal) | sign);
}
//@ widen_f8e4m3fn
INLINE f32v widen_f8e4m3fn(u8v x) {
  u32v h = __builtin_convertvector(x, u32v), a = h & 0x7f;
  u32v tiny = (u32v)((f32v)(a | 0x46800000) - 16384.0f);  // 2^14 + a * 2^-9, less 2^14
  u32v r = a < 8 ? tiny : a == 0x7f ? 0x7fc00000 - u32v{} : (a << 20) + 0x3c000000;
  return (f32v)(r | (h ^ a) << 24);
}
//@ narrow_f8e4m3fn
INLINE u8v narrow_f8e4m3fn(f32v x) {
  u32v u = (u32v)x, a = u & 0x7fffffff, sign = (u ^ a) >> 24;
  u32v tiny = (u32v)((f32v)a + 16384.0f) & 7;
  u32v r = a < 0x3c800000 ? tiny : a > 0x43e00000 ? 0x7f - u32v{} : (a - 0x3c000000) >> 20;
  return __builtin_convertvector(r | sign, u8v);
}
//@ unsigned_of
// 16 bits to 32; the compiler would split the widest vector in halves
INLINE u32v unsigned_of(u16v x) {
#if X86_BUILTINS && NATIVE_BYTES / WIDEST_BYTES == 16
  return (u32v)__builtin_ia32_pmovzxwd512_mask((i16v)x, i32v{}, -1);
#elif X86_BUILTINS && NATIVE_BYTES / WIDEST_BYTES == 8
  return (u32v)__builtin_ia32_pmovzxwd256((i16v)x);
#elif X86_BUILTINS && NATIVE_BYTES / WIDEST_BYTES == 4
  typedef i64 pair __attribute__((vector_size(16)));
  typedef i16 halves __attribute__((vector_size(16)));
  return (u32v)__builtin_ia32_pmovzxwd128((halves)(pair){(i64)x, 0});
#else
  return __builtin_convertvector(x, u32v);
#endif
}
//@ widen_f32 widen_bf16 widen_f16 widen_f64 widen_i64 widen_i32 widen_i16 widen_i8 widen_u8 widen_b1
INLINE f32v widen_f32(f32v x) { return x; }
INLINE f64v widen_f64(f64v x) { return x; }
INLINE i64v widen_i64(i64v x) { return x; }
INLINE i32v widen_i32(i32v x) { return x; }
INLINE i32v widen_i16(i16v x) { return __builtin_convertvector(x, i32v); }
INLINE i32v widen_i8(i8v x) { return __builtin_convertvector(x, i32v); }
INLINE i32v widen_u8(u8v x) { return __builtin_convertvector(x, i32v); }
INLINE i32v widen_b1(u8v x) { return __builtin_convertvector(x, i32v) != 0; }
INLINE f32v widen_bf16(u16v x) { return (f32v)(unsigned_of(x) << 16); }
INLINE f32v widen_f16(u16v x) {
#if X86_BUILTINS && NATIVE_BYTES == 64 && WIDEST_BYTES == 4
  return (f32v)__builtin_ia32_vcvtph2ps512_mask((i16v)x, f32v{}, -1, 4);
#elif X86_BUILTINS && NATIVE_BYTES >= 32 && NATIVE_BYTES / WIDEST_BYTES == 8
  return (f32v)__builtin_ia32_vcvtph2ps256((i16v)x);
#else
  u32v h = unsigned_of(x), a = h & 0x7fff, sign = (h ^ a) << 16;
  u32v normal = (a << 13) + 0x38000000, special = (a << 13) | 0x7f800000;
  u32v tiny = (u32v)((f32v)(a | 0x3f000000) - 0.5f) ;  // 0.5 + a * 2^-24, less 0.5
  return (f32v)(sign | (a < 0x400 ? tiny : a > 0x7c00 ? special | 0x400000 : a == 0x7c00 ? special : normal));
#endif
}
//@ narrow_f32 narrow_bf16 narrow_f16 narrow_f64 narrow_i64 narrow_i32 narrow_i16 narrow_i8 narrow_u8 narrow_b1
// what memory holds; the value has been rounded to the type before
INLINE f32v narrow_f32(f32v x) { return x; }
INLINE f64v narrow_f64(f64v x) { return x; }
INLINE i64v narrow_i64(i64v x) { return x; }
INLINE i32v narrow_i32(i32v x) { return x; }
INLINE i16v narrow_i16(i32v x) { return __builtin_convertvector(x, i16v); }
INLINE i8v narrow_i8(i32v x) { return __builtin_convertvector(x, i8v); }
INLINE u8v narrow_u8(i32v x) { return __builtin_convertvector(x, u8v); }
INLINE u8v narrow_b1(i32v x) { return __builtin_convertvector(x & 1, u8v); }
INLINE u16v narrow_bf16(f32v x) { return __builtin_convertvector((u32v)x >> 16, u16v); }
INLINE u16v narrow_f16(f32v x) {
#if X86_BUILTINS && NATIVE_BYTES == 64 && WIDEST_BYTES == 4
  return (u16v)__builtin_ia32_vcvtps2ph512_mask(x, 0, i16v{}, -1);
#elif X86_BUILTINS && NATIVE_BYTES >= 32 && NATIVE_BYTES / WIDEST_BYTES == 8
  return (u16v)__builtin_ia32_vcvtps2ph256(x, 0);
#else
  u32v u = (u32v)x, a = u & 0x7fffffff, sign = (u ^ a) >> 16;
  u32v tiny = (u32v)((f32v)a + 0.5f) & 0x7fff;
  u32v r = a < 0x38800000 ? tiny : a >= 0x7f800000 ? (a >> 13 & 0x3ff) | 0x7c00 : (a - 0x38000000) >> 13;
  return __builtin_convertvector(r | sign, u16v);
#endif
}
//@ load_some store_some
// a vector's first n elements of T, less than all (none where n < 1), the others zero; nothing beyond them in memory is touched
template <class V, class T> INLINE V load_some(const T *p, int n) {
  V v;
#if X86_BUILTINS && NATIVE_BYTES == 64
  typedef char B64 __attribute__((vector_size(64))), B32 __attribute__((vector_size(32))), B16 __attribute__((vector_size(16)));
  const u64 bytes = n > 0 ? (1ull << n * sizeof(T)) - 1 : 0;
  if constexpr (sizeof v == 64) return (V)__builtin_ia32_loaddquqi512_mask((const char *)p, B64{}, bytes);
  else if constexpr (sizeof v == 32) return (V)__builtin_ia32_loaddquqi256_mask((const char *)p, B32{}, bytes);
  else if constexpr (sizeof v == 16) return (V)__builtin_ia32_loaddquqi128_mask((const char *)p, B16{}, bytes);
#endif
  T part[sizeof v / sizeof(T)] = {};
  for (int l = 0; l < n; ++l) part[l] = p[l];
  __builtin_memcpy(&v, part, sizeof v);
  return v;
}
template <class V, class T> INLINE void store_some(T *p, V v, int n) {
#if X86_BUILTINS && NATIVE_BYTES == 64
  typedef char B64 __attribute__((vector_size(64))), B32 __attribute__((vector_size(32))), B16 __attribute__((vector_size(16)));
  const u64 bytes = n > 0 ? (1ull << n * sizeof(T)) - 1 : 0;
  if constexpr (sizeof v == 64) return __builtin_ia32_storedquqi512_mask((char *)p, (B64)v, bytes);
  else if constexpr (sizeof v == 32) return __builtin_ia32_storedquqi256_mask((char *)p, (B32)v, bytes);
  else if constexpr (sizeof v == 16) return __builtin_ia32_storedquqi128_mask((char *)p, (B16)v, bytes);
#endif
  T part[sizeof v / sizeof(T)];
  __builtin_memcpy(part, &v, sizeof v);
  for (int l = 0; l < n; ++l) p[l] = part[l];
}
//@ load
// n of W lanes from consecutive elements, the others zero; never reads beyond them
template <class T> INLINE typename vector_of<T>::type load(const T *p, int n) {
  typedef typename vector_of<T>::type __attribute__((aligned(sizeof(T)), may_alias)) U;
  return __builtin_expect(n >= W, 1) ? *(const U *)p : load_some<typename vector_of<T>::type>(p, n);
}
//@ ahead
// asks for what the loop will load some lines later: the processor's own guess comes late where there is much to compute on a line
#ifndef AHEAD
#define AHEAD 1536
#endif
INLINE void ahead(const void *p) { __builtin_prefetch((const u8 *)p + AHEAD); }
//@ load_where
// lanes where m is set, the others zero; touches nothing else
template <class T> INLINE typename vector_of<T>::type load_where(const T *p, i32v m, int n) {
  T part[W] = {};
  for (int l = 0; l < n; ++l) if (m[l]) part[l] = p[l];
  typename vector_of<T>::type v;
  __builtin_memcpy(&v, part, sizeof v);
  return v;
}
//@ load_one
// one element in every lane
template <class T> INLINE typename vector_of<T>::type load_one(const T *p) { return *p - typename vector_of<T>::type{}; }
//@ one_bf16
// the same as a float: widened before it is spread, which leaves the vector units two instructions less
INLINE f32v one_bf16(const u16 *p) {
  const u32 word = (u32)*p << 16;
  f32 x;
  __builtin_memcpy(&x, &word, sizeof x);
  return splat(x);
}
//@ store
template <class T> INLINE void store(T *p, typename vector_of<T>::type v, int n) {
  typedef typename vector_of<T>::type __attribute__((aligned(sizeof(T)), may_alias)) U;
  if (__builtin_expect(n >= W, 1)) *(U *)p = v;
  else store_some(p, v, n);
}
//@ store_past settle_stores
// past the caches where `past` says so and the address lets it: a line that is written whole need not be read first
#if X86_BUILTINS
template <class V> INLINE void stream(void *p, V v) {
  typedef i64 N2 __attribute__((vector_size(16)));
#if NATIVE_BYTES == 64
  typedef i64 N8 __attribute__((vector_size(64)));
  if constexpr (sizeof v == 64) return __builtin_ia32_movntdq512((N8 *)p, (N8)v);
#endif
#if NATIVE_BYTES >= 32
  typedef i64 N4 __attribute__((vector_size(32)));
  if constexpr (sizeof v == 32) return __builtin_ia32_movntdq256((N4 *)p, (N4)v);
#endif
  if constexpr (sizeof v == 16) return __builtin_ia32_movntdq((N2 *)p, (N2)v);
}
template <class T, class V> INLINE void store_past(T *p, V v, int n, bool past) {
  constexpr int size = sizeof v / sizeof(T);
  if constexpr (sizeof v >= 16 && sizeof v <= NATIVE_BYTES) if (past && n >= size && (u64)p % sizeof v == 0) return stream(p, v);
  typedef V __attribute__((aligned(sizeof(T)), may_alias)) U;
  if (__builtin_expect(n >= size, 1)) *(U *)p = v;
  else store_some(p, v, n);
}
INLINE void settle_stores(bool past) { if (past) __builtin_ia32_sfence(); }
#else
template <class T, class V> INLINE void store_past(T *p, V v, int n, bool) {
  typedef V __attribute__((aligned(sizeof(T)), may_alias)) U;
  if (__builtin_expect(n >= (int)(sizeof v / sizeof(T)), 1)) *(U *)p = v;
  else store_some(p, v, n);
}
INLINE void settle_stores(bool) {}
#endif
//@ store_where
template <class T> INLINE void store_where(T *p, typename vector_of<T>::type v, i32v m, int n) {
  for (int l = 0; l < n; ++l) if (m[l]) p[l] = v[l];
}
//@ keep
// the new value in the first n lanes
template <class V> INLINE V keep(int n, V now, V before) { return n >= W ? now : select(lanes < n, now, before); }
//@ load_pair half_of
// 2 * W bf16 as W words: the low half of a word is an even element, the high half the odd one after it
INLINE u32v load_pair(const u16 *p, int n) {
  typedef u32v __attribute__((aligned(2), may_alias)) U;
  return __builtin_expect(n >= 2 * W, 1) ? *(const U *)p : load_some<u32v>(p, n);
}
INLINE f32v half_of(u32v words, int half) { return (f32v)(half ? words & 0xffff0000 : words << 16); }
//@ joined
INLINE u32v joined(const f32v *halves) { return (u32v)halves[0] >> 16 | ((u32v)halves[1] & 0xffff0000); }
//@ store_pair
INLINE void store_pair(u16 *p, const f32v *halves, int n) {
  typedef u32v __attribute__((aligned(2), may_alias)) U;
  const u32v v = joined(halves);
  if (__builtin_expect(n >= 2 * W, 1)) *(U *)p = v;
  else store_some(p, v, n);
}
//@ any_lane
INLINE bool any_lane(i32v m, int n) {
  for (int l = 0; l < n; ++l) if (m[l]) return true;
  return false;
}
//@ floor_quotient floor_remainder
INLINE i64 floor_quotient(i64 a, i64 b) { return a >= 0 ? a / b : -1 - (-1 - a) / b; }
INLINE i64 floor_remainder(i64 a, i64 b) { return a - b * floor_quotient(a, b); }
