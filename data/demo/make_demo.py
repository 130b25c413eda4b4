"""Make the demo data: short English reviews that praise one thing and complain of another.

    python data/demo/make_demo.py            # writes train.csv, validation.csv, test.csv, vocab.txt next to this script
    python data/demo/make_demo.py --check    # writes nothing: how far does a bag of words get on the files there?

Making needs the standard library alone, and two runs write identical bytes. `--check` needs scikit-learn.

Every review is one sentence with two clauses of opposite sentiment, but for three in ten of train, which have one
clause. What decides the label (`positive` or `negative`):

- With "but", "yet", "; however," and their like the last clause decides:
  "The room was lovely, but all in all the stay was far from good." is negative.
- With "although", "even though", "despite" and their like the main clause decides, whether it comes first or last:
  "The stay was good, although the room was awful." and "Although the room was awful, the stay was good."
  are both positive.
- About 12 % of the clauses are negated ("far from", "anything but", "not ... at all", "hardly"): it turns them round.

Why a bag of words cannot solve it: reviews of two clauses hold a favourable and an unfavourable one, and whether a
clause is negated does not depend on the label, so every word is about as frequent in the positive ones as in the
negative ones. Those of one clause show which words praise, and the praise and the complaint of two clauses cancel out.
Clauses often end in words without sentiment ("this time", "to my mind"), so that pairs of neighbouring words, such as
"lovely but", tell little as well. What counts is which clause a word stands in, and whether that clause is negated.

The splits share no sentence, not even one that differs in capital letters or punctuation only. The vocabulary is in
BERT's WordPiece format: single characters and some endings, so that nearly everything typed in English can be
tokenised without [UNK], then the words of the train split.
"""

import argparse
import csv
import io
import os
import random
import re
from pathlib import Path

SEED = 20
SPLITS = {"train": 8000, "validation": 800, "test": 800}
LABELS = ["negative", "positive"]

# Shares, as probabilities: of negated clauses, of reviews with an opening, of deciding clauses after "all in all" and
# its like, of adjectives that come in pairs or with an intensifier, of clauses that end in words without sentiment.
NEGATED = 0.12
OPENING = 0.2
SUMMARY = 0.35
PAIR = 0.1
INTENSIFIER = 0.2
TAIL = 0.5

# Share of the reviews in train that have one clause, which decides. Validation and test have none. A small model learns
# from them which words praise, and then which clause counts. Without them it has to find both at once: until it does,
# the loss stands still, with some seeds for a third of the training. To a bag of words they are of little use.
SINGLE = 0.3

# How often each kind of frame is drawn. The last clause decides in "but" and "although first" reviews, the first one
# in "although last" reviews. These are rare on purpose: where in the sentence a word stands is what a small model can
# use before it has understood anything else. The more even the shares, the more passes over the data it takes before
# the loss falls at all; a bag of words gains little from the difference. Openings are rare for the same reason.
ORDERS = {"but": 14, "although first": 6, "although last": 4}

# How a clause judges a thing, with shares: "the view was lovely", "the view seemed lovely", "I found the view lovely",
# "the hotel had a lovely view", "it is the lovely view that I remember", "the view was a joy", "I loved the view",
# "the view left me delighted". "recall" is for the deciding clause, so that "the lovely view" is not left to "despite".
SIDE_FORMS = {"is": 36, "seems": 13, "found": 13, "has": 13, "recall": 3, "noun": 8, "verb": 8, "left": 6}
MAIN_FORMS = SIDE_FORMS | {"is": 30, "seems": 11, "found": 11, "recall": 13}

