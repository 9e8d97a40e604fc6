"""--feature_cache: CLIP looks at every distinct image once, before training, on all ranks together."""

import argparse
import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from model.data.dataset import CONTENT, VLMDataset
from model.data.feature_store import FeatureStore, image_key, image_keys, store_name
from model.data.steady import LostFile
from model.data.video import Frame, file_of, load_images
from model.locks import try_lock
from model.vision_utils import ImageProcessor, get_img_embedding, num_image_tokens
from trainer.distributed import Run
from trainer.interrupt import ignore_interrupts
from trainer.logger import progress_bar
from trainer.script import AgreedError

BATCH = 32  # images per call of CLIP
SEGMENT = 512  # images per file, and the most that a killed run loses
LARGEST_HALF = 65504  # the largest number of float16


def fill_feature_cache(
    run: Run,
    args: argparse.Namespace,
    datasets: Iterable[VLMDataset],
    vision_model: nn.Module,
    image_processor: ImageProcessor,
) -> FeatureStore:
    """The store in args.feature_cache with the features of every image that the datasets name.

    Only those are encoded that are not there yet. CLIP computes in float32 whatever --dtype says, so that one
    cache serves all runs. Images that cannot be read are passed over: their rows are bad samples in
    training, cache or not.
    raises  ValueError before anything is written if the disk lacks room, or for features that are not finite;
            OSError if the disk runs full
    """
    folder = Path(args.feature_cache) / store_name(vision_model, image_processor, args.feature_dtype)
    with exclusive(run, folder) as is_alone:
        store = FeatureStore(folder, args.feature_dtype)
        clean(run, store, is_alone)
        wanted = find_missing(run, store, datasets)
        if wanted:
            print_size(run, args, store, len(wanted), vision_model)
            vision_model.to(run.device)
            encode_all(run, args, store, wanted, vision_model, image_processor)
            store.reload()
    check_shared(run, store)
    return store


@contextlib.contextmanager
def exclusive(run: Run, folder: Path) -> Iterator[bool]:
    """Let only one run fill a store; another waits, and finds what the first has made. Where nothing can be
    written or locked, nobody waits. Yields whether all others are certainly kept out."""
    with contextlib.ExitStack() as stack:
        file = None
        if run.is_main:
            with contextlib.suppress(OSError):  # where nothing can be written, print_size() says so
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(folder / ".lock", "wb"))

        def try_it() -> tuple[bool, bool]:
            """Need nobody wait? And is the lock held?"""
            try:
                is_held = file is not None and try_lock(file)
                return file is None or is_held, is_held
            except OSError:
                return True, False

        is_waiting = False
        while not (answer := run.from_main(try_it))[0]:  # asked again and again: no rank waits for long
            if not is_waiting:
                run.print(f"another run is filling {folder}: waiting for it")
            is_waiting = True
            time.sleep(1)
        yield answer[1]


def clean(run: Run, store: FeatureStore, is_alone: bool) -> None:
    """Report what is damaged, and remove it with what killed runs left half-written, so that its images are
    encoded anew."""
    for path, reason in store.damaged.items():
        run.print(f"{path} is not what was written ({reason}): its images are encoded anew")
    if not run.is_main or not is_alone:
        return
    whole = {segment.path for segment in store.segments}
    for path in (*store.damaged, *store.folder.glob(".*.tmp"), *store.folder.glob("*.features.npy")):
        if path not in whole:
            with contextlib.suppress(OSError):  # a cache that can only be read
                path.unlink()


def images_of(dataset: VLMDataset) -> set[Path | Frame]:
    """The images and the frames of videos of all rows that can be used."""
    images = set()
    for position in range(len(dataset)):
        try:
            images.update(dataset.expand(position)[0])
        except LostFile:
            raise
        except CONTENT:
            continue  # the dataset reports it, with file and row
    return images


def find_missing(
    run: Run, store: FeatureStore, datasets: Iterable[VLMDataset]
) -> list[tuple[bytes, Path | Frame]]:
    """(key, image) of every distinct image that the store lacks, in one order on all ranks. Each rank
    reads its share of the files."""
    images = sorted(set().union(*(images_of(dataset) for dataset in datasets)), key=str)
    files = [list(group) for _, group in groupby(images, key=file_of)][run.rank :: run.world_size]
    missing = {}
    for group in progress_bar(files, disable=not run.is_main, unit="image", desc="looking for features"):
        try:
            keys = image_keys(group)
        except LostFile:
            raise
        except CONTENT:
            continue
        missing |= {key.tobytes(): image for key, image in zip(keys, group, strict=True) if key not in store}
    everywhere = {key: image for part in run.share(missing) for key, image in part.items()}
    return sorted(everywhere.items())


