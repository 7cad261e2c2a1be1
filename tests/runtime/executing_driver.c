/* A CUDA driver whose device is this processor: a module is a shared object that the emulator made of a kernel's MACA LLVM IR, a launch
 * runs every block of it in the emulator's own machine on the addresses that the launcher passed.  One device, one stream, at once.
 *
 * Compiled with -DRUNTIME="path of emulator_runtime.c", which it includes.  It is strict where a driver is: what a launch passes beyond
 * the kernel's parameters is not read, and null pointers must be null.
 */
#define _GNU_SOURCE
#include RUNTIME
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* The image of a module: this head, then the shared object.  `parameters` counts the null pointers too. */
struct image { char magic[8]; uint64_t size, parameters, nulls, lanes; };
struct module { void *library; uint64_t parameters, nulls, lanes; };
int64_t launches;
static __thread void *context;

int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return device; }
int cuDevicePrimaryCtxRetain(void **made, int device) { *made = &launches; return device; }
int cuCtxGetCurrent(void **found) { *found = context; return 0; }
int cuCtxSetCurrent(void *next) { context = next; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return !function || attribute != 8 || value > SHARED; }
int cuGetErrorName(int code, const char **text) { *text = code == 719 ? "LAUNCH_FAILED" : "REFUSED"; return 0; }

int cuModuleLoadData(struct module **module, const struct image *image) {
  char path[64];
  Dl_info here;
  if (context != &launches) return 201;
  if (memcmp(image->magic, "EMULATED", 8)) return 200;
  int file = memfd_create("kernel", 0); /* left open: the loader knows libraries by path */
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  for (uint64_t done = 0; done < image->size;) done += write(file, (const char *)(image + 1) + done, image->size - done);
  dladdr((void *)cuInit, &here);
  dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL); /* the kernel's calls of ft_barrier and others resolve here */
  *module = calloc(1, sizeof **module);
  (*module)->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  (*module)->parameters = image->parameters;
  (*module)->nulls = image->nulls;
  (*module)->lanes = image->lanes;
  if (!(*module)->library) fprintf(stderr, "%s\n", dlerror());
  return (*module)->library ? 0 : 200;
}

int cuModuleGetFunction(struct module **function, struct module *module, const char *name) {
  *function = module;
  return !*name || !dlsym(module->library, "ft_entry");
}

int cuLaunchKernel(struct module *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **arguments, void **extra) {
  if (context != &launches || stream || extra || by != 1 || bz != 1 || bx % LANES || bx > MAX_THREADS || shared > SHARED) return 1;
  int64_t count = (int64_t)gx * gy * gz, at = 0;
  int32_t *blocks = malloc(12 * (size_t)(count ? count : 1));
  void *slots[256];
  struct report result;
  for (unsigned z = 0; z < gz; z++)
    for (unsigned y = 0; y < gy; y++)
      for (unsigned x = 0; x < gx; x++, at += 3) {
        blocks[at] = (int32_t)x;
        blocks[at + 1] = (int32_t)y;
        blocks[at + 2] = (int32_t)z;
      }
  for (uint64_t i = 0; i < f->parameters; i++) {
    slots[i] = *(void **)arguments[i];
    if (i >= f->parameters - f->nulls && slots[i]) return 1;
  }
  ft_run((void (*)(void **))dlsym(f->library, "ft_entry"), slots, blocks, count, (int)bx, (int)shared, RANDOM, 1, &result);
  free(blocks);
  launches++;
  return result.code ? 719 : 0;
}
