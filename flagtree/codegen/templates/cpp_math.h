// Transcendental functions.  f32 by range reduction and polynomials in f32 whose every step is one rounding at every level;
// the bound of each stands in codegen/cpp_math.py and is measured by tests/codegen/test_cpp_math.py.
// f64, and what kernels use rarely, go lane by lane through libm in f64.  Polynomials of exp, log, tanh after Cephes
// (S. Moshier, single precision), of erf after N. Juffa.
//@ lane_by_lane
template <class F> INLINE f64v lane_by_lane(F f, f64v x) {
  f64 t[W];
  __builtin_memcpy(t, &x, sizeof x);
  for (int l = 0; l < W; ++l) t[l] = f(t[l]);
  __builtin_memcpy(&x, t, sizeof x);
  return x;
}
template <class F> INLINE f32v lane_by_lane(F f, f32v x) {
  f32 t[W];
  __builtin_memcpy(t, &x, sizeof x);
  for (int l = 0; l < W; ++l) t[l] = (f32)f((f64)t[l]);
  __builtin_memcpy(&x, t, sizeof x);
  return x;
}
template <class F, class V, class T> INLINE V lane_by_lane(F f, V x, V y, T *) {
  T t[W], u[W];
  __builtin_memcpy(t, &x, sizeof x);
  __builtin_memcpy(u, &y, sizeof y);
  for (int l = 0; l < W; ++l) t[l] = (T)f(t[l], u[l]);
  __builtin_memcpy(&x, t, sizeof x);
  return x;
}
//@ power_of_two
// 2^n for -126 <= n <= 127
INLINE f32v power_of_two(i32v n) { return floats((n + 127) << 23); }
//@ times_power_of_two
// x * 2^k for whole k, -252 <= k <= 254, in two steps so that subnormal results round once; n is k as an integer
INLINE f32v times_power_of_two(f32v x, f32v k, i32v n) {
#if X86_BUILTINS && NATIVE_BYTES == 64 && WIDEST_BYTES == 4
  return (f32v)__builtin_ia32_scalefps512_mask(x, k, f32v{}, -1, 4);
#else
  i32v h = n >> 1;
  return x * power_of_two(h) * power_of_two(n - h);
#endif
}
//@ clamp
// between low and high; a NaN stays
INLINE f32v clamp(f32v x, f32 low, f32 high) { return larger(splat(low), smaller(splat(high), x)); }
//@ exp_reduced
// x = n * ln 2 + r with |r| <= ln(2) / 2, and (exp(r) - 1 - r) / r^2
struct exp_reduction { f32v r, tail, k; i32v n; };
INLINE exp_reduction exp_reduced(f32v x) {
  f32v shifted = fused(x, 1.44269504088896341f, 12582912.f), k = shifted - 12582912.f;  // 1.5 * 2^23: rounds to an integer
  f32v r = fused(k, 1.90465421e-9f, fused(k, -0.693147182f, x));
  f32v p = fused(r, 0x1.6a4e66p-10f, 0x1.12397cp-7f);
  p = fused(p, r, 0x1.5558aep-5f);
  p = fused(p, r, 0x1.555492p-3f);
  p = fused(p, r, 0x1.fffffcp-2f);
  return {r, p, k, bits(shifted) - 0x4b400000};
}
//@ exp_of
INLINE f32v exp_of(f32v x) {
  exp_reduction e = exp_reduced(clamp(x, -104.f, 89.f));
  return times_power_of_two(fused(fused(e.tail, e.r, 1.f), e.r, 1.f), e.k, e.n);
}
INLINE f64v exp_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_exp(t); }, x); }
//@ exp2_of
INLINE f32v exp2_of(f32v x) {
  x = clamp(x, -151.f, 129.f);
  f32v shifted = x + 12582912.f, k = shifted - 12582912.f, r = x - k;
  f32v p = fused(r, 0x1.417962p-13f, 0x1.5f0964p-10f);
  p = fused(p, r, 0x1.3b2dd4p-7f);
  p = fused(p, r, 0x1.c6af7ap-5f);
  p = fused(p, r, 0x1.ebfbdcp-3f);
  p = fused(p, r, 0x1.62e430p-1f);
  return times_power_of_two(fused(p, r, 1.f), k, bits(shifted) - 0x4b400000);
}
INLINE f64v exp2_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_exp2(t); }, x); }
//@ expm1_of
INLINE f32v expm1_of(f32v x) {
  exp_reduction e = exp_reduced(clamp(x, -18.f, 89.f));
  f32v less_one = fused(e.tail, e.r * e.r, e.r), half = power_of_two(e.n - 1);
  f32v y = fused(half, less_one, half - 0.5f) * 2.f;
  return absolute(x) < 1e-4f ? copy_sign(x + 0.5f * x * x, x) : y;  // of a negative zero, too
}
INLINE f64v expm1_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_expm1(t); }, x); }
//@ log_reduced
// x = 2^k * (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2); `tail` is log(1 + f) - f + f^2 / 2
struct log_reduction { f32v f, k, tail; };
INLINE log_reduction log_reduced(f32v x) {
  i32v small = x < 1.17549435e-38f;
  x = small ? x * 33554432.f : x;
  i32v u = bits(x) - 0x3f3504f3, k = (u >> 23) - (small & 25);
  f32v f = floats((u & 0x7fffff) + 0x3f3504f3) - 1.f;
  f32v p = fused(f, 7.0376836292e-2f, -1.1514610310e-1f);
  p = fused(p, f, 1.1676998740e-1f);
  p = fused(p, f, -1.2420140846e-1f);
  p = fused(p, f, 1.4249322787e-1f);
  p = fused(p, f, -1.6668057665e-1f);
  p = fused(p, f, 2.0000714765e-1f);
  p = fused(p, f, -2.4999993993e-1f);
  p = fused(p, f, 3.3333331174e-1f);
  return {f, to_f32(k), p * f * (f * f)};
}
//@ log_special
// what every logarithm gives at 0, below, at inf and NaN
INLINE f32v log_special(f32v x, f32v y) {
  f32v inf = splat(__builtin_inff());
  y = x == 0 ? -inf : y;
  y = x < 0 ? splat(__builtin_nanf("")) : y;
  return (x == inf) | (x != x) ? x : y;
}
//@ log_of
INLINE f32v log_of(f32v x) {
  log_reduction r = log_reduced(x);
  f32v y = r.tail + r.k * -2.12194440e-4f - 0.5f * (r.f * r.f);
  return log_special(x, r.f + y + r.k * 0.693359375f);
}
INLINE f64v log_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_log(t); }, x); }
//@ log2_of
INLINE f32v log2_of(f32v x) {
  log_reduction r = log_reduced(x);
  f32v y = r.tail - 0.5f * (r.f * r.f);
  return log_special(x, y * 0.44269504088896341f + r.f * 0.44269504088896341f + y + r.f + r.k);
}
INLINE f64v log2_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_log2(t); }, x); }
//@ log10_of
INLINE f32v log10_of(f32v x) {
  log_reduction r = log_reduced(x);
  f32v y = r.tail - 0.5f * (r.f * r.f);
  f32v z = (r.f + y) * 7.00731903251827651129e-4f + y * 4.3359375e-1f + r.f * 4.3359375e-1f;
  return log_special(x, r.k * 2.48745663981195213739e-4f + z + r.k * 3.00781250e-1f);
}
INLINE f64v log10_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_log10(t); }, x); }
//@ log1p_of
// log of the rounded u = 1 + x, corrected by what the rounding dropped
INLINE f32v log1p_of(f32v x) {
  f32v u = x + 1.f, lost = absolute(x) < 1.f ? x - (u - 1.f) : 1.f - (u - x);
  log_reduction r = log_reduced(u);
  f32v y = r.tail + r.k * -2.12194440e-4f - 0.5f * (r.f * r.f) + lost / u;
  y = r.f + y + r.k * 0.693359375f;
  y = absolute(x) < 1e-4f ? x - 0.5f * x * x : y;
  return log_special(u, y);
}
INLINE f64v log1p_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_log1p(t); }, x); }
//@ tanh_of
INLINE f32v tanh_of(f32v x) {
  f32v a = absolute(x), z = x * x;
  f32v p = fused(z, -5.70498872745e-3f, 2.06390887954e-2f);
  p = fused(p, z, -5.37397155531e-2f);
  p = fused(p, z, 1.33314422036e-1f);
  p = fused(p, z, -3.33332819422e-1f);
  f32v far = 1.f - 2.f / (exp_of(a + a) + 1.f);
  return copy_sign(a < 0.625f ? fused(p * z, a, a) : far, x);
}
INLINE f64v tanh_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_tanh(t); }, x); }
//@ erf_of
INLINE f32v erf_of(f32v x) {
  f32v a = absolute(x), s = x * x;
  f32v p = fused(s, -5.96761703e-4f, 4.99119423e-3f);
  p = fused(p, s, -2.67681349e-2f);
  p = fused(p, s, 1.12819925e-1f);
  p = fused(p, s, -3.76125336e-1f);
  p = fused(p, s, 1.28379166e-1f);
  f32v b = a > 4.f ? splat(4.f) : a;
  f32v q = fused(b, -1.72853470e-5f, 3.83197126e-4f);
  q = fused(q, b, -3.88396438e-3f);
  q = fused(q, b, 2.42546219e-2f);
  q = fused(q, b, -1.06777877e-1f);
  q = fused(q, b, -6.34846687e-1f);
  q = fused(q, b, -1.28717512e-1f);
  f32v far = 1.f - exp_of(fused(q, b, -b));
  return a > 0.921875f ? copy_sign(far, x) : fused(p, x, x);
}
INLINE f64v erf_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_erf(t); }, x); }
//@ sin_of cos_of
// by the nearest multiple k of pi/2, in f64 (33 + 53 bits of pi/2, k < 2^20), then an odd or even polynomial in f64; a huge
// argument goes to libm
INLINE f32v sine_of_quarter(f32v x, int quarter) {
  f64v d = to_f64(x), shifted = d * 0.63661977236758134308 + 6755399441055744.0, k = shifted - 6755399441055744.0;
  f64v r = (d - k * 1.57079632673412561417) - k * 6.07710050650619224932e-11, z = r * r;
  i64v q = bits64(shifted) + quarter;
  f64v s = ((((2.7557313621385722e-6 * z - 1.9841269829589539e-4) * z + 8.3333333332211859e-3) * z - 1.6666666666666030e-1) * z) * r + r;
  f64v c = ((((-2.7557314297e-7 * z + 2.48015872894767294e-5) * z - 1.38888888874110e-3) * z + 4.16666666666660e-2) * z - 0.5) * z + 1.0;
  f64v y = (q & 1) != 0 ? c : s;
  return to_f32((q & 2) != 0 ? -y : y);
}
INLINE f32v sin_of(f32v x) {
  i32v huge = ~(absolute(x) < 1048576.f);
  f32v y = absolute(x) < 1e-4f ? x : sine_of_quarter(x, 0);  // there x^3 / 6 is less than a quarter of a last place
  if (RARELY(any_lane(huge, W))) y = huge ? lane_by_lane([](f64 t) { return __builtin_sin(t); }, x) : y;
  return y;
}
INLINE f32v cos_of(f32v x) {
  i32v huge = ~(absolute(x) < 1048576.f);
  f32v y = sine_of_quarter(x, 1);
  if (RARELY(any_lane(huge, W))) y = huge ? lane_by_lane([](f64 t) { return __builtin_cos(t); }, x) : y;
  return y;
}
INLINE f64v sin_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_sin(t); }, x); }
INLINE f64v cos_of(f64v x) { return lane_by_lane([](f64 t) { return __builtin_cos(t); }, x); }
//@ tan_of
template <class V> INLINE V tan_of(V x) { return lane_by_lane([](f64 t) { return __builtin_tan(t); }, x); }
//@ asin_of
template <class V> INLINE V asin_of(V x) { return lane_by_lane([](f64 t) { return __builtin_asin(t); }, x); }
//@ acos_of
template <class V> INLINE V acos_of(V x) { return lane_by_lane([](f64 t) { return __builtin_acos(t); }, x); }
//@ atan_of
template <class V> INLINE V atan_of(V x) { return lane_by_lane([](f64 t) { return __builtin_atan(t); }, x); }
//@ sinh_of
template <class V> INLINE V sinh_of(V x) { return lane_by_lane([](f64 t) { return __builtin_sinh(t); }, x); }
//@ cosh_of
template <class V> INLINE V cosh_of(V x) { return lane_by_lane([](f64 t) { return __builtin_cosh(t); }, x); }
//@ erfc_of
template <class V> INLINE V erfc_of(V x) { return lane_by_lane([](f64 t) { return __builtin_erfc(t); }, x); }
//@ pow_of
INLINE f32v pow_of(f32v x, f32v y) { return lane_by_lane([](f64 a, f64 b) { return __builtin_pow(a, b); }, x, y, (f32 *)0); }
INLINE f64v pow_of(f64v x, f64v y) { return lane_by_lane([](f64 a, f64 b) { return __builtin_pow(a, b); }, x, y, (f64 *)0); }
//@ atan2_of
INLINE f32v atan2_of(f32v x, f32v y) { return lane_by_lane([](f64 a, f64 b) { return __builtin_atan2(a, b); }, x, y, (f32 *)0); }
INLINE f64v atan2_of(f64v x, f64v y) { return lane_by_lane([](f64 a, f64 b) { return __builtin_atan2(a, b); }, x, y, (f64 *)0); }
//@ fmod_of
INLINE f32v fmod_of(f32v x, f32v y) { return lane_by_lane([](f64 a, f64 b) { return __builtin_fmod(a, b); }, x, y, (f32 *)0); }
INLINE f64v fmod_of(f64v x, f64v y) { return lane_by_lane([](f64 a, f64 b) { return __builtin_fmod(a, b); }, x, y, (f64 *)0); }
