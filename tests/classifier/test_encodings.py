"""encodings: the likely encoding of a file that is not UTF-8, in short texts of several scripts."""

import locale

import pytest

from classifier.data.encodings import HIGH, first_words, likely_encodings, utf_16_of

TEXTS = {
    "cp1251": [
        "Привет, мир",
        "ПРОДАМ ГАРАЖ",
        "Ґанок із їжею",
        "хорошая гостиница, но шумно",
        "text,label\nотличный фильм,хорошо\n",
    ],
    "cp932": ["こんにちは世界", "東京都", "映画はつまらなかった", "text,label\n素晴らしい部屋,良い\n最悪,悪い\n"],
    "cp949": ["안녕하세요", "별로", "방이 너무 작고 시끄러워요", "text,label\n훌륭한 호텔,좋음\n"],
    "gb18030": ["你好,世界", "这家酒店很好，服务也不错", "text,label\n太难吃了,差\n"],
    "big5": ["你好，世界", "味道不好，送得也慢", "text,label\n太難吃了,差\n"],
    "cp1256": ["مرحبا بالعالم", "الغرفة سيئة", "text,label\nفيلم رائع,جيد\n"],
    "cp1252": [
        "Das Frühstück war „gut“ – für 5 €",
        "¿Qué año?",
        "text,label\nnaïve café,gut\n",
        "déjà vu",
        "Ärger",
        "don\u2019t buy",
    ],
}


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts])
def test_a_text_of_a_few_words_has_its_own_encoding_as_the_likeliest(encoding, text, monkeypatch):
    monkeypatch.setattr(locale, "getencoding", lambda: "UTF-8")
    data = text.encode(encoding)
    assert likely_encodings(data)[0] == encoding
    if len(HIGH.findall(data)) > 1:
        assert likely_encodings((data + b"\n") * 500 + data[:-1])[0] == encoding  # the last character is cut off
    assert first_words(data, encoding) == text.split("\n")[0][:20]


def test_the_encoding_of_the_locale_is_named_too(monkeypatch):
    data = "Türkçe yazı güzel".encode("cp1254")
    monkeypatch.setattr(locale, "getencoding", lambda: "cp1254")
    assert likely_encodings(data) == ["cp1252", "cp1254"]  # a human sees which one is right
    assert [first_words(data, name) for name in likely_encodings(data)] == ["Türkçe yazý güzel", "Türkçe yazı güzel"]
    monkeypatch.setattr(locale, "getencoding", lambda: "UTF-8")
    assert likely_encodings(data) == ["cp1252"]


def test_bytes_that_are_no_text_have_no_likely_encoding(monkeypatch):
    monkeypatch.setattr(locale, "getencoding", lambda: "UTF-8")
    assert likely_encodings(bytes([0x81, 0x20, 0xFF, 0x0A, 0x81, 0x7F])) == []


@pytest.mark.parametrize("text", ["the room was good\nbad\n", "这家酒店很好\n"])
def test_utf_16_is_noticed_with_and_without_a_mark(text):
    assert utf_16_of(text.encode("utf-16")) == "utf-16"
    assert utf_16_of(text.encode("utf-16-le")) == "utf-16-le"
    assert utf_16_of(text.encode("utf-16-be")) == "utf-16-be"
    assert utf_16_of(text.encode("utf-8")) is None
