"""What a request may say: each field honoured, or refused by its name.

transformers' handlers ignore fields that they do not know, take a frequency penalty for a repetition penalty, and a
wrong type for a fault of the server. So everything is checked here first.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.models import Defaults
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.sampling import Settings

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 1024
MAX_STOPS = 4
LEAST_TEMPERATURE = 1e-4  # below it logits overflow, and all of the batch with them; it means the likeliest token
MAX_STOP_CHARACTERS = 64

_LABELS = ("user", "safety_identifier", "prompt_cache_key")  # of a client's own user or cache: they change nothing
_COMMON = ("model", "stream", "stream_options", "temperature", "top_p", "max_tokens", "seed", "stop", *_LABELS)
FIELDS: dict[str, tuple[str, ...]] = {
    "chat": (*_COMMON, "messages", "max_completion_tokens"),
    "completion": (*_COMMON, "prompt"),
}
# Values that ask for nothing, which some clients send always.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "store": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),  # of no tools
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "metadata": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
}
_MESSAGE_FIELDS = ("name", "refusal", "tool_calls", "tool_call_id", "function_call", "audio", "annotations")
_EMPTY = ("tool_calls", "annotations")  # lists that other servers put beside an answer which has none
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body; raises Refusal.

    What two readers may understand in two ways is refused, since one of them may be a proxy that judges requests: a
    field that is given twice, NaN and infinity, and other encodings than UTF-8, which Python's reader would guess.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        message = "the body is no JSON object in UTF-8, with each field once and numbers that are finite"
        raise Refusal(400, message, code="invalid_json")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _no_number(name: str) -> None:
    raise ValueError


def check(body: Mapping[str, Any], kind: str, names: tuple[str, ...]) -> None:
    """Check the fields of a request. kind: ``chat`` or ``completion``. names: of the models.

    Raises:
        Refusal: 400 or 404, with the name of the field.
    """
    for name, value in body.items():
        if name not in FIELDS[kind] and value is not None and not _is_neutral(name, value):
            shown = name if len(name) <= 64 and name.isidentifier() else "a field"
            raise Refusal(400, f"{shown} is not supported", code="unsupported_parameter", param=shown)
    model = body.get("model")
    if model is None:
        raise _wrong("model", f"one of {', '.join(names)}")
    if model not in names:
        raise no_model(names)
    if not isinstance(body.get("stream"), bool | None):
        raise _wrong("stream", "true or false")
    for label in _LABELS:
        if not isinstance(body.get(label), str | None):
            raise _wrong(label, "a text")
    _check_stream_options(body.get("stream_options"), bool(body.get("stream")))
    _check_messages(body.get("messages")) if kind == "chat" else _check_prompt(body.get("prompt"))


def plain(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return a checked request with what it asks for alone: its texts joined, and nothing that is null."""
    asked = {name: value for name, value in body.items() if name in FIELDS[kind] and value is not None}
    if kind == "chat":
        asked["messages"] = [{"role": m["role"], "content": _joined(m["content"])} for m in asked["messages"]]
    elif isinstance(asked["prompt"], list):
        (asked["prompt"],) = asked["prompt"]
    return asked


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def no_model(names: tuple[str, ...]) -> Refusal:
    """Return the refusal of a model that is none of these."""
    return Refusal(404, f"no such model; there are {', '.join(names)}", code="model_not_found", param="model")


def _is_neutral(name: str, value: Any) -> bool:
    # To Python False is 0 and True is 1; to a client ``logprobs: 0`` asks for something, and ``false`` does not.
    known = _NEUTRAL.get(name, ())
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)


def settings(body: Mapping[str, Any], defaults: Defaults, limits: ServerLimits) -> Settings:
    """Return how the completion is generated.

    A larger number of tokens than the server's limit is lowered to it: the field is an upper bound, and a completion
    that it cut says ``length``.

    Raises:
        Refusal: a value of the wrong type, or out of its range.
    """
    longest = [_number(body, name, 1, 1 << 31, int) for name in ("max_completion_tokens", "max_tokens")]
    given = [value for value in longest if value is not None]
    temperature = _number(body, "temperature", 0, 2, float)
    top_p = _number(body, "top_p", 0, 1, float)
    if top_p == 0:  # the likeliest alone
        temperature, top_p = 0.0, 1.0
    if temperature is not None and temperature < LEAST_TEMPERATURE:
        temperature = 0.0
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _wrong("stop", f"a text, or up to {MAX_STOPS} of them")
    if any(len(s) > MAX_STOP_CHARACTERS for s in stops):
        raise _wrong("stop", f"texts of at most {MAX_STOP_CHARACTERS} characters")
    if any(map(_SURROGATE.search, stops)):
        raise _wrong("stop", "Unicode text")
    return Settings(
        longest=min([limits.max_new_tokens, *given]),
        temperature=defaults.temperature if temperature is None else float(temperature),
        top_p=defaults.top_p if top_p is None else float(top_p),
        top_k=defaults.top_k,
        seed=_number(body, "seed", -(1 << 63), (1 << 63) - 1, int),
        stop=tuple(stops),
        usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )


def _number(body: Mapping[str, Any], name: str, least: int, most: int, kind: Callable[[Any], Any]) -> Any:
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)  # NaN is in no range
    if not is_number or not least <= value <= most or (kind is int and value != int(value)):
        what = "an integer" if kind is int else "a number"
        raise _wrong(name, f"{what} from {least} to {most}")
    return kind(value)


def _check_stream_options(value: Any, streams: bool) -> None:
    if value is None:
        return
    if not streams:
        raise _wrong("stream_options", "it only together with stream: true")
    options = {name: option for name, option in value.items() if option is not None} if isinstance(value, dict) else {}
    asked = {name: option for name, option in options.items() if (name, option) != ("include_obfuscation", False)}
    if not isinstance(value, dict) or not all(k == "include_usage" and isinstance(v, bool) for k, v in asked.items()):
        raise _wrong("stream_options", "include_usage, true or false")


def _check_messages(value: Any) -> None:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise _wrong("messages", f"a list of 1 to {MAX_MESSAGES} messages")
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _wrong(where, f"a message of role {', '.join(ROLES)}")
        # An answer of the official client, given back to it as history, has all of OpenAI's fields, most of them null.
        empty = _EMPTY if message["role"] == "assistant" else ()
        said = {name: item for name, item in message.items() if item is not None and not (name in empty and item == [])}
        others = said.keys() - {"role", "content"}
        if others:
            name = next((name for name in _MESSAGE_FIELDS if name in others), None)
            raise _wrong(f"{where}.{name}" if name else where, "role and content, and nothing else")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not parts:
            raise _wrong(f"{where}.content", "a text, or at least one part")
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or len(part) != 2:
                raise _wrong(f"{where}.content", "text, or parts of type text")
            # A model may have answered with no text at all, and its answer is part of the history.
            _check_text(part.get("text"), f"{where}.content", may_be_empty=message["role"] == "assistant")


def _check_prompt(value: Any) -> None:
    if isinstance(value, list) and len(value) != 1:
        raise _wrong("prompt", "one text; ask for several in requests of their own, which share a batch")
    _check_text(value[0] if isinstance(value, list) else value, "prompt")


def _check_text(value: Any, name: str, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or may_be_empty):
        raise _wrong(name, "a text that is not empty")
    if _SURROGATE.search(value):  # JSON can spell half a character, a tokenizer cannot
        raise _wrong(name, "Unicode text")


def _wrong(name: str, expected: str) -> Refusal:
    return Refusal(400, f"{name}: expected {expected}", code="invalid_value", param=name)
