"""A hub id, ``owner/name``."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from cats.models.from_directory import DirectoryLoader
from cats.models.loader import Origin


class HubLoader(DirectoryLoader):
    """The files of a directory, fetched from the hub or taken from the download cache."""

    order = 40
    example = "a hub id (owner/name)"

    def claims(self, spec: str) -> bool:
        looks_like_a_path = Path(spec).is_absolute() or spec.startswith((".", "~")) or spec.endswith(".gguf")
        return not looks_like_a_path and spec.count("/") <= 1

    def resolve(self, spec: str) -> str:
        return spec

    def origin(self, spec: str) -> Origin:
        """The cached copy's files; nothing is downloaded. Raises OSError when there is none."""
        try:
            folder = Path(snapshot_download(spec, local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise OSError(f"{spec} is not in the download cache: load it before asking where it comes from") from error
        return self.origin_of(folder, "hub", revision=folder.name)


LOADER = HubLoader()