def print_size(
    run: Run, args: argparse.Namespace, store: FeatureStore, count: int, vision_model: nn.Module
) -> None:
    """Say how much will be written; raise ValueError if there is no room for it."""
    values = num_image_tokens(vision_model) * vision_model.config.hidden_size
    size = count * values * store.dtype.itemsize
    store.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.folder).free
    run.print(
        f"feature cache {store.folder}: {len(store)} images are there, {count} to encode, "
        f"{size / 1e6:,.1f} MB to write ({free / 1e6:,.0f} MB free)"
    )
    if size > free:
        raise ValueError(
            f"the feature cache needs {size / 1e6:,.1f} MB for {count} images, but only "
            f"{free / 1e6:,.1f} MB are free at {args.feature_cache}: make room, name another "
            "disk with --feature_cache, or train without it"
        )


class Images(Dataset):
    """Images to pixels; None for one that cannot be read, or is no longer what its key says. A data file that
    was changed while images were read from it comes out as its LostFile's text."""

    def __init__(self, wanted: list[tuple[bytes, Path | Frame]], image_processor: ImageProcessor):
        self.wanted, self.image_processor = wanted, image_processor

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, position: int) -> tuple[bytes, Tensor] | str | None:
        key, image = self.wanted[position]
        try:
            (pixels,) = load_images([image], self.image_processor)
            return (key, pixels) if image_key(image).tobytes() == key else None
        except LostFile as error:
            return str(error)
        except CONTENT:
            return None


def only_good(
    samples: list[tuple[bytes, Tensor] | str | None],
) -> tuple[list[bytes], Tensor | None, str]:
    """Keys and pixels of the images that could be read, and why the run must end, "" if it need not."""
    good = [sample for sample in samples if isinstance(sample, tuple)]
    problem = next((sample for sample in samples if isinstance(sample, str)), "")
    return [key for key, _ in good], torch.stack([pixels for _, pixels in good]) if good else None, problem


def encode_all(
    run: Run,
    args: argparse.Namespace,
    store: FeatureStore,
    wanted: list[tuple[bytes, Path | Frame]],
    vision_model: nn.Module,
    image_processor: ImageProcessor,
) -> None:
    """Encode this rank's share of the images and write it, segment by segment, all ranks in step."""
    share, most = wanted[run.rank :: run.world_size], len(wanted[:: run.world_size])
    # As many rounds on every rank, though the last shares may be smaller by one image.
    ends = [(start, min(start + SEGMENT, len(share))) for start in range(0, most, SEGMENT)]
    rounds = [
        [range(first, min(first + BATCH, end)) for first in range(start, end, BATCH)] for start, end in ends
    ]
    loader = iter(
        DataLoader(
            Images(share, image_processor),
            batch_sampler=sum(rounds, []),
            collate_fn=only_good,
            num_workers=args.num_workers,
            worker_init_fn=ignore_interrupts,
        )
    )
    names = dict(share)
    bar = progress_bar(total=len(share), disable=not run.is_main, unit="image", desc="encoding images")
    written = torch.zeros(1, dtype=torch.long)
    for batches in rounds:
        keys, features, problem = [], [], ""
        try:
            for batch in batches:
                good, pixels, problem = next_batch(loader)
                if problem:
                    raise ValueError(problem)
                if good:
                    encoded = get_img_embedding(pixels.to(run.device), vision_model).cpu().numpy()
                    check_finite(encoded, [names[key] for key in good], store.dtype)
                    keys += good
                    features.append(encoded)
                bar.update(len(batch))
            if keys:
                store.add(np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2), np.concatenate(features))
                written += len(keys)
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.strerror or error}: make room"
        problems = [text for text in run.share(problem) if text]
        if problems:  # on every rank, or the others would wait for this one
            bar.close()
            raise AgreedError(
                f"{problems[0]}. {int(run.sum(written))} of {len(wanted)} images are encoded and need not be "
                "again: start the same command once this is mended, or train without --feature_cache"
            )
    bar.close()


def next_batch(loader: Iterator) -> tuple[list[bytes], Tensor | None, str]:
    try:
        return next(loader)
    except (RuntimeError, OSError, EOFError) as error:  # as PyTorch reports that a worker is dead
        reason = str(error).splitlines()[0][:300]
        return [], None, f"a process that loads images for the feature cache died ({reason})"


def check_finite(features: np.ndarray, images: list[Path | Frame], dtype: np.dtype) -> None:
    """Raise ValueError, naming the first image whose features the cache could not hold."""
    for image, values in zip(images, features, strict=True):
        if not np.isfinite(values).all():
            raise ValueError(f"CLIP's features of {image} are not finite: its weights are damaged")
        if dtype == np.float16 and (most := np.abs(values).max()) > LARGEST_HALF:
            raise ValueError(
                f"CLIP's features of {image} reach {most:.3g}, but float16 ends at {LARGEST_HALF}: "
                "give --feature_dtype float32"
            )


def check_shared(run: Run, store: FeatureStore) -> None:
    """Raise ValueError unless every rank sees the same images."""
    counts = run.share(len(store))
    if len(set(counts)) > 1:
        raise ValueError(
            f"the processes of this run see different feature caches ({min(counts)} to "
            f"{max(counts)} images): --feature_cache must name a folder that all share"
        )
