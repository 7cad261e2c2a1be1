// Elementwise operations that every register type shares, and integer division; see cpp_math.h for transcendental functions.
//@ smaller larger
// a < b ? a : b and a > b ? a : b, so b where either is NaN: one instruction on x86
#if X86_BUILTINS && NATIVE_BYTES / WIDEST_BYTES == 16
INLINE f32v smaller(f32v a, f32v b) { return (f32v)__builtin_ia32_minps512_mask(a, b, f32v{}, -1, 4); }
INLINE f32v larger(f32v a, f32v b) { return (f32v)__builtin_ia32_maxps512_mask(a, b, f32v{}, -1, 4); }
#elif X86_BUILTINS && NATIVE_BYTES / WIDEST_BYTES == 8
INLINE f32v smaller(f32v a, f32v b) { return __builtin_ia32_minps256(a, b); }
INLINE f32v larger(f32v a, f32v b) { return __builtin_ia32_maxps256(a, b); }
#elif X86_BUILTINS && NATIVE_BYTES / WIDEST_BYTES == 4
INLINE f32v smaller(f32v a, f32v b) { return __builtin_ia32_minps(a, b); }
INLINE f32v larger(f32v a, f32v b) { return __builtin_ia32_maxps(a, b); }
#else
INLINE f32v smaller(f32v a, f32v b) { return a < b ? a : b; }
INLINE f32v larger(f32v a, f32v b) { return a > b ? a : b; }
#endif
//@ minimum maximum
// NaN if either is NaN
INLINE f32v minimum(f32v a, f32v b) { f32v r = smaller(a, b); return a != a ? a : r; }
INLINE f32v maximum(f32v a, f32v b) { f32v r = larger(a, b); return a != a ? a : r; }
template <class V> INLINE V minimum(V a, V b) { return (a < b) | (a != a) ? a : b; }
template <class V> INLINE V maximum(V a, V b) { return (a > b) | (a != a) ? a : b; }
//@ absolute
INLINE f32v absolute(f32v x) { return floats(bits(x) & 0x7fffffff); }
INLINE f64v absolute(f64v x) { return floats64(bits64(x) & 0x7fffffffffffffff); }
INLINE i32v absolute(i32v x) { return x < 0 ? -x : x; }
INLINE i64v absolute(i64v x) { return x < 0 ? -x : x; }
//@ copy_sign
INLINE f32v copy_sign(f32v x, f32v s) { return floats((bits(x) & 0x7fffffff) | (bits(s) & (i32)0x80000000)); }
INLINE f64v copy_sign(f64v x, f64v s) { return floats64((bits64(x) & 0x7fffffffffffffff) | (bits64(s) & (i64)0x8000000000000000)); }
//@ sign_of
INLINE f32v sign_of(f32v x) { return x > 0 ? splat(1.f) : x < 0 ? splat(-1.f) : splat(0.f); }
INLINE f64v sign_of(f64v x) { return x > 0 ? splat(1.) : x < 0 ? splat(-1.) : splat(0.); }
INLINE i32v sign_of(i32v x) { return (x < 0) - (x > 0); }
INLINE i64v sign_of(i64v x) { return (x < 0) - (x > 0); }
//@ round_even
// adding 2^23 (2^52) leaves no room for a fraction; larger numbers, inf and NaN have none
INLINE f32v round_even(f32v x) {
  f32v a = absolute(x), r = (a + 8388608.f) - 8388608.f;
  return copy_sign(a < 8388608.f ? r : a, x);
}
INLINE f64v round_even(f64v x) {
  f64v a = absolute(x), r = (a + 4503599627370496.) - 4503599627370496.;
  return copy_sign(a < 4503599627370496. ? r : a, x);
}
//@ floor_of ceil_of trunc_of
template <class V> INLINE V floor_of(V x) { V r = round_even(x); return copy_sign(r > x ? r - 1 : r, x); }
template <class V> INLINE V ceil_of(V x) { V r = round_even(x); return copy_sign(r < x ? r + 1 : r, x); }
template <class V> INLINE V trunc_of(V x) { V a = absolute(x), r = round_even(a); return copy_sign(r > a ? r - 1 : r, x); }
//@ square_root
INLINE f32v square_root(f32v x) {
  f32 t[W];
  __builtin_memcpy(t, &x, sizeof x);
  for (int l = 0; l < W; ++l) t[l] = __builtin_sqrtf(t[l]);
  __builtin_memcpy(&x, t, sizeof x);
  return x;
}
INLINE f64v square_root(f64v x) {
  f64 t[W];
  __builtin_memcpy(t, &x, sizeof x);
  for (int l = 0; l < W; ++l) t[l] = __builtin_sqrt(t[l]);
  __builtin_memcpy(&x, t, sizeof x);
  return x;
}
//@ fused
// a * b + c rounded once: an instruction from x86-64-v3 on and on aarch64, else computed, to the same bits
INLINE f32v fused(f32v a, f32v b, f32v c) {
#if X86_BUILTINS && defined(__FMA__) && NATIVE_BYTES / WIDEST_BYTES == 16
  return (f32v)__builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);
