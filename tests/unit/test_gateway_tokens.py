"""The tokeniser and chat template of a folder made here."""

import json
import threading

import pytest

from services.gateway.http.requests import ConversationMessage
from services.gateway.http.tokenizer import INLINE_CHARACTERS, ChatTokenizer
from shared.errors import InvalidRequest, SettingsError
from tests.support.tiny_tokenizer import make_folder


@pytest.fixture
def tokenizer(tmp_path):
    return ChatTokenizer.load(str(make_folder(tmp_path)))


def decode(tokenizer, ids):
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


async def test_chat_renders_the_template_without_a_second_bos(tokenizer):
    ids = await tokenizer.chat(
        [ConversationMessage(role="user", content="<b>é"), ConversationMessage(role="assistant", content="yes")]
    )
    # trim_blocks and lstrip_blocks, as transformers sets them
    assert decode(tokenizer, ids) == "<s><user><b>é</s>\n<assistant>yes</s>\n<assistant>"


async def test_parts_are_joined(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ids = await tokenizer.chat([ConversationMessage(role="user", content=parts)])
    assert "<user>a\nb</s>" in decode(tokenizer, ids)


async def test_completions_get_special_tokens(tokenizer):
    assert decode(tokenizer, await tokenizer.text("hi")) == "<s>hi"


async def test_long_texts_leave_the_loop(tokenizer):
    before = threading.active_count()
    ids = await tokenizer.text("a" * (INLINE_CHARACTERS + 1))
    assert len(ids) == INLINE_CHARACTERS + 2
    assert threading.active_count() > before


@pytest.mark.parametrize("length", [10, INLINE_CHARACTERS + 1])
async def test_a_prompt_that_does_not_fit_is_refused_by_its_count(tokenizer, length):
    counts = []

    def fits(count):
        counts.append(count)
        raise InvalidRequest("too long")

    with pytest.raises(InvalidRequest, match="too long"):
        await tokenizer.text("a" * length, fits)
    with pytest.raises(InvalidRequest, match="too long"):
        await tokenizer.chat([ConversationMessage(role="user", content="a" * length)], fits)
    text, chat = counts
    assert text == length + 1
    assert chat > length


async def test_a_template_may_refuse(tokenizer):
    with pytest.raises(InvalidRequest) as refused:
        await tokenizer.chat([ConversationMessage(role="developer", content="x")])
    assert refused.value.param == "messages"
    assert "no developers here" in refused.value.message


async def render(tmp_path, template, **values):
    tokenizer = ChatTokenizer.load(str(make_folder(tmp_path, template)))
    return decode(
        tokenizer, await tokenizer.chat([ConversationMessage(role="user", content=values.get("content", "x"))])
    )


async def test_tojson_does_not_escape_html(tmp_path):
    assert await render(tmp_path, "{{ messages[0]['content'] | tojson }}", content="<é>") == '"<é>"'


async def test_loop_controls_generation_and_time(tmp_path):
    template = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{% generation %}g{% endgeneration %}{{ strftime_now('%Y') | length }}"
    assert await render(tmp_path, template) == "01g4"


async def test_templates_run_in_a_sandbox(tmp_path):
    with pytest.raises(InvalidRequest):
        await render(tmp_path, "{{ ''.__class__.__mro__[1].__subclasses__() }}")


async def test_a_template_file_wins(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("file")
    tokenizer = ChatTokenizer.load(str(folder))
    assert decode(tokenizer, await tokenizer.chat([ConversationMessage(role="user", content="x")])) == "file"


async def test_no_template(tmp_path):
    tokenizer = ChatTokenizer.load(str(make_folder(tmp_path, None)))
    with pytest.raises(InvalidRequest, match="no chat template"):
        await tokenizer.chat([ConversationMessage(role="user", content="x")])


async def test_truncation_in_the_file_is_not_ours(tmp_path):
    folder = make_folder(tmp_path)
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    assert len(await ChatTokenizer.load(str(folder)).text("abcdef")) == 7


def test_a_padded_vocabulary(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "config.json").write_text('{"vocab_size": 1000}')
    assert ChatTokenizer.load(str(folder)).vocabulary == 1000


def test_bad_folders(tmp_path):
    with pytest.raises(SettingsError, match=r"no tokenizer\.json"):
        ChatTokenizer.load(str(tmp_path))
    with pytest.raises(SettingsError, match="there is no folder"):
        ChatTokenizer.load(str(tmp_path / "absent"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SettingsError, match="cannot be read"):
        ChatTokenizer.load(str(tmp_path))
    with pytest.raises(SettingsError, match="does not compile"):
        ChatTokenizer.load(str(make_folder(tmp_path, "{% if %}")))
