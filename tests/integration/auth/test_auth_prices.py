"""Prices: set by operators, known of providers, or the default; and what gateways are told of them."""

from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from helixflow.auth.price_lookup import PriceLookup
from helixflow.core.errors import ErrorKind
from helixflow.metering.deployments import deployment_refs
from helixflow.metering.money import NANOS, format_dollars
from helixflow.metering.prices import Price, decode_price
from helixflow.rpc.generated.auth_v1 import metering_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_PRICES
from helixflow.settings.deployments import LlamaCppDeployment, OpenAIDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import MeteringSettings, Settings
from helixflow.storage.engine import Database
from helixflow.storage.schema import price_versions, prices
from tests.harness.auth import Installation, Person, refused

OPENAI = OpenAIDeployment(engine="openai", base_url="https://api.openai.com/v1", model="gpt-4o")
STRANGE = OpenAIDeployment(engine="openai", base_url="http://10.0.0.1/v1")
LOCAL = LlamaCppDeployment(engine="llama_cpp", source="file:/m.gguf")
MODELS = (
    ModelSettings(name="fast", deployments=(LOCAL, OPENAI)),
    ModelSettings(name="large", deployments=(STRANGE,)),
)
SETTINGS = Settings(models=MODELS, metering=MeteringSettings(unpriced_input="7", unpriced_output="21.5"))
DAY = 86_400


@pytest.fixture
async def auth(database: Database) -> AsyncIterator[Installation]:
    installation = Installation(database, settings=SETTINGS)
    yield installation
    await installation.close()


@pytest.fixture
async def operator(auth: Installation) -> Person:
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"}, operator=True)


async def put(auth: Installation, caller: Person, subject: str, **fields: Any) -> pb.PriceEntry:
    """Sets a price of `input` dollars, or of `rates`."""
    rates = fields.pop("rates", None) or pb.Rates(input=fields.pop("input", "1"))
    kind = fields.pop("kind", "deployment" if "/" in subject else "model")
    request = pb.SetPriceRequest(subject_kind=kind, subject=subject, rates=rates, **fields)
    made = await auth.call(caller, "SetPrice", request)
    assert isinstance(made, pb.PriceEntry)
    return made


async def show(auth: Installation, caller: Person, subject: str, at: int = 0) -> Any:
    return await auth.call(caller, "GetPrice", pb.GetPriceRequest(subject=subject, at=at))