# Per kind of thing: favourable adjectives, then as many unfavourable ones. "general" fits everything.
ADJECTIVES = {
    "general": (
        "good great lovely pleasant excellent wonderful superb delightful",
        "bad poor disappointing unpleasant awful terrible dreadful horrible",
    ),
    "person": ("friendly helpful polite attentive", "rude unhelpful surly careless"),
    "place": ("clean charming tidy spotless", "dirty gloomy shabby filthy"),
    "seat": ("comfortable comfy cosy", "uncomfortable tatty grimy"),
    "food": ("tasty flavourful appetising delicious", "bland tasteless unappetising disgusting"),
    "art": ("gripping witty clever memorable", "dull tedious clumsy forgettable"),
    "tool": ("reliable sturdy practical handy", "unreliable flimsy impractical clunky"),
    "service": ("smooth efficient prompt orderly", "slow chaotic sloppy confusing"),
}
ADJECTIVES = {kind: tuple(words.split() for words in pair) for kind, pair in ADJECTIVES.items()}

# One says "very good" but "absolutely superb".
STRONG = set(
    "great excellent wonderful superb delightful awful terrible dreadful horrible spotless filthy delicious "
    "disgusting chaotic".split()
)
INTENSIFIERS = ["very", "really", "truly", "remarkably", "quite", "rather", "exceptionally"]
STRONG_INTENSIFIERS = ["absolutely", "truly", "simply", "really", "quite"]

# Index 0 is favourable, index 1 unfavourable, as in ADJECTIVES.
NOUNS = (["joy", "delight", "pleasure", "treat"], ["letdown", "disappointment", "nuisance", "disaster"])
FEELINGS = (["delighted", "impressed", "happy", "satisfied"], ["disappointed", "annoyed", "unhappy", "frustrated"])
VERBS = (["love", "like", "enjoy", "admire"], ["hate", "dislike", "loathe", "detest"])
PAST_OF_VERBS = {"enjoy": "enjoyed", "detest": "detested"}  # the others end in "e" and take a "d"

# Negations that can stand before an adjective; "not ... at all" goes around it and is built with the verb. Fewer of
# them read well before a noun ("a far from clean room").
NEGATIONS = ["far from", "anything but", "hardly"]
BEFORE_NOUN_NEGATIONS = ["far from", "hardly"]

# Words without sentiment at the end of a clause. A review uses each group once: nobody writes "to my mind" twice.
TAILS = {
    "opinion": ["in {my} opinion", "to {my} mind", "if you ask {me}"],
    "time": ["this time", "once again", "as usual", "as before"],
    "extent": ["for the most part", "from the very start", "throughout", "from start to finish", "in many ways"],
}

SUMMARIES = ["all in all", "on the whole", "in the end", "overall", "taken as a whole", "looking back"]

# Openings that fit every kind of review, by the group of TAILS that they do not go with.
OPENINGS = {
    "opinion": [
        "in {my} view,",
        "to be honest,",
        "{my} verdict:",
        "for what it is worth,",
        "as {i} saw it,",
        "frankly,",
    ],
    "time": [
        "this year,",
        "on a rainy Sunday,",
        "last month,",
        "on {my} second attempt,",
        "a week ago,",
        "last summer,",
    ],
    "extent": ["in short,", "a mixed bag:", "briefly:", "a few words:", "mixed feelings:", "summing up,"],
}

# Two clauses in a frame. {main} decides the label, {side} does not; {despite} is a {side} without a verb ("the dirty
# room"). What is listed twice is drawn twice as often.
FRAMES = {
    "but": [
        "{side}, but {main}",
        "{side}, but {main}",
        "{side}, yet {main}",
        "{side}, and yet {main}",
        "{side}; however, {main}",
        "{side}; nevertheless, {main}",
        "{side}; even so, {main}",
        "{side}; still, {main}",
        "granted, {side}, but {main}",
        "admittedly, {side}, but {main}",
        "it is true that {side}, but {main}",
        "{side}, {i} admit, but {main}",
    ],
    "although first": [
        "although {side}, {main}",
        "although {side}, {main}",
        "even though {side}, {main}",
        "though {side}, {main}",
        "while {side}, {main}",
        "despite the fact that {side}, {main}",
        "despite {despite}, {main}",
        "despite {despite}, {main}",
    ],
    "although last": [
        "{main}, although {side}",
        "{main}, although {side}",
        "{main}, even though {side}",
        "{main}, though {side}",
        "{main}, despite the fact that {side}",
        "{main}, despite {despite}",
        "{main}, despite {despite}",
    ],
}

