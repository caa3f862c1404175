"""Writing one directory with several processes, which succeed together or fail together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxdecode.checkpoint.atomic import hidden_directory, new_directory, write_error
from jaxdecode.checkpoint.files import shown
from jaxdecode.errors import CheckpointError, DecodeError
from jaxdecode.models.sharding import Sharding
from jaxdecode.processes import gather_texts, random_seed, ranks


class JointSave:
    """The steps in which the processes of a mesh save to one path; one alone takes them too.

    All enter the same steps in the same order. The first failure is told to all and ends the save
    in each, so nobody waits for a process that has given up.

    Attributes:
      leader: the process that does what only one may do.
      leads: whether this is that process.
    """

    def __init__(self, path: Path, sharding: Sharding):
        self.leader, own = ranks(sharding)
        self.leads = own == self.leader
        self._path = path
        self._sharding = sharding
        self._over = False

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A block that is left once all processes have left theirs.

        Raises:
          CheckpointError: it failed in another process; what fails in this one is passed on.
        """
        try:
            yield
        except BaseException as error:
            self._agree(self._words(error))
            raise
        self._agree("")

    def _agree(self, failure: str) -> None:
        if self._over:
            return
        # An interruption in here leaves nothing to agree on either.
        self._over = True
        said = gather_texts(self._sharding, failure)
        failed = [process for process in sorted(said) if said[process]]
        self._over = bool(failed)
        if failed and not failure:
            first = failed[0]
            where = "" if first == self.leader else f"process {first}: "
            raise CheckpointError(f"{where}{said[first]}")

    def _words(self, error: BaseException) -> str:
        if isinstance(error, DecodeError):
            return str(error)
        if isinstance(error, OSError):
            return str(write_error(self._path, error))
        said = [f": {shown(line)}" for line in str(error).strip().splitlines()[-1:]]
        return "".join([f"{self._path} was not saved: {type(error).__name__}", *said])

    @contextlib.contextmanager
    def new_directory(self, num_bytes: int) -> Iterator[Path]:
        """As `atomic.new_directory`: the leader makes it, for all to fill, and names it at the end.

        Raises:
          CheckpointError: as there; or a process does not see what the leader made.
        """
        directory = hidden_directory(self._path, random_seed(self._sharding))
        with self.step(), contextlib.ExitStack() as stack:
            with self.step():
                if self.leads:
                    stack.enter_context(new_directory(self._path, num_bytes, directory))
            with self.step():
                if not _is_seen(directory):
                    raise CheckpointError(
                        f"{self._path}: the directory that process {self.leader} made there is not "
                        "to be seen in every process; give all the same path, on a file system "
                        "that their hosts share"
                    )
            yield directory


def _is_seen(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return directory.is_dir()
    return False
