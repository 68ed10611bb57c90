"""Model-written code runs, is judged, and reaches nothing.

Run: python -m pytest tests/tasks/test_sandbox.py
"""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nanochat_jax.tasks import sandbox
from nanochat_jax.tasks.sandbox import GuardError, guard


@pytest.fixture(scope="session")
def guarded():
    if fault := sandbox.guard_fault():
        pytest.skip(fault)


# ---- what a program is told, and what we are told of it


def test_a_program_that_ends_is_ok_and_its_output_is_kept(guarded):
    result = sandbox.run("import sys\nprint('né')\nprint('err', file=sys.stderr)\nassert __name__ == '__main__'")
    assert (result.ok, result.stdout, result.stderr, result.reason) == (True, "né\n", "err\n", "")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "error"),
        ("def f(:", "error"),
        ("x = '\ud800'", "error"),
        ("\0", "error"),
        ("import nanochat_jax", "error"),
        ("input()", "error"),
        ("def f(n): return f(n + 1)\nf(0)", "error"),
        ("raise KeyboardInterrupt", "exit"),
        ("bytearray(1 << 30)", "memory"),
        ("x = []\nwhile True: x.append(bytes(1 << 20))", "memory"),
        ("import sys\nsys.exit()", "exit"),
        ("import os\nos._exit(0)", "exit"),
        ("import os\nos._exit(2)", "exit"),
        ("import ctypes\nctypes.string_at(0)", "signal"),
    ],
)
def test_the_reason_says_what_became_of_it(guarded, program, reason):
    result = sandbox.run(program)
    assert (result.ok, result.reason) == (False, reason), result


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal, time\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\ntime.sleep(60)",
        "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)",
        "while True: print('x' * 10000)",
        "import threading\nfor _ in range(4): threading.Thread(target=lambda: any(iter(int, 1))).start()\n"
        "while True: pass",
    ],
)
def test_time_is_up_whatever_the_program_does(guarded, program):
    start = time.monotonic()
    result = sandbox.run(program, timeout=0.5)
    assert (result.ok, result.reason) == (False, "timeout")
    assert time.monotonic() - start < 10
    assert len(result.stdout) <= sandbox.OUTPUT_BYTES


def test_output_is_cut_and_the_program_is_still_judged(guarded):
    result = sandbox.run("import sys\nfor s in (sys.stdout, sys.stderr): s.write('ab' * 5_000_000)")
    assert result.ok
    assert [len(result.stdout), len(result.stderr)] == [sandbox.OUTPUT_BYTES] * 2


def test_a_program_may_lose_its_output(guarded):
    assert sandbox.run("import os\nfor n in range(3): os.close(n)").ok
    assert sandbox.run("import sys\ndel sys.stdout\nsys.stderr.close()").ok


def test_bytes_that_are_not_text_are_replaced(guarded):
    assert sandbox.run(r"import os; os.write(1, b'a\xff')").stdout == "a\ufffd"


def test_threads_run_programs_at_once(guarded):
    results = [None] * 4

    def work(i):
        results[i] = sandbox.run(f"print({i})")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.stdout for r in results] == ["0\n", "1\n", "2\n", "3\n"]


def test_what_solutions_import_works(guarded):
    names = (
        "bisect collections copy ctypes dataclasses datetime decimal fractions functools hashlib heapq itertools json"
    )
    names += " math operator os random re statistics string sys tempfile threading time typing unittest"
    work = (
        "import dataclasses, tempfile, threading, random, hashlib\n"
        "@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\n"
        "assert A().x == 1 and len(hashlib.sha256(b'').digest()) == 32 and 0 <= random.random() < 1\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "with tempfile.TemporaryDirectory() as d:\n"
        "    open(d + '/a', 'w').write('x')\n    print(open(d + '/a').read())"
    )
    result = sandbox.run(f"import {names.replace(' ', ', ')}\n{work}")
    assert (result.reason, result.stdout) == ("", "thread\nx\n"), result.stderr