async def resolve(auth: Installation, *names: str) -> dict[str, list[tuple[int, int, Price]]]:
    """What gateways are told: seconds from now, until when (0: for ever), and the price."""
    refs = [ref for ref in deployment_refs(MODELS) if not names or ref.deployment in names]
    answer = await auth.metering.ResolvePrices(metering_pb2.ResolvePricesRequest(deployments=refs), None)  # type: ignore[arg-type]
    found: dict[str, list[tuple[int, int, Price]]] = {}
    for dated in answer.prices:
        ended = dated.valid_to_ms // 1000 - auth.now if dated.valid_to_ms else 0
        entry = (dated.valid_from_ms // 1000 - auth.now, ended, decode_price(dated.price))
        found.setdefault(dated.deployment, []).append(entry)
    return found


async def test_a_price_that_is_set_is_shown_as_it_was_given_told_and_recorded(
    auth: Installation, operator: Person
) -> None:
    rates = pb.Rates(
        input="2.50",
        cached_input="0.25",
        output="10.000000001",
        request="0.001",
        engine_second="0.0002",
        tiers=[pb.RateTier(from_prompt_tokens=200_000, input="5.00", cached_input="0.00", output="15.00")],
    )
    made = await put(auth, operator, "fast", rates=rates, valid_to=auth.now + DAY)
    assert made.rates == rates
    assert (made.subject_kind, made.subject, made.source) == ("model", "fast", "set")
    assert (made.valid_from, made.valid_to, made.created_at) == (auth.now, auth.now + DAY, auth.now)
    assert await show(auth, operator, "fast") == made
    listed = await auth.call(operator, "ListPrices", pb.ListPricesRequest(subject="fast"))
    assert made in listed.prices
    assert await auth.told() == [(CHANGE_KIND_PRICES, "", "")]
    (record,) = await auth.audited("", action="set_price")
    assert (record.target_kind, record.target_id, record.outcome) == ("price", "fast", "done")
    assert made.version in record.after and '"10.000000001"' in record.after
    by_version = await show(auth, operator, made.version)
    assert (by_version.rates, by_version.source, by_version.subject) == (rates, "set", "")


async def test_what_is_not_given_is_not_charged_and_cached_tokens_cost_as_others(
    auth: Installation, operator: Person
) -> None:
    made = await put(
        auth,
        operator,
        "fast/llama_cpp-0",
        rates=pb.Rates(input="3", tiers=[pb.RateTier(from_prompt_tokens=1, input="4.5")]),
    )
    assert MessageToDict(made.rates, preserving_proto_field_name=True) == {
        "input": "3.00",
        "cached_input": "3.00",
        "output": "0.00",
        "request": "0.00",
        "engine_second": "0.00",
        "tiers": [{"from_prompt_tokens": "1", "input": "4.50", "cached_input": "4.50", "output": "0.00"}],
    }
    again = await put(auth, operator, "large", rates=made.rates)
    assert again.version == made.version


# Fields of a request, and the one that is named.
NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"rates": pb.Rates(input="-1")}, "rates.input"),
    ({"rates": pb.Rates(input="1", cached_input="free")}, "rates.cached_input"),
    ({"rates": pb.Rates(output="1e3")}, "rates.output"),
    ({"rates": pb.Rates(request="0.0000000001")}, "rates.request"),
    ({"rates": pb.Rates(engine_second="9000001")}, "rates.engine_second"),
    ({"rates": pb.Rates(tiers=[pb.RateTier(input="1")])}, "rates.tiers[0].from_prompt_tokens"),
    ({"rates": pb.Rates(tiers=[pb.RateTier(from_prompt_tokens=9, output="x")])}, "rates.tiers[0].output"),
    (
        {"rates": pb.Rates(tiers=[pb.RateTier(from_prompt_tokens=9), pb.RateTier(from_prompt_tokens=9)])},
        "rates.tiers[1].from_prompt_tokens",
    ),
    ({"rates": pb.Rates(tiers=[pb.RateTier(from_prompt_tokens=n + 1) for n in range(17)])}, "rates.tiers"),
    ({"kind": "everything"}, "subject_kind"),
    ({"kind": ""}, "subject_kind"),
    ({"kind": "deployment"}, "subject"),
    ({"valid_from": 1_699_999_999}, "valid_from"),
    ({"valid_from": -5}, "valid_from"),
    ({"valid_from": 2**60}, "valid_from"),
    ({"valid_to": 1_700_000_000}, "valid_to"),
    ({"valid_from": 1_700_000_100, "valid_to": 1_700_000_100}, "valid_to"),
    ({"valid_to": 2**60}, "valid_to"),
]


async def test_nonsense_is_refused_with_the_field_named(auth: Installation, operator: Person) -> None:
    for fields, param in NONSENSE:
        async with refused(ErrorKind.UNPROCESSABLE, param):
            await put(auth, operator, "fast", **dict(fields))
    for subject in ("", "a b", "größe", "-x", "x" * 201):
        async with refused(ErrorKind.UNPROCESSABLE, "subject"):
            await put(auth, operator, subject, kind="model")
    assert await auth.rows(prices) == []


async def test_a_price_without_end_ends_where_the_next_one_begins(auth: Installation, operator: Person) -> None:
    first = await put(auth, operator, "fast", input="1")
    later = auth.now + DAY
    await put(auth, operator, "fast", input="2", valid_from=later, valid_to=later + DAY)
    await put(auth, operator, "fast", input="3", valid_from=later + 3 * DAY)
    await put(auth, operator, "fast/openai-1", input="9", valid_from=later)
    spans = [(row.valid_from, row.valid_to) for row in await auth.rows(prices, subject="fast")]
    assert sorted(spans, key=str) == sorted([(auth.now, later), (later, later + DAY), (later + 3 * DAY, None)], key=str)
    assert (await show(auth, operator, "fast", later - 1)).version == first.version
    assert (await show(auth, operator, "fast", later)).rates.input == "2.00"
    # The record tells what was before.
    records = await auth.audited("", action="set_price")
    assert first.version in records[1].before and records[0].before == ""


async def end(auth: Installation, caller: Person, price: pb.PriceEntry, at: int = 0) -> pb.PriceEntry:
    ended = await auth.call(caller, "EndPrice", pb.EndPriceRequest(id=price.id, at=at))
    assert isinstance(ended, pb.PriceEntry)
    return ended


