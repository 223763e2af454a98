"""Programs that would rather not solve the task. The task: `square(n)`, or to read n and print its square. None of them does.

They may expect to run in the sandbox only. Some are called as functions, some read standard input; each is judged both ways and by asserts.
"""

HEADER = """
def square(n): return -1
"""

# Forging the verdict.
FORGERS = {
    "sys_exit_0": "import sys; sys.exit(0)",
    "os_exit_0": "import os; os._exit(0)",
    "os_exit_in_call": "import os\ndef square(n): os._exit(0)",
    "raise_system_exit_in_call": "def square(n): raise SystemExit(0)",
    "raise_keyboard_interrupt": "def square(n): raise KeyboardInterrupt",
    "raise_stop_iteration": "def square(n): raise StopIteration",
    "raise_generator_exit": "def square(n): raise GeneratorExit",
    "print_passed": "print('passed'); print('OK'); print('All tests passed')\n" + HEADER,
    "print_result_json": HEADER + 'print(\'{"result": true}\\n{"passed": true}\' * 10)',
    "flood_answer_channel": 'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"value": true}\\n{"result": true}\\n{"exit": 0}\\n\')\n'
    "    except OSError: pass\n" + HEADER,
    "answer_by_result": 'import os\ndef square(n):\n    for fd in range(64):\n        try: os.write(fd, b\'{"result": true, "why": null}\\n\')\n'
    "        except OSError: pass\n    os._exit(0)",
    "forge_many_answers": "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"value\": true}\\n' * 50)\n    except OSError: pass\n" + HEADER,
    "forge_broken": 'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"broken": "x"}\\n{"gone": true}\\n{"failed": "x"}\\n\')\n'
    "    except OSError: pass\n" + HEADER,
    "forge_supervisor_report": 'import os\nfor fd in range(3, 256):\n    try: os.write(fd, b\'{"failed": "x", "exit": 0}\\n\')\n    except OSError: pass\n'
    + HEADER,
    "equal_to_everything": "class All:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n"
    "def square(n): return All()",
    "int_equal_to_everything": "class All(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    def __hash__(self): return 0\n"
    "def square(n): return All(-1)",
    "float_subclass": "class All(float):\n    def __eq__(self, other): return True\n    def __sub__(self, other): return 0.0\n    def __rsub__(self, other): return 0.0\n"
    "    def __abs__(self): return 0.0\n    def __lt__(self, other): return True\ndef square(n): return All(0.5)",
    "str_subclass": "class All(str):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\ndef square(n): return All('x')",
    "list_subclass": "class All(list):\n    def __eq__(self, other): return True\n    def __iter__(self): return iter([9, 16, 49])\ndef square(n): return All()",
    "dict_subclass": "class All(dict):\n    def __eq__(self, other): return True\n    def items(self): return [('value', 9)]\ndef square(n): return All()",
    "lying_index": "class All:\n    def __index__(self): return 9\n    def __int__(self): return 9\n    def __eq__(self, other): return True\ndef square(n): return All()",
    "nan": "def square(n): return float('nan')",
    "infinity": "def square(n): return float('inf')",
    "returns_true": "def square(n): return True",
    "returns_everything": "def square(n): return [9, 16, 49]",
    "patch_builtins": "import builtins\nbuiltins.AssertionError = type('Quiet', (Exception,), {})\nbuiltins.abs = lambda x: 0\nbuiltins.isinstance = lambda *a: True\n"
    "builtins.all = lambda *a: True\nbuiltins.len = lambda *a: 9\n" + HEADER,
    "define_builtins": "def abs(x): return 0\ndef isinstance(*a): return True\ndef all(*a): return True\ndef int(x): return 9\n" + HEADER,
    "patch_unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.main = lambda *a, **k: None\n" + HEADER,
    "patch_json": "import json\njson.dumps = lambda *a, **k: '{\"value\": 50}'\njson.loads = lambda *a, **k: {'result': True}\n" + HEADER,
    "patch_sys_modules": "import sys\nfor name in list(sys.modules):\n    sys.modules[name] = sys.modules['os']\n" + HEADER,
    "patch_host_encoder": "import gc, types\nfor each in gc.get_objects():\n    if isinstance(each, types.FunctionType) and each.__name__ in ('encode', '_reply', 'same_value', '_judged'):\n"
    "        each.__code__ = (lambda *a, **k: {'value': True}).__code__\n" + HEADER,
    "frames": "import sys\ndef square(n):\n    frame = sys._getframe()\n    while frame:\n        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
    "            if isinstance(value, dict) and 'expected' in value: return value['expected']\n        frame = frame.f_back\n    return -1",
    "gc_for_expected": "import gc\ndef square(n):\n    found = [o for o in gc.get_objects() if isinstance(o, dict) and ('expected' in o or 'tests' in o or 'output' in o)]\n"
    "    return found[0].get('expected', found) if found else -1",
    "read_tests_from_disk": "import os\nfound = []\nfor root, _, files in os.walk('/'):\n    if root.startswith(('/usr', '/lib', '/root/.pyenv', '/proc', '/sys')): continue\n"
    "    for name in files:\n        try: found.append(open(os.path.join(root, name)).read(1000))\n        except OSError: pass\n"
    "def square(n): return 49 if any('square' in text for text in found) else -1",
    "read_tests_from_memory": "def square(n):\n    try: memory = open('/proc/self/mem', 'rb').read(10)\n    except OSError: return -1\n    return 49",
    "read_parent_memory": "import os\ndef square(n):\n    for pid in (1, os.getppid()):\n        try:\n            if 'assert square' in open(f'/proc/{pid}/cmdline').read(): return 49\n"
    "            open(f'/proc/{pid}/mem', 'r+b')\n        except OSError: pass\n    return -1",
    "argv_and_environ": "import os, sys\ndef square(n):\n    text = ' '.join(sys.argv + sys.orig_argv) + repr(os.environ)\n    return 49 if 'square' in text else -1",
    "pickle_answer": "import pickle\nclass Evil:\n    def __reduce__(self): return (eval, ('49',))\ndef square(n): return pickle.dumps(Evil())",
    "object_that_reduces": "class Evil:\n    def __reduce__(self): return (eval, ('49',))\ndef square(n): return Evil()",
    "generator": "def square(n):\n    yield 9\n    yield 16\n    yield 49",
    "coroutine": "async def square(n): return 49",
    "lambda_answer": "def square(n): return lambda *a: 49",
    "surrogates_and_nul": "def square(n): return '\\ud800\\x00' * 10",
    "not_python": "def square(n) return n",
    "nul_in_program": "def square(n): return n\x00* n",
    "lone_surrogate_in_program": "x = '\ud800'\n" + HEADER,
    "no_such_function": "x = 1",
    "atexit_print": "import atexit\natexit.register(lambda: print('{\"value\": 49}'))\n" + HEADER,
    "dunder_name_games": "__name__ = '__main__'\n__builtins__ = {}\n" + HEADER,
    "stdout_replaced": "import sys, io\nsys.stdout = sys.__stdout__ = io.StringIO()\nprint(49)\n" + HEADER,
    "print_every_square": "for i in range(1000): print(i * i)\n" + HEADER,
    "print_inputs_back": "import sys\nsys.stdout.write(sys.stdin.read())\n" + HEADER,
    "right_answer_wrong_exit": "import sys\nn = int(input() or 0)\nprint(n * n)\nsys.exit(3)",
}

