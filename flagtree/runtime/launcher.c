/* The launcher: runs of kernel launches through a driver's launch function, which CUDA, HIP and MACA declare alike.
 *
 * Invariants: the variant is the first whose arguments divide as it needs, looked at on every launch; a grid with a zero is no launch;
 * nothing is allocated and nothing waits.  Needs neither Python's headers nor a driver's: launcher.py fills the structures, and does
 * the same in Python where no C compiler was at hand.  Little-endian machines only, as a 4-byte number is read where 8 bytes lie.
 */
#include <stdint.h>

#define VERSION 1
#define MAX_ARGUMENTS 1024
#define MAX_STACK 64

typedef int (*launch_function)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);

enum { PUSH_NUMBER, PUSH_SYMBOL, ADD, MULTIPLY, DIVIDE, REMAINDER }; /* launcher.py names them in this order */
enum { NO_VARIANT = -1, BAD_GRID = -2 };

struct variant {
  void *function;
  uint64_t shared, nulls;  /* bytes; how many null pointers trail the arguments */
  const uint8_t *required; /* for each argument: must it divide by 16 */
};

struct kernel {
  launch_function launch;
  uint64_t threads, pointers, symbols, variant_count;
  const struct variant *variants;
  const int64_t *grid; /* three times: length, then pairs (operation, operand) in postfix order */
};

struct call {
  const struct kernel *kernel;
  uint64_t *words;   /* addresses */
  int64_t *numbers;  /* symbols */
};

const int32_t ft_launcher_version = VERSION;

/* Python's floor division and remainder. */
static int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

/* The value of one grid expression into *out; where the code goes on, or null when it is no size. */
static const int64_t *evaluate(const int64_t *code, const int64_t *numbers, unsigned *out) {
  int64_t stack[MAX_STACK], length = *code++;
  int top = 0;
  for (int64_t i = 0; i < length; i++, code += 2) {
    if (code[0] <= PUSH_SYMBOL) {
      stack[top++] = code[0] == PUSH_SYMBOL ? numbers[code[1]] : code[1];
      continue;
    }
    int64_t b = stack[--top], a = stack[top - 1];
    if (code[0] >= DIVIDE && b == 0) return 0;
    stack[top - 1] = code[0] == ADD ? a + b : code[0] == MULTIPLY ? a * b : code[0] == DIVIDE ? floor_divide(a, b) : a - b * floor_divide(a, b);
  }
  if (stack[0] < 0 || stack[0] > UINT32_MAX) return 0;
  *out = (unsigned)stack[0];
  return code;
}

static const struct variant *choose(const struct kernel *k, const struct call *c) {
  for (const struct variant *v = k->variants; v < k->variants + k->variant_count; v++) {
    uint64_t low = 0;
    for (uint64_t i = 0; i < k->pointers; i++) low |= v->required[i] ? c->words[i] : 0;
    for (uint64_t i = 0; i < k->symbols; i++) low |= v->required[k->pointers + i] ? (uint64_t)c->numbers[i] : 0;
    if (!(low & 15)) return v;
  }
  return 0;
}

static int launch_one(const struct call *c, void *stream) {
  static uint64_t zero = 0;
  const struct kernel *k = c->kernel;
  const int64_t *code = k->grid;
  unsigned grid[3];
  void *arguments[MAX_ARGUMENTS];
  uint64_t n = 0;
  for (int d = 0; d < 3; d++)
    if (!(code = evaluate(code, c->numbers, &grid[d]))) return BAD_GRID;
  if (!grid[0] || !grid[1] || !grid[2]) return 0;
  const struct variant *v = choose(k, c);
  if (!v) return NO_VARIANT;
  for (uint64_t i = 0; i < k->pointers; i++) arguments[n++] = &c->words[i];
  for (uint64_t i = 0; i < k->symbols; i++) arguments[n++] = &c->numbers[i];
  for (uint64_t i = 0; i < v->nulls; i++) arguments[n++] = &zero;
  return k->launch(v->function, grid[0], grid[1], grid[2], (unsigned)k->threads, 1, 1, (unsigned)v->shared, stream, arguments, 0);
}

/* Launch `count` calls in order on `stream`.  0, or the first failure: the driver's code (positive) or ours; *failed says which call. */
int32_t ft_launch(const struct call *calls, int64_t count, void *stream, int64_t *failed) {
  for (int64_t i = 0; i < count; i++) {
    int code = launch_one(&calls[i], stream);
    if (code) {
      *failed = i;
      return code;
    }
  }
  return 0;
}
