"""A model that answers, served: its answers alone, in streams and searched with beams are those of Python."""

import mlx.core as mx
import openai
import pytest
from mlx.utils import tree_map
from serving_cases import running

from marlin_cli.answering_model import AnsweringModel
from marlin_cli.engine.answering import AnswerLimits
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.scheduling import SchedulerLimits
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.ops.device import choose_device
from marlin_cli.serving.loading import served_model

SIZES = {"d_model": 32, "ffn_dim": 64, "heads": 1, "head_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "max_bytes": 96}
INPUT = "prilis zlutoucky"


@pytest.fixture(scope="module")
def model():
    mx.random.seed(5)
    network = ByT5(ByT5Config(**SIZES))
    network.update(tree_map(lambda a: mx.random.normal(a.shape) * a.shape[-1] ** -0.3, network.parameters()))
    mx.eval(network.parameters())
    return AnsweringModel(network, choose_device("cpu"))


@pytest.fixture(scope="module")
def client(model):
    with running(lambda: served_model(model, "byt5-demo", "tiny", SchedulerLimits(4))) as server:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
            yield client


def complete(client, prompt=INPUT, *, extra=None, **options):
    body = {"return_token_ids": True, **(extra or {})}
    return client.completions.create(model="tiny", prompt=prompt, extra_body=body, **{"max_tokens": 12, **options})


def test_an_answer_is_what_python_gives(model, client):
    answer = complete(client, [INPUT, "b"], n=2, temperature=1.0, seed=3)
    asked = [(INPUT, 3), (INPUT, 4), ("b", 3), ("b", 4)]
    for choice, (prompt, seed) in zip(answer.choices, asked, strict=True):
        data = model.generate(prompt.encode(), 12, temperature=1.0, seed=seed)
        assert bytes(choice.token_ids) == data and choice.text == data.decode("utf-8", "replace")
        assert (choice.finish_reason, choice.stop_reason) in (("length", "length"), ("stop", "end"))


def test_an_answer_streams(model, client):
    with complete(client, stream=True) as stream:
        choices = [part.choices[0] for part in stream]
    assert b"".join(bytes(choice.token_ids) for choice in choices) == model.generate(INPUT.encode(), 12)
    assert choices[-1].finish_reason is not None


def test_an_answer_of_no_length_in_particular_fits_the_model(model, client):
    assert bytes(complete(client, max_tokens=None).choices[0].token_ids) == model.generate(INPUT.encode(), 96)


@pytest.mark.parametrize("name", ["best_of", "num_beams"])
def test_beams_find_the_best_answers(name, model, client):
    extra = {"length_penalty": 0.5, "early_stopping": True, **({} if name == "best_of" else {name: 4})}
    options = {name: 4} if name == "best_of" else {}
    answer = complete(client, [INPUT, "x"], n=3, extra=extra, **options)
    expected = model.answers([INPUT.encode(), b"x"], AnswerLimits(12), None, Beams(4, 3, 0.5, True))
    found = [each for answers in expected for each in answers]
    assert [bytes(choice.token_ids) for choice in answer.choices] == [each.data for each in found]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.score for choice in answer.choices] == pytest.approx([each.score for each in found], rel=1e-5)
    assert answer.usage.prompt_tokens == len(INPUT) + 1
    assert answer.usage.completion_tokens == sum(len(each.data) for each in found)


def test_a_shortest_answer_and_sentinels(model, client):
    data = bytes(model.generate_stream(b"<extra_id_0> a", 12, min_length=12, sentinels=True))
    [choice] = complete(client, "<extra_id_0> a", extra={"min_tokens": 12, "sentinels": True}, logprobs=2).choices
    assert bytes(choice.token_ids) == data
    assert b"".join(map(bytes, choice.logprobs.bytes)) == data and len(choice.logprobs.top_logprobs[0]) == 2


REFUSED = {
    "echo": ({"echo": True}, "echo: this model answers a prompt"),
    "a search in a stream": ({"best_of": 2, "stream": True}, "stream: of a search with beams nothing is known"),
    "a search that draws": ({"best_of": 2, "temperature": 1.0}, "beams and a temperature do not go together"),
    "a search that stops": ({"best_of": 2, "stop": "x"}, "stop sequences do not go with beams"),
    "a search with log-probabilities": ({"best_of": 2, "logprobs": 1}, "logprobs do not go with beams"),
    "more answers than beams": ({"best_of": 2, "n": 3}, "3 answers need as many beams"),
    "an answer beyond all": ({"max_tokens": 97}, "max_tokens: an answer has at most 96 bytes"),
    "shorter than the shortest": ({"extra": {"min_tokens": 13}}, "min_tokens: 13 are more than max_tokens"),
    "two numbers of beams": ({"best_of": 2, "extra": {"num_beams": 3}}, "say the same"),
    "an end that is none": ({"best_of": 2, "extra": {"early_stopping": "now"}}, "early_stopping: expected true, false or"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_an_answer_cannot_be_is_said(kind, client):
    options, words = REFUSED[kind]
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert words in caught.value.body["message"]