async def test_a_price_that_holds_is_ended(auth: Installation, operator: Person) -> None:
    made = await put(auth, operator, "fast", input="1")
    assert made.id
    auth.clock.advance(60)
    later = auth.now + DAY
    async with refused(ErrorKind.UNPROCESSABLE, "at"):
        await end(auth, operator, made, at=auth.now - 1)
    expected = pb.PriceEntry()
    expected.CopyFrom(made)
    for at in (later, auth.now + 3600, 0):
        expected.valid_to = at or auth.now
        assert await end(auth, operator, made, at=at) == expected
        # What it costs after that is what it cost before.
        assert (await show(auth, operator, "fast/llama_cpp-0", expected.valid_to)).source == "default"
        assert (await show(auth, operator, "fast/llama_cpp-0", expected.valid_to - 1)) == expected
    assert [(begun, ended) for begun, ended, _ in (await resolve(auth, "fast/llama_cpp-0"))["fast/llama_cpp-0"]] == [
        (0, 0)
    ]
    async with refused(ErrorKind.CONFLICT):
        await end(auth, operator, made)
    assert await auth.told() == [(CHANGE_KIND_PRICES, "", "")] * 4
    first, *_ = await auth.audited("", action="end_price", outcome="done")
    assert first.target_id == "fast" and '"valid_to":null' in first.before and f'"valid_to":{later}' in first.after


async def test_a_price_that_has_not_begun_is_withdrawn_and_the_one_before_it_goes_on(
    auth: Installation, operator: Person
) -> None:
    first = await put(auth, operator, "fast", input="1")
    second = await put(auth, operator, "fast", input="2", valid_from=auth.now + DAY)
    third = await put(auth, operator, "fast", input="3", valid_from=auth.now + 2 * DAY, valid_to=auth.now + 3 * DAY)
    withdrawn = await end(auth, operator, second)
    assert (withdrawn.id, withdrawn.valid_from, withdrawn.valid_to) == (second.id, auth.now + DAY, auth.now + DAY)
    assert (await show(auth, operator, "fast")).valid_to == third.valid_from
    await end(auth, operator, third, at=third.valid_from - 1)
    assert await show(auth, operator, "fast") == first
    assert (await resolve(auth, "fast/llama_cpp-0"))["fast/llama_cpp-0"][0][:2] == (0, 0)
    assert len(await auth.rows(prices)) == 1
    # What was said of it can still be looked up, by its version and in the log.
    assert (await show(auth, operator, second.version)).rates.input == "2.00"
    *_, record = await auth.audited("", action="end_price")
    assert '"valid_from"' in record.before and not record.after
    # One that ends by itself, or was ended by hand, is not prolonged.
    await end(auth, operator, first, at=auth.now + DAY)
    last = await put(auth, operator, "fast", input="4", valid_from=auth.now + DAY)
    await end(auth, operator, last)
    assert (await show(auth, operator, "fast")).valid_to == auth.now + DAY


async def test_a_price_that_is_to_come_may_be_shortened(auth: Installation, operator: Person) -> None:
    made = await put(auth, operator, "fast", valid_from=auth.now + DAY, valid_to=auth.now + 3 * DAY)
    assert (await end(auth, operator, made, at=auth.now + 2 * DAY)).valid_to == auth.now + 2 * DAY
    async with refused(ErrorKind.UNPROCESSABLE, "at"):
        await end(auth, operator, made, at=auth.now + 2 * DAY)
    async with refused(ErrorKind.UNPROCESSABLE, "at"):
        await end(auth, operator, made, at=2**40)


async def test_only_operators_end_prices_that_are_there(auth: Installation, operator: Person) -> None:
    owner = await auth.add_person(await auth.add_organisation(), roles={"": "owner"})
    made = await put(auth, operator, "fast")
    async with refused(ErrorKind.PERMISSION_DENIED):
        await end(auth, owner, made)
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await end(auth, operator, pb.PriceEntry(id="price_none"))
    unset = await show(auth, operator, "large/openai-0")
    assert not unset.id
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await end(auth, operator, unset)
    assert await show(auth, operator, "fast") == made


