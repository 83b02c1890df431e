"""Examples of what an adapter is for, from a file of JSON lines in the formats that TRL reads."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from mergekit_tspa.errors import InputError

Tokenizer: TypeAlias = Any  # a PreTrainedTokenizerBase, which transformers does not type
Message: TypeAlias = Mapping[str, Any]

FORMATS = 'a line holds {"prompt", "completion"}, {"prompt"}, {"messages"} or {"text"}'


@dataclass(frozen=True, repr=False)
class Example:
    """One text as tokens, of which the completion is the answer.

    Its representation says only how long it is, because texts never reach logs and errors.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...] | None  # None: the adapter is to write it itself
    answer: str | None = None  # what a right completion ends with, for measures that want it

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + (self.completion or ())

    @property
    def start(self) -> int:
        """The first token of the answer that something precedes, from which it can be predicted."""
        return max(1, len(self.prompt))

    @property
    def answer_tokens(self) -> int:
        """How many tokens of the answer can be predicted."""
        return max(0, len(self.tokens) - self.start)

    def __repr__(self) -> str:
        completion = "none" if self.completion is None else str(len(self.completion))
        return f"Example(prompt of {len(self.prompt)} tokens, completion of {completion})"


class ExampleFile(NamedTuple):
    """What a file holds."""

    examples: tuple[Example, ...]
    cut: int  # how many of them were too long and lost their end


def read_examples(
    source: Path | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    verbatim: bool = False,
) -> ExampleFile:
    """Read a file with one JSON object a line, in any of these formats, which may differ from line to line:

    * `{"prompt", "completion"}`, both strings or both lists of messages.  Strings go through the tokenizer's
      chat template as what a user and the assistant say, and are taken verbatim, followed by the token that
      ends a text, where the tokenizer has no template.
    * `{"prompt"}` alone: the adapter is to write the answer itself, and `completion` is None.
    * `{"messages": [{"role", "content"}, ..]}`, through the chat template.  The last message is the
        completion if
      the assistant says it; otherwise there is none.
    * `{"text"}`, verbatim, followed by the token that ends a text.  All of it is the completion.

    A key `answer` is kept, others are ignored, and so are empty lines.

    Args:
        source: a file of JSON lines in UTF-8, or the objects themselves
        tokenizer: of the base model
        max_length: of an example in tokens, by default any; `context_length` gives the model's.  Longer ones
            lose their end and are counted
        verbatim: take strings as they are although the tokenizer has a chat template

    Raises:
        InputError: the file is missing or empty, or a line is not of these formats; with the number of the
            line.
    """
    examples, cut = [], 0
    encoder = _Encoder(tokenizer, verbatim)
    for where, read in _rows(source):
        try:
            example = encoder.example(read())
        except InputError as error:
            raise InputError(f"{where}: {error.message}") from None
        if max_length is not None and len(example.tokens) > max_length:
            example, cut = _shortened(example, max_length), cut + 1
        examples.append(example)
    if not examples:
        raise InputError(
            f"{source if isinstance(source, Path) else 'examples'}: holds no examples; {FORMATS}"
        )
    return ExampleFile(tuple(examples), cut)


