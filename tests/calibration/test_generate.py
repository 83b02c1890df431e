"""Answers that adapters write themselves."""

import pytest
import torch

from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.calibration.generate import _pick, self_texts, write_answers
from mergekit_tspa.errors import InputError
from tests.calibration.conftest import peft_model, random_texts, singles_of, tiny_tokenizer


def prompts(names, count=4):
    return {
        name: [Example(e.prompt, None, "7") for e in own] for name, own in random_texts(names, count).items()
    }


def test_greedy_answers_are_those_of_peft_one_text_at_a_time(family):
    """So padding on the left, positions, the cache and the rows' own adapters are right."""
    base, paths = family
    singles = singles_of(base, paths)
    asked = prompts(singles.names)
    written = write_answers(singles, asked, new_tokens=6, temperature=0, stop=())
    for path in paths:
        model = peft_model(base, path)
        for question, answer in zip(asked[path.name], written[path.name]):
            ids = torch.tensor([question.prompt])
            with torch.no_grad():
                for _ in range(6):
                    ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            assert answer == Example(question.prompt, tuple(ids[0, -6:].tolist()), "7")


def test_a_seed_gives_the_same_answers_in_any_company(llama, adapters):
    singles = singles_of(llama, adapters)
    asked = prompts(singles.names)
    first = write_answers(singles, asked, new_tokens=8, seed=3)
    assert write_answers(singles, asked, new_tokens=8, seed=3) == first
    assert write_answers(singles, asked, new_tokens=8, seed=4) != first
    assert write_answers(singles, asked, new_tokens=8, seed=3, batch_tokens=20) == first
    alone = write_answers(singles_of(llama, adapters[:1]), {"one": asked["one"]}, new_tokens=8, seed=3)
    assert alone["one"] == first["one"]


def test_texts_with_answers_stay_and_answers_end(llama, adapters):
    singles = singles_of(llama, adapters[:1])
    given = Example((1, 2), (3,))
    free = write_answers(singles, {"one": [given, Example((1, 2), None)]}, new_tokens=20, stop=())["one"]
    assert free[0] is given and len(free[1].completion) == 20
    end = free[1].completion[5]
    stopped = write_answers(singles, {"one": [given, Example((1, 2), None)]}, new_tokens=20, stop=[end])[
        "one"
    ]
    assert stopped[1].completion == free[1].completion[: free[1].completion.index(end) + 1]
    singles.model.generation_config.eos_token_id = [end]
    assert write_answers(singles, {"one": [given, Example((1, 2), None)]}, new_tokens=20)["one"] == stopped
    with pytest.raises(InputError, match="texts for other"):
        write_answers(singles, {"other": [given]})


def test_long_prompts_leave_room_for_the_answer(gpt2, gpt2_adapters):
    """GPT-2's context here is 32 tokens."""
    singles = singles_of(gpt2, gpt2_adapters[:1])
    prompt = tuple(range(40))
    (written,) = write_answers(singles, {"four": [Example(prompt, None)]}, new_tokens=12, stop=())["four"]
    assert written.prompt == prompt[-20:] and len(written.completion) == 12
    (written,) = write_answers(singles, {"four": [Example(prompt, None)]}, new_tokens=50, stop=())["four"]
    assert written.prompt == prompt[-1:] and len(written.completion) == 31


def test_self_texts_begin_with_the_header_and_differ(llama, adapters):
    singles = singles_of(llama, adapters)
    texts = self_texts(singles, tiny_tokenizer(), count=5, new_tokens=6, stop=())
    assert texts.keys() == set(singles.names)
    assert {example.prompt for own in texts.values() for example in own} == {(88, 92)}
    assert len({example.completion for own in texts.values() for example in own}) == 15


def test_samples_follow_the_probabilities():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    picked = _pick(p.log().clamp(min=-1e9).expand(20000, 4), draws, 1.0)
    shares = torch.bincount(picked, minlength=4) / 20000
    assert shares[1] == 0
    torch.testing.assert_close(shares, p, atol=0.02, rtol=0)
    cold = torch.bincount(_pick(p.log().clamp(min=-1e9).expand(20000, 4), draws, 0.5), minlength=4) / 20000
    torch.testing.assert_close(cold, p**2 / (p**2).sum(), atol=0.02, rtol=0)
    with pytest.raises(InputError, match="NaN"):
        _pick(torch.full((1, 4), torch.nan), draws[:1], 1.0)
