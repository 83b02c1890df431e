"""Reading files of examples."""

import json

import pytest

from mergekit_tspa.calibration.examples import Example, assistant_header, read_examples
from mergekit_tspa.errors import InputError
from tests.calibration.conftest import tiny_tokenizer


def write(path, *lines) -> "object":
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def spoken(tokenizer, tokens) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(tokens)))


def read_one(path, row, template=True, **options) -> tuple[str, str | None]:
    """A line's prompt and completion as words."""
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(None)
    (example,), _ = read_examples(write(path, row), tokenizer, **options)
    completion = example.completion
    return spoken(tokenizer, example.prompt), None if completion is None else spoken(tokenizer, completion)


CHAT = "<s> user w1 w2 </s> <s> assistant"


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "w1 w2", "completion": "w3"}, CHAT, "w3 </s>"),
        ({"prompt": "w1 w2"}, CHAT, None),
        ({"text": "w1 w2"}, "", "w1 w2 </s>"),
        (
            {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]},
            CHAT,
            "w3 </s>",
        ),
        ({"messages": [{"role": "user", "content": "w1 w2"}]}, CHAT, None),
        (
            {
                "prompt": [{"role": "user", "content": "w1 w2"}],
                "completion": [{"role": "assistant", "content": "w3 w4"}],
            },
            CHAT,
            "w3 w4 </s>",
        ),
        ({"prompt": [{"role": "user", "content": "w1 w2"}]}, CHAT, None),
    ],
)
def test_formats_go_through_the_chat_template(tmp_path, row, prompt, completion):
    assert read_one(tmp_path / "a.jsonl", row) == (prompt, completion)


@pytest.mark.parametrize("template", [True, False])
def test_strings_verbatim(tmp_path, template):
    file, options = tmp_path / "a.jsonl", {"verbatim": True} if template else {}
    assert read_one(file, {"prompt": "w1 w2", "completion": " w3"}, template, **options) == (
        "w1 w2",
        "w3 </s>",
    )
    assert read_one(file, {"prompt": "w1 w2"}, template, **options) == ("w1 w2", None)
    # An end that is there already is not repeated.
    assert read_one(file, {"text": "w1 </s>"}, template, **options) == ("", "w1 </s>")


def test_answers_are_kept_and_other_keys_ignored(tmp_path):
    rows = [{"prompt": "w1", "answer": "18", "id": 3}, {"prompt": "w1", "answer": 18}, {"text": "w1"}]
    examples, cut = read_examples(write(tmp_path / "a.jsonl", *rows, "  "), tiny_tokenizer())
    assert [example.answer for example in examples] == ["18", "18", None]
    assert cut == 0


def test_a_line_may_hold_any_character(tmp_path):
    """JSON allows characters within a string that Python takes for ends of lines."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "w1\u2028w2\x85 w3"}, ensure_ascii=False), encoding="utf-8")
    examples, _ = read_examples(file, tiny_tokenizer())
    assert len(examples) == 1


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('\ufeff{"text": "w1 w2"}\n', encoding="utf-8")
    assert len(read_examples(file, tiny_tokenizer()).examples) == 1


def test_long_texts_lose_their_end_and_are_counted(tmp_path):
    long = "w0 w1 w2 w3 w4 w5 w6 w7"
    rows = [{"prompt": "w1 ", "completion": long}, {"prompt": long, "completion": " w3"}, {"prompt": "w1"}]
    (first, second, third), cut = read_examples(
        write(tmp_path / "a.jsonl", *rows), tiny_tokenizer(None), max_length=6
    )
    assert cut == 2
    assert (first.prompt, first.completion) == ((1,), (0, 1, 2, 3, 4))
    # It is nobody's to write an answer that was cut away.
    assert (second.prompt, second.completion) == ((0, 1, 2, 3, 4, 5), ())
    assert (third.prompt, third.completion) == ((1,), None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is a list instead of an object"),
        ({"question": "secret"}, "no prompt, messages or text"),
        ({"prompt": "secret", "text": "secret"}, "has prompt and text"),
        ({"prompt": 3}, "must both be strings"),
        (
            {"prompt": "secret", "completion": [{"role": "assistant", "content": "secret"}]},
            "must both be strings",
        ),
        ({"prompt": []}, "prompt is not a list with messages"),
        ({"text": ""}, "text is not a string"),
        ({"text": ["secret"]}, "text is not a string"),
        ({"messages": "secret"}, "messages is not a list"),
        ({"messages": [{"role": "user"}]}, "something else than"),
        ({"messages": [{"role": "user", "content": {"a": "secret"}}]}, "template does not take"),
        ({"prompt": "secret", "answer": ["secret"]}, "answer is neither"),
    ],
)
def test_bad_lines_are_named_and_not_quoted(tmp_path, line, message):
    file = write(tmp_path / "a.jsonl", {"prompt": "w1"}, "", line)
    with pytest.raises(InputError, match=message) as error:
        read_examples(file, tiny_tokenizer())
    assert f"{file}, line 3: " in str(error.value)
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_messages_need_a_chat_template(tmp_path):
    file = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "w1"}]})
    with pytest.raises(InputError, match="line 1: holds messages, but the tokenizer has no chat template"):
        read_examples(file, tiny_tokenizer(None))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_files(tmp_path, content):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.jsonl: holds no examples"):
        read_examples(file, tiny_tokenizer())


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match="No such file"):
        read_examples(file, tiny_tokenizer())
    file.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_examples(file, tiny_tokenizer())


def test_examples_do_not_show_their_texts():
    example = Example((17, 18), (19,), "secret")
    assert repr(example) == "Example(prompt of 2 tokens, completion of 1)"
    assert repr(Example((1,), None)).endswith("completion of none)")


def test_assistant_header():
    tokenizer = tiny_tokenizer()
    assert spoken(tokenizer, assistant_header(tokenizer)) == "<s> assistant"
    bare = tiny_tokenizer(None)
    assert assistant_header(bare) == (bare.bos_token_id,)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(InputError, match="give prompts"):
        assistant_header(bare)