async def test_validities_do_not_overlap(auth: Installation, operator: Person) -> None:
    now = auth.now
    await put(auth, operator, "fast", valid_from=now + 100, valid_to=now + 200)
    await put(auth, operator, "fast", valid_from=now + 300)
    for begin, end, param in (
        (0, 0, "valid_to"),
        (0, now + 101, "valid_to"),
        (now + 100, now + 150, "valid_from"),
        (now + 150, 0, "valid_from"),
        (now + 199, now + 250, "valid_from"),
        (now + 200, 0, "valid_to"),
        (now + 200, now + 301, "valid_to"),
        (now + 300, 0, "valid_from"),
    ):
        async with refused(ErrorKind.UNPROCESSABLE, param):
            await put(auth, operator, "fast", valid_from=begin, valid_to=end)
    await put(auth, operator, "fast", valid_to=now + 100)
    await put(auth, operator, "fast", valid_from=now + 200, valid_to=now + 300)
    await put(auth, operator, "fast", valid_from=now + 400)
    # Another subject of the same name but of another kind is another subject.
    await put(auth, operator, "fast/openai-1", kind="model")
    await put(auth, operator, "fast/openai-1", kind="deployment")


async def test_only_operators_set_prices_and_members_read_them(auth: Installation, operator: Person) -> None:
    organisation = await auth.add_organisation("Other")
    owner = await auth.add_person(organisation, roles={"": "owner"})
    viewer = await auth.add_person(organisation, roles={"": "viewer"})
    for caller in (owner, viewer):
        async with refused(ErrorKind.PERMISSION_DENIED):
            await put(auth, caller, "fast")
        async with refused(ErrorKind.PERMISSION_DENIED):
            await auth.call(caller, "CheckRating", pb.CheckRatingRequest())
        assert (await show(auth, caller, "fast/openai-1")).rates.input == "2.50"
        assert (await auth.call(caller, "ListPrices", pb.ListPricesRequest())).prices
    assert await auth.told() == []


async def test_a_repeated_request_with_the_same_key_sets_the_price_once(auth: Installation, operator: Person) -> None:
    request = pb.SetPriceRequest(subject_kind="model", subject="fast", rates=pb.Rates(input="1"))
    first = await auth.call(operator, "SetPrice", request, idempotency_key="k")
    auth.clock.advance(5)
    assert await auth.call(operator, "SetPrice", request, idempotency_key="k") == first
    assert len(await auth.rows(prices)) == 1


async def test_what_nobody_has_set_is_known_or_free_or_the_default(auth: Installation, operator: Person) -> None:
    found = await resolve(auth)
    assert found.keys() == {"fast/llama_cpp-0", "fast/openai-1", "large/openai-0"}
    ((begun, ended, free),) = found["fast/llama_cpp-0"]
    assert (begun, ended, free.source, free.is_free) == (0, 0, "default", True)
    ((_, _, known),) = found["fast/openai-1"]
    assert known.source.startswith("genai-prices ") and known.input == 2_500_000_000
    ((_, _, default),) = found["large/openai-0"]
    assert (default.source, default.input, default.cached_input, default.output) == (
        "default",
        7 * NANOS,
        7 * NANOS,
        21_500_000_000,
    )
    # Who is shown one is told the same, and where it is from.
    for name, price in (("fast", free), ("fast/openai-1", known), ("large", default)):
        entry = await show(auth, operator, name)
        assert (entry.version, entry.source, entry.subject_kind) == (price.version, price.source, "deployment")
        assert (entry.rates.input, entry.valid_from, entry.created_at) == (format_dollars(price.input), 0, 0)
    for subject in ("no-such-model", "fast/openai-7", "", "0123456789abcdef"):
        async with refused(ErrorKind.NOT_FOUND, "subject"):
            await show(auth, operator, subject)


