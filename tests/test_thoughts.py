"""Thoughts of reasoning models: which tags mark them, what is left of a text, and who refuses."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import TEMPLATE, tiny_fast
from tiny_run import CONFIG

from seal_jax.config import load_config
from seal_jax.config.setup import make_stages, settings_of
from seal_jax.hosts.files import read_jsonl
from seal_jax.models.model import save_config
from seal_jax.models.thoughts import Thoughts, find_tags, read, state_of, text_before
from seal_jax.models.tokenizer import HFTokenizer
from seal_jax.models.weights import save_safetensors
from seal_jax.outer.ledger import append_outcome, read_ledger
from seal_jax.outer.problems import split_problems
from seal_jax.outer.rewards import Outcome
from seal_jax.outer.stages import check_prompts, exam_prompts, gold_text, parse
from seal_jax.outer.waves import InnerRun
from seal_jax.sources import load_model
from seal_jax.tasks.task import Rejected, SelfEdit

pytest_plugins = ["tiny_fixtures"]

TAGS = "<think>", "</think>"
FREE, OPEN = state_of(TAGS, "assistant\n"), state_of(TAGS, "assistant\n<think>\n")
# Qwen3's ways: an answer in a conversation has an empty thought before it, and so has a prompt that
# asks for no thoughts.
THINKS = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
    "{% if '</think>' in m['content'] %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{% else %}{{ m['content'] }}{% endif %}",
).replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)
# DeepSeek-R1's: a prompt begins the thought, and a conversation has none.
BEGINS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>"
    "{{ m['content'] }}{% else %}<|im_end|>{{ m['content'].split('</think>')[-1] }}<|endoftext|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("state", "written", "text", "thoughts", "is_cut"),
    [
        (FREE, "Red.\n", "Red.\n", "", False),
        (FREE, "<think>\nBlue?\n</think>\n\nRed.", "Red.", "Blue?", False),
        (FREE, "<think>\n\n</think>\n\nRed.", "Red.", "", False),
        (FREE, "<think>\nRed, I think", "", "Red, I think", True),
        (OPEN, "Blue?\n</think>\n\nRed.", "Red.", "Blue?", False),
        (OPEN, "<think>\nBlue?</think>Red.", "Red.", "Blue?", False),
        (OPEN, "Red.", "", "Red.", True),
        (OPEN, "", "", "", True),
        # Not balanced: what follows the last closing tag counts.
        (FREE, "Blue</think>Green</think> Red", "Red", "Blue</think>Green", False),
        (FREE, "<think><think>a</think>b</think>Red", "Red", "<think>a</think>b", False),
        (FREE, "Red<think>Blue", "", "Red<think>Blue", True),
        (OPEN, "a</think>Red<think>b</think>Blue", "Blue", "a</think>Red<think>b", False),
        (OPEN, "a</think>Red<think>b", "", "a</think>Red<think>b", True),
        (FREE, "<think>a</think>", "", "a", False),
    ],
)
def test_the_text_is_what_follows_the_thoughts(state, written, text, thoughts, is_cut):
    assert read(state, written) == (text, thoughts, is_cut)


def test_without_thoughts_a_text_is_as_it_was_written():
    assert read(None, " <think>a</think> b") == (" <think>a</think> b", "", False)


pieces = st.lists(st.sampled_from([*TAGS, "<thi", "nk>", "</", "\n", " ", "a", "END", "\ud800"]))


@given(pieces.map("".join), st.booleans())
def test_any_text_is_read(text, is_open):
    state = Thoughts(*TAGS, is_open, False)
    found = read(state, text)
    assert TAGS[1] not in found.text and TAGS[0] not in found.text
    assert found.text in text and found.thoughts in text
    assert not (found.is_cut and found.text)


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think></think>", "</think><", "<thin"])
def test_megabytes_of_tags_are_read(piece):
    for state in (FREE, OPEN):
        assert read(state, piece * 200_000).text in ("", "<", piece * 200_000)
        assert text_before(piece * 200_000, ("END",), state) == piece * 200_000


@given(pieces, st.booleans())
def test_where_a_text_stops_does_not_change_as_it_grows(parts, is_open):
    state = Thoughts(*TAGS, is_open, False)
    stopped = None
    for n in range(len(parts) + 1):
        text = "".join(parts[:n])
        found = text_before(text, ("END", "a"), state)
        assert stopped in (None, found)
        stopped = found if found != text else None


def test_a_stop_string_counts_behind_the_thought():
    assert text_before("<think>\na\n</think>Red\nb", ("\n",), FREE) == "<think>\na\n</think>Red"
    assert text_before("a\n</think>Red\nb", ("\n",), OPEN) == "a\n</think>Red"
    assert text_before("a\nb", ("\n",), OPEN) == "a\nb"
    assert text_before("a\nb", ("\n",), FREE) == "a"


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        (None, None),
        (TEMPLATE, None),
        (THINKS, TAGS),
        (BEGINS, TAGS),
        ({"default": THINKS, "tool_use": TEMPLATE}, TAGS),
        ({"default": TEMPLATE, "tool_use": THINKS}, None),
        (TEMPLATE + "{# [THINK] #}", ("[THINK]", "[/THINK]")),
    ],
)
def test_the_template_says_which_tags_mark_thoughts(template, tags):
    found = HFTokenizer(tiny_fast(template)).thoughts(chat=False)
    assert found == (None if tags is None else (*tags, False, False))
    if not isinstance(template, dict):
        assert find_tags(template) == tags


def test_where_a_prompt_leaves_the_thought():
    thinks, begins = HFTokenizer(tiny_fast(THINKS)), HFTokenizer(tiny_fast(BEGINS))
    assert thinks.thoughts(chat=True) == FREE
    assert begins.thoughts(chat=True) == OPEN and begins.thoughts(chat=False) == FREE
    quiet = thinks.with_template("org/model", {"enable_thinking": False})
    assert quiet.thoughts(chat=True) == (*TAGS, False, True)
    assert quiet.decode(quiet.encode_prompt("x", True)).endswith("<think>\n\n</think>\n\n")
    assert thinks.thoughts(chat=True) == FREE  # it is another's argument


def test_tags_that_are_special_tokens_stay_in_the_text():
    from tokenizers import AddedToken

    fast = tiny_fast(THINKS)
    fast.add_special_tokens(
        {"additional_special_tokens": [AddedToken(tag, special=True) for tag in TAGS]}
    )
    tokenizer = HFTokenizer(fast)
    start, end = map(fast.convert_tokens_to_ids, TAGS)
    ids = [start, *tokenizer.encode("a", start=False), end, *tokenizer.encode("b", start=False)]
    text = tokenizer.decode([*ids, tokenizer.stop_ids[0]])
    assert read(tokenizer.thoughts(True), text) == ("b", "a", False)
    assert start not in tokenizer.encode("<think>")  # the text of a user cannot spell one


def test_marks_around_an_answer_are_no_text_of_it():
    """In Cohere's way: thoughts, then the answer between marks; none of the tokens is special."""
    from tokenizers import AddedToken

    response = "<|START_RESPONSE|>", "<|END_RESPONSE|>"
    tags = "<|START_THINKING|>", "<|END_THINKING|>"
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
        "<|im_end|>{% else %}<|im_start|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>"
        "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>"
        "{% if reasoning is defined and not reasoning %}<|START_THINKING|><|END_THINKING|>"
        "{% else %}<|START_THINKING|>{% endif %}{% endif %}"
    )
    fast = tiny_fast(template)
    fast.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*tags, *response)])
    tokenizer = HFTokenizer(fast)
    thoughts = tokenizer.thoughts(chat=True)
    assert thoughts == (*tags, True, False)
    written = f"why?{tags[1]}{response[0]}Paris{response[1]}<|im_end|>"
    text = tokenizer.decode(fast.encode(written, add_special_tokens=False))
    assert read(thoughts, text) == ("Paris", "why?", False)
    quiet = tokenizer.with_template("org/model", {"reasoning": False})
    assert quiet.thoughts(chat=True) == (*tags, False, True)