def _rows(
    source: Path | Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
    """Where each example stands, and a function that reads it.

    Raises:
        InputError: the file is not readable.
    """
    if not isinstance(source, Path):
        for number, row in enumerate(source):
            yield f"example {number}", partial(_checked_row, row)
        return
    try:
        content = source.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{source}: not readable as JSON lines ({reason})") from None
    # Not splitlines(), which takes characters that JSON allows inside a string for ends of lines.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield f"{source}, line {number}", partial(_parse, line)


def context_length(config: Any) -> int | None:
    """How many tokens a model reads at once, by its configuration; None where that does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def assistant_header(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens after which an adapter writes texts of its own kind with no prompt.

    What the chat template puts before an answer, `<|im_start|>assistant` for instance; where there is no
    template, or none that puts something there, the token that begins a text.

    Raises:
        InputError: the tokenizer has neither.
    """
    if tokenizer.chat_template:
        question = [{"role": "user", "content": "x"}]
        without, asked = (_render(tokenizer, question, ask) for ask in (False, True))
        if asked.startswith(without) and asked != without:
            return tuple(tokenizer(asked[len(without) :], add_special_tokens=False)["input_ids"])
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return (token,)
    raise InputError(
        "the tokenizer has no chat template and no token that begins a text, so there is nothing an adapter "
        "could write after: give prompts"
    )


def _parse(line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"is not JSON; {FORMATS}") from None
    return _checked_row(row)


def _checked_row(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise InputError(f"is a {type(row).__name__} instead of an object; {FORMATS}")
    return row


def _shortened(example: Example, length: int) -> Example:
    prompt = example.prompt[:length]
    completion = example.completion
    return Example(prompt, completion and completion[: length - len(prompt)], example.answer)


class _Encoder:
    """From a line's object to tokens; its errors do not know the file and the line."""

    def __init__(self, tokenizer: Tokenizer, verbatim: bool):
        self.tokenizer = tokenizer
        self.templated = bool(tokenizer.chat_template) and not verbatim

    def example(self, row: Mapping[str, Any]) -> Example:
        kinds = [key for key in ("prompt", "messages", "text") if key in row]
        if len(kinds) != 1:
            raise InputError(f"has {' and '.join(kinds) or 'no prompt, messages or text'}; {FORMATS}")
        answer = row.get("answer")
        if answer is not None and (isinstance(answer, bool) or not isinstance(answer, (str, int, float))):
            raise InputError("answer is neither a string nor a number")
        prompt, completion = getattr(self, f"_{kinds[0]}")(row)
        if not prompt and not completion:
            raise InputError("holds no tokens")
        return Example(prompt, completion, None if answer is None else str(answer))

    def _text(self, row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        if not isinstance(row["text"], str) or not row["text"]:
            raise InputError("text is not a string with something in it")
        return (), self._ended(self._tokens(row["text"], special=True))

    def _messages(self, row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        messages = _checked(row["messages"], "messages")
        if messages[-1]["role"] == "assistant":
            return self._chat(messages[:-1], messages[-1:])
        return self._chat(messages, None)

    def _prompt(self, row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        prompt, completion = row["prompt"], row.get("completion")
        if isinstance(prompt, list) and isinstance(completion, (list, type(None))):
            return self._chat(
                _checked(prompt, "prompt"), None if completion is None else _checked(completion, "completion")
            )
        if not isinstance(prompt, str) or not isinstance(completion, (str, type(None))):
            raise InputError("prompt and completion must both be strings or both be lists of messages")
        if self.templated:
            said = None if completion is None else [{"role": "assistant", "content": completion}]
            return self._chat([{"role": "user", "content": prompt}], said)
        tokens = self._tokens(prompt, special=True)
        if completion is None:
            return tokens, None
        return _split(tokens, self._ended(self._tokens(prompt + completion, special=True)))

    def _chat(
        self, prompt: Sequence[Message], completion: Sequence[Message] | None
    ) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        if not self.tokenizer.chat_template:
            raise InputError(
                "holds messages, but the tokenizer has no chat template; give prompt and completion as "
                "strings"
            )
        before = self._tokens(_render(self.tokenizer, prompt, True), special=False) if prompt else ()
        if completion is None:
            return before, None
        whole = self._tokens(_render(self.tokenizer, [*prompt, *completion], False), special=False)
        return _split(before, whole)

    def _tokens(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _ended(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == (end,) else (*tokens, end)


def _checked(messages: Any, key: str) -> Sequence[Message]:
    """
    Raises:
        InputError: this is no list of messages.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{key} is not a list with messages in it")
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise InputError(f'{key} holds something else than {{"role", "content"}}')
    return messages


def _render(tokenizer: Tokenizer, messages: Sequence[Message], ask: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except Exception:  # whatever a template raises, and it may quote the messages
        raise InputError(
            "the tokenizer's chat template does not take these messages (their roles or order)"
        ) from None


def _split(prompt: tuple[int, ...], whole: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The whole as prompt and completion, at the end of what it shares with the prompt alone.

    The whole is tokenized at once, as a model would read it, and some templates change the prompt once an
    answer follows.
    """
    shared = 0
    while shared < min(len(prompt), len(whole)) and prompt[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]