async def test_deployment_before_model_before_what_is_known_and_back_where_a_price_ends(
    auth: Installation, operator: Person
) -> None:
    now = auth.now
    await put(auth, operator, "fast", input="1", valid_from=now + 100, valid_to=now + 400)
    await put(auth, operator, "fast", input="2", valid_from=now + 500)
    await put(auth, operator, "fast/openai-1", input="3", valid_from=now + 200, valid_to=now + 300)
    await put(auth, operator, "fast/openai-1", input="4", valid_from=now + 350, valid_to=now + 450)
    found = await resolve(auth, "fast/openai-1", "fast/llama_cpp-0")
    spans = [(begun, ended, format_dollars(price.input)) for begun, ended, price in found["fast/openai-1"]]
    assert spans == [
        (0, 100, "2.50"),
        (100, 200, "1.00"),
        (200, 300, "3.00"),
        (300, 350, "1.00"),
        (350, 450, "4.00"),
        (450, 500, "2.50"),
        (500, 0, "2.00"),
    ]
    local = [(begun, ended, format_dollars(price.input)) for begun, ended, price in found["fast/llama_cpp-0"]]
    assert local == [(0, 100, "0.00"), (100, 400, "1.00"), (400, 500, "0.00"), (500, 0, "2.00")]
    for begun, ended, wanted in spans:
        for at in (begun, ended - 1) if ended else (begun, begun + DAY):
            assert (await show(auth, operator, "fast/openai-1", now + at)).rates.input == wanted
    auth.clock.advance(360)
    later = await resolve(auth, "fast/openai-1")
    assert [(b + 360, price.input // NANOS) for b, _, price in later["fast/openai-1"]] == [(360, 4), (450, 2), (500, 2)]
    for timeline in (*found.values(), *later.values()):
        assert all(before[1] == after[0] for before, after in pairwise(timeline)) and timeline[-1][1] == 0


async def test_every_version_that_is_given_to_anybody_can_be_looked_up(auth: Installation, operator: Person) -> None:
    """Also when nothing has been rated by it yet."""
    await show(auth, operator, "large")
    assert len(await auth.rows(price_versions)) == 1
    given = {price.version: price for timeline in (await resolve(auth)).values() for _, _, price in timeline}
    stored = {row.version: decode_price(row.body) for row in await auth.rows(price_versions)}
    assert stored == given and all(price.sealed().version == version for version, price in given.items())
    made = await put(auth, operator, "large", input="5")
    listed = await auth.call(operator, "ListPrices", pb.ListPricesRequest())
    for entry in (*listed.prices, made):
        assert (await show(auth, operator, entry.version)).rates == entry.rates
    before = await auth.rows(price_versions)
    await resolve(auth)
    assert await auth.rows(price_versions) == before


async def test_pages_have_first_what_nobody_has_set_and_then_the_latest(auth: Installation, operator: Person) -> None:
    for number in range(5):
        await put(auth, operator, f"m{number}", valid_from=auth.now + number)
    await put(auth, operator, "large", input="5")
    for size in (1, 2, 3, 20):
        seen: list[pb.PriceEntry] = []
        cursor = ""
        while not seen or cursor:
            request = pb.ListPricesRequest(page_size=size, cursor=cursor)
            page = await auth.call(operator, "ListPrices", request)
            assert len(page.prices) <= size
            seen += page.prices
            cursor = page.next_cursor
        subjects = [entry.subject for entry in seen]
        assert subjects[:2] == ["fast/llama_cpp-0", "fast/openai-1"]
        assert subjects[2:6] == ["m4", "m3", "m2", "m1"] and sorted(subjects[6:]) == ["large", "m0"]
    (only,) = (await auth.call(operator, "ListPrices", pb.ListPricesRequest(subject="fast/openai-1"))).prices
    assert only.source.startswith("genai-prices ")
    for bad in ({"page_size": 101}, {"page_size": -1}):
        async with refused(ErrorKind.UNPROCESSABLE, "limit"):
            await auth.call(operator, "ListPrices", pb.ListPricesRequest(**bad))
    async with refused(ErrorKind.UNPROCESSABLE, "cursor"):
        await auth.call(operator, "ListPrices", pb.ListPricesRequest(cursor="unset-x"))


async def test_more_deployments_than_anybody_has_are_refused(database: Database, auth: Installation) -> None:
    lookup = PriceLookup(database, SETTINGS.metering, MODELS, auth.clock)
    many = [metering_pb2.DeploymentRef(deployment=f"m/openai-{n}", model=f"m{n}") for n in range(5_001)]
    async with refused(ErrorKind.INVALID_VALUE, "deployments"):
        await lookup.resolve(metering_pb2.ResolvePricesRequest(deployments=many))
    answer = await lookup.resolve(metering_pb2.ResolvePricesRequest(deployments=many[:1_200]))
    assert {dated.deployment for dated in answer.prices} == {ref.deployment for ref in many[:1_200]}
