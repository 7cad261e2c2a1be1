// One whole call of a launch list of kernels, as a function that Python calls: addresses of tensors in, results allocated, kernels run.
// Linked into every library of CPU kernels (toolchain/cxx.py); runtime/whole_call.py makes Python's function of it.
//
// No header and no undefined symbol: the interpreter's functions, all of its stable ABI, come in a table that the runtime fills, and
// torch is reached through its own Python functions, so that what they raise is raised to the caller.
typedef long long i64;
typedef unsigned long long u64;
struct object;  // of Python

struct python {
  object *(*call)(object *callable, object *arguments, object *keywords);                               // PyObject_Call
  object *(*vectorcall)(object *callable, object *const *arguments, u64 count, object *keywords);       // PyObject_Vectorcall
  object *(*tuple)(i64 size);                                                                           // PyTuple_New
  int (*put)(object *tuple, i64 place, object *item);                                                   // PyTuple_SetItem
  void *(*address)(object *number);                                                                     // PyLong_AsVoidPtr
  object *(*failed)(void);                                                                              // PyErr_Occurred
  void (*keep)(object *);                                                                               // Py_IncRef
  void (*drop)(object *);                                                                               // Py_DecRef
  void *(*release)(void);                                                                               // PyEval_SaveThread
  void (*acquire)(void *state);                                                                         // PyEval_RestoreThread
  object *none, *data_ptr, *empty;  // torch.Tensor.data_ptr, and what allocates from (sizes, strides, dtype)
};

// a word of the kernels' pointer block: the address of an argument or, counted on from them, of a new tensor, and bytes from there
struct word { i64 at, source, offset; };
struct launch { void (*kernel)(void *const *buffers, const i64 *symbols); void *const *buffers; const i64 *symbols; };

struct frame {
  const python *py;
  i64 busy;                      // a call at a time: the words are written by each
  i64 arguments, news, words, launches, results;
  u64 *block;                    // the pointer block
  object *const *layouts;        // of each new tensor: its (sizes, strides, dtype)
  object **made;                 // room for the new tensors of a call
  const word *fill;              // sorted by source
  const launch *start;
  const i64 *result;             // a source each, -1 for None
};

static int run(const frame *f, object *const *arguments) {
  const python *const py = f->py;
  const word *next = f->fill, *const end = next + f->words;
  for (i64 source = 0; source < f->arguments + f->news; ++source) {
    object *tensor;
    if (source < f->arguments) tensor = arguments[source];
    else if (!(tensor = f->made[source - f->arguments] = py->call(py->empty, f->layouts[source - f->arguments], 0))) return 0;
    if (next == end || next->source != source) continue;
    object *const number = py->vectorcall(py->data_ptr, &tensor, 1, 0);
    if (!number) return 0;
    const u64 address = (u64)py->address(number);
    py->drop(number);
    if (!address && py->failed()) return 0;
    for (; next != end && next->source == source; ++next) f->block[next->at] = address + next->offset;
  }
  void *const state = py->release();
  for (i64 k = 0; k < f->launches; ++k) f->start[k].kernel(f->start[k].buffers, f->start[k].symbols);
  py->acquire(state);
  return 1;
}

// METH_FASTCALL, `self` the frame's address as a number, on a table at `ft_call_python`: the tuple of results; None where the frame is
// busy or takes another number of arguments; a null pointer where Python has an exception.
extern "C" {
__attribute__((visibility("default"))) python *ft_call_python = 0;
__attribute__((visibility("default"))) object *ft_call(object *self, object *const *arguments, i64 count) {
  frame *const f = (frame *)ft_call_python->address(self);
  const python *const py = f->py;
  if (count != f->arguments || __atomic_exchange_n(&f->busy, 1, __ATOMIC_ACQUIRE)) {
    py->keep(py->none);
    return py->none;
  }
  object *results = run(f, arguments) ? py->tuple(f->results) : 0;
  for (i64 k = 0; results && k < f->results; ++k) {
    const i64 source = f->result[k];
    object *const item = source < 0 ? py->none : source < f->arguments ? arguments[source] : f->made[source - f->arguments];
    py->keep(item);
    py->put(results, k, item);
  }
  for (i64 k = 0; k < f->news; ++k) {
    if (f->made[k]) py->drop(f->made[k]);
    f->made[k] = 0;
  }
  __atomic_store_n(&f->busy, 0, __ATOMIC_RELEASE);
  return results;
}
}