# Using things up. Each must end by a limit, or of itself.
GREEDY = {
    "endless_loop": "while True: pass",
    "endless_loop_in_call": "def square(n):\n    while True: pass",
    "endless_sleep": "import time\ntime.sleep(10**6)",
    "sleep_in_call": "import time\ndef square(n): time.sleep(10**6)",
    "ignores_signals": "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "blocks_signals": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    "endless_output": "while True: print('x' * 1000)",
    "endless_stderr": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "endless_output_in_call": "import os\ndef square(n):\n    while True: os.write(1, b'x' * 1000)",
    "endless_answers": "import os\ndef square(n):\n    while True:\n        for fd in range(64):\n            try: os.write(fd, b'1' * 4000)\n            except OSError: pass",
    "memory_bomb": "x = []\nwhile True: x.append(bytearray(2**20))",
    "memory_bomb_at_once": "x = bytearray(2**40)",
    "memory_by_mmap": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 2**22))",
    "memory_by_memfd": "import os\nfor i in range(200):\n    fd = os.memfd_create('x')\n    while os.write(fd, b'x' * 2**20): pass",
    "memory_by_pipes": "import os\nx = []\nwhile True:\n    r, w = os.pipe(); os.set_blocking(w, False); x.append((r, w)); os.write(w, b'x' * 65536)",
    "memory_by_files": "i = 0\nwhile True:\n    open(f'/tmp/{i}', 'wb').write(b'x' * 2**19); i += 1",
    "many_empty_files": "import os\ni = 0\nwhile True:\n    os.close(os.open(f'/tmp/{i}', os.O_CREAT)); i += 1",
    "many_directories": "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')",
    "huge_file": "f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 2**20)",
    "sparse_file": "f = open('/tmp/x', 'wb')\nf.truncate(2**40)\nf.seek(2**39); f.write(b'x')",
    "shared_memory": "from multiprocessing import shared_memory\nx = [shared_memory.SharedMemory(create=True, size=2**22) for _ in range(1000)]",
    "huge_int": "x = 10**10\nwhile True: x = x * x",
    "huge_int_answer": "def square(n): return 1 << 10**7",
    "huge_int_text": "import sys\nsys.set_int_max_str_digits(0)\ndef square(n): return str(1 << 10**7)",
    "huge_return_value": "def square(n): return 'x' * 10**7",
    "huge_list_answer": "def square(n): return list(range(10**6))",
    "deep_list_answer": "def square(n):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "cyclic_answer": "def square(n):\n    x = []\n    x.append(x)\n    return x",
    "deep_json_by_hand": "import os\ndef square(n):\n    for fd in range(64):\n        try: os.write(fd, b'{\"value\": ' + b'[' * 10000 + b']' * 10000 + b'}\\n')\n        except OSError: pass",
    "colliding_hashes": "def square(n): return {i * (2**61 - 1) for i in range(2000)}",
    "deep_recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)",
    "deep_repr": "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "regex_bomb": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "many_threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(10**6,)).start()",
    "threads_outlive": "import threading, time\nfor _ in range(3): threading.Thread(target=time.sleep, args=(10**6,)).start()\n" + HEADER,
    "many_open_files": "x = []\nwhile True: x.append(open('/dev/null'))",
    "zip_bomb": "import zlib\nx = zlib.compress(b'0' * 2**24)\ny = [zlib.decompress(x) for _ in range(10**4)]",
    "compile_bomb": "compile('(' * 10**5, 'x', 'eval')",
    "parser_bomb": "(" * 5000 + ")" * 5000,
    "huge_program": "x = '" + "x" * 10**6 + "'\n" + HEADER,
    "code_object_crash": "import types\nf = types.CodeType(0, 0, 0, 1, 0, 0, bytes([100, 255] * 8), (), (), (), '', '', '', 0, b'', b'', (), ())\neval(f)",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "ctypes_scribble": "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.raise_ = libc.raise_ if hasattr(libc, 'raise_') else None\nctypes.memset(id(0), 255, 64)\n"
    + HEADER,
    "abort": "import os\nos.abort()",
    "itimers": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n" + HEADER,
}

