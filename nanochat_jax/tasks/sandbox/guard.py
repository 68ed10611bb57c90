"""The inside of the sandbox: locks its own process in, then runs the program. Started by sandbox.run as a script.

Independent layers (kernel documentation: userspace-api/landlock, userspace-api/seccomp_filter; man namespaces):
- limits: address space, processor time, file size, open files, no core;
- namespaces of its own, where the machine allows them: no network interface, no shared memory, and a root directory
  that holds what it may read and a small folder in memory. Without them it sees the names of the machine's files, and
  cannot write at all, because nothing bounds what it would write;
- no capabilities, and none to gain;
- Landlock: reads Python's own libraries, writes in its folder, touches no other file's content;
- seccomp: the calls in CALLS and no others: no sockets, processes, programs, signals, permissions, kernel keys.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types

FILE_BYTES = 4 << 20  # of one file
FOLDER_BYTES = 16 << 20  # of all files
MAX_THREADS = 64
LIBC = ctypes.CDLL(None, use_errno=True)

# name, number on x86_64, on aarch64 (-: not there). What is not here and not in SOME fails with EACCES.
CALLS = """
read 0 63  write 1 64  close 3 57  lseek 8 62  pread64 17 67  readv 19 65  pwrite64 18 68  writev 20 66  preadv 295 69
pwritev 296 70  preadv2 327 286  pwritev2 328 287  fsync 74 82  fdatasync 75 83  ftruncate 77 46  fallocate 285 47
fadvise64 221 223  close_range 436 436  dup 32 23  dup2 33 -  dup3 292 24  pipe 22 -  pipe2 293 59  poll 7 -
ppoll 271 73  select 23 -  pselect6 270 72  epoll_create1 291 20  epoll_ctl 233 21  epoll_wait 232 -
epoll_pwait 281 22  eventfd2 290 19  stat 4 -  fstat 5 80  lstat 6 -  newfstatat 262 79  statx 332 291  statfs 137 43
fstatfs 138 44  access 21 -  faccessat 269 48  faccessat2 439 439  readlink 89 -  readlinkat 267 78  getdents64 217 61
getcwd 79 17  chdir 80 49  fchdir 81 50  umask 95 166  mkdir 83 -  mkdirat 258 34  rmdir 84 -  unlink 87 -
unlinkat 263 35  rename 82 -  renameat 264 38  renameat2 316 276  mmap 9 222  mprotect 10 226  munmap 11 215
mremap 25 216  madvise 28 233  brk 12 214  msync 26 227  futex 202 98  set_robust_list 273 99  rseq 334 293
set_tid_address 218 96  arch_prctl 158 -  membarrier 324 283  sched_yield 24 124  sched_getaffinity 204 123
getcpu 309 168  getrandom 318 278  restart_syscall 219 128  rt_sigaction 13 134  rt_sigprocmask 14 135
rt_sigreturn 15 139  rt_sigpending 127 136  rt_sigtimedwait 128 137  rt_sigsuspend 130 133  sigaltstack 131 132
pause 34 -  alarm 37 -  setitimer 38 103  getitimer 36 102  nanosleep 35 101  clock_gettime 228 113
clock_getres 229 114  clock_nanosleep 230 115  time 201 -  gettimeofday 96 169  times 100 153  getrusage 98 165
getrlimit 97 163  getpid 39 172  getppid 110 173  gettid 186 178  getuid 102 174  geteuid 107 175  getgid 104 176
getegid 108 177  getgroups 115 158  uname 63 160  sysinfo 99 179  exit 60 93  exit_group 231 94
"""
OPEN = 0o1003, (0, 1, 2, 3, 0o1001, 0o1002, 0o1003)  # not O_TRUNC of what is open for reading: Landlock 1 and 2 miss it
SOME = {  # allowed where (argument & mask) is one of the values: (numbers), argument, mask, values
    "open": ((2, None), 1, *OPEN),
    "openat": ((257, 56), 2, *OPEN),
    "clone": ((56, 220), 0, 0x7E030000, (0x10000,)),  # a thread, in no new namespace
    "fcntl": ((72, 25), 1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 1030)),  # not F_SETOWN, F_SETSIG: they send signals
    "prlimit64": ((302, 261), 0, 0xFFFFFFFF, (0,)),  # its own limits, which are hard
}
CLONE3 = 435  # keeps its flags in memory, out of sight: ENOSYS makes the C library take clone
NEWEST = 450  # younger calls are ENOSYS too, so that a younger C library does without them
ARCHITECTURES = {"x86_64": (0, 0xC000003E, 126), "aarch64": (1, 0xC00000B7, 91)}  # column, audit number, capset


def check(result: int, what: str) -> int:
    """The result of a C function; OSError where it says that it has failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def system_call(number: int, what: str, *arguments) -> int:
    """A system call by its number, checked."""
    return check(LIBC.syscall(ctypes.c_long(number), *arguments), what)


