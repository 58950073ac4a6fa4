"""Runs a command that ends with whoever started it: python leash.py COMMAND...

Standard input is the leash. When nobody holds its other end any more, however that came about, the command and all that it
started get SIGTERM, and SIGKILL after a while. Unix; nothing but the standard library, as it is run as a file.
"""

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 20.0


def main(command: list[str]) -> int:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=let_go, args=(process,), daemon=True).start()
    return process.wait() & 0xFF


def let_go(process: "subprocess.Popen[bytes]") -> None:
    sys.stdin.buffer.read()
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