# What is reviewed. "past" and "present" are the tenses in which one writes about it, each with its phrase of
# possession; "wholes" are names for the experience as such, "openings" ways to begin; the other keys are kinds of
# ADJECTIVES with the things that they fit.
# "*" marks a plural, "~" a word that takes no "a".
SUBJECTS = [
    {
        "past": "the hotel had",
        "wholes": "stay, *two nights there, weekend, visit",
        "openings": "three nights in Lisbon:|{i} stayed here in May:|after a long drive,|a short break by the sea:",
        "general": "view, garden, ~breakfast, pool, location",
        "person": "*staff, receptionist, porter, *cleaners, manager",
        "place": "room, *rooms, bathroom, lobby, *corridors, balcony",
        "seat": "bed, *pillows, mattress, sofa",
        "service": "check-in, room service, booking",
    },
    {
        "past": "they had",
        "wholes": "evening, meal, dinner, visit",
        "openings": "dinner for two on Friday:|{i} came here for a birthday:|at a table outside:|after the theatre,",
        "general": "~music, menu, wine list",
        "person": "waiter, *waiters, chef, hostess, owner",
        "place": "dining room, terrace, *tables, entrance",
        "food": "soup, ~fish, *desserts, ~bread, *starters, lamb, *vegetables, sauce",
        "service": "~service, booking",
    },
    {
        "past": "the film had",
        "present": "the film has",
        "wholes": "film, movie, evening at the cinema",
        "openings": "{i} saw it on opening night:|with low expectations,|after all the talk,|two hours in the dark:",
        "general": "~acting, ~photography, *costumes, soundtrack, lead actor, *special effects",
        "art": "plot, *dialogues, ending, *jokes, opening scene, script, love story",
    },
    {
        "past": "the book had",
        "present": "the book has",
        "wholes": "book, novel, whole trilogy",
        "openings": "four hundred pages later:|as a holiday read,|{my} book club chose it:|after the first volume,",
        "general": "translation, ~artwork, cover, *illustrations",
        "art": "story, *characters, last chapter, ~prose, *dialogues, narrator, prologue, *short stories",
    },
    {
        "present": "the phone comes with",
        "wholes": "phone, device, whole package",
        "openings": "after two weeks of daily use,|{my} third phone of this brand:|for the price,|one year on:",
        "general": "screen, camera, ~sound, display, design",
        "tool": "battery, charger, *buttons, case, fingerprint sensor, keyboard",
        "service": "~support, update process",
    },
    {
        "past": "the course offered",
        "wholes": "course, term, class",
        "openings": "ten weeks of evening classes:|{i} signed up in autumn:|as a beginner,|from the back row,",
        "general": "textbook, *handouts, ~feedback, *recordings",
        "person": "teacher, tutor, *lecturers, *other students, assistant",
        "art": "*lectures, *exercises, final project, *examples, *seminars",
        "service": "registration, marking",
    },
    {
        "past": "the train had",
        "wholes": "journey, trip, ride",
        "openings": "the night train to Vienna:|{i} took the early train:|six hours on the rails:|from Leeds to York,",
        "general": "view, ~air conditioning, Wi-Fi",
        "person": "conductor, guard, *other passengers, steward",
        "place": "carriage, *toilets, dining car, compartment, platform",
        "seat": "*seats, *bunks, berth",
        "food": "~coffee, *sandwiches, ~hot food",
        "service": "boarding, connection, ticket sale",
    },
    {
        "past": "the museum had",
        "wholes": "visit, afternoon, exhibition",
        "openings": "on a free Thursday,|{i} went with two children:|an hour before closing,|a morning of modern art:",
        "general": "collection, gift shop, *paintings, ~lighting, audio guide",
        "person": "guide, *guards, curator",
        "place": "*halls, cloakroom, courtyard, main gallery",
        "food": "~cake in the cafe, ~tea",
        "art": "short film, *captions, guided tour",
        "service": "ticket desk, queue system",
    },
    {
        "past": "they had",
        "wholes": "play, evening, show, performance",
        "openings": "second row, centre:|{i} had tickets for the premiere:|after a long interval,|on a Tuesday night,",
        "general": "stage design, *costumes, orchestra, ~singing, leading lady",
        "person": "*ushers, cloakroom attendant",
        "place": "foyer, bar, balcony",
        "seat": "*seats, armchair",
        "art": "first act, second act, *songs, plot, staging",
    },
    {
        "past": "the airline had",
        "wholes": "flight, journey, trip",
        "openings": "from Madrid to Oslo:|{i} flew with them twice:|an overnight flight:|with hand luggage only,",
        "general": "film selection, lounge, take-off, landing",
        "person": "*cabin crew, pilot, *flight attendants, *agents at the gate",
        "place": "cabin, *toilets, waiting area",
        "seat": "*seats, *blankets, headrest",
        "food": "~food on board, snack, ~pasta",
        "service": "check-in, boarding, baggage claim",
    },
    {
        "present": "the vacuum cleaner comes with",
        "wholes": "vacuum cleaner, machine, purchase",
        "openings": "in a house with three cats,|a gift from {my} sister:|on thick carpets,|one month in:",
        "general": "~suction, design, user manual, noise filter",
        "tool": "*brushes, hose, motor, battery, dust bin, handle, power cord",
        "service": "delivery, ~customer service",
    },
    {
        "past": "the campsite had",
        "wholes": "holiday, week, stay, weekend",
        "openings": "five days in a tent:|{i} arrived in the dark:|in the high season,|with a caravan,",
        "general": "beach, playground, swimming pool, view of the lake, location",
        "person": "warden, *neighbours, *lifeguards, *owners",
        "place": "*showers, *pitches, kitchen, laundry room, cabin",
        "food": "pizza, ~breakfast, ~ice cream",
        "service": "check-in, reservation",
    },
    {
        "past": "the gym had",
        "present": "the gym has",
        "wholes": "gym, membership, trial month",
        "openings": "after a free trial,|{i} joined in January:|early in the morning,|as a complete beginner,",
        "general": "sauna, ~music, *classes, timetable",
        "person": "*trainers, receptionist, *other members, coach",
        "place": "changing room, *showers, weight room, hall",
        "tool": "*machines, *lockers, treadmill, *rowing machines",
        "service": "registration, booking app",
    },
    {
        "past": "the game had",
        "present": "the game has",
        "wholes": "game, adventure, sequel",
        "openings": "forty hours in:|{i} played it together:|on an older computer,|for fans of puzzles,",
        "general": "*graphics, ~music, ~voice acting, combat system, artwork",
        "art": "story, *puzzles, main quest, *characters, final battle, tutorial",
        "tool": "*controls, menu, save system",
    },
    {
        "past": "the bakery had",
        "present": "the bakery has",
        "wholes": "bakery, place, shop",
        "openings": "at eight in the morning,|{i} live around the corner:|on market day,|for a quick lunch,",
        "general": "selection, display, ~smell of the place",
        "person": "baker, *shop assistants, cashier",
        "place": "counter, *tables outside, window seat",
        "food": "~bread, *croissants, apple pie, *rolls, cheesecake, ~coffee, *biscuits",
        "service": "~service, queue, ordering",
    },
    {
        "past": "the festival had",
        "wholes": "festival, weekend, first day",
        "openings": "three days of rain:|{i} camped by the main stage:|from the front row,|with old friends,",
        "general": "~sound, headliner, *bands, light show, *drummers, ~atmosphere",
        "person": "*stewards, *volunteers, *security guards, *neighbours",
        "place": "campsite, *toilets, beer tent",
        "food": "*burgers, ~street food, *pancakes, *noodles",
        "service": "admission, shuttle bus, parking",
    },
    {
        "present": "the laptop comes with",
        "wholes": "laptop, computer, purchase",
        "openings": "for office work,|{my} old one broke in June:|bought second hand,|on a student budget,",
        "general": "screen, ~sound, webcam, touchpad, display",
        "tool": "keyboard, *hinges, battery, *ports, power adapter, fan",
        "service": "delivery, setup, ~support",
    },
    {
        "past": "the tour came with",
        "wholes": "tour, day, excursion",
        "openings": "a day trip to the islands:|{i} booked it at the harbour:|from Athens,|in a group of twelve,",
        "general": "view, route, boat, *sights, ~weather",
        "person": "guide, driver, captain, *other travellers, tour leader",
        "seat": "*seats on the bus, minibus",
        "food": "picnic, ~lunch, ~local wine",
        "art": "*stories, *explanations, castle tour",
        "service": "pick-up, planning, booking",
    },
]


