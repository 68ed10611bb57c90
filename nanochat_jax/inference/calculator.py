"""The calculator tool: arithmetic and letter counts that a model writes, read by a small parser and never by eval.

An expression of digits, + - * / // . ( ) and spaces is arithmetic. Any other is a count: it is made of letters, digits,
quotes, ( ) . _ and spaces, calls .count( and may use literals, methods and `and or not in is if else`. Values and their
text are Python's. Every expression takes a few milliseconds and a few hundred kilobytes at the most, on any thread.
"""

import keyword
import math
import operator
import re
from collections.abc import Callable
from types import BuiltinMethodType

MAX_CHARS = 10_000  # of the expression
MAX_TOKENS = 1_000
MAX_PARENTHESES = 200  # nested in arithmetic, as in Python
MAX_NESTING = 32  # of parentheses, arguments and else branches in a count
_TOO_LARGE = 10**4300  # Python refuses to print integers of more digits
MAX_WORK = 1 << 16  # sum over method calls of (receiver's length + 1) x (argument's length or value + 1)

ARITHMETIC = frozenset("0123456789+-*/.() ")
COUNTING = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'\"()._ ")
# Names that nanochat refuses, to protect its eval. Here an expression with one outside of quotes has no result.
REFUSED = re.compile(
    "import|exec|eval|compile|open|file|input|globals|locals|vars|dir|getattr|setattr|delattr|hasattr", re.IGNORECASE
)
ATTRIBUTE = re.compile(
    "capitalize|casefold|center|count|decode|encode|endswith|expandtabs|find|index|isalnum|isalpha|isascii|isdecimal|"
    "isdigit|isidentifier|islower|isnumeric|isprintable|isspace|istitle|isupper|join|ljust|lower|lstrip|partition|"
    "removeprefix|removesuffix|rfind|rindex|rjust|rpartition|rsplit|rstrip|split|splitlines|startswith|strip|swapcase|"
    "title|upper|zfill|real|imag|numerator|denominator|bit_length|bit_count|conjugate"
)
CONSTANTS = {"True": True, "False": False, "None": None}
NO_VALUE = SyntaxError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError
RESULTS = {int, float, bool, str, bytes, tuple, list}  # anything else has no text worth showing

TOKEN = re.compile(
    r"""[ ]*(?:
    (?P<number> 0[xXoObB][0-9a-zA-Z_]* | (?:[0-9][0-9_]*\.?[0-9_]* | \.[0-9][0-9_]*)(?:[eE][0-9][0-9_]*)? )
    | (?P<prefix> (?i:br?|rb|r|u|fr?|rf) )?
      (?P<string> '''.*?''' | \"\"\".*?\"\"\" | '(?!'')[^']*' | "(?!"")[^"]*" )
    | (?P<name> [A-Za-z_][A-Za-z_0-9]* )
    | (?P<sign> //|[-+*/().] )
    )""",
    re.VERBOSE,
)


def calculate(expression: str) -> str | None:
    """The text of an expression's value, None where it has none. Never raises.

    The results are those of nanochat's calculator, except that names which nanochat refuses are allowed inside quotes
    ('profile'.count('i') is 1), and that these have no result: `...`, bound methods and generators, an expression with
    an integer of more than 4300 digits, also as an intermediate value, and an expression beyond the limits above.
    """
    if len(expression) > MAX_CHARS:
        return None
    text = expression.replace(",", "").rstrip(" ")
    characters = set(text)
    try:
        if characters <= ARITHMETIC:
            value = _arithmetic(_tokens(text))
        elif characters <= COUNTING and ".count(" in text and "__" not in text:
            value = _Count(_tokens(text)).value()
        else:
            return None
        return str(value) if type(value) in RESULTS else None
    except NO_VALUE:
        return None


def _tokens(text: str) -> list[tuple[str, object]]:
    """Pairs (kind, value), where the kind is "value" (a literal), "name" or "sign"; the last one is ("end", None)."""
    tokens, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None or len(tokens) == MAX_TOKENS:
            raise SyntaxError
        at = match.end()
        if number := match["number"]:
            whole = number.replace("_", "").isdigit() or number[:2].lower() in ("0x", "0o", "0b")
            tokens.append(("value", _bounded(int(number, 0) if whole else float(number))))
        elif quoted := match["string"]:
            size = 3 if quoted[:3] in ("'''", '"""') else 1
            inside = quoted[size:-size]
            tokens.append(("value", inside.encode() if "b" in (match["prefix"] or "").lower() else inside))
        else:
            tokens.append((match.lastgroup, match[match.lastgroup]))
    return [*tokens, ("end", None)]


def _bounded(value):
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        raise OverflowError
    return value


# ---- arithmetic: two stacks instead of recursion, so that nesting costs the caller's thread nothing

SUMS, PRODUCTS, UNARY = 1, 2, 3
BINARY = {
    "+": (SUMS, operator.add),
    "-": (SUMS, operator.sub),
    "*": (PRODUCTS, operator.mul),
    "/": (PRODUCTS, operator.truediv),
    "//": (PRODUCTS, operator.floordiv),
}
SIGNS = {"+": (UNARY, operator.pos), "-": (UNARY, operator.neg)}
OPEN = (0, None)


