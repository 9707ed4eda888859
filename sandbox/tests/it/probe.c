/* What a builder may try: each word of the command line is one attempt, which prints its result.
 * Results are `NAME ok` or `NAME ERRNO`. Static, so that it runs in an empty root. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static const char *name;

static int say(long result) {
    if (result < 0) printf("%s %s\n", name, strerrorname_np(errno));
    else printf("%s ok\n", name);
    fflush(stdout);
    return result >= 0;
}

static int fresh(void) {
    unlink("f");
    return open("f", O_CREAT | O_RDWR, 0644);
}

#ifdef __x86_64__
/* A 32-bit call from a 64-bit program: another architecture to the filter. */
static long call32(int number, const char *path, int b, int c) {
    static char *low;
    if (!low) low = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    strcpy(low, path);
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(low), "c"(b), "d"(c) : "memory", "r8", "r9", "r10", "r11");
    if ((int)result < 0) { errno = -(int)result; return -1; }
    return (int)result;
}
#endif

static void filter(void) {
    int fd = fresh();
    name = "chmod-plain", say(chmod("f", 0755));
    name = "chmod", say(chmod("f", 04755));
    name = "chmod-gid", say(chmod("f", 02755));
    name = "fchmod", say(fchmod(fd, 04755));
    name = "fchmodat", say(syscall(SYS_fchmodat, AT_FDCWD, "f", 04755));
    name = "fchmodat2", say(syscall(452, AT_FDCWD, "f", 04755, 0));
    name = "creat", say(syscall(SYS_creat, "c", 04755));
    name = "open", say(syscall(SYS_open, "o", O_CREAT | O_RDWR, 04755));
    name = "openat", say(syscall(SYS_openat, AT_FDCWD, "a", O_CREAT | O_RDWR, 02755));
    name = "tmpfile", say(syscall(SYS_openat, AT_FDCWD, ".", O_TMPFILE | O_RDWR, 04755));
    name = "open-no-creat", say(syscall(SYS_openat, AT_FDCWD, "f", O_RDONLY, 07777));
    name = "mknod", say(syscall(SYS_mknod, "m", S_IFREG | 04755, 0));
    name = "mknodat", say(syscall(SYS_mknodat, AT_FDCWD, "n", S_IFREG | 04755, 0));
    unsigned long how[3] = {O_CREAT | O_RDWR, 04755, 0};
    name = "openat2", say(syscall(437, AT_FDCWD, "p", how, sizeof how));
    char ring[120] = {0};
    name = "io_uring", say(syscall(425, 4, ring));
    name = "setxattr", say(setxattr("f", "user.a", "b", 1, 0));
    name = "lsetxattr", say(lsetxattr("f", "user.a", "b", 1, 0));
    name = "fsetxattr", say(fsetxattr(fd, "user.a", "b", 1, 0));
    char value[8];
    name = "getxattr", say(getxattr("f", "user.a", value, 8));
    name = "lgetxattr", say(lgetxattr("f", "user.a", value, 8));
    name = "fgetxattr", say(fgetxattr(fd, "user.a", value, 8));
    name = "setxattrat", say(syscall(463, AT_FDCWD, "f", 0, "user.a", value, 16));
#ifdef __x86_64__
    name = "x32-chmod", say(syscall(0x40000000 + SYS_chmod, "f", 04755));
    name = "x32-setxattr", say(syscall(0x40000000 + SYS_setxattr, "f", "user.a", "b", 1, 0));
    name = "i386-chmod-plain", say(call32(15, "f", 0755, 0));
    name = "i386-chmod", say(call32(15, "f", 04755, 0));
    name = "i386-open", say(call32(5, "i", O_CREAT | O_RDWR, 04755));
    name = "i386-setxattr", say(call32(226, "f", 0, 0));
#endif
    struct stat st;
    name = "any-set-id", errno = 0;
    for (const char *p = "fcoamnpi"; *p; p++) {
        char path[2] = {*p, 0};
        if (stat(path, &st) == 0 && (st.st_mode & 06000)) { printf("set-id file %s\n", path); return; }
    }
    printf("no set-id file\n");
}