def test_nothing_is_left_behind(guarded, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    program = "import os\nos.makedirs('/'.join('d' * 100)); open('a', 'w').write('x')"
    assert sandbox.run(program).ok
    assert sandbox.run("while True: pass", timeout=0.2).reason == "timeout"
    with pytest.raises(ValueError, match="timeout"):
        sandbox.run("pass", timeout=float("nan"))
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_dies_with_the_process_that_started_it(guarded, tmp_path):
    code = "from nanochat_jax.tasks import sandbox; sandbox._run('import time; time.sleep(600)', 600, 256 << 20, False)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment)
    child = None
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child is None:  # until the guard is up
        children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
        if children and "Seccomp:\t2" in (status := Path(f"/proc/{children[0]}/status")).read_text():
            child = status
        time.sleep(0.02)
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and child.exists():
        time.sleep(0.02)
    assert not child.exists()


# ---- attacks: each probe must fail, and the same probes succeed where nothing holds them

PRELUDE = r"""
import ctypes, errno, json, mmap, os, resource, signal, socket, subprocess, sys, threading
LIBC = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
opened = []
def probe(name, f):
    try:
        f()
        opened.append(name)
    except BaseException:
        pass
def call(x86, arm, *args):
    if LIBC.syscall(ctypes.c_long(x86 if X86 else arm), *args) < 0:
        raise OSError(ctypes.get_errno(), "")
def reachable(name, type=socket.SOCK_STREAM, family=socket.AF_INET):
    with socket.socket(family, type) as s:
        s.settimeout(2)
        s.connect(name)
        s.send(b"x")
def run_child(f):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
def set_owner():
    r, w = os.pipe()
    import fcntl
    fcntl.fcntl(r, 8, PARENT)
"""

DOORS = {  # name -> expression; harmless where nothing is shut
    "name of a file": "os.stat(SECRET)",
    "read a file": "open(SECRET).read()",
    "read a file by descriptor": "os.open(SECRET, os.O_RDONLY)",
    "list a folder": "os.listdir(os.path.dirname(SECRET))",
    "list the root": "os.listdir('/')",
    "list home": "os.listdir(os.path.expanduser('~root') if os.getuid() == 0 else HOME)",
    "read /etc/passwd": "open('/etc/passwd').read()",
    "read the program that started it": "open(THIS).read()",
    "overwrite a file": "open(SECRET, 'r+').write('secret')",
    "truncate a file": "os.truncate(SECRET, os.stat(SECRET).st_size)",
    "create beside": "open(os.path.join(os.path.dirname(SECRET), 'new'), 'w').close()",
    "make a folder beside": "os.mkdir(os.path.join(os.path.dirname(SECRET), 'newfolder'))",
    "write /tmp": "open('/tmp/nanochat_sandbox_test', 'w').close() or os.remove('/tmp/nanochat_sandbox_test')",
    "change permissions": "os.chmod(SECRET, 0o600)",
    "change times": "os.utime(SECRET)",
    "change an attribute": "os.setxattr(SECRET, 'user.x', b'x')",
    "hard link": "os.link(SECRET, os.path.join(os.getcwd(), 'hard'))",
    "symbolic link": "(os.symlink(SECRET, 'soft'), open('soft').read())",
    "own environment": "os.environ['NANOCHAT_TEST_SECRET']",
    "environment of the parent": "open(f'/proc/{PARENT}/environ', 'rb').read()",
    "memory map of the parent": "open(f'/proc/{PARENT}/maps').read()",
    "own /proc": "open('/proc/self/status').read()",
    "inherited descriptor": "os.read(DESCRIPTOR, 1)",
    "any descriptor": "[os.fstat(n) for n in range(3, 1024) if not closed(n)][0]",
    "tcp": "reachable(('127.0.0.1', PORT))",
    "udp": "reachable(('127.0.0.1', PORT), socket.SOCK_DGRAM)",
    "unix socket": "reachable(SOCKET, family=socket.AF_UNIX)",
    "abstract socket": "reachable(ABSTRACT, family=socket.AF_UNIX)",
    "socket pair": "socket.socketpair()",
    "netlink": "socket.socket(16, 3, 0)",
    "listen": "socket.create_server(('127.0.0.1', 0))",
    "signal the parent": "os.kill(PARENT, 0)",
    "signal the group of the parent": "os.killpg(os.getpgid(PARENT), 0)",
    "signal through a pipe": "set_owner()",
    "pidfd": "os.pidfd_open(PARENT)",
    "limits of the parent": "resource.prlimit(PARENT, resource.RLIMIT_NOFILE)",
    "fork": "run_child(None)",
    "subprocess": "subprocess.check_output(['/bin/true'])",
    "posix_spawn": "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    "priority": "os.nice(1)",
    "shared memory": "call(29, 194, 0, ctypes.c_size_t(4096), 0o600)",
    "memory file": "os.memfd_create('x')",
    "key ring": "call(250, 219, 0, -3, 1)",
    "new session key ring": "call(250, 219, 1, None)",
    "processor mask": "os.sched_setaffinity(0, os.sched_getaffinity(0))",
}
ONLY_INSIDE = {  # harmful, or not for everybody even where nothing is shut
    "exec": "os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])",
    "exec of a descriptor": "os.execve(os.open('/bin/true', os.O_PATH), ['true'], {})",
    "read the ssh key": "os.listdir(os.path.join(HOME, '.ssh'))",
    "devices": "open('/dev/tty', 'w') or open('/dev/mem')",
    "host's shared memory": "open('/dev/shm/nanochat_sandbox_test', 'w')",
    "truncate what may be read": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "write what may be read": "open(os.__file__, 'a')",
    "permissions of what may be read": "os.fchmod(os.open(os.__file__, os.O_RDONLY), 0o777)",
    "a gigabyte": "bytearray(1 << 30)",
    "a gigabyte, shared": "mmap.mmap(-1, 1 << 30)",
    "raise a limit": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "ptrace": "call(101, 117, 16, PARENT, 0, 0)",
    "read the parent's memory": "call(310, 270, PARENT, 0, 0, 0, 0, 0)",
    "unshare": "call(272, 97, 0x10000000)",
    "enter a namespace": "call(308, 268, 0, 0)",
    "mount": "call(165, 40, b'none', b'.', b'tmpfs', 0, None)",
    "unmount": "call(166, 39, b'.', 2)",
    "chroot": "os.chroot('.')",
    "bpf": "call(321, 280, 0, None, 0)",
    "perf": "call(298, 241, None, 0, -1, -1, 0)",
    "io_uring": "call(425, 425, 1, (ctypes.c_char * 120)())",
    "userfaultfd": "call(323, 282, 1)",
    "clone3": "call(435, 435, (ctypes.c_char * 88)(), 88)",
    "vfork": "call(58, 9999)",
    "clone": "call(56, 220, 17, 0, 0, 0, 0)",
    "openat2": "call(437, 437, -100, b'/etc/passwd', (ctypes.c_char * 24)(), 24)",
    "open by handle": "call(304, 265, -100, None, 0)",
    "x32 calls": "call(0x40000000 | 39, 9999)",
    "gain by a new Landlock": "call(444, 444, None, 0, 1)",
    "capabilities": "call(126, 91, (ctypes.c_int * 2)(0x20080522, 0), (ctypes.c_uint * 6)(1 << 21, 1 << 21, 0))",
    "another user": "os.setuid(12345)",
    "new session": "os.setsid()",
    "host name": "socket.sethostname('x')",
    "rename out": "(open('r', 'w').close(), os.rename('r', os.path.join(os.path.dirname(SECRET), 'r')))",
    "leave by ..": "open('../nanochat_sandbox_test', 'w')",
    "a device": "os.mknod('n', 0o20666, os.makedev(1, 1))",
    "a fifo": "os.mkfifo('p')",
    "terminal input": "__import__('fcntl').ioctl(0, 0x5412, b'x')",
    "a large file": "open('big', 'wb').write(bytes(9 << 20))",
    "many files": "[open(f'f{i}', 'wb').write(bytes(1 << 20)) for i in range(100)]",
    "many empty files": "[open(f'e{i}', 'wb').close() for i in range(100_000)]",
}
POSTLUDE = r"""
print(json.dumps(opened))
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Something to attack: secrets in a file, the environment and a descriptor, sockets that answer; as assignments."""
    secret, unix, abstract = tmp_path / "secret", tmp_path / "s", f"\0nanochat-{os.getpid()}"
    secret.write_text("secret")
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "secret")
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for name in (str(unix), abstract):
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(name)
            server.listen()
        descriptor = os.open(secret, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        os.set_inheritable(descriptor, True)
        names = {"SECRET": str(secret), "SOCKET": str(unix), "ABSTRACT": abstract, "PORT": tcp.getsockname()[1]}
        names |= {"PARENT": os.getpid(), "DESCRIPTOR": descriptor, "THIS": __file__, "HOME": str(Path.home())}
        helpers = "def closed(n):\n    try: os.fstat(n)\n    except OSError: return True\n"
        yield PRELUDE + helpers + "".join(f"{name} = {value!r}\n" for name, value in names.items()), secret


def attack(doors):
    return "".join(f"probe({name!r}, lambda: {action})\n" for name, action in doors.items()) + POSTLUDE


def test_every_door_is_shut(guarded, target):
    program, secret = target
    result = sandbox.run(program + attack(DOORS | ONLY_INSIDE), timeout=60)
    assert result.ok, result
    assert json.loads(result.stdout) == []
    assert secret.read_text() == "secret" and secret.stat().st_mode & 0o777 == 0o644
    assert sorted(p.name for p in secret.parent.iterdir()) == ["s", "secret"]


def test_every_door_is_shut_without_namespaces_too(guarded, target, monkeypatch, tmp_path):
    script = Path(guard.__file__).read_text()
    assert script.count("folder = writable = new_namespaces(folder)") == 1
    script = script.replace("folder = writable = new_namespaces(folder)", "raise OSError")
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "guard.py").write_text(script)
    monkeypatch.setattr(sandbox, "GUARD", tmp_path / "guard" / "guard.py")
    doors = DOORS | ONLY_INSIDE | {"write at all": "open('x', 'w')"}
    del doors["name of a file"]
    result = sandbox.run(target[0] + attack(doors), timeout=60)
    assert result.ok, result
    assert json.loads(result.stdout) == []


