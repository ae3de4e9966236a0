"""Sentences of captions: hard cases, what must never get lost, long inputs, and the published way."""

import re

import pytest
from hypothesis import given, settings, strategies

from cosmos_scale.data.samples.sentences import split_published, split_sentences, splitter

HARD = [
    ("A cat.", ["A cat"]),
    ("A cat", ["A cat"]),
    ("A cat. A dog.", ["A cat", "A dog"]),
    ("It weighs 3.5 kg. It costs $1.99.", ["It weighs 3.5 kg", "It costs $1.99"]),
    ("A .50 calibre gun. A .5 litre bottle.", ["A .50 calibre gun", "A .5 litre bottle"]),
    ("The score is 1. The crowd cheers.", ["The score is 1", "The crowd cheers"]),
    ("Version 2. 5 people stand there.", ["Version 2", "5 people stand there"]),
    ("The U.S. flag waves. A pole.", ["The U.S. flag waves", "A pole"]),
    ("Made in the U.S. The flag waves.", ["Made in the U.S.", "The flag waves"]),
    ("The U.S. Army parades.", ["The U.S. Army parades"]),
    ("U.K. and U.N. flags. Two poles.", ["U.K. and U.N. flags", "Two poles"]),
    ("Shot in Washington, D.C.", ["Shot in Washington, D.C."]),
    ("Shot in Washington, D.C. in 1999.", ["Shot in Washington, D.C. in 1999"]),
    ("At 5 p.m. the sun sets.", ["At 5 p.m. the sun sets"]),
    ("It was taken at 5 p.m. The sun sets.", ["It was taken at 5 p.m.", "The sun sets"]),
    ("Open from 9 a.m. to 5 p.m. on Monday.", ["Open from 9 a.m. to 5 p.m. on Monday"]),
    ("Mr. Smith and Dr. J. R. Jones met. They left.", ["Mr. Smith and Dr. J. R. Jones met", "They left"]),
    ("Dr. Smith waves.", ["Dr. Smith waves"]),
    ("St. Louis has an arch. It shines.", ["St. Louis has an arch", "It shines"]),
    ("St. Paul stands on Main St. The shop is 6 ft. away.", ["St. Paul stands on Main St", "The shop is 6 ft. away"]),
    ("Plan A. The second. Vitamin C. It helps.", ["Plan A", "The second", "Vitamin C", "It helps"]),
    ("Portrait of J. S. Bach. A wig.", ["Portrait of J. S. Bach", "A wig"]),
    ("George W. Bush speaks. People listen.", ["George W. Bush speaks", "People listen"]),
    ("J.K. Rowling signs books. A queue.", ["J.K. Rowling signs books", "A queue"]),
    ("Fruit, e.g. apples, i.e. red ones. Next.", ["Fruit, e.g. apples, i.e. red ones", "Next"]),
    ("Tools (e.g. A hammer) lie there. A bench.", ["Tools (e.g. A hammer) lie there", "A bench"]),
    ("Cups, plates etc. on a table. Cups etc. A table.", ["Cups, plates etc. on a table", "Cups etc", "A table"]),
    ("Red vs. Blue. A match.", ["Red vs. Blue", "A match"]),
    ("No. 7 runs. The answer is no. A dog.", ["No. 7 runs", "The answer is no", "A dog"]),
    ("Wait... what is it? Hm... It is a cat.", ["Wait... what is it?", "Hm", "It is a cat"]),
    ("A cat . . . sleeps. A dog.", ["A cat . . . sleeps", "A dog"]),
    ('He says "Stop." Then he runs.', ['He says "Stop."', "Then he runs"]),
    ('The sign reads "STOP!" in red. A road.', ['The sign reads "STOP!" in red', "A road"]),
    ('The text reads "No parking. Tow zone." A wall.', ['The text reads "No parking. Tow zone."', "A wall"]),
    ('It says "Who is it?" on a board. A cat.', ['It says "Who is it?" on a board', "A cat"]),
    ("A sign (in red). A wall.", ["A sign (in red)", "A wall"]),
    ("A man (see Fig. 3) sits. A chair.", ["A man (see Fig. 3) sits", "A chair"]),
    ("visit example.com today. Buy v2.0 now.", ["visit example.com today", "Buy v2.0 now"]),
    ("See https://www.example.com/a.b/c.html. A logo.", ["See https://www.example.com/a.b/c.html", "A logo"]),
    ("Mail a.b@example.co.uk. A stamp.", ["Mail a.b@example.co.uk", "A stamp"]),
    ("The file IMG_0001.JPG is shown. It is dark.", ["The file IMG_0001.JPG is shown", "It is dark"]),
    ("Node.js and ASP.NET logos. A screen.", ["Node.js and ASP.NET logos", "A screen"]),
    ("Yahoo! Inc. is a firm. A logo.", ["Yahoo! Inc. is a firm", "A logo"]),
    ("Apple Inc. The logo is grey.", ["Apple Inc", "The logo is grey"]),
    ("Sammy Davis Jr. sings. A stage.", ["Sammy Davis Jr. sings", "A stage"]),
    ("The Rev. Martin Luther King Jr. speaks.", ["The Rev. Martin Luther King Jr. speaks"]),
    ("Photo on Jan. 5, 2010. A street.", ["Photo on Jan. 5, 2010", "A street"]),
    ("Dated Sept. 11 and Dec. 24. A wall.", ["Dated Sept. 11 and Dec. 24", "A wall"]),
    ("It is 10.30 a.m. on the clock. A tower.", ["It is 10.30 a.m. on the clock", "A tower"]),
    ("A 12 in. ruler and 6 ft. pole. A desk.", ["A 12 in. ruler and 6 ft. pole", "A desk"]),
    ("Approx. 30 people sit. A hall.", ["Approx. 30 people sit", "A hall"]),
    ("Gen. Lee rides. A horse.", ["Gen. Lee rides", "A horse"]),
    ("Mt. Fuji at dawn. Snow.", ["Mt. Fuji at dawn", "Snow"]),
    ("Ph.D. students sit. A class.", ["Ph.D. students sit", "A class"]),
    ("She has a Ph.D. She smiles.", ["She has a Ph.D.", "She smiles"]),
    ("A cat! Is it? Yes.", ["A cat!", "Is it?", "Yes"]),
    ("Really?! A dog.", ["Really?!", "A dog"]),
    ("a cat. a dog", ["a cat", "a dog"]),
    ("First line\nSecond line.\n\n  Third", ["First line", "Second line", "Third"]),
    ("1. A red car. 2. A blue car.", ["1. A red car", "2. A blue car"]),
    ("It shows: 1. A red car. 2. A blue car.", ["It shows: 1. A red car", "2. A blue car"]),
    ("A red car, est. 1950, and a vase, c. 1900. A shelf.", ["A red car, est. 1950, and a vase, c. 1900", "A shelf"]),
    ("A red car.</s> A blue car</s>", ["A red car", "A blue car"]),
    ("A cat.A dog sits.", ["A cat", "A dog sits"]),
    ("A tree.In the back, a house.", ["A tree", "In the back, a house"]),
    ("Size 5.Then more.", ["Size 5", "Then more"]),
    ("It costs 3.50.It is red.", ["It costs 3.50", "It is red"]),
    ("He reads vol. 2 of it, pp. 3-5. A lamp.", ["He reads vol. 2 of it, pp. 3-5", "A lamp"]),
    ("The car is by Mercedes-Benz Co. Ltd. and red.", ["The car is by Mercedes-Benz Co. Ltd. and red"]),
    ("At 5 p.m. To the left, a cat.", ["At 5 p.m.", "To the left, a cat"]),
    ("Wait\u2026 it is a cat\u2026 A dog.", ["Wait\u2026 it is a cat\u2026", "A dog"]),
    ('A 6" pipe. A wall. A 4" nail.', ['A 6" pipe', "A wall", 'A 4" nail']),
    ('A stray " mark. A dog.', ['A stray " mark', "A dog"]),
    ("A \u201cquote. In two\u201d here. A dog.", ["A \u201cquote. In two\u201d here", "A dog"]),
    ("\u4e00\u53ea\u732b\u3002\u4e00\u53ea\u72d7\uff01", ["\u4e00\u53ea\u732b", "\u4e00\u53ea\u72d7\uff01"]),
    ("hm... , a 5 in. , 6 ft. , pole . no. , a cat .", ["hm... , a 5 in. , 6 ft. , pole", "no. , a cat"]),
    ('people say "hi." , and leave . a cat', ['people say "hi." , and leave', "a cat"]),
    (" . .. ", []),
    ("", []),
    (" \n ", []),
]


