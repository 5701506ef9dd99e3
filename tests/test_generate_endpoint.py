"""Self-edits written through an endpoint: a real server that fails, and a file that goes on."""

import json
import threading
from signal import SIGKILL

import pytest
from judge_server import written
from tiny_run import CONFIG, run_process

from seal_jax.commands import main as cli
from seal_jax.commands.generate.by_endpoint import read_answer
from seal_jax.hosts.endpoint import Failure
from seal_jax.hosts.files import read_jsonl
from seal_jax.tasks.facts import Facts
from seal_jax.tasks.knowledge.texts import load_texts

pytest_plugins = ["judge_server"]

PROBLEMS = [problem for problem, _ in Facts().load("eval")[:2]]
NAMES = [(problem.id, edit) for problem in PROBLEMS for edit in (0, 1)]


def words_of(server, out, *more):
    """Return a command that asks for two texts on each of two held-out problems."""
    url = f"http://127.0.0.1:{server.server_port}/v1"
    found = ["generate", "--config", CONFIG, "--split", "eval", "--out", str(out), "--url", url]
    return [*found, "--model", "m", "--tries", "1", *more]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "texts.jsonl"


@pytest.fixture
def generate(server, out, capsys):
    """Return a function that runs the command and returns exit code, stdout and errors."""

    def generate(*more):
        code = cli.main(words_of(server, out, *more))
        found = capsys.readouterr()
        errors = [line for line in found.err.splitlines() if "seal-jax generate" in line]
        return code, found.out, "\n".join(errors)

    return generate


def numbered(server):
    """Let the server write another text each time."""
    return lambda body: written(f"note {len(server.requests)} of\n{body['messages'][0]['content']}")


def texts_in(out):
    return {(row["problem"], row["edit"]): row["text"] for row in read_jsonl(out)}


def test_it_asks_as_the_config_says_and_writes_a_file_of_texts(server, out, generate, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.replies = [numbered(server)]
    set_stop = ("--set", "sample.temperature=0.5", "--set", "sample.stop=('passage',)")
    code, said, error = generate(*set_stop)
    assert (code, error) == (0, "")
    assert "4 requests to m: about 75 tokens of prompts, at most 96 tokens written; 0 of 4" in said
    assert "usage: 40 tokens of prompts and 12 written, as reported by 4 of 4 answers" in said
    assert "4 texts more; 4 that a run will reject (too long" in said and "served by m-2026" in said
    prompts = [Facts().edit_prompt(problem) for problem in PROBLEMS for _ in range(2)]
    bodies = [body for _, _, body in server.requests]
    assert sorted(body["messages"][0]["content"] for body in bodies) == sorted(prompts)
    fields = {"model": "m", "temperature": 0.5, "top_p": 0.95, "max_tokens": 24}
    assert all(body.items() >= fields.items() and body["stop"] == ["passage"] for body in bodies)
    assert server.requests[0][1]["Authorization"] == "Bearer secret-key"
    assert sorted(texts_in(out)) == sorted(NAMES) and "secret-key" not in out.read_text()
    found = load_texts(str(out), PROBLEMS, 2)
    assert [len(texts) for texts in found.of] == [2, 2] and found.remarks == []
    assert all(text.startswith("note ") for texts in found.of for text in texts)


def test_no_model_is_loaded_and_a_kill_half_way_loses_nothing(server, out):
    server.replies = [numbered(server)]
    words = words_of(server, out, "--set", "model.source=no/such/model")
    no_jax = "--xla_has_no_such_flag=1"  # XLA would end a process that starts it
    assert run_process(*words, kill=f"{out}:3", flags=no_jax, check=False).returncode == -SIGKILL
    before = texts_in(out)
    assert len(before) == 2
    with out.open("a") as file:
        file.write('{"problem": "zo')  # as a kill may leave it
    server.requests.clear()
    assert cli.main(words) == 0
    after = texts_in(out)
    assert len(server.requests) == 2 and sorted(after) == sorted(NAMES)
    assert {name: after[name] for name in before} == before


def test_what_could_not_be_had_is_a_line_and_the_rest_is_kept(server, out, generate):
    failing = [written("a"), (500, {}, b"oops"), (400, {}, b"this prompt is bad"), written("b")]
    server.replies = failing
    code, _, error = generate()
    assert code == 2 and "2 of 4 texts could not be had (mostly: " in error
    assert "the same command asks for these again" in error and error.count("\n") == 0
    rows = read_jsonl(out)
    assert sorted((row["problem"], row["edit"]) for row in rows) == sorted(NAMES)
    errors = sorted(row["error"] for row in rows if row["text"] is None)
    assert (
        errors[0] == "HTTP 500 Internal Server Error. It said: oops"
        and "this prompt is bad" in errors[1]
    )
    (remark,) = [r for r in load_texts(str(out), PROBLEMS, 2).remarks if "could not" in r]
    assert remark.startswith("2 text(s)")

    server.requests.clear()
    server.replies = [written("c")]
    code, said, _ = generate()
    assert code == 0 and "2 requests to m" in said and "2 of 4 texts are there already" in said
    found = load_texts(str(out), PROBLEMS, 2)
    assert sorted(sum(found.of, ())) == ["a", "b", "c", "c"] and found.remarks == []
    assert generate()[:2][0] == 0 and len(server.requests) == 2  # there is nothing left to ask


def test_a_refusal_ends_it_at_once_and_a_text_that_came_is_kept(server, out, generate):
    server.replies = [written("a"), (401, {}, b"no such key")]
    code, _, error = generate("--set", "sample.num_edits=20")
    assert code == 2 and "refuses requests: HTTP 401" in error and "no such key" in error
    assert "check --url, --model and $OPENAI_API_KEY" in error
    assert list(texts_in(out).values()) == ["a"] and len(server.requests) <= 9


def test_an_endpoint_that_is_gone_is_left(server, out, generate):
    server.replies = [written("a"), (503, {}, b"")]
    code, _, error = generate("--set", "sample.num_edits=40")
    assert code == 2 and "gave no text 24 times in a row (at last: HTTP 503" in error
    assert "the same command goes on from here" in error and len(server.requests) <= 40
    assert [text for text in texts_in(out).values() if text] == ["a"]


def test_it_is_asked_again_as_often_as_it_may_be(server, out, generate):
    again = (429, {"Retry-After": "0"}, b"")
    server.replies = [again, (200, {"Retry-After": "0"}, b"junk"), written("a")]
    more = ("--set", "eval.num_problems=1", "--set", "sample.num_edits=1", "--tries", "3")
    code, _, error = generate(*more)
    assert (code, error, len(server.requests)) == (0, "", 3)
    assert list(texts_in(out).values()) == ["a"]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (("--model", "other"), "model = 'm', asked for 'other'"),
        (("--set", "sample.temperature=0.5"), "temperature = '1.0', asked for '0.5'"),
        (("--set", "sample.max_tokens=25"), "max_tokens = '24', asked for '25'"),
    ],
)
def test_a_file_of_another_request_is_refused(server, out, generate, more, name):
    server.replies = [written("a")]
    assert generate()[0] == 0
    before = out.read_bytes()
    code, _, error = generate(*more)
    assert code == 2 and f"{out}:1: was written with {name}: choose another --out" in error
    assert out.read_bytes() == before and len(server.requests) == 4


