"""A conversation -> token ids, answer mask and image slots, in one pass. The only place that knows the chat
template:

    {system}<s>user\\n{question}</s>\\n<s>assistant\\n{answer}</s>\\n

Training, terminal, web page and evaluation all render here, so a prompt cannot drift.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from model.files import check_tokenizer_folder
from model.names import IMAGE_MARK, TOKENIZER_CURE, VIDEO_MARK
from model.tokenizer import Tokenizer, read_tokenizer
from model.vision_proj import PLACEHOLDER, placeholder_ids

MARK = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")
MAX_VOCABULARY = 1_000_000
MAX_TEXT = 500_000  # characters of a conversation: no context holds more, and a tokenizer takes seconds
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Prompt:
    """A rendered conversation; input_ids and answer_mask grow together, so no boundary is ever searched
    for."""

    input_ids: list[int] = field(default_factory=list)
    answer_mask: list[bool] = field(default_factory=list)  # True where the token belongs to an answer
    image_slots: list[list[int]] = field(default_factory=list)  # per image, the positions of its placeholder

    def add(self, ids: list[int], is_answer: bool = False) -> None:
        self.input_ids.extend(ids)
        self.answer_mask.extend([is_answer] * len(ids))

    def add_image(self, ids: list[int]) -> None:
        """ids: of its placeholder"""
        start = len(self.input_ids)
        self.image_slots.append(list(range(start, start + len(ids))))
        self.add(ids)

    def target_positions(self) -> list[int]:
        return [position for position, is_answer in enumerate(self.answer_mask) if is_answer]


@dataclass(frozen=True)
class Renderer:
    """Turns conversations into prompts for one tokenizer, one encoder and one context length."""

    tokenizer: object
    num_image_tokens: int = 50
    max_seq_len: int = 512
    placeholder: tuple[int, int] = PLACEHOLDER  # the two ids that an image's are made of

    def render(self, turns: list[dict]) -> Prompt:
        """Render turns, [{"from": "human", "value": ...}, ...], into ids.

        Every `<image>` mark in a user's text becomes one placeholder, inserted as ids: pasted as text after a
        space it would merge with the space and be lost. Each answer and its closing </s> are targets, nothing
        else is. Turns that end with the user's are a question: the prompt then ends where the answer begins.
        """
        bos, eos = [self.tokenizer.bos_token_id], [self.tokenizer.eos_token_id]
        prompt = Prompt()
        role = None
        for role, text in normalise_turns(turns):
            if role == "system":
                prompt.add(self.encode(text))
            elif role == "user":
                before, *after = f"user\n{text}".split(IMAGE_MARK)
                prompt.add(bos + self.encode(before))
                for part in after:
                    prompt.add_image(placeholder_ids(self.num_image_tokens, self.placeholder))
                    prompt.add(self.encode(part))
                prompt.add(eos + self.encode("\n"))
            else:
                prompt.add(bos + self.encode("assistant\n"))
                prompt.add(self.encode(text) + eos, is_answer=True)
                prompt.add(self.encode("\n"))
        if role == "user":
            prompt.add(bos + self.encode("assistant\n"))
        return prompt

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids. A user's "<s>" or "</s>" stays text: it can never open or close a turn."""
        return (
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            if text
            else []
        )

    def end_of(self, prompt: Prompt) -> int:
        """Where a training sample must be cut: after the last target that fits. Raises ValueError if an image
        or every answer would be lost, instead of training on what is left."""
        for number, slots in enumerate(prompt.image_slots, 1):
            if slots[-1] >= self.max_seq_len:
                raise ValueError(
                    f"the prompt is so long that image {number} would be cut at "
                    f"max_seq_len {self.max_seq_len}; "
                    f"shorten the text or raise --max_seq_len above {slots[-1] + 1}"
                )
        targets = prompt.target_positions()
        if not targets:
            raise ValueError("the conversation has no answer to learn")
        if targets[0] >= self.max_seq_len:
            raise ValueError(
                f"the answer begins at token {targets[0]} and is cut away by "
                f"max_seq_len {self.max_seq_len}; shorten the question or raise --max_seq_len"
            )
        return 1 + max(position for position in targets if position < self.max_seq_len)

    def frames_that_fit(self, prompt: Prompt, num_videos: int, most: int) -> int:
        """How many frames each video may bring, so that the prompt fits: at least 1, at most `most`.

        prompt  rendered with one frame for each of the videos; what must fit ends with the last target, or
                where there is none, with the prompt
        """
        targets = prompt.target_positions()
        room = self.max_seq_len - (targets[-1] + 1 if targets else len(prompt.input_ids))
        return max(1, min(most, 1 + room // (num_videos * self.num_image_tokens)))

    def check_context(self, max_images: int) -> None:
        """Raise ValueError if not even a row without words, of max_images images, has room for an answer."""
        wordless = [{"from": "human", "value": IMAGE_MARK * max_images}]
        needed = len(self.render(wordless).input_ids) + 1
        if needed > self.max_seq_len:
            raise ValueError(
                f"max_seq_len {self.max_seq_len} cannot hold {max_images} image(s) of "
                f"{self.num_image_tokens} tokens each: with an answer of one word that takes "
                f"{needed}; raise --max_seq_len to that and the length of the texts, or name an "
                "encoder of fewer tokens with --clip_path"
            )


def render_conversation(turns: list[dict], tokenizer, num_image_tokens: int = 50) -> Prompt:
    """Renderer.render() for whoever needs it once."""
    return Renderer(tokenizer, num_image_tokens).render(turns)


def load_tokenizer(path: str | Path, placeholder: tuple[int, int] | None = PLACEHOLDER) -> Tokenizer:
    """From a folder, checked. Raises FileNotFoundError or ValueError, naming the cure.

    placeholder  the ids that it must have for an image's placeholder; None: none yet, see
                 choose_placeholder()
    """
    path = Path(path)
    check_tokenizer_folder(path)
    try:
        tokenizer = read_tokenizer(path)
    except UnicodeEncodeError:
        raise ValueError(f"cannot read the tokenizer at {path}: that name is not UTF-8; rename it") from None
    except Exception as error:  # a broken tokenizer.json surfaces as any of half a dozen types
        raise ValueError(
            f"cannot read the tokenizer at {path} ({type(error).__name__}: {error}); {TOKENIZER_CURE}"
        ) from None
    check_tokenizer(tokenizer, path, placeholder)
    return tokenizer


def check_tokenizer(tokenizer, path: str | Path, placeholder: tuple[int, int] | None = PLACEHOLDER) -> None:
    """Raise ValueError unless it has the ids that the placeholder is made of (MiniMind's are those of "<" and
    ">"), and the specials are there."""
    found = tuple(tokenizer.convert_tokens_to_ids([token for token in "<>"]))
    if placeholder == PLACEHOLDER and found != PLACEHOLDER:
        raise ValueError(
            f'the tokenizer at {path} gives "<" and ">" the ids {found}, but the image '
            f"placeholder is made of {PLACEHOLDER[0]} and {PLACEHOLDER[1]} (MiniMind's); it cannot give "
            f"exactly 50 placeholder ids. {TOKENIZER_CURE}"
        )
    if placeholder and max(placeholder) >= len(tokenizer):
        raise ValueError(
            f"the tokenizer at {path} has {len(tokenizer):,} tokens, but an image's placeholder is made of "
            f"{placeholder[0]} and {placeholder[1]}: {TOKENIZER_CURE}"
        )
    if not len(tokenizer) <= MAX_VOCABULARY:
        raise ValueError(
            f"the tokenizer at {path} has {len(tokenizer):,} tokens, at most {MAX_VOCABULARY:,} are read; "
            f"{TOKENIZER_CURE}"
        )
    highest = max(tokenizer.backend_tokenizer.get_vocab().values(), default=0)
    if highest >= len(tokenizer):
        raise ValueError(
            f"the tokenizer at {path} has {len(tokenizer):,} tokens, but one of number {highest:,}: numbers "
            f"must have no gaps; {TOKENIZER_CURE}"
        )
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer at {path} names no bos_token or no eos_token; {TOKENIZER_CURE}")


def choose_placeholder(tokenizer, num_image_tokens: int = 50) -> tuple[int, int]:
    """The two ids of an image's placeholder: MiniMind's where the tokenizer is MiniMind's; "<" and ">" where
    no text makes a run of them, since they merge; else two special tokens that no text makes. Raises
    ValueError where there are none."""
    marks = tuple(tokenizer.convert_tokens_to_ids([*"<>"]))
    is_there = None not in marks and len({*marks, tokenizer.unk_token_id}) == 3
    if marks == PLACEHOLDER or (is_there and not can_type(tokenizer, marks, num_image_tokens)):
        return marks
    if len(spare := spare_tokens(tokenizer)) < 2:
        raise ValueError(
            'the tokenizer keeps a typed run of "<" and ">" as it is, and has no two special tokens to '
            "spare: an image's placeholder could be typed"
        )
    return spare[0], spare[1]


def can_type(tokenizer, placeholder: tuple[int, int], num_image_tokens: int) -> bool:
    """Does a text of so many "<" and ">", whatever stands around them, become an image's placeholder?"""
    run = placeholder_ids(num_image_tokens, placeholder)
    renderer, typed = Renderer(tokenizer), "<" * run.count(placeholder[0]) + ">" * run.count(placeholder[1])
    for before in ("", " ", "a", "\n", "<"):
        for after in ("", " ", "a", ">"):
            ids = renderer.encode(before + typed + after)
            if any(ids[start : start + len(run)] == run for start in range(len(ids))):
                return True
    return False


def spare_tokens(tokenizer) -> list[int]:
    """Ids of special tokens that neither text nor template makes, the unknown token last."""
    added, unknown = tokenizer.backend_tokenizer.get_added_tokens_decoder(), tokenizer.unk_token_id
    special = {number for number, token in added.items() if token.special}
    special -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    is_spare = unknown in special and knows_every_byte(tokenizer)
    return sorted(special - {unknown}) + [unknown] * is_spare


def knows_every_byte(tokenizer) -> bool:
    """Is there no text that it has to call unknown?"""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    spelling = json.dumps([parts["pre_tokenizer"], parts["normalizer"]])
    return bool(parts["model"].get("byte_fallback")) or '"ByteLevel"' in spelling


def normalise_turns(conversations: list[dict]) -> list[tuple[str, str]]:
    """[{"from": "human", "value": ...}] or [{"role": "user", "content": ...}] to (role, text). Raises
    ValueError."""
    turns, length = [], 0
    for turn in conversations:
        role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = text_of(turn)
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise ValueError(
                f'a turn must look like {{"from": "human" or "gpt", "value": "text"}}, not {str(turn)[:80]}'
            )
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError("a turn holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
        length += len(text) + 10  # the template's own part of a turn
        if length > MAX_TEXT:
            size = sum(len(text) for text in map(text_of, conversations) if isinstance(text, str))
            raise ValueError(
                f"its {len(conversations):,} turns have {size:,} characters: at most {MAX_TEXT:,} are read"
            )
        turns.append((ROLES[role], text))
    return turns


def text_of(turn: object) -> object:
    return turn.get("value", turn.get("content")) if isinstance(turn, dict) else None


def find_marks(texts: list[tuple[str, str]]) -> list[str]:
    """The marks in the users' texts, in reading order; texts: (role, text), from normalise_turns()."""
    return [mark for role, text in texts if role == "user" for mark in MARK.findall(text)]


def expand_marks(turns: list[dict], num_frames: list[int]) -> list[dict]:
    """The same turns with one image mark per frame in the place of each video's mark."""
    counts = iter(num_frames)
    return [
        {
            "from": role,
            "value": text
            if role != "user"
            else re.sub(VIDEO_MARK, lambda _: IMAGE_MARK * next(counts), text),
        }
        for role, text in normalise_turns(turns)
    ]


def put_marks(text: str, num_images: int, num_videos: int = 0) -> str:
    """A question as a person types it: images and videos that it does not mark itself go in front, one per
    line."""
    for mark, what, given in ((VIDEO_MARK, "video", num_videos), (IMAGE_MARK, "image", num_images)):
        # Without videos "<video>" is a word like any other.
        missing = given - text.count(mark) if given or mark == IMAGE_MARK else 0
        if missing < 0:
            raise ValueError(f"the question marks {text.count(mark)} {what}(s) but {given} were given")
        text = f"{mark}\n" * missing + text
    return text