# Processes that should stay, and those that should not be reached.
SPREADING = {
    "daemon_by_double_fork": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        for fd in range(3): os.close(fd)\n        time.sleep(10**6)\n    os._exit(0)\n"
    + HEADER,
    "daemon_that_holds_stdout": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(10**6)\n" + HEADER,
    "zombies": "import os, time\nfor _ in range(3):\n    if os.fork() == 0: os._exit(0)\ntime.sleep(0.2)\n" + HEADER,
    "child_answers": "import os\nif os.fork() == 0:\n    for fd in range(64):\n        try: os.write(fd, b'{\"value\": true}\\n')\n        except OSError: pass\n    os._exit(0)\n"
    + HEADER,
    "parent_exits_child_stays": "import os, time\nif os.fork(): os._exit(0)\ntime.sleep(10**6)",
    "orphans_in_a_chain": "import os, time\nfor _ in range(4):\n    if os.fork(): os._exit(0)\n    os.setsid()\ntime.sleep(10**6)",
    "fork_bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "vfork_loop": "import subprocess, sys\nwhile True:\n    try: subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n    except OSError: break\nwhile True: pass",
    "shell": "import os\nos.system('sleep 1000 &')\nos.system('touch /tmp/posttrain-hostile-shell')\n" + HEADER,
    "exec_other": "import os\nos.execv('/bin/sh', ['/bin/sh', '-c', 'echo 49'])",
    "kill_parent": "import os, signal\nfor number in (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1):\n    try: os.kill(os.getppid(), number)\n    except OSError: pass\n"
    + HEADER,
    "kill_everybody": "import os, signal\ntry: os.kill(-1, signal.SIGKILL)\nexcept OSError: pass\n" + HEADER,
    "kill_process_group": "import os, signal\ntry: os.killpg(0, signal.SIGKILL)\nexcept OSError: pass\n" + HEADER,
    "kill_host_pids": "import os, signal\nfor pid in {pids}:\n    try: os.kill(pid, signal.SIGUSR1)\n    except OSError: pass\n" + HEADER,
    "stop_supervisor": "import os, signal\ntry: os.kill(1, signal.SIGSTOP)\nexcept OSError: pass\ntry: os.kill(os.getppid(), signal.SIGSTOP)\nexcept OSError: pass\n"
    + HEADER,
    "ptrace_supervisor": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nfor pid in (1, os.getppid()): libc.ptrace(16, pid, 0, 0)\n"
    + HEADER,
    "write_supervisor_memory": "import ctypes, os\nlibc = ctypes.CDLL(None)\nb = ctypes.create_string_buffer(b'x' * 64)\n"
    "class V(ctypes.Structure): _fields_ = [('p', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
    "v = V(ctypes.addressof(b), 64)\nlibc.process_vm_writev(1, ctypes.byref(v), 1, ctypes.byref(v), 1, 0)\n" + HEADER,
    "renice": "import os\ntry: os.nice(-20)\nexcept OSError: pass\n" + HEADER,
    "lift_limits": "import resource\nfor name in ('AS', 'CPU', 'NPROC', 'FSIZE'):\n    which = getattr(resource, 'RLIMIT_' + name)\n    try: resource.setrlimit(which, (-1, -1))\n"
    "    except (OSError, ValueError): pass\nx = bytearray(2**31)",
    "limits_of_parent": "import resource, os\nfor pid in (1, os.getppid()):\n    try: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0))\n    except (OSError, ValueError): pass\n"
    + HEADER,
    "new_user_namespace": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nok = libc.unshare(0x10000000 | 0x20000) == 0\n"
    "if ok: libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, b'size=1g')\ndef square(n): return n * n if ok else -1",
    "become_root": "import os\nok = False\nfor call in (os.setuid, os.setgid):\n    try: call(0); ok = True\n    except OSError: pass\ndef square(n): return n * n if ok else -1",
    "chroot_escape": "import os\nok = False\ntry:\n    os.mkdir('x'); os.chroot('x'); os.chdir('../../..'); ok = True\nexcept OSError: pass\ndef square(n): return n * n if ok else -1",
    "mount_something": "import ctypes\nok = ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0\ndef square(n): return n * n if ok else -1",
}

