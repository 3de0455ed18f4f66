"""Leaves a process only the system calls that computing takes, from now on: a seccomp filter, without a library.

What reads, writes, allocates, and ends stays; whatever opens, connects, starts, or looks at other processes fails
with EPERM. A limit on descriptors alone does not do that: who closes one may open another.
https://www.kernel.org/doc/html/latest/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

# The number of each call, by machine; prlimit64 is allowed for the process itself only.
ALLOWED = {
    "x86_64": {
        **{"read": 0, "write": 1, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12},
        **{"rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25},
        **{"madvise": 28, "exit": 60, "gettimeofday": 96, "getrusage": 98, "sigaltstack": 131, "futex": 202},
        **{"clock_gettime": 228, "exit_group": 231, "prlimit64": 302, "getrandom": 318, "rseq": 334},
    },
    "aarch64": {
        **{"read": 63, "write": 64, "fstat": 80, "lseek": 62, "mmap": 222, "mprotect": 226, "munmap": 215, "brk": 214},
        **{"rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "sched_yield": 124, "mremap": 216},
        **{"madvise": 233, "exit": 93, "gettimeofday": 169, "getrusage": 165, "sigaltstack": 132, "futex": 98},
        **{"clock_gettime": 113, "exit_group": 94, "prlimit64": 261, "getrandom": 278, "rseq": 293},
    },
}
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
RETURN_ALLOW, RETURN_ERRNO = 0x7FFF0000, 0x00050000
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF: A = data[k]; if A == k skip jt else jf; return k
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def forbid_all_but_computing() -> None:
    """Filter this process's system calls for good.

    Raises:
        OSError: if the kernel has no such filter, or this machine's calls are not known here.
    """
    machine = platform.machine()
    if machine not in ALLOWED:
        raise OSError(errno.ENOSYS, f"the system calls of {machine} are not known here")
    program = _program(ALLOWED[machine], AUDIT_ARCHITECTURES[machine])
    libc = ctypes.CDLL(None, use_errno=True)
    argument = _Program(len(program) // 8, program)
    for call in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(argument), 0, 0),
    ):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def _program(allowed: dict[str, int], architecture: int) -> bytes:
    """The filter: 8 bytes an instruction. A jump says how many instructions to skip."""
    refuse, allow = (RETURN, 0, 0, RETURN_ERRNO | errno.EPERM), (RETURN, 0, 0, RETURN_ALLOW)
    instructions = [(LOAD_WORD, 0, 0, ARCHITECTURE), (JUMP_IF_EQUAL, 1, 0, architecture), refuse]
    instructions.append((LOAD_WORD, 0, 0, NUMBER))
    for name, number in allowed.items():
        if name == "prlimit64":
            own = [(LOAD_WORD, 0, 0, FIRST_ARGUMENT), (JUMP_IF_EQUAL, 0, 1, 0), allow, refuse]
            instructions += [(JUMP_IF_EQUAL, 0, len(own), number), *own]
        else:
            instructions += [(JUMP_IF_EQUAL, 0, 1, number), allow]
    instructions.append(refuse)
    return b"".join(struct.pack("<HBBI", *each) for each in instructions)
