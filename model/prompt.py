"""A conversation -> token ids, answer mask and image slots, in one pass. The only place that knows the chat
template:

    {system}<s>user\\n{question}</s>\\n<s>assistant\\n{answer}</s>\\n

Training, terminal, web page and evaluation all render here, so a prompt cannot drift.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from model.vision_proj import CLOSE_ID, OPEN_ID, placeholder_ids

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
MARK = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TOKENIZER_CURE = ("MiniMind's own lies in the model folders: hf download jingyaogong/minimind-v-v1-small "
                  "tokenizer.json tokenizer_config.json --local-dir model/minimind_tokenizer, "
                  "or name yours with --tokenizer_path")


@dataclass
class Prompt:
    """A rendered conversation; input_ids and answer_mask grow together, so no boundary is ever searched
    for."""

    input_ids: list[int] = field(default_factory=list)
    answer_mask: list[bool] = field(default_factory=list)        # True where the token belongs to an answer
    image_slots: list[list[int]] = field(default_factory=list)   # per image, the positions of its placeholder

    def add(self, ids: list[int], learn: bool = False) -> None:
        self.input_ids.extend(ids)
        self.answer_mask.extend([learn] * len(ids))

    def add_image(self, num_image_tokens: int) -> None:
        start = len(self.input_ids)
        self.image_slots.append(list(range(start, start + num_image_tokens)))
        self.add(placeholder_ids(num_image_tokens))


def load_tokenizer(path: str | Path):
    """A fast tokenizer from a folder, checked. Raises FileNotFoundError or ValueError, naming the cure."""
    path = Path(path)
    if not (path / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: {TOKENIZER_CURE}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:      # a broken tokenizer.json surfaces as any of half a dozen types
        raise ValueError(f"cannot read the tokenizer at {path} ({type(error).__name__}: {error}); "
                         f"{TOKENIZER_CURE}") from None
    check_tokenizer(tokenizer, path)
    return tokenizer


def check_tokenizer(tokenizer, path: str | Path) -> None:
    """Raise ValueError unless "<" and ">" have the ids that the placeholder is made of, and the specials are
    there."""
    found = tuple(tokenizer.convert_tokens_to_ids([token for token in "<>"]))
    if found != (OPEN_ID, CLOSE_ID):
        raise ValueError(f'the tokenizer at {path} gives "<" and ">" the ids {found}, but the image '
                         f"placeholder is made of {OPEN_ID} and {CLOSE_ID} (MiniMind's); it cannot give "
                         f"exactly 50 placeholder ids. {TOKENIZER_CURE}")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer at {path} names no bos_token or no eos_token; {TOKENIZER_CURE}")


def encode_text(text: str, tokenizer) -> list[int]:
    """Ordinary text to ids. A user's "<s>" or "</s>" stays text: it can never open or close a turn."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids if text else []


def normalise_turns(conversations: list[dict]) -> list[tuple[str, str]]:
    """[{"from": "human", "value": ...}] or [{"role": "user", "content": ...}] to (role, text). Raises
    ValueError."""
    turns = []
    for turn in conversations:
        role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise ValueError('a turn must look like {"from": "human" or "gpt", "value": "text"}, '
                             f"not {str(turn)[:80]}")
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError("a turn holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
        turns.append((ROLES[role], text))
    return turns


def render_conversation(turns: list[dict], tokenizer, num_image_tokens: int = 50) -> Prompt:
    """Render turns (the data's own format) into ids.

    Every `<image>` mark in a user's text becomes one placeholder, inserted as ids: pasted as text after a
    space it would merge with the space and be lost. Each answer and its closing </s> are marked to be learnt,
    nothing else. Turns that end with the user's are a question: the prompt then ends where the answer begins.
    """
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    prompt = Prompt()
    role = None
    for role, text in normalise_turns(turns):
        if role == "system":
            prompt.add(encode_text(text, tokenizer))
        elif role == "user":
            before, *after = f"user\n{text}".split(IMAGE_MARK)
            prompt.add(bos + encode_text(before, tokenizer))
            for part in after:
                prompt.add_image(num_image_tokens)
                prompt.add(encode_text(part, tokenizer))
            prompt.add(eos + encode_text("\n", tokenizer))
        else:
            prompt.add(bos + encode_text("assistant\n", tokenizer))
            prompt.add(encode_text(text, tokenizer) + eos, learn=True)
            prompt.add(encode_text("\n", tokenizer))
    if role == "user":
        prompt.add(bos + encode_text("assistant\n", tokenizer))
    return prompt


def find_marks(texts: list[tuple[str, str]]) -> list[str]:
    """The marks in the users' texts, in reading order; texts: (role, text), from normalise_turns()."""
    return [mark for role, text in texts if role == "user" for mark in MARK.findall(text)]


def expand_films(turns: list[dict], num_frames: list[int]) -> list[dict]:
    """The same turns with one image mark per frame in the place of each film's mark."""
    counts = iter(num_frames)
    return [{"from": role, "value": text if role != "user" else
             re.sub(VIDEO_MARK, lambda _: IMAGE_MARK * next(counts), text)}
            for role, text in normalise_turns(turns)]


def put_marks(text: str, num_images: int, num_films: int = 0) -> str:
    """A question as a person types it: images and films that it does not mark itself go in front, one per
    line."""
    for mark, what, given in ((VIDEO_MARK, "film", num_films), (IMAGE_MARK, "image", num_images)):
        # Without films "<video>" is a word like any other.
        missing = given - text.count(mark) if given or mark == IMAGE_MARK else 0
        if missing < 0:
            raise ValueError(f"the question marks {text.count(mark)} {what}(s) but {given} were given")
        text = f"{mark}\n" * missing + text
    return text


def frames_that_fit(prompt: Prompt, num_films: int, max_seq_len: int, most: int) -> int:
    """How many frames each film may bring, so that the prompt fits: at least 1, at most `most`.

    prompt  rendered with one frame for each of the films; what must fit goes up to the last learnt token, or
            where nothing is learnt, up to the end
    """
    learnt = [position for position, learn in enumerate(prompt.answer_mask) if learn]
    room = max_seq_len - (learnt[-1] + 1 if learnt else len(prompt.input_ids))
    num_image_tokens = len(prompt.image_slots[0])
    return max(1, min(most, 1 + room // (num_films * num_image_tokens)))


def check_length(prompt: Prompt, max_seq_len: int) -> int:
    """Where a training sample must be cut: after the last learnt token that fits. Raises ValueError if an
    image or every answer would be lost, instead of training on what is left."""
    for number, slots in enumerate(prompt.image_slots, 1):
        if slots[-1] >= max_seq_len:
            raise ValueError(f"the prompt is so long that image {number} would be cut at "
                             f"max_seq_len {max_seq_len}; "
                             f"shorten the text or raise --max_seq_len above {slots[-1] + 1}")
    learnt = [position for position, learn in enumerate(prompt.answer_mask) if learn]
    if not learnt:
        raise ValueError("the conversation has no answer to learn")
    if learnt[0] >= max_seq_len:
        raise ValueError(f"the answer begins at token {learnt[0]} and is cut away by "
                         f"max_seq_len {max_seq_len}; "
                         "shorten the question or raise --max_seq_len")
    return 1 + max(position for position in learnt if position < max_seq_len)
