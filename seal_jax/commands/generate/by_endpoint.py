"""Self-edits that a model behind an OpenAI-compatible endpoint writes, a line of a file each.

No model is loaded, and no device is used. A text is in the file as soon as it is there, so the same
command goes on where it was ended, and asks for what is missing alone. A text that could not be had
is a line with an `error`. The lines are a file of `eval.texts`; see tasks/knowledge/texts.py.
"""

import contextlib
import fcntl
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent import futures
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from seal_jax.hosts.console import progress, say
from seal_jax.hosts.endpoint import Endpoint, Failure, ask, check_url, key_of
from seal_jax.hosts.files import append_json, read_jsonl
from seal_jax.hosts.json_text import parse_json
from seal_jax.hosts.outputs import check_output
from seal_jax.models.thoughts import TAGS, Thoughts, text_before
from seal_jax.tasks.task import Problem, Task
from seal_jax.types import SampleSettings

_PARALLEL = 8  # requests at once
_IN_A_ROW = 24  # texts that fail one after the other: the endpoint is gone, and the rest can wait
_TOKEN = 4  # characters, about, for the line that says what it will cost
_BEGIN = b'{"problem": '  # of every line
# What an endpoint cannot be asked for, with the value that asks for nothing.
_UNSENT = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "constrained": False}


class Request(NamedTuple):
    """What is asked of whom, the same for every text of a file."""

    endpoint: Endpoint
    model: str
    sample: SampleSettings

    @property
    def fields(self) -> dict[str, Any]:
        """What a line keeps of it: lines under other values are another file's."""
        names = ("temperature", "top_p", "max_tokens", "max_thought_tokens", "stop")
        return {"model": self.model} | {
            name: list(value) if isinstance(value := getattr(self.sample, name), tuple) else value
            for name in names
        }


class Written(NamedTuple):
    """A text as it came, and what the server says of it."""

    text: str
    thoughts: str
    finish: str | None  # 'length': cut off at max_tokens, as the policy's own texts may be
    served_model: str | None


