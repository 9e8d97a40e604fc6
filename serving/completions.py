"""What programs ask and are answered, in the words of OpenAI's chat completions: a request is checked field
by field and becomes rounds of a chat; an answer becomes an object, or chunks of one.
"""

import base64
import binascii
import difflib
import re
import time
from dataclasses import dataclass, replace

from model.chat import Chat, Round
from model.generate import Sampling
from serving.answer import Answer
from serving.bodies import Refused
from serving.site import MOST_FILE

DATA = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
MOST_MESSAGES, MOST_STOPS, LONGEST_STOP = 1000, 4, 200
READ = {
    *("model", "messages", "stream", "stream_options", "stop", "temperature", "top_p", "seed"),
    *("max_tokens", "max_completion_tokens", "top_k", "repetition_penalty"),  # the last two are ours
}
# What is not offered, and the values that ask for nothing of it. With others the answer would be a wrong one.
NEUTRAL = {
    "n": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "web_search_options": [],
}


class BadRequest(Refused):
    """A refusal that names the field it is about, as an error object of OpenAI's."""

    def __init__(self, line: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(status, line)
        self.param, self.code = param, code


@dataclass(frozen=True)
class Request:
    """What a program asks."""

    system: str
    rounds: list[Round]  # their images are data: URIs
    sampling: Sampling
    stop: tuple[str, ...]
    streams: bool
    with_usage: bool  # the last chunk of a stream says how many tokens it took


def error_object(error: Refused) -> dict:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    names = {"param": getattr(error, "param", None), "code": getattr(error, "code", None)}
    return {"error": {"message": error.line, "type": kind, **names}}


# ---- requests ----------------------------------------------------------------------------------------------


def read_request(fields: object, chat: Chat, model: str, usual: Sampling) -> Request:
    """usual: the settings for what the request does not say. Raises BadRequest."""
    if not isinstance(fields, dict):
        raise BadRequest("the body must be a JSON object")
    check_names(fields)
    if fields.get("model") not in (None, "", model):
        line = f"there is no model {str(fields['model'])[:80]!r} here, only {model!r}"
        raise BadRequest(line, "model", "model_not_found", 404)
    system, rounds = read_messages(fields.get("messages"))
    if len(system) + len(rounds[-1].question) > chat.most_characters:
        line = f"the question has more than {chat.most_characters:,} characters: this model's context is full"
        raise BadRequest(line, "messages", "context_length_exceeded")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", "stream_options")
    return Request(
        system,
        rounds,
        read_sampling(fields, usual),
        read_stops(fields.get("stop")),
        read_switch(fields, "stream"),
        read_switch(options, "include_usage"),
    )


def check_names(fields: dict) -> None:
    """Raise BadRequest for what would be passed over though it matters: fields that are not offered, and
    misspelt ones. Others, which clients add for themselves, change nothing."""
    for name, value in fields.items():
        if name in NEUTRAL and value is not None and not any(same(value, one) for one in NEUTRAL[name]):
            raise BadRequest(f"{name} is not offered here: leave it out", name, "unsupported_parameter")
        if name not in READ and name not in NEUTRAL:
            near = difflib.get_close_matches(name[:80], READ, n=1, cutoff=0.85)
            if near:
                raise BadRequest(f"there is no {name[:80]!r}: did you mean {near[0]!r}?", name[:80])


def same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def read_switch(fields: dict, name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False) or isinstance(value, int) != isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", name)
    return bool(value)


def read_number(fields: dict, name: str, low: float, high: float, kind: type):
    """The value of a field; None where it is missing or null."""
    value = fields.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (kind is int and value != int(value)):
        what = "an integer" if kind is int else "a number"
        raise BadRequest(f"{name} must be {what} from {low:g} to {high:g}", name)
    return kind(value)


def read_sampling(fields: dict, usual: Sampling) -> Sampling:
    most = 10**6
    found = {
        "temperature": read_number(fields, "temperature", 0, 2, float),
        "top_p": read_number(fields, "top_p", 0, 1, float),
        "top_k": read_number(fields, "top_k", 0, most, int),
        "repetition_penalty": read_number(fields, "repetition_penalty", 0.01, 100, float),
        "seed": read_number(fields, "seed", -(2**63), 2**63 - 1, int),
    }
    lengths = [read_number(fields, name, 1, most, int) for name in ("max_completion_tokens", "max_tokens")]
    found["max_new_tokens"] = next((length for length in lengths if length is not None), None)
    if found["top_p"] == 0:  # the likeliest alone
        found["top_p"] = 1e-9
    if found["seed"] is not None:
        found["seed"] %= 2**63
    return replace(usual, **{name: value for name, value in found.items() if value is not None})


def read_stops(stop: object) -> tuple[str, ...]:
    words = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(words, list)
        or len(words) > MOST_STOPS
        or not all(isinstance(word, str) and 0 < len(word) <= LONGEST_STOP for word in words)
    ):
        line = f"stop must be a text, or up to {MOST_STOPS}, of 1 to {LONGEST_STOP} characters"
        raise BadRequest(line, "stop")
    return tuple(words)