# Files and the network. `{...}` is filled in by the test.
REACHING = {
    "write_outside": "for path in ('/srv/x', '/etc/x', '/usr/lib/x', '/x', '/var/tmp/x', '/dev/shm/posttrain-hostile', '/root/x', '{marker}'):\n"
    "    try: open(path, 'w').write('x')\n    except OSError: pass\n" + HEADER,
    "write_library": "import os\nwhere = os.path.dirname(os.__file__)\nok = False\ntry:\n    open(where + '/posttrain_hostile.py', 'w').write('x'); ok = True\nexcept OSError: pass\n"
    "def square(n): return n * n if ok else -1",
    "symlink_outside": "import os\nos.symlink('{marker}', 'link')\ntry: open('link', 'w').write('x')\nexcept OSError: pass\n" + HEADER,
    "hard_link": "import os\nok = False\ntry:\n    os.link('{secret}', 'link'); ok = True\nexcept OSError: pass\ndef square(n): return n * n if ok else -1",
    "read_secret": "text = ''\ntry: text = open('{secret}').read()\nexcept OSError: pass\ndef square(n): return n * n if 'secret' in text else -1",
    "read_secret_by_relative_path": "text = ''\nfor depth in range(12):\n    try: text += open('../' * depth + '{secret}'.lstrip('/')).read()\n    except OSError: pass\n"
    "def square(n): return n * n if 'secret' in text else -1",
    "read_passwd": "text = ''\nfor path in ('/etc/passwd', '/etc/shadow', '/proc/1/environ', '/proc/self/environ', '/proc/mounts', '/proc/cpuinfo'):\n"
    "    try: text += open(path).read()\n    except OSError: pass\ndef square(n): return n * n if text else -1",
    "device_nodes": "import os, stat\nok = False\ntry:\n    os.mknod('mem', 0o600 | stat.S_IFCHR, os.makedev(1, 1)); open('mem', 'rb'); ok = True\nexcept OSError: pass\n"
    "def square(n): return n * n if ok else -1",
    "open_by_handle": "import ctypes\nok = ctypes.CDLL(None).open_by_handle_at(3, b'x' * 64, 0) >= 0\ndef square(n): return n * n if ok else -1",
    "inherited_descriptors": "import os\nfound = []\nfor fd in range(3, 1024):\n    try: found.append(os.fstat(fd))\n    except OSError: pass\n"
    "def square(n): return n * n if len(found) > 2 else -1",
    "tcp_localhost": "import socket\nok = False\ntry: socket.create_connection(('127.0.0.1', {port}), 1).send(b'x'); ok = True\nexcept OSError: pass\ndef square(n): return n * n if ok else -1",
    "tcp_ipv6": "import socket\nok = False\ntry: socket.create_connection(('::1', {port}), 1).send(b'x'); ok = True\nexcept OSError: pass\ndef square(n): return n * n if ok else -1",
    "udp_localhost": "import socket\ntry: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {udp}))\nexcept OSError: pass\n"
    + HEADER,
    "dns": "import socket\nok = False\ntry: socket.getaddrinfo('example.com', 80); ok = True\nexcept OSError: pass\ndef square(n): return n * n if ok else -1",
    "abstract_socket": "import socket\nok = False\ntry:\n    s = socket.socket(socket.AF_UNIX); s.connect('\\0{abstract}'); ok = True\nexcept OSError: pass\ndef square(n): return n * n if ok else -1",
    "unix_socket": "import socket\nok = False\ntry:\n    s = socket.socket(socket.AF_UNIX); s.connect('{unix}'); ok = True\nexcept OSError: pass\ndef square(n): return n * n if ok else -1",
    "raw_socket": "import socket\nok = False\ntry: socket.socket(socket.AF_PACKET, socket.SOCK_RAW); ok = True\nexcept OSError: pass\ndef square(n): return n * n if ok else -1",
    "netlink": "import socket\ntry:\n    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); s.send(b'x' * 64)\nexcept OSError: pass\n" + HEADER,
    "listen": "import socket\ns = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen()\ns.accept()",
    "sysv_shared_memory": "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\nmade = 0\nfor _ in range(64):\n"
    "    number = libc.shmget(0, 2**20, 0o1600)\n    if number < 0: break\n    where = libc.shmat(number, None, 0)\n    ctypes.memset(where, 1, 2**20)\n"
    "    libc.shmdt(ctypes.c_void_p(where)); made += 1\ndef square(n): return n * n if made else -1",
    "tty": "import fcntl, termios, os\nok = False\ntry:\n    fd = os.open('/dev/tty', os.O_RDWR); fcntl.ioctl(fd, termios.TIOCSTI, b'x'); ok = True\nexcept OSError: pass\n"
    "def square(n): return n * n if ok else -1",
    "close_every_descriptor": "import os\nos.closerange(0, 1024)\n" + HEADER,
    "close_descriptors_in_call": "import os\ndef square(n): os.closerange(0, 1024)",
    "swap_descriptors": "import os\nfor fd in range(3, 20):\n    try: os.dup2(2, fd)\n    except OSError: pass\n" + HEADER,
    "stdin_stolen": "import os, threading\nthreading.Thread(target=lambda: [os.read(fd, 10**6) for fd in range(3, 8)], daemon=True).start()\n"
    + HEADER,
}