def stages_of(folder, template, *overrides):
    """Return stages of a random model with a chat template."""
    model = load_model("random:byte-tiny")
    folder.mkdir()
    save_safetensors(folder, model.params, model.config)
    save_config(folder, model._replace(tokenizer=HFTokenizer(tiny_fast(template))), "float32")
    fixed = ("model.chat=True", f"model.source={folder}", "outer.num_steps=1")
    return make_stages(settings_of(load_config(CONFIG, (*fixed, *overrides))))


def test_what_ends_inside_a_thought_is_rejected(one_device, tmp_path):
    stages = stages_of(tmp_path / "m", BEGINS)
    ((problem, _),) = batch = split_problems(stages.settings, stages.task)[0][:1]
    (text,) = stages.task.passage_only(problem).training_texts[:1]
    ((cut, ended),) = parse(stages, batch, [text, f"so\n</think>\n{text}"])
    prompt = stages.task.edit_prompt(problem)
    assert cut == Rejected(problem.id, prompt, "", "cut off inside a thought", text)
    assert ended == stages.task.parse(problem, text)._replace(thoughts="so")


def test_thoughts_are_no_training_text_and_cost_no_inner_run(one_device, tmp_path):
    stages = stages_of(tmp_path / "m", THINKS)
    ((problem, exam),) = batch = split_problems(stages.settings, stages.task)[0][:1]
    lines = "\n".join(stages.task.passage_only(problem).training_texts)
    said = f"<think>\nzzz {problem.title}\n</think>\n\n{lines}"
    ((edit, same, cut),) = parse(stages, batch, [said, lines, said[:12]])
    plain = stages.task.parse(problem, lines)
    assert isinstance(edit, SelfEdit) and edit == plain._replace(thoughts=f"zzz {problem.title}")
    assert same == plain and cut.reason == "cut off inside a thought"
    # The ledger knows it by what it is trained on, as it did when there were no thoughts.
    run = InnerRun(("x", 0, 0), 0, problem, exam, edit)
    fields = ", ".join(f"{k}={v!r}" for k, v in plain._asdict().items() if k != "thoughts")
    digest = xxhash.xxh64_hexdigest(f"SelfEdit({fields})".encode())
    outcome = Outcome(1.0, -1.0, 2.0, 1.0, ("a",), 3)
    append_outcome(str(tmp_path / "ledger"), run, outcome)
    assert read_jsonl(tmp_path / "ledger")[0]["text"] == digest
    assert read_ledger(str(tmp_path / "ledger"), [run._replace(edit=plain)]) == {run.name: outcome}


