"""The one name under which this suite writes files: whole or not at all. Free of torch, for the reports' sake."""

from cats.files import write_bytes_atomically, write_text_atomically

__all__ = ["write_bytes_atomically", "write_text_atomically"]
