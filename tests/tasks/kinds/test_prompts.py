"""Prompts and responses as tokens: what frames them, where they are cut, and chats by a template."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from pave_lightning.errors import PaveError
from pave_lightning.tasks.kinds.prompts import Exchange, chat_ends, chat_exchange, chat_problem, tokens_of

CHAT = (
    "{% for message in messages %}[CLS] {{ message['role'] }} {{ message['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    found = copy.deepcopy(tiny_tokenizer)
    found.eos_token = "[SEP]"
    return found


def words(*numbers):
    return [number + 4 for number in numbers]


def one(tokenizer, exchange, **options):
    options = {"prompt_most": 8, "response_most": 8, "side": "left", **options}
    return next(tokens_of(tokenizer, [exchange], **options))


@pytest.mark.parametrize(("encoder", "end"), [(False, []), (True, [3])])
def test_a_prompt_is_framed_and_a_response_is_ended(tokenizer, encoder, end):
    found = one(tokenizer, Exchange("w1 w2", "w3"), encoder=encoder)
    assert found.prompt == [2, *words(1, 2), *end]
    assert found.response == [*words(3), 3]
    assert (found.prompt_cut, found.response_cut) == (0, 0)


@pytest.mark.parametrize(("side", "left"), [("left", words(3, 4, 5)), ("right", words(1, 2, 3))])
def test_long_texts_are_cut_and_counted(tokenizer, side, left):
    found = one(tokenizer, Exchange("w1 w2 w3 w4 w5", "w6 w7 w8"), prompt_most=4, response_most=2, side=side)
    assert found.prompt == [2, *left]
    assert found.response == words(6, 7)
    assert (found.prompt_cut, found.response_cut) == (2, 2)


def test_a_chat_is_what_its_template_writes(tokenizer):
    tokenizer.chat_template = CHAT
    messages = [{"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w2 w3"))]
    exchange = chat_exchange(tokenizer, messages)
    assert exchange.prompt + exchange.response == tokenizer.apply_chat_template(messages, tokenize=False)
    assert exchange.prompt == tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert chat_ends(tokenizer) == [3]
    found = one(tokenizer, exchange)
    assert found.prompt == [2, 1, *words(1), 3, 2, 1]  # the names of the roles are unknown to it
    assert found.response == [*words(2, 3), 3]
    assert chat_problem(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('only systems') }}", "refuses the messages of roles user.*only systems"),
        ("{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}", "otherwise than the prompt"),
    ],
)
def test_templates_that_cannot_be_used_are_told(tokenizer, template, told):
    tokenizer.chat_template = template
    problem = chat_problem(tokenizer)
    assert problem is not None
    with pytest.raises(PaveError, match=told):
        raise PaveError(problem)


def test_a_token_that_ends_texts_stands_before_no_response(tokenizer):
    """Tokenizers that end every text would let a causal model begin anew behind the prompt."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    assert one(tokenizer, Exchange("w1", "w2")).prompt == words(1)