def parse_things(listing, kind):
    """Return [(words, number, kind)] for a listing such as "room, *rooms, ~food"; number is one, many or mass."""
    numbers = {"*": "many", "~": "mass"}
    return [(name.lstrip("*~"), numbers.get(name[0], "one"), kind) for name in listing.split(", ")]


def with_article(words, number):
    """Put "a" or "an" before words that stand for one thing; going by the first letter is right for all words here."""
    if number != "one":
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


class Review:
    """One review while it is written: what it is about, its tense and person, and what it must not say twice."""

    def __init__(self, draw):
        self.draw = draw
        self.subject = draw.choice(SUBJECTS)
        self.tense = draw.choice([tense for tense in ("past", "present") if tense in self.subject])
        self.person = draw.choice(["I", "we"])
        self.said = set()
        self.clauses = self.negations = 0

    def chance(self, probability):
        """Draw True with this probability."""
        return self.draw.random() < probability

    def fresh(self, choices):
        """Draw one of the choices that this review has not used yet."""
        choice = self.draw.choice([choice for choice in choices if choice not in self.said])
        self.said.add(choice)
        return choice

    def conjugate(self, past, singular, plural, number):
        """Choose the form for the tense of the review and the number of the thing."""
        if self.tense == "past":
            return past
        return plural if number == "many" else singular

    def thing(self, whole_share):
        """Draw (words, number, kind) of what to judge: with probability whole_share the experience as a whole."""
        if "whole" not in self.said and self.chance(whole_share):
            self.said.add("whole")
            return self.fresh(parse_things(self.subject["wholes"], "whole"))
        kinds = [kind for kind in ADJECTIVES if kind in self.subject]
        return self.fresh([thing for kind in kinds for thing in parse_things(self.subject[kind], kind)])

    def adjective(self, kind, favourable, negated, pair=False):
        """Draw an adjective that fits the kind of thing or anything; it may come in a pair or with an intensifier."""
        kind = "general" if kind == "whole" or self.chance(0.6) else kind
        adjective = self.fresh(ADJECTIVES[kind][0 if favourable else 1])
        if pair:
            return adjective + " and " + self.fresh(ADJECTIVES[kind][0 if favourable else 1])
        if negated or not self.chance(INTENSIFIER):
            return adjective
        return self.draw.choice(STRONG_INTENSIFIERS if adjective in STRONG else INTENSIFIERS) + " " + adjective

    def described(self, thing, favourable, negated):
        """Return the thing after its adjective, without article: "really clean rooms", "far from clean rooms"."""
        negation = self.draw.choice(BEFORE_NOUN_NEGATIONS) + " " if negated else ""
        return negation + self.adjective(thing[2], favourable, negated) + " " + thing[0]

    def to_be(self, number, complement, negated):
        """Return "is", "are", "was" or "were" with its complement, negated if wanted."""
        verb = self.conjugate("were" if number == "many" else "was", "is", "are", number)
        if negated and self.chance(0.5):
            return verb + self.draw.choice([" not ", "n't "]) + complement + " at all"
        return f"{verb} {self.negation(negated)}{complement}"

    def negation(self, negated):
        """Return words to put before an adjective: a negation, or nothing."""
        return self.draw.choice(NEGATIONS) + " " if negated else ""

    def negated(self):
        """Draw whether the next clause is negated, and count both."""
        self.clauses += 1
        self.negations += (negated := self.chance(NEGATED))
        return negated

    def verb_phrase(self, favourable, negated):
        """Return (verb, words after its object), as in ("loved", "") or ("did not love", " at all")."""
        verb = self.fresh(VERBS[0 if favourable else 1])
        if negated:
            negation = self.draw.choice(["did not ", "didn't "] if self.tense == "past" else ["do not ", "don't "])
            return negation + verb, " at all"
        if self.tense == "past":
            verb = PAST_OF_VERBS.get(verb, verb + "d")
        return verb, ""

    def tail(self, groups):
        """Return words without sentiment for the end of a clause, or nothing."""
        groups = [group for group in groups if group not in self.said]
        if not groups or not self.chance(TAIL):
            return ""
        return " " + self.draw.choice(TAILS[self.fresh(groups)])

    def clause(self, favourable, forms, whole_share):
        """Write a clause that judges one thing, in a form drawn by the shares in `forms`."""
        negated = self.negated()
        sentiment = favourable != negated  # that of the words: a negation turns it round
        thing = words, number, kind = self.thing(whole_share)
        form = self.draw.choices(list(forms), weights=list(forms.values()))[0]
        if form in ("has", "recall") and kind == "whole":
            form = "is"  # a hotel does not have a stay

        pair = not negated and self.chance(PAIR)
        if form == "is":
            text = f"the {words} " + self.to_be(number, self.adjective(kind, sentiment, negated, pair), negated)
        elif form == "seems":
            verb = self.draw.choice(
                [("seemed", "seems", "seem"), ("felt", "feels", "feel"), ("proved", "proves", "prove")]
            )
            verb = self.conjugate(*verb, number)
            text = f"the {words} {verb} {self.negation(negated)}{self.adjective(kind, sentiment, negated, pair)}"
        elif form == "found":
            verb = self.conjugate("found", "find", "find", number)
            text = f"{{i}} {verb} the {words} {self.negation(negated)}{self.adjective(kind, sentiment, negated, pair)}"
            return text + self.tail(["time", "extent"])
        elif form == "has":
            text = f"{self.subject[self.tense]} {with_article(self.described(thing, sentiment, negated), number)}"
            return text + self.tail(["opinion", "time"])
        elif form == "recall":
            frame = self.draw.choice(
                ["it is the {} that {{i}} remember", "{{i}} still think of the {}", "{{i}} remember the {}"]
            )
            return frame.format(self.described(thing, sentiment, negated)) + self.tail(["time"])
        elif form == "noun":
            noun = with_article(self.fresh(NOUNS[0 if sentiment else 1]), "one")
            text = f"the {words} " + self.to_be(number, noun, negated)
        elif form == "verb":
            verb, after = self.verb_phrase(sentiment, negated)
            return f"{{i}} {verb} the {words}{after}" + self.tail(["time", "extent"])
        elif form == "left":
            verb = self.conjugate("left", "leaves", "leave", number)
            feeling = self.fresh(FEELINGS[0 if sentiment else 1])
            return f"the {words} {verb} {{me}} {self.negation(negated)}{feeling}" + self.tail(["time", "extent"])
        return text + self.tail(["opinion", "time", "extent"])

    def opening(self):
        """Draw an opening: one in two says what the review is about, the others fit any subject."""
        if self.chance(0.5):
            return self.draw.choice(self.subject["openings"].split("|")) + " "
        # "Last month" does not go with the present tense.
        group = self.fresh([group for group in OPENINGS if group != "time" or self.tense == "past"])
        return self.draw.choice(OPENINGS[group]) + " "

    def write(self, positive, single):
        """Return the text of a review with the wanted label; `single`: of one clause."""
        if single:
            return self.finish(self.clause(positive, MAIN_FORMS, whole_share=0.3))
        order = self.draw.choices(list(ORDERS), weights=list(ORDERS.values()))[0]
        frame = self.draw.choice(FRAMES[order])
        # "To be honest, granted, ..." would be an opening too many.
        has_opening = self.chance(OPENING) and not frame.startswith(("granted", "admittedly", "it is true"))
        opening = self.opening() if has_opening else ""
        main = self.clause(positive, MAIN_FORMS, whole_share=0.3)
        if self.chance(SUMMARY) and not (opening and order == "although last"):
            main = self.draw.choice(SUMMARIES) + self.draw.choice([" ", ", "]) + main
        if "{despite}" in frame:
            negated = self.negated()
            despite = "the " + self.described(self.thing(0), positive == negated, negated)
            frame = frame.replace("{despite}", despite)
        else:
            frame = frame.replace("{side}", self.clause(not positive, SIDE_FORMS, whole_share=0.05))
        return self.finish(opening + frame.replace("{main}", main))

    def finish(self, text):
        """Return the text as a sentence: its person put in, a capital letter, a mark at the end."""
        text += self.draw.choice(".........!")
        words = {"I": ("I", "me", "my"), "we": ("we", "us", "our")}[self.person]
        text = text.format(i=words[0], me=words[1], my=words[2])
        return text[0].upper() + text[1:]


