/* A GPU driver that has no GPU: it exports a driver's functions, writes down what each was called with, and behaves as a driver does
 * where a launcher could go wrong (a wrong context, too much shared memory, a failure asked for).  It executes nothing.
 *
 * Compiled with one -D a role (-DINIT=cuInit ...); ATTRIBUTE, RETAIN and SET_ATTRIBUTE may be absent, ERROR_RETURNED picks a form.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef SHARED_FREE
#define SHARED_FREE 49152
#endif

static char lines[1 << 20];
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char failing[64];
static int failing_code;
static struct { char name[64], kinds[256]; uint64_t place; int shared; } functions[256];
static struct { char image[64]; uint64_t place; } modules[256];
static struct { char name[64], kinds[256]; } described[256];
static int function_count, module_count, described_count;
static __thread uint64_t current;
int device_count = 2, capability_major = 9, capability_minor = 0;

static void say(const char *format, ...) {
  char line[4096];
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (used + n + 2 < sizeof lines) {
    memcpy(lines + used, line, n);
    used += n;
    lines[used++] = '\n';
    lines[used] = 0;
  }
  const char *path = getenv("RECORDING");
  FILE *file = path ? fopen(path, "a") : 0;
  if (file) {
    fprintf(file, "%s\n", line);
    fclose(file);
  }
}

/* ---- for the test ------------------------------------------------------------------------------------------------ */
const char *recorded(void) { return lines; }
void forget(void) { used = 0; lines[0] = 0; }
void fail(const char *role, int code) { snprintf(failing, sizeof failing, "%s", role); failing_code = code; }
/* How the arguments of function `name` are read: p a pointer, i 4 bytes, l 8 bytes, n a pointer that must be there. */
void describe(const char *name, const char *kinds) {
  snprintf(described[described_count].name, 64, "%s", name);
  snprintf(described[described_count++].kinds, 256, "%s", kinds);
}

static int refused(const char *role) {
  if (strcmp(failing, role)) return 0;
  failing[0] = 0;
  return failing_code;
}

#define BEGIN(role) int code_; pthread_mutex_lock(&lock); if ((code_ = refused(role))) { pthread_mutex_unlock(&lock); return code_; }
#define END(code) do { pthread_mutex_unlock(&lock); return (code); } while (0)

/* ---- the driver's functions -------------------------------------------------------------------------------------- */
int INIT(unsigned flags) { BEGIN("init") say("init %u", flags); END(0); }
int COUNT(int *n) { BEGIN("count") *n = device_count; END(0); }
int DEVICE(int *device, int ordinal) { BEGIN("device") *device = ordinal; END(ordinal < device_count ? 0 : 101); }
#ifdef ATTRIBUTE
int ATTRIBUTE(int *value, int attribute, int device) {
  BEGIN("attribute") (void)device;
  *value = attribute == 75 ? capability_major : attribute == 76 ? capability_minor : -1;
  END(0);
}
#endif
#ifdef RETAIN
int RETAIN(uint64_t *context, int device) { BEGIN("retain") *context = 0xC0 + device; say("retain %d", device); END(0); }
int CURRENT(uint64_t *context) { BEGIN("current") *context = current; END(0); }
int SET_CURRENT(uint64_t context) { BEGIN("set_current") current = context; say("set_current %lx", context); END(0); }
#define PLACE current
#else
int CURRENT(int *device) { BEGIN("current") *device = (int)current; END(0); }
int SET_CURRENT(int device) { BEGIN("set_current") current = (uint64_t)device; say("set_current %d", device); END(0); }
#define PLACE current
#endif
int LOAD(uint64_t *module, const char *image) {
  BEGIN("load")
  snprintf(modules[module_count].image, 64, "%s", image);
  modules[module_count].place = PLACE;
  *module = 0x100 + module_count++;
  say("load %.60s at %lx -> %lx", image, PLACE, *module);
  END(0);
}
int FUNCTION(uint64_t *function, uint64_t module, const char *name) {
  BEGIN("function")
  int i = function_count++;
  snprintf(functions[i].name, 64, "%s", name);
  functions[i].place = modules[module - 0x100].place;
  functions[i].kinds[0] = 0;
  for (int k = 0; k < described_count; k++)
    if (!strcmp(described[k].name, name)) memcpy(functions[i].kinds, described[k].kinds, 256);
  functions[i].shared = SHARED_FREE;
  *function = 0x1000 + i;
  say("function %s of %lx -> %lx", name, module, *function);
  END(0);
}
#ifdef SET_ATTRIBUTE
int SET_ATTRIBUTE(uint64_t function, int attribute, int value) {
  BEGIN("set_attribute")
  if (attribute == 8) functions[function - 0x1000].shared = value;
  say("set_attribute %lx %d %d", function, attribute, value);
  END(0);
}
#endif
int LAUNCH(uint64_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream,
           void **arguments, void **extra) {
  BEGIN("launch")
  char text[2048] = "";
  int i = (int)(function - 0x1000), n = 0;
  if (functions[i].place != PLACE) END(201);
  if ((int)shared > functions[i].shared || !gx || !gy || !gz || extra) END(1);
  for (const char *k = functions[i].kinds; *k; k++, arguments++) {
    if (*k == 'i') n += snprintf(text + n, sizeof text - n, " i32:%d", *(int32_t *)*arguments);
    else if (*k == 'l') n += snprintf(text + n, sizeof text - n, " i64:%ld", *(int64_t *)*arguments);
    else if (*k == 'n') n += snprintf(text + n, sizeof text - n, *(uint64_t *)*arguments ? " not-null" : " null");
    else n += snprintf(text + n, sizeof text - n, " ptr:%lx", *(uint64_t *)*arguments);
  }
  say("launch %lx grid %u %u %u block %u %u %u shared %u stream %lx%s", function, gx, gy, gz, bx, by, bz, shared, (uint64_t)stream, text);
  END(0);
}
#ifdef ERROR_RETURNED
const char *ERROR_NAME(int code) { return code == 209 ? "NO_BINARY_FOR_GPU" : "OTHER"; }
#else
int ERROR_NAME(int code, const char **text) { *text = code == 209 ? "NO_BINARY_FOR_GPU" : "OTHER"; return 0; }
#endif
