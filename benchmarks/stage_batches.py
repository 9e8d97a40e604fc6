"""Batches of a stage as its loader makes them, from data made on the spot."""

import time
from itertools import islice
from pathlib import Path

import torch

from benchmarks.synthetic import Shape, save_data
from model.data.batch import collate
from model.data.dataset import VLMDataset
from model.data.feature_store import FeatureStore, image_keys
from model.data.spec import DatasetSpec
from model.LMConfig import LMConfig
from model.prompt import Renderer
from model.vision_utils import ImageProcessor
from trainer.batches import GlobalBatches
from trainer.distributed import Run

NUM_BATCHES = 4  # that the steps take in turns
Batches = dict[tuple[bool, bool], list[dict]]  # by (bucketed, cached)


def make_batches(folder: Path, shape: Shape, spec: DatasetSpec, config: LMConfig, tokenizer, size: int):
    """The first batches of an epoch, of `size` rows each.

    returns  Batches; every batch also has the seconds that it took
    """
    rows = save_data(folder, shape, 50 * size, 4 * size, tokenizer)
    renderer = Renderer(tokenizer, config.num_image_tokens, config.max_seq_len)
    dataset = VLMDataset(rows, spec, renderer, folder, ImageProcessor())
    batches: Batches = {}
    for cached in (False, True):
        if cached:
            dataset.feature_store = fill_store(folder, config)
        for bucketed in (False, True):
            batches[bucketed, cached] = load(dataset, bucketed, size)
    return batches


def load(dataset: VLMDataset, bucketed: bool, size: int) -> list[dict]:
    lengths = dataset.lengths() if bucketed else None
    order = GlobalBatches(len(dataset), size, Run(0, 1, torch.device("cpu")), seed=0, lengths=lengths)
    batches = []
    for samples in islice(order, NUM_BATCHES):
        start = time.perf_counter()
        batch = collate([dataset[sample] for sample in samples])
        batches.append(batch | {"seconds": time.perf_counter() - start})
        assert not batch["bad_samples"], batch["bad_samples"][0]
    return batches


def fill_store(folder: Path, config: LMConfig) -> FeatureStore:
    """Made-up features of all images: reading them takes as long as reading true ones."""
    images = sorted(folder.glob("*.jpg"))
    features = torch.randn(len(images), config.num_image_tokens, config.vision_dim)
    store = FeatureStore(folder / "features")
    store.add(
        torch.stack([torch.from_numpy(key.copy()) for key in image_keys(images)]).numpy(), features.numpy()
    )
    store.reload()
    return store
