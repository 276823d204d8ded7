"""Codes of languages: one of the many ways to write each, and which are written without spaces."""

import re

_ISO_639_1 = """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st
    su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
# Three-letter codes (ISO 639-2 and 639-3) of languages that the normaliser treats in a way of their own.
_SHORTER = {
    "eng": "en",
    "zho": "zh",
    "chi": "zh",
    "cmn": "zh",
    "jpn": "ja",
    "tha": "th",
    "lao": "lo",
    "khm": "km",
    "mya": "my",
    "bur": "my",
    "bod": "bo",
    "tib": "bo",
    "dzo": "dz",
}
# Written without spaces between words.
UNSPACED = frozenset({"zh", "yue", "wuu", "ja", "th", "lo", "km", "my", "bo", "dz"})


def language_code(text: str) -> str:
    """The language of a code or tag: "zh-Hant-TW", "ZH" and "cmn" are "zh".

    Raises:
      ValueError: neither a code of ISO 639-1 nor one of three letters.
    """
    code = re.split("[-_]", text.strip().lower())[0]
    if code in _ISO_639_1.split() or re.fullmatch("[a-z]{3}", code):
        return _SHORTER.get(code, code)
    raise ValueError(f"{text!r} is no code of ISO 639, such as en, zh or yue")
