"""The `openai` package against a real server of a small model: what it gets is what the model gives in Python."""

import base64

import mlx.core as mx
import openai
import pytest
from mlx.utils import tree_map
from serving_cases import running

from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.scheduling import SchedulerLimits
from marlin_cli.models import ARCHITECTURES
from marlin_cli.models.bygpt5 import ByGPT5Config
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.serving.loading import served_model

WIDE = {f"{part}_{name}": value for part in ("global", "local") for name, value in (("dim", 32), ("heads", 1))}
CONFIGS = {
    "megabyte": MegaByteConfig(patch_size=4, max_bytes=96, global_layers=1, local_layers=1, **WIDE),
    "bygpt5": ByGPT5Config(d_model=32, ffn_dim=64, heads=1, head_dim=32, layers=1, max_bytes=96),
}
PROMPT = "žluťoučký kůň"


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    mx.random.seed(3)
    network = ARCHITECTURES[config.model_type].network(config)
    random = tree_map(lambda a: mx.random.normal(a.shape) * (0.3 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    network.update(random)
    mx.eval(network.parameters())
    return ContinuingModel(network, choose_device("cpu"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save(folder)

    def load():
        return served_model(ContinuingModel.from_pretrained(folder, device="cpu"), str(folder), None, SchedulerLimits(4))

    with running(load) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 20, **options})


def expected(model, prompt=None, max_bytes=20, **options):
    return model.generate(PROMPT.encode() if prompt is None else prompt, max_bytes, **options)


def test_a_completion_is_what_python_gives(model, client):
    answer = complete(client)
    data = expected(model)
    [choice] = answer.choices
    assert choice.text == data.decode("utf-8", "replace")
    assert (answer.object, answer.model, choice.index) == ("text_completion", "tiny", 0) and answer.id.startswith("cmpl-")
    prompt_bytes = len(PROMPT.encode())
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_bytes, len(data))
    assert answer.usage.total_tokens == prompt_bytes + len(data)


@pytest.mark.parametrize("form", ["ints", "base64", "text"])
def test_a_prompt_has_three_forms_and_bytes_come_back_as_ints(form, model, client):
    data = PROMPT.encode() if form == "text" else PROMPT.encode() + b"\xff\x00\xc3"
    prompt = {"ints": list(data), "text": PROMPT, "base64": None}[form]
    extra = {"return_token_ids": True, **({"prompt": {"base64": base64.b64encode(data).decode()}} if form == "base64" else {})}
    [choice] = complete(client, prompt, extra_body=extra).choices
    assert bytes(choice.token_ids) == expected(model, data) and bytes(choice.prompt_token_ids) == data


def test_many_prompts_and_choices_come_in_order(model, client):
    answer = complete(client, ["abc", "dé"], n=2, seed=7, temperature=1.0, extra_body={"return_token_ids": True})
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, (prompt, seed) in zip(answer.choices, [("abc", 7), ("abc", 8), ("dé", 7), ("dé", 8)], strict=True):
        assert bytes(choice.token_ids) == expected(model, prompt.encode(), temperature=1.0, seed=seed)
    assert answer.usage.prompt_tokens == 6
    lists = complete(client, [[97, 98, 99], [100, 195, 169]], extra_body={"return_token_ids": True})
    assert [bytes(choice.token_ids) for choice in lists.choices] == [expected(model, b"abc"), expected(model, "dé".encode())]


def test_a_stream_is_the_same_text_in_whole_characters(model, client):
    whole = complete(client, temperature=1.0, seed=5)
    options = {"stream_options": {"include_usage": True}, "extra_body": {"return_token_ids": True}}
    with complete(client, temperature=1.0, seed=5, stream=True, **options) as stream:
        chunks = list(stream)
    *parts, last = chunks
    assert all(part.usage is None and part.object == "text_completion" and part.id == chunks[0].id for part in parts)
    assert last.choices == [] and last.usage == whole.usage
    choices = [choice for part in parts for choice in part.choices]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert b"".join(bytes(choice.token_ids) for choice in choices) == expected(model, temperature=1.0, seed=5)
    assert [bytes(choice.prompt_token_ids) for choice in choices if "prompt_token_ids" in choice.model_extra] == [
        PROMPT.encode()
    ]
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [whole.choices[0].finish_reason]


def test_seeds_repeat_and_a_request_without_one_has_a_fresh_one(client):
    def drawn(**options):
        return complete(client, temperature=5.0, max_tokens=12, **options).choices[0]

    assert drawn(seed=3).text == drawn(seed=3).text
    first, second = drawn(), drawn()
    assert first.seed != second.seed and drawn(seed=first.seed).text == first.text


def test_filters_and_stops_are_those_of_python(model, client):
    sampling = {"temperature": 1.5, "top_p": 0.9, "seed": 11}
    extra = {"top_k": 40, "min_p": 0.01, "return_token_ids": True}
    data = expected(model, **sampling, top_k=40, min_p=0.01)
    assert bytes(complete(client, **sampling, extra_body=extra).choices[0].token_ids) == data
    stop = data[6:8]
    extra["stop"] = {"base64": base64.b64encode(stop).decode()}
    [choice] = complete(client, **sampling, extra_body=extra).choices
    assert bytes(choice.token_ids) == data[: data.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "stop")


def test_the_end_of_the_context_is_a_length(model, client):
    [choice] = complete(client, "x" * 90, max_tokens=50).choices
    assert choice.finish_reason == "length" and choice.stop_reason in ("context", "special")


def test_echo_gives_the_prompt_first_and_no_character_is_cut_between(client, server):
    assert complete(client, echo=True).choices[0].text.startswith(PROMPT)
    data = "é".encode()
    status, answer = server.ask("/v1/completions", {"prompt": list(data[:1]), "max_tokens": 0, "echo": True})
    assert (status, answer["choices"][0]["text"]) == (200, "\ufffd")


def test_what_is_served_is_told(client, model):
    [found] = client.models.list().data
    assert found == client.models.retrieve("tiny")
    assert (found.id, found.owned_by, found.max_model_len) == ("tiny", "marlin", 96)
    with pytest.raises(openai.NotFoundError, match="not served here; this is 'tiny'"):
        client.models.retrieve("other")


REFUSED = {
    "a suffix": ({"suffix": "x"}, "suffix: models of bytes continue a prompt"),
    "a penalty": ({"presence_penalty": 0.5}, "presence_penalty: "),
    "a bias": ({"logit_bias": {"65": 1}}, "logit_bias: "),
    "a search": ({"best_of": 4}, "best_of: a model that continues bytes draws"),
    "a negative temperature": ({"temperature": -1}, "temperature must be 0 or more"),
    "all of nothing": ({"top_p": 0}, "top_p must be above 0"),
    "too many choices": ({"n": 1000}, "n: expected a number from 1 to 128"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, "stream_options: needs stream"),
    "a prompt too long": ({"prompt": "x" * 97}, "the prompt has 97 bytes, but the model reads 96"),
    "an unknown field": ({"extra_body": {"temprature": 1}}, "unknown field 'temprature'; did you mean 'temperature'"),
    "an empty stop": ({"stop": ""}, "stop: a sequence has 0 bytes"),
    "a seed beyond all": ({"seed": 1 << 64}, "seed: expected a number from 0 to"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_said_in_a_line(kind, client):
    options, words = REFUSED[kind]
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert words in caught.value.body["message"] and caught.value.type == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(client):
    options = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "best_of": 1, "suffix": None}
    assert complete(client, **options).choices


def test_another_model_and_a_chat_without_a_template_are_named(client):
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here") as caught:
        client.completions.create(model="gpt", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
