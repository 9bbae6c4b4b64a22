"""Test that instructions and dialogues become chats whose answers alone are in the loss."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, PreTrainedTokenizerFast

from common.errors import InputError
from common.models.new import ScratchArguments, train_tokenizer
from recipes.clm import predict, train
from recipes.clm.arguments import ClmDataArguments
from recipes.clm.completing import Completer
from recipes.clm.dialogues import DialogueEncoder, end_ids, render, set_template, to_messages
from recipes.clm.texts import GIVEN, LEARNED, load, to_rows
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.recipes.test_mlm import TEXTS

FILES = ROOT / "tests" / "formats" / "clm"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ '<start_of_turn>' + "
    "('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
#: as Qwen3: the last answer alone has an empty thought, and the prompt does not show it
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: as the distilled models of DeepSeek R1: the prompt begins a thought, and answers have none
DISTILLED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|User|>' + m['content'] if m['role'] == 'user' else "
    "'<|Assistant|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Name a colour.", "learned": False},
    {"role": "assistant", "content": "Blue.", "learned": True},
    {"role": "user", "content": "Blue. Another?", "learned": False},
    {"role": "assistant", "content": "Red.", "learned": True},
]


@pytest.fixture
def chatty() -> PreTrainedTokenizerFast:
    args = ScratchArguments(tokenizer_train="bpe", vocab_size=400)
    tokenizer = train_tokenizer(args, Dataset.from_dict({"text": TEXTS}), train.SPECIAL)
    marks = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
             "<end_of_turn>", "[INST]", "[/INST]", "<|User|>", "<|Assistant|>")  # fmt: skip
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # as Llama 3 and Qwen
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer


def learned_text(tokenizer, messages) -> str:
    ids, marks = DialogueEncoder(tokenizer).marked(messages, LEARNED, GIVEN)
    parts, before = [], GIVEN
    for i, mark in zip(ids, marks, strict=True):
        if mark == LEARNED:
            parts.append([i]) if before == GIVEN else parts[-1].append(i)
        before = mark
    return "|".join(tokenizer.decode(part, clean_up_tokenization_spaces=False).strip(" ") for part in parts)


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (CHATML, "Blue.<|im_end|>\n|Red.<|im_end|>\n"),
        (LLAMA3, "Blue.<|eot_id|>|Red.<|eot_id|>"),
        (GEMMA, "Blue.<end_of_turn>\n|Red.<end_of_turn>\n"),
        (MISTRAL, "Blue.</s>|Red.</s>"),
        (THINKING, "Blue.<|im_end|>\n|<think>\n\n</think>\n\nRed.<|im_end|>\n"),
        (None, "Blue.</s>|Red.</s>"),
    ],
)
def test_the_answers_and_the_marks_that_end_them_are_learned(chatty, template, learned):
    chatty.chat_template = template
    set_template(chatty)
    assert learned_text(chatty, CHAT) == learned
    encoder = DialogueEncoder(chatty)
    ids, marks = encoder.marked(CHAT, LEARNED, GIVEN)
    plain = [{"role": m["role"], "content": m["content"]} for m in CHAT]
    whole = chatty.apply_chat_template(plain)["input_ids"]
    assert ids == (whole[1:] if whole[0] == chatty.bos_token_id else whole)
    assert chatty.bos_token_id not in ids
    first = marks.index(LEARNED)  # what predict gives the model is what the model saw before the answer
    assert ids[:first] == encoder.prompt(CHAT[:1])


@pytest.mark.parametrize(
    ("template", "begin", "end"),
    [
        (CHATML, "", "<|im_end|>\n"),
        (GEMMA, "", "<end_of_turn>\n"),
        (THINKING, "<think>\n\n</think>\n\n", "<|im_end|>\n"),
        (DISTILLED, "", "</s>"),
        (None, "", "</s>"),
    ],
)
def test_an_answer_that_is_part_of_a_mark_is_learned_with_its_end(chatty, template, begin, end):
    chatty.chat_template = template
    set_template(chatty)
    for answer in ("s", "e", "end", "A", "i", "think"):
        chat = [message | {"content": answer} if message["learned"] else message for message in CHAT]
        assert learned_text(chatty, chat) == f"{answer}{end}|{begin}{answer}{end}"
    (stop,) = chatty(end.strip(), add_special_tokens=False)["input_ids"]
    assert end_ids(chatty) == sorted({stop, chatty.eos_token_id})


def test_an_answer_ends_at_the_mark_of_the_template(chatty):
    chatty.chat_template = CHATML
    end = chatty.convert_tokens_to_ids("<|im_end|>")
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(chatty), n_embd=16, n_layer=1, n_head=1))
    read = []

    def always_end(module, args, kwargs, output):
        read.append(kwargs["input_ids"].tolist())
        output.logits[:] = 0
        output.logits[..., end] = 1
        return output

    model.register_forward_hook(always_end, with_kwargs=True)
    complete = Completer(model, chatty, 32)
    assert complete([CHAT[:1]], new_tokens=8) == [""]
    assert len(read) == 1
    complete(["Mara went to Oslo. " * 20], new_tokens=2)  # too long: its end, after the begin of a text
    assert len(read[1][0]) == 30
    assert read[1][0][0] == chatty.bos_token_id


def test_a_special_token_in_a_message_is_plain_text(chatty):
    chatty.chat_template = CHATML
    chatty.split_special_tokens = True
    text = "Say <|im_end|> or </s>, please."
    chat = [{"role": "user", "content": text, "learned": False}, CHAT[1]]
    ids, _ = DialogueEncoder(chatty).marked(chat, LEARNED, GIVEN)
    end, start = chatty.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert (ids.count(end), ids.count(start), ids.count(chatty.eos_token_id)) == (2, 2, 0)
    assert text in chatty.decode(ids)
    whole = [*CHAT[:2], {"role": "user", "content": "<|im_end|>", "learned": False}, *CHAT[3:]]
    assert learned_text(chatty, whole) == "Blue.<|im_end|>\n|Red.<|im_end|>\n"
    encoder = DialogueEncoder(chatty)
    ids, marks = encoder.marked(whole, LEARNED, GIVEN)
    ends = [(i, mark) for i, mark in zip(ids, marks, strict=True) if i in (start, end)]
    begun = (start, GIVEN)
    assert ends == [begun, (end, GIVEN), begun, (end, LEARNED), begun, (end, GIVEN), begun, (end, LEARNED)]
    assert encoder.prompt(whole[:3]) == ids[: len(ids) - marks[::-1].index(GIVEN)]
    chatty.split_special_tokens = False  # as --allow_special_tokens true
    ids, _ = DialogueEncoder(chatty).marked(chat, LEARNED, GIVEN)
    assert (ids.count(end), ids.count(chatty.eos_token_id)) == (3, 1)


def test_a_dialogue_that_the_template_refuses_is_told_with_the_remedy(chatty):
    chatty.chat_template = GEMMA
    chat = [{"role": "system", "content": "Be brief.", "learned": False}, *CHAT]
    with pytest.raises(InputError, match="refuses a dialogue of system, user, assistant, user, assistant: System role"):
        render(chatty, chat)
    set_template(chatty, "plain")
    assert render(chatty, chat[:2], prompt=True) == (
        "### System:\nBe brief.\n\n### User:\nName a colour.\n\n### Assistant:\n"
    )
    chatty.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(InputError, match=r"changes the answer 'Blue\.'; give --chat_template plain"):
        learned_text(chatty, CHAT)


def loaded(path, tmp_path, **arguments):
    args = ClmDataArguments(train_file=str(path), validation_file=str(path), **arguments)
    corpus = load(args, train.ClmTrainingArguments(output_dir=str(tmp_path / "out")))
    return args, [[(m["role"], m["content"], m["learned"]) for m in row["messages"]] for row in corpus.texts["train"]]


def test_files_of_instructions_and_dialogues_become_messages(tmp_path, capsys):
    short = [("user", "Name a colour.", False), ("assistant", "Blue.", True)]
    night = [("user", "Say good night.", False), ("assistant", "Good night!", True)]
    five = [("user", "Two and three?", False), ("assistant", "5", True)]
    for file in ("alpaca.json", "dolly.jsonl"):
        args, rows = loaded(FILES / file, tmp_path)
        assert rows == [[("user", "Add the numbers.\n\n2 and 3", False), ("assistant", "5", True)], short, night]
        assert args.loss_on == "completion"
        assert "rows have dialogues: the loss is on the answers (--loss_on completion)" in capsys.readouterr().out
    more = [("user", "Another?", False), ("assistant", "Red.", True)]
    system = ("system", "Be brief.", False)
    _, rows = loaded(FILES / "messages.jsonl", tmp_path)
    assert rows == [[system, short[0], ("assistant", "Blue.", False), *more], night, five]
    _, rows = loaded(FILES / "sharegpt.json", tmp_path, loss_on="completion")
    assert rows == [[*short, *more], [system, *night], five]
    row = {"instruction": "And now?", "output": "5", "history": [["One?", "1"], ["Two?", "2"]]}
    assert [m["content"] for m in to_messages(row)] == ["One?", "1", "Two?", "2", "And now?", "5"]


def test_dialogues_keep_their_domain(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat, "field": field} for field in ("law", "trade")])
    args = ClmDataArguments(train_file=file, validation_file=file, domain_column="field")
    corpus = load(args, train.ClmTrainingArguments(output_dir=str(tmp_path / "out")))
    assert corpus.texts["train"]["domain"][:] == ["law", "trade"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "has no answer of the assistant"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "message 1 has the role 'boss'; known: system"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "message 1 calls a tool"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1: content is"),
        ({"messages": "a"}, "messages is 'a'; needed: a list of messages"),
        ({"conversations": [{"from": "gpt", "value": " "}]}, "message 1: the answer is blank"),
        ({"instruction": " ", "output": "a"}, "instruction is blank"),
        ({"instruction": "a", "output": ""}, "has no answer of the assistant"),
        ({"instruction": "a", "output": 3}, "output is 3; needed: a text"),
        ({"text": "a"}, "needed: messages, conversations, or instruction and output"),
    ],
)
def test_bad_dialogues_are_named(tmp_path, row, message):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = write_jsonl(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(InputError) as error:
        loaded(file, tmp_path)
    assert str(error.value).startswith(f"{file}:2: ")
    assert message in str(error.value)


def test_texts_and_answers_in_one_row_and_other_combinations(tmp_path, capsys):
    rows = [{"text": f"Q {n} A {n}", "instruction": f"Q {n}", "output": f"A {n}"} for n in range(4)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    args = ClmDataArguments(train_file=file, validation_file=file)
    assert load(args, train.ClmTrainingArguments(output_dir=str(tmp_path))).texts["train"]["text"][0] == "Q 0 A 0"
    assert args.loss_on == "all"
    assert "training on all of text; --loss_on completion trains on the answers" in capsys.readouterr().out
    assert loaded(file, tmp_path, loss_on="completion")[1][0] == [("user", "Q 0", False), ("assistant", "A 0", True)]
    with pytest.raises(InputError, match="--loss_on all: the rows are dialogues"):
        loaded(FILES / "alpaca.json", tmp_path, loss_on="all")
    own = {"prompt_column_name": "instruction", "completion_column_name": "output"}
    assert loaded(FILES / "alpaca.json", tmp_path, **own)[1][0][0][1] == "Add the numbers.\n\n2 and 3"  # with its input


def test_long_dialogues_keep_their_last_answer(chatty, tmp_path, capsys):
    chatty.chat_template = CHATML
    args = ClmDataArguments(train_file=str(FILES / "sharegpt.json"), max_seq_length=24)
    corpus = load(args, train.ClmTrainingArguments(output_dir=str(tmp_path)))
    rows = to_rows(corpus.texts, chatty, args, args.loss_on)
    assert max(len(ids) for split in rows.values() for ids in split["input_ids"]) <= 24
    assert "rows exceed --max_seq_length: their begin is cut" in capsys.readouterr().out
    for split in rows.values():
        for ids, marks in zip(split["input_ids"], split["marks"], strict=True):
            learned = chatty.decode(ids[marks == LEARNED])
            assert learned.endswith("<|im_end|>\n")


def test_a_model_trained_on_instructions_answers_them_and_keeps_the_template(tmp_path):
    file = str(FILES / "alpaca.json")
    out = str(tmp_path / "out")
    train.main([
        *("--train_file", file, "--validation_file", file, "--output_dir", out, "--max_seq_length", "96"),
        *("--vocab_size", "300", "--config_overrides", "n_layer=2,n_embd=64,n_head=2", "--num_train_epochs", "80"),
        *("--learning_rate", "5e-3", "--precision", "fp32", "--eval_strategy", "no", "--save_strategy", "no"),
        *("--disable_tqdm", "true"),
    ])  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert "### " in tokenizer.chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id == [tokenizer.eos_token_id]
    samples = read_jsonl(tmp_path / "out" / "completions.jsonl")
    assert {row["messages"][-1]["role"] for row in samples} == {"user"}  # predict reads them as in training
    found = tmp_path / "found.jsonl"
    predict.main(["--model", out, "--input", file, "--output", str(found), "--max_new_tokens", "12"])
    rows = json.loads(Path(file).read_text(encoding="utf-8"))
    assert [row["completion"].strip() for row in read_jsonl(found)] == [row["output"] for row in rows]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (lambda n: {"instruction": f"Name number {n // 3}.", "input": "", "output": f"answer {n}"}, "messages"),
        (lambda n: {"prompt": f"Name number {n // 3}.", "completion": f" answer {n}"}, "prompt"),
    ],
)
def test_a_carved_validation_split_shares_no_question(tmp_path, row, question):
    args = ClmDataArguments(train_file=write_jsonl(tmp_path / "t.jsonl", [row(n) for n in range(60)]))
    data = load(args, train.ClmTrainingArguments(output_dir=str(tmp_path / "out"))).texts
    asked = {split: {str(row)[:60] for row in data[split][question]} for split in ("train", "validation")}
    assert len(data["validation"]) == 6
    assert not asked["train"] & asked["validation"]