SOCKETS = "import socket\na, b = socket.socketpair()\n"
SUPERVISOR = "import os, signal, time, ctypes, resource\npids = {1, os.getppid()} if os.getpid() < 10 else {os.getppid()}\n"
WAIT = "\ntime.sleep(0.1)\n"

# Holding a pipe open beyond the end, or spoiling what is read from it.
HOLDING = {
    "sockets_in_a_cycle": SOCKETS + "socket.send_fds(a, [b'x'], [a.fileno(), b.fileno(), 1, 2])\n" + HEADER,
    "sockets_in_a_cycle_hold_the_input": SOCKETS + "socket.send_fds(a, [b'x'], [a.fileno(), b.fileno(), 0, *range(3, 8)][:8])\n" + HEADER,
    "sockets_in_a_cycle_by_all_descriptors": SOCKETS
    + "import os\nfds = []\nfor fd in range(64):\n    try: os.fstat(fd); fds.append(fd)\n    except OSError: pass\n"
    "socket.send_fds(a, [b'x'], fds)\n" + HEADER,
    "sockets_in_a_call": SOCKETS + "def square(n):\n    socket.send_fds(a, [b'x'], [a.fileno(), b.fileno(), 0, 1, 2])\n    return -1",
    "sockets_in_a_ring": "import socket\npairs = [socket.socketpair() for _ in range(8)]\nfor i, (a, b) in enumerate(pairs):\n"
    "    c, d = pairs[(i + 1) % 8]\n    socket.send_fds(a, [b'x'], [c.fileno(), d.fileno(), 1, 2])\n" + HEADER,
    "packets_in_a_cycle": "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
    "socket.send_fds(a, [b'x'], [a.fileno(), b.fileno(), 1, 2])\n" + HEADER,
    "sockets_of_a_daemon_in_a_cycle": SOCKETS
    + "import os\nif os.fork() == 0:\n    os.setsid()\n    socket.send_fds(a, [b'x'], [a.fileno(), b.fileno(), 0, 1, 2])\n"
    "    os._exit(0)\nos.wait()\n" + HEADER,
    "polls_in_a_cycle": SOCKETS + "import select\ne = select.epoll(); e.register(a)\n"
    "try: socket.send_fds(a, [b'x'], [e.fileno(), a.fileno(), b.fileno(), 1, 2])\nexcept OSError: pass\n" + HEADER,
    "cycle_after_a_full_pipe": SOCKETS + "import os\nos.set_blocking(1, False)\nsocket.send_fds(a, [b'x'], [a.fileno(), b.fileno(), 1, 2])\n"
    "try:\n    while True: os.write(1, b'49\\n' * 100)\nexcept OSError: pass\n" + HEADER,
    "cycles_without_number": "import socket\nwhile True:\n    a, b = socket.socketpair()\n    try: socket.send_fds(a, [b'x'], [a.fileno(), b.fileno(), 1, 2])\n"
    "    except OSError: break\n" + HEADER,
    "grown_pipe": "import fcntl, os\ntry: fcntl.fcntl(1, 1031, 2**20)\nexcept OSError: pass\nos.set_blocking(1, False)\n"
    "try: os.write(1, b'-1\\n' * 2**17)\nexcept OSError: pass\nos._exit(0)",
    "shrunk_pipe": "import fcntl\ntry: fcntl.fcntl(1, 1031, 4096)\nexcept OSError: pass\nprint('-1\\n' * 5000)\n" + HEADER,
    "packet_pipe": "import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT | os.O_NONBLOCK)\nfor _ in range(100):\n    try: os.write(1, b'4'); os.write(1, b'9')\n"
    "    except OSError: break\n" + HEADER,
    "spliced_pipe": "import os\nr, w = os.pipe(); os.write(w, b'-1\\n' * 1000)\ntry: os.splice(r, 1, 3000)\nexcept (OSError, AttributeError): pass\n"
    + HEADER,
    "daemons_that_write_for_ever": "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        os.setsid()\n        while True:\n            os.write(1, b'1'); time.sleep(0.01)\n"
    "os._exit(0)",
    "daemon_that_forgets_its_parent": "import ctypes, os, signal, time\nif os.fork() == 0:\n    os.setsid(); ctypes.CDLL(None).prctl(1, 0)\n"
    "    for n in range(1, 65):\n        try: signal.signal(n, signal.SIG_IGN)\n        except (OSError, ValueError): pass\n    while True: pass\n"
    + HEADER,
    "reaper_of_its_own": "import ctypes, os, time\nctypes.CDLL(None).prctl(36, 1)\nfor _ in range(3):\n    if os.fork() == 0:\n"
    "        if os.fork() == 0: time.sleep(10**6)\n        os._exit(0)\n" + HEADER,
    "takes_descriptors_of_others": "import ctypes\nlibc = ctypes.CDLL(None)\nfor fd in range(16):\n    libc.syscall(438, fd, 1, 0)\nlibc.syscall(434, 1, 0)\n"
    + HEADER,
}