def test_the_probes_open_doors_where_nothing_shuts_them(target, tmp_path):
    program, _ = target
    arguments = {"input": program + attack(DOORS), "capture_output": True, "text": True, "timeout": 60, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-"], close_fds=False, **arguments)
    opened = json.loads(done.stdout.splitlines()[-1])
    assert len(opened) >= len(DOORS) - 8, sorted(set(DOORS) - set(opened))  # a container shuts a few of its own


def test_threads_are_bounded_by_their_address_space(guarded):
    program = (
        "import threading, time\nthreading.stack_size(32768)\nfor n in range(9999):\n    print(n, flush=True)\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    result = sandbox.run(program, timeout=2)
    assert not result.ok and len(result.stdout.split()) < 4000


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code of x86_64")
def test_calls_of_the_32_bit_kind_end_the_process(guarded):
    program = (  # mov eax, 20 (getpid); int 0x80; ret
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
    )
    assert sandbox.run(program).reason == "signal"


# ---- where there is no guard


def test_nothing_runs_where_no_guard_is_possible(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "guard_fault", lambda: "this kernel has no Landlock")
    monkeypatch.setattr(sandbox.subprocess, "Popen", lambda *a, **k: pytest.fail("it was started"))
    with pytest.raises(GuardError, match=r"this kernel has no Landlock, so .* not run; --unsafe-exec"):
        sandbox.run("pass")


def test_another_system_is_refused_with_its_name(monkeypatch):
    sandbox.guard_fault.cache_clear()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    try:
        assert sandbox.guard_fault() == "the sandbox needs Linux with Landlock and seccomp, and this is darwin"
    finally:
        sandbox.guard_fault.cache_clear()


@pytest.fixture
def guardless(tmp_path, monkeypatch):
    """A machine whose kernel has no Landlock, as far as the guard can see."""
    script = Path(guard.__file__).read_text().replace("CREATE, ADD_RULE, RESTRICT = 444, 445, 446", "CREATE = 9999")
    (tmp_path / "guard.py").write_text(script)
    monkeypatch.setattr(sandbox, "GUARD", tmp_path / "guard.py")
    sandbox.guard_fault.cache_clear()
    yield
    sandbox.guard_fault.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="what a Linux kernel without Landlock does")
def test_a_kernel_without_landlock_is_refused_and_unsafe_runs_there(guardless):
    assert "does not let the sandbox shut a program in (Landlock: Function not implemented)" in sandbox.guard_fault()
    with pytest.raises(GuardError, match="--unsafe-exec"):
        sandbox.run("print(1)")
    with pytest.raises(GuardError, match="Landlock"):  # the child refuses too
        sandbox._run("print(1)", 5.0, 256 << 20, unsafe=False)
    assert sandbox.run("print(1)", unsafe=True).stdout == "1\n"
    assert sandbox.run("while True: pass", timeout=0.2, unsafe=True).reason == "timeout"


def test_an_unsafe_programs_own_processes_end_with_it(guardless, tmp_path):
    program = "import os, time\nif pid := os.fork(): print(pid)\nelse: os.close(1); os.close(2); time.sleep(600)"
    result = sandbox.run(program, unsafe=True)
    stat, deadline = Path(f"/proc/{int(result.stdout)}/stat"), time.monotonic() + 10
    while (alive := stat.exists() and ") Z" not in stat.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert result.ok and not alive


def test_a_guard_that_does_not_start_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "GUARD", tmp_path / "absent.py")
    with pytest.raises(GuardError, match="did not start"):
        sandbox._run("pass", 5.0, 256 << 20, unsafe=True)


def decision(program, number, arguments=(), architecture=None, machine="x86_64"):
    """What the kernel's interpreter of classic BPF makes of one system call: the filter's verdict."""
    architecture = guard.ARCHITECTURES[machine][1] if architecture is None else architecture
    words = struct.unpack(
        "=16I", struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    )
    at = value = 0
    while True:
        code, yes, no, k = struct.unpack_from("=HBBI", program, at * 8)
        at += 1
        if code == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill", 0x50000 | 13: "EACCES", 0x50000 | 38: "ENOSYS"}[k]
        elif code == 0x20:
            value = words[k // 4]
        elif code == 0x54:
            value &= k
        else:
            at += yes if {0x15: value == k, 0x25: value > k}[code] else no


@pytest.mark.parametrize("machine", guard.ARCHITECTURES)
def test_the_filter_allows_what_is_listed_and_nothing_else(machine):
    """Runs for both kinds of processor on any."""
    program, column = guard.filter_program(machine), guard.ARCHITECTURES[machine][0]
    listed = {int(number) for number in guard.CALLS.split()[1 + column :: 3] if number != "-"}
    some = {numbers[column] for numbers, *_ in guard.SOME.values()} - {None}
    assert len(program) // 8 <= 4096 and not listed & some
    for number in range(600):
        if number not in some:
            expected = "allow" if number in listed else "ENOSYS" if number == 435 or number > 450 else "EACCES"
            assert decision(program, number, machine=machine) == expected, number
    assert decision(program, 0, architecture=0x40000003, machine=machine) == "kill"  # i386
    assert decision(program, 0x40000000 | 39, machine=machine) == "ENOSYS"  # x32
    clone, fcntl, openat, limits = (guard.SOME[name][0][column] for name in ("clone", "fcntl", "openat", "prlimit64"))
    thread, process, thread_with_namespace = 0x3D0F00, 0x1200011, 0x3D0F00 | 1 << 17
    verdicts = [
        *(decision(program, clone, [flags], machine=machine) for flags in (thread, process, thread_with_namespace)),
        *(decision(program, fcntl, [3, command], machine=machine) for command in (1, 8, 10, 1030)),
        *(decision(program, openat, [0, 0, flags], machine=machine) for flags in (0o2000000, 0o1001, 0o1000)),
        *(decision(program, limits, [pid], machine=machine) for pid in (0, 1)),
    ]
    allowed = "clone thread,,,fcntl get,,,fcntl dup,openat read,openat write,,limits own,"
    assert [verdict == "allow" for verdict in verdicts] == [bool(word) for word in allowed.split(",")]


@pytest.mark.parametrize(("setting", "value"), [("timeout", 0), ("timeout", -1), ("timeout", 1e9), ("memory_bytes", 0)])
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be above 0.*got"):
        sandbox.run("pass", **{setting: value})
