"""The model behind terminal, page and programs: it answers many people at once, each as if alone.

    engine = Engine(load_chat("out/512_vlm_sft.pth"))
    answer = engine.submit([{"from": "human", "value": "<image>\\nWhat is this?"}], ["a.jpg"])
    for piece in answer:                     # or, on an event loop: async for ... in answer.events()
        print(piece, end="", flush=True)
    answer.stop()                            # at any token; what was in the making is dropped

One thread runs the model, in steps: a step reads one image or one prompt, then makes one token of every
answer under way, all in one batch. Questions are read in the order in which they came. Where more answers are
under way than a batch is worth on this machine, they take turns in it: nobody waits for a long one.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from model.chat import Chat, Shown
from model.data.video import open_images
from model.decode import Decoder, KVCache
from model.generate import Sampling, StopWords, TextStreamer, TokenSampler, check_prompts, read_prompts
from model.vision_proj import check_each_row
from serving.answer import AlreadyWaiting, Answer, LineFull

MOST_WAITING = 100
MOST_ROWS = {"cpu": 16, "cuda": 64, "mps": 16}  # answers in a batch
WORTH = 1.15  # a larger batch has to make so many times the tokens a second
TURN = 32  # tokens, after which an answer lets another one into the batch
STARTED = 2  # times as many answers are under way at once; the others wait in the line
CLOSING = 10  # seconds for the step under way
ROOM = 32  # steps until a cache is copied into a larger one


class Row:
    """An answer, as the model's thread sees it: its images and its prompt are read, then it has a row in a
    cache."""

    def __init__(self, chat: Chat, answer: Answer, images: Sequence[Shown], stop: tuple[str, ...]):
        self.chat, self.answer, self.images = chat, answer, open_images(images)
        self.features: list[torch.Tensor] = []
        self.streamer, self.stop_words = TextStreamer(chat.tokenizer), StopWords(stop)
        limit = chat.decoder.config.max_seq_len - answer.num_prompt_tokens
        self.most_tokens = min(answer.sampling.max_new_tokens, limit)
        self.turn = 0  # tokens since it came into the batch
        self.cache: KVCache | None = None
        self.place = 0  # in the cache

    def read(self) -> torch.Tensor | None:
        """One image, or the prompt when all are read: then the logits of the first token, (1, V)."""
        chat = self.chat
        if image := next(self.images, None):
            self.features.append(chat.encode([image]))
            return None
        features = torch.cat(self.features) if self.features else chat.encode([])
        sampling = self.answer.sampling
        input_ids, lengths, logits, self.cache = read_prompts(
            chat.decoder, [self.answer.prompt], ROOM, [features]
        )
        self.sampler = TokenSampler(sampling, input_ids, lengths, chat.decoder.config.vocab_size)
        self.features = []
        return logits

    def take(self, token: int) -> tuple[str, str]:
        """What a token adds to the answer: a text, and why it ends with it, or ""."""
        answer, text, reason = self.answer, "", ""
        if token == self.chat.tokenizer.eos_token_id:
            reason = "stop"
        else:
            self.next_id = token
            self.turn += 1
            answer.num_tokens += 1
            text = self.stop_words.push(self.streamer.push(token))
            if answer.num_tokens == self.most_tokens:
                reason = "length"
        if reason and not self.stop_words.found:
            text += self.stop_words.push(self.streamer.finish()) + self.stop_words.finish()
        return text, "stop" if self.stop_words.found else reason


class Engine:
    """See above. All its methods may be called from any thread.

    together      answers in a batch; None: what is fastest on this machine, timed at once (under a second)
    most_waiting  in the line; more are refused
    """

    def __init__(self, chat: Chat, together: int | None = None, most_waiting: int | None = None):
        self.chat = chat
        self.together = together or choose_together(chat.decoder)
        self.most_started = STARTED * self.together
        self.most_waiting = MOST_WAITING if most_waiting is None else most_waiting
        self.changed = threading.Condition()
        self.line: deque[Row] = deque()  # not begun
        self.reading: Row | None = None
        self.rows: list[Row] = []  # read; the first ones are in the batch
        self.is_closed = False
        self.thread = threading.Thread(target=self.work, name="model", daemon=True)
        self.thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({self.chat!r}, {self.together} together, {self.num_under_way} under way)"

    # ---- for those who ask ---------------------------------------------------------------------------------

    def submit(
        self,
        turns: list[dict],
        images: Sequence[Shown] = (),
        sampling: Sampling | None = None,
        stop: tuple[str, ...] = (),
        owner: str = "",
    ) -> Answer:
        """Ask a question, as Chat.stream() takes it; the answer is the same, whoever else asks.

        stop    words before which the answer ends
        owner   who asks; one question at a time ("" = nobody in particular, any number)
        raises  ValueError for a prompt that does not fit the context or its images, LineFull, AlreadyWaiting
        """
        prompt = self.chat.render(turns)
        check_prompts([prompt], self.chat.decoder.config.max_seq_len)
        check_each_row([len(prompt.image_slots)], [len(images)])
        answer = Answer(self, owner, prompt, sampling or Sampling())
        row = Row(self.chat, answer, images, stop)
        with self.changed:
            if self.is_closed:
                raise LineFull
            if owner and any(other.answer.owner == owner for other in self.all_rows()):
                raise AlreadyWaiting
            if len(self.line) >= self.most_waiting:
                raise LineFull
            self.line.append(row)
            self.changed.notify_all()
        return answer

    def stop(self, answer: Answer) -> None:
        """Whatever it is doing, the model does no more of it than the step under way."""
        with self.changed:
            if not answer.finish_reason:
                self.finish(answer, "stopped")

    def place_of(self, answer: Answer) -> int:
        with self.changed:
            return next((place for place, row in enumerate(self.line, 1) if row.answer is answer), 0)

    @property
    def num_under_way(self) -> int:
        """Answers that grow, are being read or wait."""
        with self.changed:
            return len(self.all_rows())

    @property
    def is_shared(self) -> bool:
        """Does more than one ask?"""
        return self.num_under_way > 1

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            for row in self.all_rows():
                self.finish(row.answer, "stopped")
            self.changed.notify_all()
        self.thread.join(CLOSING)

    def all_rows(self) -> list[Row]:
        return [*self.rows, *([self.reading] if self.reading else []), *self.line]

    def finish(self, answer: Answer, reason: str, error: Exception | None = None) -> None:
        answer.finish_reason, answer.error = reason, error
        self.line = deque(row for row in self.line if row.answer is not answer)
        self.rows = [row for row in self.rows if row.answer is not answer]
        if self.reading and self.reading.answer is answer:
            self.reading = None
        self.changed.notify_all()
        answer.wake()

    # ---- the model's thread --------------------------------------------------------------------------------

    def work(self) -> None:
        while self.make_step():
            pass  # nothing is held between two steps: an idle engine keeps no cache

    def make_step(self) -> bool:
        """Wait until there is something to do, and do a little of it; False: there never will be."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or self.all_rows())
            if self.is_closed:
                return False
            if not self.reading and self.line and len(self.rows) < self.most_started:
                self.reading = self.line.popleft()
            reading = self.reading
            batch = self.choose_batch()
        if reading:
            self.guarded(self.read, [reading])
        if batch:
            self.guarded(self.step, batch)
        return True

    def guarded(self, work: Callable[[list[Row]], None], rows: list[Row]) -> None:
        """What goes wrong ends these answers alone."""
        try:
            work(rows)
        except Exception as error:
            with self.changed:
                for row in rows:
                    if not row.answer.finish_reason:
                        self.finish(row.answer, "error", error)

    def choose_batch(self) -> list[Row]:
        """Whose turn it is: those who have had theirs go to the end while others wait for one."""
        if len(self.rows) > self.together:
            tired = [row for row in self.rows[: self.together] if row.turn >= TURN]
            self.rows = [row for row in self.rows if row not in tired] + tired
            for row in tired:
                row.turn = 0
        return self.rows[: self.together]

    def read(self, rows: list[Row]) -> None:
        (row,) = rows
        logits = row.read()
        if logits is None:
            return
        with self.changed:
            if row.answer.finish_reason:
                return
            self.reading = None
            self.rows.append(row)
        self.take([row], logits)

    def step(self, batch: list[Row]) -> None:
        cache = self.join(batch)
        next_ids = torch.tensor([row.next_id for row in batch], device=self.chat.decoder.device)
        self.take(batch, self.chat.decoder.step(next_ids, cache))

    def join(self, batch: list[Row]) -> KVCache:
        """One cache for these rows, in their order."""
        cache = batch[0].cache
        is_joined = all(row.cache is cache and row.place == place for place, row in enumerate(batch))
        if is_joined and len(cache.positions) == len(batch) and cache.room:
            return cache
        for row in self.paused(batch):  # a copy, so that the large cache it came from can go
            row.cache, row.place = KVCache.gather([(row.cache, row.place)], 0), 0
        joined = KVCache.gather([(row.cache, row.place) for row in batch], ROOM)
        for place, row in enumerate(batch):
            row.cache, row.place = joined, place
        return joined

    def paused(self, batch: list[Row]) -> list[Row]:
        """Those that have left the batch for a while."""
        with self.changed:
            return [row for row in self.rows if row not in batch and len(row.cache.positions) > 1]

    def take(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Choose the next token of each; logits (rows, V)."""
        likeliest = logits.float().argmax(-1).tolist()
        for place, row in enumerate(rows):
            sampling = row.answer.sampling
            is_plain = sampling.temperature == 0 and sampling.repetition_penalty == 1
            token = likeliest[place] if is_plain else int(row.sampler(logits[place : place + 1]))
            self.hand_over(row.answer, *row.take(token))

    def hand_over(self, answer: Answer, text: str, reason: str) -> None:
        with self.changed:
            if answer.finish_reason:  # nobody wants it any more
                return
            answer.last = time.monotonic()
            if math.isnan(answer.first):
                answer.first = answer.last
            if text:
                answer.pieces.append(text)
                self.changed.notify_all()
                answer.wake()
            if reason:
                self.finish(answer, reason)


def choose_together(decoder: Decoder) -> int:
    """How many answers are worth a batch on this machine: so many that more would make few tokens more."""
    length = min(100, decoder.config.max_seq_len // 2)
    ids = torch.ones(1, length, dtype=torch.long, device=decoder.device)
    _, cache = decoder.prefill(ids, torch.tensor([length], device=decoder.device), 0)
    sizes = [2**power for power in range(7) if 2**power <= MOST_ROWS.get(decoder.device.type, 16)]
    speeds = [size / seconds_per_step(decoder, cache, size) for size in sizes]
    return next(size for size, speed in zip(sizes, speeds, strict=True) if speed * WORTH >= max(speeds))


def seconds_per_step(decoder: Decoder, cache: KVCache, rows: int) -> float:
    """The shortest of a few, for so many copies of an answer. On a CPU seconds of the processor are counted,
    to which other programs add little."""
    is_fine = time.get_clock_info("process_time").resolution < 1e-4  # on Windows it is not
    clock = time.process_time if decoder.device.type == "cpu" and is_fine else time.perf_counter
    cache = KVCache.gather([(cache, 0)] * rows, 5)
    next_ids = torch.ones(rows, dtype=torch.long, device=decoder.device)
    seconds = math.inf
    for _ in range(5):
        start = clock()
        decoder.step(next_ids, cache).argmax(-1).tolist()  # waits for a GPU
        seconds = min(seconds, clock() - start)
    return seconds