#elif X86_BUILTINS && defined(__FMA__) && NATIVE_BYTES / WIDEST_BYTES == 8
  return (f32v)__builtin_ia32_vfmaddps256(a, b, c);
#elif X86_BUILTINS && defined(__FMA__) && NATIVE_BYTES / WIDEST_BYTES == 4
  return (f32v)__builtin_ia32_vfmaddps(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  f32v r;
  for (int l = 0; l < W; ++l) r[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return r;
#else
  // the product is exact in f64; the sum is rounded to odd, after which rounding to f32 is as if done once
  // (S. Boldo, G. Melquiond, "Emulation of a FMA and correctly rounded sums", IEEE Trans. Computers 57, 2008)
  f64v p = to_f64(a) * to_f64(b), z = to_f64(c), s = p + z, t = s - p, lost = (p - (s - t)) + (z - t);
  i64v u = bits64(s), outward = (lost > 0) ^ (s < 0), inexact = (lost > 0) | (lost < 0);
  return to_f32(floats64(u + (((outward & 2) - 1) & inexact & ((u & 1) - 1))));
#endif
}
INLINE f32v fused(f32v a, f32v b, f32 c) { return fused(a, b, splat(c)); }
INLINE f32v fused(f32v a, f32 b, f32v c) { return fused(a, splat(b), c); }
INLINE f32v fused(f32v a, f32 b, f32 c) { return fused(a, splat(b), splat(c)); }
//@ root_alike quotient_alike inverse_root_alike
// of values that are the same in every lane: one lane at a scalar's latency, which is half of a wide vector's
INLINE f32v root_alike(f32v x) { return splat(__builtin_sqrtf(x[0])); }
INLINE f64v root_alike(f64v x) { return splat(__builtin_sqrt(x[0])); }
template <class V> INLINE V quotient_alike(V a, V b) { return splat(a[0] / b[0]); }
template <class V> INLINE V inverse_root_alike(V x) { return splat(1 / root_alike(x)[0]); }
//@ divided
// a / b where one b serves many vectors: by its reciprocal and two corrections, which give the quotient's own bits as long as
// nothing leaves the normal range (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor",
// IBM J. Res. Dev. 34, 1990: the reciprocal is rounded correctly, the second to last quotient is within one place)
INLINE f32v divided(f32v a, f32v b) {
#if X86_BUILTINS && NATIVE_BYTES / WIDEST_BYTES == 16
  const f32v y = 1.f / b;
  const f32 size = __builtin_fabsf(b[0]);
  const u32v place = ((u32v)a & 0x7fffffff) - 0x0f800000;  // |a| from 2^-96 to 2^96, or +0
  const u16 usual = __builtin_ia32_ucmpd512_mask((i32v)place, splat(0x60000000), 1, -1) | __builtin_ia32_ptestnmd512((i32v)a, (i32v)a, -1);
  if (size > 0x1p-24f && size < 0x1p24f && usual == 0xffff) {
    f32v q = a * y;
    q = fused(fused(-q, b, a), y, q);
    return fused(fused(-q, b, a), y, q);
  }
#endif
  return a / b;
}
//@ divide_trunc
// rounds to zero; by 0 (undefined) and the one overflow give a value and do not trap, also in lanes beyond the data
template <class V> INLINE V divide_trunc(V a, V b) {
  V safe = (b == 0) | (b == -1) ? b - b + 1 : b;
  return b == -1 ? -a : a / safe;
}
//@ divide_floor
template <class V> INLINE V divide_floor(V a, V b) {
  V q = divide_trunc(a, b), r = a - q * b;
  return (r != 0) & ((r ^ b) < 0) ? q - 1 : q;
}
//@ modulo
template <class V> INLINE V modulo(V a, V b) { return a - divide_floor(a, b) * b; }
//@ remainder_trunc
template <class V> INLINE V remainder_trunc(V a, V b) { return a - divide_trunc(a, b) * b; }
//@ shift_left shift_right
// a count outside the width gives 0, or the sign
INLINE i32v shift_left(i32v a, i32v b, int width) { return (b < 0) | (b >= width) ? i32v{} : (i32v)((u32v)a << (u32v)(b & 31)); }
INLINE i64v shift_left(i64v a, i64v b, int width) { return (b < 0) | (b >= width) ? i64v{} : (i64v)((u64v)a << (u64v)(b & 63)); }
INLINE i32v shift_right(i32v a, i32v b, int width) { return (b < 0) | (b >= width) ? a >> 31 : a >> (b & 31); }
INLINE i64v shift_right(i64v a, i64v b, int width) { return (b < 0) | (b >= width) ? a >> 63 : a >> (b & 63); }
