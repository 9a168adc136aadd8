"""A `python` for tests of whole commands, without the seconds that every one would take to import its libraries.

A server imports these once; each command imports the project's own modules anew. A script's `python train.py …` is a
client: it hands its words, folder, environment and streams to a fork of the server and stands for it, returns its
status, passes SIGTERM and SIGINT on, and takes it along when killed. Whatever is no command of this project (torchrun
itself) goes to the real Python; torchrun starts its workers by the variable PYTHON_EXEC, which names this `python`
again. pip has nothing to do in a test and is not called.
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading

LIBRARIES = ("torch", "torchvision", "accelerate", "diffusers", "timm", "scipy.stats", "matplotlib.figure")


def client(path: str, real: str, words: list[str]) -> None:
    """Have the words run by the server, or by the real Python."""
    plain = [word for word in words if word != "-u"]
    if plain[:2] == ["-m", "pip"]:
        return
    ours = plain[0].endswith(".py") or plain[0] == "-c"
    ours |= plain[0] == "-m" and plain[1].split(".")[0] in ("scripts", "memory", "evaluations", "benchmarks")
    if not ours:
        os.execv(real, [real, *words])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    request = json.dumps({"words": plain, "folder": os.getcwd(), "environ": dict(os.environ)}).encode()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    connection.sendmsg([len(request).to_bytes(8, "big")], streams)
    connection.sendall(request)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    status = connection.recv(1)
    os._exit(status[0] if status else 1)


def serve(path: str) -> None:
    """Import, then fork for each client."""
    for name in LIBRARIES:
        __import__(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    parent = os.getppid()
    while os.getppid() == parent:
        if not select.select([listener], [], [], 1)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            run(connection)
        connection.close()


def run(connection: socket.socket) -> None:
    """In a fork: become the process that the client stands for."""
    import runpy

    length, ancillary, *_ = connection.recvmsg(8, socket.CMSG_SPACE(12))
    request = b""
    while len(request) < int.from_bytes(length, "big"):
        request += connection.recv(1 << 16)
    request = json.loads(request)
    for number, stream in enumerate(array.array("i", ancillary[0][2])):
        os.dup2(stream, number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])

    def listen() -> None:
        while number := connection.recv(1):
            os.kill(os.getpid(), number[0])
        os.kill(os.getpid(), signal.SIGKILL)  # the client is gone

    threading.Thread(target=listen, daemon=True).start()
    first, *rest = request["words"]
    status = 0
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        elif first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else leaving.code is not None
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(bytes([int(status)]))
    os._exit(int(status))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path.insert(0, os.getcwd())
        serve(sys.argv[2])
    client(sys.argv[2], sys.argv[3], sys.argv[4:])
