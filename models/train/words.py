"""The words that the tasks are made of: our own small dictionary in five languages, emoji and all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """One thing, by its name in five languages (with the article where the language wants one) and its emoji."""

    english: str
    emoji: str
    japanese: str
    french: str
    spanish: str
    german: str


def _nouns(table: str) -> tuple[Noun, ...]:
    return tuple(Noun(*(cell.strip() for cell in line.split("|"))) for line in table.strip().splitlines())


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _nouns("""
cat|🐱|猫|le chat|el gato|die Katze
dog|🐶|犬|le chien|el perro|der Hund
bird|🐦|鳥|l'oiseau|el pájaro|der Vogel
fish|🐟|魚|le poisson|el pez|der Fisch
horse|🐴|馬|le cheval|el caballo|das Pferd
cow|🐮|牛|la vache|la vaca|die Kuh
bear|🐻|熊|l'ours|el oso|der Bär
fox|🦊|狐|le renard|el zorro|der Fuchs
frog|🐸|蛙|la grenouille|la rana|der Frosch
bee|🐝|蜂|l'abeille|la abeja|die Biene
apple|🍎|りんご|la pomme|la manzana|der Apfel
lemon|🍋|レモン|le citron|el limón|die Zitrone
bread|🍞|パン|le pain|el pan|das Brot
cheese|🧀|チーズ|le fromage|el queso|der Käse
egg|🥚|卵|l'œuf|el huevo|das Ei
rice|🍚|ご飯|le riz|el arroz|der Reis
tea|🍵|お茶|le thé|el té|der Tee
coffee|☕|コーヒー|le café|el café|der Kaffee
sun|☀️|太陽|le soleil|el sol|die Sonne
moon|🌙|月|la lune|la luna|der Mond
star|⭐|星|l'étoile|la estrella|der Stern
rain|🌧️|雨|la pluie|la lluvia|der Regen
snow|❄️|雪|la neige|la nieve|der Schnee
fire|🔥|火|le feu|el fuego|das Feuer
tree|🌳|木|l'arbre|el árbol|der Baum
flower|🌸|花|la fleur|la flor|die Blume
mountain|⛰️|山|la montagne|la montaña|der Berg
sea|🌊|海|la mer|el mar|das Meer
house|🏠|家|la maison|la casa|das Haus
book|📖|本|le livre|el libro|das Buch
letter|✉️|手紙|la lettre|la carta|der Brief
key|🔑|鍵|la clé|la llave|der Schlüssel
clock|⏰|時計|l'horloge|el reloj|die Uhr
train|🚆|電車|le train|el tren|der Zug
car|🚗|車|la voiture|el coche|das Auto
ship|🚢|船|le bateau|el barco|das Schiff
bicycle|🚲|自転車|le vélo|la bicicleta|das Fahrrad
music|🎵|音楽|la musique|la música|die Musik
heart|❤️|心|le cœur|el corazón|das Herz
hand|✋|手|la main|la mano|die Hand
eye|👁️|目|l'œil|el ojo|das Auge
family|👨‍👩‍👧|家族|la famille|la familia|die Familie
friend|🧑‍🤝‍🧑|友達|l'ami|el amigo|der Freund
teacher|👩‍🏫|先生|le maître|el maestro|der Lehrer
doctor|🧑‍⚕️|医者|le médecin|el médico|der Arzt
rainbow|🌈|虹|l'arc-en-ciel|el arcoíris|der Regenbogen
""")

# English to Japanese, in the form that stands before a noun.
ADJECTIVES = {
    "red": "赤い",
    "blue": "青い",
    "white": "白い",
    "black": "黒い",
    "big": "大きい",
    "small": "小さい",
    "old": "古い",
    "new": "新しい",
    "fast": "速い",
    "slow": "遅い",
    "quiet": "静かな",
    "beautiful": "美しい",
    "cold": "冷たい",
    "warm": "暖かい",
    "heavy": "重い",
    "light": "軽い",
    "long": "長い",
    "short": "短い",
    "round": "丸い",
    "bright": "明るい",
    "dark": "暗い",
    "strong": "強い",
    "young": "若い",
    "soft": "柔らかい",
    "kind": "優しい",
}

# Plain words to count, sort, reverse and spell; the nouns above are used as well.
PLAIN = _split(
    """
    amber anchor arrow autumn banana barn basket beach bell berry blanket boat bottle branch bridge brook brush bucket
    button cabin candle canyon carpet castle cedar chair cherry circle city clay cliff cloud coast copper coral corner
    cotton cradle crown dawn desert dew door dream drum eagle earth echo ember engine evening falcon feather fence field
    finger forest fountain garden gate ginger glass glove goose grain grape grass gravel hammer harbor harvest hazel
    hill honey hook island ivory ivy jacket jewel jungle kettle kite ladder lake lamp lantern leaf lily lion maple
    marble meadow melon mill mirror morning moss needle nest night noodle oak ocean olive onion orange orchard otter
    owl paper path pearl pebble pencil pepper piano pillow pine planet plum pocket pond potato quill quilt rabbit
    reed ribbon ring river road robin rocket root rope rose sail salt sand school seed shadow sheep shell silk silver
    sky smoke spoon spring stone storm straw stream street sugar summer table temple thorn thunder tiger timber tower
    tulip tunnel turtle valley velvet village violin walnut water wave wheat wheel willow wind window wing winter wolf
    wool yard zebra
    """
)

WORDS = tuple(sorted({*PLAIN, *(noun.english for noun in NOUNS)}))

# Words whose letters carry marks; some have several.
ACCENTED = _split(
    """
    café élève crème brûlée forêt hôtel garçon château déjà naïve août noël français mañana jalapeño corazón niño
    Ärger Öl Übung größer schön Mädchen São Tomé coração pão Ålesund smörgås Łódź żółty Dvořák příliš žluťoučký kůň
    İzmir ağaç şehir Việt Phở crêpe fête señor piñata cliché façade résumé über Zürich Málaga León Gdańsk
    """
)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

HIRAGANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん"
KATAKANA = "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワヲン"
# Code points to repeat, most of which no word holds: accented Latin, Greek, Cyrillic, kanji, Hangul, emoji.
SCRIPTS = (
    range(0xC0, 0x180),
    range(0x3B1, 0x3CA),
    range(0x430, 0x450),
    range(0x4E00, 0x9FA6),
    range(0x4E00, 0x9FA6),
    range(0xAC00, 0xD7A4),
    range(0x1F300, 0x1F580),
)
# Single code points, pairs with a variation selector, joined sequences, skin tones and flags.
EMOJI = (*(noun.emoji for noun in NOUNS), *"😀😂🙂😍🤔👍🙏🎉🚀✨🍣🌍", "👋🏽", "👩‍💻", "🏳️‍🌈", "🇯🇵", "🇫🇷", "🇧🇷", "1️⃣")

CITIES = (
    "Paris",
    "Tokyo",
    "Zürich",
    "Oslo",
    "Cairo",
    "Lima",
    "Málaga",
    "Quito",
    "Nairobi",
    "Delhi",
    "Gdańsk",
    "São Paulo",
)
