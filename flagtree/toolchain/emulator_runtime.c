/* The emulator's machine: runs one GPU kernel, compiled to x86-64, with one fiber per GPU thread.
 *
 * Invariants: shared memory holds NaN before each block; a barrier or a lane exchange completes only when every thread of the block,
 * or every lane of the warp, waits at the same place of the program; a fault ends the run with a report, never the process.
 * emulator_worker.py compiles and loads this file; emulator_ir.py writes the calls to the ft_ functions.
 */
#define _GNU_SOURCE
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define LANES 64
#define MAX_THREADS 512
#define STACK (512 * 1024)
#define PAGE 4096
#define SHARED (64 * 1024)
#define GUARD (1 << 20)

enum { READY, EXCHANGE, BARRIER, DONE };
enum { FINE, DEADLOCK, FAULT, OVERRUN, NO_MEMORY };
enum { FORWARD, REVERSE, RANDOM };

/* One dynamic shared array, a guard on both sides; the kernel's `global_smem` is its start. */
char ft_shared_area[SHARED + 2 * GUARD] __attribute__((aligned(PAGE)));
extern char global_smem[];
__asm__(".globl global_smem\n.set global_smem, ft_shared_area + 1048576\n");

struct report {
  int32_t code, block[3], thread, state, site, other_thread, other_state, other_site, signal, wrote;
  uint64_t address;
  int64_t blocks, barriers, exchanges, switches;
};

static struct report *report;
static void *stack_pointer[MAX_THREADS], *scheduler;
static char *stacks;
static int state[MAX_THREADS], site[MAX_THREADS], parity[MAX_THREADS], threads, current;
static uint32_t words[2][MAX_THREADS];
static uint64_t fragment_a[2][MAX_THREADS], fragment_b[2][MAX_THREADS];
static int32_t block_x, block_y, block_z;
static void (*entry)(void **);
static void **arguments;
static uint64_t randomness;
static sigjmp_buf escape;

/* Save the callee-saved registers on the running stack, continue on another one. */
void ft_switch(void **from, void *to);
__asm__(".globl ft_switch\nft_switch:\n push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n"
        " mov %rsi,%rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

static void wait_in(int next, int place) {
  state[current] = next;
  site[current] = place;
  report->switches++;
  ft_switch(&stack_pointer[current], scheduler);
}

static void thread_main(void) {
  entry(arguments);
  wait_in(DONE, 0);
}

/* ---- what a kernel calls ---------------------------------------------------------------------------------------- */
int32_t ft_thread_x(void) { return current; }
int32_t ft_block_x(void) { return block_x; }
int32_t ft_block_y(void) { return block_y; }
int32_t ft_block_z(void) { return block_z; }
void ft_barrier(int32_t place) { wait_in(BARRIER, place); }

/* Lane exchange: each lane reads the word of lane `byte / 4`.  Two slots in turn, since a lane that goes on may exchange again. */
int32_t ft_bpermute(int32_t place, int32_t byte, int32_t value) {
  int slot = parity[current] ^= 1;
  words[slot][current] = value;
  wait_in(EXCHANGE, place);
  return words[slot][(current & ~(LANES - 1)) + ((byte >> 2) & (LANES - 1))];
}

static float from_bf16(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }

static float from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h >> 15) << 31, exponent = h >> 10 & 31, mantissa = h & 1023, u;
  float f;
  if (exponent == 0) { f = ldexpf((float)mantissa, -24); return sign ? -f : f; }
  u = sign | (exponent == 31 ? 0xFFu << 23 : (exponent + 112) << 23) | mantissa << 13;
  memcpy(&f, &u, 4);
  return f;
}