@pytest.mark.parametrize("content", ["Dear ...", '{"text": "a"}\n', "x" * 100 + "\n"])
def test_a_file_of_something_else_is_left_as_it_is(server, out, generate, content):
    out.write_text(content)
    code, _, error = generate()
    assert code == 2 and str(out) in error
    assert out.read_text() == content and server.requests == []


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--set", "sample.top_k=5"), "sample.top_k = 5: expected 0, for an OpenAI-compatible"),
        (("--set", "sample.constrained=True"), "sample.constrained = True: expected False"),
        (("--url", "http://me:word@h/v1"), "--url: needs http://"),
        (("--adapter", "runs/x"), "--adapter and --url are two writers"),
        (("--tries", "0"), "--tries needs at least 1"),
        (("--timeout", "nan"), "--timeout a number of seconds above 0"),
        (("--model", ""), "needs --url, --model and --out: add --model"),
        (("--out", "texts.json"), "--out texts.json: expected a name that ends in .jsonl"),
        (("--set", "eval.num_problems=9999"), "eval.num_problems = 9999; the task has 32"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is(server, generate, more, why):
    code, _, error = generate(*more)
    assert code == 2 and why in error and server.requests == []


def test_two_at_once_are_not_let_write_the_same_file(server, out, generate):
    entered, release = threading.Event(), threading.Event()

    def reply(body):
        entered.set()
        release.wait(60)
        return written("a")

    server.replies = [reply]
    first = threading.Thread(target=cli.main, args=(words_of(server, out),))
    first.start()
    assert entered.wait(60)
    code, _, error = generate()
    release.set()
    first.join()
    assert code == 2 and "another seal-jax generate writes to it" in error
    assert sorted(texts_in(out)) == sorted(NAMES)


def test_a_text_that_was_cut_off_is_a_text(server, out, generate):
    server.replies = [written("a", "length")]
    code, said, _ = generate()
    assert code == 0 and "4 texts more; 4 cut off at max_tokens" in said
    assert {row["finish"] for row in read_jsonl(out)} == {"length"}


READ = {
    "a text": (written("a\nb"), "a\nb"),
    "no model and usage": (written("a", model=None, usage=None), "a"),
    "odd usage": (written("a", usage=[3]), "a"),
    "thoughts": (written("<think>hm</think>\n\na"), "a"),
    "thoughts without a beginning": (written("hm</think>a"), "a"),
}
UNREAD = {
    "junk": (b"junk", "not the JSON", False),
    "a list": (b"[]", "not the JSON", False),
    "no choice": (b'{"choices": []}', "not the JSON", False),
    "a text for a message": (b'{"choices": [{"message": "a"}]}', "not the JSON", False),
    "no text": (written(None), "no text in it", False),
    "parts": (written([{"text": "a"}]), "no text in it", False),
    "half a pair": (written("\ud800"), "no text in it", False),
    "an empty text": (written(" \n"), "an empty text, finish_reason 'stop'", False),
    "all tokens": (written("", "length"), "an empty text, finish_reason 'length'", True),
    "thoughts alone": (written("<think>hm", "length"), "nothing but thoughts", True),
    "filtered": (written("a", "content_filter"), "refused: 'content_filter'", True),
    "a refusal": (
        (0, 0, b'{"choices": [{"message": {"content": "", "refusal": "I\\u001b won\'t"}}]}'),
        "the model refused: ",
        True,
    ),
}


@pytest.mark.parametrize(("reply", "text"), READ.values(), ids=READ.keys())
def test_an_answer_is_read(reply, text):
    usage = []
    assert read_answer((), usage, reply[2]).text == text
    assert len(usage) == 1 and isinstance(usage[0], dict)


@pytest.mark.parametrize(("reply", "why", "is_final"), UNREAD.values(), ids=UNREAD.keys())
def test_an_answer_without_a_text_is_a_failure(reply, why, is_final):
    found = read_answer((), [], reply if isinstance(reply, bytes) else reply[2])
    assert isinstance(found, Failure) and why in found.reason and found.reason.isprintable()
    assert found.is_final == is_final and json.dumps(found.reason)