def test_a_gold_answer_stands_where_the_template_puts_answers(one_device, tmp_path):
    for template, between in ((THINKS, "assistant\n<think>\n\n</think>\n\n"), (BEGINS, "")):
        stages = stages_of(tmp_path / str(len(between)), template)
        problem, exam = split_problems(stages.settings, stages.task)[0][0]
        question = exam.questions[0]
        asked = stages.task.answer_prompt(problem, question.question)
        text = gold_text(stages, asked, question.answer)
        tail = "" if template is BEGINS else "\n"
        expected = f"{asked}{tail}{between}{question.answer}"
        assert stages.model.tokenizer.decode(text.tokens).endswith(expected)
        assert text.tokens[-1] not in stages.model.tokenizer.stop_ids


def test_a_gold_answer_that_cannot_be_scored_is_refused_before_the_run(one_device, tmp_path):
    stages = stages_of(tmp_path / "m", THINKS)
    problem, exam = split_problems(stages.settings, stages.task)[0][0]
    question = exam.questions[0]._replace(answer="a</think>b")  # the template leaves b of it
    asked = [(problem, exam._replace(questions=(exam.questions[1], question)))]
    check_prompts(stages, asked)  # nobody scores it
    with pytest.raises(ValueError, match=f"problem {problem.id}: .*changes the text 'a</think>b'"):
        check_prompts(stages, asked, golds=True)


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_begins_with_the_prefix(one_device, tmp_path, chat):
    plain = stages_of(tmp_path / "plain", TEMPLATE, f"model.chat={chat}")
    stages = stages_of(tmp_path / "m", TEMPLATE, f"model.chat={chat}", "answer.prefix=Answer:")
    problem, exam = split_problems(stages.settings, stages.task)[0][0]
    question = exam.questions[0]
    asked = stages.task.answer_prompt(problem, question.question)
    decode = stages.model.tokenizer.decode
    bare, prompt = exam_prompts(plain, problem, exam)[0], exam_prompts(stages, problem, exam)[0]
    assert decode(prompt) == decode(bare) + ("Answer:" if chat else " Answer:")
    text = gold_text(stages, asked, question.answer)
    assert decode(text.tokens) == f"{decode(prompt)} {question.answer}"
    inside = [t for t, counts in zip(text.tokens, text.loss_mask, strict=True) if counts]
    assert decode(inside).strip() == question.answer
    assert list(text.tokens[: len(prompt)]) == prompt  # what is scored is what is generated


@pytest.mark.parametrize(
    ("template", "overrides", "message"),
    [
        (BEGINS, ["answer.prefix=Answer:"], "answer.prefix = 'Answer:': expected ''.*a thought"),
        (TEMPLATE, ["sample.max_thought_tokens=8"], "sample.*= 8: expected 0.*knows no thoughts"),
        (
            THINKS,
            ["answer.max_thought_tokens=8", "model.template_args.enable_thinking=False"],
            "answer.max_thought_tokens = 8: expected 0.*not to think",
        ),
        (BEGINS, ["sample.constrained=True"], "begin a thought"),
        (THINKS, ["model.template_args.enable_thinkin=False"], "'enable_thinkin'.*enable_thinking"),
    ],
)
def test_what_does_not_fit_the_template_is_refused(
    one_device, tmp_path, template, overrides, message
):
    with pytest.raises(ValueError, match=message):
        stages_of(tmp_path / "m", template, *overrides)