def read_messages(messages: object) -> tuple[str, list[Round]]:
    """The system's text, and the rounds; messages of one role that follow each other are one."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", "messages")
    if len(messages) > MOST_MESSAGES:
        raise BadRequest(f"at most {MOST_MESSAGES} messages are read", "messages")
    system, rounds, before = [], [], ""
    for number, message in enumerate(messages):
        param = f"messages[{number}]"
        role, text, images = read_message(message, param)
        if role == "system":
            system.append(text)
            continue
        if role == "user":
            if before != "user":
                rounds.append(Round(""))
            rounds[-1].question = join(rounds[-1].question, text)
            rounds[-1].images += images
        elif not rounds:
            raise BadRequest("an answer needs a question before it", param)
        else:
            rounds[-1].answer = join(rounds[-1].answer, text)
        before = role
    if before != "user":
        raise BadRequest("the last message must be the user's", "messages")
    if not rounds[-1].question.strip() and not rounds[-1].images:
        raise BadRequest("the last message asks nothing", "messages")
    return "\n".join(system), rounds


def join(text: str, more: str) -> str:
    return f"{text}\n{more}" if text and more else text or more


def read_message(message: object, param: str) -> tuple[str, str, list[str]]:
    """Role, text and images."""
    if not isinstance(message, dict):
        raise BadRequest(f"{param} must be an object", param)
    role, content = message.get("role"), message.get("content")
    roles = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
    if not isinstance(role, str) or role not in roles:
        raise BadRequest(f"{param}.role must be user, assistant or system", f"{param}.role")
    role = roles[role]
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return role, check_text(content, f"{param}.content"), []
    if not isinstance(content, list):
        raise BadRequest(f"{param}.content must be a text or a list of parts", f"{param}.content")
    texts, images = [], []
    for number, part in enumerate(content):
        where = f"{param}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(check_text(part["text"], where))
        elif kind == "image_url" and role == "user":
            images.append(read_image_url(part.get("image_url"), where))
        else:
            raise BadRequest(f"{where} must be a text, or of a user an image_url", where)
    return role, "\n".join(texts), images


def check_text(text: str, param: str) -> str:
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise BadRequest(f"{param} holds half a surrogate pair, which is no text", param)
    return text


def read_image_url(value: object, param: str) -> str:
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        raise BadRequest(f"{param}.image_url.url is missing", param, "invalid_image_url")
    if not DATA.match(url, 0, 200):
        line = f"{param}: images come as data:image/...;base64,... alone: nothing is fetched or opened here"
        raise BadRequest(line, param, "invalid_image_url")
    return url


def decode_data(url: str) -> bytes:
    """The file in a data: URI. Raises ValueError."""
    match = DATA.match(url, 0, 200)
    kind = (match["kind"] or "").lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise ValueError(f"it says that it is {kind}, which is no image")
    if (len(url) - match.end()) * 3 // 4 > MOST_FILE + 2:
        raise ValueError(f"it is larger than {MOST_FILE >> 20} MB")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not base64") from None


# ---- answers -----------------------------------------------------------------------------------------------


class Reply:
    """The objects that say one answer; model: its name."""

    def __init__(self, answer: Answer, model: str, number: str):
        self.answer = answer
        self.common = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": model}

    @property
    def finish_reason(self) -> str:
        return "length" if self.answer.finish_reason == "length" else "stop"

    def usage(self) -> dict:
        prompt, completion = self.answer.num_prompt_tokens, self.answer.num_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": completion}
        return counts | {"total_tokens": prompt + completion}

    def whole(self) -> dict:
        message = {"role": "assistant", "content": self.answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        return self.common | {"object": "chat.completion", "choices": [choice], "usage": self.usage()}

    def chunk(self, delta: dict, finish_reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self.common | {"object": "chat.completion.chunk", "choices": [choice]}

    def last_chunks(self, with_usage: bool) -> list[dict]:
        usage = self.chunk({}) | {"choices": [], "usage": self.usage()}
        return [self.chunk({}, self.finish_reason), *([usage] if with_usage else [])]