static void escape(void) {
    /* Never where it could succeed. */
    if (geteuid() == 0 || access("/build", F_OK)) { printf("not in a sandbox\n"); exit(3); }
    name = "mknod-device", say(mknod("d", S_IFBLK | 0666, 0x0801));
    name = "mount", say(mount("none", "/tmp", "tmpfs", 0, 0));
    name = "remount", say(mount("none", "/usr", 0, MS_REMOUNT | MS_BIND, 0));
    name = "umount", say(umount2("/usr", MNT_DETACH));
    name = "chroot", say(chroot("/tmp"));
    name = "sethostname", say(sethostname("x", 1));
    name = "setuid-root", say(setresuid(0, 0, 0));
    name = "setgid-root", say(setresgid(0, 0, 0));
    name = "setgroups", say(setgroups(0, 0));
    name = "unshare-net", say(unshare(CLONE_NEWNET));
    name = "trace-reaper", say(ptrace(PTRACE_ATTACH, 1, 0, 0));
    name = "reaper-memory", say(open("/proc/1/mem", O_RDWR));
    name = "reaper-files", say(open("/proc/1/root/", O_RDONLY));
    name = "core-pattern", say(open("/proc/sys/kernel/core_pattern", O_WRONLY));
    name = "sysrq", say(open("/proc/sysrq-trigger", O_WRONLY));
    name = "kill-reaper", say(kill(1, SIGKILL));
    name = "still-here", say(0);
}

static int abstract(struct sockaddr_un *address, const char *text) {
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    strcpy(address->sun_path + 1, text);
    return offsetof(struct sockaddr_un, sun_path) + 1 + strlen(text);
}

/* Receives one descriptor on an abstract socket. */
static void take_fd(const char *socket_name) {
    struct sockaddr_un address;
    int len = abstract(&address, socket_name);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    name = "bind", say(bind(listener, (struct sockaddr *)&address, len));
    listen(listener, 1);
    name = "listening", say(0);
    int connection = accept(listener, 0, 0);
    char byte, control[64];
    struct iovec iov = {&byte, 1};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    name = "received", say(recvmsg(connection, &message, 0) == 1 && message.msg_controllen > 0 ? 0 : -1);
}

static void give_fd(const char *socket_name) {
    struct sockaddr_un address;
    int len = abstract(&address, socket_name);
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    name = "connect";
    if (!say(connect(s, (struct sockaddr *)&address, len))) return;
    char byte = 0, control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {&byte, 1};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(sizeof(int));
    int fd = fresh();
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
    name = "send", say(sendmsg(s, &message, 0));
}

static struct sockaddr_in loopback(const char *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static void serve(const char *port) {
    struct sockaddr_in address = loopback(port);
    int s = socket(AF_INET, SOCK_STREAM, 0);
    name = "bind", say(bind(s, (struct sockaddr *)&address, sizeof address));
    name = "listening", say(listen(s, 1));
    pause();
}

static void dial(const char *port) {
    struct sockaddr_in address = loopback(port);
    name = "dial", say(connect(socket(AF_INET, SOCK_STREAM, 0), (struct sockaddr *)&address, sizeof address));
}

/* Starts processes until it may not. */
static void bomb(void) {
    if (geteuid() == 0) exit(3);
    int n = 0;
    for (; n < 5000; n++) {
        pid_t pid = fork();
        if (pid < 0) break;
        if (pid == 0) { pause(); _exit(0); }
    }
    printf("started %d %s\n", n, strerrorname_np(errno));
}

/* Double-forks, as daemons do. */
static void daemons(int n) {
    for (int i = 0; i < n; i++) {
        if (fork() == 0) {
            setsid();
            if (fork() == 0) {
                for (int fd = 0; fd < 3; fd++) close(fd);
                if (i == 0) for (;;) pause();
                usleep(1000 * (i % 50));
            }
            _exit(0);
        }
        wait(0);
    }
    /* One that keeps the log open. */
    if (fork() == 0) { setsid(); for (;;) pause(); }
}

int main(int argc, char **argv) {
    umask(0);
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i], *next = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(word, "filter")) filter();
        else if (!strcmp(word, "escape")) escape();
        else if (!strcmp(word, "take-fd")) take_fd(next), i++;
        else if (!strcmp(word, "give-fd")) give_fd(next), i++;
        else if (!strcmp(word, "serve")) serve(next), i++;
        else if (!strcmp(word, "dial")) dial(next), i++;
        else if (!strcmp(word, "bomb")) bomb();
        else if (!strcmp(word, "daemons")) daemons(atoi(next)), i++;
        else if (!strcmp(word, "kill")) name = "kill", say(kill(atoi(next), SIGKILL)), i++;
        else if (!strcmp(word, "kill-all") && geteuid() != 0) name = "kill-all", say(kill(-1, SIGKILL));
        else if (!strcmp(word, "shm")) name = "shm", say(shmget(0x1a2d, 4096, IPC_CREAT | 0666));
        else if (!strcmp(word, "pause")) pause();
        else return 2;
    }
    return 0;
}
