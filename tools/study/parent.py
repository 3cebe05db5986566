"""A worker process ends when its parent does."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Lets this process, started by `multiprocessing`, end when its parent does, however that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