def write_texts(
    task: Task,
    problems: Sequence[Problem],
    request: Request,
    out: str,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Write `sample.num_edits` self-edits for each problem into `out`, as far as they are missing.

    Args:
      wait: see `endpoint.ask`.

    Raises:
      ValueError: the endpoint refuses, or some texts could not be had: `out` has the others. Or the
        config asks for what cannot be sent, or `out` is another command's or is being written.
    """
    _check(request)
    check_output(out, "--out")
    with _alone(out):
        prompts = {problem.id: task.edit_prompt(problem) for problem in problems}
        done = read_written(out, request, prompts)
        asked = [(problem, r) for problem in problems for r in range(request.sample.num_edits)]
        todo = [(problem, r) for problem, r in asked if (problem.id, r) not in done]
        num_tokens = sum(len(prompts[problem.id]) for problem, _ in todo) // _TOKEN
        say(
            f"{request.endpoint.url}: {len(todo)} requests to {request.model}: about"
            f" {num_tokens:,} tokens of prompts, at most"
            f" {len(todo) * request.sample.most_tokens:,} tokens written;"
            f" {len(asked) - len(todo)} of {len(asked)} texts are there already"
        )
        usage: list[Mapping[str, Any]] = []
        write_one = partial(_write_one, task, request, out, usage, wait, threading.Lock())
        try:
            lines = list(_ask_all(request, todo, write_one))
        finally:
            say(_describe_usage(usage))
    say(f"{out}: {_describe(lines)}")
    errors = Counter(line["error"] for line in lines if line["error"])
    if errors:
        reason, _ = errors.most_common(1)[0]
        raise ValueError(
            f"{out}: {errors.total()} of {len(asked)} texts could not be had (mostly: {reason})."
            " The others are there, and the same command asks for these again"
        )


def read_written(out: str, request: Request, prompts: Mapping[str, str]) -> set[tuple[str, int]]:
    """Return which texts a file has already: (problem, edit).

    Raises:
      ValueError: it was written under another request, or it is no file of ours.
    """
    fields, done = request.fields, set()
    torn = Path(out).read_bytes().rpartition(b"\n")[2]
    if torn[: len(_BEGIN)] != _BEGIN[: len(torn)]:  # it would be cut off as a line of ours
        raise ValueError(f"{out}: is no file of `generate --url`: choose another --out")
    needed = ("problem", "edit", "prompt", "text", *fields)
    for number, line in enumerate(read_jsonl(out, needed), start=1):
        expected = {**fields, "prompt": prompts.get(line["problem"], line["prompt"])}
        for name, value in expected.items():
            if line[name] != value:
                raise ValueError(
                    f"{out}:{number}: was written with {name} = {str(line[name])[:80]!r},"
                    f" asked for {str(value)[:80]!r}: choose another --out"
                )
        if line["text"] is not None:
            done.add((line["problem"], line["edit"]))
    return done


def _check(request: Request) -> None:
    """Raise ValueError where something cannot be sent."""
    check_url(request.endpoint.url, request.endpoint.url_option)
    key_of(request.endpoint.key_variable)
    for name, value in _UNSENT.items():
        if (found := getattr(request.sample, name)) != value:
            raise ValueError(
                f"sample.{name} = {found!r}: expected {value!r}, for an OpenAI-compatible endpoint"
                f" cannot be asked for it (--set sample.{name}={value!r})"
            )


@contextlib.contextmanager
def _alone(out: str) -> Generator[None]:
    """Keep others from writing to a file, which is made if there is none."""
    with open(out, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another seal-jax generate writes to it") from None
        except OSError as error:
            print(f"warning: {out} cannot be locked ({error.strerror})", file=sys.stderr)
        yield


def _ask_all(
    request: Request,
    todo: Sequence[tuple[Problem, int]],
    write_one: Callable[[tuple[Problem, int]], dict[str, Any] | Failure],
) -> Generator[dict[str, Any]]:
    """Yield the lines as they are written, some asked for at once, and none in advance.

    Raises:
      ValueError: the endpoint refuses, or fails again and again. What is under way is written.
    """
    failed, waiting = 0, iter(todo)
    bar = progress(len(todo), f"texts of {request.model}", "text")
    with contextlib.closing(bar), futures.ThreadPoolExecutor(_PARALLEL) as pool:
        running = {pool.submit(write_one, one) for one in islice(waiting, _PARALLEL)}
        while running:
            done, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for future in done:
                line = future.result()
                if isinstance(line, Failure):
                    raise ValueError(line.reason)
                failed = failed + 1 if line["error"] else 0
                if failed == _IN_A_ROW:
                    raise ValueError(
                        f"{request.endpoint.url} gave no text {failed} times in a row (at last:"
                        f" {line['error']}): the same command goes on from here"
                    )
                bar.update(1)
                yield line
            running |= {pool.submit(write_one, one) for one in islice(waiting, len(done))}


def _write_one(
    task: Task,
    request: Request,
    out: str,
    usage: list[Mapping[str, Any]],
    wait: Callable[[float], None],
    lock: threading.Lock,
    asked: tuple[Problem, int],
) -> dict[str, Any] | Failure:
    """Ask for one text and append its line; or return why the endpoint refuses every request."""
    problem, r = asked
    prompt, sample = task.edit_prompt(problem), request.sample
    body = {
        "model": request.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": sample.temperature,
        "top_p": sample.top_p,
        "max_tokens": sample.most_tokens,
        **({"stop": list(sample.stop)} if sample.stop else {}),
    }
    content = json.dumps(body).encode()
    found = ask(request.endpoint, content, partial(read_answer, sample.stop, usage), wait)
    line = {"problem": problem.id, "title": problem.title, "edit": r, **request.fields}
    line["prompt"] = prompt
    if not isinstance(found, Failure):
        rejected = getattr(task.parse(problem, found.text), "reason", None)
        line |= {**found._asdict(), "rejected": rejected, "error": None}
    elif found.status not in (0, 400):  # 400 may be of this prompt alone
        return found
    else:
        line |= {"text": None, "error": found.reason}
    with lock:
        append_json(out, line)
    return line


def read_answer(
    stop: Sequence[str], usage: list[Mapping[str, Any]], body: bytes
) -> Written | Failure:
    """Read the body of a chat completion, which is untrusted; what it has cost goes into `usage`.

    A text that was cut off is a text. An empty one is asked for again, unless it used up
    max_tokens; a refusal is none, and is not asked for again.
    """
    try:
        answer = parse_json(body, "answer")
        choice = answer["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError):
        return Failure("the answer is not the JSON of a chat completion")
    usage.append(answer["usage"] if isinstance(answer.get("usage"), dict) else {})
    if refusal or finish == "content_filter":
        return Failure(f"the model refused: {str(refusal or finish)[:200]!r}", is_final=True)
    if not isinstance(text, str) or not _is_unicode(text):
        return Failure("the answer has no text in it")
    thoughts = ""
    for start, end in TAGS:  # of a server that leaves them in the text
        if text.lstrip().startswith(start) or end in text:
            text, thoughts, _ = Thoughts(start, end, False, False).read(text)
    text = text_before(text, stop)
    if not text.strip():
        what = "nothing but thoughts" if thoughts else "an empty text"
        return Failure(f"{what}, finish_reason {str(finish)[:40]!r}", is_final=finish == "length")
    named = (finish, answer.get("model"))
    return Written(text, thoughts, *(x[:200] if isinstance(x, str) else None for x in named))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:  # half of a surrogate pair
        return False
    return True


def _describe(lines: Sequence[Mapping[str, Any]]) -> str:
    texts = [line for line in lines if not line["error"]]
    parts = [f"{len(texts)} texts more"]
    if cut := sum(line["finish"] == "length" for line in texts):
        parts.append(f"{cut} cut off at max_tokens")
    reasons = Counter(line["rejected"] for line in texts if line["rejected"])
    if reasons:
        parts.append(f"{reasons.total()} that a run will reject ({reasons.most_common(1)[0][0]})")
    if served := sorted({line["served_model"] for line in texts if line["served_model"]}):
        parts.append(f"served by {', '.join(served)}")
    return "; ".join(parts)


def _describe_usage(usage: Sequence[Mapping[str, Any]]) -> str:
    """Say what the answers cost, those that gave no text among them, as far as they said it."""
    counts = [(one.get("prompt_tokens"), one.get("completion_tokens")) for one in usage]
    known = [(i, o) for i, o in counts if type(i) is int and type(o) is int and min(i, o) >= 0]
    read, written = sum(i for i, _ in known), sum(o for _, o in known)
    return (
        f"usage: {read:,} tokens of prompts and {written:,} written, as reported by {len(known)} of"
        f" {len(usage)} answers"
    )
