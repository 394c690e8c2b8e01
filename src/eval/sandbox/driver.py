# Runs a model's program inside the sandbox, and judges it as Hugging Face's `code_eval` does: it passes if it ends
# without an exception in time. stdin: a secret, a line break, the program. stdin is also where the verdict goes; a
# success is told by the secret, so that neither printing nor leaving early is one. stdout: `/dev/null`.
import os
import signal
import sys


def main():
    os.closerange(3, 1 << 16)  # whatever else was inherited
    secret, _, program = sys.stdin.buffer.read().decode().partition("\n")
    seconds, sys.argv = float(sys.argv[1]), ["solution"]
    verdict = os.dup(0)
    os.dup2(1, 0)
    os.dup2(1, 2)
    write, leave = os.write, os._exit  # the program may replace those of `os`
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    os.lseek(verdict, 0, os.SEEK_SET)
    os.ftruncate(verdict, 0)  # the program cannot read the secret there; and so the parent sees that it starts
    signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process, in the middle of a long C function too
    try:
        exec(program, {})
        text = "passed " + secret
    except BaseException as e:
        try:
            text = "failed: " + type(e).__name__ + ": " + str(e)[:1000]
        except BaseException:
            text = "failed: an exception that cannot be shown"
    write(verdict, text.encode("utf-8", "replace"))
    leave(0)  # waits for no thread, runs no exit function


main()