static float from_word(uint64_t x) {
  uint32_t u = (uint32_t)x;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

enum { HALF, BFLOAT16, FLOAT, INT8 };

/* 16x16 matrix product of a warp: A[m][k] is element k%4 of lane m+16*(k/4), B[k][n] of lane n+16*(k/4), 16 deep; of floats the only
 * element of lane m+16*k and n+16*k, 4 deep.  C[m][n] is element m%4 of lane n+16*(m/4).  Sums in order of k, each rounded to float;
 * of bytes exact, in 32-bit integers at the same address. */
void ft_mma(int32_t place, uint64_t a, uint64_t b, float *c, int32_t element) {
  int slot = parity[current] ^= 1;
  fragment_a[slot][current] = a;
  fragment_b[slot][current] = b;
  wait_in(EXCHANGE, place);
  int lane = current & (LANES - 1), warp = current & ~(LANES - 1), n = lane & 15;
  for (int i = 0; i < 4; i++) {
    int m = 4 * (lane >> 4) + i;
    for (int k = 0; k < 4 && element == FLOAT; k++)
      c[i] += from_word(fragment_a[slot][warp + m + 16 * k]) * from_word(fragment_b[slot][warp + n + 16 * k]);
    for (int k = 0; k < 16 && element == INT8; k++) {
      uint32_t sum;
      memcpy(&sum, c + i, 4);
      sum += (uint32_t)((int8_t)(fragment_a[slot][warp + m + 16 * (k >> 2)] >> (8 * (k & 3))) *
                        (int8_t)(fragment_b[slot][warp + n + 16 * (k >> 2)] >> (8 * (k & 3))));
      memcpy(c + i, &sum, 4);
    }
    for (int k = 0; k < 16 && element < FLOAT; k++) {
      uint16_t x = fragment_a[slot][warp + m + 16 * (k >> 2)] >> (16 * (k & 3));
      uint16_t y = fragment_b[slot][warp + n + 16 * (k >> 2)] >> (16 * (k & 3));
      c[i] += element == BFLOAT16 ? from_bf16(x) * from_bf16(y) : from_half(x) * from_half(y);
    }
  }
}

#define MATH1(name) float mc_math_func_##name##f(float x) { return name##f(x); } double mc_math_func_##name(double x) { return name(x); }
#define MATH2(name) float mc_math_func_##name##f(float x, float y) { return name##f(x, y); } \
                    double mc_math_func_##name(double x, double y) { return name(x, y); }
MATH1(sin) MATH1(cos) MATH1(tan) MATH1(asin) MATH1(acos) MATH1(atan) MATH1(sinh) MATH1(cosh) MATH1(tanh) MATH1(asinh) MATH1(acosh)
MATH1(atanh) MATH1(exp) MATH1(exp2) MATH1(exp10) MATH1(expm1) MATH1(log) MATH1(log2) MATH1(log10) MATH1(log1p) MATH1(cbrt) MATH1(erf)
MATH1(erfc) MATH1(tgamma) MATH1(lgamma)
MATH2(pow) MATH2(fmod) MATH2(remainder) MATH2(atan2) MATH2(hypot) MATH2(nextafter)
float mc_math_func_ldexpf(float x, int32_t n) { return ldexpf(x, n); }
double mc_math_func_ldexp(double x, int32_t n) { return ldexp(x, n); }

/* ---- the scheduler ---------------------------------------------------------------------------------------------- */
static uint64_t draw(void) { /* xorshift64* */
  randomness ^= randomness >> 12;
  randomness ^= randomness << 25;
  randomness ^= randomness >> 27;
  return randomness * 0x2545F4914F6CDD1DULL;
}

static void shuffle(int *values, int count) {
  for (int i = count - 1; i > 0; i--) {
    int j = (int)(draw() % (uint64_t)(i + 1)), kept = values[i];
    values[i] = values[j];
    values[j] = kept;
  }
}

static void order_of(int *values, int count, int kind) {
  for (int i = 0; i < count; i++) values[i] = kind == REVERSE ? count - 1 - i : i;
  if (kind == RANDOM) shuffle(values, count);
}

/* All of [first, first + count) wait in `wanted` at one place: let them go.  1 if so, 0 if not. */
static int release(int first, int count, int wanted) {
  for (int t = first; t < first + count; t++)
    if (state[t] != wanted || site[t] != site[first]) return 0;
  for (int t = first; t < first + count; t++) state[t] = READY;
  return 1;
}

/* Run each ready lane of a warp to its next wait.  1 when the warp can go on by itself. */
static int step_warp(int first, int kind) {
  int lanes[LANES];
  order_of(lanes, LANES, kind);
  for (int i = 0; i < LANES; i++)
    if (state[first + lanes[i]] == READY) {
      current = first + lanes[i];
      ft_switch(&scheduler, stack_pointer[current]);
    }
  if (!release(first, LANES, EXCHANGE)) return 0;
  report->exchanges++;
  return 1;
}

/* One block.  Forward and reverse run a warp as far as it goes before the next one, which skews warps as much as the program allows;
 * random picks a warp for each step. */
static int run_block(int kind) {
  int order[MAX_THREADS / LANES], warps = threads / LANES;
  for (int t = 0; t < threads; t++) {
    void **top = (void **)(stacks + (size_t)(t + 1) * STACK - 64);
    *--top = 0;
    *--top = (void *)thread_main;
    top -= 6;
    memset(top, 0, 48);
    stack_pointer[t] = top;
    state[t] = READY;
    site[t] = parity[t] = 0;
  }
  for (;;) {
    int live = warps;
    order_of(order, warps, kind);
    while (live) {
      int i = kind == RANDOM ? (int)(draw() % (uint64_t)live) : 0;
      if (step_warp(order[i] * LANES, kind)) continue;
      memmove(order + i, order + i + 1, (size_t)(--live - i) * sizeof *order);
    }
    if (release(0, threads, BARRIER)) { report->barriers++; continue; }
    for (int t = 0; t < threads; t++)
      if (state[t] != DONE) {
        int other = 0;
        while (other < threads - 1 && state[other] == state[t] && site[other] == site[t]) other++;
        report->thread = t; report->state = state[t]; report->site = site[t];
        report->other_thread = other; report->other_state = state[other]; report->other_site = site[other];
        return DEADLOCK;
      }
    return FINE;
  }
}

static void on_fault(int number, siginfo_t *info, void *context) {
  report->signal = number;
  report->wrote = number == SIGSEGV && (((ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2) != 0; /* x86 page fault: bit 1 is a write */
  report->address = (uint64_t)info->si_addr;
  report->thread = current;
  siglongjmp(escape, 1);
}

static const int caught[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static char alternate[64 * 1024];

static int make_stacks(void) {
  if (stacks) return 1;
  char *area = mmap(0, (size_t)MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (area == MAP_FAILED) return 0;
  for (int t = 0; t < MAX_THREADS; t++) mprotect(area + (size_t)t * STACK, PAGE, PROT_NONE); /* overflow faults */
  stacks = area;
  return 1;
}

/* Run `count` blocks (x, y, z triples) of `thread_count` threads with `shared_bytes` of shared memory; the report says how it ended. */
int ft_run(void (*kernel)(void **), void **slots, const int32_t *blocks, int64_t count, int thread_count, int shared_bytes, int kind,
           uint64_t seed, struct report *result) {
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER}, before[4];
  stack_t handler_stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
  size_t used = ((size_t)shared_bytes + PAGE - 1) / PAGE * PAGE;
  memset(result, 0, sizeof *result);
  report = result;
  if (!make_stacks()) return result->code = NO_MEMORY;
  entry = kernel; arguments = slots; threads = thread_count;
  randomness = seed * 2 + 0x9E3779B97F4A7C15ULL;
  mprotect(ft_shared_area, sizeof ft_shared_area, PROT_NONE);
  if (used) mprotect(global_smem, used, PROT_READ | PROT_WRITE);
  sigaltstack(&handler_stack, 0);
  for (int i = 0; i < 4; i++) sigaction(caught[i], &action, &before[i]);
  if (sigsetjmp(escape, 1)) {
    result->code = FAULT;
  } else {
    for (int64_t b = 0; b < count && result->code == FINE; b++) {
      const int32_t *at = blocks + 3 * b;
      block_x = result->block[0] = at[0]; block_y = result->block[1] = at[1]; block_z = result->block[2] = at[2];
      memset(global_smem, 0xFF, used);
      result->code = run_block(kind);
      for (size_t i = (size_t)shared_bytes; i < used; i++)
        if ((unsigned char)global_smem[i] != 0xFF) { result->code = OVERRUN; result->address = i; }
      result->blocks++;
    }
  }
  for (int i = 0; i < 4; i++) sigaction(caught[i], &before[i], 0);
  return result->code;
}

/* Map `bytes` (whole pages) of a file at `offset`, inaccessible memory of `guard` bytes on both sides; the start of the pages, 0 if none. */
char *ft_map(int file, int64_t offset, int64_t bytes, int64_t guard) {
  char *area = mmap(0, (size_t)(bytes + 2 * guard), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (area == MAP_FAILED) return 0;
  if (bytes && mmap(area + guard, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, offset) == MAP_FAILED) {
    munmap(area, (size_t)(bytes + 2 * guard));
    return 0;
  }
  return area + guard;
}

void ft_unmap(char *start, int64_t bytes, int64_t guard) { munmap(start - guard, (size_t)(bytes + 2 * guard)); }
