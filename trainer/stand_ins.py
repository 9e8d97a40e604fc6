"""Whose images stand in for a row's own, where it is measured what those are worth."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from model.data.batch import BadSample
from model.data.dataset import CONTENT, VLMDataset


class Numbered(Subset):
    """A data set, or a part of one, whose samples say which they are: {"place": ...}."""

    def __init__(self, data: Dataset):
        if isinstance(data, Subset):
            super().__init__(data.dataset, data.indices)
        else:
            super().__init__(data, range(len(data)))

    def __getitem__(self, place: int) -> dict[str, Tensor] | BadSample:
        sample = super().__getitem__(place)
        return sample if isinstance(sample, BadSample) else sample | {"place": place}

    def __getitems__(self, places: list[int]) -> list:  # PyTorch insists on both
        return [self[place] for place in places]

    def row(self, place: int) -> int:
        """Its position in the data file."""
        return int(self.indices[place])

    def shown(self) -> list[list[int]]:
        """What each row shows, as numbers that are equal for the same file; [] for a row that shows nothing,
        or is malformed. Opens no images."""
        return [show_names(self.dataset, self.row(place)) for place in range(len(self))]


def show_names(dataset: VLMDataset, position: int) -> list[int]:
    try:
        return [hash(name) for name in dataset.check(dataset.rows[position])[0]]
    except CONTENT:
        return []  # it is reported where it is loaded


def find_stand_ins(shown: Sequence[Sequence[Hashable]], seed: int) -> dict[int, int]:
    """For each row that shows something another one, whose images the model will be given for it.

    shown    what each row shows, in any form that says whether two are the same
    returns  row -> row, a derangement drawn from the seed. Rows that show as many images are each other's as
             far as that goes, and no row is given one that shows an image of its own: where that leaves no
             derangement, a row stands in twice, and one that differs from no other has no entry. Most rows
             follow in the dictionary on the row that they stand in for.
    """
    generator = torch.Generator().manual_seed(seed)
    order = [row for row in torch.randperm(len(shown), generator=generator).tolist() if shown[row]]
    order.sort(key=lambda row: len(shown[row]))  # stable: still at random among those with as many images
    found = dict(zip(order, order[1:] + order[:1], strict=True))

    def differ(row: int, other: int) -> bool:
        return not set(shown[row]) & set(shown[other])

    for place, row in enumerate(order):
        if differ(row, found[row]):
            continue
        rest = order[place + 1 :] + order[:place]
        for other in rest:  # two rows exchange what they are given
            if differ(row, found[other]) and differ(other, found[row]):
                found[row], found[other] = found[other], found[row]
                break
        else:
            found[row] = next((other for other in rest if differ(row, other)), row)
    return {row: other for row, other in found.items() if other != row}


def resample(features: Tensor, count: int) -> Tensor:
    """As many images as a row has place for, (count, N, V): each of the stand-in's (n, N, V) again, or every
    second one, if it shows fewer or more."""
    return features[torch.arange(count) * len(features) // count]
