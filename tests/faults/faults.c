/* Preloaded into a process, this library sees every act that writes below one folder, counts them, and lets one of them go wrong.
 *
 * It stands between the program and libc, so that it sees what Python, SQLite and Rust do alike. Nothing happens until
 * faults_arm() is called (by workers.py, through ctypes, in a process that was forked for one case):
 *
 *   log      a file that gets one line "act path" for each act, or NULL
 *   at       number of the act that goes wrong, from 1; 0: none
 *   error    the errno that it fails with; 0: the process is killed there, and of a write the first half is done
 *   lasting  1: every later act of the kind fails too (a full disk stays full)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static int log_fd = -1, count, fault_at, fault_error, fault_lasts;

void faults_arm(const char *folder, const char *log, int at, int error, int lasting) {
    snprintf(root, sizeof root, "%s/", folder);
    log_fd = log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    count = 0, fault_at = at, fault_error = error, fault_lasts = lasting;
}

int faults_counted(void) { return count; }

/* The path that `name`, or the file behind `dir` if there is no name, has below the folder; NULL if it lies elsewhere. */
static const char *below(int dir, const char *name, char *space) {
    char link[64], base[PATH_MAX] = "";
    if (!root[0]) return NULL;
    if (!name || name[0] != '/') {
        snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0) return NULL;
        base[n] = 0;
    }
    snprintf(space, PATH_MAX, name && base[0] ? "%s/%s" : "%s%s", base, name ? name : "");
    size_t n = strlen(root);
    if (!strncmp(space, root, n)) return space + n;
    return !strncmp(space, root, n - 1) && !space[n - 1] ? "." : NULL;
}

/* Count an act. 0: let it be done; an errno: let it fail; -1: kill the process, which `die` does. */
static int act(const char *what, int dir, const char *name, int takes_room) {
    char space[PATH_MAX];
    const char *path = below(dir, name, space);
    if (!path) return 0;
    int kept = errno;
    count++;
    if (log_fd >= 0) dprintf(log_fd, "%s %s\n", what, path);
    errno = kept;
    int hit = fault_at && (count == fault_at || (fault_lasts && count > fault_at && takes_room));
    return !hit ? 0 : fault_error ? fault_error : -1;
}

static int die(void) { return syscall(SYS_kill, getpid(), SIGKILL); }

#define REACH(what, dir, name, takes_room) \
    do { \
        int wrong = act(what, dir, name, takes_room); \
        if (wrong < 0) die(); \
        if (wrong) { errno = wrong; return -1; } \
    } while (0)

/* Writing: a kill leaves the first half. */
#define REACH_WRITE(fd, half) \
    do { \
        int wrong = act("write", fd, NULL, 1); \
        if (wrong < 0) { half; die(); } \
        if (wrong) { errno = wrong; return -1; } \
    } while (0)

ssize_t write(int fd, const void *data, size_t n) {
    REACH_WRITE(fd, syscall(SYS_write, fd, data, n / 2));
    return syscall(SYS_write, fd, data, n);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) {
    REACH_WRITE(fd, syscall(SYS_pwrite64, fd, data, n / 2, at));
    return syscall(SYS_pwrite64, fd, data, n, at);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return pwrite64(fd, data, n, at); }
ssize_t writev(int fd, const struct iovec *parts, int n) {
    REACH_WRITE(fd, syscall(SYS_writev, fd, parts, n / 2));
    return syscall(SYS_writev, fd, parts, n);
}
ssize_t sendfile64(int out, int in, off_t *at, size_t n) {
    REACH_WRITE(out, syscall(SYS_sendfile, out, in, at, n / 2));
    return syscall(SYS_sendfile, out, in, at, n);
}
ssize_t sendfile(int out, int in, off_t *at, size_t n) { return sendfile64(out, in, at, n); }

static int opened(int dir, const char *name, int flags, mode_t mode) {
    if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) REACH("open", dir, name, 1);
    return syscall(SYS_openat, dir, name, flags, mode);
}
#define MODE(last) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, last); mode = va_arg(more, mode_t); va_end(more); }
int open(const char *name, int flags, ...) { MODE(flags) return opened(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return opened(AT_FDCWD, name, flags, mode); }
int openat(int dir, const char *name, int flags, ...) { MODE(flags) return opened(dir, name, flags, mode); }
int openat64(int dir, const char *name, int flags, ...) { MODE(flags) return opened(dir, name, flags, mode); }

int fsync(int fd) { REACH("fsync", fd, NULL, 0); return syscall(SYS_fsync, fd); }
int fdatasync(int fd) { REACH("fsync", fd, NULL, 0); return syscall(SYS_fdatasync, fd); }
int ftruncate64(int fd, off_t n) { REACH("truncate", fd, NULL, 0); return syscall(SYS_ftruncate, fd, n); }
int ftruncate(int fd, off_t n) { return ftruncate64(fd, n); }
int truncate64(const char *name, off_t n) { REACH("truncate", AT_FDCWD, name, 0); return syscall(SYS_truncate, name, n); }
int truncate(const char *name, off_t n) { return truncate64(name, n); }
int flock(int fd, int how) { REACH("lock", fd, NULL, 0); return syscall(SYS_flock, fd, how); }

static int locked(int fd, int what, void *more) {
    if (what == F_SETLK || what == F_SETLKW || what == F_OFD_SETLK) REACH("lock", fd, NULL, 0);
    return syscall(SYS_fcntl, fd, what, more);
}
#define MORE void *more; va_list list; va_start(list, what); more = va_arg(list, void *); va_end(list);
int fcntl(int fd, int what, ...) { MORE return locked(fd, what, more); }
int fcntl64(int fd, int what, ...) { MORE return locked(fd, what, more); }

static int moved(int from, const char *old, int to, const char *new, unsigned flags) {
    REACH("rename", to, new, 0);
    return syscall(SYS_renameat2, from, old, to, new, flags);
}
int rename(const char *old, const char *new) { return moved(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return moved(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) { return moved(from, old, to, new, flags); }

int mkdirat(int dir, const char *name, mode_t mode) { REACH("mkdir", dir, name, 1); return syscall(SYS_mkdirat, dir, name, mode); }
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
int unlinkat(int dir, const char *name, int flags) { REACH("remove", dir, name, 0); return syscall(SYS_unlinkat, dir, name, flags); }
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
