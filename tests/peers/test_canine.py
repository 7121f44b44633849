"""CANINE against the transformers that is installed: states, pooled vectors and every head, tiny and in full shape."""

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import TINY, batch, cases, give_weights

from marlin_cli.checkpoints import read_checkpoint
from marlin_cli.config import from_mapping
from marlin_cli.engine.characters import AnswerSettings, answers, choose, classify, tag
from marlin_cli.models import fill
from marlin_cli.models.canine import Canine, CanineConfig
from marlin_cli.models.canine_ids import characters_of, with_marks

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
KINDS = ("TokenClassification", "SequenceClassification", "QuestionAnswering", "MultipleChoice")
TEXTS = ["Žluťoučký kůň úpěl.", "東京は大きい 𝔘𝔫𝔦", "a longer text, of which there is more than of the others"]


def make(kind, folder, config=TINY, labels=3, **changes):
    """A random model of transformers, saved and read by marlin."""
    head = getattr(transformers, f"CanineFor{kind}")
    model = head(transformers.CanineConfig(**config, num_labels=2 if kind == "QuestionAnswering" else labels, **changes)).eval()
    give_weights(model)
    model.save_pretrained(folder)
    checkpoint = read_checkpoint(folder)
    network = Canine(from_mapping(CanineConfig, checkpoint.config, "here"))
    fill(network, checkpoint.weights, where="here", dtype=mx.float32)
    return model, network


@torch.no_grad()
def theirs_of(model, kind, ids, mask, types):
    given = {"attention_mask": torch.from_numpy(mask).long(), "token_type_ids": torch.from_numpy(types)}
    ids = torch.from_numpy(ids)
    if kind == "MultipleChoice":
        return model(ids[None], **{name: value[None] for name, value in given.items()}).logits[0][:, None]
    output = model(ids, **given)
    return torch.stack([output.start_logits, output.end_logits], dim=-1) if kind == "QuestionAnswering" else output.logits


@pytest.mark.parametrize("kind", KINDS)
def test_states_vectors_and_heads(kind, tmp_path):
    """At every position, filler included: real ones read what is near them."""
    model, network = make(kind, tmp_path)
    for lengths, total in cases():
        ids, mask = batch(lengths, total)
        types = np.zeros_like(ids)
        types[:, total // 2 :] = 1
        given = mx.array(ids), None if set(lengths) == {total} else mx.array(lengths), mx.array(types)
        theirs = theirs_of(model, kind, ids, mask, types).numpy()
        assert np.abs(np.array(network(*given)) - theirs).max() < TOLERANCE, (lengths, total)
        with torch.no_grad():
            arguments = {"attention_mask": torch.from_numpy(mask).long(), "token_type_ids": torch.from_numpy(types)}
            body = model.canine(torch.from_numpy(ids), **arguments)
        deep = network.deep(*given)
        assert np.abs(np.array(network.states(deep, given[1])) - body.last_hidden_state.numpy()).max() < TOLERANCE
        assert np.abs(np.array(network.pooled(deep)) - body.pooler_output.numpy()).max() < TOLERANCE


def test_other_shapes(tmp_path):
    """Blocks, rates and kernels other than those of the released ones."""
    config = TINY | {
        "local_transformer_stride": 24, "downsampling_rate": 3, "upsampling_kernel_size": 5, "hidden_act": "gelu_new",
        "num_hidden_layers": 1, "type_vocab_size": 2, "num_hash_functions": 16,
    }  # fmt: skip
    model, network = make("TokenClassification", tmp_path, config)
    for lengths, total in (((3, 1), 3), ((50,), 50), ((47, 20, 3), 49), ((73, 24), 73)):
        ids, mask = batch(lengths, total)
        types = np.zeros_like(ids)
        theirs = theirs_of(model, "TokenClassification", ids, mask, types).numpy()
        assert np.abs(np.array(network(mx.array(ids), mx.array(lengths))) - theirs).max() < TOLERANCE


def test_the_full_shape(tmp_path):
    model, network = make("TokenClassification", tmp_path, {"max_position_embeddings": 16384})
    assert sum(parameter.numel() for parameter in model.canine.parameters()) == 132_082_944
    for lengths, total in (((515,), 515), ((300, 515), 528)):
        ids, mask = batch(lengths, total)
        types = np.zeros_like(ids)
        theirs = theirs_of(model, "TokenClassification", ids, mask, types).numpy()
        found = np.array(network(mx.array(ids), None if len(lengths) == 1 else mx.array(lengths)))
        assert np.abs(found - theirs).max() < TOLERANCE * np.abs(theirs).max()


def test_marks_are_those_of_the_tokenizer():
    tokenizer = transformers.CanineTokenizer()
    first, second = (characters_of(text.encode()).ids for text in TEXTS[:2])
    for texts, marked in ((TEXTS[:1], with_marks(first)), (TEXTS[:2], with_marks(first, second, 0))):
        theirs = tokenizer(*texts)
        assert theirs["input_ids"] == marked[0].tolist()
        if transformers.__version__ >= "5":
            assert theirs["token_type_ids"] == marked[1].tolist()


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_labels_of_the_pipeline(problem, tmp_path):
    model, network = make("SequenceClassification", tmp_path, problem_type=problem)
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=transformers.CanineTokenizer())
    for text, found in zip(TEXTS, classify(network, [text.encode() for text in TEXTS]), strict=True):
        theirs = {each["label"]: each["score"] for each in pipeline(text, top_k=None)}
        assert {each.label: each.score for each in found} == pytest.approx(theirs, abs=TOLERANCE)


def test_tags_of_the_pipeline(tmp_path):
    """Its slow tokenizer gives no places, so the characters are compared one by one."""
    model, network = make("TokenClassification", tmp_path)
    pipeline = transformers.pipeline(
        "token-classification", model=model, tokenizer=transformers.CanineTokenizer(), aggregation_strategy="none"
    )
    for text in TEXTS:
        found = tag(network, [text.encode()], merge=False, outside=())[0]
        theirs = [each for each in pipeline(text) if 0 < each["index"] <= len(text)]
        assert [span.label for span in found] == [each["entity"] for each in theirs]
        assert [span.score for span in found] == pytest.approx([each["score"] for each in theirs], abs=TOLERANCE)
        assert [text.encode()[span.first_byte : span.end_byte].decode() for span in found] == list(text)


def test_answers_and_choices(tmp_path):
    """The likeliest span of transformers' scores, with pairs as each version's tokenizer makes them."""
    tokenizer = transformers.CanineTokenizer()
    model, network = make("QuestionAnswering", tmp_path / "answer")
    question, context = "Kdo?", TEXTS[2]
    given = tokenizer(question, context, return_tensors="pt")
    with torch.no_grad():
        output = model(**given)
    first = len(question) + 2
    begins, ends = (
        logits[0, first : first + len(context)].softmax(-1).double() for logits in (output.start_logits, output.end_logits)
    )
    products = torch.tril(torch.triu(begins[:, None] * ends[None]), 9)
    at = int(products.argmax())
    found = answers(network, question.encode(), context.encode(), AnswerSettings(longest=10))[0]
    assert (found.first_character, found.end_character - 1) == divmod(at, len(context))
    assert found.score == pytest.approx(float(products.max()), rel=1e-3)

    model, network = make("MultipleChoice", tmp_path / "choice")
    given = tokenizer([TEXTS[0]] * 2, TEXTS[1:], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**{name: value[None] for name, value in given.items()}).logits[0].softmax(-1).numpy()
    assert np.abs(choose(network, TEXTS[0].encode(), [text.encode() for text in TEXTS[1:]]) - theirs).max() < TOLERANCE
