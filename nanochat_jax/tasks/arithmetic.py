"""Arithmetic: word problems of one or two steps in GSM8K's form, made up as they are asked for. Needs no data.

An answer calls the calculator once a step and ends in the line `#### N`. All numbers are integers of 2 and more; a
division is written //, because the calculator prints 10/5 as 2.0.

The splits share no whole calculation: the checksum of a problem's steps, such as "6*7, 42+5", says which split it
belongs to, whatever the story, names and things around it, and whichever way round a sum or product is written. So no
seed and no size lets a test problem into training. A single step may be in both: 6*7 alone may belong to the other one.
"""

import operator
import random
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Unpack

from nanochat_jax.tasks.gsm8k import GSM8K, answer_parts
from nanochat_jax.tasks.task import MadeUpTask, Slice, question_and_answer

CALCULATIONS = 2  # raise it when the same arguments come to make other problems: token caches depend on it
HELD_OUT = 5  # one calculation in this many is for the test split
SMALLEST_LARGEST = 12  # with fewer numbers some stories would have no held-out calculation
LARGEST_LARGEST = 1000

NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana"),
    *("Ivan", "Jade", "Kofi", "Lena", "Milo", "Nora", "Omar", "Pia"),
)
THINGS = (
    *("apples", "beads", "books", "cards", "coins", "cups", "eggs", "keys"),
    *("lamps", "nuts", "pens", "plums", "rings", "shells", "stamps", "toys"),
)
STEP = re.compile(r"([a-cx])(//|[-+*])([a-cx])")
COMMUTING = re.compile(r"(\d+)([+*])(\d+)")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}


class Story(NamedTuple):
    """One kind of problem. In the texts A and B are people, T are things; a, b and c are the question's numbers.

    The first step makes x, the second y; in the answer these stand for the call of the calculator and its result.
    """

    steps: tuple[tuple[str, str, str], ...]  # left operand, sign, right operand
    question: str
    answer: str


def parse_stories(table: str) -> list[Story]:
    """Lines of steps | question | answer; an indented line belongs to the one above."""
    rows = (re.split(r"\s+\| ", row) for row in re.split(r"\n(?! )", table.strip()))
    return [
        Story(tuple(STEP.fullmatch(step).groups() for step in steps.split(", ")), question, answer)
        for steps, question, answer in rows
    ]


STORIES = parse_stories("""
a+b | {A} has {a} {T} and finds {b} more. How many {T} does {A} have now? | {A} now has {x} {T}.
a+b | A box holds {a} {T}, a bag holds {b}. How many {T} are there in all? | In all there are {x} {T}.
a+b | {A} has {a} {T}, {B} has {b}. How many {T} do they have together? | Together they have {x} {T}.
a+b | {A} read {a} pages today and {b} pages before. How many pages is that? | That is {x} pages.
a+b | After giving {a} {T} to {B}, {A} still has {b}. How many were there at first? | There were {x} {T}.
a-b | {A} had {a} {T} and gave {b} to {B}. How many {T} does {A} have left? | {A} has {x} {T} left.
a-b | A shop has {a} {T} and sells {b} of them. How many {T} remain? | There remain {x} {T}.
a-b | {A} is {a} years old, {B} is {b}. How many years older is {A}? | {A} is {x} years older.
a-b | {A} has {b} {T} and wants {a}. How many more {T} does {A} need? | {A} needs {x} more {T}.
a-b | Of {a} {T} on a table, {b} are red. How many {T} are not red? | Not red are {x} {T}.
a*b | There are {a} bags with {b} {T} in each. How many {T} are there? | The bags hold {x} {T}.
a*b | {A} buys {b} {T} for {a} dollars each. How many dollars is that? | That is {x} dollars.
a*b | {A} runs {a} miles a day. How many miles does {A} run in {b} days? | {A} runs {x} miles.
a*b | A hall has {a} rows of {b} seats. How many seats does it have? | The hall has {x} seats.
a*b | {A} has {a} {T}. {B} has {b} times as many. How many {T} does {B} have? | {B} has {x} {T}.
a//b | {A} puts {a} {T} into bags of {b}. How many bags does {A} fill? | {A} fills {x} bags.
a//b | {b} friends share {a} {T} equally. How many {T} does each get? | Each gets {x} {T}.
a//b | {A} pays {a} dollars for {b} {T}. How many dollars is one of them? | One is {x} dollars.
a//b | A rope of {a} feet is cut into {b} equal parts. How long is each? | Each part is {x} feet long.
a//b | {A} reads {b} pages a day. How many days does {A} need for {a} pages? | {A} needs {x} days.
a+b, x+c | {A} has {a} {T}, {B} has {b} and a friend has {c}. How many {T} is that?
    | {A} and {B} have {x} {T}. With the friend that is {y}.
a+b, x-c | {A} has {a} {T}, gets {b} from {B} and loses {c}. How many {T} does {A} have now?
    | First {A} has {x} {T}. Then {A} has {y}.
a-b, x+c | A bus has {a} people. {b} get off and {c} get on. How many people are on it now?
    | After the stop {x} are left. With the new ones there are {y}.
a-b, x-c | {A} has {a} {T}, gives {b} to {B} and loses {c}. How many {T} are left?
    | After the gift {A} has {x} {T}. In the end {y} are left.
a*b, x+c | {A} has {a} bags of {b} {T} and {c} more {T}. How many {T} does {A} have?
    | The bags hold {x} {T}. In all {A} has {y}.
a*b, x-c | {A} fills {a} boxes with {b} {T} each. Then {c} {T} get lost. How many {T} are left?
    | The boxes hold {x} {T}. There are {y} left.
a*b, c-x | {A} has {c} dollars and buys {b} {T} for {a} dollars each. How many dollars are left?
    | The {T} cost {x} dollars. There are {y} left.
a+b, c-x | A book has {c} pages. {A} reads {a} pages, then {b} more. How many pages are left?
    | {A} reads {x} pages. There are {y} left.
a+b, x*c | {A} sells {a} {T}, {B} sells {b}, all for {c} dollars each. How many dollars do they get?
    | They sell {x} {T}. They get {y} dollars.
a-b, x*c | {A} has {a} {T}, keeps {b} and sells the others for {c} dollars each. How many dollars is that?
    | {A} sells {x} {T}. That is {y} dollars.
a+b, x//c | {A} puts {a} {T}, {B} puts {b} on a table. {c} friends share them equally. How many does each get?
    | On the table are {x} {T}. Each gets {y}.
a-b, x//c | {A} has {a} {T}, keeps {b} and puts the others into {c} bags equally. How many are in each bag?
    | {A} puts away {x} {T}. In each bag are {y}.
a*b, x//c | {a} boxes hold {b} {T} each. {c} friends share them all equally. How many {T} does each get?
    | The boxes hold {x} {T}. Each gets {y}.
a//b, x*c | {b} {T} cost {a} dollars. How many dollars do {c} {T} cost? | One costs {x} dollars. All cost {y} dollars.
a//b, x+c | {A} has {c} {T}. Then {b} people, {A} among them, share {a} more equally. How many does {A} have now?
    | Each gets {x} {T}. {A} now has {y}.
a//b, x-c | {A} splits {a} {T} into {b} equal heaps and takes {c} from one heap. How many {T} are left in it?
    | Each heap has {x} {T}. There are {y} left in it.
a*b, x+a | {A} has {a} {T}, {B} has {b} times as many. How many {T} do they have together?
    | {B} has {x} {T}. Together they have {y}.
a-b, x+a | {A} has {a} {T}, {B} has {b} fewer. How many {T} do they have together?
    | {B} has {x} {T}. Together they have {y}.
""")