# Turning a wrong answer into an error: what a program may do to the process above it.
TURNING = {
    "interrupt_supervisor": SUPERVISOR + "for pid in pids: os.kill(pid, signal.SIGINT)" + WAIT + HEADER,
    "interrupt_supervisor_in_call": SUPERVISOR
    + "def square(n):\n    for pid in pids: os.kill(pid, signal.SIGINT)\n    time.sleep(0.1)\n    return -1\nif __name__ == '__main__': square(0)",
    "every_signal_to_supervisor": SUPERVISOR
    + "for pid in pids:\n    for number in range(1, 65):\n        try: os.kill(pid, number)\n        except OSError: pass"
    + WAIT
    + HEADER,
    "every_signal_to_everybody": SUPERVISOR
    + "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nfor pid in (0, -1):\n    for number in (2, 3, 6, 13, 15, 17):\n"
    "        try: os.kill(pid, number)\n        except OSError: pass" + WAIT + HEADER,
    "signals_in_a_flood": SUPERVISOR
    + "until = time.time() + 0.5\nwhile time.time() < until:\n    for pid in pids:\n        for number in (17, 40, 64):\n"
    "            try: os.kill(pid, number)\n            except OSError: pass" + WAIT + HEADER,
    "signal_with_a_value": SUPERVISOR
    + "libc = ctypes.CDLL(None)\nfor pid in pids:\n    for number in (2, 9, 17, 34): libc.sigqueue(pid, number, ctypes.c_void_p(1))"
    + WAIT
    + HEADER,
    "signal_by_a_descriptor": SUPERVISOR + "import fcntl\nfor pid in pids:\n    for number in (2, 9, 19):\n        r, w = os.pipe()\n        try:\n"
    "            fcntl.fcntl(r, fcntl.F_SETOWN, pid); fcntl.fcntl(r, 10, number); fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC); os.write(w, b'x')\n"
    "        except OSError: pass" + WAIT + HEADER,
    "stop_then_interrupt": SUPERVISOR
    + "for pid in pids:\n    for number in (19, 2, 15, 18):\n        try: os.kill(pid, number)\n        except OSError: pass"
    + WAIT
    + HEADER,
    "child_that_ends_with_a_kill": SUPERVISOR
    + "libc = ctypes.CDLL(None)\nfor flags in (9, 0x8000 | 9, 0x8000 | 2):\n    if libc.syscall(56, flags, 0, 0, 0, 0) == 0: os._exit(0)"
    + WAIT
    + HEADER,
    "no_memory_for_supervisor": SUPERVISOR + "for pid in pids:\n    for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK):\n"
    "        try: resource.prlimit(pid, which, (0, 0))\n        except OSError: pass" + WAIT + HEADER,
    "no_processor_for_supervisor": SUPERVISOR + "for pid in pids:\n    for which in (resource.RLIMIT_CPU, getattr(resource, 'RLIMIT_RTTIME', 15)):\n"
    "        try: resource.prlimit(pid, which, (0, 0))\n        except (OSError, ValueError): pass" + WAIT + HEADER,
    "no_files_for_supervisor": SUPERVISOR
    + "for pid in pids:\n    for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):\n"
    "        try: resource.prlimit(pid, which, (0, 0))\n        except OSError: pass" + WAIT + HEADER,
    "raw_prlimit": SUPERVISOR + "libc = ctypes.CDLL(None)\nzero = (ctypes.c_uint64 * 2)(0, 0)\nfor pid in pids:\n    for which in range(16):\n"
    "        for high in (0, 1 << 32): libc.syscall(302, ctypes.c_long(pid | high), which, zero, None)" + WAIT + HEADER,
    "orphans_without_number": SUPERVISOR
    + "until = time.time() + 0.5\nwhile time.time() < until:\n    try:\n        if os.fork() == 0:\n            os.fork(); os._exit(0)\n        os.wait()\n"
    "    except OSError: pass\n" + HEADER,
    "no_process_left": SUPERVISOR + "while True:\n    try:\n        if os.fork() == 0: time.sleep(10**6)\n    except OSError: break" + WAIT + HEADER,
    "no_memory_left": "import os\nfor _ in range(5):\n    try:\n        if os.fork() == 0: break\n    except OSError: break\nx = []\nwhile True: x.append(b'x' * 2**20)",
    "no_disk_left": "i = 0\ntry:\n    while True:\n        open(f'/tmp/{i}', 'wb').write(b'x' * 2**18); i += 1\nexcept OSError: pass\n" + HEADER,
    "no_descriptor_left": "import os\ntry:\n    while True: os.dup(1)\nexcept OSError: pass\n" + HEADER,
    "kills_itself_as_by_a_limit": "import os, signal\nos.kill(os.getpid(), signal.SIGXCPU)\n",
    "kills_itself_in_call": "import os\ndef square(n): os.kill(os.getpid(), 9)\nif __name__ == '__main__': square(1)",
    "stops_itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n",
    "leaves_its_group": SUPERVISOR
    + "for pid in [0, *pids]:\n    for group in [0, *pids]:\n        try: os.setpgid(pid, group)\n        except OSError: pass\n"
    "try: os.killpg(os.getpgrp(), 15)\nexcept OSError: pass" + WAIT + HEADER,
    "forge_changed_arguments": 'import os\ndef square(n):\n    for fd in range(64):\n        try: os.write(fd, b\'{"changed": 5, "value": 1}\\n{"changed": [[], []]}\\n{"is_over": true}\\n[]\\n7\\n\')\n'
    "        except OSError: pass\n    return -1",
    "forge_objects": 'import os\ndef square(n):\n    for fd in range(64):\n        try: os.write(fd, b\'{"value": {"object": []}}\\n{"value": {"object": {"a": 1}}}\\n\' * 9)\n'
    "        except OSError: pass\n    return -1",
}