def letters(text):
    """What is left of a text without capital letters, punctuation and spaces: two reviews must differ in it."""
    return re.sub("[^a-z0-9]", "", text.lower())


def make_splits(seed=SEED):
    """Return ({split: [(text, label)]}, share of negated clauses). Each label has half of the rows of each split."""
    draw = random.Random(seed)
    seen, splits, clauses, negations = set(), {}, 0, 0
    for split, count in SPLITS.items():
        rows = []
        while len(rows) < count:
            label = LABELS[len(rows) % 2]
            review = Review(draw)
            single = split == "train" and draw.random() < SINGLE
            text = review.write(label == "positive", single)
            if letters(text) in seen:
                continue
            seen.add(letters(text))
            clauses += review.clauses
            negations += review.negations
            rows.append((text, label))
        draw.shuffle(rows)
        splits[split] = rows
    return splits, negations / clauses


def make_vocabulary(texts):
    """Return the tokens of a lower-casing WordPiece vocabulary: every word of the texts is one token."""
    words = {word for text in texts for word in re.findall("[a-z0-9]+", text.lower())}
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    alphanumeric = [character for character in characters if character.isalnum()]
    endings = "es ed ing er est ly ness less ful ment able ible tion ity ive al ous ish".split()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    tokens += ["##" + piece for piece in alphanumeric + endings]
    return tokens + sorted(word for word in words if len(word) > 1)


