"""Files of the Hugging Face hub: what it has, one transfer, and whether what came is what was meant.

huggingface_hub asks and transfers. Its hf_hub_download() throws away what a process leaves unfinished (in its
version 2.4; each process has a file of its own, removed at the end), so this calls http_get() below it, which
goes on from any byte, and keeps the unfinished part itself.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from model.download_table import COMMIT, SHA256, Download, Repository, Source, leads_out
from model.files import describe_placeholder_file, find_cause, sync_folder
from model.locks import claimed
from model.printable import one_line

HUB = "https://huggingface.co"
CURE = "try another mirror (HF_ENDPOINT, see --help)"
NO_HUB = "does not answer as a hub does (a page that wants a login first?)"
CHUNK = 1 << 20  # bytes; what a cut connection costs at most
NOT_MEANT = re.compile(r"(^|/)\.|^README")  # in a pattern, as for the shell


@dataclass(eq=False)
class Target:
    """A file that should be there.

    name      in the repository
    path      where it should be
    size      bytes, None while unknown
    sha256    of its content, git_sha1: what the hub names for small files; "" while unknown
    """

    download: Download
    source: Source
    name: str
    path: Path
    size: int | None
    sha256: str
    git_sha1: str = ""
    url: str = field(default="", repr=False)

    @property
    def part(self) -> Path:
        """What has been transferred of this very content, and of no other."""
        return self.path.with_name(f"{self.path.name}.{(self.sha256 or self.git_sha1)[:8] or 'any'}.part")

    @property
    def arrived(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB


@contextlib.contextmanager
def explaining(what: str, repository: Repository) -> Iterator[None]:
    """One line for whatever the library raises: ValueError for a file that cannot be had, ConnectionError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"{what} of {repository.id} at {repository.revision[:12]}"
    try:
        yield
    except OfflineModeIsEnabled:
        raise ConnectionError("HF_HUB_OFFLINE forbids to ask the hub: unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            reason = "does not have" if status == 404 else "does not give everyone"
            raise ValueError(f"{endpoint()} {reason} {where} (status {status}): {CURE}") from None
        raise ConnectionError(
            f"{endpoint()} answers with status {status}: run this again later, or {CURE}"
        ) from None
    except json.JSONDecodeError:
        raise ValueError(f"{endpoint()} {NO_HUB}: {CURE}") from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the HTTP library, which is another one in each version of huggingface_hub
        if os.environ.get("MINIMIND_DEBUG"):
            raise
        raise ConnectionError(
            f"{endpoint()} is out of reach ({one_line(find_cause(error))}): look at the network and run this "
            f"again, or {CURE}; what has been transferred is kept"
        ) from None


# ---- what it has -------------------------------------------------------------------------------------------


def list_targets(download: Download, root: Path) -> list[Target]:
    """All files of a download, under `root`; for patterns the hub is asked which there are. Raises ValueError
    or ConnectionError."""
    targets = []
    for source in download.files:
        if source.is_pattern:
            targets += match_pattern(download, source, root)
        else:
            path = root / download.place / source.name
            targets.append(Target(download, source, source.name, path, source.size, source.sha256))
    if not targets:
        raise ValueError(f"{endpoint()} has none of the files of {download.name}: {CURE}")
    return targets


def match_pattern(download: Download, source: Source, root: Path) -> list[Target]:
    from huggingface_hub import HfApi

    repository, folder = download.repository, source.name.rpartition("/")[0] or None
    with explaining(source.name, repository):
        tree = HfApi(endpoint=endpoint(), token=False).list_repo_tree(
            repository.id, folder, recursive=True, revision=repository.revision, repo_type=repository.kind
        )
        files = [entry for entry in tree if hasattr(entry, "blob_id")]  # the others are folders
    targets = []
    for file in files:
        if fnmatch(file.path, source.name) and not NOT_MEANT.search(file.path):
            if leads_out(file.path):
                raise ValueError(f"{repository.id} names a file outside of its folder: {one_line(file.path)}")
            sha256, git_sha1 = (file.lfs.sha256, "") if file.lfs else ("", file.blob_id)
            path = root / download.place / file.path
            targets.append(Target(download, source, file.path, path, file.size, sha256, git_sha1))
    return targets


def ask(target: Target) -> None:
    """Take over what the hub says of a file: its address and what is not yet known of size and checksum.
    Raises ValueError where it has another file than is meant, or ConnectionError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    repository = target.download.repository
    target.url = hf_hub_url(
        repository.id,
        target.name,
        repo_type=repository.kind,
        revision=repository.revision,
        endpoint=endpoint(),
    )
    with explaining(target.name, repository):
        offer = get_hf_file_metadata(target.url, token=False, endpoint=endpoint())
    etag, commit = offer.etag or "", offer.commit_hash or ""
    wrong = ""
    if not etag or not commit:
        wrong = NO_HUB
    elif COMMIT.fullmatch(repository.revision) and commit != repository.revision:
        wrong = f"answers with commit {one_line(commit, 12)}, not {repository.revision[:12]}..."
    elif None not in (target.size, offer.size) and target.size != offer.size:
        wrong = f"has {offer.size:,} bytes there, not {target.size:,}"
    elif target.sha256 and SHA256.fullmatch(etag) and etag != target.sha256:
        wrong = f"has a file of SHA-256 {etag[:12]}... there, not {target.sha256[:12]}..."
    if wrong:
        raise ValueError(
            f"{target.name} of {repository.id}: {endpoint()} {wrong}; it was not transferred: {CURE}"
        )
    target.size = offer.size if target.size is None else target.size
    if not target.sha256:
        target.sha256 = etag if SHA256.fullmatch(etag) else ""
        target.git_sha1 = etag if COMMIT.fullmatch(etag) else ""


# ---- the transfer ------------------------------------------------------------------------------------------


def transfer(target: Target) -> None:
    """Bring a file that ask() has asked for, from where an earlier call left off, and put it into its place
    once it is right.

    raises  ValueError for a wrong file, which is kept aside, or while another process brings it;
            ConnectionError, and OSError where it cannot be written: what has arrived is kept
    """
    target.path.parent.mkdir(parents=True, exist_ok=True)
    with claimed(target.path, "wait for its end"):
        if target.size is None or target.arrived > target.size:
            target.part.unlink(missing_ok=True)
        cut = receive(target)
        wrong = find_wrong(target.part, target)
        if not wrong:
            os.replace(target.part, target.path)
            sync_folder(target.path.parent)
            return
        if cut and not describe_placeholder_file(target.part):
            raise ConnectionError(
                f"{endpoint()} sent {target.arrived:,} of {target.size:,} bytes of {target.name}: run this "
                f"again to go on from there, or {CURE}"
            )
        aside = set_aside(target.part, target.path)
        raise ValueError(
            f"what {endpoint()} sent for {target.path} {wrong}; it is kept aside as {aside.name}: "
            f"run this again, and if the same comes, {CURE}"
        )


def receive(target: Target) -> bool:
    """Append what is missing to target.part; did it end too early?"""
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, logging

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK  # the library's 10 MiB never arrive where a line is cut each minute
    logging.set_verbosity_error()  # it goes on by itself after a cut; what it cannot cure is reported here
    try:
        with explaining(target.name, target.download.repository), open(target.part, "ab") as file:
            http_get(
                target.url,
                file,
                resume_size=target.arrived,
                # All of it is public; and what is compressed on the way cannot go on at a byte.
                headers=build_hf_headers(token=False) | {"Accept-Encoding": "identity"},
                expected_size=target.size,
                displayed_filename=target.name,
            )
            file.flush()
            os.fsync(file.fileno())
    except ConnectionError:
        raise
    except OSError as error:
        if error.errno is None:  # the library's word for more or fewer bytes than announced
            return target.arrived < (target.size or 0)
        raise OSError(
            f"cannot write {target.part}: {error.strerror}; what has arrived is kept: make room and "
            "run this again"
        ) from None
    return False


def find_wrong(path: Path, target: Target) -> str:
    """How a file differs from what is meant, in words; "" if in nothing that is known of it."""
    size = path.stat().st_size
    if target.size != 0 and (words := describe_placeholder_file(path)):
        return words
    if target.size is not None and size != target.size:
        return f"has {size:,} bytes, not {target.size:,}"
    if target.sha256:
        found, meant = digest_of(path, hashlib.sha256()), target.sha256
    else:  # as git does it
        found, meant = digest_of(path, hashlib.sha1(f"blob {size}\0".encode())), target.git_sha1 or ""
    return "" if found == meant or not meant else f"has the checksum {found[:12]}..., not {meant[:12]}..."


def digest_of(path: Path, digest) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def set_aside(path: Path, meant: Path) -> Path:
    """Under the name NAME.wrong, where no script looks."""
    aside = meant.with_name(f"{meant.name}.wrong")
    os.replace(path, aside)
    return aside