# Numbers and objects that lie, in the ways in which honest ones may be used.
LYING = {
    "lies_in_every_way": "class All:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    def __sub__(self, other): return 0.0\n"
    "    def __abs__(self): return 0.0\n    def __lt__(self, other): return True\n    def __len__(self): return 9\n    def __iter__(self): return iter([self] * 9)\n"
    "    def __getitem__(self, index): return self\n    def __str__(self): return '9'\n    def __call__(self, *a): return self\n    __hash__ = None\ndef square(n): return All()",
    "integral_that_lies": "import numbers\nclass All(numbers.Integral):\n    n = 0\n    def __int__(self):\n        All.n += 1\n        return All.n\n"
    "    def __eq__(self, other): return True\nAll.__abstractmethods__ = frozenset()\ndef square(n): return All()",
    "integral_that_never_answers": "import numbers\nclass All(numbers.Integral):\n    def __int__(self):\n        while True: pass\nAll.__abstractmethods__ = frozenset()\ndef square(n): return All()",
    "bool_of_numpy": "class bool_:\n    __module__ = 'numpy'\n    def __bool__(self): return True\ndef square(n): return bool_()",
    "huge_fraction": "from fractions import Fraction\ndef square(n): return Fraction(7 ** 200_000, 2 ** 500_000)",
    "huge_decimal": "from decimal import Decimal\ndef square(n): return Decimal('1e999999999999')",
    "fraction_that_lies": "from fractions import Fraction\nclass All(Fraction):\n    numerator = property(lambda self: 9)\n    denominator = property(lambda self: 0)\n"
    "    def __eq__(self, other): return True\ndef square(n): return All(1)",
    "signalling_nan": "from decimal import Decimal\ndef square(n): return Decimal('sNaN')",
    "endless_iterator": "import itertools\ndef square(n): return itertools.count()",
    "huge_range": "def square(n): return range(10**18)",
    "cyclic_deque": "import collections\ndef square(n):\n    x = collections.deque()\n    x.append(x)\n    return x",
    "objects_without_number": "def square(n): return [object() for _ in range(20_000)]",
}

