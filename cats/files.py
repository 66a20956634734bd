"""The one place where files are written: whole or not at all, regular files only. Needs neither torch nor numpy."""

import os
import stat
import tempfile
from pathlib import Path


def check_output(path: str | Path) -> Path:
    """Where a file that is to be written to ``path`` really goes: links are followed. Writes nothing.

    To be called before long work, so that a bad name is refused before it and not after. Folders that are missing are
    no error: writing makes them.

    Raises:
        OSError: one sentence about ``path``: it is a folder, a device, a FIFO or a socket, a part of it is a file, or
            it lies where nothing can be written.
    """
    path = Path(path)
    try:
        target = path.resolve()
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, RuntimeError) as error:  # links in a circle, a name that is too long
        raise _sentence(path, error) from error
    if mode is not None and stat.S_ISDIR(mode):
        raise OSError(f"{path} cannot be written: it is a folder, give the name of a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(f"{path} cannot be written: it is a device, a FIFO or a socket; give the name of a regular file")
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OSError(f"{path} cannot be written: {folder} is a file and not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{path} cannot be written: the folder {folder} allows no new files")
    return target


def write_bytes_atomically(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part.

    Folders are made, links are written through, and a file that is replaced keeps its permissions.

    Raises:
        OSError: as `check_output`, or the disk is full; ``path`` is then as it was.
    """
    path = Path(path)
    target = check_output(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:32]}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, _permissions(target))
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _sentence(path, error) from error
        raise


def write_text_atomically(path: str | Path, text: str) -> None:
    """`write_bytes_atomically` of ``text`` in UTF-8."""
    write_bytes_atomically(path, text.encode())


def _permissions(target: Path) -> int:
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sentence(path: Path, error: OSError | RuntimeError) -> OSError:
    """``error`` in terms of the name that the caller gave: the temporary name beside it says nothing to anybody."""
    sentence = OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")
    sentence.errno = getattr(error, "errno", None)
    return sentence
