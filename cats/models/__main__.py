"""Write a GGUF file as a directory that transformers and others load: ``python -m cats.models FILE.gguf DIRECTORY``.

The weights are dequantised (bfloat16 unless --dtype says otherwise). A machine with an older transformers, or without
the gguf package, can use the directory where it cannot use the file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cats.models import DTYPES, identity, load_model
from cats.models.from_directory import CONVERTED
from cats.models.from_gguf import LOADER


def convert(source: str, folder: Path, dtype: str = "auto") -> None:
    """Load the GGUF file ``source`` and save model, tokenizer and a note of where they come from in ``folder``.

    Raises:
        ValueError: ``source`` is not a GGUF file, or ``folder`` is not empty.
        OSError: as `load_model`.
    """
    if not LOADER.claims(source):
        raise ValueError(f"{source} is not a GGUF file: only such files are converted")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new directory")
    model, tokenizer = load_model(source, dtype)
    assert tokenizer is not None
    origin = identity(source)
    ((name, digest),) = origin["weights"].items()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="20GB")
    tokenizer.save_pretrained(folder)
    note = {"kind": origin["kind"], "file": name, "file_sha256": digest}
    (folder / CONVERTED).write_text(json.dumps(note, indent=2) + "\n")


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m cats.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="FILE.gguf")
    parser.add_argument("folder", metavar="DIRECTORY", type=Path)
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    arguments = parser.parse_args(words)
    try:
        convert(arguments.source, arguments.folder, arguments.dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
