"""What the page and the guard in front of it share."""

from dataclasses import dataclass

from serving.decoding import Reducer
from serving.line import Line
from serving.visitors import Images, Visitors


@dataclass(frozen=True)
class Site:
    visitors: Visitors
    images: Images
    line: Line
    reducer: Reducer


def make_site(folder: str, side: int) -> Site:
    """folder: what the names of images begin with; side: of the square that the model sees, in pixels."""
    visitors = Visitors()
    return Site(visitors, Images(folder), Line(visitors), Reducer(side))
