"""Bytes of captions become the text that their author wrote."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.caption_files.text_encoding import ENCODINGS, Decoded, decode_all

TEXTS = {
    "cp932": ["赤い円、白い背景", "青い髪の女の子、笑顔、制服", "猫が窓辺で寝ている", "1girl, 東方, 帽子"],
    "gb18030": ["红色圆形，白色背景", "一个穿红色裙子的女孩，微笑", "山水画，水墨风格"],
    "big5": ["紅色圓形，白色背景", "一個穿著紅色裙子的女孩", "水墨畫風格的山"],
    "cp949": ["빨간 원, 흰 배경", "웃고 있는 여자, 파란 머리", "고양이가 창가에서 자고 있다"],
    "euc_jp": ["赤い円、白い背景"],
    "cp1251": ["красный круг, белый фон", "девушка в красном платье", "кот спит на окне"],
    "koi8_r": ["красный круг, белый фон"],
    "cp1252": ["café", "a naïve painting of a château", "it’s a cat", "un garçon à l’école, été", "Mädchen mit Straße"],
    "cp1250": ["červený kruh, bílé pozadí", "dziewczyna w czerwonej sukience, zażółć gęślą jaźń"],
    "cp1253": ["κόκκινος κύκλος, άσπρο φόντο"],
    "cp1254": ["kırmızı daire, beyaz arka plan, güneş ışığı"],
    "cp1255": ["עיגול אדום, רקע לבן"],
    "cp1256": ["دائرة حمراء، خلفية بيضاء"],
    "cp874": ["วงกลมสีแดง พื้นหลังสีขาว"],
    "mac_roman": ["café au lait"],
}


def decode(data: bytes) -> Decoded:
    return decode_all({"a": data})["a"]


@pytest.mark.parametrize(("encoding", "text"), [(e, text) for e, texts in TEXTS.items() for text in texts])
def test_a_single_caption_is_read_in_its_encoding(encoding, text):
    assert decode(text.encode(encoding)) == Decoded(text, encoding)


@pytest.mark.parametrize("encoding", TEXTS)
def test_all_captions_of_a_folder_are_judged_together(encoding):
    files = {str(i): text.encode(encoding) for i, text in enumerate(TEXTS[encoding])}
    assert [found.text for found in decode_all(files).values()] == TEXTS[encoding]


def test_many_files_help_a_short_one():
    texts = [*TEXTS["cp1250"], "kočka spí na okně"]  # alone, it is also Western European
    files = {str(i): text.encode("cp1250") for i, text in enumerate(texts)}
    assert decode_all(files)["2"].text == "kočka spí na okně"


def test_two_encodings_in_one_folder():
    files = {"a": TEXTS["cp932"][0].encode("cp932"), "b": TEXTS["gb18030"][0].encode("gbk"), "c": b"plain"}
    found = decode_all(files)
    assert [found[name].text for name in "abc"] == [TEXTS["cp932"][0], TEXTS["gb18030"][0], "plain"]
    assert [found[name].is_unicode for name in "abc"] == [False, False, True]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"])
def test_unicode_with_and_without_a_mark(encoding):
    assert decode("a cat, café".encode(encoding)).text == "a cat, café"
    assert decode("a cat, café".encode(encoding)).is_unicode


def test_japanese_mail_encoding():
    assert decode("赤い円".encode("iso2022_jp")).text == "赤い円"


@pytest.mark.parametrize("data", [bytes(range(256)), "café Ã©".encode() + b"\xe9", b"\x89PNG\r\n\x1a\n\xff\xd8"])
def test_bytes_that_are_no_text_have_none(data):
    assert decode(data) == Decoded("", "")


@given(st.text(max_size=40))
def test_utf_8_is_never_guessed(text):
    text = text.encode("utf-8", "ignore").decode().replace("\0", "").replace("\x1b", "").lstrip("\ufeff")
    assert decode(text.encode()).text == text


@given(st.binary(max_size=60))
def test_any_bytes_end_in_text_without_controls_or_in_none(data):
    found = decode(data)
    assert found.encoding == "" or found.is_unicode or found.encoding in (*ENCODINGS, "iso2022_jp")
    if found.encoding in ENCODINGS:
        assert not any((ord(c) < 32 and c not in "\t\r\n") or 127 <= ord(c) < 160 for c in found.text)