def _arithmetic(tokens: list[tuple[str, object]]):
    """The value, by operator precedence; () is the empty tuple, as in Python."""
    values, pending, depth = [], [], 0  # pending: (precedence, function) of operators that wait for their right operand

    def apply(precedence: int) -> None:
        while pending and pending[-1][0] >= precedence:
            rank, function = pending.pop()
            operands = [values.pop()] if rank == UNARY else [values.pop(-2), values.pop()]
            values.append(_bounded(function(*operands)))

    need_value, just_opened = True, False
    for kind, token in tokens:
        opened = False
        if token == "(" and need_value and depth < MAX_PARENTHESES:
            pending.append(OPEN)
            depth, opened = depth + 1, True
        elif token == ")" and depth and (just_opened or not need_value):
            apply(SUMS)
            pending.pop()
            if just_opened:
                values.append(())
            depth, need_value = depth - 1, False
        elif need_value and kind == "value":
            values.append(token)
            need_value = False
        elif need_value and token in SIGNS:
            pending.append(SIGNS[token])
        elif not need_value and token in BINARY:
            apply(BINARY[token][0])
            pending.append(BINARY[token])
            need_value = True
        elif kind != "end" or need_value or depth:
            raise SyntaxError
        just_opened = opened
    apply(SUMS)
    return values.pop()


# ---- counts: recursive descent that builds closures, because `if`, `and` and `or` do not evaluate all their parts


class _Count:
    """A parser of one count. Methods are named as in Python's grammar; arithmetic and subscripts are left out."""

    def __init__(self, tokens: list[tuple[str, object]]):
        self.tokens, self.at, self.depth, self.work = tokens, 0, 0, 0

    def value(self):
        evaluate = self._expression()
        if self.tokens[self.at][0] != "end":
            raise SyntaxError
        return evaluate()

    def _accept(self, *words: str) -> bool:
        """Step over these names or signs, if they come next."""
        ahead = self.tokens[self.at : self.at + len(words)]
        if [kind != "value" and token for kind, token in ahead] != list(words):
            return False
        self.at += len(words)
        return True

    def _expect(self, word: str) -> None:
        if not self._accept(word):
            raise SyntaxError

    def _spend(self, *operands) -> None:
        """Count an operation's work before it is done: a bound of its time and of its result's length."""
        sizes = [abs(x) if isinstance(x, int) else len(x) if hasattr(x, "__len__") else 0 for x in operands]
        self.work += math.prod(1 + size for size in sizes)
        if self.work > MAX_WORK:
            raise OverflowError

    def _expression(self) -> Callable:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise SyntaxError
        evaluate = value = self._disjunction()
        if self._accept("if"):
            condition = self._disjunction()
            self._expect("else")
            other = self._expression()

            def evaluate():
                return value() if condition() else other()

        self.depth -= 1
        return evaluate

    def _disjunction(self) -> Callable:
        return self._chain("or", self._conjunction, lambda value: value)

    def _conjunction(self) -> Callable:
        return self._chain("and", self._inversion, operator.not_)

    def _chain(self, word: str, part: Callable, decides: Callable) -> Callable:
        """Parts joined by `word`: the first value that decides, else the last one."""
        parts = [part()]
        while self._accept(word):
            parts.append(part())

        def evaluate():
            for part in parts:
                value = part()
                if decides(value):
                    break
            return value

        return evaluate if len(parts) > 1 else parts[0]

    def _inversion(self) -> Callable:
        count = 0
        while self._accept("not"):
            count += 1
        value = self._comparison()
        return (lambda: bool(value()) == (count % 2 == 0)) if count else value

    def _comparison(self) -> Callable:
        first, rest = self._primary(), []
        while compare := self._comparison_operator():
            rest.append((compare, self._primary()))

        def evaluate():
            left = first()
            for compare, operand in rest:
                right = operand()
                if not compare(left, right):
                    return False
                left = right
            return True

        return evaluate if rest else first

    def _comparison_operator(self) -> Callable | None:
        def inside(left, right):
            self._spend(left, right)
            return left in right

        if self._accept("in"):
            return inside
        if self._accept("not", "in"):
            return lambda left, right: not inside(left, right)
        if self._accept("is", "not"):
            return operator.is_not
        return operator.is_ if self._accept("is") else None

    def _primary(self) -> Callable:
        """An atom with the attributes and calls behind it."""
        atom, steps = self._atom(), []
        while True:
            if self._accept("."):
                steps.append((_attribute, self._name()))
            elif self._accept("(", ")"):
                steps.append((self._call, None))
            elif self._accept("("):
                steps.append((self._call, self._expression()))
                self._expect(")")
            else:
                break

        def evaluate():
            value = atom()
            for step, argument in steps:
                value = step(value, argument)
            return value

        return evaluate if steps else atom

    def _call(self, function, argument: Callable | None):
        arguments = [] if argument is None else [argument()]
        if type(function) is not BuiltinMethodType:
            raise TypeError
        if arguments and function.__name__ in ("encode", "decode"):
            raise ValueError  # the name of a codec would import its module
        self._spend(function.__self__, *arguments)
        return function(*arguments)

    def _name(self) -> str:
        kind, name = self.tokens[self.at]
        if kind != "name" or keyword.iskeyword(name) or REFUSED.search(name):
            raise SyntaxError
        self.at += 1
        return name

    def _atom(self) -> Callable:
        if self._accept("(", ")"):
            return lambda: ()
        if self._accept("("):
            inside = self._expression()
            self._expect(")")
            return inside
        kind, token = self.tokens[self.at]
        if kind == "name":
            if token in CONSTANTS:
                self.at += 1
            else:
                self._name()
            return lambda: CONSTANTS[token]  # of an unknown name a KeyError, but only where it is evaluated
        if kind != "value":
            raise SyntaxError
        self.at += 1
        while isinstance(token, str | bytes) and self.tokens[self.at][0] == "value":  # 'a' 'b' is one literal
            token += self.tokens[self.at][1]
            self.at += 1
        return lambda: token


def _attribute(value, name: str):
    if type(value) not in RESULTS or not ATTRIBUTE.fullmatch(name):
        raise AttributeError
    return getattr(value, name)
