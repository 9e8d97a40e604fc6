"""What page, programs and the guard in front of them share."""

from dataclasses import dataclass

from model.chat import Chat
from model.generate import Sampling
from serving.decoding import Reducer
from serving.engine import Engine
from serving.visitors import Images, Visitors

MOST_FILE = 20 << 20  # bytes of an image that a visitor sends


@dataclass(frozen=True)
class Defaults:
    """What holds where a visitor says nothing else.

    model       the name that answers are given under
    max_rounds  see Chat.recall()
    """

    model: str
    sampling: Sampling = Sampling()
    max_rounds: int = 0


@dataclass(frozen=True)
class Site:
    visitors: Visitors
    images: Images
    engine: Engine
    reducer: Reducer
    defaults: Defaults
    most_file: int = MOST_FILE

    def close(self) -> None:
        self.reducer.close()
        self.engine.close()


def make_site(
    folder: str,
    chat: Chat,
    defaults: Defaults,
    most_waiting: int | None = None,
    most_file: int = MOST_FILE,
) -> Site:
    """folder: what the names of images begin with; most_waiting: see Engine."""
    engine, reducer = Engine(chat, most_waiting=most_waiting), Reducer(chat.image_processor.size)
    return Site(Visitors(), Images(folder), engine, reducer, defaults, most_file)