@pytest.mark.parametrize(("text", "sentences"), HARD, ids=[text[:40] for text, _ in HARD])
def test_hard_cases(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@settings(max_examples=300, deadline=None)
@given(strategies.text(alphabet="aAI1.,:!?\"'() \n\u3002\uff01\u2026", max_size=40))
def test_splitting_loses_nothing_but_full_stops_and_space(text: str) -> None:
    def kept(pieces: list[str]) -> str:
        return re.sub(r"[\s.\u3002]", "", "".join(pieces))

    sentences = split_sentences(text)
    assert kept(sentences) == kept([text])
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)


@pytest.mark.timeout(20)  # seconds; work that grows with the square of the length would take minutes
@pytest.mark.parametrize(
    ("unit", "sentences"),
    [
        *[("A cat. ", 100_000), (".", 0), (". ", 0), ("Mr. ", 1), ('."', 1), ('"a. ', None)],
        *[("\n" * 10, 0), (" \r\n", 0), ("a\n", 100_000)],
    ],
    ids=repr,
)
def test_long_texts_take_time_in_proportion(unit: str, sentences: int | None) -> None:
    found = split_sentences(unit * 100_000)
    assert sentences is None or len(found) == sentences


def test_the_published_split_cuts_at_every_stop() -> None:
    text = "This is a cat. It weighs 3.5 kg\nand sleeps</s> . \n\n Soft fur in the U.S."
    expected = ["This is a cat", "It weighs 3", "5 kg", "and sleeps", "Soft fur in the U", "S"]
    assert split_published(text) == expected == splitter("published")(text)


def test_no_split_keeps_the_caption_whole() -> None:
    assert splitter("none")(" One. Two. ") == ["One. Two."]
    assert splitter("none")(" ") == []
    assert splitter("sentences") is split_sentences