def limit(kind: int, value: int) -> None:
    """Lowers a limit for good; never raises it."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def new_namespaces(folder: str) -> str:
    """User, mount, network and IPC namespaces, with a root that holds `readable` and an empty folder, in memory.

    Returns that folder. OSError: this machine allows no such thing to its users.
    """
    NEWNS, NEWIPC, NEWUSER, NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 30
    NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE = 1 << 1, 1 << 2, 1 << 3, 1 << 12, 1 << 14, 1 << 18

    def mount(source, target, kind, flags, options=None):
        names = (os.fsencode(name) if name else None for name in (source, target, kind))
        check(LIBC.mount(*names, ctypes.c_ulong(flags), options), "mount")

    user, group = os.geteuid(), os.getegid()
    check(LIBC.unshare(NEWUSER | NEWNS | NEWNET | NEWIPC), "unshare")
    for name, text in {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}.items():
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("none", folder, "tmpfs", NOSUID | NODEV | NOEXEC, f"size={FOLDER_BYTES},nr_inodes=1000,mode=700".encode())
    for path in sorted([*readable(), "/dev/null"]):  # a folder comes before what lies in it
        inside = folder + path
        if not os.path.exists(inside):
            if os.path.isdir(path):
                os.makedirs(inside)
            else:
                os.makedirs(os.path.dirname(inside), exist_ok=True)
                open(inside, "x").close()
            mount(path, inside, None, BIND | RECURSIVE)
    os.mkdir(folder + "/own")
    os.chroot(folder)
    limit(resource.RLIMIT_NPROC, MAX_THREADS)  # counted in the namespace, outside over all of the user's; not for root
    return "/own"


def drop_capabilities() -> None:
    """Give up root's rights, and the right to get new ones."""
    capset = ARCHITECTURES[os.uname().machine][2]
    system_call(capset, "capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    check(LIBC.prctl(38, 1, 0, 0, 0), "no_new_privs")


def readable() -> list[str]:
    """Python's library, the shared libraries that it loads, and what they need."""
    python = [os.path.dirname(os.__file__), *(os.path.join(sys.base_prefix, d) for d in ("lib", sys.platlibdir))]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/urandom"]
    return [path for path in {*python, *system} if os.path.exists(path)]


def landlock(folder: str | None) -> None:
    """No file's content but what `readable` names, the null device, and, if given, the folder."""
    CREATE, ADD_RULE, RESTRICT = 444, 445, 446
    WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
    REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_FILE, MOVE = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 13
    OWN = WRITE_FILE | READ_FILE | READ_DIR | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_FILE | MOVE
    version = system_call(CREATE, "Landlock", None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    fields = [handled] + [3] * (version >= 4) + [3] * (version >= 6)  # files, TCP, signals and abstract sockets
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    rules = system_call(CREATE, "Landlock", attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    allowed = {path: READ_FILE | READ_DIR * os.path.isdir(path) for path in readable()}
    allowed |= {"/dev/null": READ_FILE | WRITE_FILE | TRUNCATE} | ({folder: OWN} if folder else {})
    for path, rights in allowed.items():
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        system_call(ADD_RULE, "Landlock", rules, 1, struct.pack("=Qi", rights & handled, parent), ctypes.c_uint32(0))
        os.close(parent)
    system_call(RESTRICT, "Landlock", rules, ctypes.c_uint32(0))
    os.close(rules)


def filter_program(machine: str) -> bytes:
    """The seccomp filter as classic BPF: struct sock_filter {code, jump if true, jump if false, k} each."""
    LOAD, AND, EQUAL, ABOVE, RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
    ALLOW, KILL, EACCES, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | 13, 0x00050000 | 38
    column, architecture, _ = ARCHITECTURES[machine]

    def op(code, k, yes=0, no=0):
        return struct.pack("=HBBI", code, yes, no, k)

    program = op(LOAD, 4) + op(EQUAL, architecture, 1) + op(RETURN, KILL) + op(LOAD, 0)
    for number in CALLS.split()[1 + column :: 3]:
        if number != "-":
            program += op(EQUAL, int(number), 0, 1) + op(RETURN, ALLOW)
    for numbers, argument, mask, values in SOME.values():
        if numbers[column] is not None:
            body = op(LOAD, 16 + 8 * argument) + op(AND, mask)  # the low half: the kernel reads these as 32 bits
            body += b"".join(op(EQUAL, value, 0, 1) + op(RETURN, ALLOW) for value in values) + op(RETURN, EACCES)
            program += op(EQUAL, numbers[column], 0, len(body) // 8) + body
    return program + op(EQUAL, CLONE3, 1) + op(ABOVE, NEWEST, 0, 1) + op(RETURN, ENOSYS) + op(RETURN, EACCES)


def seccomp() -> None:
    """From here on the kernel takes the calls in CALLS alone."""
    program = filter_program(os.uname().machine)
    code = ctypes.create_string_buffer(program, len(program))
    rules = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    check(LIBC.prctl(22, 2, rules, 0, 0), "seccomp")


def lock_in(folder: str, cpu_seconds: int, memory_bytes: int, unsafe: bool) -> str:
    """Lock this process in; "" or, in words, the first required layer that this machine does not have."""
    for kind, value in {"CPU": cpu_seconds, "FSIZE": FILE_BYTES, "NOFILE": 64, "CORE": 0}.items():
        limit(getattr(resource, f"RLIMIT_{kind}"), value)
    writable = folder if unsafe else None
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            folder = writable = new_namespaces(folder)
    fault = "" if sys.platform == "linux" else f"no guard on {sys.platform}"
    os.chdir(folder)
    try:
        if not fault:
            if os.uname().machine not in ARCHITECTURES:
                raise OSError(f"the sandbox has no table of system calls for {os.uname().machine}")
            check(LIBC.prctl(1, signal.SIGKILL, 0, 0, 0), "parent death signal")
            drop_capabilities()
            landlock(writable)
            seccomp()
    except OSError as e:
        fault = f"this kernel does not let the sandbox shut a program in ({e.strerror or e})"
    with contextlib.suppress(ValueError, OSError) if unsafe else contextlib.nullcontext():
        limit(resource.RLIMIT_AS, memory_bytes)
    return "" if unsafe else fault


def main() -> None:
    """Shut this process in, then run the program that standard input names."""
    settings = json.load(sys.stdin)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    status, done, source, end = *(settings[name] for name in ("status", "done", "program")), os._exit
    fault = lock_in(settings["folder"], settings["cpu_seconds"], settings["memory_bytes"], settings["unsafe"])
    os.write(status, (fault or "ready").encode())
    os.close(status)
    if fault:
        end(1)
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    exec(compile(source, "<program>", "exec"), module.__dict__)  # an exception ends the interpreter, with status 1
    for stream in ("stdout", "stderr"):
        with contextlib.suppress(Exception):  # the program may have closed or removed it
            getattr(sys, stream).flush()
    end(done)


if __name__ == "__main__":
    main()