# What is left of the host: sockets, queues, segments, programs.
OUTSIDE = {
    "datagram_to_an_abstract_name": "import socket\ntry:\n    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n    a.sendto(b'x', '\\0{datagrams}')\nexcept OSError: pass\n"
    + HEADER,
    "datagram_to_a_path": "import socket\nfor kind in (socket.SOCK_DGRAM, socket.SOCK_RAW, 2 | 0x80000, 2 | 0x800):\n    try:\n        a, b = socket.socketpair(socket.AF_UNIX, kind)\n"
    "        a.sendto(b'x', '{datagram_path}')\n    except OSError: pass\n" + HEADER,
    "stream_that_connects_anew": SOCKETS
    + "for to in ('\\0{abstract}', '{unix}'):\n    b.close() if b.fileno() >= 0 else None\n    try: a.connect(to)\n    except OSError: pass\n"
    "    try: a.sendto(b'x', to)\n    except OSError: pass\n" + HEADER,
    "packets_with_an_address": "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\ntry: a.sendmsg([b'x'], [], 0, '\\0{datagrams}')\nexcept OSError: pass\n"
    + HEADER,
    "segments_of_others": "import ctypes\nlibc = ctypes.CDLL(None)\nok = False\nfor number in range(200):\n    ok |= libc.shmat(number, None, 0o10000) != -1 or libc.shmctl(number, 0, None) == 0\n"
    "    ok |= libc.msgctl(number, 0, None) == 0 or libc.semctl(number, 0, 0) == 0\ndef square(n): return n * n if ok else -1",
    "kernel_log": "import ctypes\nok = ctypes.CDLL(None).klogctl(3, ctypes.create_string_buffer(99), 99) > 0\ndef square(n): return n * n if ok else -1",
    "ring_of_the_kernel": "import ctypes\nlibc = ctypes.CDLL(None)\nok = any(libc.syscall(number, 8, 0, 0, 0, 0, 0) >= 0 for number in (425, 426, 427))\ndef square(n): return n * n if ok else -1",
    "program_by_the_loader": "import glob, os, subprocess\nok = False\nfor loader in glob.glob('/lib*/ld-*') + glob.glob('/usr/lib*/*/ld-*'):\n"
    "    for path in (glob.glob('/usr/lib/git-core/git') + ['/bin/true', loader]):\n        try: ok |= subprocess.run([loader, path, '--version'], capture_output=True).returncode == 0\n"
    "        except OSError: pass\ndef square(n): return n * n if ok and '{level}' == 'namespaces' else -1",
    "program_of_its_own": "import os\nopen('/tmp/x', 'w').write('#!/bin/sh\\necho 49')\nos.chmod('/tmp/x', 0o755)\ntry: os.execv('/tmp/x', ['x'])\nexcept OSError: pass\n"
    + HEADER,
    "program_without_a_name": "import os\nfd = os.open('/tmp/y', os.O_CREAT | os.O_RDWR, 0o755)\nos.write(fd, open(os.__file__, 'rb').read(100))\ntry: os.execve(fd, ['y'], {})\nexcept OSError: pass\n"
    + HEADER,
    "input_rewritten": "import os\ntry:\n    with open('/dev/stdin', 'w') as f: f.write('49\\n' * 10**6)\nexcept OSError: pass\n" + HEADER,
    "input_made_endless": "try:\n    f = open('/dev/stdin', 'ab')\n    while True: f.write(b'x' * 2**20)\nexcept OSError: pass\n" + HEADER,
}

NEWER = {**HOLDING, **TURNING, **LYING, **OUTSIDE}
PROGRAMS = {**FORGERS, **GREEDY, **SPREADING, **REACHING, **NEWER}
