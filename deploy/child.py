"""Runs a command that dies with its supervisor: ``child.py SUPERVISOR_PID COMMAND...``

A supervisor that is killed with SIGKILL cannot stop its children, and orphaned workers would hold
their GPUs and ports for ever. Linux can do it: a process may ask for a signal on its parent's
death (prctl PR_SET_PDEATHSIG), and the wish survives exec. It is asked for here, in a tiny process
that then becomes the command, instead of in a ``preexec_fn``, which would run Python between fork
and exec of a process that has threads. Elsewhere than on Linux this only runs the command.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    supervisor, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415  # only here, and it costs some of these milliseconds

        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
        if os.getppid() != supervisor:  # it died before we asked
            sys.exit("the supervisor is gone")
    os.execvp(command[0], command)  # noqa: S606  # no shell wanted


if __name__ == "__main__":
    main()
