"""What is remembered of where prompts went: the longest beginning, within bounds, and nothing of who is gone."""

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helixflow.core.call import Call, Operation
from helixflow.routing.affinity import PrefixTable
from tests.harness.routing import make_call

MOST = 40


def table(entries: int = 1000) -> PrefixTable:
    return PrefixTable(entries=entries, block_bytes=64)


def test_the_longest_beginning_that_is_known_decides() -> None:
    known = table()
    system = "You answer briefly. " * 20
    one, other = (known.chain("m", make_call(prompt=system + tail * 40)) for tail in ("What is up? ", "Who is it? "))
    shared = sum(a == b for a, b in zip(one, other, strict=False))
    assert 2 < shared < min(len(one), len(other))
    known.remember(one, "a")
    assert known.find(other) == ("a", shared)
    known.remember(other, "b")
    assert known.find(other) == ("b", len(other))
    assert known.find(one) == ("a", len(one))
    third = known.chain("m", make_call(prompt=system + "Something else entirely. " * 20))
    assert known.find(third) == ("b", shared), "where it went last"


def test_the_next_turn_of_a_conversation_is_found() -> None:
    known = table()
    turns = [{"role": "user", "content": "Tell me a story. " * 20}]
    known.remember(known.chain("m", make_call(messages=turns)), "a")
    turns += [{"role": "assistant", "content": "Once upon a time. " * 20}, {"role": "user", "content": "Go on. " * 20}]
    longer = known.chain("m", make_call(messages=turns))
    seat, matched = known.find(longer)
    assert seat == "a"
    assert 3 <= matched < len(longer)


def test_what_belongs_apart_is_kept_apart() -> None:
    known = table()
    prompt = "Shared by all. " * 100
    known.remember(known.chain("m", make_call(prompt=prompt)), "a")
    for other in (
        known.chain("n", make_call(prompt=prompt)),
        known.chain("m", make_call(prompt=prompt, organisation="other")),
        known.chain("m", make_call(prompt=prompt, tools=[{"type": "function", "function": {"name": "f"}}])),
    ):
        assert known.find(other) == ("", 0)
    assert known.find(known.chain("m", make_call(prompt=prompt, key="another key", temperature=0.1)))[0] == "a"


def test_short_prompts_and_embeddings_are_not_looked_at() -> None:
    known = table()
    assert not known.chain("m", make_call(prompt="Hi"))
    call = make_call(prompt="long " * 100)
    embedding = Call(
        "c", "r", call.principal, Operation.EMBEDDINGS, "m", call.fields, call.params, False, False, 0, 500
    )
    assert not known.chain("m", embedding)
    assert not table(entries=0).chain("m", call)


def test_huge_prompts_cost_a_bounded_number_of_hashes() -> None:
    known = PrefixTable(entries=1000, block_bytes=256)
    huge = make_call(prompt="x" * 2_000_000)
    assert len(known.chain("m", huge)) < 32
    raw = b'"' + b"y" * 300 + b'"'
    completion = Call(
        "c", "r", huge.principal, Operation.COMPLETIONS, "m", {"prompt": msgspec.Raw(raw)}, huge.params, False, False, 0
    )
    assert len(known.chain("m", completion)) == 1


class Remembering(RuleBasedStateMachine):
    """Beginnings are those of strings over two letters, as hashes. The model never drops anything; `age` is how many
    entries have been written since each was used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = PrefixTable(entries=MOST, block_bytes=64)
        self.seats: dict[str, set[str]] = {}
        self.age: dict[str, int] = {}
        self.been: dict[str, int] = {}

    @rule(text=st.text("ab", min_size=1, max_size=8), seat=st.sampled_from("xyz"))
    def remember(self, text: str, seat: str) -> None:
        self.table.remember(hashes(text), seat)
        self.age = {known: age + len(text) for known, age in self.age.items()}
        for end in range(1, len(text) + 1):
            self.seats.setdefault(text[:end], set()).add(seat)
            self.been[text[:end]] = max(self.been.get(text[:end], 0), len(self.seats[text[:end]]))
            self.age[text[:end]] = 0
        assert self.table.find(hashes(text)) == (seat, len(text))

    @rule(seat=st.sampled_from("xyz"))
    def forget(self, seat: str) -> None:
        self.table.forget(seat)
        for seats in self.seats.values():
            seats.discard(seat)

    @rule(text=st.text("ab", min_size=1, max_size=9))
    def find(self, text: str) -> None:
        found, matched = self.table.find(hashes(text))
        if matched:
            assert found in self.seats[text[:matched]], "where it never was, or who is gone"
        longest = next((end for end in range(len(text), 0, -1) if self.is_sure(text[:end])), 0)
        assert matched >= longest, "what was used lately is there, however long"

    @invariant()
    def bounded(self) -> None:
        assert len(self.table) <= MOST

    def is_sure(self, text: str) -> bool:
        """Whether it was used within the last half of the table's entries, but for one chain, and nobody is gone that
        it was with.
        """
        return (
            text in self.been and len(self.seats[text]) == self.been[text] and self.age.get(text, MOST) <= MOST // 2 - 8
        )


def hashes(text: str) -> list[int]:
    return [hash(text[:end]) for end in range(1, len(text) + 1)]


TestRemembering = Remembering.TestCase
TestRemembering.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
