"""The one name under which this suite writes files: whole or not at all. Free of torch, for the reports' sake."""

try:
    from cats.files import write_bytes_atomically, write_text_atomically
except ImportError:  # until cats/files.py is here
    import os
    import tempfile
    from pathlib import Path

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

    def write_text_atomically(path: str | Path, text: str) -> None:
        """`write_bytes_atomically` of ``text`` in UTF-8."""
        write_bytes_atomically(path, text.encode())


__all__ = ["write_bytes_atomically", "write_text_atomically"]
