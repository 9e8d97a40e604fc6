"""What page, programs and the guard in front of them share."""

from dataclasses import dataclass

from model.chat import Chat
from model.generate import Sampling
from serving.decoding import Reducer
from serving.engine import Engine
from serving.visitors import Images, Visitors


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

    def close(self) -> None:
        self.reducer.close()
        self.engine.close()


def make_site(folder: str, chat: Chat, defaults: Defaults) -> Site:
    """folder: what the names of images begin with."""
    return Site(Visitors(), Images(folder), Engine(chat), Reducer(chat.image_processor.size), defaults)
