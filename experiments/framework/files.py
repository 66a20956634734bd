"""The one name under which this suite writes files: whole or not at all."""

from pathlib import Path

try:
    from cats.files import write_bytes_atomically, write_text_atomically
except ImportError:  # until cats/files.py is here
    import os
    import tempfile

    from cats.calibration import write_text_atomically

    def write_bytes_atomically(path: str | Path, content: bytes) -> None:
        """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


__all__ = ["write_bytes_atomically", "write_text_atomically"]
