"""Units, currencies and counting words: which words after a number are the same, and which can be converted."""

import re
from fractions import Fraction

from megatron_offgrpo.data.rules import words

# Base unit -> {unit: how many base units it is}; the names are in lower case where case carries no meaning.
_MEASURES: dict[str, dict[str, str | int]] = {
    "m": {
        "m meter metre 米 公尺": 1, "km kilometer kilometre 千米 公里": 1000,
        "cm centimeter centimetre 厘米 公分": "1/100",
        "mm millimeter millimetre 毫米": "1/1000", "dm decimeter decimetre 分米": "1/10",
        "nm nanometer": "1/1000000000",
        "in inch inche 英寸": "254/10000", "ft foot feet 英尺": "3048/10000", "yd yard 码": "9144/10000",
        "mi mile 英里": "1609344/1000",
    },
    "g": {
        "g gm gram gramme 克": 1, "kg kilogram 千克 公斤": 1000, "mg milligram 毫克": "1/1000",
        "ton tonne 吨": 1000000, "斤": 500,
    },
    "lb": {"lb pound-mass": 1, "oz ounce 盎司": "1/16"},
    "s": {
        "s sec second 秒 秒钟": 1, "min minute 分钟": 60, "h hr hour 小时 个小时": 3600, "day 天 日": 86400,
        "week 周 星期": 604800, "ms millisecond 毫秒": "1/1000",
    },
    "month": {"month 个月": 1, "yr year 年": 12},
    "l": {"l liter litre 升": 1, "ml milliliter millilitre 毫升": "1/1000"},
    "usd": {"usd dollar buck 美元": 1, "cent ¢ 美分": "1/100"},
    "cny": {"cny rmb yuan 元 块 块钱 人民币": 1, "jiao 角": "1/10", "fen": "1/100"},
    "eur": {"eur euro 欧元": 1}, "gbp": {"gbp pound 英镑": 1}, "inr": {"inr rs rupee 卢比": 1},
    "jpy": {"jpy yen 日元": 1},
    "krw": {"krw won": 1}, "rub": {"rub ruble rouble": 1}, "peso": {"peso": 1}, "franc": {"franc": 1},
    "degree": {"degree deg 度": 1, "arcminute": "1/60", "arcsecond": "1/3600"},
    "celsius": {"celsius 摄氏度": 1}, "fahrenheit": {"fahrenheit 华氏度": 1}, "kelvin": {"k kelvin": 1},
    "rad": {"rad radian 弧度": 1},
    "1": {"percent pct percentage % 个百分点": "1/100", "permille ‰": "1/1000"},
    "w": {"w watt 瓦": 1, "kw kilowatt 千瓦": 1000}, "j": {"j joule 焦耳": 1, "kj kilojoule 千焦": 1000},
    "newton": {"n newton 牛顿": 1}, "volt": {"v volt 伏 伏特": 1}, "ohm": {"ohm 欧姆": 1},
    "ampere": {"a ampere amp 安培": 1},
    "hz": {"hz hertz 赫兹": 1, "khz": 1000, "mhz": 1000000}, "pa": {"pa pascal": 1, "kpa": 1000, "atm": 101325},
    "mol": {"mol mole 摩尔": 1}, "acre": {"acre 英亩": 1}, "hectare": {"ha hectare 公顷": 1},
    "gallon": {"gal gallon 加仑": 1},
    "m/s": {"mph": "44704/100000", "kmph kph kmh": "5/18"},
    "ordinal": {"th": 1},
}  # fmt: skip

_OF_NAME: dict[str, tuple[str, Fraction]] = {
    name: (base, Fraction(factor))
    for base, units in _MEASURES.items()
    for names, factor in units.items()
    for name in names.split()
}

_PARTS = (
    "half third quarter fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth"
    " sixteenth seventeenth eighteenth nineteenth twentieth"
)
_LARGE_PARTS = {"hundredth": 100, "thousandth": 1000, "ten-thousandth": 10**4, "millionth": 10**6, "billionth": 10**9}
_OF_PART = {part: number for number, part in enumerate(_PARTS.split(), 2)} | _LARGE_PARTS
PARTS = {part: Fraction(1, number) for part, number in _OF_PART.items()}
PARTS |= {f"{part}s": share for part, share in PARTS.items()} | {"halves": Fraction(1, 2)}
"""Words for parts of one: `three fifths`."""

_LARGE = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "quadrillion": 10**15, "quintillion": 10**18, "lakh": 10**5, "crore": 10**7, "dozen": 12, "score": 20,
}  # fmt: skip
SCALES: dict[str, int | Fraction] = {
    **_LARGE, **{f"{word}s": value for word, value in _LARGE.items()}, "tens": 10, "gross": 144,
    "十": 10, "百": 10**2, "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8, "成": Fraction(1, 10),
    **PARTS,
}  # fmt: skip
"""Words that multiply the number before them."""

