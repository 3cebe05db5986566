"""A grading worker that misbehaves on chosen texts, for the tests of the pool."""

import ctypes
import os
import sys
import time

from megatron_offgrpo.data import grading_worker

honest = grading_worker.grade


def grade(gold, text):
    if text == "exit":
        os._exit(3)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "loop":
        while True:
            pass
    if text == "sleep":
        time.sleep(1000)
    if text == "memory":
        return {"reward": 1, "status": "ok", "extracted": str(len(bytearray(1 << 40)))}
    if text == "print":
        print("this is no answer")
        os.write(1, b"nor is this\n")
    if text == "base exception":
        raise KeyboardInterrupt
    return honest(gold, text)


if __name__ == "__main__":
    if os.environ.get("BROKEN_WORKER"):
        sys.exit("no module named math_verify")
    grading_worker.grade = grade
    grading_worker.main()
