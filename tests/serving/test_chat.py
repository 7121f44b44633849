"""Chats through a model's template, and log-probabilities as both paths tell them."""

import json

import openai
import pytest
from serving_cases import MAX_BYTES, parrot, running

from marlin_cli.errors import CheckpointError
from marlin_cli.serving.chat_template import ChatTemplate, find_template
from marlin_cli.serving.refusals import Refusal

TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
<{{ message.role }}>{{ message.content | trim }}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
CHAT = [{"role": "system", "content": " be kind "}, {"role": "user", "content": [{"type": "text", "text": "čau"}]}]
PROMPT = "<system>be kind</s><user>čau</s><assistant>"


@pytest.fixture(scope="module")
def client():
    served, schedulers, _ = parrot(template=ChatTemplate(TEMPLATE, "x.jinja", {"eos_token": "</s>"}))
    with running(lambda: (served, schedulers)) as server:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
            yield client


def chat(client, messages=CHAT, **options):
    return client.chat.completions.create(model="parrot", messages=messages, **options)


def test_a_chat_is_written_down_by_the_template(client):
    answer = chat(client, max_completion_tokens=len(PROMPT.encode()))
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", PROMPT, "length")
    assert answer.object == "chat.completion" and answer.usage.prompt_tokens == len(PROMPT.encode())


def test_a_chat_streams_in_deltas(client):
    with chat(client, max_tokens=45, stream=True, stream_options={"include_usage": True}) as stream:
        *parts, last = list(stream)
    deltas = [part.choices[0].delta for part in parts]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == (PROMPT * 2).encode()[:45].decode()
    assert all(part.object == "chat.completion.chunk" for part in parts) and last.usage.completion_tokens == 45
    assert parts[-1].choices[0].finish_reason == "length"


def test_log_probabilities_of_a_chat_have_their_bytes(client):
    answer = chat(client, [{"role": "user", "content": "č"}], max_tokens=9, logprobs=True, top_logprobs=2, n=2)
    for choice in answer.choices:
        told = choice.logprobs.content
        assert bytes(each.bytes[0] for each in told) == "<user>č<".encode()
        assert [each.token for each in told[6:]] == ["bytes:\\xc4", "bytes:\\x8d", "<"]
        assert all(each.logprob == -0.5 and len(each.top_logprobs) == 2 for each in told)
        assert told[0].top_logprobs[1].bytes == [ord("<") ^ 1]


def test_log_probabilities_of_a_completion_are_a_token_a_byte(client):
    for stream in (False, True):
        made = client.completions.create(model="parrot", prompt="aéb", max_tokens=6, logprobs=1, stream=stream)
        choices = [part.choices[0] for part in made] if stream else made.choices
        tokens = [token for choice in choices for token in choice.logprobs.tokens]
        offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
        assert tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b", "a", "bytes:\\xc3"] and offsets == [0, 1, 1, 2, 3, 4]
        assert [value for choice in choices for value in choice.logprobs.token_logprobs] == [-0.5] * 6
        assert [each for choice in choices for each in choice.logprobs.bytes] == [[97], [195], [169], [98], [97], [195]]
        assert "".join(choice.text for choice in choices) == "aéba\ufffd"
        assert choices[0].logprobs.top_logprobs[0] == {"a": -0.5}


REFUSED = {
    "nobody": ([], "expected a list of at least one message"),
    "an unknown role": ([{"role": "cat", "content": "x"}], "messages[0]: expected an object with a role out of"),
    "a picture": ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "content is text, or"),
    "what the template refuses": ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "does not take them: no tools here"),
    "more than fits": ([{"role": "user", "content": "x" * MAX_BYTES}], f"messages: are more than {MAX_BYTES:,} bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_messages_that_cannot_be_are_400(kind, client):
    messages, words = REFUSED[kind]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages)
    assert words in caught.value.body["message"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: "), ({"top_logprobs": 2}, "needs logprobs"),
     ({"max_tokens": 1, "max_completion_tokens": 1}, "say the same"), ({"response_format": {"type": "json_object"}}, "form")],
)  # fmt: skip
def test_options_that_a_chat_has_no_use_for_are_400(options, words, client):
    with pytest.raises(openai.BadRequestError, match=words):
        chat(client, **options)


def test_templates_stand_in_three_files(tmp_path):
    assert find_template(tmp_path) is None
    config = {
        "eos_token": {"content": "</s>"},
        "bos_token": "<s>",
        "pad_token": None,
        "chat_template": "old{{ eos_token }}{{ bos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_template(tmp_path / "model.safetensors").prompt_of([], 99) == b"old</s><s>"
    named = [{"name": "other", "template": "no"}, {"name": "default", "template": "named"}]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert find_template(tmp_path).prompt_of([], 99) == b"named"
    (tmp_path / "chat_template.jinja").write_text("new{{ eos_token }}")
    assert find_template(tmp_path).prompt_of([], 99) == b"new</s>"


@pytest.mark.parametrize("text", ["{% if %}", "{{ x", 5, "x" * (2 << 20)])
def test_a_template_that_is_none_is_named_before_anything_is_served(text, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: "):
        find_template(tmp_path)


HOSTILE = ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 // 0 }}", "{{ messages.x.y }}", "{{ [1] + 'a' }}"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_template_reaches_nothing_and_its_errors_are_400(text):
    with pytest.raises(Refusal, match="does not take them") as caught:
        ChatTemplate(text, "x.jinja", {}).prompt_of([], 99)
    assert caught.value.status == 400