_FUNCTION_WORDS = words(
    # Prepositions and adverbs of place, time and degree.
    "of to from by for in on off at out into onto up down under over below above beneath beyond within without with"
    " between among before after during until since via versus vs against toward towards around about near past"
    " through across along behind beside besides inside outside except despite like unlike than as plus minus times"
    " over ago later earlier early late ahead short away back apart too very so such quite just only even almost"
    " nearly roughly again else ever yet still once twice thrice there here hence now then bc bce ad ce o'clock"
    " fold upward downward forward backward"
    # Comparisons and amounts.
    " more less most least fewer few fewest many much several some any all both either neither enough extra additional"
    " another other others greater larger bigger smaller higher lower longer shorter older younger taller heavier"
    " lighter faster slower warmer colder cheaper closer farther further better worse maximum minimum max min highest"
    " lowest largest smallest greatest double triple quadruple inverse reciprocal opposite negative positive"
    # Pronouns, articles, conjunctions, verbs.
    " the a an this that these those it its they we he she you i who whose which what where when while if unless"
    " because and or but nor not no none never is are was were be been being am has have had do does did can could"
    " will would shall should may might must"
    # Words that make another number of it.
    " mod modulo factorial base binary ternary octal decimal hexadecimal hex odd even prime divided multiplied power"
    " pm noon midnight equiv ..."
    " zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion"
)
_CHINESE_FUNCTION = re.compile(
    r"半(?![圆径球])|倍|[又零负加减乘除不号月]|以[上下内外]|[前后内里]$|左右|次方|^[成折比多余点时]|[比多余点]$|分之"
    r"|[一二三四五六七八九十百千万亿]|[且或和]"
)
NOT_COUNTED = "(not counted)"
"""Stands before the words behind a number that are no unit and nothing that can be counted."""
NEVER_COUNTED = _FUNCTION_WORDS - words("in a") | {NOT_COUNTED}
"""Words that say more of a number than what is counted; `in` and `a` may be units."""

_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}


_CASED = re.compile(r"([mM])(g|L|m|Hz|W|J|N|V|A|Pa)")
"""Milli and mega, which only their case tells apart."""


def unit_of(name: str) -> tuple[str, Fraction] | None:
    """(base unit, factor) of one unit word, plural or not; None where it is no unit."""
    cased = _CASED.fullmatch(name)
    if cased:
        base, factor = _OF_NAME[cased[2].casefold()]
        return base, factor * (Fraction(1, 1000) if cased[1] == "m" else 10**6)
    low = name.casefold()
    return _OF_NAME.get(low) or (_OF_NAME.get(low[:-1]) if low.endswith("s") and len(low) > 2 else None)


def can_be_counted(run: tuple[str, ...]) -> bool:
    """Whether words behind a number are scales, units and things: `million dollars`, `km / h`, `red balls per box`.

    A thing is one plain word, or two. What holds a number, a comparison, a preposition or the like says more of the
    number than what is counted.
    """
    if tuple(word.casefold() for word in run[-2:]) == ("in", "total"):
        run = run[:-2]
    while run and run[0].casefold() in SCALES:
        run = run[1:]
    things = 0
    for place, word in enumerate(run):
        low = word.casefold()
        if low in ("per", "each", "每", "/", "of") and place:
            things = 0
        elif low in _POWERS or low.startswith("^") or low[:2] in ("平方", "立方"):
            continue
        elif unit_of(word) is not None:
            if low == "in" and run[place + 1 :] and run[place + 1] != "/" and run[place + 1][0] != "^":
                return False  # no inch: `in binary`
        elif not _is_thing(low):
            return False
        else:
            things += 1
        if things > 2:
            return False
    return not run or not _says_how(run[-1].casefold())


def _is_thing(low: str) -> bool:
    if not low.isascii():
        return low.replace("-", "").isalpha() and not _CHINESE_FUNCTION.search(low)
    return low.replace("-", "").isalpha() and low not in _FUNCTION_WORDS and low not in SCALES


def _says_how(low: str) -> bool:
    """Participles and adverbs, such as `doubled` and `exactly`, which count nothing."""
    return (len(low) > 5 and low.endswith("ed")) or (len(low) > 4 and low.endswith(("ly", "wards", "fold")))


def is_unit_word(name: str) -> bool:
    """Whether `name` is a unit, or a word such as `sq` that is part of one."""
    return unit_of(name) is not None or name.casefold() in _POWERS


def measure(unit_words: tuple[str, ...]) -> tuple[str, Fraction]:
    """The base unit and the factor of the words after a number, such as `km / h`, `square meters`, `cm ^2`.

    What is no known unit counts itself: the base is the words, in lower case and without the plural's s.
    """
    bases: list[tuple[str, int]] = []
    factor, sign, power = Fraction(1), 1, 1
    for place, word in enumerate(unit_words):
        low = word.casefold()
        squared = next((mark for mark in ("平方", "立方") if low.startswith(mark) and low != mark), None)
        if squared:
            power, low = _POWERS[squared], low.removeprefix(squared)
        if low in _POWERS:
            power = _POWERS[low]
        elif low in ("/", "per", "每"):
            sign = -1
        elif low.startswith("^") and bases and low[1:].lstrip("-").isdigit():
            base, old = bases[-1]
            known = unit_of(unit_words[place - 1])
            exponent = int(low[1:])
            bases[-1] = (base, old * exponent)
            if known:
                factor *= known[1] ** (old * exponent - old)
        else:
            base, own = (
                unit_of(word) or unit_of(low) or (low[:-1] if low.endswith("s") and len(low) > 3 else low, Fraction(1))
            )
            if base == "m/s":
                bases += [("m", sign), ("s", -sign)]
            else:
                bases.append((base, sign * power))
            factor *= own ** (sign * power)
            power = 1
    return " ".join(base if exponent == 1 else f"{base}^{exponent}" for base, exponent in bases), factor
