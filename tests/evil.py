"""What somebody could put into a file that is read as a pickle."""

import os
from pathlib import Path


class Evil:
    """Makes the folder `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)
