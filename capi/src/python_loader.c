/* Finds and starts the Python engine: libpython first, then the engine beside this library.
 *
 * Nothing here is linked against Python. libpython is opened by its full path, so neither LD_LIBRARY_PATH nor what a
 * shell exports can put another one in its place, and into the global namespace, without which Python's own
 * extension modules find no symbols in a host that opened this library with RTLD_LOCAL.
 *
 * SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "python_engine.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *const tritlstm_engine_name = "python";

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const tritlstm_engine_functions *started;
static pid_t starter; /* the process in which the engine was started, or 0 */

typedef struct settings {
    char engine[PATH_MAX + 64]; /* python_engine.so */
    char python[2 * PATH_MAX];  /* the environment's interpreter */
    char library[2 * PATH_MAX]; /* libpython */
    char version[16];           /* "3.11" */
} settings;

int tritlstm_engine_forked(int32_t device)
{
    (void)device;
    pid_t pid = __atomic_load_n(&starter, __ATOMIC_ACQUIRE);
    return pid && pid != getpid();
}

static int unavailable(tritlstm_report report, const char *format, ...) __attribute__((format(printf, 2, 3)));

static int unavailable(tritlstm_report report, const char *format, ...)
{
    char message[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    report(message);
    return TRITLSTM_ERROR_UNAVAILABLE;
}

/* The folder tritlstm/ beside this library, where the library really is. */
static int find_folder(tritlstm_report report, char folder[PATH_MAX + 16])
{
    Dl_info info;
    char path[PATH_MAX];
    if (!dladdr((void *)(uintptr_t)&tritlstm_engine_forked, &info) || !info.dli_fname || !realpath(info.dli_fname, path))
        return unavailable(report, "this library can not find its own file: %s", strerror(errno));
    *strrchr(path, '/') = 0;
    snprintf(folder, PATH_MAX + 16, "%s/tritlstm", path);
    return TRITLSTM_OK;
}

/* Reads "key = value" lines; a value that is not absolute is relative to the folder. */
static int read_settings(tritlstm_report report, settings *s)
{
    char folder[PATH_MAX + 16], path[PATH_MAX + 64], line[PATH_MAX + 64];
    int status = find_folder(report, folder);
    if (status) return status;
    memset(s, 0, sizeof *s);
    snprintf(s->engine, sizeof s->engine, "%s/python_engine.so", folder);
    snprintf(path, sizeof path, "%s/python_engine.conf", folder);
    FILE *file = fopen(path, "r");
    if (!file)
        return unavailable(report, "'%.600s': %s; keep the folder 'tritlstm' beside the library, or run "
                                   "`tritlstm build-c` again", path, strerror(errno));
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *equals = strstr(line, " = ");
        if (line[0] == '#' || !equals) continue;
        *equals = 0;
        const char *value = equals + 3;
        const char *base = *value == '/' ? "" : folder, *slash = *value == '/' ? "" : "/";
        if (!strcmp(line, "python")) snprintf(s->python, sizeof s->python, "%s%s%s", base, slash, value);
        else if (!strcmp(line, "libpython")) snprintf(s->library, sizeof s->library, "%s%s%s", base, slash, value);
        else if (!strcmp(line, "version")) snprintf(s->version, sizeof s->version, "%.15s", value);
    }
    fclose(file);
    if (!*s->python || !*s->library || !*s->version)
        return unavailable(report, "'%.600s' lacks python, libpython or version: run `tritlstm build-c` again", path);
    if (access(s->python, X_OK))
        return unavailable(report, "the Python environment's interpreter '%.600s' (from python_engine.conf): %s; run "
                                   "`tritlstm build-c` again from the environment to use", s->python, strerror(errno));
    return TRITLSTM_OK;
}

/* Is `version` ("3.11.7 (main, ...") the one the engine was built for ("3.11")? */
static int same_version(const char *version, const char *built)
{
    size_t length = strlen(built);
    return !strncmp(version, built, length) && (version[length] < '0' || version[length] > '9');
}

/* Makes one libpython available to all: the process's own if it has one, otherwise the environment's. */
static int open_python(tritlstm_report report, const settings *s)
{
    const char *name = strrchr(s->library, '/') + 1;
    void *handle = dlopen(name, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
    const char *(*version)(void) = NULL;
    void *symbol = dlsym(handle ? handle : RTLD_DEFAULT, "Py_GetVersion");
    if (!symbol) {
        handle = dlopen(s->library, RTLD_NOW | RTLD_GLOBAL);
        if (!handle)
            return unavailable(report, "the environment's libpython can not be loaded: %s; run `tritlstm build-c` again",
                               dlerror());
        symbol = dlsym(handle, "Py_GetVersion");
    }
    if (symbol) memcpy(&version, &symbol, sizeof version);
    if (!version || !same_version(version(), s->version))
        return unavailable(report, "this process has Python %.60s, but the engine was built for %s: run "
                                   "`tritlstm build-c` with that Python", version ? version() : "(broken)", s->version);
    return TRITLSTM_OK;
}

static int start(tritlstm_report report, const tritlstm_engine_functions **engine)
{
    static settings s;
    tritlstm_python_start_function run;
    int status = read_settings(report, &s);
    if (status || (status = open_python(report, &s))) return status;
    void *handle = dlopen(s.engine, RTLD_NOW | RTLD_LOCAL);
    void *symbol = handle ? dlsym(handle, "tritlstm_python_start") : NULL;
    if (!symbol) return unavailable(report, "the Python engine can not be loaded: %s", dlerror());
    memcpy(&run, &symbol, sizeof run);
    if ((status = run(s.python, report, engine))) return status;
    if ((*engine)->interface != TRITLSTM_ENGINE_INTERFACE)
        return unavailable(report, "'%.600s' is of another version: run `tritlstm build-c` again", s.engine);
    return TRITLSTM_OK;
}

int tritlstm_engine_start(tritlstm_report report, int32_t device, const tritlstm_engine_functions **engine)
{
    int status = TRITLSTM_OK;
    (void)device;
    *engine = __atomic_load_n(&started, __ATOMIC_ACQUIRE);
    if (*engine) return TRITLSTM_OK;
    /* Before the lock: a child that is forked from here on must not wait for it. */
    __atomic_store_n(&starter, getpid(), __ATOMIC_RELEASE);
    pthread_mutex_lock(&lock);
    *engine = started;
    if (!*engine && !(status = start(report, engine))) __atomic_store_n(&started, *engine, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
    return status;
}