def draw_numbers(story: Story, rng: random.Random, largest: int) -> dict[str, int] | None:
    """The story's numbers and results, all of them 2 or more; None where the first numbers drawn leave no choice."""
    values = {"a": rng.randint(2, largest)}  # which every first step begins with
    for result, (left, sign, right) in zip("xy", story.steps):
        known, unknown = (left, right) if left in values else (right, left)
        if unknown not in values:
            fitting = fitting_numbers(values[known], sign, known is left, largest)
            if not fitting:
                return None
            values[unknown] = rng.choice(fitting)
        values[result] = OPERATIONS[sign](values[left], values[right])
    return values


def fitting_numbers(known: int, sign: str, known_is_left: bool, largest: int) -> Sequence[int]:
    """The numbers from 2 to `largest` with which `known` gives an integer of 2 or more."""
    if sign == "//":
        return [number for number in range(2, min(known // 2, largest) + 1) if known % number == 0]
    if sign == "-":
        return range(2, min(known - 2, largest) + 1) if known_is_left else range(known + 2, largest + 1)
    return range(2, largest + 1)


def is_held_out(calls: list[str]) -> bool:
    """Whether a problem of these steps is for the test split; 3+5 goes where 5+3 goes."""
    ordered = COMMUTING.sub(lambda m: m[2].join(sorted((m[1], m[3]))), ", ".join(calls))
    return zlib.crc32(ordered.encode()) % HELD_OUT == 0


class Arithmetic(MadeUpTask):
    """Arithmetic(split, size): train or test, `size` conversations of an endless sequence; another seed is another one.

    steps: how many calculations a problem may take, 1 and 2. largest: no number in a question is larger.
    """

    evaluate = GSM8K.evaluate  # the number after `#### ` decides

    def __init__(
        self,
        split: str = "train",
        size: int = 100_000,
        *,
        seed: int = 0,
        steps: Sequence[int] = (1, 2),
        largest: int = 20,
        **slice_: Unpack[Slice],
    ):
        super().__init__(split, size, **slice_)
        if not SMALLEST_LARGEST <= operator.index(largest) <= LARGEST_LARGEST:
            bounds = f"{SMALLEST_LARGEST} to {LARGEST_LARGEST:,}"
            raise ValueError(f"{self.name} needs a largest number from {bounds}, got {largest}")
        if not steps or not set(steps) <= {1, 2}:
            raise ValueError(f"{self.name} needs steps of 1, 2 or both, got {steps!r:.40}")
        self.seed, self.largest, self.steps = operator.index(seed), largest, sorted(set(steps))
        self._stories = [story for story in STORIES if len(story.steps) in self.steps]

    def make(self, index: int) -> dict:
        rng = random.Random(f"{self.seed} {self.split} {index}")
        story = rng.choice(self._stories)  # before the split is looked at: both have the same mix of stories
        calls = None
        while calls is None or is_held_out(calls) != (self.split == "test"):
            if values := draw_numbers(story, rng, self.largest):
                calls = [f"{values[left]}{sign}{values[right]}" for left, sign, right in story.steps]
        (A, B), T = rng.sample(NAMES, 2), rng.choice(THINGS)
        results = [values[name] for name, _ in zip("xy", calls)]
        marked = {name: f"<<{call}={result}>>{result}" for name, call, result in zip("xy", calls, results)}
        answer = f"{story.answer}\n#### {results[-1]}".format(A=A, B=B, T=T, **marked)
        return question_and_answer(story.question.format(A=A, B=B, T=T, **values), answer_parts(answer))

    def fingerprint(self) -> str:
        name = type(self).__name__
        return self.fingerprint_of(name, CALCULATIONS, self.split, self.size, self.seed, self.steps, self.largest)