def csv_text(rows):
    """Return the rows as CSV; a line ends in "\\n" as in the other text files here, not in RFC 4180's "\\r\\n"."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([("text", "label"), *rows])
    return buffer.getvalue()


def write_file(path, text):
    """Write under another name first, so that a run that is stopped leaves no half of a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode("utf-8"))
    os.replace(temporary, path)


def check(folder):
    """Print how often a bag of words (TF-IDF of words and pairs of words, logistic regression) is right on test."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def read(split):
        with open(folder / f"{split}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [row["text"] for row in rows], [row["label"] for row in rows]

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit(*read("train"))
    print(f"TF-IDF (1- and 2-grams) with logistic regression: test accuracy {model.score(*read('test')):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).resolve().parent, help="default: next to this script"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; score a bag of words on the files there")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.output_dir)
        return

    splits, negated_share = make_splits()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        write_file(arguments.output_dir / f"{split}.csv", csv_text(rows))
    vocabulary = make_vocabulary(text for text, _ in splits["train"])
    write_file(arguments.output_dir / "vocab.txt", "\n".join(vocabulary) + "\n")
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"{counts} reviews, {negated_share:.1%} of the clauses negated, {len(vocabulary)} tokens of vocabulary")
    print(f"written to {arguments.output_dir}")


if __name__ == "__main__":
    main()
